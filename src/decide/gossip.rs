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
//! Not here: who is admitted (a credential is judged by [`Notary::vouch`]), who holds what (`Inventory`), and how gossip spreads.

#[cfg(feature = "testing")]
mod acquaint;
mod answering;
mod asking;
mod conduct;
mod entries;
mod follower;
mod learning;
mod links;
mod liveness;
mod log;
mod membership;
mod neighbouring;
mod neighbours;
mod recent;
mod roster;
mod status;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::decide::inventory::Inventory;
use crate::model::{
    ContentChange, Credential, Gossip, Introduction, Mark, NodeName, Peer, PeerId, Question, Release, Signature, Zone,
};
use asking::Asked;
use log::Log;
use recent::Recent;
use roster::{Member, Roster};

/// How often the clock is looked at.
pub const TICK: Duration = Duration::from_millis(250);

/// How often the driver has a neighbour answer a ping; each answer is [`Protocol::heard`].
pub const PROBE: Duration = Duration::from_millis(750);

/// Ticks from one batch of entries to the next: changes are gathered for up to a second.
const GATHER: u32 = 4;

/// After the first neighbour answers, gossip reaches it by then: it has told its subscription and was grafted at a heartbeat.
const GRAFTED: Duration = Duration::from_millis(1500);

/// Between two comparisons with some neighbour, less up to a fifth at random.
const COMPARE: Duration = Duration::from_secs(10);

/// What the protocol needs of cryptography.
pub trait Notary {
    /// Signs with this agent's key.
    fn sign(&self, message: &[u8]) -> Signature;
    /// Whether the owner of this key signed it.
    fn is_signed(&self, by: PeerId, message: &[u8], signature: &Signature) -> bool;
    /// Whether the credential admits the key.
    ///
    /// # Errors
    /// [`Doubt`] where it does not, or that cannot be told.
    fn vouch(&self, peer: PeerId, credential: &Credential) -> Result<Vouched, Doubt>;
}

/// A key is an agent's of this cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vouched {
    /// Its node, where the credential says so; that wins over what the agent says.
    pub node: Option<NodeName>,
    /// The UID of the pod that the credential is bound to, where it is.
    pub pod: Option<String>,
    /// For how much longer.
    pub life: Duration,
}

/// Why nobody vouches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// The credential is not good for this key.
    Denied,
    /// It cannot be decided now.
    CannotTell,
}

/// This agent.
#[derive(Debug, Clone)]
pub struct Own {
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
pub type LinkId = u64;

/// One question, from [`Output::Ask`] until it is answered or not.
pub type AskId = u64;

/// What to do with a message of somebody's gossip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
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
    /// Ask a neighbour, and report [`Protocol::answered`] or [`Protocol::unanswered`].
    Ask(AskId, PeerId, Question),
    /// Meet this peer at its door; then [`Protocol::admitted`] or [`Protocol::unreachable`] follows.
    Greet(Peer),
    /// Connect to a peer that was admitted; then [`Protocol::opened`] or [`Protocol::unreachable`] follows.
    Dial(Peer),
    /// Close this connection.
    Close(LinkId, PeerId),
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
    Blame {
        /// Who.
        peer: PeerId,
        /// What: a metric's label.
        fault: &'static str,
        /// For how long nothing of it is accepted, when it was too much.
        banned: Option<Duration>,
    },
}

/// What others are told of this agent besides [`Own`].
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
    notary: N,
    own: Own,
    presence: Option<Presence>,
    /// Our own word, as others were last given it.
    introduction: Option<Introduction>,
    /// When it is said again: gossip reaches a neighbour only some time after the connection is open.
    introduce_at: Option<Instant>,
    incarnation: u64,
    /// When it is said again that we live: somebody has not heard it.
    refute_at: Option<Instant>,
    log: Log,
    recent: Recent,
    roster: Roster,
    outputs: VecDeque<Output>,
    rng: SmallRng,
    ticks: u32,
    compare_at: Instant,
    /// Members of whose logs something is missing.
    behind: BTreeSet<PeerId>,
    /// Members whose word is newer than what is known of them, and the neighbours that have it.
    unknown: BTreeMap<PeerId, PeerId>,
    asked: BTreeMap<AskId, Asked>,
    asks: AskId,
    /// Who should be a neighbour; stale after a change of the members.
    chosen: Vec<PeerId>,
    chosen_is_stale: bool,
    /// When one that is held for dead is looked for.
    heal_at: Instant,
    /// Banned since the last tick: their content is hidden then.
    banned_lately: Vec<PeerId>,
    refuted_at: Option<Instant>,
    /// Makes the choice of neighbours one that nobody else can foresee.
    salt: u64,
    /// Times that an agent was no member because as many members are known as may be.
    over_limit: u64,
}

impl<N: Notary> Protocol<N> {
    /// An agent that knows nobody and holds nothing. `seed` is random.
    pub fn new(own: Own, notary: N, seed: u64, now: Instant) -> Self {
        let log = Log::new(own.peer, own.epoch);
        let mut rng = SmallRng::seed_from_u64(seed);
        let spread = COMPARE.mul_f64(rng.random());
        let salt = rng.random();
        Self {
            notary,
            own,
            presence: None,
            introduction: None,
            introduce_at: None,
            incarnation: 0,
            refute_at: None,
            log,
            recent: Recent::default(),
            roster: Roster::new(),
            outputs: VecDeque::new(),
            ticks: rng.random_range(0..GATHER),
            rng,
            compare_at: now + spread,
            behind: BTreeSet::new(),
            unknown: BTreeMap::new(),
            asked: BTreeMap::new(),
            asks: 0,
            chosen: Vec::new(),
            chosen_is_stale: true,
            heal_at: now + spread,
            banned_lately: Vec::new(),
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
        self.watch_neighbours(table, now);
        self.refute_again(now);
        if self.ticks.is_multiple_of(GATHER) {
            // In this order: an entry that comes before its author's introduction is lost, and they go different ways.
            self.publish_changes();
            self.say_again(now);
            self.keep_members(table, now);
            self.keep_neighbours(now);
        }
        self.compare_sometimes(now);
        self.ask(now);
    }

    /// What this node holds has changed; it is told within a second. Answers how many items were left out because of limits.
    pub fn announce(&mut self, changes: Vec<ContentChange>) -> usize {
        self.log.record(changes)
    }

    /// A neighbour passed this on.
    pub fn gossip(&mut self, from: PeerId, message: Gossip, table: &mut Inventory, now: Instant) -> Verdict {
        let verdict = self.take(from, message, table, now);
        self.after_gossip(from, verdict, now)
    }

    /// The same, in the words of a later release: what is improper here may be proper there, and nobody is blamed for it.
    pub fn gossip_of_later_release(
        &mut self,
        from: PeerId,
        message: Gossip,
        table: &mut Inventory,
        now: Instant,
    ) -> Verdict {
        let verdict = match self.take(from, message, table, now) {
            Verdict::Reject("malformed") => Verdict::Ignore("later_release"),
            verdict => verdict,
        };
        self.after_gossip(from, verdict, now)
    }

    /// Who brought it is blamed, if anybody is, and what it lets us miss is asked for.
    fn after_gossip(&mut self, from: PeerId, verdict: Verdict, now: Instant) -> Verdict {
        if let Verdict::Reject(fault) = verdict {
            self.nonsense(from, fault, now);
        }
        self.ask(now);
        verdict
    }

    fn take(&mut self, from: PeerId, message: Gossip, table: &mut Inventory, now: Instant) -> Verdict {
        match message {
            Gossip::Entry(entry) => self.entry(from, entry, table, now),
            Gossip::Introduction(introduction) => self.introduction(introduction, table, now),
            Gossip::Suspicion(suspicion) => self.suspicion(suspicion, table, now),
            Gossip::Refutation(refutation) => self.refutation(refutation, table, now),
            Gossip::Farewell(farewell) => self.farewell(farewell, table, now),
        }
    }

    /// Leaving: what is still to be published, before everything ends.
    pub fn leave(&mut self) {
        self.publish_changes();
        let mut farewell =
            crate::model::Farewell { peer: self.own.peer, epoch: self.log.epoch(), signature: [0; 64].into() };
        farewell.signature = self.notary.sign(&farewell.signed());
        self.output(Output::Publish(Gossip::Farewell(farewell)));
    }

    fn publish_changes(&mut self) {
        if self.introduction.is_none() || self.introduce_at.is_some() {
            return;
        }
        for entry in self.log.entries(|message| self.notary.sign(message)) {
            self.recent.push(entry.clone());
            self.output(Output::Publish(Gossip::Entry(entry)));
        }
    }

    fn output(&mut self, output: Output) {
        self.outputs.push_back(output);
    }

    fn member(&self, peer: PeerId) -> Option<&Member> {
        self.roster.get(peer)
    }

    fn jitter(&mut self) -> f64 {
        self.rng.random()
    }

    /// Where we ourselves stand.
    fn own_mark(&self) -> Option<Mark> {
        let profile = &self.introduction.as_ref()?.profile;
        Some(Mark {
            peer: self.own.peer,
            epoch: profile.epoch,
            version: profile.version,
            incarnation: self.incarnation,
            sequence: self.log.sequence(),
            down: false,
        })
    }
}

/// The wait after so many failures in a row: 1 s, doubling to 30 s, less up to half by `jitter` (random, in 0..1), so that a
/// restarted node is not asked by everybody at once.
fn pause(failures: u32, jitter: f64) -> Duration {
    let seconds = 1u32.checked_shl(failures).map_or(30, |doubled| doubled.clamp(1, 30));
    Duration::from_secs(seconds.into()).mul_f64(0.5 + jitter / 2.0)
}
