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
use crate::control::{ImagesStatus, OwnImageStatus, RetentionStatus};
use crate::decide::fill::FetchFrom;
use crate::decide::retain::{RetainLayers, RetainOptions};
use crate::model::PodEvent;
use crate::ports::{Cluster, ContentStore, LayerLeases};

/// Parts of the agent that retention uses.
pub(super) struct RetentionDependencies {
    pub(super) retain: RetainOptions,
    pub(super) recoverer: Arc<Recoverer>,
    pub(super) healthy_registries: watch::Receiver<Arc<BTreeSet<String>>>,
    pub(super) store: Arc<dyn ContentStore>,
    pub(super) cluster: Arc<dyn Cluster>,
    /// `None` where no layers are retained.
    pub(super) layers: Option<LayerDependencies>,
    /// `None` leaves the images of the agents' DaemonSet to the kubelet.
    pub(super) own_image: Option<OwnImagePorts>,
    pub(super) images: watch::Receiver<Option<ImagesStatus>>,
}

/// Parts of the agent that retained layers use.
pub(super) struct LayerDependencies {
    leases: Arc<dyn LayerLeases>,
    /// The pods of this node.
    events: mpsc::Receiver<PodEvent>,
    /// Receives every event of `events`.
    forward: mpsc::Sender<PodEvent>,
}

/// Pod events between retention and the pod controller: the channel of the pod watch holds a burst.
const POD_EVENTS_QUEUED: usize = 8;

impl LayerDependencies {
    /// Retention reads the pod events before the pod controller. The result holds the pod events
    /// for the pod controller. `leases` is `None` for a store that never discards layers.
    pub(super) fn new(
        retain: &RetainOptions,
        leases: Option<Arc<dyn LayerLeases>>,
        events: mpsc::Receiver<PodEvent>,
    ) -> (Option<Self>, mpsc::Receiver<PodEvent>) {
        let Some(leases) = leases.filter(|_| retain.layers != RetainLayers::None) else { return (None, events) };
        let (forward, forwarded_events) = mpsc::channel(POD_EVENTS_QUEUED);
        (Some(Self { leases, events, forward }), forwarded_events)
    }
}

/// The state of retention for the status.
pub(super) struct Retention {
    pub(super) retained: watch::Receiver<Option<RetentionStatus>>,
    pub(super) own_image: watch::Receiver<Option<OwnImageStatus>>,
}

/// Builds the tasks that keep layers and the agents' own images.
pub(super) fn build(context: &AgentContext, dependencies: RetentionDependencies) -> Part<Retention> {
    let RetentionDependencies { retain, recoverer, healthy_registries, store, cluster, layers, own_image, images } =
        dependencies;
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
    if let Some(LayerDependencies { leases, events, forward }) = layers {
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
    Part { handle: Retention { retained, own_image: own_image_status }, tasks }
}
