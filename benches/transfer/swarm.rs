//! All nodes but one fetch an image from that node at the same time.

use std::time::{Duration, Instant};

use futures::future::try_join_all;

use crate::cpu::Ticks;
use crate::loopback::JUMBO;
use crate::nodes::{Nodes, name_of, pull, spread, with_nodes};
use crate::report::{BenchError, figure, median, note};
use crate::storage::Storage;

const NODES: usize = 8;

/// Rate of every link, in each direction.
const MBIT_S: u32 = 200;

/// A lower rate, for machines where two processors are too few for eight agents at [`MBIT_S`].
const SLOWER_MBIT_S: u32 = 75;

/// Space for the image on every node, twice, and for the containerds.
const NEEDED: u64 = 6 << 30;

const RUNS: u64 = 3;

/// With less idle time, the processors limit the transfer, and the figure would be of the machine.
const LEAST_IDLE: f64 = 0.2;

/// Time after which agents have closed their unused connections.
const IDLE_TIMEOUT: Duration = Duration::from_secs(40);

struct SwarmRun {
    /// Time of the slowest node, in units of size / bandwidth.
    worst: f64,
    median: f64,
    idle: f64,
    /// Copies of the image that the seed's link carried, headers included.
    copies: f64,
}

pub(crate) fn run() -> Result<(), BenchError> {
    with_nodes(Storage::memory(NEEDED)?, NODES, async |nodes| {
        nodes.limit_rate(MBIT_S)?;
        let one = measure(nodes, "swarm8_worst_sb", MBIT_S, &[256 << 20], "one layer of 256 MiB").await;
        let eight = measure(nodes, "swarm8_worst_sb_8_layers", MBIT_S, &[32 << 20; 8], "8 layers of 32 MiB").await;
        nodes.limit_rate(SLOWER_MBIT_S)?;
        let slower = "one layer of 256 MiB, slower links";
        let slower = measure(nodes, "swarm8_worst_sb_75mbit", SLOWER_MBIT_S, &[256 << 20], slower).await;
        nodes.limit_rate(MBIT_S)?;
        // An unused connection is closed after half a minute. The next dial uses the new MTU.
        nodes.set_mtu(JUMBO)?;
        tokio::time::sleep(IDLE_TIMEOUT).await;
        let jumbo = "one layer of 256 MiB, frames of 9000 bytes";
        let jumbo = measure(nodes, "swarm8_worst_sb_jumbo", MBIT_S, &[256 << 20], jumbo).await;
        [one, eight, slower, jumbo].into_iter().collect()
    })
}

async fn measure(nodes: &Nodes, name: &str, mbit_s: u32, layers: &[u64], what: &str) -> Result<(), BenchError> {
    let mut runs = Vec::new();
    // The first run warms up.
    for seed in 0..=RUNS {
        let run = recover_everywhere(nodes, mbit_s, layers, 100 * layers.len() as u64 + seed).await?;
        let SwarmRun { worst, median, idle, copies } = run;
        let idle = 100.0 * idle;
        note(&format!(
            "{what}: worst {worst:.3}, median {median:.3}, idle {idle:.0} %, the seed sent {copies:.2} copies"
        ));
        runs.extend((seed > 0).then_some(run));
    }
    let worst: Vec<_> = runs.iter().map(|run| run.worst).collect();
    let idle = runs.iter().map(|run| run.idle).fold(1.0, f64::min);
    if idle < LEAST_IDLE {
        let (idle, worst) = (100.0 * idle, spread(&worst));
        return Err(format!("{name} is void: only {idle:.0} % of the processors' time was idle ({worst})").into());
    }
    let context = format!(
        "{what}, 1 seed, {} others at once, {mbit_s} Mbit/s each way; {}; the median node {:.2}; the seed's link carried {:.2} copies; at least {:.0} % of the processors' time idle",
        NODES - 1,
        spread(&worst),
        median(runs.iter().map(|run| run.median)),
        median(runs.iter().map(|run| run.copies)),
        100.0 * idle,
    );
    figure(name, median(worst), &context);
    Ok(())
}

async fn recover_everywhere(nodes: &Nodes, mbit_s: u32, layers: &[u64], seed: u64) -> Result<SwarmRun, BenchError> {
    let reference = name_of("swarm", seed)?;
    let image = nodes.put_image_on(0, &reference, layers, seed).await?;
    nodes.wait_providers(&reference, 1..NODES, &[0]).await?;
    let (before, carried) = (Ticks::now()?, nodes.network.link_bytes()[0]);
    let began = Instant::now();
    let pulls = (1..NODES).map(async |node| {
        pull(&nodes.agents[node], &reference, |_| ()).await?;
        Ok::<_, BenchError>(began.elapsed().as_secs_f64())
    });
    let seconds = try_join_all(pulls).await?;
    let idle = Ticks::now()?.idle_since(before);
    let copies = nodes.network.link_bytes()[0].since(carried).sent as f64 / image.bytes() as f64;
    nodes.check(1..NODES, &reference, &image)?;
    nodes.remove_images()?;
    let unit = image.bytes() as f64 * 8.0 / (f64::from(mbit_s) * 1e6);
    let worst = seconds.iter().copied().fold(0.0, f64::max) / unit;
    Ok(SwarmRun { worst, median: median(seconds) / unit, idle, copies })
}
