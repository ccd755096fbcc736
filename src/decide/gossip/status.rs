//! The state of the mesh as this agent sees it, for people.

use std::time::Instant;

use super::membership_table::Member;
use super::{CredentialVerifier, Protocol};
use crate::decide::inventory::Inventory;
use crate::model::{MemberState, MemberStatus, MeshStatus};

impl<N: CredentialVerifier> Protocol<N> {
    /// The status for people. The driver fills in the numbers of messages, which are zero here.
    pub fn status(&self, inventory: &Inventory, now: Instant) -> MeshStatus {
        let introduced = self.membership.members.values().filter(|member| member.introduction.is_some());
        let mut members: Vec<_> = introduced.map(|member| member_status(member, inventory, now)).collect();
        members.sort();
        let in_state = |state| members.iter().filter(|member| member.state == state).count();
        MeshStatus {
            node: self.local.node.to_string(),
            peer_id: self.local.peer.to_string(),
            release: self.local.release.to_string(),
            zone: self.presence.as_ref().and_then(|presence| Some(presence.zone.as_ref()?.to_string())),
            epoch: self.log.epoch(),
            sequence: self.log.sequence(),
            items: self.log.items().len(),
            alive: in_state(MemberState::Alive),
            suspected: in_state(MemberState::Suspected),
            down: in_state(MemberState::Down),
            banned: members.iter().filter(|member| member.banned_s.is_some()).count(),
            neighbors: members.iter().filter(|member| member.neighbor).count(),
            inventory_blobs: inventory.blobs(),
            inventory_bytes: inventory.bytes(),
            over_limit: self.over_limit,
            messages_in: 0,
            messages_out: 0,
            members,
        }
    }
}

fn member_status(member: &Member, inventory: &Inventory, now: Instant) -> MemberStatus {
    let Member { peer, introduction, .. } = member;
    let state = match member.is_dead() {
        true => MemberState::Down,
        false if member.suspected_by.is_empty() && member.is_up => MemberState::Alive,
        false => MemberState::Suspected,
    };
    MemberStatus {
        node: peer.node.to_string(),
        peer_id: peer.id.to_string(),
        zone: peer.zone.as_ref().map(ToString::to_string),
        release: introduction.as_ref().map(|known| known.profile.release.to_string()).unwrap_or_default(),
        address: peer.transfer.to_string(),
        state,
        neighbor: member.connections.is_answering(),
        items: inventory.items_of(peer.id),
        sequence: member.log.sequence(),
        behind: member.log.behind(),
        banned_s: member.score.banned_for(now).map(|left| left.as_secs()),
    }
}
