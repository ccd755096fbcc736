//! A node's pieces, requests, and uploads.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use lighterman::decide::claim::ZoneLeader;
use lighterman::decide::piece_picker::{PiecePicker, PieceRequestId};
use lighterman::decide::upload_slots::{SendCounts, UploadSlots, UploadTicket};
use lighterman::model::{Bits, PeerId, PieceRequest, Zone};

use super::network::StreamId;

/// Default limits of agents' uploads, per blob and per node.
const PER_BLOB: usize = 8;
const PER_NODE: usize = 16;

/// A node's fault, if any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NodeBehavior {
    Honest,
    /// Announces the whole blob, and sends wrong bytes.
    Liar,
    /// Sends a chunk once a second.
    Drips,
}

pub(super) struct SwarmNode {
    pub(super) peer: PeerId,
    pub(super) zone: Option<Zone>,
    pub(super) behavior: NodeBehavior,
    pub(super) is_alive: bool,
    pub(super) pieces: Bits,
    pub(super) missing: usize,
    pub(super) picker: PiecePicker,
    pub(super) zone_leader: ZoneLeader,
    /// Requests in flight: the provider, and the received bytes of the current piece.
    pub(super) in_flight: BTreeMap<PieceRequestId, (usize, u64)>,
    pub(super) wake_at: u64,
    /// Followers of this node's piece map, and pieces not yet announced to them.
    pub(super) followers: BTreeSet<usize>,
    pub(super) unannounced: Vec<u32>,
    pub(super) slots: UploadSlots,
    pub(super) sent: SendCounts,
    pub(super) queued_requests: HashMap<UploadTicket, (usize, PieceRequestId, PieceRequest)>,
    pub(super) served_requests: HashMap<(usize, PieceRequestId), (UploadTicket, Option<StreamId>)>,
    /// Whether the node holds the zone's Lease, and whether an attempt is in flight.
    pub(super) has_claim: bool,
    pub(super) is_claiming: bool,
    /// Time at which the node had the whole blob, in microseconds.
    pub(super) done_at: Option<u64>,
    /// Bytes sent by this node, and useless bytes that it received.
    pub(super) bytes_sent: u64,
    pub(super) wasted: u64,
}

impl SwarmNode {
    pub(super) fn new(
        peer: PeerId,
        zone: Option<Zone>,
        picker: PiecePicker,
        zone_leader: ZoneLeader,
        pieces: usize,
    ) -> Self {
        Self {
            peer,
            zone,
            behavior: NodeBehavior::Honest,
            is_alive: true,
            pieces: Bits::none_of(pieces),
            missing: pieces,
            picker,
            zone_leader,
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
        self.missing == 0 || self.behavior == NodeBehavior::Liar
    }
}
