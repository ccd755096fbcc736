//! One node's agent: arguments, process, admin port and control socket.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use lighterman::containerd::{Config, ContainerdStore};
use lighterman::control::Client;
use lighterman::control::PullProgress;
use lighterman::oci::Reference;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::apiserver::{KubeNamespace, SERVICE_ACCOUNT, create};
use super::network::{AgentNetwork, admin_address, mesh_address};

/// Agents whose addresses every agent joins. Gossip introduces the other agents.
const SEEDS: usize = 3;

/// Deadline of one request to the admin port. Callers repeat the request.
const RESPONSE_DEADLINE: Duration = Duration::from_secs(2);

/// One node's agent, running or not.
pub(crate) struct Agent {
    pub(crate) node: String,
    pub(crate) store: ContainerdStore,
    number: usize,
    folder: PathBuf,
    arguments: Vec<String>,
    process: Option<Child>,
}

impl Agent {
    /// Creates the objects and files of a node's agent. `start` runs the process. `flags` are the
    /// arguments that differ between fleets.
    pub(crate) async fn new(
        kube: &KubeNamespace,
        number: usize,
        folder: &Path,
        zone: Option<String>,
        containerd: Config,
        flags: &[(&str, &str)],
    ) -> Self {
        let node = format!("node-{number}");
        let labels = json!({ "topology.kubernetes.io/zone": zone });
        let labels = zone.map_or(json!({}), |_| labels);
        create::<Node>(&Api::all(kube.admin.clone()), json!({ "metadata": { "name": node, "labels": labels } })).await;
        let pod = kube.pod_on(&format!("agent-{number}"), &node).await;
        let token = kube.token(SERVICE_ACCOUNT, None, Some(&pod)).await;
        let kubernetes = kube.config_of(&token);
        let folder = folder.join(&node);
        std::fs::create_dir(&folder).unwrap();
        let seeds: Vec<_> = (0..SEEDS).map(|seed| mesh_address(seed).to_string()).collect();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let own = [
            ("--node-name", node.clone()),
            ("--pod-namespace", kubernetes.k8s_namespace),
            ("--pod-name", pod.name),
            ("--pod-uid", pod.uid),
            ("--service-account", kubernetes.service_account),
            ("--kubeconfig", text(&kubernetes.kubeconfig.unwrap())),
            ("--listen", mesh_address(number).to_string()),
            ("--admin-listen", admin_address(number).to_string()),
            ("--join", seeds.join(",")),
            ("--admission", "token".to_owned()),
            ("--data-dir", text(&folder)),
            ("--containerd-socket", text(&containerd.socket)),
            ("--host-root", "/".to_owned()),
            ("--containerd-namespace", containerd.containerd_namespace.clone()),
        ];
        let flags = flags.iter().map(|(flag, value)| (*flag, (*value).to_owned()));
        let arguments = own.into_iter().chain(flags).flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
        let store = ContainerdStore::new(containerd).unwrap();
        Self { store, node, number, folder, arguments, process: None }
    }

    pub(crate) fn start(&mut self, network: &AgentNetwork) {
        let log = File::options().create(true).append(true).open(self.folder.join("log")).unwrap();
        let mut command = network.command(self.number, &binary());
        command.arg("agent").args(&self.arguments).stdin(Stdio::null());
        let process = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().expect("nsenter runs");
        self.process = Some(process);
    }

    /// Sends SIGKILL, so that the agent announces no departure.
    pub(crate) fn kill(&mut self) {
        let mut process = self.process.take().expect("the agent runs");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Process ID while the agent runs.
    pub(crate) fn id(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// Body of a GET on the admin port. `None` unless the status is 200 within the deadline.
    pub(crate) async fn get(&self, path: &str) -> Option<String> {
        let response = async {
            let mut connection = TcpStream::connect(admin_address(self.number)).await.ok()?;
            let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
            connection.write_all(request.as_bytes()).await.ok()?;
            let mut answer = String::new();
            connection.read_to_string(&mut answer).await.ok()?;
            let (head, body) = answer.split_once("\r\n\r\n")?;
            head.starts_with("HTTP/1.1 200 ").then(|| body.to_owned())
        };
        tokio::time::timeout(RESPONSE_DEADLINE, response).await.ok()?
    }

    pub(crate) fn control(&self) -> Client {
        Client::new(&self.folder.join("agent.sock"))
    }

    /// Whether a dry-run pull of the image lists this node as a provider.
    pub(crate) async fn would_fetch_from(&self, image: &Reference, provider: &str) -> bool {
        let Ok(mut pull) = self.control().pull(image, true).await else { return false };
        let first = pull.next().await;
        matches!(first, Ok(PullProgress::Resolved { providers, .. }) if providers.iter().any(|node| node == provider))
    }

    /// The last 40 lines of the log.
    pub(crate) fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// `LIGHTERMAN_BIN` where that is set, else this build. `make figures` sets the static binary,
/// which is the binary that users run, so its memory and speed are the figures.
fn binary() -> PathBuf {
    let set = std::env::var_os("LIGHTERMAN_BIN").filter(|path| !path.is_empty());
    set.map_or_else(|| env!("CARGO_BIN_EXE_lighterman").into(), PathBuf::from)
}
