//! `lighterman agent`: builds the adapters of containerd, API server and registries, and runs one
//! agent until a signal.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{EXIT_USAGE, runtime};
use crate::addresses::has_ipv6;
use crate::admin::ReadinessCheck;
use crate::admission::{CertificateAdmission, CertificateFilesError, StaticAdmission, TokenAdmission};
use crate::agent::retention::own_image::OwnImagePorts;
use crate::agent::supervisor::Supervisor;
use crate::agent::{Agent, AgentPorts};
use crate::api_server;
use crate::cluster::KubeCluster;
use crate::config::{AdmissionMode, Config};
use crate::containerd::{self, ContainerdInfo, ContainerdStore, ImageVerifiers, Snapshotter, find_socket};
use crate::control::{BlobAccess, ContainerdStatus};
use crate::files::below_root;
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::ports::{Admission, ImportPermission, Notifier, StoreError};
use crate::registry::{self, RegistryClient};
use crate::webhook::{self, Webhook};

/// Capacity of the channel of pod events: one list of a full node. Above, the watch waits.
const POD_EVENTS_QUEUED: usize = 128;

/// The value of `--containerd-socket` that takes the first of the usual paths.
const AUTO_SOCKET: &str = "auto";

/// Runs the agent until SIGTERM or SIGINT.
pub(super) fn run(config: Config) -> ExitCode {
    let result = runtime().map_err(Into::into).and_then(|runtime| runtime.block_on(run_agent(config)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %error_chain(&*error), "the agent stops on an error");
            let is_usage_error = error.is::<containerd::ConfigError>()
                || error.is::<CertificateFilesError>()
                || error.is::<registry::ConfigError>()
                || error.is::<webhook::ConfigError>();
            if is_usage_error { ExitCode::from(EXIT_USAGE) } else { ExitCode::FAILURE }
        }
    }
}

async fn run_agent(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let Config {
        mut transfer,
        mut mesh,
        mut containerd,
        api_server,
        registry,
        webhook,
        admission: admission_mode,
        mut settings,
    } = config;
    for listen in [&mut transfer.listen, &mut mesh.listen, &mut settings.admin_listen] {
        *listen = listen_address(*listen);
    }
    // The first step, so that no early signal is lost.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let grace = settings.grace;
    let metrics = Metrics::new();
    let identity = Identity::load_or_create_for_node(&settings.key_file, &settings.node)?;
    if containerd.socket == Path::new(AUTO_SOCKET) {
        containerd.socket = find_socket(containerd.host_root.as_deref().unwrap_or(Path::new("/")))?;
        tracing::info!(socket = %containerd.socket.display(), "containerd's socket was found");
    } else if let Some(root) = &containerd.host_root {
        containerd.socket = below_root(root, &containerd.socket);
    }
    let store = ContainerdStore::new(containerd)?;
    let api_server = api_server::connect(api_server).await?;
    let kube = Arc::new(KubeCluster::new(&api_server));
    let containerd_ready = watch::Sender::new(false);
    let (imports, containerd_status) =
        (watch::Sender::new(ImportPermission::Unknown), watch::Sender::new(ContainerdStatus::default()));
    let (pod_sender, pods) = mpsc::channel(POD_EVENTS_QUEUED);
    let mut supervisor = Supervisor::default();
    let local_peer = identity.peer_id();
    let admission: Arc<dyn Admission> = match admission_mode {
        AdmissionMode::Token(options) => {
            let admission = Arc::new(TokenAdmission::new(&api_server, local_peer, options, metrics.clone()));
            let running = Arc::clone(&admission);
            supervisor.spawn("token", |stop| async move { running.run(stop).await });
            admission
        }
        AdmissionMode::Certificate(files) => {
            let admission = Arc::new(CertificateAdmission::open(files, local_peer)?);
            supervisor.spawn("certificate", |stop| Arc::clone(&admission).run(stop));
            admission
        }
        AdmissionMode::Static(peers) => Arc::new(StaticAdmission::new(peers)),
    };
    let notifier: Option<Arc<dyn Notifier>> = match webhook {
        Some(webhook) => Some(Arc::new(Webhook::new(webhook).await?)),
        None => None,
    };
    let ports = AgentPorts {
        store: Arc::new(store.clone()),
        unpacker: settings.unpack_layers.then(|| Arc::new(store.clone()) as _),
        layer_leases: Some(Arc::new(store.clone())),
        own_image: settings
            .own_image
            .then(|| OwnImagePorts { daemonset: Arc::clone(&kube) as _, protected: Arc::new(store.clone()) }),
        cluster: Arc::clone(&kube) as _,
        claims: Arc::clone(&kube) as _,
        admission,
        registry: Arc::new(RegistryClient::new(registry)?),
        pull_connections: Some(Arc::new(store.clone())),
        notifier,
        imports: imports.subscribe(),
        containerd: Some(containerd_status.subscribe()),
        pods,
        readiness_checks: vec![
            ReadinessCheck { name: "containerd", passes: containerd_ready.subscribe() },
            ReadinessCheck { name: "pod watch", passes: kube.synced() },
        ],
    };
    let sweep_kube = Arc::clone(&kube);
    let probe = ContainerdProbe {
        store: store.clone(),
        verifiers: settings.image_verifier_dir.clone(),
        import_past_verifiers: settings.import_past_verifiers,
        unpack_layers: settings.unpack_layers,
        ready: containerd_ready,
        imports,
        status: containerd_status,
    };
    supervisor.spawn("containerd", |stop| store.run(stop));
    supervisor.spawn("probe", |stop| probe.run(stop));
    supervisor.spawn("sweep", |stop| delete_abandoned_claims(sweep_kube, stop));
    let agent = Agent::start(settings, transfer, mesh, identity, ports, metrics, supervisor).await?;
    let Agent { mut supervisor, inventory: _, tracker: _, transfer: _, admin: _ } = agent;
    supervisor.spawn("pods", |stop| async move { kube.watch_pods(pod_sender, stop).await });
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: the agent finishes"),
            _ = interrupt.recv() => tracing::info!("SIGINT: the agent finishes"),
        }
    };
    supervisor.run(shutdown, grace).await?;
    tracing::info!("the agent has stopped");
    Ok(())
}

/// Replaces `[::]`, which means all addresses, by `0.0.0.0` on a node without IPv6.
fn listen_address(listen: SocketAddr) -> SocketAddr {
    let is_unspecified = listen.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    if is_unspecified && !has_ipv6() {
        return SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), listen.port());
    }
    listen
}

/// Interval of the checks that containerd answers: the period of the readiness probe.
const PROBE_PERIOD: Duration = Duration::from_secs(5);

/// Interval of reads of containerd's settings. A restart may change the settings, and an
/// administrator may add image verifiers.
const INSPECT_PERIOD: Duration = Duration::from_secs(60);

/// Publishes whether this node's containerd answers, its settings, and whether imports are
/// permitted.
struct ContainerdProbe {
    store: ContainerdStore,
    /// The folder of image verifiers on the node.
    verifiers: PathBuf,
    import_past_verifiers: bool,
    unpack_layers: bool,
    ready: watch::Sender<bool>,
    imports: watch::Sender<ImportPermission>,
    status: watch::Sender<ContainerdStatus>,
}

impl ContainerdProbe {
    async fn run(self, stop: CancellationToken) {
        let mut last = None;
        let mut inspected_at: Option<Instant> = None;
        loop {
            let now = self.store.ready().await.map_err(|error| error.to_string());
            if last.as_ref() != Some(&now) {
                match &now {
                    Ok(version) => tracing::info!(version, "containerd answers"),
                    Err(error) => tracing::warn!(error, "containerd does not answer; the agent waits for containerd"),
                }
                inspected_at = None;
            }
            if now.is_ok() && inspected_at.is_none_or(|at| at.elapsed() >= INSPECT_PERIOD) {
                self.inspect_containerd().await;
                inspected_at = Some(Instant::now());
            }
            self.ready.send_replace(now.is_ok());
            last = Some(now);
            if stop.run_until_cancelled(tokio::time::sleep(PROBE_PERIOD)).await.is_none() {
                return;
            }
        }
    }

    /// Reads containerd's settings, and decides whether imports are permitted. containerd runs
    /// image verifiers for CRI's pulls and not for imports, so an import bypasses the verifiers.
    async fn inspect_containerd(&self) {
        let found: Result<ContainerdInfo, StoreError> = self.store.inspect(&self.verifiers).await;
        let found = match found {
            Ok(found) => found,
            Err(error) => return tracing::warn!(%error, "containerd's settings cannot be read"),
        };
        let ContainerdInfo {
            version,
            content_root,
            ingest,
            cri: _,
            discards_unpacked_layers,
            snapshotter,
            sandbox_image,
            verifiers,
        } = found;
        let folder = self.verifiers.display();
        let imports = match verifiers {
            ImageVerifiers::Found if !self.import_past_verifiers => ImportPermission::Refused(format!(
                "containerd has image verifiers ({folder}), which an import would bypass; --import-past-verifiers permits imports"
            )),
            ImageVerifiers::Unseen if !self.import_past_verifiers => ImportPermission::Refused(format!(
                "containerd may have image verifiers, and the agent cannot see their folder ({folder}): mount the folder \
                 (imageVerifierDir, or containerdRoot=auto), or permit imports with --import-past-verifiers"
            )),
            ImageVerifiers::Found | ImageVerifiers::Unseen | ImageVerifiers::None => ImportPermission::Allowed,
        };
        self.imports.send_if_modified(|before| {
            let changed = *before != imports;
            match &imports {
                ImportPermission::Refused(reason) if changed => {
                    tracing::warn!(reason, "nothing is imported on this node")
                }
                _ => {}
            }
            *before = imports;
            changed
        });
        if discards_unpacked_layers == Some(true) {
            tracing::debug!("containerd discards layers after unpacking");
        }
        self.status.send_replace(ContainerdStatus {
            version: Some(version),
            blobs_read: Some(if content_root.is_some() { BlobAccess::Files } else { BlobAccess::ContentApi }),
            content_root: content_root.map(|root| root.display().to_string()),
            ingest: ingest.map(|ingest| ingest.to_string()),
            discards_unpacked_layers,
            unpacking: Some(match self.unpack_layers {
                true => snapshotter.to_string(),
                false => Snapshotter::Unsupported("--unpack-layers=false".into()).to_string(),
            }),
            sandbox_image,
            image_verifiers: Some(match verifiers {
                ImageVerifiers::None => Vec::new(),
                ImageVerifiers::Found => vec![folder.to_string()],
                ImageVerifiers::Unseen => vec![format!("{folder} cannot be seen")],
            }),
        });
    }
}

/// Mean interval of the deletion of abandoned claims, which are small and rare.
const SWEEP_PERIOD: Duration = Duration::from_secs(3600);

async fn delete_abandoned_claims(kube: Arc<KubeCluster>, stop: CancellationToken) {
    // A pause of 0.5 to 1.5 periods, so that the nodes do not all list at once.
    let pause = || tokio::time::sleep(SWEEP_PERIOD.mul_f64(0.5 + rand::random::<f64>()));
    while stop.run_until_cancelled(pause()).await.is_some() {
        match kube.delete_abandoned_claims(SystemTime::now()).await {
            Ok(0) => {}
            Ok(swept) => tracing::info!(swept, "abandoned claims were deleted"),
            Err(error) => tracing::debug!(%error, "abandoned claims cannot be deleted now; the agent retries"),
        }
    }
}

/// An error with its causes, in one line.
fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    std::iter::once(error.to_string()).chain(causes.map(ToString::to_string)).collect::<Vec<_>>().join(": ")
}
