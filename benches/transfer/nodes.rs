//! Nodes in a network of their own: real agents, each in a process, on links that can be shaped.
//! Each agent has a containerd of its own, so that content moves only through the agents. The API
//! server is real, and there are no kubelets.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use lighterman::control::PullProgress;
use lighterman::oci::Reference;
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

/// Deadline for a state that all agents must reach before a measurement.
const WAIT_DEADLINE: Duration = Duration::from_secs(120);

/// Deadline of a group. The longest group takes ten minutes.
const DEADLINE: Duration = Duration::from_secs(3600);

/// Interval between checks.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Time after which the effects of a start or a change are over. Announcements are batched for a
/// second, and agents compare summaries every ten seconds.
pub(crate) const SETTLE: Duration = Duration::from_secs(3);

/// The nodes. Fields are dropped in this order, so that no process uses the folders when they are
/// removed.
pub(crate) struct Nodes {
    pub(crate) agents: Vec<Agent>,
    pub(crate) containerds: Vec<Containerd>,
    pub(crate) kubernetes: Kubernetes,
    pub(crate) network: AgentNetwork,
    _storage: Storage,
}

/// Starts this number of nodes and runs `body`, on a thread inside the nodes' network namespace.
pub(crate) fn with_nodes<Body>(storage: Storage, nodes: usize, body: Body) -> Result<(), BenchError>
where
    Body: AsyncFnOnce(&mut Nodes) -> Result<(), BenchError> + Send + 'static,
{
    let work = move || {
        let network = AgentNetwork::new(nodes);
        network.enter_switch();
        let runtime = Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut nodes = Nodes::start(network, storage, nodes).await?;
            timeout(DEADLINE, body(&mut nodes)).await.map_err(|_| "the group exceeded its deadline")?
        })
    };
    // The panic message is already printed.
    thread::spawn(work).join().map_err(|_| "the thread of the nodes panicked")?
}

impl Nodes {
    /// Starts all agents. The calling thread must be in the switch's network namespace.
    async fn start(network: AgentNetwork, storage: Storage, nodes: usize) -> Result<Self, BenchError> {
        let kubernetes = Kubernetes::with_own_server(SWITCH).await;
        grant_rbac(&kubernetes, "").await;
        let mut started = Self { agents: Vec::new(), containerds: Vec::new(), kubernetes, network, _storage: storage };
        // No other program uses this storage.
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

    /// Waits until all agents are ready. A starting agent aborts ingests that look like its own, so
    /// no content may be written before.
    pub(crate) async fn wait_ready(&self) -> Result<(), BenchError> {
        let began = Instant::now();
        for agent in &self.agents {
            while agent.get("/readyz").await.is_none() {
                if began.elapsed() > WAIT_DEADLINE {
                    return Err(format!("{} does not become ready:\n{}", agent.node, agent.log_tail()).into());
                }
                sleep(POLL_INTERVAL).await;
            }
        }
        sleep(SETTLE).await;
        Ok(())
    }

    /// Limits every link in each direction to this rate, Ethernet headers included. The queue holds
    /// at most 40 ms, a megabyte at 200 Mbit/s, as a switch's port may have. Segments travel
    /// together, as on a machine whose network card splits them, and each counts with its headers.
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

    /// Sets the MTU of the links. A new connection discovers the MTU at once, an open connection
    /// after some minutes.
    pub(crate) fn set_mtu(&self, bytes: u32) -> Result<(), BenchError> {
        let mtu = bytes.to_string();
        let words = |link: &str| ["link", "set", link, "mtu", &mtu].map(str::to_owned);
        for node in 0..self.agents.len() {
            run(Command::new("ip").args(words(&format!("mesh-{node}"))))?;
            run(self.network.command(node, Path::new("ip")).args(words("mesh")))?;
        }
        run(Command::new("ip").args(words("mesh")))
    }

    /// Makes an image in a node's containerd. The same seed gives the same layers.
    pub(crate) async fn put_image_on(
        &self,
        node: usize,
        image: &Reference,
        layers: &[u64],
        seed: u64,
    ) -> Result<MadeImage, BenchError> {
        Ok(put_image(&self.agents[node].store, &[image.to_string()], layers, seed).await?)
    }

    /// Waits until these nodes find the image at these providers, and for [`SETTLE`] after that.
    pub(crate) async fn wait_providers(
        &self,
        image: &Reference,
        fetchers: impl IntoIterator<Item = usize>,
        providers: &[usize],
    ) -> Result<(), BenchError> {
        let began = Instant::now();
        for fetcher in fetchers {
            for provider in providers {
                let (fetcher, provider) = (&self.agents[fetcher], &self.agents[*provider].node);
                while !fetcher.would_fetch_from(image, provider).await {
                    if began.elapsed() > WAIT_DEADLINE {
                        let (node, log) = (&fetcher.node, fetcher.log_tail());
                        return Err(format!("{node} does not find {image} on {provider}:\n{log}").into());
                    }
                    sleep(POLL_INTERVAL).await;
                }
            }
        }
        sleep(SETTLE).await;
        Ok(())
    }

    /// Checks by containerd that the image is complete on these nodes.
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

    /// A metric of a node's agent: the sum of all series whose name and labels begin with `name`.
    pub(crate) async fn metric(&self, node: usize, name: &str) -> Result<f64, BenchError> {
        let agent = &self.agents[node];
        let metrics = agent.get("/metrics").await.ok_or_else(|| format!("{} does not serve metrics", agent.node))?;
        let values = metrics.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
        Ok(values.filter_map(|(_, value)| value.parse::<f64>().ok()).sum())
    }
}

/// Recovers the image on a node as `lighterman pull` does, and calls `on_progress` with each
/// message. Returns the time from the request to the image record.
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

/// A name for a new image.
pub(crate) fn name_of(what: &str, seed: u64) -> Result<Reference, BenchError> {
    Ok(format!("reg.test/bench/{what}:{seed}").parse()?)
}

/// The median, with the extremes.
pub(crate) fn spread(values: &[f64]) -> String {
    let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("median {:.2} of {}, {lowest:.2} to {highest:.2}", median(values.iter().copied()), values.len())
}

fn run(command: &mut Command) -> Result<(), BenchError> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into())
}
