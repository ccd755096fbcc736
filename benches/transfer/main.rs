//! Costs of lighterman beside those of the alternatives. README.md, one folder up, describes how
//! each figure is made.
//!
//! Prints `figure NAME VALUE (CONDITIONS)` on stdout and progress on stderr. Arguments select
//! groups of figures by prefix. `-NAME` leaves a group out.

mod agents;
mod api_writes;
mod bare_quinn;
mod cpu;
mod daemon;
mod faults;
mod fetch;
#[path = "../../tests/fleet/mod.rs"]
mod fleet;
mod image;
mod image_bench;
mod large;
mod links;
mod loopback;
mod missing_layer;
mod nodes;
mod quinn_setting;
mod report;
mod storage;
mod swarm;
mod transfer_cost;
mod unpack;

use std::process::ExitCode;

use loopback::{ETHERNET, JUMBO, LoopbackNetwork};
use report::{BenchError, note};
use storage::Storage;

type Benchmark = fn() -> Result<(), BenchError>;

/// Groups of figures with the same preparation. The failure of a group does not prevent the others.
const GROUPS: [(&str, Benchmark); 15] = [
    ("fetch", || within(ETHERNET, |network| fetch::run(network, ""))),
    ("fetch_jumbo", || within(JUMBO, |network| fetch::run(network, "_jumbo"))),
    ("links_loopback", || within(ETHERNET, |_| links::loopback())),
    ("links_controllers", links::controllers),
    ("links_far", links::far),
    ("image_memory", || within(ETHERNET, |network| image::run(Storage::memory(image_bench::NEEDED)?, network, ""))),
    ("image_memory_jumbo", || {
        within(JUMBO, |network| image::run(Storage::memory(image_bench::NEEDED)?, network, "_jumbo"))
    }),
    ("image_disk", || within(ETHERNET, |network| image::run(Storage::disk(image_bench::NEEDED)?, network, "_disk"))),
    ("unpack", || within(ETHERNET, unpack::run)),
    ("missing", missing_layer::run),
    ("killed", faults::killed),
    ("liar", faults::liar),
    ("swarm", swarm::run),
    ("writes", api_writes::run),
    ("large", large::run),
];

/// Runs `make` in a network namespace whose loopback has this MTU.
fn within(bytes: u32, benchmark: impl FnOnce(&LoopbackNetwork) -> Result<(), BenchError>) -> Result<(), BenchError> {
    benchmark(&LoopbackNetwork::with_mtu(bytes)?)
}

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let arguments: Vec<_> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let (excluded, chosen): (Vec<_>, Vec<_>) = arguments.iter().partition(|argument| argument.starts_with('-'));
    let is_wanted = |name: &str| {
        let is_chosen = chosen.is_empty() || chosen.iter().any(|prefix| name.starts_with(prefix.as_str()));
        is_chosen && !excluded.iter().any(|argument| argument.trim_start_matches('-') == name)
    };
    let wanted: Vec<_> = GROUPS.iter().filter(|(name, _)| is_wanted(name)).collect();
    if wanted.is_empty() {
        note(&format!("the arguments select no group; the groups are {}", GROUPS.map(|(name, _)| name).join(", ")));
        return ExitCode::FAILURE;
    }
    match cpu::machine() {
        Ok(machine) => println!("machine: {machine}"),
        Err(error) => note(&format!("the machine's description is not available: {error}")),
    }
    let mut failed = false;
    // Runs before the first thread starts: later threads inherit the mount namespace.
    if wanted.iter().any(|(name, _)| !name.starts_with("fetch") && !name.starts_with("links"))
        && let Err(error) = storage::unshare_mounts()
    {
        note(&error.to_string());
        failed = true;
    }
    for (name, benchmark) in wanted {
        note(&format!("{name}:"));
        if let Err(error) = benchmark() {
            note(&format!("FAILED: {name}: {error}"));
            failed = true;
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
