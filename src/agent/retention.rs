//! Content that this node keeps: layers that containerd would discard, and the images of the
//! agents' own DaemonSet.

pub mod layer_watch;
pub mod own_image;
pub mod retainer;

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use self::layer_watch::LayerWatch;
use self::own_image::{OwnImageController, OwnImagePorts};
use self::retainer::{PodImages, Retainer};
use super::context::AgentContext;
use super::part::{Part, Tasks};
use super::recovery::recover::Recoverer;
use crate::decide::fill::FetchFrom;
use crate::decide::retain::{RetainLayers, RetainOptions};
use crate::ports::{Cluster, ContentStore, ImagesStatus, LayerLeases, OwnImageStatus, PodEvent, RetentionStatus};

/// Parts of the agent that retention uses.
pub(super) struct RetentionDependencies {
    pub(super) retain: RetainOptions,
    pub(super) recoverer: Arc<Recoverer>,
    pub(super) healthy_registries: watch::Receiver<Arc<BTreeSet<String>>>,
    pub(super) store: Arc<dyn ContentStore>,
    pub(super) cluster: Arc<dyn Cluster>,
    /// `None` for a store that never discards layers.
    pub(super) layer_leases: Option<Arc<dyn LayerLeases>>,
    /// `None` leaves the images of the agents' DaemonSet to the kubelet.
    pub(super) own_image: Option<OwnImagePorts>,
    pub(super) images: watch::Receiver<Option<ImagesStatus>>,
    /// The pods of this node.
    pub(super) events: mpsc::Receiver<PodEvent>,
    /// Receives every event of `events`.
    pub(super) forward: mpsc::Sender<PodEvent>,
}

/// The state of retention for the status.
pub(super) struct Retention {
    pub(super) retained: watch::Receiver<Option<RetentionStatus>>,
    pub(super) own_image: watch::Receiver<Option<OwnImageStatus>>,
}

/// Builds the tasks that keep layers and the agents' own images.
pub(super) fn build(context: &AgentContext, dependencies: RetentionDependencies) -> Part<Retention> {
    let RetentionDependencies {
        retain,
        recoverer,
        healthy_registries,
        store,
        cluster,
        layer_leases,
        own_image,
        images,
        events,
        forward,
    } = dependencies;
    let AgentContext { node, peer: _, policy, options, inventory: _, tracker, metrics } = context.clone();
    let mut tasks = Tasks::default();
    let (own_image_in, own_image_status) = watch::channel(None);
    let (used_in, used) = watch::channel(Arc::default());
    let mut pod_images = PodImages::new(Arc::clone(&cluster) as _, policy, used_in);
    if let Some(ports) = own_image {
        let (recoverer, dry_run) = (Arc::clone(&recoverer), options.dry_run);
        let controller = OwnImageController::new(ports, recoverer, tracker, metrics.clone(), dry_run, own_image_in);
        pod_images = pod_images.with_own_images(controller.kept_references());
        tasks.add("own image", |stop| controller.run(stop));
    }
    let (retained_in, retained) = watch::channel(None);
    match layer_leases.filter(|_| retain.layers != RetainLayers::None) {
        Some(leases) => {
            let fetches = retain.fetch != FetchFrom::None && !options.dry_run;
            let status = retained.clone();
            let layer_watch = LayerWatch { node, cluster, retained: status, images, fetches, metrics: metrics.clone() };
            tasks.add("layer watch", |stop| layer_watch.run(stop));
            let mut retainer = Retainer::new(store, leases, retain, used, metrics, retained_in);
            if fetches {
                retainer = retainer.with_filler(recoverer, healthy_registries);
            }
            tasks.add("retain layers", |stop| retainer.run(stop));
            tasks.add("pod images", |stop| pod_images.run(events, forward, stop));
        }
        None => tasks.add("pod events", |stop| forward_events(events, forward, stop)),
    }
    Part { handle: Retention { retained, own_image: own_image_status }, tasks }
}

/// Passes every event on, where no layers are retained.
async fn forward_events(
    mut events: mpsc::Receiver<PodEvent>,
    forward: mpsc::Sender<PodEvent>,
    stop: tokio_util::sync::CancellationToken,
) {
    let forwarding = async {
        while let Some(event) = events.recv().await {
            if forward.send(event).await.is_err() {
                return;
            }
        }
        std::future::pending().await
    };
    let _stopped = stop.run_until_cancelled(forwarding).await;
}
