//! The operator's surface: the status, manual pulls, and the policy file.

pub mod manual_pull;
pub mod policy_watch;
pub mod status;

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use self::manual_pull::ManualPuller;
use self::policy_watch::PolicyWatch;
use self::status::AgentStatus;
use super::StartError;
use super::context::AgentContext;
use super::part::{Part, Tasks};
use super::recovery::recover::Recoverer;
use crate::control::{self, ControlServer};
use crate::control::{ClockStatus, ContainerdStatus, ImagesStatus, OwnImageStatus, PolicyFileStatus, RetentionStatus};
use crate::decide::policy::Policy;
use crate::metrics::Metrics;
use crate::model::Outage;
use crate::ports::MeshSource;

/// Manual pulls that wait for the task, which accepts a pull at once.
const PULLS_QUEUED: usize = 4;

/// The policy in force, and the watch of its file where there is one.
pub(super) struct PolicySource {
    pub(super) policy: watch::Receiver<Arc<Policy>>,
    watch: Option<PolicyWatch>,
}

impl PolicySource {
    /// Reads the policy file, if one is set. `flags` hold where the file sets nothing.
    pub(super) async fn open(file: Option<PathBuf>, flags: Policy, metrics: &Metrics) -> Self {
        match file {
            Some(path) => {
                let watch = PolicyWatch::open(path, flags, metrics.clone()).await;
                Self { policy: watch.policy(), watch: Some(watch) }
            }
            None => Self { policy: watch::channel(Arc::new(flags)).1, watch: None },
        }
    }
}

/// Parts of the agent that the operator's part uses.
pub(super) struct OperatorDependencies {
    pub(super) policy: PolicySource,
    pub(super) control_socket: PathBuf,
    pub(super) recoverer: Arc<Recoverer>,
    pub(super) mesh_status: Arc<dyn MeshSource>,
    pub(super) containerd: Option<watch::Receiver<ContainerdStatus>>,
    pub(super) clock: watch::Receiver<Option<ClockStatus>>,
    pub(super) images: watch::Receiver<Option<ImagesStatus>>,
    pub(super) retained: watch::Receiver<Option<RetentionStatus>>,
    pub(super) own_image: watch::Receiver<Option<OwnImageStatus>>,
    pub(super) outages: watch::Receiver<Vec<Outage>>,
}

/// Binds the control socket, and builds the tasks behind it.
///
/// # Errors
/// [`StartError::Control`] when the socket cannot be bound.
pub(super) async fn build(context: &AgentContext, dependencies: OperatorDependencies) -> Result<Part<()>, StartError> {
    let OperatorDependencies {
        policy: PolicySource { policy: _, watch: policy_watch },
        control_socket,
        recoverer,
        mesh_status,
        containerd,
        clock,
        images,
        retained,
        own_image,
        outages,
    } = dependencies;
    let AgentContext { node, peer, policy: _, options, inventory, tracker, metrics } = context.clone();
    let policy_file: Option<watch::Receiver<PolicyFileStatus>> = policy_watch.as_ref().map(PolicyWatch::status);
    let status = AgentStatus {
        node,
        own_peer: peer,
        mesh: mesh_status,
        inventory,
        tracker: tracker.clone(),
        containerd,
        clock,
        images,
        retained,
        own_image,
        observed_outages: outages,
        policy_file,
    };
    let (pulls_in, pulls) = mpsc::channel(PULLS_QUEUED);
    let config = control::Config { socket: control_socket };
    let control = ControlServer::bind(config, Arc::new(status), pulls_in).await?;
    let manual_puller = ManualPuller { recoverer, tracker, metrics, dry_run: options.dry_run };
    let mut tasks = Tasks::default();
    if let Some(policy_watch) = policy_watch {
        tasks.add("policy", |stop| policy_watch.run(stop));
    }
    tasks.add("control", |stop| control.run(stop));
    tasks.add("manual pulls", |stop| manual_puller.run(pulls, stop));
    Ok(Part { handle: (), tasks })
}
