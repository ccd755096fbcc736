//! Time from the image record to a usable image, with and without unpacking during the recovery.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use lighterman::containerd::ContainerdStore;
use lighterman::oci::{Digest, Reference};
use lighterman::testing::image::{MadeImage, put_gzip_layers};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tokio::runtime::Builder;

use crate::agents::{AgentPair, ContentAccess, UnpackMode};
use crate::daemon::Containerd;
use crate::loopback::LoopbackNetwork;
use crate::report::{BenchError, figure, median, note};
use crate::storage::Storage;

const ROUNDS: usize = 3;

/// Unpacked sizes of the layers: 640 MiB, as unequal as layers usually are.
const LAYERS: [usize; 5] = [64 << 20, 320 << 20, 128 << 20, 96 << 20, 32 << 20];

/// Size of each file in a layer: between the files of a distribution and those of a model.
const FILE: usize = 256 << 10;

/// The image in two containerds, unpacked in one of them, and a blob that is being written.
const NEEDED: u64 = 4 << 30;

const MODES: [(UnpackMode, &str); 2] = [(UnpackMode::DuringRecovery, "_early"), (UnpackMode::AfterRecovery, "")];

/// Times of a single recovery, in seconds.
struct UnpackTimes {
    /// From the decision to recover to the image record.
    to_record: f64,
    /// From the image record to a completely unpacked image.
    to_usable: f64,
}

pub(crate) fn run(network: &LoopbackNetwork) -> Result<(), BenchError> {
    let storage = Storage::disk(NEEDED)?;
    let source = Containerd::start(storage.path().join("a"))?;
    let destination = Containerd::start_with_cri(storage.path().join("b"))?;
    let reference: Reference = "bench.test/unpack:1".parse()?;
    note("making the image");
    let packed = LAYERS.iter().enumerate().map(|(number, size)| layer(number, *size)).collect::<Result<Vec<_>, _>>()?;
    let image = Builder::new_current_thread().enable_all().build()?.block_on(async {
        let store = ContainerdStore::new(source.config())?;
        Ok::<_, BenchError>(put_gzip_layers(&store, &reference.to_string(), packed).await?)
    })?;
    let agents =
        MODES.map(|(unpack_mode, _)| AgentPair::start(&source, &destination, ContentAccess::Files, unpack_mode));
    let [early, later] = agents;
    let agents = [early?, later?];
    let mut took: [Vec<UnpackTimes>; MODES.len()] = Default::default();
    // The first run of each mode opens connections and fills caches, and does not count.
    for round in 0..=ROUNDS {
        for ((agents, (_, name)), took) in agents.iter().zip(MODES).zip(&mut took) {
            storage.settle()?;
            let once = recover(agents, &destination, &reference, &image)?;
            note(&format!("round {round} of {ROUNDS}{name}: {:.2} s and {:.2} s", once.to_record, once.to_usable));
            if round > 0 {
                took.push(once);
            }
        }
    }
    let (packed, unpacked) = (image.bytes() >> 20, LAYERS.iter().sum::<usize>() >> 20);
    let context = format!(
        "{storage}, {}, {packed} MiB of gzip in {} layers, {unpacked} MiB unpacked, overlayfs, {network}, {ROUNDS} rounds",
        destination.version()?,
        LAYERS.len(),
    );
    for ((_, name), took) in MODES.iter().zip(&took) {
        figure(&format!("import_to_usable_s{name}"), median(took.iter().map(|took| took.to_usable)), &context);
        let total = median(took.iter().map(|took| took.to_record + took.to_usable));
        figure(&format!("recover_to_usable_s{name}"), total, &context);
    }
    Ok(())
}

/// The baseline unpacks by `ctr`, which uses the same services as CRI. Layers that are unpacked
/// already stay as they are.
fn recover(
    agents: &AgentPair,
    destination: &Containerd,
    reference: &Reference,
    image: &MadeImage,
) -> Result<UnpackTimes, BenchError> {
    let began = Instant::now();
    agents.recover(reference)?;
    let to_record = began.elapsed().as_secs_f64();
    destination.ctr(&["snapshots", "unpack", &image.target.digest.to_string()])?;
    let to_usable = began.elapsed().as_secs_f64() - to_record;
    destination.check(reference, image)?;
    let top = image.layers.last().ok_or("an image without layers")?.chain_id.to_string();
    if !destination.ctr(&["snapshots", "ls"])?.contains(&top) {
        return Err(format!("{top} is not unpacked").into());
    }
    destination.empty()?;
    match destination.ctr(&["snapshots", "ls"])?.contains("sha256:") {
        true => Err("snapshots are left after the removal of the image".into()),
        false => Ok(UnpackTimes { to_record, to_usable }),
    }
}

/// A layer of files with hexadecimal digits. gzip leaves somewhat more than half of them, as of
/// programs.
fn layer(number: usize, size: usize) -> Result<(bytes::Bytes, Digest), BenchError> {
    let mut random = SmallRng::seed_from_u64(number as u64);
    let mut archive = tar::Builder::new(Vec::with_capacity(size + size / 64));
    let mut half = vec![0; FILE / 2];
    for file in 0..size / FILE {
        random.fill_bytes(&mut half);
        let content: Vec<u8> = half
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .map(|digit| b"0123456789abcdef"[usize::from(digit)])
            .collect();
        let mut header = tar::Header::new_ustar();
        header.set_size(FILE as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, format!("{number}/{}/{file}", file % 32), content.as_slice())?;
    }
    let archive = archive.into_inner()?;
    let diff_id = Digest::of(&archive);
    let mut gzip = Command::new("gzip").args(["-1", "-n"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = gzip.stdin.take().ok_or("no pipe to gzip")?;
    let writing = std::thread::spawn(move || input.write_all(&archive));
    let output = gzip.wait_with_output()?;
    writing.join().map_err(|_| "the thread that feeds gzip panicked")??;
    if output.status.success() { Ok((output.stdout.into(), diff_id)) } else { Err("gzip failed".into()) }
}
