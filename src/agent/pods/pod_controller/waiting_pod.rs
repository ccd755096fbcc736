//! A pod that waits: what it needs, and what is to be done about it at which moment.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::decide::cause::{Cause, classify, is_pending, waits_for_image};
use crate::decide::repositories::RepositoryList;
use crate::model::{ContainerKind, ContainerView, PodView};
use crate::oci::Reference;

/// One pod while any of its containers waits.
pub(super) struct WaitingPod {
    /// As last seen.
    pub(super) view: PodView,
    /// When it was seen so.
    pub(super) seen_at: Instant,
    /// Since when it waits.
    waiting_since: Instant,
    /// Containers whose pull failed since the registries were told of it last.
    pub(super) fresh_failures: BTreeSet<String>,
    /// The API server is being asked whether it may be helped.
    pub(super) is_reading_opt_in: bool,
    /// How it is helped, if so.
    pub(super) opt_in: Option<PodOptIn>,
    /// The images that it needs from us.
    pub(super) needed: BTreeSet<Reference>,
    /// None of its containers has begun for longer than that usually takes.
    pub(super) sandbox_suspected: bool,
    /// The sandbox's image, where the kubelet's Events name it as what is missing.
    pub(super) missing_sandbox_image: Option<(Reference, Cause)>,
    /// Its pulls were looked into, because one of them may have stalled.
    stall_suspected: bool,
    /// Images whose pull counts as stalled.
    pub(super) stalled_images: BTreeSet<String>,
    /// When the kubelet's Events are read next.
    read_events_at: Option<Instant>,
    /// Times that they were read.
    event_reads: u32,
    /// When its image had come.
    pub(super) imported_at: Option<Instant>,
    /// Whether and when it is deleted if it still waits.
    pub(super) deletion: Deletion,
}

/// How a pod is helped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PodOptIn {
    /// Also where the registry denies the image.
    pub(super) on_denied: bool,
    /// What it may have.
    pub(super) repositories: RepositoryList,
    /// How urgent it is.
    pub(super) priority: i64,
}

/// A deletion, of which there is one at most: what is made again has another UID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deletion {
    NotPlanned,
    At(Instant),
    Tried,
}

/// How long a pod may be pending before its sandbox's image is suspected: images of a node's usual pods are pulled and unpacked by then.
const SANDBOX_SUSPECT_AFTER: Duration = Duration::from_secs(8);

/// Between two readings of a pod's Events, doubled four-fold each time; the API server goes through the namespace's Events for each.
const MIN_EVENTS_INTERVAL: Duration = Duration::from_secs(10);
const MAX_EVENTS_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// How long a broken image may wait for a node that holds what it lacks, before its record is removed. An agent that has just started knows
/// of no peers, and a node that restarts is back in a minute or two.
const REMOVE_RECORD_AFTER: Duration = Duration::from_secs(120);

/// Readings for one pod; what was not said in half an hour is not said.
const MAX_EVENT_READS: u32 = 8;

impl WaitingPod {
    pub(super) fn new(view: PodView, now: Instant) -> Self {
        Self {
            // Everything that fails is new.
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

    /// The pod as it is now.
    pub(super) fn update(&mut self, view: PodView, now: Instant) {
        if view == self.view {
            return;
        }
        let known = |container: &ContainerView| self.view.containers.contains(container);
        let fresh: Vec<_> = failures(&view).filter(|container| !known(container)).map(|c| c.name.clone()).collect();
        self.fresh_failures.extend(fresh);
        if !view.containers.iter().all(is_pending) {
            // The sandbox is there: a container got past it.
            self.missing_sandbox_image = None;
            self.sandbox_suspected = false;
        }
        self.view = view;
        self.seen_at = now;
    }

    /// It is not, or no longer, to be helped.
    pub(super) fn clear_opt_in(&mut self) {
        self.opt_in = None;
        self.read_events_at = None;
        if let Deletion::At(_) = self.deletion {
            self.deletion = Deletion::NotPlanned;
        }
    }

    /// Suspects its sandbox's image when the time has come; whether that is new.
    pub(super) fn mark_sandbox_suspected(&mut self, now: Instant) -> bool {
        let is_late = now.saturating_duration_since(self.waiting_since) >= SANDBOX_SUSPECT_AFTER;
        let suspect = is_late && !self.sandbox_suspected && self.view.containers.iter().all(is_pending);
        self.sandbox_suspected |= suspect;
        suspect
    }

    /// Whether it has waited for longer than a pull may take.
    pub(super) fn is_late(&self, stalled_after: Option<Duration>, now: Instant) -> bool {
        stalled_after.is_some_and(|after| now.saturating_duration_since(self.waiting_since) >= after)
    }

    /// Reads its Events now, once, when it has waited for a pull for so long.
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

    /// Its Events are read soon: its status does not name the cause.
    pub(super) fn schedule_event_read(&mut self, now: Instant) {
        let wait = MIN_EVENTS_INTERVAL.saturating_mul(1 << (2 * self.event_reads).min(16)).min(MAX_EVENTS_INTERVAL);
        if self.event_reads < MAX_EVENT_READS {
            self.read_events_at.get_or_insert(if self.event_reads == 0 { now } else { now + wait });
        }
    }

    /// Whether its Events are to be read now; the reading counts as done.
    pub(super) fn take_due_event_read(&mut self, now: Instant) -> bool {
        let due = self.read_events_at.is_some_and(|at| at <= now);
        if due {
            self.read_events_at = None;
            self.event_reads += 1;
        }
        due
    }

    /// Whether the kubelet has said for a while that it has this image and that its content is missing.
    pub(super) fn is_image_broken(&self, reference: &Reference, now: Instant) -> bool {
        if now.saturating_duration_since(self.waiting_since) < REMOVE_RECORD_AFTER {
            return false;
        }
        self.is_content_missing(reference)
    }

    /// Whether the kubelet says that content of the image is missing or damaged.
    pub(super) fn is_content_missing(&self, reference: &Reference) -> bool {
        let mut waiting =
            self.view.containers.iter().filter(|container| container.image.parse().as_ref() == Ok(reference));
        waiting.any(|container| container.waiting.as_ref().and_then(classify) == Some(Cause::MissingContent))
    }

    /// Whether only a new pod would get past this: it is helped and every image is here, nothing of it runs or has run, and a container
    /// that somebody added to a running pod is no reason to end the pod.
    pub(super) fn is_stuck(&self, is_here: impl Fn(&Reference) -> bool) -> bool {
        let containers = &self.view.containers;
        self.opt_in.is_some()
            && !self.needed.is_empty()
            && self.needed.iter().all(is_here)
            && containers.iter().all(|container| container.waiting.is_some())
            && containers.iter().all(|container| container.kind != ContainerKind::Ephemeral)
    }
}

/// Containers that tell of a pull which just failed; while it backs off, the kubelet only repeats itself.
fn failures(view: &PodView) -> impl Iterator<Item = &ContainerView> {
    let is_new = |container: &&ContainerView| {
        waits_for_image(container)
            && container.waiting.as_ref().is_some_and(|waiting| waiting.reason != "ImagePullBackOff")
    };
    view.containers.iter().filter(is_new)
}
