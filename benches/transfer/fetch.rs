//! A verified fetch of pieces from memory into a discarding sink, beside a bare quinn stream, on
//! loopback.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::try_join_all;
use lighterman::admission::StaticAdmission;
use lighterman::identity::Identity;
use lighterman::metrics::Metrics;
use lighterman::model::{PeerId, PieceRequest};
use lighterman::oci::{HashChain, HashChainBuilder, Hasher, PieceHasher, PieceLayout, PieceVerifier};
use lighterman::ports::{BlobMetadata, Dialer, Fetcher, NoPartialBlobs, PieceError, PieceSink, Pins, StoreError};
use lighterman::testing::MemoryStore;
use lighterman::testing::image::write_blob;
use lighterman::transfer::{Config, Transfer, TransferDependencies};
use parking_lot::{Mutex, MutexGuard};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::bare_quinn;
use crate::cpu;
use crate::loopback::LoopbackNetwork;
use crate::report::{BenchError, figure, mb_s, median, note};
use crate::transfer_cost::TransferCost;

const SIZE: usize = 256 << 20;
const PAIRS: usize = 9;

/// Requests in flight to the peer, and pieces in each request.
const REQUESTS_IN_FLIGHT: usize = 4;
const PIECES_PER_REQUEST: u32 = 8;

/// Measures the figures of a network. `suffix` ends their names.
pub(crate) fn run(network: &LoopbackNetwork, suffix: &str) -> Result<(), BenchError> {
    let mut bytes = vec![0; SIZE];
    SmallRng::seed_from_u64(1).fill_bytes(&mut bytes);
    let blob = Bytes::from(bytes);
    let hashed = hash(&blob)?;

    let (setting, bare) = bare_quinn::fastest(&blob)?;
    let ours = VerifiedFetch::start(&blob)?;
    let (mut fetched, mut streamed) = (Vec::new(), Vec::new());
    ours.run()?;
    bare.run(&blob)?;
    for pair in 1..=PAIRS {
        fetched.push(ours.run()?);
        streamed.push(bare.run(&blob)?);
        let seconds = (fetched[pair - 1].seconds, streamed[pair - 1].seconds);
        note(&format!("pair {pair} of {PAIRS}: {:.3} s, bare {:.3} s", seconds.0, seconds.1));
    }

    let ratio = median(fetched.iter().zip(&streamed).map(|(ours, bare)| bare.seconds / ours.seconds));
    let speed = |runs: &[TransferCost]| median(runs.iter().map(|run| mb_s(SIZE as u64, run.seconds)));
    let (ours_mb_s, bare_mb_s) = (speed(&fetched), speed(&streamed));
    let packets = bare.packets();
    let context =
        format!("{network}, AES-128-GCM, packets of {packets} bytes, one current-thread runtime on each side, 256 MiB");
    let setting_note = format!("bare stream: {setting}");
    figure(
        &format!("fetch_vs_quinn{suffix}"),
        ratio,
        &format!("{context}; {ours_mb_s:.0} MB/s against {bare_mb_s:.0}; {PAIRS} pairs; {setting_note}"),
    );
    figure(&format!("fetch_mb_s{suffix}"), ours_mb_s, &format!("{context}; {}", per_byte(&fetched)));
    figure(&format!("quinn_mb_s{suffix}"), bare_mb_s, &format!("{context}; {}; {setting_note}", per_byte(&streamed)));
    // The slower part sets the pace: the whole bare stream, or its receiver if the receiver hashed
    // too.
    let bare_receiver = median(streamed.iter().map(|run| run.receiver.as_secs_f64() * 1e9 / SIZE as f64));
    let bare_stream = 1e3 / bare_mb_s;
    figure(
        &format!("fetch_vs_quinn_bound{suffix}"),
        (bare_stream / (bare_receiver + 1.0 / hashed)).min(1.0),
        &format!(
            "bound by inline hashing: bare stream {bare_stream:.2} ns per byte; receiver {bare_receiver:.2}, and {:.2} to hash",
            1.0 / hashed
        ),
    );
    Ok(())
}

/// A speed in GB/s that SHA-256 reaches only with the processor's SHA instructions: twice the speed
/// of sha2's software on a machine whose SHA-NI does 1.76.
const SOFTWARE_HASH_GB_S: f64 = 0.8;

/// The speed of SHA-256 alone, in GB/s.
fn hash(blob: &Bytes) -> Result<f64, BenchError> {
    let once = || {
        let began = Instant::now();
        // Chunks have the size of a packet's payload, as the fetcher receives them.
        let mut hasher = Hasher::default();
        blob.chunks(1400).for_each(|chunk| hasher.update(black_box(chunk)));
        black_box(hasher);
        blob.len() as f64 / 1e9 / began.elapsed().as_secs_f64()
    };
    let speed = median((0..5).map(|_| once()));
    let (model, sha_ni) = cpu::model()?;
    let sha_ni = match (sha_ni, speed > SOFTWARE_HASH_GB_S) {
        (true, true) => "SHA-NI is present and used",
        (true, false) => "SHA-NI is present, but the hash is as slow as without",
        (false, _) => "no SHA-NI",
    };
    figure("sha256_gb_s", speed, &format!("one core, in chunks of 1400 bytes; {model}, {sha_ni}"));
    Ok(speed)
}

/// Processor time per byte.
fn per_byte(runs: &[TransferCost]) -> String {
    let nanoseconds =
        |time: fn(&TransferCost) -> Duration| median(runs.iter().map(|run| time(run).as_nanos() as f64 / SIZE as f64));
    let (both, receiver) = (nanoseconds(|run| run.both), nanoseconds(|run| run.receiver));
    format!("CPU {both:.2} ns per byte, {receiver:.2} of the receiver")
}

/// A transfer that serves on another thread, and a transfer that fetches on this thread.
struct VerifiedFetch {
    runtime: Runtime,
    fetcher: Transfer,
    peer: PeerId,
    chain: Arc<HashChain>,
    stop: CancellationToken,
    serving: Option<JoinHandle<()>>,
}

impl VerifiedFetch {
    fn start(blob: &Bytes) -> Result<Self, BenchError> {
        let stop = CancellationToken::new();
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (server, client) = (Identity::generate(), Identity::generate());
        let (peer, me) = (server.peer_id(), client.peer_id());
        let store = runtime.block_on(store_with(blob))?;
        let serving_runtime = Builder::new_current_thread().enable_all().build()?;
        let served = {
            let _inside = serving_runtime.enter();
            bind(&server, me, store)?
        };
        let address = served.local_addr();
        let stopped = stop.clone();
        let serving = Some(thread::spawn(move || serving_runtime.block_on(served.run(stopped))));
        let fetcher = {
            let _inside = runtime.enter();
            bind(&client, peer, MemoryStore::new())?
        };
        let mut builder = HashChainBuilder::new(PieceLayout::for_size(blob.len() as u64));
        builder.update(blob);
        let chain = Arc::new(builder.finish().ok_or("the blob has another size than the layout")?);
        let ours = Self { runtime, fetcher, peer, chain, stop, serving };
        ours.runtime.block_on(ours.fetcher.dial(address, Some(peer)))?;
        Ok(ours)
    }

    /// Requests pieces as an agent does: several requests in flight, each for a run of pieces that
    /// no other request has.
    fn run(&self) -> Result<TransferCost, BenchError> {
        TransferCost::of(|| {
            let verifier = Mutex::new(PieceVerifier::new(self.chain.clone()));
            let next = AtomicU32::new(0);
            let requests = (0..REQUESTS_IN_FLIGHT).map(|_| self.request_pieces(&verifier, &next));
            self.runtime.block_on(try_join_all(requests))?;
            let proof = verifier.into_inner().proof().ok_or("pieces are missing")?;
            if proof.digest() == self.chain.digest() { Ok(()) } else { Err("the proof is of another blob".into()) }
        })
    }

    /// Sends requests until all pieces are requested.
    async fn request_pieces(&self, verifier: &Mutex<PieceVerifier>, next: &AtomicU32) -> Result<(), BenchError> {
        let layout = self.chain.layout();
        let piece_count = u32::try_from(layout.piece_count())?;
        loop {
            let first = next.fetch_add(PIECES_PER_REQUEST, Ordering::Relaxed);
            if first >= piece_count {
                return Ok(());
            }
            let pieces: Vec<u32> = (first..piece_count.min(first + PIECES_PER_REQUEST)).collect();
            let limit = u8::try_from(pieces.len())?;
            let request = PieceRequest { peer: self.peer, digest: self.chain.digest(), layout, pieces, limit };
            let mut sink = HashingSink { verifier, hasher: None };
            self.fetcher.fetch_pieces(&request, &mut sink).await?;
        }
    }
}

impl Drop for VerifiedFetch {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(serving) = self.serving.take() {
            // The panic message is already printed.
            let _ = serving.join();
        }
    }
}

fn bind(identity: &Identity, other: PeerId, store: MemoryStore) -> Result<Transfer, BenchError> {
    let config = Config {
        listen: "127.0.0.1:0".parse()?,
        // No gossip runs here.
        gossip_port: 1,
        node: "bench".parse()?,
        concurrent_uploads: 16,
    };
    let admission = Arc::new(StaticAdmission::new([other]));
    let admitted_peers = mpsc::channel(4).0;
    let (store, partials) = (Arc::new(store), Arc::new(NoPartialBlobs));
    let dependencies = TransferDependencies { admission, store, partials, metrics: Metrics::new(), admitted_peers };
    Ok(Transfer::bind(config, identity, dependencies)?)
}

async fn store_with(blob: &Bytes) -> Result<MemoryStore, BenchError> {
    let store = MemoryStore::new();
    let pin = store.pin(Duration::from_secs(3600)).await?;
    write_blob(&store, blob.clone(), &BlobMetadata::default(), &pin).await?;
    Ok(store)
}

/// Hashes the bytes and drops them.
struct HashingSink<'a> {
    verifier: &'a Mutex<PieceVerifier>,
    hasher: Option<PieceHasher>,
}

impl HashingSink<'_> {
    fn lock_verifier(&self) -> MutexGuard<'_, PieceVerifier> {
        self.verifier.lock()
    }
}

#[async_trait]
impl PieceSink for HashingSink<'_> {
    fn begin(&mut self, piece: u32) {
        let hasher = self.lock_verifier().hash_chain().hasher(piece as usize);
        self.hasher = Some(hasher);
    }

    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        let hasher = self.hasher.as_mut().ok_or_else(|| StoreError::Other("no piece has begun".into()))?;
        chunks.iter().for_each(|chunk| hasher.update(chunk));
        Ok(())
    }

    async fn end(&mut self) -> Result<(), PieceError> {
        let hasher = self.hasher.take().ok_or(PieceError::Mismatch)?;
        if self.lock_verifier().record(hasher) { Ok(()) } else { Err(PieceError::Mismatch) }
    }
}
