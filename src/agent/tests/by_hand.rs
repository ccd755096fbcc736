//! Images that a person asks for.

use std::time::Duration;

use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::by_hand::ByHand;
use crate::agent::progress::Board;
use crate::ports::{PullFailure, PullProgress, PullRequest};

struct Desk {
    requests: mpsc::Sender<PullRequest>,
    board: Board,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Desk {
    fn open(harbour: &Harbour) -> Self {
        let (requests, taken) = mpsc::channel(8);
        let (board, stop) = (Board::default(), CancellationToken::new());
        let by_hand = ByHand {
            recoverer: Arc::new(harbour.recoverer()),
            board: board.clone(),
            metrics: harbour.metrics.clone(),
            dry_run: false,
        };
        let running = tokio::spawn(by_hand.run(taken, stop.clone()));
        Self { requests, board, stop, running }
    }

    async fn ask(&self, name: &str, dry_run: bool) -> mpsc::Receiver<PullProgress> {
        let (progress, told) = mpsc::channel(16);
        let reference = name.parse().unwrap();
        self.requests.send(PullRequest { reference, dry_run, progress }).await.unwrap();
        told
    }

    async fn under_way(&self, recoveries: usize) {
        let reached = async {
            while self.board.running().len() != recoveries {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(reached).await;
    }
}

/// On a clock that is paused: an hour without anything to do.
async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(3600), work).await.expect("an end")
}

async fn all(told: mpsc::Receiver<PullProgress>) -> Vec<PullProgress> {
    within(ReceiverStream::new(told).collect()).await
}

fn failure(told: &[PullProgress]) -> (PullFailure, bool) {
    let Some(PullProgress::Failed { kind, retryable, .. }) = told.last() else { panic!("{told:?}") };
    (*kind, *retryable)
}

#[tokio::test(start_paused = true)]
async fn an_image_asked_for_by_hand_comes_with_word_of_each_step() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let told = all(Desk::open(&harbour).ask(IMAGE, false).await).await;
    let digest = image.root.digest.to_string();
    let blobs: u64 = image.blobs.iter().map(|blob| blob.size).sum();
    let resolved =
        PullProgress::Resolved { digest: digest.clone(), providers: vec!["node-1".into()], more_providers: 0 };
    assert_eq!(told[..2], [resolved, PullProgress::Planned { missing_bytes: blobs, missing_blobs: 4 }]);
    assert_eq!(told[told.len() - 2], PullProgress::Bytes { done: blobs, total: blobs });
    let Some(PullProgress::Done { bytes, fetched, there, from, .. }) = told.last() else { panic!("{told:?}") };
    assert_eq!((*bytes, *fetched, *there, &from[..]), (image.bytes(), 5, 0, &["node-1".to_owned()][..]));
    let by_digest = format!("r.test/shop/checkout@{digest}");
    assert_eq!(harbour.record_names().await, [IMAGE.to_owned(), by_digest]);
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="recovered"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_says_what_it_is_and_moves_nothing() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let told = all(Desk::open(&harbour).ask(IMAGE, true).await).await;
    assert!(matches!(told[..], [PullProgress::Resolved { .. }]), "{told:?}");
    assert!(blobs_of(&*harbour.store).await.is_empty() && harbour.fetcher.times_asked(peer(1)) == 0);
}

#[tokio::test(start_paused = true)]
async fn a_digest_is_no_permission_for_root_either() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let invented = format!("evil.test/shop/checkout@{}", image.root.digest);
    let told = all(Desk::open(&harbour).ask(&invented, false).await).await;
    assert_eq!(failure(&told), (PullFailure::NoProvider, true));
}

#[tokio::test(start_paused = true)]
async fn a_failure_names_the_nodes_that_were_asked() {
    let harbour = Harbour::new();
    harbour.peer_with(3, IMAGE, Behaviour::Lies).await;
    let told = all(Desk::open(&harbour).ask(IMAGE, false).await).await;
    assert_eq!(failure(&told), (PullFailure::FetchFailed, true));
    let Some(PullProgress::Failed { message, .. }) = told.last() else { unreachable!() };
    assert!(message.contains("node-3"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn who_hangs_up_abandons_the_pull() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let desk = Desk::open(&harbour);
    let told = desk.ask(IMAGE, false).await;
    desk.under_way(1).await;
    drop(told);
    desk.under_way(0).await;
    assert_eq!(harbour.store.pins(), 0);
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="abandoned"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn two_are_pulled_at_a_time_and_a_third_is_told_to_come_back() {
    let harbour = Harbour::new();
    let other = "r.test/shop/basket:v1";
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    harbour.peer_with(2, other, Behaviour::Hangs).await;
    let desk = Desk::open(&harbour);
    let first = desk.ask(IMAGE, false).await;
    let _second = desk.ask(other, false).await;
    desk.under_way(2).await;
    assert_eq!(failure(&all(desk.ask(IMAGE, true).await).await), (PullFailure::Busy, true));
    drop(first);
    desk.under_way(1).await;
    tokio::task::yield_now().await;
    assert!(matches!(all(desk.ask(IMAGE, true).await).await[..], [PullProgress::Resolved { .. }]));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stops_says_so_to_who_waits() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let desk = Desk::open(&harbour);
    let told = desk.ask(IMAGE, false).await;
    desk.under_way(1).await;
    desk.stop.cancel();
    assert_eq!(failure(&all(told).await), (PullFailure::Abandoned, true));
    within(desk.running).await.unwrap();
}
