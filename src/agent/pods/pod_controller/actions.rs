//! The execution of actions.

use std::sync::Arc;

use super::{PodController, WorkResult, now};
use crate::agent::pods::notifications::PendingNotification;
use crate::decide::opt_in::OptInPolicy;
use crate::decide::pods::{Action, Input, OptInSources};
use crate::model::{PodRef, PodReport, PodView};
use crate::oci::Reference;
use crate::ports::{ClusterError, PodReader};

impl PodController {
    pub(super) fn execute(&mut self, action: Action) {
        match action {
            Action::Recover(order) => self.start_recovery(order),
            Action::Cancel(reference) => {
                if let Some(running) = self.running.get(&reference) {
                    running.stop.cancel();
                }
            }
            Action::RemoveRecord { reference, pods } => self.spawn_record_removal(reference, pods),
            Action::MeasureDisks => {
                let recoverer = Arc::clone(&self.recoverer);
                self.spawn(async move { Some(Input::DisksMeasured { has_room: recoverer.take_freed_space().await }) });
            }
            Action::ReadOptIn(pod) => self.spawn_opt_in_read(pod),
            Action::ReadKubeletEvents(pod) => self.spawn_kubelet_events_read(pod),
            Action::ProbeRegistry(registry) => {
                let probe = self.registries.probe(&registry);
                self.spawn_until_stopped(async move { Some(Input::RegistryProbed(probe.await)) });
            }
            Action::EndConnections { after, silent_before } => self.spawn_end_of_connections(after, silent_before),
            Action::PublishOutages => self.registries.publish(self.pods.registries(), now()),
            Action::Nudge(pod) => {
                let notifier = Arc::clone(&self.pod_notifier);
                self.spawn_until_stopped(async move {
                    notifier.nudge(&pod).await;
                    None
                });
            }
            // A deletion is sent although the agent stops.
            Action::Delete(pod) => {
                let notifier = Arc::clone(&self.pod_notifier);
                self.spawn(async move {
                    notifier.delete(&pod).await;
                    None
                });
            }
            Action::Report(pod, PodReport { kind, note }) => {
                let notifier = Arc::clone(&self.pod_notifier);
                self.spawn_until_stopped(async move {
                    notifier.report(&pod, kind, note).await;
                    None
                });
            }
            Action::NotifyRecovered { reference, image, pods, note } => {
                self.notifications.send(PendingNotification::recovered(&reference, &image, &pods, &note));
            }
            Action::NotifyNotRecovered { image, kind, pods, note } => {
                self.notifications.send(PendingNotification::not_recovered(&image, kind, &pods, &note));
            }
            Action::Observe(observation) => self.record(observation),
        }
    }

    fn spawn(&mut self, work: impl Future<Output = Option<Input>> + Send + 'static) {
        self.work.spawn(async move { work.await.map_or(WorkResult::Nothing, WorkResult::Input) });
    }

    fn spawn_until_stopped(&mut self, work: impl Future<Output = Option<Input>> + Send + 'static) {
        let stopping = self.stopping.clone();
        self.spawn(async move { stopping.run_until_cancelled(work).await.flatten() });
    }

    fn spawn_opt_in_read(&mut self, pod: PodView) {
        let (policy, cluster) = (Arc::clone(&self.policy.borrow()), Arc::clone(&self.cluster));
        let permits = Arc::clone(&self.api_permits);
        self.spawn_until_stopped(async move {
            let _permit = permits.acquire().await;
            let result = read_opt_in(&*cluster, &policy.opt_in, &pod).await;
            Some(Input::OptInRead { pod: pod.pod, result: result.map_err(|error| error.to_string()) })
        });
    }

    fn spawn_kubelet_events_read(&mut self, pod: PodRef) {
        let (cluster, permits) = (Arc::clone(&self.cluster), Arc::clone(&self.api_permits));
        self.spawn_until_stopped(async move {
            let _permit = permits.acquire().await;
            match cluster.kubelet_events(&pod).await {
                Ok(events) => Some(Input::KubeletEventsRead { pod, events }),
                Err(error) => {
                    tracing::warn!(%pod, %error, "cannot read the kubelet's Events about the pod");
                    None
                }
            }
        });
    }

    fn spawn_record_removal(&mut self, reference: Reference, pods: Vec<PodRef>) {
        let probe = self.registries.probe(&reference.repository().registry);
        let (recoverer, stopping, metrics) = (Arc::clone(&self.recoverer), self.stopping.clone(), self.metrics.clone());
        self.spawn(async move {
            let answer = stopping.run_until_cancelled(probe).await;
            if answer.is_none_or(|probe| probe.result.is_err()) {
                return None;
            }
            match recoverer.remove_broken_record(&reference).await {
                Ok(true) => {
                    metrics.record_removed();
                    tracing::warn!(
                        %reference,
                        "the record of a broken image was removed: no node has the missing content"
                    );
                    Some(Input::RecordRemoved { reference, pods })
                }
                Ok(false) => None,
                Err(error) => {
                    tracing::warn!(%reference, %error, "the record of a broken image cannot be removed");
                    None
                }
            }
        });
    }
}

async fn read_opt_in(
    cluster: &dyn PodReader,
    policy: &OptInPolicy,
    pod: &PodView,
) -> Result<OptInSources, ClusterError> {
    let namespace = cluster.namespace(&pod.pod.k8s_namespace).await?;
    let owners = match OptInSources::deciding_owner(policy, pod, &namespace) {
        Some(owner) => Some(cluster.owners(&pod.pod.k8s_namespace, owner).await?),
        None => None,
    };
    Ok(OptInSources { namespace, owners })
}
