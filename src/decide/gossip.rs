//! The mesh's protocol as one state machine: what an agent tells, believes, asks and answers. Pure: no sockets, no clock, no
//! randomness but a seed, so that a thousand of them run in one simulation.
//!
//! Whoever drives it (libp2p in an agent, a simulated network in tests) reports what happened, then takes what is to be done
//! ([`Protocol::next`]) until there is nothing left, and calls [`Protocol::tick`] every [`TICK`].
//!
//! # The protocol
//!
//! Every member keeps a log of what it holds: an epoch for its process, a number for each entry. What changed is gathered for up to a
//! second, signed, and gossiped; a head is small and also signs what the publisher holds *after* the entry, so that anybody can hand on a
//! snapshot and nobody can change it. Every ten seconds a member compares its marks (how far each log is known, who is held for dead) with
//! one random neighbour by one hash for each bucket, and asks for what it lacks: introductions, entries, snapshots of many
//! members in one. Nothing is ever pushed but gossip.
//!
//! A member introduces itself with a credential that is good for its key alone; everybody checks it, so that it is of no use to
//! be let in by one careless neighbour. Neighbours ping each other. One that is silent is suspected; with the word of a second witness
//! it is dead everywhere, and by its own word, with a larger incarnation, alive again. What it holds is hidden meanwhile and not
//! forgotten, so that it need not be told again.
//!
//! Not here: who is admitted (a credential is judged by [`CredentialVerifier::verify_credential`]), who holds what (`Inventory`), and how gossip spreads.

mod connections;
mod entries;
mod follower;
mod liveness;
mod local_log;
mod membership;
mod membership_table;
mod neighbour_choice;
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
use crate::model::{
    Credential, Gossip, Introduction, InventoryChange, MemberSummary, NodeName, Peer, PeerId, Release, Signature,
    SyncRequest, Zone,
};
use local_log::LocalLog;
use membership_table::{Member, MembershipTable};
use recent_entries::RecentEntries;
use requests::PendingRequest;

/// How often the clock is looked at.
pub const TICK: Duration = Duration::from_millis(250);

/// How often the driver has a neighbour answer a ping; each answer is [`Protocol::record_ping_answer`].
pub const PING_INTERVAL: Duration = Duration::from_millis(750);

/// Ticks from one batch of entries to the next: changes are gathered for up to a second.
const TICKS_PER_BATCH: u32 = 4;

/// After the first neighbour answers, gossip reaches it by then: it has told its subscription and was grafted at a heartbeat.
const GRAFT_DELAY: Duration = Duration::from_millis(1500);

/// Between two comparisons with some neighbour, less up to a fifth at random.
const COMPARE_INTERVAL: Duration = Duration::from_secs(10);

/// What the protocol needs of cryptography.
pub trait CredentialVerifier {
    /// Signs with this agent's key.
    fn sign(&self, message: &[u8]) -> Signature;
    /// Whether the owner of this key signed it.
    fn is_signed(&self, by: PeerId, message: &[u8], signature: &Signature) -> bool;
    /// Whether the credential admits the key.
    ///
    /// # Errors
    /// [`CredentialRejection`] where it does not, or that cannot be told.
    fn verify_credential(
        &self,
        peer: PeerId,
        credential: &Credential,
    ) -> Result<VerifiedCredential, CredentialRejection>;
}

/// A key is an agent's of this cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedCredential {
    /// Its node, where the credential says so; that wins over what the agent says.
    pub node: Option<NodeName>,
    /// The UID of the pod that the credential is bound to, where it is.
    pub pod: Option<String>,
    /// For how much longer.
    pub life: Duration,
}

/// Why nobody vouches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CredentialRejection {
    /// The credential is not good for this key.
    Rejected,
    /// It cannot be decided now.
    Undecided,
}

/// This agent.
#[derive(Debug, Clone)]
pub struct LocalAgent {
    /// Its key.
    pub peer: PeerId,
    /// Larger than that of every earlier process of this node.
    pub epoch: u64,
    /// Its node.
    pub node: NodeName,
    /// What it runs.
    pub release: Release,
}

/// One connection, as the driver numbers them. Never used twice.
pub type MeshConnectionId = u64;

/// One question, from [`Output::Request`] until it is answered or not.
pub type SyncRequestId = u64;

/// What to do with a message of somebody's gossip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GossipVerdict {
    /// Pass it on.
    Accept,
    /// Do not pass it on; nobody is to blame.
    Ignore(&'static str),
    /// Do not pass it on; no honest member sends this.
    Reject(&'static str),
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Give this to the neighbours, who pass it on.
    Publish(Gossip),
    /// Ask a neighbour, and report [`Protocol::receive_reply`] or [`Protocol::record_request_failure`].
    Request(SyncRequestId, PeerId, SyncRequest),
    /// Meet this peer at its door; then [`Protocol::admit`] or [`Protocol::dial_failed`] follows.
    Handshake(Peer),
    /// Connect to a peer that was admitted; then [`Protocol::connection_opened`] or [`Protocol::dial_failed`] follows.
    Dial(Peer),
    /// Close this connection.
    Close(MeshConnectionId, PeerId),
    /// From now on this peer may connect.
    Allow(PeerId),
    /// From now on it may not, and its connections end.
    Deny(PeerId),
    /// It can be fetched from; also when it moved.
    Up(Peer),
    /// It cannot, and why.
    Down(PeerId, &'static str),
    /// This node's agent has this agent's key: its introduction was signed with it.
    SharedKey(NodeName),
    /// It did what no honest peer does.
    Fault {
        /// Who.
        peer: PeerId,
        /// What: a metric's label.
        fault: &'static str,
        /// For how long nothing of it is accepted, when it was too much.
        banned: Option<Duration>,
    },
}

/// What others are told of this agent besides [`LocalAgent`].
#[derive(Debug, Clone, PartialEq, Eq)]
struct Presence {
    credential: Credential,
    transfer: SocketAddr,
    gossip: SocketAddr,
    zone: Option<Zone>,
}

/// One agent's side of the mesh.
#[derive(Debug, Clone)]
pub struct Protocol<N> {
    verifier: N,
    local: LocalAgent,
    presence: Option<Presence>,
    /// Our own word, as others were last given it.
    introduction: Option<Introduction>,
    /// When it is said again: gossip reaches a neighbour only some time after the connection is open.
    introduce_at: Option<Instant>,
    incarnation: u64,
    /// When it is said again that we live: somebody has not heard it.
    refute_at: Option<Instant>,
    log: LocalLog,
    recent: RecentEntries,
    roster: MembershipTable,
    outputs: VecDeque<Output>,
    rng: SmallRng,
    ticks: u32,
    compare_at: Instant,
    /// Members of whose logs something is missing.
    behind: BTreeSet<PeerId>,
    /// Members whose word is newer than what is known of them, and the neighbours that have it.
    missing_introductions: BTreeMap<PeerId, PeerId>,
    in_flight: BTreeMap<SyncRequestId, PendingRequest>,
    last_request: SyncRequestId,
    /// Who should be a neighbour; stale after a change of the members.
    chosen_neighbours: Vec<PeerId>,
    chosen_is_stale: bool,
    /// When one that is held for dead is looked for.
    dead_probe_at: Instant,
    /// Banned since the last tick: their content is hidden then.
    recently_banned: Vec<PeerId>,
    refuted_at: Option<Instant>,
    /// Makes the choice of neighbours one that nobody else can foresee.
    salt: u64,
    /// Times that an agent was no member because as many members are known as may be.
    over_limit: u64,
}

impl<N: CredentialVerifier> Protocol<N> {
    /// An agent that knows nobody and holds nothing. `seed` is random.
    pub fn new(own: LocalAgent, notary: N, seed: u64, now: Instant) -> Self {
        let log = LocalLog::new(own.peer, own.epoch);
        let mut rng = SmallRng::seed_from_u64(seed);
        let spread = COMPARE_INTERVAL.mul_f64(rng.random());
        let salt = rng.random();
        Self {
            verifier: notary,
            local: own,
            presence: None,
            introduction: None,
            introduce_at: None,
            incarnation: 0,
            refute_at: None,
            log,
            recent: RecentEntries::default(),
            roster: MembershipTable::new(),
            outputs: VecDeque::new(),
            ticks: rng.random_range(0..TICKS_PER_BATCH),
            rng,
            compare_at: now + spread,
            behind: BTreeSet::new(),
            missing_introductions: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            last_request: 0,
            chosen_neighbours: Vec::new(),
            chosen_is_stale: true,
            dead_probe_at: now + spread,
            recently_banned: Vec::new(),
            refuted_at: None,
            salt,
            over_limit: 0,
        }
    }

    /// What is to be done next.
    #[expect(clippy::should_implement_trait, reason = "it goes on after None")]
    pub fn next(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// A quarter of a second has passed.
    pub fn tick(&mut self, table: &mut Inventory, now: Instant) {
        self.ticks = self.ticks.wrapping_add(1);
        self.check_neighbours(table, now);
        self.refute_if_due(now);
        if self.ticks.is_multiple_of(TICKS_PER_BATCH) {
            // In this order: an entry that comes before its author's introduction is lost, and they go different ways.
            self.publish_changes();
            self.publish_introduction_if_due(now);
            self.expire_members(table, now);
            self.maintain_neighbours(now);
        }
        self.compare_if_due(now);
        self.request_missing(now);
    }

    /// What this node holds has changed; it is told within a second. Answers how many items were left out because of limits.
    pub fn announce(&mut self, changes: Vec<InventoryChange>) -> usize {
        self.log.record(changes)
    }

    /// A neighbour passed this on.
    pub fn receive_gossip(
        &mut self,
        from: PeerId,
        message: Gossip,
        table: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let verdict = self.dispatch_gossip(from, message, table, now);
        self.finish_gossip(from, verdict, now)
    }

    /// The same, in the words of a later release: what is improper here may be proper there, and nobody is blamed for it.
    pub fn receive_gossip_of_later_release(
        &mut self,
        from: PeerId,
        message: Gossip,
        table: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let verdict = match self.dispatch_gossip(from, message, table, now) {
            GossipVerdict::Reject("malformed") => GossipVerdict::Ignore("later_release"),
            verdict => verdict,
        };
        self.finish_gossip(from, verdict, now)
    }

    /// Who brought it is blamed, if anybody is, and what it lets us miss is asked for.
    fn finish_gossip(&mut self, from: PeerId, verdict: GossipVerdict, now: Instant) -> GossipVerdict {
        if let GossipVerdict::Reject(fault) = verdict {
            self.record_fault(from, fault, now);
        }
        self.request_missing(now);
        verdict
    }

    fn dispatch_gossip(&mut self, from: PeerId, message: Gossip, table: &mut Inventory, now: Instant) -> GossipVerdict {
        match message {
            Gossip::Entry(entry) => self.receive_entry(from, entry, table, now),
            Gossip::Introduction(introduction) => self.receive_introduction(introduction, table, now),
            Gossip::Suspicion(suspicion) => self.receive_suspicion(suspicion, table, now),
            Gossip::Refutation(refutation) => self.receive_refutation(refutation, table, now),
            Gossip::Leave(farewell) => self.receive_leave(farewell, table, now),
        }
    }

    /// Leaving: what is still to be published, before everything ends.
    pub fn leave(&mut self) {
        self.publish_changes();
        let mut farewell =
            crate::model::LeaveNotice { peer: self.local.peer, epoch: self.log.epoch(), signature: [0; 64].into() };
        farewell.signature = self.verifier.sign(&farewell.signed_bytes());
        self.push_output(Output::Publish(Gossip::Leave(farewell)));
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
        self.roster.get(peer)
    }

    fn jitter(&mut self) -> f64 {
        self.rng.random()
    }

    /// Where we ourselves stand.
    fn own_mark(&self) -> Option<MemberSummary> {
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

/// The wait after so many failures in a row: 1 s, doubling to 30 s, less up to half by `jitter` (random, in 0..1), so that a
/// restarted node is not asked by everybody at once.
fn back_off(failures: u32, jitter: f64) -> Duration {
    let seconds = 1u32.checked_shl(failures).map_or(30, |doubled| doubled.clamp(1, 30));
    Duration::from_secs(seconds.into()).mul_f64(0.5 + jitter / 2.0)
}
