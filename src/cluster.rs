//! The Kubernetes API: the watch of this node's pods, the owners of pods, the nudge, Events, claims
//! as Leases, and admission by ServiceAccount token.
//!
//! The agent never reads pods of other nodes, and writes no field of a pod but one annotation. Pull
//! secrets and the deletion of pods need rights that the chart gives only on request. Not here:
//! decisions ([`crate::decide`]), and admission by certificate or by a list of PeerIds
//! ([`crate::admission`]).

mod admission_file;
mod api_error;
mod api_server;
mod claims;
mod clock;
mod events;
mod jwks;
mod kubelet_events;
mod metadata;
mod mirror_pods;
mod namespaces;
mod node_events;
mod node_metadata;
mod nudge;
mod own_image;
mod own_token;
mod owners;
mod pod_deletion;
mod pod_view;
mod pod_watch;
mod response_cache;
mod secrets;
mod token_admission;
mod token_review;
mod verdict_cache;

pub use token_admission::{TokenAdmission, TokenAdmissionOptions};

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use kube::Client;
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use tokio::sync::watch;

use crate::decide::clock_skew::ClockSample;
use crate::model::{NodeName, Owner, PodRef, Zone};
use crate::ports::{
    Annotations, Cluster, ClusterError, KubeletEvent, NamespaceView, NodeReport, PodReport, PullSecret,
};

/// The agent's name in the API server's logs and in `managedFields`.
const USER_AGENT: &str = concat!("lighterman/", env!("CARGO_PKG_VERSION"));

/// Silence after which a connection counts as dead. The API server sends a bookmark to each watch
/// every minute, so a healthy watch is never silent for so long. Without the timeout, a watch whose
/// server lost power would look quiet for five minutes.
const READ_TIMEOUT: Duration = Duration::from_secs(90);

/// Time to connect, and to write a request. A caller's own timeout is shorter or equal; this
/// timeout frees the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The cluster, and the identity of this agent in the cluster.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node whose pods are watched. Claims carry this name as their holder.
    pub node: NodeName,
    /// The namespace of the agent's pod, of the ServiceAccount and of the Leases.
    pub k8s_namespace: String,
    /// The agent's own pod.
    pub pod_name: String,
    /// The pod's UID, where the environment sets it. Without the UID, the API server binds the
    /// token to the pod of that name.
    pub pod_uid: Option<String>,
    /// The ServiceAccount of all agents.
    pub service_account: String,
    /// A kubeconfig file; `None` inside a cluster.
    pub kubeconfig: Option<PathBuf>,
    /// The watch starts at a random moment within this time, so that a thousand agents of one
    /// rollout do not all list at once.
    pub start_jitter: Duration,
}

/// Settings that describe no cluster. An API server that does not answer is no error here: the
/// agent starts, and retries.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The environment or the token of a pod is missing.
    #[error(
        "not inside a cluster, or the ServiceAccount's token is not mounted (automountServiceAccountToken); use --kubeconfig for a file: {0}"
    )]
    InCluster(#[source] InClusterError),
    /// The kubeconfig cannot be read or parsed.
    #[error("the kubeconfig {path}: {source}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The error in the file.
        source: Box<KubeconfigError>,
    },
    /// Certificates, keys or a proxy in the settings cannot be used.
    #[error("cannot set up the connection to the API server: {0}")]
    Client(#[source] Box<kube::Error>),
}

/// This agent's client of the API server.
pub struct KubeCluster {
    client: Client,
    agent_pod: AgentPod,
    start_jitter: Duration,
    synced: watch::Sender<bool>,
    namespaces: namespaces::Namespaces,
    owners: owners::Owners,
    mirror_pods: mirror_pods::MirrorPods,
    own_pod: own_image::OwnPodTracker,
    events: events::EventRecorder,
}

#[derive(Debug, Clone)]
struct AgentPod {
    node: NodeName,
    k8s_namespace: String,
    pod_name: String,
    pod_uid: Option<String>,
    service_account: String,
}

/// Builds the client. No request is sent, so an agent starts while the API server is down.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect(config: Config) -> Result<KubeCluster, ConnectError> {
    let Config { node, k8s_namespace, pod_name, pod_uid, service_account, kubeconfig, start_jitter } = config;
    let mut settings = match kubeconfig {
        Some(path) => {
            let kubeconfig_error = |source| ConnectError::Kubeconfig { path: path.clone(), source: Box::new(source) };
            let file = Kubeconfig::read_from(&path).map_err(kubeconfig_error)?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(kubeconfig_error)?
        }
        None => kube::Config::incluster_env().map_err(ConnectError::InCluster)?,
    };
    settings.connect_timeout = Some(CONNECT_TIMEOUT);
    settings.write_timeout = Some(CONNECT_TIMEOUT);
    settings.read_timeout = Some(READ_TIMEOUT);
    // Otherwise the idle time of a pooled connection counts as silence.
    settings.reset_reader_on_write = true;
    // kube would retry fifteen times, with pauses up to a quarter of an hour. Here the callers
    // retry.
    settings.default_retry = false;
    let header = "user-agent".parse().expect("a header's name");
    settings.headers.push((header, USER_AGENT.parse().expect("a package's version is printable ASCII")));
    // kube uses the default provider of the process, and rustls is built with two providers
    // (src/transfer/tls.rs). A second call changes nothing.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let client = Client::try_from(settings).map_err(|error| ConnectError::Client(Box::new(error)))?;
    let agent_pod = AgentPod { node, k8s_namespace, pod_name, pod_uid, service_account };
    Ok(KubeCluster::new(client, agent_pod, start_jitter))
}

impl KubeCluster {
    fn new(client: Client, agent_pod: AgentPod, start_jitter: Duration) -> Self {
        Self {
            namespaces: namespaces::Namespaces::new(client.clone()),
            owners: owners::Owners::new(client.clone()),
            mirror_pods: mirror_pods::MirrorPods::default(),
            own_pod: own_image::OwnPodTracker::default(),
            events: events::EventRecorder::new(client.clone(), agent_pod.node.clone()),
            synced: watch::Sender::new(false),
            client,
            agent_pod,
            start_jitter,
        }
    }
}

#[async_trait]
impl Cluster for KubeCluster {
    async fn namespace(&self, k8s_namespace: &str) -> Result<Arc<NamespaceView>, ClusterError> {
        self.namespaces.namespace(k8s_namespace).await
    }

    async fn owners(&self, k8s_namespace: &str, owner: &Owner) -> Result<Vec<Arc<Annotations>>, ClusterError> {
        self.owners.ancestor_annotations(k8s_namespace, owner).await
    }

    async fn zone(&self) -> Result<Option<Zone>, ClusterError> {
        node_metadata::zone(&self.client, &self.agent_pod.node).await
    }

    async fn kubelet_events(&self, pod: &PodRef) -> Result<Vec<KubeletEvent>, ClusterError> {
        kubelet_events::kubelet_events(&self.client, pod, &self.mirror_pods.kubelet_uid(pod)).await
    }

    async fn pull_secret(&self, k8s_namespace: &str, name: &str) -> Result<PullSecret, ClusterError> {
        secrets::pull_secret(&self.client, k8s_namespace, name).await
    }

    async fn delete(&self, pod: &PodRef) -> Result<(), ClusterError> {
        pod_deletion::delete_pod(&self.client, pod).await
    }

    async fn nudge(&self, pod: &PodRef) -> Result<(), ClusterError> {
        nudge::nudge(&self.client, pod).await
    }

    async fn report(&self, pod: &PodRef, report: &PodReport) -> Result<(), ClusterError> {
        self.events.report(pod, &self.mirror_pods.kubelet_uid(pod), report).await
    }

    async fn report_on_node(&self, report: &NodeReport) -> Result<(), ClusterError> {
        node_events::report(&self.client, &self.agent_pod.node, report).await
    }

    async fn node_created(&self, node: &NodeName) -> Result<SystemTime, ClusterError> {
        node_metadata::creation_time(&self.client, node).await
    }

    async fn clock(&self) -> Result<ClockSample, ClusterError> {
        clock::sample_clock(&self.client).await
    }
}
