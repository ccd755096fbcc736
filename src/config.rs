//! Flags and environment, turned into one configuration for each adapter. Nobody else reads either.
//!
//! The chart's values, these flags and the README name the same things; `scripts/check-flags.sh` compares the first two.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::decide::plan::Limits;
use crate::decide::pull_failure::Policy;
use crate::model::{NodeName, PeerId};
use crate::{cluster, containerd, mesh, transfer};

/// Flags of `lighterman agent`. Each can be set as `LIGHTERMAN_<FLAG>` in the environment; a flag wins.
#[derive(Debug, Clone, Args)]
pub struct AgentArgs {
    /// This node's name, as Kubernetes knows it (downward API: spec.nodeName)
    #[arg(long, env = "LIGHTERMAN_NODE_NAME", value_name = "NAME")]
    node_name: NodeName,

    /// The namespace that the agent itself runs in (downward API: metadata.namespace)
    #[arg(long, env = "LIGHTERMAN_POD_NAMESPACE", value_name = "NAMESPACE", default_value = "lighterman")]
    pod_namespace: String,

    /// The agent's own pod, which its token is bound to (downward API: metadata.name)
    #[arg(long, env = "LIGHTERMAN_POD_NAME", value_name = "NAME", default_value = "")]
    pod_name: String,

    /// The UID of the agent's own pod (downward API: metadata.uid)
    #[arg(long, env = "LIGHTERMAN_POD_UID", value_name = "UID")]
    pod_uid: Option<String>,

    /// The ServiceAccount that all agents run as
    #[arg(long, env = "LIGHTERMAN_SERVICE_ACCOUNT", value_name = "NAME", default_value = "lighterman")]
    service_account: String,

    /// A kubeconfig file instead of the pod's own ServiceAccount, for an agent outside a pod
    #[arg(long, env = "LIGHTERMAN_KUBECONFIG", value_name = "PATH")]
    kubeconfig: Option<PathBuf>,

    /// The pod watch starts within so many seconds at random, so that all nodes of a cluster do not list at once
    #[arg(long, env = "LIGHTERMAN_START_JITTER", value_name = "SECONDS", default_value_t = 2)]
    start_jitter: u64,

    /// Address for peers: blobs over QUIC on this UDP port, gossip over TCP on the same number
    #[arg(long, env = "LIGHTERMAN_LISTEN", value_name = "ADDRESS:PORT", default_value = "[::]:4701")]
    listen: SocketAddr,

    /// Address for /metrics, /healthz and /readyz; unauthenticated
    #[arg(long, env = "LIGHTERMAN_ADMIN_LISTEN", value_name = "ADDRESS:PORT", default_value = "[::]:4702")]
    admin_listen: SocketAddr,

    /// Where other agents can be found; names are looked up again at intervals (repeat, or separate with commas)
    #[arg(
        long,
        env = "LIGHTERMAN_JOIN",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        default_value = "lighterman-peers.lighterman.svc:4701"
    )]
    join: Vec<String>,

    /// Who may join: owners of a ServiceAccount token made for their own key, or the keys of a list
    #[arg(long, env = "LIGHTERMAN_ADMISSION", value_enum, default_value_t = AdmissionKind::Token)]
    admission: AdmissionKind,

    /// With --admission static: a PeerId that may join (repeat, or separate with commas)
    #[arg(long, env = "LIGHTERMAN_ALLOW_PEER", value_name = "PEERID", value_delimiter = ',')]
    allow_peer: Vec<PeerId>,

    /// Folder for the agent's key, on the node
    #[arg(long, env = "LIGHTERMAN_DATA_DIR", value_name = "FOLDER", default_value = "/var/lib/lighterman")]
    data_dir: PathBuf,

    /// containerd's socket
    #[arg(
        long,
        env = "LIGHTERMAN_CONTAINERD_SOCKET",
        value_name = "PATH",
        default_value = "/run/containerd/containerd.sock"
    )]
    containerd_socket: PathBuf,

    /// containerd's namespace for Kubernetes
    #[arg(long, env = "LIGHTERMAN_CONTAINERD_NAMESPACE", value_name = "NAME", default_value = "k8s.io")]
    containerd_namespace: String,

    /// The root of containerd's content store as the agent sees it, if it is not at the path that containerd names
    #[arg(long, env = "LIGHTERMAN_CONTAINERD_CONTENT_ROOT", value_name = "FOLDER")]
    containerd_content_root: Option<PathBuf>,

    /// What stands before /allow and /auto-salvage in annotations
    #[arg(long, env = "LIGHTERMAN_ANNOTATION_PREFIX", value_name = "PREFIX", default_value = "lighterman.dev")]
    annotation_prefix: String,

    /// Namespaces that are left alone whatever their annotations say (separate with commas)
    #[arg(
        long,
        env = "LIGHTERMAN_DENIED_NAMESPACES",
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "kube-system,kube-public,kube-node-lease"
    )]
    denied_namespaces: Vec<String>,

    /// Recover nothing; the agent still tells and gives others what it holds
    #[arg(long, env = "LIGHTERMAN_KILL_SWITCH")]
    kill_switch: bool,

    /// Images recovered at the same time
    #[arg(long, env = "LIGHTERMAN_CONCURRENT_RECOVERIES", value_name = "N", default_value_t = 2, value_parser = at_least_one)]
    concurrent_recoveries: usize,

    /// Blobs fetched at the same time for one image
    #[arg(long, env = "LIGHTERMAN_CONCURRENT_BLOBS", value_name = "N", default_value_t = 4, value_parser = at_least_one)]
    concurrent_blobs: usize,

    /// Blobs sent to peers at the same time; further requests are told to come back
    #[arg(long, env = "LIGHTERMAN_MAX_SERVING", value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    max_serving: usize,

    /// Most bytes that one image may bring to this node; 0 is no limit
    #[arg(long, env = "LIGHTERMAN_MAX_IMAGE_BYTES", value_name = "BYTES", default_value_t = 0)]
    max_image_bytes: u64,

    /// Bytes that stay free on containerd's file system; keep it above the kubelet's eviction threshold
    #[arg(long, env = "LIGHTERMAN_MIN_FREE_BYTES", value_name = "BYTES", default_value_t = 2 << 30)]
    min_free_bytes: u64,

    /// Seconds to finish in after SIGTERM; below the pod's terminationGracePeriodSeconds
    #[arg(long, env = "LIGHTERMAN_GRACE_PERIOD", value_name = "SECONDS", default_value_t = 20)]
    grace_period: u64,
}

/// Who may join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AdmissionKind {
    /// ServiceAccount tokens whose audience is the peer's own PeerId.
    Token,
    /// A list of PeerIds.
    Static,
}

/// Everything that an agent is told, by whom it concerns.
#[derive(Debug, Clone)]
pub struct Config {
    /// Blobs, and the door.
    pub transfer: transfer::Config,
    /// Gossip.
    pub mesh: mesh::Config,
    /// The content store.
    pub containerd: containerd::Config,
    /// The API server.
    pub cluster: cluster::Config,
    /// `Some` for a list of PeerIds instead of tokens.
    pub admitted_peers: Option<Vec<PeerId>>,
    /// The agent itself.
    pub settings: Settings,
}

/// What the agent itself is told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This node.
    pub node: NodeName,
    /// The admin port.
    pub admin_listen: SocketAddr,
    /// Where first peers may be, as `host:port`.
    pub seeds: Vec<String>,
    /// Where the key is kept.
    pub key_file: PathBuf,
    /// Who is helped.
    pub policy: Policy,
    /// Images recovered at the same time.
    pub concurrent_recoveries: usize,
    /// Blobs of one image fetched at the same time.
    pub blobs_at_once: usize,
    /// What one recovery may cost.
    pub limits: Limits,
    /// How long stopping may take.
    pub grace: Duration,
}

/// Two settings contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl AgentArgs {
    /// Gives each adapter what it needs.
    ///
    /// # Errors
    /// [`ConfigError`] when settings contradict each other; each alone was checked by its parser.
    pub fn into_config(self) -> Result<Config, ConfigError> {
        let Self {
            node_name,
            pod_namespace,
            pod_name,
            pod_uid,
            service_account,
            kubeconfig,
            start_jitter,
            listen,
            admin_listen,
            join,
            admission,
            allow_peer,
            data_dir,
            containerd_socket,
            containerd_namespace,
            containerd_content_root,
            annotation_prefix,
            denied_namespaces,
            kill_switch,
            concurrent_recoveries,
            concurrent_blobs,
            max_serving,
            max_image_bytes,
            min_free_bytes,
            grace_period,
        } = self;
        let admitted_peers = match (admission, allow_peer.is_empty()) {
            (AdmissionKind::Static, false) => Some(allow_peer),
            (AdmissionKind::Static, true) => return conflict("--admission static needs --allow-peer"),
            (AdmissionKind::Token, true) => None,
            (AdmissionKind::Token, false) => return conflict("--allow-peer needs --admission static"),
        };
        if admission == AdmissionKind::Token && pod_name.is_empty() {
            return conflict("--admission token needs --pod-name, which the token is bound to");
        }
        if annotation_prefix.is_empty() || annotation_prefix.contains('/') {
            return conflict("--annotation-prefix is a DNS name without a slash");
        }
        Ok(Config {
            transfer: transfer::Config { listen, gossip_port: listen.port(), node: node_name.clone(), max_serving },
            mesh: mesh::Config { listen },
            containerd: containerd::Config {
                socket: containerd_socket,
                containerd_namespace,
                content_root: containerd_content_root,
            },
            cluster: cluster::Config {
                node: node_name.clone(),
                k8s_namespace: pod_namespace,
                pod_name,
                pod_uid,
                service_account,
                kubeconfig,
                start_jitter: Duration::from_secs(start_jitter),
            },
            admitted_peers,
            settings: Settings {
                node: node_name,
                admin_listen,
                seeds: join,
                key_file: data_dir.join("identity.key"),
                policy: Policy {
                    kill_switch,
                    annotation_prefix,
                    denied_k8s_namespaces: denied_namespaces.into_iter().collect::<BTreeSet<_>>(),
                },
                concurrent_recoveries,
                blobs_at_once: concurrent_blobs,
                limits: Limits { max_image_bytes, min_free_bytes },
                grace: Duration::from_secs(grace_period),
            },
        })
    }
}

fn conflict(text: &str) -> Result<Config, ConfigError> {
    Err(ConfigError(text.to_owned()))
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

/// An address on loopback with a free port, for agents that share a machine.
pub fn loopback() -> SocketAddr {
    SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 0)
}
