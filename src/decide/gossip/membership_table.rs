//! The members that are known, and one hash for each bucket of them, by which two neighbours find out what they know differently.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::connections::MemberConnections;
use super::follower::LogFollower;
use super::peer_score::PeerScore;
use crate::model::{Introduction, MAX_MEMBERS, MemberSummary, Peer, PeerId, Refutation};
use crate::oci::Digest;

/// Buckets that two neighbours compare. At a thousand members a difference in one of them costs sixteen marks, some 700 bytes.
pub(super) const BUCKETS: usize = 64;

/// One other agent.
#[derive(Debug, Clone)]
pub(super) struct Member {
    /// Where it is, as far as it is known.
    pub(super) peer: Peer,
    /// Its own word, with the reason to believe it. None of one that was only met at the door.
    pub(super) introduction: Option<Introduction>,
    /// The pod that its credential is bound to, where it is.
    pub(super) pod: Option<String>,
    /// Until when its credential, as last seen, makes it a member.
    pub(super) credential_until: Option<Instant>,
    /// Since when it cannot be told whether its credential is still good.
    pub(super) undecided_since: Option<Instant>,
    /// Until when it may connect: it was admitted at the door.
    pub(super) admitted_until: Option<Instant>,
    pub(super) liveness: Liveness,
    /// Who says that it is silent, in this epoch and incarnation.
    pub(super) suspected_by: BTreeSet<PeerId>,
    pub(super) suspected_since: Option<Instant>,
    /// Its last answer to that.
    pub(super) refutation: Option<Refutation>,
    /// It was told to the agent as one to fetch from.
    pub(super) is_up: bool,
    pub(super) connections: MemberConnections,
    pub(super) log: LogFollower,
    pub(super) score: PeerScore,
    /// What stands for it in its bucket.
    hash: u64,
}

/// Whether a member lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Liveness {
    Alive,
    /// Others hold it for dead and it answers us. Alive here; but its mark still says that it is down, by which it learns that it has to
    /// refute that; then it is in no doubt any more. Since then.
    Contested(Instant),
    /// Confirmed, or by its own word, since then.
    Dead(Instant),
}

impl Member {
    pub(super) fn new(peer: Peer) -> Self {
        Self {
            peer,
            introduction: None,
            pod: None,
            credential_until: None,
            undecided_since: None,
            admitted_until: None,
            liveness: Liveness::Alive,
            suspected_by: BTreeSet::new(),
            suspected_since: None,
            refutation: None,
            is_up: false,
            connections: MemberConnections::default(),
            log: LogFollower::default(),
            score: PeerScore::default(),
            hash: 0,
        }
    }

    /// Its process, and the version of its word; zero before it has introduced itself.
    pub(super) fn version(&self) -> (u64, u64) {
        self.introduction.as_ref().map_or((0, 0), |known| (known.profile.epoch, known.profile.version))
    }

    pub(super) fn epoch(&self) -> u64 {
        self.version().0
    }

    /// How often it refuted in this epoch.
    pub(super) fn incarnation(&self) -> u64 {
        self.refutation.as_ref().map_or(0, |refutation| refutation.incarnation)
    }

    pub(super) fn is_dead(&self) -> bool {
        matches!(self.liveness, Liveness::Dead(_))
    }

    /// It answers us, whatever was said of it; whether anything was.
    pub(super) fn record_answer(&mut self, me: PeerId, now: Instant) -> bool {
        let was_accused = self.suspected_by.remove(&me);
        let was_down = self.is_dead();
        if was_down {
            self.liveness = Liveness::Contested(now);
            self.suspected_by.clear();
        }
        if self.suspected_by.is_empty() {
            self.suspected_since = None;
        }
        was_accused || was_down
    }

    /// Whether somebody who may speak for it has spoken, and it is not over.
    pub(super) fn has_valid_credential(&self, now: Instant) -> bool {
        self.introduction.is_some() && self.credential_until.is_some_and(|until| until > now)
    }

    /// Whether it may connect: it came in at the door, and what it showed there, or what it showed since, is still good.
    pub(super) fn is_admitted(&self, now: Instant) -> bool {
        let at_door = self.admitted_until.is_some_and(|until| until > now || self.has_valid_credential(now));
        at_door && !self.score.is_banned(now)
    }

    /// Where it stands, for a neighbour; only of those who have introduced themselves.
    pub(super) fn mark(&self) -> Option<MemberSummary> {
        let (epoch, version) = self.version();
        let introduced = self.introduction.as_ref()?;
        Some(MemberSummary {
            peer: introduced.profile.peer,
            epoch,
            version,
            incarnation: self.incarnation(),
            sequence: self.log.sequence(),
            is_dead: self.liveness != Liveness::Alive,
        })
    }
}

/// All of them.
#[derive(Debug, Clone)]
pub(super) struct MembershipTable {
    pub(super) members: BTreeMap<PeerId, Member>,
    /// Those with something under way, a connection or a dial or a suspicion: of a thousand members a few dozen, looked at in every tick.
    watched: BTreeSet<PeerId>,
    buckets: Vec<u64>,
    /// Members known at a time.
    pub(super) limit: usize,
}

impl MembershipTable {
    pub(super) fn new() -> Self {
        Self { members: BTreeMap::new(), watched: BTreeSet::new(), buckets: vec![0; BUCKETS], limit: MAX_MEMBERS }
    }

    pub(super) fn get(&self, peer: PeerId) -> Option<&Member> {
        self.members.get(&peer)
    }

    pub(super) fn get_mut(&mut self, peer: PeerId) -> Option<&mut Member> {
        self.members.get_mut(&peer)
    }

    /// From now on something is under way with it.
    pub(super) fn watch(&mut self, peer: PeerId) {
        self.watched.insert(peer);
    }

    /// Those with whom something is under way.
    pub(super) fn watched(&self) -> impl Iterator<Item = &Member> {
        self.watched.iter().filter_map(|peer| self.members.get(peer))
    }

    /// Calls it for each of them; with whom nothing is any more is left out from now on.
    pub(super) fn retain_watched(&mut self, mut look: impl FnMut(PeerId, &mut Member)) {
        let Self { members, watched, buckets: _, limit: _ } = self;
        watched.retain(|peer| {
            let Some(member) = members.get_mut(peer) else { return false };
            look(*peer, member);
            !member.connections.is_idle() || !member.suspected_by.is_empty()
        });
    }

    /// Those that answer over a connection.
    pub(super) fn neighbours(&self) -> impl Iterator<Item = &Member> {
        self.watched().filter(|member| member.connections.is_answering())
    }

    pub(super) fn is_full(&self) -> bool {
        self.members.len() >= self.limit
    }

    /// Something of what stands in its mark has changed.
    pub(super) fn update_bucket(&mut self, peer: PeerId) {
        let Some(member) = self.members.get_mut(&peer) else { return };
        let hash = member.mark().map_or(0, |mark| hash_of(&mark));
        let bucket = &mut self.buckets[bucket_of(peer)];
        *bucket = bucket.wrapping_sub(member.hash).wrapping_add(hash);
        member.hash = hash;
    }

    pub(super) fn remove(&mut self, peer: PeerId) {
        if let Some(member) = self.members.remove(&peer) {
            let bucket = &mut self.buckets[bucket_of(peer)];
            *bucket = bucket.wrapping_sub(member.hash);
        }
    }

    /// The hashes, with our own mark among them.
    pub(super) fn buckets(&self, own: Option<&MemberSummary>) -> Vec<u64> {
        let mut buckets = self.buckets.clone();
        if let Some(own) = own {
            let bucket = &mut buckets[bucket_of(own.peer)];
            *bucket = bucket.wrapping_add(hash_of(own));
        }
        buckets
    }

    /// The marks of the buckets that differ from these.
    pub(super) fn differing_marks(&self, theirs: &[u64], own: Option<&MemberSummary>) -> Vec<MemberSummary> {
        let ours = self.buckets(own);
        let differs = |peer: PeerId| {
            let bucket = bucket_of(peer);
            theirs.get(bucket) != Some(&ours[bucket])
        };
        let members = self.members.iter().filter(|(peer, _)| differs(**peer)).filter_map(|(_, member)| member.mark());
        members.chain(own.filter(|own| differs(own.peer)).cloned()).collect()
    }
}

fn bucket_of(peer: PeerId) -> usize {
    usize::from(peer.public_key()[0]) % BUCKETS
}

/// Sixty-four bits tell two marks apart by chance; neighbours who want to deceive each other can do so in simpler ways.
fn hash_of(mark: &MemberSummary) -> u64 {
    let MemberSummary { peer, epoch, version, incarnation, sequence, is_dead: down } = mark;
    let mut text = Vec::with_capacity(65);
    text.extend_from_slice(peer.public_key());
    for number in [epoch, version, incarnation, sequence] {
        text.extend_from_slice(&number.to_be_bytes());
    }
    text.push((*down).into());
    Digest::of(&text).as_bytes()[..8].iter().fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}
