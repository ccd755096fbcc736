//! Running recoveries.

use std::sync::Arc;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::{PodController, WorkResult, now};
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::decide::pods::{FailedRecovery, Input, RecoveryOrder, RecoveryResult};
use crate::model::{RecoveredImage, RecoveryOutcome, ResolvedImage};
use crate::oci::Reference;

pub(super) struct RunningRecovery {
    pub(super) stop: CancellationToken,
    pub(super) progress: Arc<Progress>,
    began: Instant,
    /// When the pod that wants the image was seen; `None` for a retry.
    requested: Option<Instant>,
}

impl PodController {
    pub(super) fn start_recovery(&mut self, order: RecoveryOrder) {
        let RecoveryOrder { reference, pull_secrets, verify_layers, requested } = order;
        let (stop, progress) = (CancellationToken::new(), self.tracker.begin(&reference));
        let running =
            RunningRecovery { stop: stop.clone(), progress: Arc::clone(&progress), began: Instant::now(), requested };
        self.running.insert(reference.clone(), running);
        self.metrics.recovery_started();
        let request = RecoveryRequest { reference, pull_secrets, verify_layers, resolved_digest: None };
        let (recoverer, dry_run) = (Arc::clone(&self.recoverer), self.dry_run);
        self.work.spawn(async move {
            if dry_run {
                let result = recoverer.find(&request).await;
                return WorkResult::DryRunEnded { reference: request.reference, result };
            }
            let result = recoverer.recover(&request, &progress, &stop).await;
            WorkResult::RecoveryEnded { reference: request.reference, result }
        });
    }

    pub(super) fn end_recovery(&mut self, reference: Reference, result: Result<RecoveredImage, RecoverError>) -> Input {
        let outcome = match &result {
            Ok(recovered) if recovered.fetched == 0 => RecoveryOutcome::AlreadyHere,
            Ok(_) => RecoveryOutcome::Recovered,
            Err(error) => error.outcome(),
        };
        self.record_end(&reference, outcome);
        self.spawn_claim_release(reference.clone());
        self.tracker.end(&reference, result.as_ref().map(RecoveredImage::clone).map_err(RecoverError::to_string));
        let result = match result {
            Ok(image) => {
                let down_since = self.pods.registries().down_since(&reference.repository().registry, now());
                let note = self.pod_notifier.recovered_note(&reference, &image, down_since);
                RecoveryResult::Recovered { image, note }
            }
            Err(RecoverError::Abandoned) => {
                tracing::info!(%reference, "no pod waits for the image any more");
                RecoveryResult::NotRecovered(self.failed_recovery(&RecoverError::Abandoned))
            }
            Err(error) => RecoveryResult::NotRecovered(self.failed_recovery(&error)),
        };
        Input::RecoveryEnded { reference, result }
    }

    pub(super) fn end_dry_run(&mut self, reference: Reference, result: Result<ResolvedImage, RecoverError>) -> Input {
        let result = match result {
            Ok(ResolvedImage { digest, providers, tag_note: _ }) => {
                self.record_end(&reference, RecoveryOutcome::DryRun);
                self.tracker.end(&reference, Err("dry run".to_owned()));
                let note = self.pod_notifier.dry_run_note(&reference, digest, &providers);
                tracing::info!(%reference, %digest, note, "dry run");
                RecoveryResult::DryRun { note }
            }
            Err(error) => {
                self.record_end(&reference, error.outcome());
                self.tracker.end(&reference, Err(error.to_string()));
                RecoveryResult::NotRecovered(self.failed_recovery(&error))
            }
        };
        Input::RecoveryEnded { reference, result }
    }

    fn failed_recovery(&self, error: &RecoverError) -> FailedRecovery {
        FailedRecovery {
            end: error.queue_end(),
            outcome: error.outcome(),
            kind: error.report_kind(),
            unprovided_blobs: error.unprovided_blobs(),
            error: error.to_string(),
            note: self.pod_notifier.failed_note(error),
        }
    }

    fn record_end(&mut self, reference: &Reference, outcome: RecoveryOutcome) {
        let Some(RunningRecovery { stop: _, progress, began, requested }) = self.running.remove(reference) else {
            return;
        };
        self.metrics.recovery_ended(outcome, began.elapsed());
        if let (Some(since), Some(first)) = (requested, progress.first_byte()) {
            self.metrics.first_byte_received(first.saturating_duration_since(since));
        }
    }

    pub(super) fn spawn_claim_release(&mut self, reference: Reference) {
        let recoverer = Arc::clone(&self.recoverer);
        self.work.spawn(async move {
            recoverer.claims.release_all(&reference).await;
            WorkResult::Nothing
        });
    }
}
