//! The gossip protocol as one state machine: membership, liveness, and inventories. Pure: no
//! sockets, no clock, and no randomness but a seed, so one simulation runs a thousand agents.
//!
//! A driver (libp2p in an agent, a simulated network in tests) reports events, performs the outputs
//! ([`Protocol::next`]) until none is left, and calls [`Protocol::tick`] every [`TICK`].
//!
//! # The protocol
//!
//! Every member keeps a log of its inventory: an epoch per process, a number per entry. A member
//! gathers changes for up to a second, signs an entry, and publishes the entry by gossip. The
//! signed head of an entry is small and also covers the publisher's items *after* the entry. So
//! every member can relay a snapshot, and none can change one. Every ten seconds a member compares
//! summaries (how much of each log is known, which members are dead) with one random neighbor, by
//! one hash per bucket. Then the member requests missing introductions, entries, and snapshots of
//! many members in one. Only gossip is ever pushed.
//!
//! A member introduces itself with a credential that is good for its key alone. Every agent
//! verifies the credential, so admission by one careless neighbor gains an attacker nothing.
//! Neighbors ping each other. A silent neighbor is suspected. With a second witness the member is
//! dead everywhere, and a refutation with a larger incarnation makes the member alive again. The
//! items of a dead member are hidden and kept, so nothing is sent twice.
//!
//! Not here: the verification of credentials ([`CredentialVerifier::verify_credential`]), the
//! providers of a blob (`Inventory`), and the spread of gossip (gossipsub).

mod connections;
mod credential_verifier;
mod entries;
mod fault;
mod follower;
mod introductions;
mod liveness;
mod local_log;
mod membership;
mod membership_table;
mod neighbor_choice;
mod output;
mod peer_score;
mod recent_entries;
mod reply_handler;
mod request_handler;
mod requests;
mod status;
#[cfg(test)]
mod tests;
mod topology;
#[cfg(feature = "testing")]
mod warm_start;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::decide::inventory::Inventory;
use crate::model::{Credential, Gossip, Introduction, InventoryChange, MemberSummary, NodeName, PeerId, Release, Zone};
use crate::util::backoff::Backoff;
use local_log::LocalLog;
use membership_table::{Member, MembershipTable};
use recent_entries::RecentEntries;
use requests::PendingRequest;

pub use self::fault::GossipFault;
pub use credential_verifier::{CredentialRejection, CredentialVerifier, VerifiedCredential};
pub use output::{GossipVerdict, MeshConnectionId, Output, SyncRequestId};

/// Interval of the driver's calls of [`Protocol::tick`].
pub const TICK: Duration = Duration::from_millis(250);

/// Interval of the driver's pings to each neighbor. The driver reports each answer by
/// [`Protocol::record_ping_answer`].
pub const PING_INTERVAL: Duration = Duration::from_millis(750);

/// Ticks between two batches of entries: changes are gathered for up to a second.
const TICKS_PER_BATCH: u32 = 4;

/// Time from a first neighbor's ping answer until gossip reaches the neighbor: its subscription has
/// arrived, and a heartbeat has grafted the neighbor.
const GRAFT_DELAY: Duration = Duration::from_millis(1500);

/// Interval of comparisons with a random neighbor, less up to a fifth at random.
const COMPARE_INTERVAL: Duration = Duration::from_secs(10);

/// The identity of this agent.
#[derive(Debug, Clone)]
pub struct LocalAgent {
    /// This agent's key.
    pub peer: PeerId,
    /// Larger than the epoch of every earlier process of this node.
    pub epoch: u64,
    /// This agent's node.
    pub node: NodeName,
    /// This agent's release.
    pub release: Release,
}

/// The parts of the introduction that may change while the agent runs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Presence {
    credential: Credential,
    transfer: SocketAddr,
    gossip: SocketAddr,
    zone: Option<Zone>,
}

/// One agent's state of the gossip protocol.
#[derive(Debug, Clone)]
pub struct Protocol<N> {
    verifier: N,
    local: LocalAgent,
    presence: Option<Presence>,
    /// This agent's introduction, as last published.
    introduction: Option<Introduction>,
    /// When the introduction is published again: gossip reaches a neighbor only some time after the
    /// connection opened.
    introduce_at: Option<Instant>,
    incarnation: u64,
    /// When the refutation is repeated: some member has not received the last one.
    refute_at: Option<Instant>,
    log: LocalLog,
    recent: RecentEntries,
    membership: MembershipTable,
    outputs: VecDeque<Output>,
    rng: SmallRng,
    ticks: u32,
    compare_at: Instant,
    /// Members whose logs have missing entries here.
    behind: BTreeSet<PeerId>,
    /// Members with a newer introduction, and the neighbors that have the introduction.
    missing_introductions: BTreeMap<PeerId, PeerId>,
    in_flight: BTreeMap<SyncRequestId, PendingRequest>,
    last_request: SyncRequestId,
    /// Members that should be neighbors; stale after a change of the members.
    chosen_neighbors: Vec<PeerId>,
    chosen_is_stale: bool,
    /// When the next dead member is dialed.
    dead_probe_at: Instant,
    /// Peers banned since the last tick. The next tick hides their items.
    recently_banned: Vec<PeerId>,
    refuted_at: Option<Instant>,
    /// Makes the choice of neighbors unpredictable for other agents.
    salt: u64,
    /// Rejections of agents because the membership table was full.
    over_limit: u64,
}

impl<N: CredentialVerifier> Protocol<N> {
    /// An agent without members and without items. `seed` is random.
    pub fn new(local: LocalAgent, verifier: N, seed: u64, now: Instant) -> Self {
        let log = LocalLog::new(local.peer, local.epoch);
        let mut rng = SmallRng::seed_from_u64(seed);
        let spread = COMPARE_INTERVAL.mul_f64(rng.random());
        let salt = rng.random();
        Self {
            verifier,
            local,
            presence: None,
            introduction: None,
            introduce_at: None,
            incarnation: 0,
            refute_at: None,
            log,
            recent: RecentEntries::default(),
            membership: MembershipTable::new(),
            outputs: VecDeque::new(),
            ticks: rng.random_range(0..TICKS_PER_BATCH),
            rng,
            compare_at: now + spread,
            behind: BTreeSet::new(),
            missing_introductions: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            last_request: 0,
            chosen_neighbors: Vec::new(),
            chosen_is_stale: true,
            dead_probe_at: now + spread,
            recently_banned: Vec::new(),
            refuted_at: None,
            salt,
            over_limit: 0,
        }
    }

    /// The next action, or `None` until another event.
    #[expect(clippy::should_implement_trait, reason = "more outputs can follow a None")]
    pub fn next(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Advances all timers. The driver calls this function every [`TICK`].
    pub fn tick(&mut self, inventory: &mut Inventory, now: Instant) {
        self.ticks = self.ticks.wrapping_add(1);
        self.check_neighbors(inventory, now);
        self.refute_if_due(now);
        if self.ticks.is_multiple_of(TICKS_PER_BATCH) {
            // Entries stay back while an introduction is due, and follow one batch later. An entry
            // that overtakes its publisher's introduction is ignored, and the two travel
            // separately.
            self.publish_changes();
            self.publish_introduction_if_due(now);
            self.expire_members(inventory, now);
            self.maintain_neighbors(now);
        }
        self.compare_if_due(now);
        self.request_missing(now);
    }

    /// Records changes of this node's items, which are announced within a second. Returns the
    /// number of items left out because of limits.
    pub fn announce(&mut self, changes: Vec<InventoryChange>) -> usize {
        self.log.record(changes)
    }

    /// Handles a gossip message that `from` relayed.
    pub fn receive_gossip(
        &mut self,
        from: PeerId,
        message: Gossip,
        inventory: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let verdict = self.dispatch_gossip(from, message, inventory, now);
        self.finish_gossip(from, verdict, now)
    }

    /// Handles a message of a later release. Content that is malformed here may be valid there, so
    /// such a message is ignored and no fault is recorded.
    pub fn receive_gossip_of_later_release(
        &mut self,
        from: PeerId,
        message: Gossip,
        inventory: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let verdict = match self.dispatch_gossip(from, message, inventory, now) {
            GossipVerdict::Reject(GossipFault::Malformed) => GossipVerdict::Ignore("later_release"),
            verdict => verdict,
        };
        self.finish_gossip(from, verdict, now)
    }

    /// Records the relaying neighbor's fault, if any, and requests what the message shows missing.
    fn finish_gossip(&mut self, from: PeerId, verdict: GossipVerdict, now: Instant) -> GossipVerdict {
        if let GossipVerdict::Reject(fault) = verdict {
            self.record_fault(from, fault, now);
        }
        self.request_missing(now);
        verdict
    }

    fn dispatch_gossip(
        &mut self,
        from: PeerId,
        message: Gossip,
        inventory: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        match message {
            Gossip::Entry(entry) => self.receive_entry(from, entry, inventory, now),
            Gossip::Introduction(introduction) => self.receive_introduction(introduction, inventory, now),
            Gossip::Suspicion(suspicion) => self.receive_suspicion(suspicion, inventory, now),
            Gossip::Refutation(refutation) => self.receive_refutation(refutation, inventory, now),
            Gossip::Leave(notice) => self.receive_leave(notice, inventory, now),
        }
    }

    /// Publishes the last changes and the notice that this agent leaves.
    pub fn leave(&mut self) {
        self.publish_changes();
        let mut notice =
            crate::model::LeaveNotice { peer: self.local.peer, epoch: self.log.epoch(), signature: [0; 64].into() };
        notice.signature = self.verifier.sign(&notice.signed_bytes());
        self.push_output(Output::Publish(Gossip::Leave(notice)));
    }

    fn publish_changes(&mut self) {
        if self.introduction.is_none() || self.introduce_at.is_some() {
            return;
        }
        for entry in self.log.take_entries(|message| self.verifier.sign(message)) {
            self.recent.push(entry.clone());
            self.push_output(Output::Publish(Gossip::Entry(entry)));
        }
    }

    fn push_output(&mut self, output: Output) {
        self.outputs.push_back(output);
    }

    fn member(&self, peer: PeerId) -> Option<&Member> {
        self.membership.get(peer)
    }

    fn jitter(&mut self) -> f64 {
        self.rng.random()
    }

    /// This agent's own summary; `None` before the first introduction.
    fn own_summary(&self) -> Option<MemberSummary> {
        let profile = &self.introduction.as_ref()?.profile;
        Some(MemberSummary {
            peer: self.local.peer,
            epoch: profile.epoch,
            version: profile.version,
            incarnation: self.incarnation,
            sequence: self.log.sequence(),
            is_dead: false,
        })
    }
}

/// Pauses after failures in a row. The jitter spreads the dials of all agents to a restarted node.
const BACKOFF: Backoff = Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(30) };
