//! Running recoveries, and the start of recoveries that are due.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::{PodController, WorkResult, now};
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::model::PodRef;
use crate::oci::{Digest, Reference};

pub(super) struct RunningRecovery {
    pub(super) stop: CancellationToken,
    pub(super) began: Instant,
    /// When the pod that wants the image was seen; `None` for a retry.
    pub(super) requested: Option<Instant>,
    pub(super) progress: Arc<Progress>,
    /// Pods that waited for the image and started before the recovery's end reached this task. Each
    /// still gets an Event.
    pub(super) started_pods: BTreeSet<PodRef>,
}

impl PodController {
    /// Readies only recoveries that have a provider now: in a large cluster some peer announces an
    /// item all the time.
    pub(super) fn on_providers_changed(&mut self) {
        let (resolver, unprovided) = (&self.recoverer.resolver, &self.unprovided_blobs);
        let has_provider = |digest: &Digest| !resolver.inventory.blob_providers(*digest).is_empty();
        self.queue.providers_changed(|reference| {
            resolver.has_provider(reference)
                && unprovided.get(reference).is_none_or(|blobs| blobs.iter().all(has_provider))
        });
    }

    pub(super) fn start_due_recoveries(&mut self) {
        while let Some(reference) = self.queue.start_next(now()) {
            let stop = CancellationToken::new();
            let progress = self.tracker.begin(&reference);
            let running = RunningRecovery {
                stop: stop.clone(),
                began: Instant::now(),
                requested: self.requested_since.remove(&reference),
                progress: Arc::clone(&progress),
                started_pods: BTreeSet::new(),
            };
            self.running.insert(reference.clone(), running);
            self.metrics.recovery_started();
            let recoverer = Arc::clone(&self.recoverer);
            let request = self.request_for(reference);
            let dry_run = self.options.dry_run;
            self.work.spawn(async move {
                if dry_run {
                    let result = recoverer.find(&request).await;
                    return WorkResult::DryRunEnded { reference: request.reference, result };
                }
                let result = recoverer.recover(&request, &progress, &stop).await;
                WorkResult::RecoveryEnded { reference: request.reference, result }
            });
        }
    }

    /// The image, with the pull secrets of all pods that wait for it.
    fn request_for(&self, reference: Reference) -> RecoveryRequest {
        let pods = self.waiting.iter().filter(|(_, pod)| pod.needed.contains(&reference));
        let secrets: BTreeSet<_> = pods
            .flat_map(|(pod, waiting)| {
                waiting.view.pull_secrets.iter().map(|name| (pod.k8s_namespace.clone(), name.clone()))
            })
            .collect();
        let verify_layers = self.waiting.values().any(|waiting| waiting.is_content_missing(&reference));
        RecoveryRequest { reference, pull_secrets: secrets.into_iter().collect(), verify_layers, resolved_digest: None }
    }
}
