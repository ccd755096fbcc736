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
pub(crate) fn run(storage: Storage, network: &LoopbackNetwork, suffix: &str) -> Result<(), BenchError> {
    let setup = ImageBench::start(storage)?;
    // The first run of each method opens connections and fills caches, and does not count.
    let mut costs: [Vec<Cost>; METHODS.len()] = array::from_fn(|_| Vec::new());
    for round in 0..=ROUNDS {
        for (method, costs) in METHODS.into_iter().zip(&mut costs) {
            let cost = setup.run(method)?;
            note(&format!("round {round} of {ROUNDS}: {method:?}: {:.2} s", cost.seconds));
            if round > 0 {
                costs.push(cost);
            }
        }
    }
    let bytes = setup.image.bytes();
    let context = format!(
        "{}, {}, 1 GiB in {} layers, {network}, AES-128-GCM, {} blobs at once, a multi-thread runtime on each side, {ROUNDS} rounds",
        setup.storage,
        setup.versions()?,
        LAYERS.len(),
        Policy::default().budgets.concurrent_blobs
    );
    let [ours, export_import, registry_fetch, api_only, unpack] = &costs;
    let report_ratio = |name: &str, method: TransferMethod, baseline: &[Cost]| {
        let ratio = median(baseline.iter().zip(ours).map(|(baseline, ours)| baseline.seconds / ours.seconds));
        let (ours, baseline) = (describe(bytes, ours), describe(bytes, baseline));
        let command = method.command().unwrap_or_default();
        figure(&format!("{name}{suffix}"), ratio, &format!("{context}; ours {ours}; baseline {baseline}: {command}"));
    };
    report_ratio("image_vs_export_import", TransferMethod::ExportImport, export_import);
    report_ratio("image_vs_export_import_unpack", TransferMethod::ExportImportUnpack, unpack);
    report_ratio("image_vs_registry_fetch", TransferMethod::RegistryFetch, registry_fetch);
    for (name, what, costs) in [
        ("image_ours_mb_s", "from the source's files into the destination's content folder", ours),
        ("image_ours_api_only_mb_s", "through the content API at both ends", api_only),
    ] {
        figure(
            &format!("{name}{suffix}"),
            speed(bytes, costs),
            &format!("{context}; {what}; {}", describe(bytes, costs)),
        );
    }
    Ok(())
}

fn speed(bytes: u64, costs: &[Cost]) -> f64 {
    median(costs.iter().map(|cost| mb_s(bytes, cost.seconds)))
}

/// Time, speed, and processor time by program.
fn describe(bytes: u64, costs: &[Cost]) -> String {
    let seconds = median(costs.iter().map(|cost| cost.seconds));
    let processes = ["this process", "commands", "containerd A", "containerd B", "registry"];
    let spent = processes.iter().enumerate().map(|(process, name)| {
        let seconds = median(costs.iter().map(|cost| cost.cpu[process].as_secs_f64()));
        (seconds, format!("{name} {seconds:.1}"))
    });
    let spent: Vec<_> = spent.filter(|(seconds, _)| *seconds >= 0.05).map(|(_, text)| text).collect();
    format!("{seconds:.2} s, {:.0} MB/s, CPU seconds: {}", speed(bytes, costs), spent.join(", "))
}
