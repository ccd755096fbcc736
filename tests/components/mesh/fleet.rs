//! Agents as they are installed, one process each: on one containerd with a containerd namespace for each, admitted by tokens of one real
//! API server, and with the addresses of the first ones.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use lighterman::containerd::ContainerdStore;
use lighterman::control::Client;
use lighterman::oci::Reference;
use lighterman::ports::{ContentStore, PullProgress};
use lighterman::testing::image::put_image;
use serde_json::json;
use tempfile::TempDir;

use super::view::View;
use super::wires::{SWITCH, Wires, admin_address, mesh_address};
use crate::containerd::daemon::Daemon;
use crate::kubernetes::apiserver::{Place, SERVICE_ACCOUNT, make};
use crate::kubernetes::rights::grant;

/// For whatever is waited for; a busy machine must not fail a test.
const PATIENCE: Duration = Duration::from_secs(300);

/// Between two looks at all agents, unless looking takes longer.
const LOOK: Duration = Duration::from_millis(20);

/// How many agents are found by address; the others are found through them.
const SEEDS: usize = 3;

/// All agents and what they stand on.
pub(super) struct Fleet {
    pub(super) wires: Wires,
    pub(super) agents: Vec<Agent>,
    containerd: Daemon,
    place: Place,
    folder: TempDir,
}

/// One node's agent.
pub(super) struct Agent {
    pub(super) node: String,
    pub(super) store: ContainerdStore,
    number: usize,
    folder: PathBuf,
    arguments: Vec<String>,
    process: Option<Child>,
}

impl Fleet {
    /// Everything but the agents themselves, which do not run yet. For threads of the switch.
    pub(super) async fn new(wires: Wires, agents: usize) -> Self {
        let (place, containerd) = tokio::join!(Place::at(SWITCH), Daemon::start("containerd-2"));
        grant(&place, "").await;
        let mut fleet = Self { wires, agents: Vec::new(), containerd, place, folder: tempfile::tempdir().unwrap() };
        for number in 0..agents {
            let agent = fleet.agent(number).await;
            fill(&agent.store, number).await;
            fleet.agents.push(agent);
        }
        fleet
    }

    /// The objects and files that a node's agent finds.
    async fn agent(&self, number: usize) -> Agent {
        let node = format!("node-{number}");
        let labels = json!({ "topology.kubernetes.io/zone": format!("zone-{}", number % 3) });
        make::<Node>(&Api::all(self.place.admin.clone()), json!({ "metadata": { "name": node, "labels": labels } }))
            .await;
        let pod = self.place.pod_on(&format!("agent-{number}"), &node).await;
        let token = self.place.token(SERVICE_ACCOUNT, None, Some(&pod)).await;
        let kubernetes = self.place.config_of(&token);
        let containerd = self.containerd.config(&node);
        let folder = self.folder.path().join(&node);
        std::fs::create_dir(&folder).unwrap();
        let seeds: Vec<_> = (0..SEEDS).map(|seed| mesh_address(seed).to_string()).collect();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let flags = [
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
            ("--containerd-namespace", containerd.containerd_namespace),
        ];
        let arguments = flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
        Agent { store: self.containerd.store(&node), node, number, folder, arguments, process: None }
    }

    /// Starts these agents at once.
    pub(super) fn start(&mut self, numbers: impl IntoIterator<Item = usize>) {
        for number in numbers {
            self.agents[number].start(&self.wires);
        }
    }

    /// Kills these agents at once, and nobody is told.
    pub(super) fn kill(&mut self, numbers: &[usize]) {
        for number in numbers {
            self.agents[*number].process.as_mut().unwrap().kill().unwrap();
        }
        for number in numbers {
            self.agents[*number].process.take().unwrap().wait().unwrap();
        }
    }

    /// The agents that run.
    pub(super) fn living(&self) -> impl Iterator<Item = &Agent> {
        self.agents.iter().filter(|agent| agent.process.is_some())
    }

    /// How all that run see it now. One that does not answer is left out.
    pub(super) async fn views(&self) -> Vec<(&Agent, View)> {
        let views = self.living().map(async |agent| Some((agent, agent.view().await?)));
        join_all(views).await.into_iter().flatten().collect()
    }

    /// Waits until every agent that runs knows every other with all that its containerd holds.
    pub(super) async fn knows_all(&self) {
        let held = join_all(self.living().map(async |agent| (agent.node.as_str(), agent.held().await))).await;
        let knows = |agent: &Agent, view: &View| {
            let alive = view.alive();
            let known = |(node, items): &(&str, usize)| match *node == agent.node {
                true => view.items == *items,
                false => alive.get(node) == Some(items),
            };
            alive.len() == held.len() - 1 && held.iter().all(known)
        };
        self.until("everybody knows everything", knows).await;
    }

    /// Waits until no agent but their own has anything of these nodes.
    pub(super) async fn has_dropped(&self, numbers: &[usize]) {
        let gone: Vec<_> = numbers.iter().map(|number| self.agents[*number].node.as_str()).collect();
        let what = format!("the others have dropped {gone:?}");
        let dropped = |agent: &Agent, view: &View| {
            gone.contains(&agent.node.as_str()) || gone.iter().all(|node| view.has_dropped(node))
        };
        self.until(&what, dropped).await;
    }

    /// Looks at all agents that run until all say so in one round.
    async fn until(&self, what: &str, holds: impl Fn(&Agent, &View) -> bool) {
        let began = Instant::now();
        loop {
            let looked = Instant::now();
            let views = self.views().await;
            let is_content =
                |agent: &Agent| views.iter().any(|(seen, view)| seen.number == agent.number && holds(agent, view));
            let Some(behind) = self.living().find(|agent| !is_content(agent)) else { return };
            if began.elapsed() > PATIENCE {
                let view = views.iter().find(|(agent, _)| agent.number == behind.number).map(|(_, view)| view);
                panic!("{what}: not so on {} and maybe others: {view:?}\n{}", behind.node, behind.story());
            }
            // On a slow machine the agents need the time themselves.
            tokio::time::sleep(LOOK.max(looked.elapsed() * 4)).await;
        }
    }

    /// Waits until every agent but the provider's own would fetch this image from there.
    pub(super) async fn finds(&self, image: &str, provider: usize) {
        let (image, provider) = (image.parse::<Reference>().unwrap(), &self.agents[provider]);
        let began = Instant::now();
        let finding = self.living().filter(|agent| agent.node != provider.node).map(async |agent| {
            while !agent.finds(&image, &provider.node).await {
                assert!(began.elapsed() < PATIENCE, "{} does not find {image}\n{}", agent.node, agent.story());
                tokio::time::sleep(LOOK).await;
            }
        });
        join_all(finding).await;
    }
}

impl Agent {
    fn start(&mut self, wires: &Wires) {
        let log = File::options().create(true).append(true).open(self.folder.join("log")).unwrap();
        let mut command = wires.command(self.number, &binary());
        command.arg("agent").args(&self.arguments).stdin(Stdio::null());
        let process = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().expect("nsenter runs");
        self.process = Some(process);
    }

    /// Its process.
    pub(super) fn id(&self) -> u32 {
        self.process.as_ref().expect("it runs").id()
    }

    async fn view(&self) -> Option<View> {
        View::of(admin_address(self.number)).await
    }

    fn control(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    /// What there is to announce: blobs and names.
    async fn held(&self) -> usize {
        self.store.blobs().await.unwrap().len() + self.store.images().await.unwrap().len()
    }

    /// Whether it would fetch the image from this node.
    async fn finds(&self, image: &Reference, provider: &str) -> bool {
        let Ok(mut asked) = Client::new(&self.control()).pull(image, true).await else { return false };
        let answer = asked.next().await;
        matches!(answer, Ok(PullProgress::Resolved { providers, .. }) if providers.iter().any(|node| node == provider))
    }

    /// The end of what it said.
    fn story(&self) -> String {
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

/// The static one if there is one, as it is shipped; its memory and speed are what users see.
fn binary() -> PathBuf {
    let set = std::env::var_os("LIGHTERMAN_BIN").filter(|path| !path.is_empty());
    set.map_or_else(|| env!("CARGO_BIN_EXE_lighterman").into(), PathBuf::from)
}

/// An image that all nodes have, one that every fifth has too, and two that no other has.
async fn fill(store: &ContainerdStore, number: usize) {
    let images = [
        ("reg.test/all/pause:1".to_owned(), 1),
        (format!("reg.test/some/app:{}", number % 5), 100 + number % 5),
        (format!("reg.test/own/first:{number}"), 1000 + number),
        (format!("reg.test/own/second:{number}"), 2000 + number),
    ];
    for (name, seed) in images {
        put_image(store, &[name], &[1000, 1000], seed as u64).await.unwrap();
    }
}
