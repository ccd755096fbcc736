//! The flags of the agent, each with its variable, its unit and its default. What they come to is [`super::Config`].

mod retain;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use self::retain::{FetchKind, RetainKind};
use super::policy_file::quantity;
use crate::decide::fill::RATE;
use crate::decide::opt_in::Trigger;
use crate::decide::policy::STALLED_AFTER;
use crate::decide::retain::RetainBytes;
use crate::decide::selector::{Selector, SelectorError};
use crate::decide::tag::TagPolicy;
use crate::decide::token_bucket::MIN_RATE;
use crate::model::{NodeName, PeerId, Zone};

/// Flags of `lighterman agent`. Each can be set as `LIGHTERMAN_<FLAG>` in the environment; a flag wins.
#[derive(Debug, Clone, Args)]
pub struct AgentArgs {
    /// This node's name, as Kubernetes knows it (downward API: spec.nodeName)
    #[arg(long, env = "LIGHTERMAN_NODE_NAME", value_name = "NAME")]
    pub(super) node_name: NodeName,

    /// The namespace that the agent itself runs in (downward API: metadata.namespace)
    #[arg(long, env = "LIGHTERMAN_POD_NAMESPACE", value_name = "NAMESPACE", default_value = "lighterman")]
    pub(super) pod_namespace: String,

    /// The agent's own pod, which its token is bound to (downward API: metadata.name)
    #[arg(long, env = "LIGHTERMAN_POD_NAME", value_name = "NAME", default_value = "")]
    pub(super) pod_name: String,

    /// The UID of the agent's own pod (downward API: metadata.uid)
    #[arg(long, env = "LIGHTERMAN_POD_UID", value_name = "UID")]
    pub(super) pod_uid: Option<String>,

    /// The ServiceAccount that all agents run as
    #[arg(long, env = "LIGHTERMAN_SERVICE_ACCOUNT", value_name = "NAME", default_value = "lighterman")]
    pub(super) service_account: String,

    /// A kubeconfig file instead of the pod's own ServiceAccount, for an agent outside a pod
    #[arg(long, env = "LIGHTERMAN_KUBECONFIG", value_name = "PATH")]
    pub(super) kubeconfig: Option<PathBuf>,

    /// The pod watch starts within so many seconds at random, so that all nodes of a cluster do not list at once
    #[arg(long, env = "LIGHTERMAN_START_JITTER", value_name = "SECONDS", default_value_t = 2)]
    pub(super) start_jitter: u64,

    /// Address for peers: blobs over QUIC on this UDP port, gossip over TCP on the same number
    #[arg(long, env = "LIGHTERMAN_LISTEN", value_name = "ADDRESS:PORT", default_value = "[::]:4701")]
    pub(super) listen: SocketAddr,

    /// Address for /metrics, /healthz, /readyz and /debug/mesh; unauthenticated
    #[arg(long, env = "LIGHTERMAN_ADMIN_LISTEN", value_name = "ADDRESS:PORT", default_value = "[::]:4702")]
    pub(super) admin_listen: SocketAddr,

    /// Where other agents can be found; names are looked up again at intervals (repeat, or separate with commas)
    #[arg(
        long,
        env = "LIGHTERMAN_JOIN",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        default_value = "lighterman-peers.lighterman.svc:4701"
    )]
    pub(super) join: Vec<String>,

    /// This node's address, which peers are told (downward API: status.hostIP); without it the one that peers see
    #[arg(long, env = "LIGHTERMAN_ADVERTISE_ADDRESS", value_name = "ADDRESS")]
    pub(super) advertise_address: Option<IpAddr>,

    /// This node's zone, where its label topology.kubernetes.io/zone is not to count
    #[arg(long, env = "LIGHTERMAN_ZONE", value_name = "ZONE")]
    pub(super) zone: Option<Zone>,

    /// Who may join: owners of a ServiceAccount token made for their own key, of a certificate, or the keys of a list
    #[arg(long, env = "LIGHTERMAN_ADMISSION", value_enum, default_value_t = AdmissionKind::Token)]
    pub(super) admission: AdmissionKind,

    /// With --admission static: a PeerId that may join (repeat, or separate with commas)
    #[arg(long, env = "LIGHTERMAN_ALLOW_PEER", value_name = "PEERID", value_delimiter = ',')]
    pub(super) allow_peer: Vec<PeerId>,

    /// With --admission token: seconds after its end for which a token of a known peer counts while the API server is out of reach
    #[arg(long, env = "LIGHTERMAN_ADMISSION_GRACE", value_name = "SECONDS", default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub(super) admission_grace: u64,

    /// With --admission certificate: the agent's certificate and those above it, PEM; looked at again every 30 s, like the next two
    #[arg(long, env = "LIGHTERMAN_TLS_CERT", value_name = "PATH")]
    pub(super) tls_cert: Option<PathBuf>,

    /// With --admission certificate: its private key, PEM, mode 0600
    #[arg(long, env = "LIGHTERMAN_TLS_KEY", value_name = "PATH")]
    pub(super) tls_key: Option<PathBuf>,

    /// With --admission certificate: the authorities that peers' certificates may be of, PEM
    #[arg(long, env = "LIGHTERMAN_TLS_CA", value_name = "PATH")]
    pub(super) tls_ca: Option<PathBuf>,

    /// With --admission certificate: the DNS name that every agent's certificate carries
    #[arg(long, env = "LIGHTERMAN_TLS_NAME", value_name = "NAME", default_value = "lighterman")]
    pub(super) tls_name: String,

    /// Folder for the agent's key, and what it knows of its peers, on the node
    #[arg(long, env = "LIGHTERMAN_DATA_DIR", value_name = "FOLDER", default_value = "/var/lib/lighterman")]
    pub(super) data_dir: PathBuf,

    /// containerd's socket; `auto` takes the first of the usual places that answers (k3s and RKE2,
    /// k0s, MicroK8s, containerd's own)
    #[arg(long, env = "LIGHTERMAN_CONTAINERD_SOCKET", value_name = "PATH", default_value = "auto")]
    pub(super) containerd_socket: PathBuf,

    /// Where the node's root file system is mounted, to find containerd's folders below it; without
    /// it they are where containerd names them
    #[arg(long, env = "LIGHTERMAN_HOST_ROOT", value_name = "FOLDER")]
    pub(super) host_root: Option<PathBuf>,

    /// containerd's namespace for Kubernetes
    #[arg(long, env = "LIGHTERMAN_CONTAINERD_NAMESPACE", value_name = "NAME", default_value = "k8s.io")]
    pub(super) containerd_namespace: String,

    /// The root of containerd's content store as the agent sees it, if it is not at the path that containerd names
    #[arg(long, env = "LIGHTERMAN_CONTAINERD_CONTENT_ROOT", value_name = "FOLDER")]
    pub(super) containerd_content_root: Option<PathBuf>,

    /// What stands before /allow and /recover in annotations; of several, the first that is set counts (separate with commas)
    #[arg(
        long,
        env = "LIGHTERMAN_ANNOTATION_PREFIX",
        value_name = "PREFIXES",
        value_delimiter = ',',
        default_value = "lighterman.dev"
    )]
    pub(super) annotation_prefix: Vec<String>,

    /// Namespaces that are left alone whatever their annotations say (separate with commas)
    #[arg(
        long,
        env = "LIGHTERMAN_DENIED_NAMESPACES",
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "kube-system,kube-public,kube-node-lease"
    )]
    pub(super) denied_namespaces: Vec<String>,

    /// Further namespaces that are left alone, by their labels (as in: tier=secret,!shared)
    #[arg(long, env = "LIGHTERMAN_DENIED_NAMESPACE_SELECTOR", value_name = "SELECTOR", default_value = "", hide_default_value = true, value_parser = selector)]
    pub(super) denied_namespace_selector: OptionalFlag<Selector>,

    /// Namespaces that may opt in although they are denied, by their labels
    #[arg(long, env = "LIGHTERMAN_ALLOWED_NAMESPACE_SELECTOR", value_name = "SELECTOR", default_value = "", hide_default_value = true, value_parser = selector)]
    pub(super) allowed_namespace_selector: OptionalFlag<Selector>,

    /// Causes that are acted on (separate with commas): unavailable, rate-limited, not-found, bad-bytes (the registry sends wrong
    /// bytes), storage-denied (403 of its storage), proxy (a proxy refuses), denied (401 or 403), never (imagePullPolicy Never)
    #[arg(
        long,
        env = "LIGHTERMAN_RECOVER_ON",
        value_name = "CAUSES",
        value_delimiter = ',',
        default_value = "unavailable,rate-limited,not-found,bad-bytes,storage-denied,proxy"
    )]
    pub(super) recover_on: Vec<Trigger>,

    /// Recover nothing for namespaces without the annotation PREFIX/repositories, which lists what their pods may have
    #[arg(long, env = "LIGHTERMAN_REQUIRE_REPOSITORIES")]
    pub(super) require_repositories: bool,

    /// What a tag means when peers disagree: unanimous (nothing), most-common, newest
    #[arg(long, env = "LIGHTERMAN_TAG_POLICY", value_name = "POLICY", default_value = "unanimous")]
    pub(super) tag_policy: TagPolicy,

    /// Ask the source registry what a tag means before peers are, while it is up
    #[arg(long, env = "LIGHTERMAN_ASK_REGISTRY")]
    pub(super) ask_registry: bool,

    /// Namespaces whose pods' pull secrets may be read, to ask with and to fetch discarded layers with; the agent needs the right to (separate with commas)
    #[arg(long, env = "LIGHTERMAN_PULL_SECRET_NAMESPACES", value_name = "NAMES", value_delimiter = ',')]
    pub(super) pull_secret_namespaces: Vec<String>,

    /// Take an image from any peer that holds its digest, whichever registry and repository it is known under there
    #[arg(long, env = "LIGHTERMAN_ANY_REPOSITORY")]
    pub(super) any_repository: bool,

    /// Ask registries whether they are there, so that recovery starts before the kubelet has failed (true, false)
    #[arg(long, env = "LIGHTERMAN_PROBE_REGISTRIES", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub(super) probe_registries: bool,

    /// Registries that are spoken to without TLS, as HOST or HOST:PORT (separate with commas)
    #[arg(long, env = "LIGHTERMAN_INSECURE_REGISTRY", value_name = "REGISTRIES", value_delimiter = ',')]
    pub(super) insecure_registry: Vec<String>,

    /// A file of CA certificates (PEM) that registries and the webhook may be signed by, besides the usual ones
    #[arg(long, env = "LIGHTERMAN_CA_FILE", value_name = "PATH")]
    pub(super) ca_file: Option<PathBuf>,

    /// Where to POST what happened, as JSON
    #[arg(long, env = "LIGHTERMAN_WEBHOOK_URL", value_name = "URL")]
    pub(super) webhook_url: Option<String>,

    /// The file with the secret that messages to the webhook are signed with
    #[arg(long, env = "LIGHTERMAN_WEBHOOK_SECRET_FILE", value_name = "PATH", requires = "webhook_url")]
    pub(super) webhook_secret_file: Option<PathBuf>,

    /// Seconds after which a pull that has not ended counts as stalled; 0 for never. An image named by digest is recovered meanwhile,
    /// a tag once its registry is known to be down, and the pod gets an Event
    #[arg(long, env = "LIGHTERMAN_STALLED_AFTER", value_name = "SECONDS", default_value_t = STALLED_AFTER.as_secs(), value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub(super) stalled_after: u64,

    /// End containerd's connections that are silent for --stalled-after while a pod waits: the
    /// stalled pull fails, and the node's later pulls go on. A pull from a registry that is
    /// silent for as long before the first byte fails as well
    #[arg(long, env = "LIGHTERMAN_END_STALLED_PULLS")]
    pub(super) end_stalled_pulls: bool,

    /// Delete a pod that still waits 30 s after its image has come, if something makes it again; the agent needs the right to
    #[arg(long, env = "LIGHTERMAN_DELETE_PODS")]
    pub(super) delete_pods: bool,

    /// Decide and report, but bring nothing
    #[arg(long, env = "LIGHTERMAN_DRY_RUN")]
    pub(super) dry_run: bool,

    /// The folder of containerd's image verifiers on the node, where bin_dir of its image-verifier
    /// plugin is not the usual one
    #[arg(long, env = "LIGHTERMAN_IMAGE_VERIFIER_DIR", value_name = "FOLDER")]
    pub(super) image_verifier_dir: Option<PathBuf>,

    /// Import although containerd has image verifiers, which see pulls only, or has a folder for
    /// them that cannot be seen
    #[arg(long, env = "LIGHTERMAN_IMPORT_PAST_VERIFIERS")]
    pub(super) import_past_verifiers: bool,

    /// Unpack layers as they come, into the snapshotter that CRI uses, before the image gets its name (true, false)
    #[arg(long, env = "LIGHTERMAN_UNPACK_LAYERS", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub(super) unpack_layers: bool,

    /// Fetch the next image of the agents' DaemonSet from peers before this node's turn in a rollout, and keep it and the current one
    /// from the kubelet's image collection (true, false)
    #[arg(long, env = "LIGHTERMAN_OWN_IMAGE", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub(super) own_image: bool,

    /// Whose layers are kept where containerd discards them after unpacking: images that opted-in namespaces run, all, none
    #[arg(long, env = "LIGHTERMAN_RETAIN_LAYERS", value_name = "WHOSE", value_enum, default_value_t = RetainKind::OptedIn)]
    pub(super) retain_layers: RetainKind,

    /// Most bytes of such layers, or percent of containerd's file system (20Gi, 20%); the least recently used image goes first
    #[arg(long, env = "LIGHTERMAN_RETAIN_BYTES", value_name = "BYTES|PERCENT", default_value = "20%", value_parser = retain_bytes)]
    pub(super) retain_bytes: RetainBytes,

    /// Where such layers are fetched from when an image here lacks them, one image at a time: none, peers, registry (from peers, else from
    /// the image's registry while that answers); true is peers, false is none
    #[arg(long, env = "LIGHTERMAN_RETAIN_FETCH", value_name = "WHERE", value_enum, default_value_t = FetchKind::Registry)]
    pub(super) retain_fetch: FetchKind,

    /// Most bytes per second of such layers from registries; 0 is no limit
    #[arg(long, env = "LIGHTERMAN_RETAIN_FETCH_RATE", value_name = "BYTES", default_value_t = RATE, value_parser = rate)]
    pub(super) retain_fetch_rate: u64,

    /// A file that may override policy and budgets while the agent runs; see the README
    #[arg(long, env = "LIGHTERMAN_POLICY_FILE", value_name = "PATH")]
    pub(super) policy_file: Option<PathBuf>,

    /// Recover nothing; the agent still tells and gives others what it holds
    #[arg(long, env = "LIGHTERMAN_KILL_SWITCH")]
    pub(super) kill_switch: bool,

    /// Images recovered at the same time
    #[arg(long, env = "LIGHTERMAN_CONCURRENT_RECOVERIES", value_name = "N", default_value_t = 2, value_parser = at_least_one)]
    pub(super) concurrent_recoveries: usize,

    /// Blobs of one image that are under way at the same time; their pieces are fetched together, in whichever order is best
    #[arg(long, env = "LIGHTERMAN_CONCURRENT_BLOBS", value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub(super) concurrent_blobs: usize,

    /// Blobs sent to peers at the same time; further requests are told to come back
    #[arg(long, env = "LIGHTERMAN_CONCURRENT_UPLOADS", value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub(super) concurrent_uploads: usize,

    /// Most bytes that one image may bring to this node; 0 is no limit
    #[arg(long, env = "LIGHTERMAN_MAX_IMAGE_BYTES", value_name = "BYTES", default_value_t = 0)]
    pub(super) max_image_bytes: u64,

    /// Bytes that stay free on the file systems of containerd's content and snapshots, whatever the
    /// next two flags say
    #[arg(long, env = "LIGHTERMAN_MIN_FREE_BYTES", value_name = "BYTES", default_value_t = 2 << 30)]
    pub(super) min_free_bytes: u64,

    /// Percent in use from which the kubelet collects images (imageGCHighThresholdPercent); a
    /// download does not cross it, unpacked layers may
    #[arg(long, env = "LIGHTERMAN_IMAGE_GC_PERCENT", value_name = "PERCENT", default_value_t = 85, value_parser = clap::value_parser!(u8).range(..=100))]
    pub(super) image_gc_percent: u8,

    /// Percent free below which the kubelet evicts pods (imagefs.available of evictionHard);
    /// unpacked layers do not cross it
    #[arg(long, env = "LIGHTERMAN_EVICTION_PERCENT", value_name = "PERCENT", default_value_t = 15, value_parser = clap::value_parser!(u8).range(..=90))]
    pub(super) eviction_percent: u8,

    /// Most bytes per second from peers, all together; 0 is no limit
    #[arg(long, env = "LIGHTERMAN_MAX_DOWNLOAD_RATE", value_name = "BYTES", default_value_t = 0, value_parser = rate)]
    pub(super) max_download_rate: u64,

    /// Most bytes per second to peers, all together; 0 is no limit
    #[arg(long, env = "LIGHTERMAN_MAX_UPLOAD_RATE", value_name = "BYTES", default_value_t = 0, value_parser = rate)]
    pub(super) max_upload_rate: u64,

    /// Seconds to finish in after SIGTERM; below the pod's terminationGracePeriodSeconds
    #[arg(long, env = "LIGHTERMAN_GRACE_PERIOD", value_name = "SECONDS", default_value_t = 20)]
    pub(super) grace_period: u64,
}

/// Who may join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AdmissionKind {
    /// ServiceAccount tokens whose audience is the peer's own PeerId.
    Token,
    /// Certificates of an authority of the operator's, whose key signs for the peer's PeerId.
    Certificate,
    /// A list of PeerIds.
    Static,
}

/// A selector, or none where the text is empty: the chart sets every variable.
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
