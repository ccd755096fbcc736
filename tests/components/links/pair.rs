//! Two network namespaces of one test with a link between them, and an agent's transfer in each.

use std::fs::File;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc as threads;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytes::Bytes;
use lighterman::admission::StaticAdmission;
use lighterman::decide::policy::Policy;
use lighterman::identity::Identity;
use lighterman::metrics::Metrics;
use lighterman::model::PeerId;
use lighterman::ports::{BlobMetadata, Dialer, NoPartialBlobs, Pins};
use lighterman::testing::MemoryStore;
use lighterman::testing::image::write_blob;
use lighterman::transfer::{Config, Transfer, TransferDependencies};
use nix::sched::{CloneFlags, setns};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Addresses of the provider and the fetcher. The namespaces have no route to other networks.
pub(crate) const ADDRESSES: [&str; 2] = ["10.99.0.1", "10.99.0.2"];

/// Drop removes both namespaces.
pub(crate) struct VethLink([String; 2]);

impl VethLink {
    /// Makes a link with this rate from the provider to the fetcher. The way back carries only
    /// acknowledgments and has no limit. The queue before the link holds a tenth of a second, as a
    /// router's would.
    pub(crate) fn of(rate: &str) -> Self {
        static LINKS: AtomicU32 = AtomicU32::new(0);
        let number = LINKS.fetch_add(1, Ordering::Relaxed);
        let link = Self(["a", "b"].map(|end| format!("lighterman-{}-{number}-{end}", std::process::id())));
        let [provider, fetcher] = &link.0;
        run(&["ip", "netns", "add", provider]);
        run(&["ip", "netns", "add", fetcher]);
        run(&["ip", "-n", provider, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", fetcher]);
        for (end, address) in link.0.iter().zip(ADDRESSES) {
            run(&["ip", "-n", end, "address", "add", &format!("{address}/24"), "dev", "wire"]);
            run(&["ip", "-n", end, "link", "set", "wire", "up"]);
        }
        let shape = ["qdisc", "add", "dev", "wire", "root", "tbf", "rate", rate, "burst", "64kb", "latency", "100ms"];
        run(&[&["ip", "netns", "exec", provider, "tc"], &shape[..]].concat());
        link
    }

    /// Makes a firewall at both ends drop every incoming UDP packet, or removes the firewall's
    /// rule.
    pub(crate) fn block_udp(&self, is_blocked: bool) {
        for end in &self.0 {
            let operation = if is_blocked { "-I" } else { "-D" };
            run(&["ip", "netns", "exec", end, "iptables", "-w", operation, "INPUT", "-p", "udp", "-j", "DROP"]);
        }
    }

    /// Drops every packet from the provider to the fetcher, without an error at either end.
    pub(crate) fn blackhole(&self) {
        run(&["ip", "netns", "exec", &self.0[0], "tc", "qdisc", "replace", "dev", "wire", "root", "blackhole"]);
    }

    /// Moves this thread into one end. Its later threads and processes start there.
    pub(crate) fn enter(&self, end: usize) {
        let namespace = File::open(format!("/var/run/netns/{}", self.0[end])).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
    }
}

impl Drop for VethLink {
    fn drop(&mut self) {
        for end in &self.0 {
            // The removal fails for a namespace that was never created.
            let _ = Command::new("ip").args(["netns", "del", end]).output();
        }
    }
}

fn run(words: &[&str]) {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{words:?} (are you root?): {}", String::from_utf8_lossy(&output.stderr));
}

/// Bytes per second; 0 is no limit.
#[derive(Clone, Copy, Default)]
pub(crate) struct Rates {
    pub(crate) fetcher_down: u64,
    pub(crate) provider_up: u64,
}

/// A provider that serves from memory, in a thread of its own.
pub(crate) struct Provider {
    pub(crate) peer: PeerId,
    pub(crate) address: SocketAddr,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Provider {
    fn start(link: &Arc<VethLink>, identity: Identity, admitted: PeerId, blobs: &[Bytes], up: u64) -> Self {
        let (link, blobs, stop) = (Arc::clone(link), blobs.to_vec(), CancellationToken::new());
        let (address_sender, address_receiver) = threads::channel();
        let (peer, stopped) = (identity.peer_id(), stop.clone());
        let thread = thread::spawn(move || {
            link.enter(0);
            let runtime = runtime();
            runtime.block_on(async {
                let store = store_with(&blobs).await;
                let transfer = bind(0, &identity, admitted, store, policy(0, up));
                address_sender.send(transfer.local_addr()).unwrap();
                transfer.run(stopped).await;
            });
        });
        Self { peer, address: address_receiver.recv().unwrap(), stop, thread: Some(thread) }
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.stop.cancel();
        // The panic hook has printed a panic already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Runs `test` at the fetcher's end of a link, with a provider of these blobs at the other end.
pub(crate) fn run_over_link<T: Send + 'static>(
    rate: &str,
    rates: Rates,
    blobs: &[Bytes],
    test: impl AsyncFnOnce(&Transfer, &Provider, &VethLink) -> T + Send + 'static,
) -> T {
    let link = Arc::new(VethLink::of(rate));
    let (provider_key, fetcher_key) = (Identity::generate(), Identity::generate());
    let provider = Provider::start(&link, provider_key, fetcher_key.peer_id(), blobs, rates.provider_up);
    let fetching = thread::spawn(move || {
        link.enter(1);
        let runtime = runtime();
        runtime.block_on(async {
            let transfer = bind(1, &fetcher_key, provider.peer, MemoryStore::new(), policy(rates.fetcher_down, 0));
            transfer.dial(provider.address, Some(provider.peer)).await.unwrap();
            let test = test(&transfer, &provider, &link);
            tokio::time::timeout(Duration::from_secs(180), test).await.expect("the test ends within its deadline")
        })
    });
    fetching.join().unwrap()
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn bind(end: usize, identity: &Identity, admitted: PeerId, store: MemoryStore, policy: Arc<Policy>) -> Transfer {
    let config = Config {
        listen: SocketAddr::new(ADDRESSES[end].parse().unwrap(), 0),
        // This test runs no gossip.
        gossip_port: 1,
        node: "node-a".parse().unwrap(),
        concurrent_uploads: 16,
    };
    let (admission, admitted_peers) = (Arc::new(StaticAdmission::new([admitted])), mpsc::channel(4).0);
    let policy_receiver = watch::channel(policy).1;
    let (store, partials) = (Arc::new(store), Arc::new(NoPartialBlobs));
    let dependencies = TransferDependencies { admission, store, partials, metrics: Metrics::new(), admitted_peers };
    Transfer::bind_with_policy(config, identity, dependencies, policy_receiver).unwrap()
}

fn policy(max_download_rate: u64, max_upload_rate: u64) -> Arc<Policy> {
    let mut limits = Policy::default();
    limits.budgets.max_download_rate = max_download_rate;
    limits.budgets.max_upload_rate = max_upload_rate;
    Arc::new(limits)
}

async fn store_with(blobs: &[Bytes]) -> MemoryStore {
    let store = MemoryStore::new();
    let pin = store.pin(Duration::from_secs(3600)).await.unwrap();
    for blob in blobs {
        write_blob(&store, blob.clone(), &BlobMetadata::default(), &pin).await.unwrap();
    }
    store
}
