//! Two whole agents in network namespaces, with a link between them and a firewall that drops UDP.
//! Small images come over the mesh's TCP connection, and gossip passes beside them.

mod test_agent;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lighterman::control::{PullFailure, PullProgress};
use lighterman::decide::transport_choice::MAX_BLOB;
use lighterman::testing::image::put_image;
use tokio::runtime::Builder;

use crate::links::pair::VethLink;
use test_agent::{SharedCluster, TestAgent};

const SMALL: &str = "registry.example/team/small:1";
const LARGE: &str = "registry.example/team/large:1";

/// Deadline of a test. A test takes two minutes, because a block of UDP is found within a minute.
const DEADLINE: Duration = Duration::from_secs(600);

/// Runs `test` with a provider and a fetcher that are connected to each other.
fn with_two_agents(rate: &str, test: impl AsyncFnOnce(&VethLink, &TestAgent, &TestAgent) + Send + 'static) {
    let link = Arc::new(VethLink::of(rate));
    let shared_cluster = SharedCluster::new();
    let provider = TestAgent::start(&link, &shared_cluster, 0);
    let running = thread::spawn(move || {
        let fetcher = TestAgent::start(&link, &shared_cluster, 1);
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let body = async {
            fetcher.wait_connected(provider.peer).await;
            provider.wait_connected(fetcher.peer).await;
            test(&link, &provider, &fetcher).await;
        };
        runtime.block_on(async { tokio::time::timeout(DEADLINE, body).await.expect("the test ends in time") });
    });
    running.join().unwrap();
}

#[test]
fn a_small_image_is_fetched_over_tcp_while_udp_is_blocked_and_a_large_image_only_over_udp() {
    with_two_agents("1gbit", async |link, provider, fetcher| {
        let small = put_image(&*provider.store, &[SMALL.into()], &[9 << 20, 300, 0], 7).await.unwrap();
        put_image(&*provider.store, &[LARGE.into()], &[MAX_BLOB + 1, 300], 8).await.unwrap();
        link.block_udp(true);
        fetcher.wait_udp_blocked(true).await;
        let began = Instant::now();
        let outcome = fetcher.pull(SMALL).await;
        let PullProgress::Done { bytes, from, .. } = &outcome else { panic!("{outcome:?}") };
        assert_eq!((*bytes, from.as_slice()), (small.bytes(), [provider.name.clone()].as_slice()));
        assert_eq!(fetcher.metric("lighterman_fetched_over_tcp_bytes_total"), small.bytes());
        assert_eq!(provider.metric("lighterman_served_bytes_total"), small.bytes());
        let mbit = small.bytes() as f64 * 8e-6 / began.elapsed().as_secs_f64();
        println!("\nfigure image_over_tcp_mbit_s {mbit:.0} (9 MiB, link 1 Gbit/s, debug build)");

        let failure = fetcher.pull(LARGE).await;
        let PullProgress::Failed { kind, message, retryable: true } = failure else { panic!("{failure:?}") };
        assert_eq!(kind, PullFailure::FetchFailed);
        assert!(message.contains("UDP") && message.contains(&MAX_BLOB.to_string()), "{message}");
        let over_tcp = fetcher.metric("lighterman_fetched_over_tcp_bytes_total");
        assert!(over_tcp < small.bytes() + 1000, "only the manifest of the large image came over TCP: {over_tcp}");

        link.block_udp(false);
        fetcher.wait_udp_blocked(false).await;
        let outcome = fetcher.pull(LARGE).await;
        assert!(matches!(outcome, PullProgress::Done { .. }), "{outcome:?}");
        assert_eq!(
            fetcher.metric("lighterman_fetched_over_tcp_bytes_total"),
            over_tcp,
            "the large image came over QUIC"
        );
    });
}

/// Seconds from a new image in the provider's store until the fetcher lists the provider.
async fn gossip_latency(provider: &TestAgent, fetcher: &TestAgent, number: usize) -> f64 {
    let name = format!("registry.example/told/{number}:1");
    let began = Instant::now();
    let image = put_image(&*provider.store, &[name], &[100], number as u64).await.unwrap();
    fetcher.wait_provider(image.target.digest, provider.peer).await;
    began.elapsed().as_secs_f64()
}

#[test]
fn gossip_passes_beside_ranges_on_a_slow_link() {
    with_two_agents("20mbit", async |link, provider, fetcher| {
        link.block_udp(true);
        fetcher.wait_udp_blocked(true).await;
        let mut idle = Vec::new();
        for number in 0..10 {
            idle.push(gossip_latency(provider, fetcher, number).await);
        }
        put_image(&*provider.store, &[SMALL.into()], &[30 << 20], 7).await.unwrap();
        let mut under_load = Vec::new();
        let began = Instant::now();
        let (pulled, lost) = (fetcher.pull(SMALL), fetcher.wait_disconnected(provider.peer));
        tokio::pin!(pulled, lost);
        let came = loop {
            tokio::select! {
                biased;
                came = &mut pulled => break came,
                () = &mut lost => panic!("the fetcher dropped a provider that serves ranges"),
                // The end of the pull drops the last wait.
                seconds = gossip_latency(provider, fetcher, 100 + under_load.len()) => under_load.push(seconds),
            }
        };
        let seconds = began.elapsed().as_secs_f64();
        assert!(matches!(came, PullProgress::Done { .. }), "{came:?}");
        assert!(!under_load.is_empty(), "gossip arrives beside the ranges");
        let used = 30.0 * f64::from(8 << 20) / 20e6 / seconds;
        println!("\nfigure tcp_link_used {used:.2} (30 MiB over the mesh, link 20 Mbit/s)");
        for (name, mut seconds) in [("idle", idle), ("beside_ranges", under_load)] {
            seconds.sort_by(f64::total_cmp);
            let (median, worst) = (seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
            let context =
                format!("median of {}, worst {worst:.2}; link 20 Mbit/s, announcements batched for 1 s", seconds.len());
            println!("figure gossip_latency_{name}_s {median:.2} ({context})");
        }
    });
}
