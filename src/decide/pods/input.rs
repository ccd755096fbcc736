//! The inputs, and the context in which an input is handled.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::opt_in_sources::OptInSources;
use crate::decide::policy::Policy;
use crate::decide::recovery_queue::RecoveryEnd;
use crate::decide::stalled_connections::TcpConnection;
use crate::model::{KubeletEvent, OutageKind, PodEvent, PodRef, PodReportKind, RecoveredImage, RecoveryOutcome};
use crate::oci::{Digest, Reference};

/// Targets of this node's image records, by name.
pub type ImageRecords = BTreeMap<String, Digest>;

/// A change, a result or a lapse of time.
#[derive(Debug, Clone)]
pub enum Input {
    /// A pod was applied or deleted.
    Pod(PodEvent),
    /// The result of [`super::Action::ReadOptIn`], or the error's text.
    OptInRead {
        /// The pod.
        pod: PodRef,
        /// The namespace and the owners.
        result: Result<OptInSources, String>,
    },
    /// The result of [`super::Action::ReadKubeletEvents`], the oldest Event first.
    KubeletEventsRead {
        /// The pod.
        pod: PodRef,
        /// The kubelet's Events.
        events: Vec<KubeletEvent>,
    },
    /// The result of [`super::Action::ProbeRegistry`].
    RegistryProbed(RegistryProbe),
    /// The end of [`super::Action::Recover`].
    RecoveryEnded {
        /// The image.
        reference: Reference,
        /// The end.
        result: RecoveryResult,
    },
    /// The end of [`super::Action::RemoveRecord`], if the record was removed.
    RecordRemoved {
        /// The image.
        reference: Reference,
        /// Pods that wait for the image.
        pods: Vec<PodRef>,
    },
    /// The result of [`super::Action::MeasureDisks`].
    DisksMeasured {
        /// A refused recovery has room now.
        has_room: bool,
    },
    /// The result of [`super::Action::EndConnections`]: the ended connections, the longest silent
    /// first.
    ConnectionsEnded(Vec<TcpConnection>),
    /// The inventory of a peer changed.
    ProvidersChanged,
    /// The policy changed.
    PolicyChanged,
    /// The image records of this node changed.
    ImageRecordsChanged,
    /// The runtime's permission of imports changed.
    ImportsChanged,
    /// The driver's interval passed.
    Tick,
    /// The instant of [`super::Pods::next_due`] passed.
    Due,
}

/// A registry's answer to a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryProbe {
    /// The registry.
    pub registry: String,
    /// Whether the registry answered.
    pub result: Result<(), OutageKind>,
}

/// The end of a recovery or of a dry run.
#[derive(Debug, Clone)]
pub enum RecoveryResult {
    /// The image is here.
    Recovered {
        /// The result of the recovery.
        image: RecoveredImage,
        /// Text of the pods' Events.
        note: String,
    },
    /// The dry run found providers.
    DryRun {
        /// Text of the pods' Events.
        note: String,
    },
    /// The recovery failed.
    NotRecovered(FailedRecovery),
}

/// A recovery that failed.
#[derive(Debug, Clone)]
pub struct FailedRecovery {
    /// The retry.
    pub end: RecoveryEnd,
    /// The outcome that is reported once to each pod.
    pub outcome: RecoveryOutcome,
    /// Kind of the pods' Events.
    pub kind: PodReportKind,
    /// Blobs without a provider, if these blobs are the reason.
    pub unprovided_blobs: Vec<Digest>,
    /// Text of the error, for the log.
    pub error: String,
    /// Text of the pods' Events.
    pub note: String,
}

/// The world at the time of an input.
pub struct Context<'a> {
    /// Monotonic time.
    pub now: Instant,
    /// Time of day, for announced outages.
    pub clock: SystemTime,
    /// A random number in 0..1, which spreads the retries of many nodes.
    pub jitter: f64,
    /// The policy in force.
    pub policy: &'a Policy,
    /// Image records of this node; `None` before the first list.
    pub image_records: Option<Arc<ImageRecords>>,
    /// Facts about peers and running recoveries.
    pub facts: &'a dyn Facts,
}

/// Facts about peers and running recoveries, of which a decision needs a few among many.
pub trait Facts {
    /// Number of peers that announce an outage of the registry.
    fn count_outage_reports(&self, registry: &str) -> usize;

    /// Whether a peer provides the image under this reference.
    fn has_provider(&self, reference: &Reference) -> bool;

    /// Whether a peer has the whole blob.
    fn has_blob_provider(&self, digest: Digest) -> bool;

    /// Whether the running recovery of the image has begun to write image records.
    fn is_recording(&self, reference: &Reference) -> bool;

    /// Whether a recovery, rather than a pull, recently wrote the image record of this name with
    /// this target.
    fn has_recorded(&self, name: &Reference, target: Digest) -> bool;

    /// Whether a recovery was refused for lack of room.
    fn has_rejected_reservation(&self) -> bool;

    /// Whether the API server has denied a nudge.
    fn is_nudge_denied(&self) -> bool;
}
