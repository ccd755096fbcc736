//! One node: what it has, what it fetches, whom it serves.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use lighterman::decide::claim::Crossing;
use lighterman::decide::pieces::{AskId, Pool};
use lighterman::decide::slots::{Sent, Slots, Ticket};
use lighterman::model::{Bits, Order, PeerId, Zone};

use super::network::StreamId;

/// As agents are set by default.
const PER_BLOB: usize = 8;
const PER_NODE: usize = 16;

/// What is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Honest,
    /// Says that it has everything, and sends junk.
    Liar,
    /// Sends a chunk now and then.
    Drips,
}

pub(super) struct Node {
    pub(super) peer: PeerId,
    pub(super) zone: Option<Zone>,
    pub(super) kind: Kind,
    pub(super) is_alive: bool,
    pub(super) held: Bits,
    pub(super) missing: usize,
    pub(super) pool: Pool,
    pub(super) crossing: Crossing,
    /// Whom it asked, and what of each piece came.
    pub(super) asks: BTreeMap<AskId, (usize, u64)>,
    pub(super) wake_at: u64,
    /// Who hears of its pieces, and what they were not told.
    pub(super) followers: BTreeSet<usize>,
    pub(super) news: Vec<u32>,
    pub(super) slots: Slots,
    pub(super) sent: Sent,
    pub(super) tickets: HashMap<Ticket, (usize, AskId, Order)>,
    pub(super) asked: HashMap<(usize, AskId), (Ticket, Option<StreamId>)>,
    /// Whether it holds its zone's Lease, and whether it is at it.
    pub(super) claims: bool,
    pub(super) is_claiming: bool,
    /// When it had everything, in microseconds.
    pub(super) done_at: Option<u64>,
    /// Bytes that it sent, and that came here for nothing.
    pub(super) bytes_sent: u64,
    pub(super) wasted: u64,
}

impl Node {
    pub(super) fn new(peer: PeerId, zone: Option<Zone>, pool: Pool, crossing: Crossing, pieces: usize) -> Self {
        Self {
            peer,
            zone,
            kind: Kind::Honest,
            is_alive: true,
            held: Bits::none_of(pieces),
            missing: pieces,
            pool,
            crossing,
            asks: BTreeMap::new(),
            wake_at: u64::MAX,
            followers: BTreeSet::new(),
            news: Vec::new(),
            slots: Slots::new(PER_BLOB, PER_NODE),
            sent: Sent::default(),
            tickets: HashMap::new(),
            asked: HashMap::new(),
            claims: false,
            is_claiming: false,
            done_at: None,
            bytes_sent: 0,
            wasted: 0,
        }
    }

    pub(super) fn is_whole(&self) -> bool {
        self.missing == 0 || self.kind == Kind::Liar
    }
}
