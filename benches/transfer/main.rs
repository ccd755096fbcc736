//! What lighterman costs beside the things that people would use instead. README.md, one folder up, says how each figure is made.
//!
//! Prints `figure NAME VALUE (what it ran on)` on stdout and tells on stderr what it does. An argument chooses the figures: `fetch`,
//! `image`, `image_memory` or `image_disk`.

mod agents;
mod bare;
mod cpu;
mod daemon;
mod fetch;
mod image;
mod place;
mod report;
mod rig;

use std::process::ExitCode;

use place::Place;
use report::{Failure, note};

type Make = fn() -> Result<(), Failure>;

/// Figures that need the same things. One that fails does not keep the others from being made.
const GROUPS: [(&str, Make); 3] = [
    ("fetch", fetch::run),
    ("image_memory", || image::run(Place::memory()?, "")),
    ("image_disk", || image::run(Place::disk()?, "_disk")),
];

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let wanted: Vec<_> = GROUPS.iter().filter(|(name, _)| name.starts_with(&filter)).collect();
    if wanted.is_empty() {
        note(&format!("no figures begin with {filter:?}: there are {}", GROUPS.map(|(name, _)| name).join(", ")));
        return ExitCode::FAILURE;
    }
    match cpu::machine() {
        Ok(machine) => println!("machine: {machine}"),
        Err(error) => note(&format!("what this runs on cannot be told: {error}")),
    }
    let mut failed = false;
    // Before the first thread is started, as a thread's mounts are its own.
    if wanted.iter().any(|(name, _)| name.starts_with("image"))
        && let Err(error) = place::leave_others_mounts()
    {
        note(&error.to_string());
        failed = true;
    }
    for (name, make) in wanted {
        note(&format!("{name}:"));
        if let Err(error) = make() {
            note(&format!("FAILED: {name}: {error}"));
            failed = true;
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
