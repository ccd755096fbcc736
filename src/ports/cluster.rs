//! Kubernetes: the pods of this node, their owners, and Events.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use crate::decide::clock_skew::ClockSample;
use crate::model::{Annotations, KubeletEvent, NamespaceView, NodeName, Owner, PodRef, PodReport, Zone};

/// Content of a `kubernetes.io/dockerconfigjson` Secret. `Debug` omits the content, so no log has
/// it.
#[derive(Clone, PartialEq, Eq)]
pub struct PullSecret(pub Vec<u8>);

impl std::fmt::Debug for PullSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PullSecret(..)")
    }
}

/// Calls to Kubernetes besides the watch.
pub trait Cluster: PodReader + PodWriter + Nodes {}

impl<C: PodReader + PodWriter + Nodes> Cluster for C {}

/// Reads what concerns a pod: its namespace, owners, Events and pull secrets.
#[async_trait]
pub trait PodReader: Send + Sync + 'static {
    /// The namespace's labels and annotations, at most some seconds old.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn namespace(&self, k8s_namespace: &str) -> Result<Arc<NamespaceView>, ClusterError>;

    /// Annotations of an owner in this namespace and of the owners above, the nearest first, at
    /// most half a minute old. Only kinds that create pods are read (ReplicaSet, Deployment,
    /// StatefulSet, DaemonSet, Job, CronJob, ReplicationController). The list ends at any other
    /// kind and at a deleted owner.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn owners(&self, k8s_namespace: &str, owner: &Owner) -> Result<Vec<Arc<Annotations>>, ClusterError>;

    /// The kubelet's recent Events on the pod, the oldest first. Serves an agent that starts during
    /// a failure, and sandbox images, whose absence no pod status shows.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn kubelet_events(&self, pod: &PodRef) -> Result<Vec<KubeletEvent>, ClusterError>;

    /// A pull secret of the pod's namespace, as `kubernetes.io/dockerconfigjson` stores it. Agents
    /// lack the right unless the namespace grants it.
    ///
    /// # Errors
    /// [`ClusterError::Forbidden`] without the right, [`ClusterError::Gone`] without such a Secret.
    async fn pull_secret(&self, k8s_namespace: &str, name: &str) -> Result<PullSecret, ClusterError>;
}

/// Changes pods and writes Events on pods.
#[async_trait]
pub trait PodWriter: Send + Sync + 'static {
    /// Deletes this pod, with its UID as precondition.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] when the pod is gone or another pod has its name.
    async fn delete(&self, pod: &PodRef) -> Result<(), ClusterError>;

    /// Makes the kubelet sync the pod at once, by a changed annotation. The agent's only write to
    /// pods.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] when the pod was deleted meanwhile.
    async fn nudge(&self, pod: &PodRef) -> Result<(), ClusterError>;

    /// Writes a Kubernetes Event on the pod.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn report(&self, pod: &PodRef, report: &PodReport) -> Result<(), ClusterError>;
}

/// This agent's own node, other nodes, and the clock of the API server.
#[async_trait]
pub trait Nodes: Send + Sync + 'static {
    /// Zone of this agent's node, from the label `topology.kubernetes.io/zone`, if any.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn zone(&self) -> Result<Option<Zone>, ClusterError>;

    /// Writes an Event on the agent's own node, or renews the node's Event of this reason.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn report_on_node(&self, report: &NodeReport) -> Result<(), ClusterError>;

    /// Creation time of a Node object.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] when no such node exists.
    async fn node_created(&self, node: &NodeName) -> Result<SystemTime, ClusterError>;

    /// Compares the API server's clock with this node's, by one small request.
    ///
    /// # Errors
    /// [`ClusterError`].
    async fn clock(&self) -> Result<ClockSample, ClusterError>;
}

/// An Event on the agent's own node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeReport {
    /// Kind of the Event; its reason follows from the kind.
    pub kind: NodeReportKind,
    /// Sentence for people, cut after 1024 bytes.
    pub note: String,
}

/// Reasons of Events on a node. A node has one Event of each reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeReportKind {
    /// Most images of the node lack layers, so no other node can fetch these images from here.
    ImagesLackLayers,
    /// The node's clock is too far from the API server's.
    ClockSkew,
    /// The node had the key of another node, and has a new key.
    KeyReplaced,
}

impl NodeReportKind {
    /// The Event's reason.
    pub fn reason(self) -> &'static str {
        match self {
            Self::ImagesLackLayers => "ImagesLackLayers",
            Self::ClockSkew => "NodeClockSkewed",
            Self::KeyReplaced => "AgentKeyReplaced",
        }
    }
}

/// Reason of a failed call to Kubernetes.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The API server cannot be reached or is overloaded; a later call may succeed.
    #[error("the API server cannot be reached: {0}")]
    Unavailable(String),
    /// The API server answers, but a required admission webhook does not; a later call may succeed.
    #[error("an admission webhook of the cluster does not answer, so the API server refuses: {0}")]
    Webhook(String),
    /// The agent's own rate limiter delays Events: one in this time. A later call may succeed.
    #[error("the agent's own rate limiter delays the Event (one in {} s)", .0.as_secs())]
    RateLimited(Duration),
    /// The object is gone.
    #[error("{0} no longer exists")]
    Gone(String),
    /// The agent lacks a right, which the text names.
    #[error("the API server refuses: {0}")]
    Forbidden(String),
    /// Any other error, in the API server's words.
    #[error("{0}")]
    Other(String),
}

impl ClusterError {
    /// Whether the same call may succeed a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Webhook(_) | Self::RateLimited(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answer of each error. A new variant does not compile without an answer.
    fn expected(error: &ClusterError) -> (usize, bool) {
        match error {
            ClusterError::Unavailable(_) => (0, true),
            ClusterError::Webhook(_) => (1, true),
            ClusterError::RateLimited(_) => (2, true),
            ClusterError::Gone(_) => (3, false),
            ClusterError::Forbidden(_) => (4, false),
            ClusterError::Other(_) => (5, false),
        }
    }

    #[test]
    fn a_call_to_kubernetes_is_retried_while_the_obstacle_may_pass() {
        let text = String::new;
        let errors = [
            ClusterError::Unavailable(text()),
            ClusterError::Webhook(text()),
            ClusterError::RateLimited(Duration::from_secs(2)),
            ClusterError::Gone(text()),
            ClusterError::Forbidden(text()),
            ClusterError::Other(text()),
        ];
        for (row, error) in errors.iter().enumerate() {
            assert_eq!((row, error.is_retryable()), expected(error), "{error}");
        }
    }
}
