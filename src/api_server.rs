//! The connection to the Kubernetes API server. Two adapters share the connection: the cluster's
//! objects ([`crate::cluster`]) and admission by token ([`crate::admission`]).

pub(crate) mod client;
pub(crate) mod error;

use std::path::PathBuf;
use std::time::Duration;

use kube::Client;
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};

use crate::model::NodeName;

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

/// A connection, and the identity of the agent that uses the connection. Clones share the client.
#[derive(Clone)]
pub struct ApiServer {
    pub(crate) client: Client,
    pub(crate) agent_pod: AgentPod,
    pub(crate) start_jitter: Duration,
}

/// The agent's own pod.
#[derive(Debug, Clone)]
pub struct AgentPod {
    pub(crate) node: NodeName,
    pub(crate) k8s_namespace: String,
    pub(crate) pod_name: String,
    pub(crate) pod_uid: Option<String>,
    pub(crate) service_account: String,
}

/// Builds the client. No request is sent, so an agent starts while the API server is down.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect(config: Config) -> Result<ApiServer, ConnectError> {
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
    Ok(ApiServer { client, agent_pod, start_jitter })
}
