//! One node: what it has, what it fetches, whom it serves.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use lighterman::decide::claim::ZoneLeader;
use lighterman::decide::piece_picker::{PiecePicker, PieceRequestId};
use lighterman::decide::upload_slots::{SendCounts, UploadSlots, UploadTicket};
use lighterman::model::{Bits, PeerId, PieceRequest, Zone};

use super::network::StreamId;

/// As agents are set by default.
const PER_BLOB: usize = 8;
const PER_NODE: usize = 16;

/// What is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NodeBehaviour {
    Honest,
    /// Says that it has everything, and sends junk.
    Liar,
    /// Sends a chunk now and then.
    Drips,
}

pub(super) struct SwarmNode {
    pub(super) peer: PeerId,
    pub(super) zone: Option<Zone>,
    pub(super) behaviour: NodeBehaviour,
    pub(super) is_alive: bool,
    pub(super) pieces: Bits,
    pub(super) missing: usize,
    pub(super) pool: PiecePicker,
    pub(super) zone_leader: ZoneLeader,
    /// Whom it asked, and what of each piece came.
    pub(super) in_flight: BTreeMap<PieceRequestId, (usize, u64)>,
    pub(super) wake_at: u64,
    /// Who hears of its pieces, and what they were not told.
    pub(super) followers: BTreeSet<usize>,
    pub(super) unannounced: Vec<u32>,
    pub(super) slots: UploadSlots,
    pub(super) sent: SendCounts,
    pub(super) queued_requests: HashMap<UploadTicket, (usize, PieceRequestId, PieceRequest)>,
    pub(super) served_requests: HashMap<(usize, PieceRequestId), (UploadTicket, Option<StreamId>)>,
    /// Whether it holds its zone's Lease, and whether it is at it.
    pub(super) has_claim: bool,
    pub(super) is_claiming: bool,
    /// When it had everything, in microseconds.
    pub(super) done_at: Option<u64>,
    /// Bytes that it sent, and that came here for nothing.
    pub(super) bytes_sent: u64,
    pub(super) wasted: u64,
}

impl SwarmNode {
    pub(super) fn new(
        peer: PeerId,
        zone: Option<Zone>,
        pool: PiecePicker,
        crossing: ZoneLeader,
        pieces: usize,
    ) -> Self {
        Self {
            peer,
            zone,
            behaviour: NodeBehaviour::Honest,
            is_alive: true,
            pieces: Bits::none_of(pieces),
            missing: pieces,
            pool,
            zone_leader: crossing,
            in_flight: BTreeMap::new(),
            wake_at: u64::MAX,
            followers: BTreeSet::new(),
            unannounced: Vec::new(),
            slots: UploadSlots::new(PER_BLOB, PER_NODE),
            sent: SendCounts::default(),
            queued_requests: HashMap::new(),
            served_requests: HashMap::new(),
            has_claim: false,
            is_claiming: false,
            done_at: None,
            bytes_sent: 0,
            wasted: 0,
        }
    }

    pub(super) fn is_whole(&self) -> bool {
        self.missing == 0 || self.behaviour == NodeBehaviour::Liar
    }
}
