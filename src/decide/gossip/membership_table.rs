//! The membership table, and one hash for each bucket of members. By these hashes, two neighbors
//! find the members whose summaries differ.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::connections::MemberConnections;
use super::follower::LogFollower;
use super::peer_score::PeerScore;
use crate::model::{Introduction, MAX_MEMBERS, MemberSummary, Peer, PeerId, Refutation};
use crate::oci::Digest;

/// Buckets that two neighbors compare. With a thousand members, a difference in one bucket costs
/// sixteen summaries, some 700 bytes.
pub(super) const BUCKETS: usize = 64;

/// One other agent.
#[derive(Debug, Clone)]
pub(super) struct Member {
    /// The peer's addresses, as last known.
    pub(super) peer: Peer,
    /// The signed introduction; `None` after a handshake alone.
    pub(super) introduction: Option<Introduction>,
    /// UID of the pod that the credential is bound to, if any.
    pub(super) pod: Option<String>,
    /// End of the credential, as last verified.
    pub(super) credential_until: Option<Instant>,
    /// Since when the credential can be neither verified nor rejected.
    pub(super) undecided_since: Option<Instant>,
    /// End of the admission by handshake. An admitted member may connect.
    pub(super) admitted_until: Option<Instant>,
    pub(super) liveness: Liveness,
    /// Witnesses that suspect the member, in this epoch and incarnation.
    pub(super) suspected_by: BTreeSet<PeerId>,
    pub(super) suspected_since: Option<Instant>,
    /// The member's latest refutation.
    pub(super) refutation: Option<Refutation>,
    /// The member was reported as a peer to fetch from.
    pub(super) is_up: bool,
    pub(super) connections: MemberConnections,
    pub(super) log: LogFollower,
    pub(super) score: PeerScore,
    /// The member's share of its bucket's hash.
    hash: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Liveness {
    Alive,
    /// Other members have the member as dead, and the member answers this agent, since this time.
    /// Alive here; the summary still says dead, so a comparison shows the member what to refute.
    Contested(Instant),
    /// Confirmed dead or left, since this time.
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

    /// Epoch and version of the introduction; zeros without an introduction.
    pub(super) fn version(&self) -> (u64, u64) {
        self.introduction.as_ref().map_or((0, 0), |known| (known.profile.epoch, known.profile.version))
    }

    pub(super) fn epoch(&self) -> u64 {
        self.version().0
    }

    /// The incarnation in this epoch; 0 without a refutation.
    pub(super) fn incarnation(&self) -> u64 {
        self.refutation.as_ref().map_or(0, |refutation| refutation.incarnation)
    }

    pub(super) fn is_dead(&self) -> bool {
        matches!(self.liveness, Liveness::Dead(_))
    }

    /// The member answers this agent, which clears our suspicion. True when the state changed.
    pub(super) fn record_answer(&mut self, me: PeerId, now: Instant) -> bool {
        let was_suspected = self.suspected_by.remove(&me);
        let was_down = self.is_dead();
        if was_down {
            self.liveness = Liveness::Contested(now);
            self.suspected_by.clear();
        }
        if self.suspected_by.is_empty() {
            self.suspected_since = None;
        }
        was_suspected || was_down
    }

    /// Whether the member is introduced and its credential is valid.
    pub(super) fn has_valid_credential(&self, now: Instant) -> bool {
        self.introduction.is_some() && self.credential_until.is_some_and(|until| until > now)
    }

    /// Whether the member may connect: admitted in a handshake, with a credential, shown then or
    /// since, that is still valid.
    pub(super) fn is_admitted(&self, now: Instant) -> bool {
        let is_unexpired = self.admitted_until.is_some_and(|until| until > now || self.has_valid_credential(now));
        is_unexpired && !self.score.is_banned(now)
    }

    /// The summary for neighbors; `None` without an introduction.
    pub(super) fn summary(&self) -> Option<MemberSummary> {
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

#[derive(Debug, Clone)]
pub(super) struct MembershipTable {
    pub(super) members: BTreeMap<PeerId, Member>,
    /// Members with a connection, a dial or a suspicion: of a thousand members a few dozen. Every
    /// tick visits these.
    watched: BTreeSet<PeerId>,
    buckets: Vec<u64>,
    /// Most members at a time.
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

    /// Adds the member to those that every tick visits.
    pub(super) fn watch(&mut self, peer: PeerId) {
        self.watched.insert(peer);
    }

    /// Members with a connection, a dial or a suspicion.
    pub(super) fn watched(&self) -> impl Iterator<Item = &Member> {
        self.watched.iter().filter_map(|peer| self.members.get(peer))
    }

    /// Visits every watched member, and stops watching members without connection, dial or
    /// suspicion.
    pub(super) fn retain_watched(&mut self, mut visit: impl FnMut(PeerId, &mut Member)) {
        let Self { members, watched, buckets: _, limit: _ } = self;
        watched.retain(|peer| {
            let Some(member) = members.get_mut(peer) else { return false };
            visit(*peer, member);
            !member.connections.is_idle() || !member.suspected_by.is_empty()
        });
    }

    /// Members that answer over a connection.
    pub(super) fn neighbors(&self) -> impl Iterator<Item = &Member> {
        self.watched().filter(|member| member.connections.is_answering())
    }

    pub(super) fn is_full(&self) -> bool {
        self.members.len() >= self.limit
    }

    /// Updates the bucket's hash after a change of the member's summary.
    pub(super) fn update_bucket(&mut self, peer: PeerId) {
        let Some(member) = self.members.get_mut(&peer) else { return };
        let hash = member.summary().map_or(0, |summary| hash_of(&summary));
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

    /// The hashes of all buckets, this agent's own summary included.
    pub(super) fn buckets(&self, own: Option<&MemberSummary>) -> Vec<u64> {
        let mut buckets = self.buckets.clone();
        if let Some(own) = own {
            let bucket = &mut buckets[bucket_of(own.peer)];
            *bucket = bucket.wrapping_add(hash_of(own));
        }
        buckets
    }

    /// The summaries in the buckets that differ from these hashes.
    pub(super) fn differing_summaries(&self, theirs: &[u64], own: Option<&MemberSummary>) -> Vec<MemberSummary> {
        let ours = self.buckets(own);
        let differs = |peer: PeerId| {
            let bucket = bucket_of(peer);
            theirs.get(bucket) != Some(&ours[bucket])
        };
        let members =
            self.members.iter().filter(|(peer, _)| differs(**peer)).filter_map(|(_, member)| member.summary());
        members.chain(own.filter(|own| differs(own.peer)).cloned()).collect()
    }
}

fn bucket_of(peer: PeerId) -> usize {
    usize::from(peer.public_key()[0]) % BUCKETS
}

/// 64 bits keep two summaries apart by chance. A neighbor that wants to deceive has simpler means.
fn hash_of(summary: &MemberSummary) -> u64 {
    let MemberSummary { peer, epoch, version, incarnation, sequence, is_dead } = summary;
    let mut text = Vec::with_capacity(65);
    text.extend_from_slice(peer.public_key());
    for number in [epoch, version, incarnation, sequence] {
        text.extend_from_slice(&number.to_be_bytes());
    }
    text.push((*is_dead).into());
    Digest::of(&text).as_bytes()[..8].iter().fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}
