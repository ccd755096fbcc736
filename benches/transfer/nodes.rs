//! Nodes in a network of their own: real agents, one process each, on links that can be shaped; each with a containerd of its own, so that
//! nothing gets from one to the other but through the agents. The API server is real, and there are no kubelets.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use lighterman::oci::Reference;
use lighterman::ports::PullProgress;
use lighterman::testing::image::{MadeImage, put_image};
use tokio::runtime::Builder;
use tokio::time::{sleep, timeout};

use crate::daemon::Containerd;
use crate::fleet::agent::Agent;
use crate::fleet::apiserver::KubeNamespace as Kubernetes;
use crate::fleet::network::{AgentNetwork, SWITCH};
use crate::fleet::rbac::grant_rbac;
use crate::report::{BenchError, median};
use crate::storage::Storage;

/// For whatever has to be known by all before it is measured.
const WAIT_DEADLINE: Duration = Duration::from_secs(120);

/// For everything that a group does; the longest takes ten minutes.
const DEADLINE: Duration = Duration::from_secs(3600);

/// Between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// What starting, or a change, has set off is over after this time: changes are gathered for a second, and agents compare what they know
/// every ten.
pub(crate) const SETTLE: Duration = Duration::from_secs(3);

/// Dropped in this order: nothing uses the folders when they go.
pub(crate) struct Nodes {
    pub(crate) agents: Vec<Agent>,
    pub(crate) containerds: Vec<Containerd>,
    pub(crate) kubernetes: Kubernetes,
    pub(crate) network: AgentNetwork,
    _storage: Storage,
}

/// Does something with so many nodes, in a thread that is in their network.
pub(crate) fn with_nodes<Body>(place: Storage, nodes: usize, body: Body) -> Result<(), BenchError>
where
    Body: AsyncFnOnce(&mut Nodes) -> Result<(), BenchError> + Send + 'static,
{
    let work = move || {
        let wires = AgentNetwork::new(nodes);
        wires.enter_switch();
        let runtime = Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut nodes = Nodes::start(wires, place, nodes).await?;
            timeout(DEADLINE, body(&mut nodes)).await.map_err(|_| "it takes too long")?
        })
    };
    // What it said when it panicked stands above.
    thread::spawn(work).join().map_err(|_| "the nodes could not be made, or went away")?
}

impl Nodes {
    /// All of them, running. For threads of the switch.
    async fn start(wires: AgentNetwork, place: Storage, nodes: usize) -> Result<Self, BenchError> {
        let kubernetes = Kubernetes::with_own_server(SWITCH).await;
        grant_rbac(&kubernetes, "").await;
        let mut started =
            Self { agents: Vec::new(), containerds: Vec::new(), kubernetes, network: wires, _storage: place };
        // Nothing else is on this storage.
        let flags = [
            ("--min-free-bytes", "0"),
            ("--image-gc-percent", "100"),
            ("--eviction-percent", "0"),
            ("--host-root", "/"),
        ];
        let agents = started._storage.path().join("agents");
        std::fs::create_dir(&agents)?;
        for number in 0..nodes {
            let containerd = Containerd::start(started._storage.path().join(number.to_string()))?;
            let config = containerd.config();
            let mut agent = Agent::new(&started.kubernetes, number, &agents, None, config, &flags).await;
            agent.start(&started.network);
            started.containerds.push(containerd);
            started.agents.push(agent);
        }
        started.wait_ready().await?;
        Ok(started)
    }

    /// Waits until all agents can be asked. One that starts throws away what it takes for its own unfinished writes: nothing is put into its
    /// containerd before.
    pub(crate) async fn wait_ready(&self) -> Result<(), BenchError> {
        let began = Instant::now();
        for agent in &self.agents {
            while agent.get("/readyz").await.is_none() {
                if began.elapsed() > WAIT_DEADLINE {
                    return Err(format!("{} does not get ready:\n{}", agent.node, agent.log_tail()).into());
                }
                sleep(POLL_INTERVAL).await;
            }
        }
        sleep(SETTLE).await;
        Ok(())
    }

    /// Lets no link carry more than so much in either direction, Ethernet headers included; what waits for it is 40 ms at most, a megabyte at
    /// 200 Mbit/s, as a switch's port may have. Segments travel together as they do in a machine whose card cuts them; each counts with its
    /// headers.
    pub(crate) fn limit_rate(&self, mbit_s: u32) -> Result<(), BenchError> {
        let rate = format!("{mbit_s}mbit");
        let shaping = |link: &str| {
            let words =
                ["qdisc", "replace", "dev", link, "root", "tbf", "rate", &rate, "burst", "64kb", "latency", "40ms"];
            words.map(str::to_owned)
        };
        for node in 0..self.agents.len() {
            run(Command::new("tc").args(shaping(&format!("mesh-{node}"))))?;
            run(self.network.command(node, Path::new("tc")).args(shaping("mesh")))?;
            run(self.network.command(node, Path::new("ip")).args(["link", "set", "mesh", "gso_max_segs", "65535"]))?;
        }
        Ok(())
    }

    /// Has the links carry frames of so many bytes. Connections find out when they are made, or some minutes later.
    pub(crate) fn set_mtu(&self, bytes: u32) -> Result<(), BenchError> {
        let mtu = bytes.to_string();
        let words = |link: &str| ["link", "set", link, "mtu", &mtu].map(str::to_owned);
        for node in 0..self.agents.len() {
            run(Command::new("ip").args(words(&format!("mesh-{node}"))))?;
            run(self.network.command(node, Path::new("ip")).args(words("mesh")))?;
        }
        run(Command::new("ip").args(words("mesh")))
    }

    /// Makes an image in one node's containerd. The same seed makes the same layers.
    pub(crate) async fn put_image_on(
        &self,
        node: usize,
        image: &Reference,
        layers: &[u64],
        seed: u64,
    ) -> Result<MadeImage, BenchError> {
        Ok(put_image(&self.agents[node].store, &[image.to_string()], layers, seed).await?)
    }

    /// Waits until these nodes would fetch the image from those, and all is quiet again.
    pub(crate) async fn wait_providers(
        &self,
        image: &Reference,
        seekers: impl IntoIterator<Item = usize>,
        providers: &[usize],
    ) -> Result<(), BenchError> {
        let began = Instant::now();
        for seeker in seekers {
            for provider in providers {
                let (seeker, provider) = (&self.agents[seeker], &self.agents[*provider].node);
                while !seeker.would_fetch_from(image, provider).await {
                    if began.elapsed() > WAIT_DEADLINE {
                        let (node, story) = (&seeker.node, seeker.log_tail());
                        return Err(format!("{node} does not find {image} on {provider}:\n{story}").into());
                    }
                    sleep(POLL_INTERVAL).await;
                }
            }
        }
        sleep(SETTLE).await;
        Ok(())
    }

    /// Looks whether the image is whole on these nodes, as containerd sees it.
    pub(crate) fn check(
        &self,
        nodes: impl IntoIterator<Item = usize>,
        reference: &Reference,
        image: &MadeImage,
    ) -> Result<(), BenchError> {
        nodes.into_iter().try_for_each(|node| self.containerds[node].check(reference, image))
    }

    /// Removes all images from all nodes.
    pub(crate) fn remove_images(&self) -> Result<(), BenchError> {
        self.containerds.iter().try_for_each(Containerd::empty)
    }

    /// A metric of a node's agent, the sum over its labels; those that begin with the name and the labels as given.
    pub(crate) async fn metric(&self, node: usize, name: &str) -> Result<f64, BenchError> {
        let agent = &self.agents[node];
        let metrics = agent.get("/metrics").await.ok_or_else(|| format!("{} does not tell its metrics", agent.node))?;
        let values = metrics.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
        Ok(values.filter_map(|(_, value)| value.parse::<f64>().ok()).sum())
    }
}

/// Brings the image to a node as `lighterman pull` does, and gives every word of it to `on_progress`. From asking to the image's record.
pub(crate) async fn pull(
    agent: &Agent,
    image: &Reference,
    mut on_progress: impl FnMut(&PullProgress),
) -> Result<Duration, BenchError> {
    let began = Instant::now();
    let mut pulling = agent.control().pull(image, false).await?;
    loop {
        let progress = pulling.next().await?;
        on_progress(&progress);
        match progress {
            PullProgress::Done { .. } => return Ok(began.elapsed()),
            PullProgress::Failed { message, .. } => {
                return Err(format!("{}: {message}\n{}", agent.node, agent.log_tail()).into());
            }
            _ => {}
        }
    }
}

/// A name for an image that was not used before.
pub(crate) fn name_of(what: &str, seed: u64) -> Result<Reference, BenchError> {
    Ok(format!("reg.test/bench/{what}:{seed}").parse()?)
}

/// The middle, with the extremes.
pub(crate) fn spread(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("median {:.2} of {}, {least:.2} to {most:.2}", median(values.iter().copied()), values.len())
}

fn run(command: &mut Command) -> Result<(), BenchError> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into())
}
