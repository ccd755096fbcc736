//! Agents on one containerd, with a containerd namespace for each agent.

use std::time::{Duration, Instant};

use futures::future::join_all;
use lighterman::containerd::ContainerdStore;
use lighterman::oci::Reference;
use lighterman::ports::{Blobs, ImageRecords};
use lighterman::testing::image::put_image;
use tempfile::TempDir;

use super::mesh_view::MeshView;
use crate::containerd::daemon::Daemon;
use crate::fleet::agent::Agent;
use crate::fleet::apiserver::KubeNamespace;
use crate::fleet::network::{AgentNetwork, SWITCH};
use crate::fleet::rbac::grant_rbac;

/// Deadline of each wait. Long, so that a busy machine fails no test.
const WAIT_DEADLINE: Duration = Duration::from_secs(300);

/// Shortest pause between two polls of all agents.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// All agents with their network, containerd and API server.
pub(super) struct Fleet {
    pub(super) network: AgentNetwork,
    pub(super) agents: Vec<Agent>,
    containerd: Daemon,
    kube: KubeNamespace,
    folder: TempDir,
}

impl Fleet {
    /// Prepares the agents without starting them. To be called on a thread of the switch.
    pub(super) async fn new(network: AgentNetwork, agents: usize) -> Self {
        let (kube, containerd) = tokio::join!(KubeNamespace::with_own_server(SWITCH), Daemon::start("containerd-2.3"));
        grant_rbac(&kube, "").await;
        let mut fleet = Self { network, agents: Vec::new(), containerd, kube, folder: tempfile::tempdir().unwrap() };
        for number in 0..agents {
            let (node, zone) = (format!("node-{number}"), format!("zone-{}", number % 3));
            let containerd = fleet.containerd.config(&node);
            let folder = fleet.folder.path();
            let agent = Agent::new(&fleet.kube, number, folder, Some(zone), containerd, &[]).await;
            fill(&agent.store, number).await;
            fleet.agents.push(agent);
        }
        fleet
    }

    pub(super) fn start(&mut self, numbers: impl IntoIterator<Item = usize>) {
        for number in numbers {
            self.agents[number].start(&self.network);
        }
    }

    /// Kills these agents with SIGKILL.
    pub(super) fn kill(&mut self, numbers: &[usize]) {
        numbers.iter().for_each(|number| self.agents[*number].kill());
    }

    pub(super) fn running(&self) -> impl Iterator<Item = &Agent> {
        self.agents.iter().filter(|agent| agent.id().is_some())
    }

    /// Returns the mesh view of every running agent that answers.
    pub(super) async fn views(&self) -> Vec<(&Agent, MeshView)> {
        let views = self.running().map(async |agent| Some((agent, MeshView::of(agent).await?)));
        join_all(views).await.into_iter().flatten().collect()
    }

    /// Waits until every running agent lists all others, with all items of their containerds.
    pub(super) async fn wait_converged(&self) {
        let announced =
            join_all(self.running().map(async |agent| (agent.node.as_str(), announced_items(agent).await))).await;
        let is_converged = |agent: &Agent, view: &MeshView| {
            let alive = view.alive();
            let is_known = |(node, items): &(&str, usize)| match *node == agent.node {
                true => view.items == *items,
                false => alive.get(node) == Some(items),
            };
            alive.len() == announced.len() - 1 && announced.iter().all(is_known)
        };
        self.wait_until("all inventories are complete", is_converged).await;
    }

    /// Waits until all other agents have dropped the items of these nodes.
    pub(super) async fn wait_dropped(&self, numbers: &[usize]) {
        let dropped_nodes: Vec<_> = numbers.iter().map(|number| self.agents[*number].node.as_str()).collect();
        let what = format!("all other agents have dropped {dropped_nodes:?}");
        let has_dropped_all = |agent: &Agent, view: &MeshView| {
            dropped_nodes.contains(&agent.node.as_str()) || dropped_nodes.iter().all(|node| view.has_dropped(node))
        };
        self.wait_until(&what, has_dropped_all).await;
    }

    /// Polls all running agents until the condition holds for all of them in one round.
    async fn wait_until(&self, what: &str, condition: impl Fn(&Agent, &MeshView) -> bool) {
        let began = Instant::now();
        loop {
            let poll_started = Instant::now();
            let views = self.views().await;
            let is_satisfied =
                |agent: &Agent| views.iter().any(|(seen, view)| seen.node == agent.node && condition(agent, view));
            let Some(late_agent) = self.running().find(|agent| !is_satisfied(agent)) else { return };
            if began.elapsed() > WAIT_DEADLINE {
                let view = views.iter().find(|(agent, _)| agent.node == late_agent.node).map(|(_, view)| view);
                panic!("timed out before {what}; {} is behind: {view:?}\n{}", late_agent.node, late_agent.log_tail());
            }
            // Polls must leave most processor time to the agents on a slow machine.
            tokio::time::sleep(POLL_INTERVAL.max(poll_started.elapsed() * 4)).await;
        }
    }

    /// Waits until every other agent lists this agent as a provider of the image.
    pub(super) async fn wait_provider(&self, image: &str, provider: usize) {
        let (image, provider) = (image.parse::<Reference>().unwrap(), &self.agents[provider]);
        let began = Instant::now();
        let lookups = self.running().filter(|agent| agent.node != provider.node).map(async |agent| {
            while !agent.would_fetch_from(&image, &provider.node).await {
                assert!(
                    began.elapsed() < WAIT_DEADLINE,
                    "{} finds no provider of {image}\n{}",
                    agent.node,
                    agent.log_tail()
                );
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        });
        join_all(lookups).await;
    }
}

/// Counts the items that the agent announces: blobs and image records.
async fn announced_items(agent: &Agent) -> usize {
    agent.store.blobs().await.unwrap().len() + agent.store.images().await.unwrap().len()
}

/// Puts an image of all nodes, an image of every fifth node, and two images of this node alone.
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
