//! The pods of this node: the controller that turns failed pulls into recoveries, and the Events,
//! nudges and messages that report the recoveries.

pub mod notifications;
pub mod pod_controller;
pub mod pod_notifier;
pub mod registry_health;

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use self::notifications::{NotificationQueue, NotificationSender};
use self::pod_controller::{PodController, PodControllerParts};
use self::registry_health::RegistryHealth;
use super::context::AgentContext;
use super::membership::announcer::RecordTargets;
use super::part::{Part, Tasks};
use super::recovery::recover::Recoverer;
use crate::model::{Outage, PodEvent};
use crate::ports::{Claims, Cluster, Notifier, PullConnections, Registry};

/// Parts of the agent that the pods' part uses.
pub(super) struct PodsDependencies {
    pub(super) recoverer: Arc<Recoverer>,
    pub(super) cluster: Arc<dyn Cluster>,
    pub(super) claims: Arc<dyn Claims>,
    pub(super) registry: Arc<dyn Registry>,
    /// containerd's TCP connections; `None` with another store.
    pub(super) pull_connections: Option<Arc<dyn PullConnections>>,
    /// Sends messages to the webhook; `None` without a webhook.
    pub(super) notifier: Option<Arc<dyn Notifier>>,
    /// Whether registries are asked if they answer.
    pub(super) probe_registries: bool,
    /// Image records of this node, from the announcer.
    pub(super) image_records: watch::Receiver<RecordTargets>,
    /// The pods of this node.
    pub(super) events: mpsc::Receiver<PodEvent>,
}

/// The state of registries as the pods' pulls show them.
pub(super) struct Pods {
    /// Registries that this node found down, for the announcer.
    pub(super) outages: watch::Receiver<Vec<Outage>>,
    /// Registries that answer, for fetches in the background.
    pub(super) healthy_registries: watch::Receiver<Arc<BTreeSet<String>>>,
}

/// Builds the pod controller and the sender of webhook messages.
pub(super) fn build(context: &AgentContext, dependencies: PodsDependencies) -> Part<Pods> {
    let PodsDependencies {
        recoverer,
        cluster,
        claims,
        registry,
        pull_connections,
        notifier,
        probe_registries,
        image_records,
        events,
    } = dependencies;
    let AgentContext { node, peer: _, policy, options, inventory, tracker, metrics } = context.clone();
    let mut tasks = Tasks::default();
    let notifications = match notifier {
        Some(notifier) => {
            let (sender, queue) = NotificationSender::new(notifier, claims, inventory.clone(), node, metrics.clone());
            tasks.add("webhook", |stop| sender.run(stop));
            queue
        }
        None => NotificationQueue::disabled(metrics.clone()),
    };
    let (outages_in, outages) = watch::channel(Vec::new());
    let controller = PodController::new(PodControllerParts {
        recoverer,
        tracker,
        cluster,
        registries: RegistryHealth::new(inventory, registry, probe_registries, outages_in, metrics.clone()),
        connections: pull_connections,
        notifications,
        image_records,
        policy,
        options,
        metrics,
    });
    let healthy_registries = controller.healthy_registries();
    tasks.add("pods", |stop| controller.run(events, stop));
    Part { handle: Pods { outages, healthy_registries }, tasks }
}
