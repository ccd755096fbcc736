//! An image of 1 GiB from containerd to containerd on one machine: a recovery, and the commands
//! that users would run instead.

use std::array;

use lighterman::decide::policy::Policy;

use crate::image_bench::{Cost, ImageBench, LAYERS, TransferMethod};
use crate::loopback::LoopbackNetwork;
use crate::report::{BenchError, figure, mb_s, median, note};
use crate::storage::Storage;

const ROUNDS: usize = 3;

const METHODS: [TransferMethod; 5] = [
    TransferMethod::Ours,
    TransferMethod::ExportImport,
    TransferMethod::RegistryFetch,
    TransferMethod::OursApiOnly,
    TransferMethod::ExportImportUnpack,
];

/// Measures all figures of a storage and a network. `suffix` ends their names.
pub(crate) fn run(place: Storage, frames: &LoopbackNetwork, suffix: &str) -> Result<(), BenchError> {
    let rig = ImageBench::start(place)?;
    // The first run of each method opens connections and fills caches, and does not count.
    let mut costs: [Vec<Cost>; METHODS.len()] = array::from_fn(|_| Vec::new());
    for round in 0..=ROUNDS {
        for (way, costs) in METHODS.into_iter().zip(&mut costs) {
            let cost = rig.run(way)?;
            note(&format!("round {round} of {ROUNDS}: {way:?}: {:.2} s", cost.seconds));
            if round > 0 {
                costs.push(cost);
            }
        }
    }
    let bytes = rig.image.bytes();
    let on = format!(
        "{}, {}, 1 GiB in {} layers, {frames}, AES-128-GCM, {} blobs at once, a multi-thread runtime on each side, {ROUNDS} rounds",
        rig.storage,
        rig.versions()?,
        LAYERS.len(),
        Policy::default().budgets.concurrent_blobs
    );
    let [ours, export_import, registry_fetch, api_only, unpack] = &costs;
    let beside = |name: &str, way: TransferMethod, baseline: &[Cost]| {
        let ratio = median(baseline.iter().zip(ours).map(|(baseline, ours)| baseline.seconds / ours.seconds));
        let (ours, baseline) = (describe(bytes, ours), describe(bytes, baseline));
        let command = way.command().unwrap_or_default();
        figure(&format!("{name}{suffix}"), ratio, &format!("{on}; ours {ours}; baseline {baseline}: {command}"));
    };
    beside("image_vs_export_import", TransferMethod::ExportImport, export_import);
    beside("image_vs_export_import_unpack", TransferMethod::ExportImportUnpack, unpack);
    beside("image_vs_registry_fetch", TransferMethod::RegistryFetch, registry_fetch);
    for (name, what, costs) in [
        ("image_ours_mb_s", "from the source's files into the destination's content folder", ours),
        ("image_ours_api_only_mb_s", "through the content API at both ends", api_only),
    ] {
        figure(&format!("{name}{suffix}"), speed(bytes, costs), &format!("{on}; {what}; {}", describe(bytes, costs)));
    }
    Ok(())
}

fn speed(bytes: u64, costs: &[Cost]) -> f64 {
    median(costs.iter().map(|cost| mb_s(bytes, cost.seconds)))
}

/// Time, speed, and processor time by program.
fn describe(bytes: u64, costs: &[Cost]) -> String {
    let seconds = median(costs.iter().map(|cost| cost.seconds));
    let who = ["this process", "commands", "containerd A", "containerd B", "registry"];
    let spent = who.iter().enumerate().map(|(who, name)| {
        let seconds = median(costs.iter().map(|cost| cost.cpu[who].as_secs_f64()));
        (seconds, format!("{name} {seconds:.1}"))
    });
    let spent: Vec<_> = spent.filter(|(seconds, _)| *seconds >= 0.05).map(|(_, text)| text).collect();
    format!("{seconds:.2} s, {:.0} MB/s, CPU seconds: {}", speed(bytes, costs), spent.join(", "))
}
