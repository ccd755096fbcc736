//! Two who bring the same piece, and a list that is replaced while pieces come.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::sync::{Notify, Semaphore};

use super::Shared;
use super::incoming::{Arrived, Checked, Incoming};
use super::sink::Sink;
use super::underway::Underway;
use crate::decide::pieces::Pool;
use crate::model::PeerId;
use crate::oci::{Chain, ChainBuilder, Cut, Descriptor, Digest, SMALLEST_PIECE, State};
use crate::ports::{ContentStore, Partials, PieceError, PieceSink};
use crate::testing::MemoryStore;

const PIECE: usize = SMALLEST_PIECE as usize;

fn peer(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

/// Three pieces that differ.
fn blob() -> Vec<u8> {
    (0..3 * PIECE).map(|place| (place / PIECE * 7 + place % 251) as u8).collect()
}

fn chain_of(bytes: &[u8]) -> Chain {
    let mut builder = ChainBuilder::new(Cut::usual(bytes.len() as u64));
    builder.update(bytes);
    builder.finish().unwrap()
}

async fn incoming(bytes: &[u8]) -> Arc<Incoming> {
    let store = MemoryStore::new();
    let pin = store.pin(Duration::from_secs(60)).await.unwrap();
    let (digest, size) = (Digest::of(bytes), bytes.len() as u64);
    let staged = store.stage(digest, size, &pin).await.unwrap();
    let blob = Descriptor { media_type: String::new(), digest, size, platform: None, attestation: false };
    Arc::new(Incoming::new(blob, staged))
}

fn sink(incoming: &Arc<Incoming>, number: u8) -> Sink {
    let shared = Arc::new(Shared {
        pool: Mutex::new(Pool::new(None, 1)),
        moved: Notify::new(),
        waiting: Arc::new(Semaphore::new(1)),
    });
    Sink::new(shared, Arc::clone(incoming), number.into(), peer(number))
}

#[tokio::test]
async fn bytes_that_fit_are_not_written_over_by_another_who_brings_the_same_piece() {
    let blob = blob();
    let incoming = incoming(&blob).await;
    incoming.adopt(Arc::new(chain_of(&blob)), peer(9));
    let half = Bytes::from(vec![0; PIECE / 2]);
    let (mut liar, mut honest) = (sink(&incoming, 1), sink(&incoming, 2));
    liar.begin(1);
    liar.append(std::slice::from_ref(&half)).await.unwrap();
    honest.begin(1);
    honest.append(&[Bytes::copy_from_slice(&blob[PIECE..2 * PIECE])]).await.unwrap();
    honest.end().await.unwrap();
    liar.append(&[half]).await.unwrap();
    liar.end().await.unwrap();
    let read = incoming.staged().read_at(PIECE as u64, PIECE).await.unwrap();
    assert!(read == blob[PIECE..2 * PIECE]);
    assert_eq!(incoming.from().into_keys().collect::<Vec<_>>(), [peer(2)]);
}

#[tokio::test]
async fn what_is_here_is_not_written_over_by_one_who_begins_it_later() {
    let blob = blob();
    let right = Bytes::copy_from_slice(&blob[PIECE..2 * PIECE]);
    for has_list in [true, false] {
        let incoming = incoming(&blob).await;
        if has_list {
            incoming.adopt(Arc::new(chain_of(&blob)), peer(9));
        }
        let (mut honest, mut late) = (sink(&incoming, 1), sink(&incoming, 2));
        honest.begin(1);
        honest.append(std::slice::from_ref(&right)).await.unwrap();
        honest.end().await.unwrap();
        late.begin(1);
        late.append(&[Bytes::from(vec![0; PIECE])]).await.unwrap();
        late.end().await.unwrap();
        assert!(incoming.staged().read_at(PIECE as u64, PIECE).await.unwrap() == right, "with a list: {has_list}");
        assert_eq!(incoming.from().into_keys().collect::<Vec<_>>(), [peer(1)]);
    }
}

/// What [`Partials::partial`] promises, and those who are told of pieces rely on.
#[tokio::test]
async fn whoever_looks_at_what_is_coming_has_a_view_of_its_own_and_is_told_when_it_is_over() {
    let blob = blob();
    let incoming = incoming(&blob).await;
    let (underway, digest) = (Underway::default(), incoming.blob().digest);
    underway.begin(&incoming);
    assert!(underway.partial(digest).is_none(), "nothing can be served without a list");
    incoming.adopt(Arc::new(chain_of(&blob)), peer(9));
    let mut changes = underway.partial(digest).unwrap().changes();
    let mut sink = sink(&incoming, 1);
    sink.begin(1);
    sink.append(&[Bytes::copy_from_slice(&blob[PIECE..2 * PIECE])]).await.unwrap();
    sink.end().await.unwrap();
    changes.changed().await.unwrap();
    assert_eq!(underway.partial(digest).unwrap().held().ones().collect::<Vec<_>>(), [1]);
    underway.end(&incoming);
    assert!(underway.partial(digest).is_none() && changes.changed().await.is_err());
}

#[tokio::test]
async fn a_liar_that_is_second_writes_nothing() {
    let blob = blob();
    let incoming = incoming(&blob).await;
    incoming.adopt(Arc::new(chain_of(&blob)), peer(9));
    let (mut first, mut liar) = (sink(&incoming, 1), sink(&incoming, 2));
    first.begin(0);
    liar.begin(0);
    liar.append(&[Bytes::from(vec![1; PIECE])]).await.unwrap();
    assert!(matches!(liar.end().await, Err(PieceError::Unfit)));
    assert!(incoming.staged().read_at(0, PIECE).await.unwrap().iter().all(|byte| *byte == 0));
    first.append(&[Bytes::copy_from_slice(&blob[..PIECE])]).await.unwrap();
    first.end().await.unwrap();
    assert!(incoming.has(0));
}

/// What one of several senders does next.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// It begins with a piece if it has none, sends half of it, or ends it.
    Goes(usize, u32),
    /// It breaks off.
    Leaves(usize),
    /// The list is there.
    Lists,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..4_usize, 0..3_u32).prop_map(|(sender, piece)| Step::Goes(sender, piece)),
        1 => (0..4_usize).prop_map(Step::Leaves),
        1 => Just(Step::Lists),
    ]
}

/// Two honest senders and two liars; what each is at.
struct Senders {
    blob: Vec<u8>,
    incoming: Arc<Incoming>,
    all: Vec<(Sink, Option<(u32, usize)>)>,
}

impl Senders {
    async fn take(&mut self, step: Step) {
        match step {
            Step::Lists if self.incoming.list().is_none() => {
                self.incoming.adopt(Arc::new(chain_of(&self.blob)), peer(9))
            }
            Step::Lists => {}
            Step::Leaves(sender) => self.all[sender] = (sink(&self.incoming, sender as u8), None),
            Step::Goes(sender, next) => {
                let is_honest = sender < 2;
                let (sink, at) = &mut self.all[sender];
                match *at {
                    None => {
                        sink.begin(next);
                        *at = Some((next, 0));
                    }
                    Some((_, PIECE)) => {
                        let ended = sink.end().await;
                        assert!(ended.is_ok() || !is_honest, "{ended:?}");
                        *at = None;
                    }
                    Some((piece, sent)) => {
                        let from = piece as usize * PIECE + sent;
                        let mut half = self.blob[from..from + PIECE / 2].to_vec();
                        half.iter_mut().for_each(|byte| *byte ^= if is_honest { 0 } else { 0xff });
                        sink.append(&[half.into()]).await.unwrap();
                        *at = Some((piece, sent + PIECE / 2));
                    }
                }
            }
        }
    }

    async fn check(&self) {
        for piece in (0..3).filter(|piece| self.incoming.has(*piece)) {
            let from = piece as usize * PIECE;
            let there = self.incoming.staged().read_at(from as u64, PIECE).await.unwrap();
            assert!(there == self.blob[from..from + PIECE], "piece {piece} fitted, and is another one now");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_fitted_stays_as_it_was_whoever_sends_what_and_when(steps in vec(step(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let blob = blob();
            let incoming = incoming(&blob).await;
            let all = (0..4).map(|sender| (sink(&incoming, sender), None)).collect();
            let mut senders = Senders { blob, incoming, all };
            for step in steps {
                senders.take(step).await;
                senders.check().await;
            }
        });
    }
}

#[tokio::test]
async fn a_piece_that_began_by_a_list_that_is_not_in_use_any_more_is_checked_by_the_new_one() {
    let blob = blob();
    let incoming = incoming(&blob).await;
    let right = chain_of(&blob);
    let mut states = right.states().to_vec();
    states[0] = State::INITIAL;
    let forged = Chain::claimed(right.digest(), right.cut(), states).unwrap();
    incoming.adopt(Arc::new(forged), peer(9));
    let mut hasher = incoming.hasher(1).unwrap();
    let mut sender = sink(&incoming, 1);
    sender.begin(1);
    sender.append(&[Bytes::copy_from_slice(&blob[PIECE..2 * PIECE])]).await.unwrap();
    incoming.adopt(Arc::new(right), peer(8));
    sender.end().await.unwrap();
    assert_eq!(incoming.unchecked(), [1], "it is nobody's fault");
    assert_eq!(incoming.check(1).await.unwrap(), Checked::Fits(Some(peer(1))));
    hasher.update(&blob[PIECE..2 * PIECE]);
    assert_eq!(incoming.arrives(1, Some(hasher), peer(3)), Arrived::Unchecked);
}
