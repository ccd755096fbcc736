//! The opt-in of a pod, with the annotations of its namespace and owners. Pods whose opt-in cannot
//! be read are reconciled later.

use std::sync::Arc;
use std::time::Duration;

use super::waiting_pod::PodOptIn;
use super::{PodController, WorkResult, now};
use crate::decide::opt_in::{InvalidAnnotation, OptIn, OptInPolicy};
use crate::model::{PodRef, PodView};
use crate::ports::{Annotations, ClusterError, NamespaceView, PodReader};

/// Delay before a pod is reconciled again whose namespace could not be read. Longer than the 5 s
/// for which the adapter remembers that the API server did not answer.
const UNDECIDED_RETRY: Duration = Duration::from_secs(6);

/// Distinct invalid annotations that are counted and logged. Further ones are ignored.
const MAX_INVALID_ANNOTATIONS: usize = 256;

/// The API server's part of a pod's opt-in.
pub(super) struct OptInSources {
    namespace: Arc<NamespaceView>,
    /// Annotations of the owners; `None` where the pod and its namespace decide alone.
    owners: Option<Vec<Arc<Annotations>>>,
}

impl OptInSources {
    async fn read(cluster: &dyn PodReader, policy: &OptInPolicy, pod: &PodView) -> Result<Self, ClusterError> {
        let namespace = cluster.namespace(&pod.pod.k8s_namespace).await?;
        let (labels, annotations) = (&namespace.labels, &namespace.annotations);
        let opt_in = policy.evaluate(pod, labels, annotations, None, &mut Vec::new());
        let owners = match (opt_in, &pod.owner) {
            (OptIn::NeedsOwners, Some(owner)) => Some(cluster.owners(&pod.pod.k8s_namespace, owner).await?),
            _ => None,
        };
        Ok(Self { namespace, owners })
    }
}

impl PodController {
    /// Reads the opt-in, at most once at a time for each pod. The result decides on the pod's state
    /// at that time.
    pub(super) fn read_opt_in(&mut self, pod: &PodView) {
        let Some(waiting) = self.waiting.get_mut(&pod.pod).filter(|waiting| !waiting.is_reading_opt_in) else { return };
        waiting.is_reading_opt_in = true;
        let (policy, cluster) = (Arc::clone(&self.policy.borrow()), Arc::clone(&self.cluster));
        let (pod, permits, stopping) = (pod.clone(), Arc::clone(&self.api_permits), self.stopping.clone());
        self.work.spawn(async move {
            let request = async {
                let _permit = permits.acquire().await;
                OptInSources::read(&*cluster, &policy.opt_in, &pod).await
            };
            let result = stopping.run_until_cancelled(request).await;
            result.map_or(WorkResult::Nothing, |sources| WorkResult::OptInRead { pod: pod.pod, result: sources })
        });
    }

    pub(super) fn on_opt_in(&mut self, pod: &PodRef, result: Result<OptInSources, ClusterError>) {
        let Some(waiting) = self.waiting.get_mut(pod) else { return };
        waiting.is_reading_opt_in = false;
        let view = waiting.view.clone();
        let OptInSources { namespace, owners } = match result {
            Ok(sources) => sources,
            Err(error) => return self.retry_later(pod, &error),
        };
        self.undecided.remove(pod);
        let mut invalid = Vec::new();
        let owners = owners.as_ref().map(|owners| owners.iter().map(|owner| &**owner).collect::<Vec<_>>());
        let policy = Arc::clone(&self.policy.borrow());
        let (labels, annotations) = (&namespace.labels, &namespace.annotations);
        let opt_in = policy.opt_in.evaluate(&view, labels, annotations, owners.as_deref(), &mut invalid);
        let priority = policy.opt_in.priority(&view, &mut invalid);
        self.warn_of_invalid_annotations(&view, invalid);
        match opt_in {
            OptIn::Yes { on_denied, repositories } => {
                self.reconcile_opted_in(&view, &PodOptIn { on_denied, repositories, priority })
            }
            OptIn::No(reason) => self.reconcile_opted_out(&view, reason),
            // The pod's annotations changed during the read.
            OptIn::NeedsOwners => self.read_opt_in(&view),
        }
    }

    fn warn_of_invalid_annotations(&mut self, pod: &PodView, annotations: Vec<InvalidAnnotation>) {
        for annotation in annotations {
            if self.invalid_annotations.len() < MAX_INVALID_ANNOTATIONS
                && self.invalid_annotations.insert(annotation.clone())
            {
                self.metrics.invalid_annotation_seen();
                let InvalidAnnotation { key, value } = annotation;
                tracing::warn!(
                    pod = %pod.pod, key, value,
                    "an annotation's value is not understood, so the annotation permits nothing; use \"true\""
                );
            }
        }
    }

    fn retry_later(&mut self, pod: &PodRef, error: &ClusterError) {
        self.retry_undecided_at.get_or_insert(now() + UNDECIDED_RETRY);
        if self.undecided.insert(pod.clone()) {
            tracing::warn!(
                %pod, %error,
                "cannot read the pod's namespace or owner, so the opt-in is unknown; the agent retries"
            );
        }
    }

    pub(super) fn reconcile_undecided(&mut self) {
        if self.retry_undecided_at.is_none_or(|at| at > now()) {
            return;
        }
        self.retry_undecided_at = None;
        for pod in self.undecided.clone() {
            self.reconcile_pod(&pod);
        }
    }
}
