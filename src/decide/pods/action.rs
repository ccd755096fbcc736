//! The actions that follow from an input.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::decide::container_records::Subject;
use crate::decide::opt_in::InvalidAnnotation;
use crate::decide::pull_failure::PullVerdict;
use crate::model::{OutageKind, PodRef, PodReport, PodReportKind, PodView, RecoveredImage};
use crate::oci::Reference;

/// An action for the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Recover the image, or only find its providers in a dry run.
    /// [`super::Input::RecoveryEnded`] follows exactly once.
    Recover(RecoveryOrder),
    /// Cancel the running recovery of this image, because no pod waits for the image any more.
    Cancel(Reference),
    /// Remove the record of a broken image if its registry answers now. After a removal,
    /// [`super::Input::RecordRemoved`] follows.
    RemoveRecord {
        /// The broken image.
        reference: Reference,
        /// Pods that wait for the image.
        pods: Vec<PodRef>,
    },
    /// Measure the disks. [`super::Input::DisksMeasured`] follows.
    MeasureDisks,
    /// Read the pod's namespace and owners. [`super::Input::OptInRead`] follows.
    ReadOptIn(PodView),
    /// Read the kubelet's Events about the pod. [`super::Input::KubeletEventsRead`] follows unless
    /// the read fails.
    ReadKubeletEvents(PodRef),
    /// Probe the registry. [`super::Input::RegistryProbed`] follows.
    ProbeRegistry(String),
    /// End containerd's silent connections. [`super::Input::ConnectionsEnded`] follows.
    EndConnections {
        /// Silence after which a connection ends.
        after: Duration,
        /// Servers that were silent before.
        silent_before: BTreeSet<SocketAddr>,
    },
    /// Publish the outages and the healthy registries, which also change by time alone.
    PublishOutages,
    /// Make the kubelet sync the pod now.
    Nudge(PodRef),
    /// Delete a pod that waits although its images are here.
    Delete(PodRef),
    /// Write an Event on the pod.
    Report(PodRef, PodReport),
    /// Send a message about a recovered image to the webhook.
    NotifyRecovered {
        /// The image, as the pods name the image.
        reference: Reference,
        /// The result of the recovery.
        image: RecoveredImage,
        /// Pods that waited for the image.
        pods: Vec<PodRef>,
        /// Text of the pods' Events.
        note: String,
    },
    /// Send a message about an image that was not recovered to the webhook.
    NotifyNotRecovered {
        /// The image, as the pods name the image.
        image: String,
        /// Kind of the pods' Events.
        kind: PodReportKind,
        /// Pods that wait for the image.
        pods: Vec<PodRef>,
        /// Text of the pods' Events.
        note: String,
    },
    /// Log and count.
    Observe(Observation),
}

/// A recovery to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryOrder {
    /// The image, as the pods name the image.
    pub reference: Reference,
    /// Pull secrets of the image's pods, by namespace and name.
    pub pull_secrets: Vec<(String, String)>,
    /// The kubelet found content of the image missing or damaged.
    pub verify_layers: bool,
    /// When the pod that wants the image was seen; `None` for a retry.
    pub requested: Option<Instant>,
}

/// A fact for the log and the metrics, without another effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observation {
    /// A new verdict on a part of a pod.
    Verdict {
        /// The pod.
        pod: PodRef,
        /// The part of the pod.
        subject: Subject,
        /// The verdict.
        verdict: PullVerdict,
    },
    /// A pod started.
    PodStarted {
        /// Time since the first of its images arrived.
        after: Duration,
    },
    /// The image is here, and a pod's kubelet asks the registry nevertheless.
    CredentialsVerified {
        /// The pod.
        pod: PodRef,
        /// The image.
        reference: Reference,
    },
    /// A recovery brought or found the image.
    Recovered {
        /// The image.
        reference: Reference,
        /// The result of the recovery.
        image: RecoveredImage,
        /// Number of waiting pods.
        pods: usize,
    },
    /// A recovery failed.
    NotRecovered {
        /// The image.
        reference: Reference,
        /// The error of the recovery.
        error: String,
        /// Number of waiting pods.
        pods: usize,
        /// The outcome is new to a pod.
        is_new: bool,
    },
    /// A pod has an annotation with an invalid value.
    InvalidAnnotation {
        /// The pod.
        pod: PodRef,
        /// The annotation.
        annotation: InvalidAnnotation,
    },
    /// The opt-in of a pod cannot be read.
    OptInUnreadable {
        /// The pod.
        pod: PodRef,
        /// The error of the read.
        error: String,
    },
    /// A registry went down or came back, according to a probe.
    RegistryProbed {
        /// The registry.
        registry: String,
        /// The result of the probe.
        result: Result<(), OutageKind>,
    },
    /// A pull of containerd succeeded, which ended an outage.
    RegistryReached {
        /// The registry.
        registry: String,
    },
}
