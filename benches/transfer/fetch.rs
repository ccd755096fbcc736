//! A verified fetch from memory into nothing, beside a bare quinn stream, on loopback.

use std::hint::black_box;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use lighterman::admission::StaticAdmission;
use lighterman::identity::Identity;
use lighterman::metrics::Metrics;
use lighterman::model::PeerId;
use lighterman::oci::{Digest, Hasher};
use lighterman::ports::{BlobSink, ContentStore, Fetcher, Remembered, StoreError};
use lighterman::testing::MemoryStore;
use lighterman::transfer::{Config, Transfer};
use nix::sys::resource::UsageWho;
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::bare;
use crate::cpu;
use crate::report::{Failure, figure, mb_s, median, note};

const SIZE: usize = 256 << 20;
const PAIRS: usize = 9;

/// What moving the blob once took.
pub(crate) struct Run {
    pub(crate) seconds: f64,
    /// Processor time of both sides, and of the receiving one.
    both: Duration,
    receiver: Duration,
}

impl Run {
    /// Runs `work` on this thread, which is the receiver's only one.
    pub(crate) fn of(work: impl FnOnce() -> Result<(), Failure>) -> Result<Self, Failure> {
        let before = (cpu::spent(UsageWho::RUSAGE_SELF)?, cpu::spent(UsageWho::RUSAGE_THREAD)?);
        let began = Instant::now();
        work()?;
        let seconds = began.elapsed().as_secs_f64();
        let both = cpu::spent(UsageWho::RUSAGE_SELF)? - before.0;
        let receiver = cpu::spent(UsageWho::RUSAGE_THREAD)? - before.1;
        Ok(Self { seconds, both, receiver })
    }
}

pub(crate) fn run() -> Result<(), Failure> {
    let mut bytes = vec![0; SIZE];
    SmallRng::seed_from_u64(1).fill_bytes(&mut bytes);
    let blob = Bytes::from(bytes);
    let hashed = hash(&blob)?;

    let (setting, bare) = bare::fastest(&blob)?;
    let ours = Ours::start(&blob)?;
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
    let speed = |runs: &[Run]| median(runs.iter().map(|run| mb_s(SIZE as u64, run.seconds)));
    let (ours_mb_s, bare_mb_s) = (speed(&fetched), speed(&streamed));
    let on = "loopback, AES-128-GCM, MTU 1452, one current-thread runtime a side, 256 MiB";
    let beside = format!("bare stream: {setting}");
    figure(
        "fetch_vs_quinn",
        ratio,
        &format!("{on}; {ours_mb_s:.0} MB/s against {bare_mb_s:.0}; {PAIRS} pairs; {beside}"),
    );
    figure("fetch_mb_s", ours_mb_s, &format!("{on}; {}", per_byte(&fetched)));
    figure("quinn_mb_s", bare_mb_s, &format!("{on}; {}; {beside}", per_byte(&streamed)));
    // Whoever is slower, the bare stream as a whole or its receiver if it hashed too, would set the pace.
    let bare_receiver = median(streamed.iter().map(|run| run.receiver.as_secs_f64() * 1e9 / SIZE as f64));
    let bare_stream = 1e3 / bare_mb_s;
    figure(
        "fetch_vs_quinn_bound",
        (bare_stream / (bare_receiver + 1.0 / hashed)).min(1.0),
        &format!(
            "what inline hashing alone leaves: bare stream {bare_stream:.2} ns a byte; its receiver {bare_receiver:.2}, and {:.2} to hash",
            1.0 / hashed
        ),
    );
    Ok(())
}

/// The hash by itself, GB/s.
fn hash(blob: &Bytes) -> Result<f64, Failure> {
    let once = || {
        let began = Instant::now();
        // In pieces of what a packet brings, as the fetcher gets them.
        let mut hasher = Hasher::default();
        blob.chunks(1400).for_each(|chunk| hasher.update(black_box(chunk)));
        black_box(hasher);
        blob.len() as f64 / 1e9 / began.elapsed().as_secs_f64()
    };
    let speed = median((0..5).map(|_| once()));
    let (model, sha_ni) = cpu::model()?;
    let sha_ni = if sha_ni { "with" } else { "without" };
    figure("sha256_gb_s", speed, &format!("one core, in chunks of 1400 bytes; {model}, {sha_ni} SHA-NI"));
    Ok(speed)
}

/// The processor time that a byte takes.
fn per_byte(runs: &[Run]) -> String {
    let nanoseconds =
        |time: fn(&Run) -> Duration| median(runs.iter().map(|run| time(run).as_nanos() as f64 / SIZE as f64));
    let (both, receiver) = (nanoseconds(|run| run.both), nanoseconds(|run| run.receiver));
    format!("CPU {both:.2} ns a byte, {receiver:.2} of it the receiver's")
}

/// A transfer that serves on a thread of its own, and one that fetches on this thread.
struct Ours {
    runtime: Runtime,
    fetcher: Transfer,
    peer: PeerId,
    digest: Digest,
    stop: CancellationToken,
    serving: Option<JoinHandle<()>>,
}

impl Ours {
    fn start(blob: &Bytes) -> Result<Self, Failure> {
        let stop = CancellationToken::new();
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (server, client) = (Identity::generate(), Identity::generate());
        let (peer, me) = (server.peer_id(), client.peer_id());
        let store = runtime.block_on(holding(blob))?;
        let serving_runtime = Builder::new_current_thread().enable_all().build()?;
        let served = {
            let _inside = serving_runtime.enter();
            bind(&server, me, store)?
        };
        let address = served.local_addr();
        let until = stop.clone();
        let serving = Some(thread::spawn(move || serving_runtime.block_on(served.run(until))));
        let fetcher = {
            let _inside = runtime.enter();
            bind(&client, peer, MemoryStore::new())?
        };
        let digest = Digest::of(blob);
        let ours = Self { runtime, fetcher, peer, digest, stop, serving };
        ours.runtime.block_on(ours.fetcher.greet(address, Some(peer)))?;
        Ok(ours)
    }

    fn run(&self) -> Result<Run, Failure> {
        Run::of(|| {
            let mut sink = Nothing(0);
            let fetching = self.fetcher.fetch(self.peer, self.digest, SIZE as u64, &mut sink);
            self.runtime.block_on(fetching)?;
            if sink.0 == SIZE { Ok(()) } else { Err(format!("the sink got {} bytes", sink.0).into()) }
        })
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(serving) = self.serving.take() {
            // A panic was printed when it happened.
            let _ = serving.join();
        }
    }
}

fn bind(identity: &Identity, other: PeerId, store: MemoryStore) -> Result<Transfer, Failure> {
    let config = Config {
        listen: "127.0.0.1:0".parse()?,
        // Nobody gossips here.
        gossip_port: 1,
        node: "bench".parse()?,
        max_serving: 4,
    };
    let admission = Arc::new(StaticAdmission::new([other]));
    let joined = mpsc::channel(4).0;
    Ok(Transfer::bind(config, identity, admission, Arc::new(store), Metrics::new(), joined)?)
}

async fn holding(blob: &Bytes) -> Result<MemoryStore, Failure> {
    let store = MemoryStore::new();
    let pin = store.pin(Duration::from_secs(3600)).await?;
    let (digest, size) = (Digest::of(blob), blob.len() as u64);
    let mut hasher = Hasher::default();
    hasher.update(blob);
    let mut writer = store.create(digest, size, &pin).await?;
    writer.append(std::slice::from_ref(blob)).await?;
    writer.commit(hasher.verify(digest, size)?, &Remembered::default()).await?;
    Ok(store)
}

/// Counts the bytes and drops them, as the bare stream's receiver does.
struct Nothing(usize);

#[async_trait]
impl BlobSink for Nothing {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        self.0 += chunks.iter().map(Bytes::len).sum::<usize>();
        Ok(())
    }
}
