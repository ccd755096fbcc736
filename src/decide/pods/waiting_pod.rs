//! A waiting pod: the images that the pod needs, and the instants of its next steps.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::decide::allowed_repositories::RepositoryList;
use crate::decide::cause::{Cause, classify, is_pending, waits_for_image};
use crate::model::{ContainerKind, ContainerView, PodView};
use crate::oci::Reference;

/// One pod while any of its containers waits.
#[derive(Debug)]
pub(super) struct WaitingPod {
    pub(super) view: PodView,
    /// When the pod changed to `view`.
    pub(super) seen_at: Instant,
    /// When the agent first saw the pod wait.
    waiting_since: Instant,
    /// Containers whose pull failed since the last record of evidence.
    pub(super) fresh_failures: BTreeSet<String>,
    /// A read of the pod's opt-in is in flight.
    pub(super) is_reading_opt_in: bool,
    /// The opt-in; `None` for a pod without recovery.
    pub(super) opt_in: Option<PodOptIn>,
    /// Images that the pod needs from recoveries.
    pub(super) needed: BTreeSet<Reference>,
    /// No container has started within [`SANDBOX_SUSPECT_AFTER`].
    pub(super) sandbox_suspected: bool,
    /// The sandbox's image that an Event of the kubelet names as missing, and the cause.
    pub(super) missing_sandbox_image: Option<(Reference, Cause)>,
    /// The Events were read once for a stalled pull.
    stall_suspected: bool,
    /// Images whose pull has stalled.
    pub(super) stalled_images: BTreeSet<String>,
    /// When the kubelet's Events are read next.
    read_events_at: Option<Instant>,
    /// Reads of the kubelet's Events so far.
    event_reads: u32,
    /// When the first of its images arrived.
    pub(super) imported_at: Option<Instant>,
    /// The deletion if the pod still waits.
    pub(super) deletion: Deletion,
}

/// The opt-in of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PodOptIn {
    /// Also when the registry denies the image.
    pub(super) on_denied: bool,
    /// Repositories that the pod may recover from.
    pub(super) repositories: RepositoryList,
    /// The pod's priority in the queue.
    pub(super) priority: i64,
}

/// State of the pod's deletion. A pod is deleted once at most: a recreated pod has another UID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deletion {
    NotPlanned,
    At(Instant),
    Tried,
}

/// Pending time after which the sandbox's image is suspected. A node pulls and unpacks the images
/// of usual pods within this time.
const SANDBOX_SUSPECT_AFTER: Duration = Duration::from_secs(8);

/// Bounds of the interval between two reads of a pod's Events, which grows four-fold each time. For
/// each read, the API server scans the namespace's Events.
const MIN_EVENTS_INTERVAL: Duration = Duration::from_secs(10);
const MAX_EVENTS_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// How long a broken image waits for a provider before its record is removed. A newly started agent
/// has no peers yet, and a node restarts within a minute or two.
const REMOVE_RECORD_AFTER: Duration = Duration::from_secs(120);

/// Reads of one pod's Events, which end after half an hour. The kubelet names a cause within this
/// time or not at all.
const MAX_EVENT_READS: u32 = 8;

impl WaitingPod {
    pub(super) fn new(view: PodView, now: Instant) -> Self {
        Self {
            // Every failure is new.
            fresh_failures: failures(&view).map(|container| container.name.clone()).collect(),
            view,
            seen_at: now,
            waiting_since: now,
            is_reading_opt_in: false,
            opt_in: None,
            needed: BTreeSet::new(),
            sandbox_suspected: false,
            missing_sandbox_image: None,
            stall_suspected: false,
            stalled_images: BTreeSet::new(),
            read_events_at: None,
            event_reads: 0,
            imported_at: None,
            deletion: Deletion::NotPlanned,
        }
    }

    /// Replaces the view. An unchanged view changes nothing.
    pub(super) fn update(&mut self, view: PodView, now: Instant) {
        if view == self.view {
            return;
        }
        let is_known = |container: &ContainerView| self.view.containers.contains(container);
        let fresh: Vec<_> = failures(&view).filter(|container| !is_known(container)).map(|c| c.name.clone()).collect();
        self.fresh_failures.extend(fresh);
        if !view.containers.iter().all(is_pending) {
            // A container has started, so the sandbox exists.
            self.missing_sandbox_image = None;
            self.sandbox_suspected = false;
        }
        self.view = view;
        self.seen_at = now;
    }

    /// Ends recovery for a pod that did not opt in, or that no longer does.
    pub(super) fn clear_opt_in(&mut self) {
        self.opt_in = None;
        self.read_events_at = None;
        if let Deletion::At(_) = self.deletion {
            self.deletion = Deletion::NotPlanned;
        }
    }

    /// Suspects the sandbox's image when the pod is late. Returns whether the suspicion is new.
    pub(super) fn mark_sandbox_suspected(&mut self, now: Instant) -> bool {
        let is_late = now.saturating_duration_since(self.waiting_since) >= SANDBOX_SUSPECT_AFTER;
        let is_suspected = is_late && !self.sandbox_suspected && self.view.containers.iter().all(is_pending);
        self.sandbox_suspected |= is_suspected;
        is_suspected
    }

    /// Whether the pod has waited longer than `stalled_after`.
    pub(super) fn is_late(&self, stalled_after: Option<Duration>, now: Instant) -> bool {
        stalled_after.is_some_and(|after| now.saturating_duration_since(self.waiting_since) >= after)
    }

    /// Schedules one read of the Events when an opted-in pod has waited longer than
    /// `stalled_after`.
    pub(super) fn mark_stall_suspected(&mut self, stalled_after: Duration, now: Instant) {
        if self.is_late(Some(stalled_after), now)
            && !self.stall_suspected
            && self.opt_in.is_some()
            && self.view.containers.iter().any(is_pending)
        {
            self.stall_suspected = true;
            self.read_events_at = Some(now);
        }
    }

    /// Schedules a read of the Events, because the status does not name the cause.
    pub(super) fn schedule_event_read(&mut self, now: Instant) {
        let wait = MIN_EVENTS_INTERVAL.saturating_mul(1 << (2 * self.event_reads).min(16)).min(MAX_EVENTS_INTERVAL);
        if self.event_reads < MAX_EVENT_READS {
            self.read_events_at.get_or_insert(if self.event_reads == 0 { now } else { now + wait });
        }
    }

    /// Whether a read of the Events is due; a due read counts as done.
    pub(super) fn take_due_event_read(&mut self, now: Instant) -> bool {
        let is_due = self.read_events_at.is_some_and(|at| at <= now);
        if is_due {
            self.read_events_at = None;
            self.event_reads += 1;
        }
        is_due
    }

    /// Whether the kubelet has reported missing content of this image, for a pod that has waited
    /// [`REMOVE_RECORD_AFTER`].
    pub(super) fn is_image_broken(&self, reference: &Reference, now: Instant) -> bool {
        if now.saturating_duration_since(self.waiting_since) < REMOVE_RECORD_AFTER {
            return false;
        }
        self.is_content_missing(reference)
    }

    /// Whether the kubelet reports that content of the image is missing or damaged.
    pub(super) fn is_content_missing(&self, reference: &Reference) -> bool {
        let mut waiting =
            self.view.containers.iter().filter(|container| container.image.parse().as_ref() == Ok(reference));
        waiting.any(|container| container.waiting.as_ref().and_then(classify) == Some(Cause::MissingContent))
    }

    /// Whether only a new pod would start: the pod opted in, every image is here, and no container
    /// runs or has run. A pod with an ephemeral container is never stuck, because a user adds such
    /// containers to a running pod.
    pub(super) fn is_stuck(&self, is_present: impl Fn(&Reference) -> bool) -> bool {
        let containers = &self.view.containers;
        self.opt_in.is_some()
            && !self.needed.is_empty()
            && self.needed.iter().all(is_present)
            && containers.iter().all(|container| container.waiting.is_some())
            && containers.iter().all(|container| container.kind != ContainerKind::Ephemeral)
    }
}

/// Containers whose status reports a new failed pull. During its back-off, the kubelet repeats the
/// last message.
fn failures(view: &PodView) -> impl Iterator<Item = &ContainerView> {
    let is_new = |container: &&ContainerView| {
        waits_for_image(container)
            && container.waiting.as_ref().is_some_and(|waiting| waiting.reason != "ImagePullBackOff")
    };
    view.containers.iter().filter(is_new)
}
