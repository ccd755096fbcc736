//! The ports that an agent is built from, and the errors of its start.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::retention::own_image::OwnImagePorts;
use crate::admin::ReadinessCheck;
use crate::control::ContainerdStatus;
use crate::model::PodEvent;
use crate::ports::{
    Admission, Claims, Cluster, ContentStore, ImportPermission, LayerLeases, Notifier, PullConnections, Registry,
    Unpacker,
};
use crate::{control, mesh, transfer};

/// The ports of one agent.
pub struct AgentPorts {
    /// The content store.
    pub store: Arc<dyn ContentStore>,
    /// Unpacks layers of the store; `None` where a setting or the store excludes unpacking.
    pub unpacker: Option<Arc<dyn Unpacker>>,
    /// Leases on layers; `None` for a store that never discards layers.
    pub layer_leases: Option<Arc<dyn LayerLeases>>,
    /// The DaemonSet of the agents; `None` where the kubelet alone pulls the agents' images.
    pub own_image: Option<OwnImagePorts>,
    /// Pods and their namespaces.
    pub cluster: Arc<dyn Cluster>,
    /// Kubernetes Leases.
    pub claims: Arc<dyn Claims>,
    /// Admission of peers.
    pub admission: Arc<dyn Admission>,
    /// Source registries of images.
    pub registry: Arc<dyn Registry>,
    /// containerd's TCP connections; `None` with another store.
    pub pull_connections: Option<Arc<dyn PullConnections>>,
    /// The webhook; `None` without one.
    pub notifier: Option<Arc<dyn Notifier>>,
    /// Whether content may be imported into the store.
    pub imports: watch::Receiver<ImportPermission>,
    /// containerd's version and settings, as containerd reports them; `None` with another store.
    pub containerd: Option<watch::Receiver<ContainerdStatus>>,
    /// The pods of this node.
    pub pods: mpsc::Receiver<PodEvent>,
    /// Readiness checks besides the content store's.
    pub readiness_checks: Vec<ReadinessCheck>,
}

/// Why the agent did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The UDP port for blobs.
    #[error(transparent)]
    Transfer(#[from] transfer::BindError),
    /// The TCP port for gossip.
    #[error(transparent)]
    Mesh(#[from] mesh::MeshError),
    /// The admin port.
    #[error(transparent)]
    Admin(#[from] std::io::Error),
    /// The control socket for commands on this node.
    #[error(transparent)]
    Control(#[from] control::BindError),
}
