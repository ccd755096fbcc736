//! Two whole agents in network namespaces with a link between them, and a firewall that drops UDP:
//! small images come over the mesh's TCP connection, and gossip is as fast beside them.

mod node;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lighterman::decide::way::MAX_BLOB;
use lighterman::ports::{PullFailure, PullProgress};
use lighterman::testing::image::put_image;
use tokio::runtime::Builder;

use crate::links::pair::Link;
use node::{Node, Site};

const SMALL: &str = "registry.example/team/small:1";
const LARGE: &str = "registry.example/team/large:1";

/// A test takes two minutes, because a block of UDP is found within a minute.
const DEADLINE: Duration = Duration::from_secs(600);

/// Runs `test` in the first namespace with the two agents, which know each other.
fn between(rate: &str, test: impl AsyncFnOnce(&Link, &Node, &Node) + Send + 'static) {
    let link = Arc::new(Link::of(rate));
    let site = Site::new();
    let provider = Node::start(&link, &site, 0);
    let running = thread::spawn(move || {
        let fetcher = Node::start(&link, &site, 1);
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let whole = async {
            fetcher.knows(provider.peer).await;
            provider.knows(fetcher.peer).await;
            test(&link, &provider, &fetcher).await;
        };
        runtime.block_on(async { tokio::time::timeout(DEADLINE, whole).await.expect("the test is stuck") });
    });
    running.join().unwrap();
}

#[test]
fn a_small_image_comes_over_tcp_while_udp_is_blocked_and_a_large_one_when_it_is_open() {
    between("1gbit", async |link, provider, fetcher| {
        let small = put_image(&*provider.store, &[SMALL.into()], &[9 << 20, 300, 0], 7).await.unwrap();
        put_image(&*provider.store, &[LARGE.into()], &[MAX_BLOB + 1, 300], 8).await.unwrap();
        link.block_udp(true);
        fetcher.until_udp_is_blocked(true).await;
        let began = Instant::now();
        let came = fetcher.pull(SMALL).await;
        let PullProgress::Done { bytes, from, .. } = &came else { panic!("{came:?}") };
        assert_eq!((*bytes, from.as_slice()), (small.bytes(), [provider.name.clone()].as_slice()));
        assert_eq!(fetcher.counted("lighterman_fetched_over_tcp_bytes_total"), small.bytes());
        assert_eq!(provider.counted("lighterman_served_bytes_total"), small.bytes());
        let mbit = small.bytes() as f64 * 8e-6 / began.elapsed().as_secs_f64();
        println!("\nfigure image_over_tcp_mbit_s {mbit:.0} (9 MiB, link 1 Gbit/s, debug build)");

        let refused = fetcher.pull(LARGE).await;
        let PullProgress::Failed { kind, message, retryable: true } = refused else { panic!("{refused:?}") };
        assert_eq!(kind, PullFailure::FetchFailed);
        assert!(message.contains("UDP") && message.contains(&MAX_BLOB.to_string()), "{message}");
        let over_tcp = fetcher.counted("lighterman_fetched_over_tcp_bytes_total");
        assert!(over_tcp < small.bytes() + 1000, "no more than its manifest came: {over_tcp}");

        link.block_udp(false);
        fetcher.until_udp_is_blocked(false).await;
        let came = fetcher.pull(LARGE).await;
        assert!(matches!(came, PullProgress::Done { .. }), "{came:?}");
        assert_eq!(fetcher.counted("lighterman_fetched_over_tcp_bytes_total"), over_tcp, "QUIC brought it");
    });
}

/// Seconds until the fetcher knows of a small image that is put into the provider's store.
async fn latency(provider: &Node, fetcher: &Node, number: usize) -> f64 {
    let name = format!("registry.example/told/{number}:1");
    let began = Instant::now();
    let told = put_image(&*provider.store, &[name], &[100], number as u64).await.unwrap();
    fetcher.knows_of(told.root.digest, provider.peer).await;
    began.elapsed().as_secs_f64()
}

#[test]
fn gossip_passes_beside_ranges_on_a_slow_link() {
    between("20mbit", async |link, provider, fetcher| {
        link.block_udp(true);
        fetcher.until_udp_is_blocked(true).await;
        let mut idle = Vec::new();
        for number in 0..10 {
            idle.push(latency(provider, fetcher, number).await);
        }
        put_image(&*provider.store, &[SMALL.into()], &[30 << 20], 7).await.unwrap();
        let mut beside = Vec::new();
        let began = Instant::now();
        let (pulled, lost) = (fetcher.pull(SMALL), fetcher.loses(provider.peer));
        tokio::pin!(pulled, lost);
        let came = loop {
            tokio::select! {
                biased;
                came = &mut pulled => break came,
                () = &mut lost => panic!("a neighbour that sends ranges is taken for dead"),
                // The last one ends with the pull.
                seconds = latency(provider, fetcher, 100 + beside.len()) => beside.push(seconds),
            }
        };
        let seconds = began.elapsed().as_secs_f64();
        assert!(matches!(came, PullProgress::Done { .. }), "{came:?}");
        assert!(!beside.is_empty(), "gossip came beside the ranges");
        let used = 30.0 * f64::from(8 << 20) / 20e6 / seconds;
        println!("\nfigure tcp_link_used {used:.2} (30 MiB over the mesh, link 20 Mbit/s)");
        for (name, mut seconds) in [("idle", idle), ("beside_ranges", beside)] {
            seconds.sort_by(f64::total_cmp);
            let (median, worst) = (seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
            let context =
                format!("median of {}, worst {worst:.2}; link 20 Mbit/s, changes gather for a second", seconds.len());
            println!("figure gossip_latency_{name}_s {median:.2} ({context})");
        }
    });
}
