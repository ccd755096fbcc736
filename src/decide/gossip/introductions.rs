//! The introductions of members. This agent publishes its own introduction, and verifies those of
//! other members.

use super::fault::GossipFault;
use std::net::SocketAddr;
use std::time::Instant;

use rand::Rng;

use super::membership::LONGEST_LIFE;
use super::membership_table::{Liveness, Member};
use super::peer_score::INTRODUCTION_LIMIT;
use super::{
    CredentialRejection, CredentialVerifier, GRAFT_DELAY, GossipVerdict, Output, Presence, Protocol, VerifiedCredential,
};
use crate::decide::inventory::Inventory;
use crate::model::{Credential, Gossip, Introduction, Peer, Profile, Zone};

/// Most keys that count for one pod: the present key, and a key from before the key file was lost.
const MAX_KEYS_OF_POD: usize = 2;

impl<N: CredentialVerifier> Protocol<N> {
    /// Sets the introduction's contents, and publishes an introduction if the contents changed.
    /// Before the first call, this agent publishes nothing.
    pub fn introduce(
        &mut self,
        credential: Credential,
        transfer: SocketAddr,
        gossip: SocketAddr,
        zone: Option<Zone>,
        now: Instant,
    ) {
        let presence = Presence { credential, transfer, gossip, zone };
        if self.presence.as_ref() != Some(&presence) {
            self.presence = Some(presence);
            self.publish_introduction(now);
        }
    }

    /// Publishes this agent's introduction in a new version.
    fn publish_introduction(&mut self, now: Instant) {
        let Some(Presence { credential, transfer, gossip, zone }) = self.presence.clone() else { return };
        let version = self.introduction.as_ref().map_or(0, |before| before.profile.version) + 1;
        let profile = Profile {
            peer: self.local.peer,
            epoch: self.log.epoch(),
            version,
            node: self.local.node.clone(),
            zone,
            release: self.local.release.clone(),
            transfer,
            gossip,
        };
        let mut introduction = Introduction { profile, credential, signature: [0; 64].into() };
        introduction.signature = self.verifier.sign(&introduction.signed_bytes());
        self.introduction = Some(introduction.clone());
        self.introduce_at = None;
        if self.membership.neighbors().next().is_some() {
            self.push_output(Output::Publish(Gossip::Introduction(introduction)));
        } else {
            self.introduce_at = Some(now + GRAFT_DELAY);
        }
    }

    /// Publishes a due introduction once there is a neighbor.
    pub(super) fn publish_introduction_if_due(&mut self, now: Instant) {
        let has_neighbors = self.membership.neighbors().next().is_some();
        if has_neighbors && self.introduce_at.is_some_and(|at| at <= now) {
            self.publish_introduction(now);
        }
    }

    /// Handles an introduction, from gossip or from a reply.
    pub(super) fn receive_introduction(
        &mut self,
        introduction: Introduction,
        inventory: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let profile = &introduction.profile;
        let peer = profile.peer;
        if peer != self.local.peer {
            if self.member(peer).is_some_and(|member| member.score.is_banned(now)) {
                return GossipVerdict::Ignore("banned");
            }
            let known = self.member(peer).map_or((0, 0), Member::version);
            if (profile.epoch, profile.version) <= known {
                return GossipVerdict::Ignore("known");
            }
            if self.member(peer).is_none() && self.membership.is_full() {
                self.over_limit += 1;
                return GossipVerdict::Ignore("full");
            }
        }
        if !self.verifier.is_signed(peer, &introduction.signed_bytes(), &introduction.signature) {
            return GossipVerdict::Reject(GossipFault::Forged);
        }
        if peer == self.local.peer {
            if profile.node != self.local.node {
                self.push_output(Output::SharedKey(profile.node.clone()));
            }
            self.supersede_earlier_process(&introduction, now);
            return GossipVerdict::Ignore("own");
        }
        let is_within = self
            .membership
            .get_mut(peer)
            .is_none_or(|member| member.score.introductions.try_take(1, INTRODUCTION_LIMIT, now));
        if !is_within {
            return GossipVerdict::Ignore("too_many");
        }
        match self.verifier.verify_credential(peer, &introduction.credential) {
            Ok(verified) if self.has_newer_keys(&introduction.profile, verified.pod.as_deref()) => {
                GossipVerdict::Ignore("newer_keys")
            }
            Ok(verified) => {
                self.apply_introduction(introduction, verified, inventory, now);
                self.missing_introductions.remove(&peer);
                GossipVerdict::Accept
            }
            // The credential may have expired on the way, or clocks differ.
            Err(CredentialRejection::Rejected) => GossipVerdict::Ignore("not_admitted"),
            Err(CredentialRejection::Undecided) => GossipVerdict::Ignore("undecided"),
        }
    }

    /// An introduction with this agent's key, from an earlier process whose clock was ahead.
    /// Members ignore smaller epochs, so this process takes a larger one.
    fn supersede_earlier_process(&mut self, introduction: &Introduction, now: Instant) {
        let epoch = introduction.profile.epoch;
        let ahead = epoch > self.log.epoch()
            || (epoch == self.log.epoch()
                && introduction.profile.version > self.introduction.as_ref().map_or(0, |known| known.profile.version));
        // A random step: yet another process of this node may have taken the next epoch.
        let leap = self.rng.random_range(1..1_000_000);
        if ahead && let Some(next) = epoch.checked_add(leap) {
            self.log.restart(next);
            self.introduction = None;
            self.incarnation = 0;
            self.publish_introduction(now);
        }
    }

    fn apply_introduction(
        &mut self,
        introduction: Introduction,
        verified: VerifiedCredential,
        inventory: &mut Inventory,
        now: Instant,
    ) {
        let Profile { peer: id, epoch, version: _, node, zone, release: _, transfer, gossip } =
            introduction.profile.clone();
        let VerifiedCredential { node: verified_node, pod, lifetime: life } = verified;
        let peer = Peer { id, node: verified_node.unwrap_or(node), zone, transfer, gossip };
        self.evict_older_keys_of_pod(&peer, pod.as_deref(), inventory, now);
        let member = self.membership.members.entry(id).or_insert_with(|| Member::new(peer.clone()));
        let new_process = member.epoch() != epoch;
        let moved = member.peer != peer;
        if new_process {
            self.mark_down(id, "its process restarted", inventory);
            self.behind.remove(&id);
            inventory.forget(id);
        }
        let Some(member) = self.membership.get_mut(id) else { return };
        member.introduction = Some(introduction);
        member.pod = pod;
        member.credential_until = Some(now + life.min(LONGEST_LIFE));
        member.peer = peer;
        if new_process {
            (member.log, member.refutation) = Default::default();
            member.suspected_by.clear();
            member.liveness = Liveness::Alive;
            member.connections.allow_dial_from(now);
        }
        self.chosen_is_stale |= moved || new_process;
        if moved && std::mem::take(&mut member.is_up) {
            // Reported up again, with the new addresses.
            self.mark_up_if_valid(id, inventory, now);
            if self.member(id).is_some_and(|member| !member.is_up) {
                inventory.hide(id);
                self.push_output(Output::Down(id, "the credential expired"));
            }
        }
        self.mark_up_if_valid(id, inventory, now);
        self.membership.update_bucket(id);
    }

    /// Whether [`MAX_KEYS_OF_POD`] newer keys of the pod are members already.
    fn has_newer_keys(&self, profile: &Profile, pod: Option<&str>) -> bool {
        let of_pod = |member: &&Member| pod.is_some() && member.pod.as_deref() == pod && member.peer.id != profile.peer;
        let is_newer = |member: &&Member| (member.epoch(), member.peer.id) > (profile.epoch, profile.peer);
        self.membership.members.values().filter(of_pod).filter(is_newer).count() >= MAX_KEYS_OF_POD
    }

    /// Removes all but the newest [`MAX_KEYS_OF_POD`] keys of a pod. An agent with a pod's rights
    /// can get credentials for key after key.
    fn evict_older_keys_of_pod(&mut self, peer: &Peer, pod: Option<&str>, inventory: &mut Inventory, now: Instant) {
        let (id, Some(pod)) = (peer.id, pod) else { return };
        let of_pod = self.membership.members.values().filter(|member| member.pod.as_deref() == Some(pod));
        let mut others: Vec<_> =
            of_pod.filter(|member| member.peer.id != id).map(|member| (member.epoch(), member.peer.id)).collect();
        others.sort_unstable();
        let too_many = (others.len() + 1).saturating_sub(MAX_KEYS_OF_POD);
        for (_, other) in others.into_iter().take(too_many) {
            if let Some(banned) = self.member(other).map(|member| &member.score).filter(|score| score.is_banned(now)) {
                // The newer key inherits the ban.
                let score = banned.clone();
                let successor = self.membership.members.entry(id).or_insert_with(|| Member::new(peer.clone()));
                successor.score = score;
            }
            self.mark_down(other, "the pod has newer keys", inventory);
            self.remove_member(other, inventory, now);
        }
    }
}
