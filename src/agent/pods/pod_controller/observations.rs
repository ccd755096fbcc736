//! Log lines and metrics of the decisions.

use super::PodController;
use crate::decide::container_records::Subject;
use crate::decide::opt_in::InvalidAnnotation;
use crate::decide::pods::Observation;
use crate::decide::pull_failure::PullVerdict;
use crate::model::PodRef;

impl PodController {
    pub(super) fn record(&self, observation: Observation) {
        match observation {
            Observation::Verdict { pod, subject, verdict } => {
                self.record_verdict(&pod, &subject, &verdict);
            }
            Observation::PodStarted { after } => self.metrics.pod_started(after),
            Observation::CredentialsVerified { pod, reference } => tracing::warn!(
                %pod, %reference,
                "the image is here and the kubelet asks its registry all the same"
            ),
            Observation::Recovered { reference, image, pods } => tracing::info!(
                %reference, digest = %image.digest, bytes = image.bytes, fetched = image.fetched,
                there = image.present, took = ?image.took, pods, "recovered"
            ),
            // A warning for each outcome that is new to a pod; repeated outcomes are logged at
            // debug level.
            Observation::NotRecovered { reference, error, pods, is_new: true } => {
                tracing::warn!(%reference, %error, pods, "not recovered");
            }
            Observation::NotRecovered { reference, error, pods, is_new: false } => {
                tracing::debug!(%reference, %error, pods, "not recovered again");
            }
            Observation::InvalidAnnotation { pod, annotation: InvalidAnnotation { key, value } } => {
                self.metrics.invalid_annotation_seen();
                tracing::warn!(
                    %pod, key, value,
                    "an annotation's value is not understood, so the annotation permits nothing; use \"true\""
                );
            }
            Observation::OptInUnreadable { pod, error } => tracing::warn!(
                %pod, %error,
                "cannot read the pod's namespace or owner, so the opt-in is unknown; the agent retries"
            ),
            Observation::RegistryProbed { registry, result: Ok(()) } => {
                tracing::info!(registry, "the registry answers again");
            }
            Observation::RegistryProbed { registry, result: Err(kind) } => {
                tracing::warn!(registry, how = %kind, "the registry does not answer any more");
            }
            Observation::RegistryReached { registry } => {
                tracing::info!(registry, "a pull succeeded, so the registry can be reached again");
            }
        }
    }

    fn record_verdict(&self, pod: &PodRef, subject: &Subject, verdict: &PullVerdict) {
        let container = subject.container_name();
        match verdict {
            PullVerdict::Recover(reference, cause) => {
                self.metrics.pod_failure_seen("recover");
                tracing::info!(%pod, container, %reference, ?cause, "a pod cannot get its image");
            }
            PullVerdict::Report(reason) => {
                self.metrics.pod_failure_seen(reason.label());
                let note = subject.image().map(|image| reason.event_text(image));
                tracing::info!(%pod, container, note = note.as_deref(), "the image cannot be recovered");
            }
            PullVerdict::Ignore(reason) => {
                self.metrics.pod_failure_seen(reason.label());
                tracing::debug!(%pod, container, ?reason, "no recovery for this container");
            }
        }
    }
}
