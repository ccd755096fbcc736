//! The parts that an agent is put together from, and the errors of its start.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::retention::own_image::OwnImagePorts;
use crate::admin::ReadinessCheck;
use crate::ports::{
    Admission, Claims, Cluster, ContainerdStatus, ContentStore, ImportPermission, LayerLeases, Notifier, PodEvent,
    PullConnections, Registry, Unpacker,
};
use crate::{control, mesh, transfer};

/// The outside world of one agent: its ports.
pub struct AgentPorts {
    /// Where content is kept.
    pub store: Arc<dyn ContentStore>,
    /// Unpacks layers of the store; `None` where a setting or the store rules that out.
    pub unpacker: Option<Arc<dyn Unpacker>>,
    /// Leases on layers; `None` for a store that never discards layers.
    pub layer_leases: Option<Arc<dyn LayerLeases>>,
    /// The agent's own DaemonSet; `None` where its images are left to the kubelet.
    pub own_image: Option<OwnImagePorts>,
    /// Pods and their namespaces.
    pub cluster: Arc<dyn Cluster>,
    /// Leases.
    pub claims: Arc<dyn Claims>,
    /// Admission of peers.
    pub admission: Arc<dyn Admission>,
    /// The registries that images come from.
    pub registry: Arc<dyn Registry>,
    /// containerd's TCP connections; `None` with another store.
    pub pull_connections: Option<Arc<dyn PullConnections>>,
    /// Where to tell people outside the cluster, if anywhere.
    pub notifier: Option<Arc<dyn Notifier>>,
    /// Whether anything may be brought into the store.
    pub imports: watch::Receiver<ImportPermission>,
    /// containerd's version and settings, as containerd tells them; `None` with another store.
    pub containerd: Option<watch::Receiver<ContainerdStatus>>,
    /// The pods of this node.
    pub pods: mpsc::Receiver<PodEvent>,
    /// Conditions of readiness besides the content store's answer.
    pub readiness_checks: Vec<ReadinessCheck>,
}

/// The agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The port for blobs.
    #[error(transparent)]
    Transfer(#[from] transfer::BindError),
    /// The port for gossip.
    #[error(transparent)]
    Mesh(#[from] mesh::MeshError),
    /// The admin port.
    #[error(transparent)]
    Admin(#[from] std::io::Error),
    /// The socket for people on this node.
    #[error(transparent)]
    Control(#[from] control::BindError),
}
