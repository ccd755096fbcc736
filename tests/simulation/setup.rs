//! The size of simulated clusters, and the output of figures.

use super::mesh::Mesh;

/// Nodes of a small cluster: enough that not all nodes are neighbors of each other.
pub(super) const SMALL: usize = if cfg!(debug_assertions) { 30 } else { 60 };

/// A small converged cluster. `salt` gives each test another cluster.
pub(super) fn small(salt: u64) -> Mesh {
    Mesh::converged(SMALL, 60, 6, seed() + salt)
}

/// The seed of this run, printed. The default is constant, so that a test fails because of a change
/// and not by chance. `LIGHTERMAN_SIM_SEED` sets another seed, to look for faults that the default
/// does not show.
pub(super) fn seed() -> u64 {
    let seed = match std::env::var("LIGHTERMAN_SIM_SEED") {
        Ok(text) => text.parse().expect("LIGHTERMAN_SIM_SEED is a number"),
        Err(_) => 1,
    };
    println!("LIGHTERMAN_SIM_SEED={seed}");
    seed
}

/// Prints a figure. The figure of a small cluster gets a line that `make figures` ignores.
pub(super) fn figure(mesh: &Mesh, name: &str, value: f64, context: &str) {
    let nodes = mesh.nodes.len();
    let text = format!("{value:.2} ({context})");
    if nodes >= 1000 { println!("figure {name} {text}") } else { println!("  {name} with {nodes} nodes: {text}") }
}

pub(super) fn kbit_s(bytes: u64, time: std::time::Duration) -> f64 {
    bytes as f64 * 8.0 / 1000.0 / time.as_secs_f64()
}

pub(super) fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
