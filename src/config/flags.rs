//! The flags of the agent, each with its variable, unit and default. [`super::Config`] is made from
//! them.

mod retain;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use self::retain::{FetchKind, RetainKind};
use super::policy_file::quantity;
use crate::decide::byte_bucket::MIN_RATE;
use crate::decide::fill::RATE;
use crate::decide::opt_in::Trigger;
use crate::decide::policy::STALLED_AFTER;
use crate::decide::retain::RetainBytes;
use crate::decide::selector::{Selector, SelectorError};
use crate::decide::tag::TagPolicy;
use crate::model::{NodeName, PeerId, Zone};

/// Flags of `lighterman agent`. The environment variable `LIGHTERMAN_<FLAG>` sets a flag too; a
/// flag on the command line wins.
#[derive(Debug, Clone, Args)]
pub struct AgentArgs {
    /// This node's name in Kubernetes (downward API: spec.nodeName)
    #[arg(long, env = "LIGHTERMAN_NODE_NAME", value_name = "NAME")]
    pub(super) node_name: NodeName,

    /// The namespace of the agent's pod (downward API: metadata.namespace)
    #[arg(long, env = "LIGHTERMAN_POD_NAMESPACE", value_name = "NAMESPACE", default_value = "lighterman")]
    pub(super) pod_namespace: String,

    /// The agent's own pod, to which the agent's token is bound (downward API: metadata.name)
    #[arg(long, env = "LIGHTERMAN_POD_NAME", value_name = "NAME", default_value = "")]
    pub(super) pod_name: String,

    /// The UID of the agent's own pod (downward API: metadata.uid)
    #[arg(long, env = "LIGHTERMAN_POD_UID", value_name = "UID")]
    pub(super) pod_uid: Option<String>,

    /// The ServiceAccount of all agents
    #[arg(long, env = "LIGHTERMAN_SERVICE_ACCOUNT", value_name = "NAME", default_value = "lighterman")]
    pub(super) service_account: String,

    /// A kubeconfig file in place of the pod's ServiceAccount, for an agent outside a pod
    #[arg(long, env = "LIGHTERMAN_KUBECONFIG", value_name = "PATH")]
    pub(super) kubeconfig: Option<PathBuf>,

    /// Seconds within which the pod watch starts at random, so that the nodes of a cluster do not
    /// all list at once
    #[arg(long, env = "LIGHTERMAN_START_JITTER", value_name = "SECONDS", default_value_t = 2)]
    pub(super) start_jitter: u64,

    /// Address for peers: blobs over QUIC on this UDP port, gossip on the TCP port of the same
    /// number
    #[arg(long, env = "LIGHTERMAN_LISTEN", value_name = "ADDRESS:PORT", default_value = "[::]:4701")]
    pub(super) listen: SocketAddr,

    /// Address for /metrics, /healthz, /readyz and /debug/mesh, without authentication
    #[arg(long, env = "LIGHTERMAN_ADMIN_LISTEN", value_name = "ADDRESS:PORT", default_value = "[::]:4702")]
    pub(super) admin_listen: SocketAddr,

    /// First addresses of other agents; names are looked up again at intervals (repeat, or separate
    /// with commas)
    #[arg(
        long,
        env = "LIGHTERMAN_JOIN",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        default_value = "lighterman-peers.lighterman.svc:4701"
    )]
    pub(super) join: Vec<String>,

    /// This node's address for peers (downward API: status.hostIP); without the flag, the address
    /// that peers see
    #[arg(long, env = "LIGHTERMAN_ADVERTISE_ADDRESS", value_name = "ADDRESS")]
    pub(super) advertise_address: Option<IpAddr>,

    /// This node's zone, in place of the node's label topology.kubernetes.io/zone
    #[arg(long, env = "LIGHTERMAN_ZONE", value_name = "ZONE")]
    pub(super) zone: Option<Zone>,

    /// The credential that admits a peer
    #[arg(long, env = "LIGHTERMAN_ADMISSION", value_enum, default_value_t = AdmissionKind::Token)]
    pub(super) admission: AdmissionKind,

    /// With --admission static: a PeerId that may join (repeat, or separate with commas)
    #[arg(long, env = "LIGHTERMAN_ALLOW_PEER", value_name = "PEERID", value_delimiter = ',')]
    pub(super) allow_peer: Vec<PeerId>,

    /// With --admission token: seconds after its end for which a verified peer's token is still
    /// accepted while the API server cannot be reached
    #[arg(long, env = "LIGHTERMAN_ADMISSION_GRACE", value_name = "SECONDS", default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub(super) admission_grace: u64,

    /// With --admission certificate: the agent's certificate and its issuers, PEM. The agent
    /// rereads this file, the key and the authorities every 30 s
    #[arg(long, env = "LIGHTERMAN_TLS_CERT", value_name = "PATH")]
    pub(super) tls_cert: Option<PathBuf>,

    /// With --admission certificate: the certificate's private key, PEM, mode 0600
    #[arg(long, env = "LIGHTERMAN_TLS_KEY", value_name = "PATH")]
    pub(super) tls_key: Option<PathBuf>,

    /// With --admission certificate: the authorities that may issue peers' certificates, PEM
    #[arg(long, env = "LIGHTERMAN_TLS_CA", value_name = "PATH")]
    pub(super) tls_ca: Option<PathBuf>,

    /// With --admission certificate: the DNS name in every agent's certificate
    #[arg(long, env = "LIGHTERMAN_TLS_NAME", value_name = "NAME", default_value = "lighterman")]
    pub(super) tls_name: String,

    /// Folder on the node for the agent's key, known peers and control socket
    #[arg(long, env = "LIGHTERMAN_DATA_DIR", value_name = "FOLDER", default_value = "/var/lib/lighterman")]
    pub(super) data_dir: PathBuf,

    /// containerd's socket; `auto` takes the first of the usual paths that answers (k3s and RKE2,
    /// k0s, MicroK8s, containerd's own)
    #[arg(long, env = "LIGHTERMAN_CONTAINERD_SOCKET", value_name = "PATH", default_value = "auto")]
    pub(super) containerd_socket: PathBuf,

    /// Mount point of the node's root file system, with containerd's folders below; without the
    /// flag, the agent uses the paths that containerd reports
    #[arg(long, env = "LIGHTERMAN_HOST_ROOT", value_name = "FOLDER")]
    pub(super) host_root: Option<PathBuf>,

    /// containerd's namespace for Kubernetes
    #[arg(long, env = "LIGHTERMAN_CONTAINERD_NAMESPACE", value_name = "NAME", default_value = "k8s.io")]
    pub(super) containerd_namespace: String,

    /// The root of containerd's content store as the agent sees it, where that is not the path that
    /// containerd reports
    #[arg(long, env = "LIGHTERMAN_CONTAINERD_CONTENT_ROOT", value_name = "FOLDER")]
    pub(super) containerd_content_root: Option<PathBuf>,

    /// The prefix of /allow, /recover and the other annotations; of several prefixes, the first
    /// that has the annotation counts (separate with commas)
    #[arg(
        long,
        env = "LIGHTERMAN_ANNOTATION_PREFIX",
        value_name = "PREFIXES",
        value_delimiter = ',',
        default_value = "lighterman.dev"
    )]
    pub(super) annotation_prefix: Vec<String>,

    /// Namespaces without recovery, whatever their annotations say (separate with commas)
    #[arg(
        long,
        env = "LIGHTERMAN_DENIED_NAMESPACES",
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "kube-system,kube-public,kube-node-lease"
    )]
    pub(super) denied_namespaces: Vec<String>,

    /// Further namespaces without recovery, by their labels (for example: tier=secret,!shared)
    #[arg(long, env = "LIGHTERMAN_DENIED_NAMESPACE_SELECTOR", value_name = "SELECTOR", default_value = "", hide_default_value = true, value_parser = selector)]
    pub(super) denied_namespace_selector: OptionalFlag<Selector>,

    /// Denied namespaces that may opt in, by their labels
    #[arg(long, env = "LIGHTERMAN_ALLOWED_NAMESPACE_SELECTOR", value_name = "SELECTOR", default_value = "", hide_default_value = true, value_parser = selector)]
    pub(super) allowed_namespace_selector: OptionalFlag<Selector>,

    /// Causes that start a recovery (separate with commas): unavailable, rate-limited, not-found,
    /// bad-bytes (the registry sends wrong bytes), storage-denied (403 of its storage), proxy (a
    /// proxy refuses), denied (401 or 403), never (imagePullPolicy Never)
    #[arg(
        long,
        env = "LIGHTERMAN_RECOVER_ON",
        value_name = "CAUSES",
        value_delimiter = ',',
        default_value = "unavailable,rate-limited,not-found,bad-bytes,storage-denied,proxy"
    )]
    pub(super) recover_on: Vec<Trigger>,

    /// Recover nothing for namespaces without the annotation PREFIX/repositories, the list of
    /// repositories for their pods
    #[arg(long, env = "LIGHTERMAN_REQUIRE_REPOSITORIES")]
    pub(super) require_repositories: bool,

    /// The digest of a tag when peers disagree: unanimous (none, so nothing is recovered),
    /// most-common, newest
    #[arg(long, env = "LIGHTERMAN_TAG_POLICY", value_name = "POLICY", default_value = "unanimous")]
    pub(super) tag_policy: TagPolicy,

    /// Ask the source registry for a tag's digest before the peers, while the registry is up
    #[arg(long, env = "LIGHTERMAN_ASK_REGISTRY")]
    pub(super) ask_registry: bool,

    /// Namespaces whose pods' pull secrets the agent may read, for tags and discarded layers from
    /// registries; needs the right to read them (separate with commas)
    #[arg(long, env = "LIGHTERMAN_PULL_SECRET_NAMESPACES", value_name = "NAMES", value_delimiter = ',')]
    pub(super) pull_secret_namespaces: Vec<String>,

    /// Accept a peer that has the image's digest under any registry and repository
    #[arg(long, env = "LIGHTERMAN_ANY_REPOSITORY")]
    pub(super) any_repository: bool,

    /// Probe registries, so that recovery starts before the kubelet's pull fails (true, false)
    #[arg(long, env = "LIGHTERMAN_PROBE_REGISTRIES", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub(super) probe_registries: bool,

    /// Registries without TLS, or with any certificate, as HOST or HOST:PORT (separate with commas)
    #[arg(long, env = "LIGHTERMAN_INSECURE_REGISTRY", value_name = "REGISTRIES", value_delimiter = ',')]
    pub(super) insecure_registry: Vec<String>,

    /// A file of further CA certificates (PEM) for registries and the webhook
    #[arg(long, env = "LIGHTERMAN_CA_FILE", value_name = "PATH")]
    pub(super) ca_file: Option<PathBuf>,

    /// URL that receives the Events of pods as JSON, by POST
    #[arg(long, env = "LIGHTERMAN_WEBHOOK_URL", value_name = "URL")]
    pub(super) webhook_url: Option<String>,

    /// The file with the secret that signs messages to the webhook
    #[arg(long, env = "LIGHTERMAN_WEBHOOK_SECRET_FILE", value_name = "PATH", requires = "webhook_url")]
    pub(super) webhook_secret_file: Option<PathBuf>,

    /// Seconds after which an unfinished pull counts as stalled; 0 for never. The agent then
    /// recovers an image by digest, and an image by tag once an outage of its registry is known.
    /// The pod gets an Event
    #[arg(long, env = "LIGHTERMAN_STALLED_AFTER", value_name = "SECONDS", default_value_t = STALLED_AFTER.as_secs(), value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub(super) stalled_after: u64,

    /// End containerd's TCP connections that are silent for --stalled-after while a pod waits: the
    /// stalled pull fails, and the node's later pulls proceed. A pull fails too whose registry is
    /// silent for as long before the first byte
    #[arg(long, env = "LIGHTERMAN_END_STALLED_PULLS")]
    pub(super) end_stalled_pulls: bool,

    /// Delete a pod that still waits 30 s after its image came, if an owner makes the pod again;
    /// needs the right to delete pods
    #[arg(long, env = "LIGHTERMAN_DELETE_PODS")]
    pub(super) delete_pods: bool,

    /// Decide and report, but fetch nothing
    #[arg(long, env = "LIGHTERMAN_DRY_RUN")]
    pub(super) dry_run: bool,

    /// Folder of containerd's image verifiers on the node, where bin_dir of the image-verifier
    /// plugin is not the default
    #[arg(long, env = "LIGHTERMAN_IMAGE_VERIFIER_DIR", value_name = "FOLDER")]
    pub(super) image_verifier_dir: Option<PathBuf>,

    /// Import although containerd has image verifiers, which an import bypasses, or has a folder
    /// for them that the agent cannot see
    #[arg(long, env = "LIGHTERMAN_IMPORT_PAST_VERIFIERS")]
    pub(super) import_past_verifiers: bool,

    /// Unpack layers during the download, into the snapshotter that CRI uses, before the image is
    /// recorded (true, false)
    #[arg(long, env = "LIGHTERMAN_UNPACK_LAYERS", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub(super) unpack_layers: bool,

    /// Fetch the next image of the agents' DaemonSet from peers before this node's turn in a
    /// rollout, and protect the next and the current image from the kubelet's image GC (true,
    /// false)
    #[arg(long, env = "LIGHTERMAN_OWN_IMAGE", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub(super) own_image: bool,

    /// Images whose layers are retained where containerd discards layers after unpacking
    #[arg(long, env = "LIGHTERMAN_RETAIN_LAYERS", value_name = "WHOSE", value_enum, default_value_t = RetainKind::OptedIn)]
    pub(super) retain_layers: RetainKind,

    /// Most bytes of retained layers, or percent of containerd's file system (20Gi, 20%); the least
    /// recently used image is dropped first
    #[arg(long, env = "LIGHTERMAN_RETAIN_BYTES", value_name = "BYTES|PERCENT", default_value = "20%", value_parser = retain_bytes)]
    pub(super) retain_bytes: RetainBytes,

    /// Sources of retained layers that this node lacks, one image at a time; true means peers,
    /// false means none
    #[arg(long, env = "LIGHTERMAN_RETAIN_FETCH", value_name = "WHERE", value_enum, default_value_t = FetchKind::Registry)]
    pub(super) retain_fetch: FetchKind,

    /// Most bytes per second of retained layers from registries; 0 is no limit
    #[arg(long, env = "LIGHTERMAN_RETAIN_FETCH_RATE", value_name = "BYTES", default_value_t = RATE, value_parser = rate)]
    pub(super) retain_fetch_rate: u64,

    /// A file that overrides policy and budgets while the agent runs: docs/operations.md
    #[arg(long, env = "LIGHTERMAN_POLICY_FILE", value_name = "PATH")]
    pub(super) policy_file: Option<PathBuf>,

    /// Recover nothing; the agent still announces and serves its blobs
    #[arg(long, env = "LIGHTERMAN_KILL_SWITCH")]
    pub(super) kill_switch: bool,

    /// Images recovered at the same time
    #[arg(long, env = "LIGHTERMAN_CONCURRENT_RECOVERIES", value_name = "N", default_value_t = 2, value_parser = at_least_one)]
    pub(super) concurrent_recoveries: usize,

    /// Blobs of one image fetched at the same time
    #[arg(long, env = "LIGHTERMAN_CONCURRENT_BLOBS", value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub(super) concurrent_blobs: usize,

    /// Blobs sent to peers at the same time; further requests wait, or are answered with busy
    #[arg(long, env = "LIGHTERMAN_CONCURRENT_UPLOADS", value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub(super) concurrent_uploads: usize,

    /// Most bytes that one image may bring to this node; 0 is no limit
    #[arg(long, env = "LIGHTERMAN_MAX_IMAGE_BYTES", value_name = "BYTES", default_value_t = 0)]
    pub(super) max_image_bytes: u64,

    /// Bytes that stay free on the file systems of containerd's content store and snapshotter,
    /// whatever the next two flags permit
    #[arg(long, env = "LIGHTERMAN_MIN_FREE_BYTES", value_name = "BYTES", default_value_t = 2 << 30)]
    pub(super) min_free_bytes: u64,

    /// Percent in use from which the kubelet collects images (imageGCHighThresholdPercent);
    /// downloads stay below, unpacked layers may exceed the limit
    #[arg(long, env = "LIGHTERMAN_IMAGE_GC_PERCENT", value_name = "PERCENT", default_value_t = 85, value_parser = clap::value_parser!(u8).range(..=100))]
    pub(super) image_gc_percent: u8,

    /// Percent free below which the kubelet evicts pods (imagefs.available of evictionHard);
    /// downloads and unpacked layers stay above
    #[arg(long, env = "LIGHTERMAN_EVICTION_PERCENT", value_name = "PERCENT", default_value_t = 15, value_parser = clap::value_parser!(u8).range(..=90))]
    pub(super) eviction_percent: u8,

    /// Most bytes per second from all peers together; 0 is no limit
    #[arg(long, env = "LIGHTERMAN_MAX_DOWNLOAD_RATE", value_name = "BYTES", default_value_t = 0, value_parser = rate)]
    pub(super) max_download_rate: u64,

    /// Most bytes per second to all peers together; 0 is no limit
    #[arg(long, env = "LIGHTERMAN_MAX_UPLOAD_RATE", value_name = "BYTES", default_value_t = 0, value_parser = rate)]
    pub(super) max_upload_rate: u64,

    /// Seconds to finish after SIGTERM; less than the pod's terminationGracePeriodSeconds
    #[arg(long, env = "LIGHTERMAN_GRACE_PERIOD", value_name = "SECONDS", default_value_t = 20)]
    pub(super) grace_period: u64,
}

/// The credential that admits a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AdmissionKind {
    /// A ServiceAccount token whose audience is the peer's own PeerId
    Token,
    /// A certificate of the operator's own authority, whose key signs the peer's PeerId
    Certificate,
    /// A key in the list of --allow-peer
    Static,
}

/// A flag whose empty text means no value: the chart sets the variables of empty values too.
#[derive(Debug, Clone)]
pub(super) struct OptionalFlag<T>(pub(super) Option<T>);

fn selector(text: &str) -> Result<OptionalFlag<Selector>, SelectorError> {
    Ok(OptionalFlag((!text.is_empty()).then(|| text.parse()).transpose()?))
}

fn retain_bytes(text: &str) -> Result<RetainBytes, String> {
    let percent = text.strip_suffix('%').map(|digits| digits.parse::<u8>().ok().filter(|percent| *percent <= 90));
    match (percent, quantity::parse(text)) {
        (Some(Some(percent)), _) => Ok(RetainBytes::Percent(percent)),
        (None, Some(bytes)) => Ok(RetainBytes::Bytes(bytes)),
        _ => Err(format!("must be {} or a percentage up to 90%", quantity::ALLOWED)),
    }
}

fn rate(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(rate) if rate == 0 || rate >= MIN_RATE => Ok(rate),
        Ok(_) => Err(format!("must be 0 for no limit, or at least {MIN_RATE}")),
        Err(error) => Err(format!("{error}")),
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}
