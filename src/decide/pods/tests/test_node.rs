//! The decisions of one node, with facts that a test sets.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::super::*;
use crate::decide::policy::Policy;
use crate::decide::recovery_queue::RecoveryEnd;
use crate::model::{
    ContainerKind, ContainerView, NamespaceView, PodView, PullPolicy, RecoveredImage, RecoveryOutcome, WaitingState,
};

pub(super) const IMAGE: &str = "r.test/shop/checkout:v1";
pub(super) const REFUSED: &str = "dial tcp 10.0.0.1:443: connect: connection refused";
pub(super) const BACK_OFF: &str = "Back-off pulling image";

#[derive(Default)]
pub(super) struct TestFacts {
    pub(super) provided: bool,
    pub(super) blobs: BTreeSet<Digest>,
    pub(super) recording: bool,
    pub(super) rejected: bool,
}

impl Facts for TestFacts {
    fn count_outage_reports(&self, _: &str) -> usize {
        0
    }

    fn has_provider(&self, _: &Reference) -> bool {
        self.provided
    }

    fn has_blob_provider(&self, digest: Digest) -> bool {
        self.blobs.contains(&digest)
    }

    fn is_recording(&self, _: &Reference) -> bool {
        self.recording
    }

    fn has_recorded(&self, _: &Reference, _: Digest) -> bool {
        false
    }

    fn has_rejected_reservation(&self) -> bool {
        self.rejected
    }

    fn is_nudge_denied(&self) -> bool {
        false
    }
}

pub(super) struct TestNode {
    pub(super) pods: Pods,
    pub(super) policy: Policy,
    pub(super) image_records: Arc<ImageRecords>,
    pub(super) facts: TestFacts,
    pub(super) now: Instant,
}

impl TestNode {
    pub(super) fn new() -> Self {
        Self::with_options(RecoveryOptions::default())
    }

    pub(super) fn with_options(recovery: RecoveryOptions) -> Self {
        let (policy, now) = (Policy::default(), Instant::now());
        let options = PodsOptions { recovery, is_probing: true, has_connections: true };
        let pods = Pods::new(options, policy.budgets.concurrent_recoveries, now);
        Self { pods, policy, image_records: Arc::default(), facts: TestFacts::default(), now }
    }

    pub(super) fn handle(&mut self, input: Input) -> Vec<Action> {
        let context = Context {
            now: self.now,
            clock: SystemTime::UNIX_EPOCH,
            jitter: 0.5,
            policy: &self.policy,
            image_records: Some(Arc::clone(&self.image_records)),
            facts: &self.facts,
        };
        self.pods.handle(input, &context)
    }

    pub(super) fn apply(&mut self, pod: PodView) -> Vec<Action> {
        self.handle(Input::Pod(PodEvent::Applied(Box::new(pod))))
    }

    /// Answers the read of the pod's opt-in. Returns the actions without the publication of
    /// outages.
    pub(super) fn answer(&mut self, name: &str, result: Result<OptInSources, String>) -> Vec<Action> {
        let mut actions = self.handle(Input::OptInRead { pod: pod(name, "").pod, result });
        actions.retain(|action| !matches!(action, Action::PublishOutages));
        actions
    }

    /// Ends the recovery of [`IMAGE`].
    pub(super) fn end(&mut self, result: RecoveryResult) -> Vec<Action> {
        self.handle(Input::RecoveryEnded { reference: IMAGE.parse().unwrap(), result })
    }
}

/// A pod whose pull failed with this message.
pub(super) fn pod(name: &str, message: &str) -> PodView {
    PodView {
        pod: PodRef { k8s_namespace: "shop".into(), name: name.into(), uid: format!("uid-{name}") },
        annotations: [("lighterman.dev/recover".to_owned(), "true".to_owned())].into(),
        containers: vec![container("c", IMAGE, waiting("ErrImagePull", message))],
        image_volumes: Vec::new(),
        owner: None,
        is_static: false,
        priority: 0,
        pull_secrets: Vec::new(),
        is_ending: false,
    }
}

/// A pod that the kubelet has not started yet.
pub(super) fn pending_pod(name: &str) -> PodView {
    PodView { containers: vec![container("c", IMAGE, waiting("ContainerCreating", ""))], ..pod(name, "") }
}

pub(super) fn container(name: &str, image: &str, waiting: Option<WaitingState>) -> ContainerView {
    let (kind, pull_policy) = (ContainerKind::Ordinary, PullPolicy::IfNotPresent);
    ContainerView { name: name.into(), kind, image: image.into(), pull_policy, waiting }
}

pub(super) fn waiting(reason: &str, message: &str) -> Option<WaitingState> {
    Some(WaitingState { reason: reason.into(), message: message.into() })
}

/// A namespace that opted in.
pub(super) fn opted_in() -> Result<OptInSources, String> {
    let annotations = [("lighterman.dev/allow".to_owned(), "true".to_owned())].into();
    let namespace = Arc::new(NamespaceView { annotations, ..NamespaceView::default() });
    Ok(OptInSources { namespace, owners: None })
}

pub(super) fn recovered(fetched: usize) -> RecoveryResult {
    let image = RecoveredImage {
        digest: Digest::of(b"image"),
        bytes: 1,
        fetched,
        present: 0,
        providers: BTreeMap::new(),
        took: Duration::from_secs(1),
        tag_note: None,
    };
    RecoveryResult::Recovered { image, note: "recovered".into() }
}

pub(super) fn failed(end: RecoveryEnd, outcome: RecoveryOutcome) -> RecoveryResult {
    let kind = match end {
        RecoveryEnd::NoProvider => PodReportKind::NoProvider,
        RecoveryEnd::Final => PodReportKind::NotRecoverable,
        RecoveryEnd::Done | RecoveryEnd::Failed | RecoveryEnd::Abandoned => PodReportKind::Failed,
    };
    let (error, note) = ("an error".to_owned(), format!("outcome {}", outcome.label()));
    RecoveryResult::NotRecovered(FailedRecovery { end, outcome, kind, unprovided_blobs: Vec::new(), error, note })
}
