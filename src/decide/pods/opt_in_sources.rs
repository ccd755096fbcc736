//! The opt-in of a pod, with the annotations of its namespace and owners. Pods whose opt-in cannot
//! be read are reconciled later.

use std::sync::Arc;
use std::time::Duration;

use super::waiting_pod::PodOptIn;
use super::{Action, Observation, Step};
use crate::decide::opt_in::{InvalidAnnotation, OptIn, OptInPolicy};
use crate::model::{Annotations, NamespaceView, Owner, PodRef, PodView};

/// Delay before a pod is reconciled again whose namespace could not be read. Longer than the 5 s
/// for which the adapter remembers that the API server did not answer.
const UNDECIDED_RETRY: Duration = Duration::from_secs(6);

/// Distinct invalid annotations that are counted and logged. Further ones are ignored.
const MAX_INVALID_ANNOTATIONS: usize = 256;

/// The API server's part of a pod's opt-in.
#[derive(Debug, Clone)]
pub struct OptInSources {
    /// The pod's namespace.
    pub namespace: Arc<NamespaceView>,
    /// Annotations of the owners, the nearest first; `None` where the pod and its namespace decide
    /// alone.
    pub owners: Option<Vec<Arc<Annotations>>>,
}

impl OptInSources {
    /// The owner whose annotations decide, if pod and namespace do not decide alone.
    pub fn deciding_owner<'a>(policy: &OptInPolicy, pod: &'a PodView, namespace: &NamespaceView) -> Option<&'a Owner> {
        let opt_in = policy.evaluate(pod, &namespace.labels, &namespace.annotations, None, &mut Vec::new());
        pod.owner.as_ref().filter(|_| opt_in == OptIn::NeedsOwners)
    }

    fn evaluate(&self, policy: &OptInPolicy, pod: &PodView, invalid: &mut Vec<InvalidAnnotation>) -> OptIn {
        let NamespaceView { labels, annotations } = &*self.namespace;
        let owners = self.owners.as_ref().map(|owners| owners.iter().map(|owner| &**owner).collect::<Vec<_>>());
        policy.evaluate(pod, labels, annotations, owners.as_deref(), invalid)
    }
}

impl Step<'_> {
    /// Reads the opt-in, at most once at a time for each pod. The result decides on the pod's state
    /// at that time.
    pub(super) fn read_opt_in(&mut self, pod: &PodView) {
        if let Some(waiting) = self.pods.waiting.get_mut(&pod.pod).filter(|waiting| !waiting.is_reading_opt_in) {
            waiting.is_reading_opt_in = true;
            self.actions.push(Action::ReadOptIn(pod.clone()));
        }
    }

    pub(super) fn on_opt_in(&mut self, pod: &PodRef, result: Result<OptInSources, String>) {
        let Some(waiting) = self.pods.waiting.get_mut(pod) else { return };
        waiting.is_reading_opt_in = false;
        let view = waiting.view.clone();
        let sources = match result {
            Ok(sources) => sources,
            Err(error) => return self.retry_later(pod, error),
        };
        self.pods.undecided.remove(pod);
        let mut invalid = Vec::new();
        let policy = &self.context.policy.opt_in;
        let opt_in = sources.evaluate(policy, &view, &mut invalid);
        let priority = policy.priority(&view, &mut invalid);
        self.observe_invalid_annotations(pod, invalid);
        match opt_in {
            OptIn::Yes { on_denied, repositories } => {
                self.reconcile_opted_in(&view, &PodOptIn { on_denied, repositories, priority })
            }
            OptIn::No(reason) => self.reconcile_opted_out(&view, reason),
            // The pod's annotations changed during the read.
            OptIn::NeedsOwners => self.read_opt_in(&view),
        }
    }

    fn observe_invalid_annotations(&mut self, pod: &PodRef, annotations: Vec<InvalidAnnotation>) {
        for annotation in annotations {
            if self.pods.invalid_annotations.len() < MAX_INVALID_ANNOTATIONS
                && self.pods.invalid_annotations.insert(annotation.clone())
            {
                self.observe(Observation::InvalidAnnotation { pod: pod.clone(), annotation });
            }
        }
    }

    fn retry_later(&mut self, pod: &PodRef, error: String) {
        self.pods.retry_undecided_at.get_or_insert(self.context.now + UNDECIDED_RETRY);
        if self.pods.undecided.insert(pod.clone()) {
            self.observe(Observation::OptInUnreadable { pod: pod.clone(), error });
        }
    }

    pub(super) fn reconcile_undecided(&mut self) {
        if self.pods.retry_undecided_at.is_none_or(|at| at > self.context.now) {
            return;
        }
        self.pods.retry_undecided_at = None;
        for pod in self.pods.undecided.clone() {
            self.reconcile_pod(&pod);
        }
    }
}
