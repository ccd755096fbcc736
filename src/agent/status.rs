//! How this agent is, for the person who asks: put together from what its parts know, at once and without asking anybody.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::watch;

use super::by_hand::names;
use super::holders::Holders;
use super::progress::Board;
use crate::model::{NodeName, Outage, OutageKind, PeerId};
use crate::ports::{
    ContainerdStatus, ImagesStatus, MAX_NAMES, MAX_PEERS, OutageStatus, PeerStatus, PeersStatus, RecoveryStatus,
    RulesFileStatus, Status, StatusSource,
};

/// What peers say about registries, taken into account: each of them may name many, and a person reads few.
const MAX_OUTAGES: usize = 4096;

/// Registries that are told of. More are down only where the network is.
const MAX_REGISTRIES: usize = 64;

/// Asks the parts of one agent.
pub struct AgentStatus {
    /// This node.
    pub node: NodeName,
    /// This agent.
    pub me: PeerId,
    /// Who holds what.
    pub holders: Holders,
    /// Recoveries.
    pub board: Board,
    /// What containerd told, as far as it did; `None` with another store.
    pub containerd: Option<watch::Receiver<ContainerdStatus>>,
    /// What was last announced; `None` inside before the first time.
    pub images: watch::Receiver<Option<ImagesStatus>>,
    /// The registries that this node itself cannot reach.
    pub first_hand: watch::Receiver<Vec<Outage>>,
    /// The rules file; `None` when there is none to watch.
    pub rules_file: Option<watch::Receiver<RulesFileStatus>>,
}

impl StatusSource for AgentStatus {
    fn status(&self) -> Status {
        Status {
            node: Some(self.node.to_string()),
            peer_id: Some(self.me.to_string()),
            version: Some(env!("CARGO_PKG_VERSION").into()),
            containerd: self.containerd.as_ref().map(|told| told.borrow().clone()),
            peers: Some(self.peers()),
            images: self.images.borrow().clone(),
            registries_down: Some(self.registries_down()),
            recoveries: Some(self.recoveries()),
            rules_file: self.rules_file.as_ref().map(|file| file.borrow().clone()),
        }
    }
}

impl AgentStatus {
    fn peers(&self) -> PeersStatus {
        let peers = self.holders.peers();
        let connected = peers.len();
        let mut named: Vec<_> = peers
            .into_iter()
            .map(|peer| PeerStatus { node: peer.node.to_string(), peer_id: peer.id.to_string() })
            .collect();
        named.sort();
        named.truncate(MAX_PEERS);
        PeersStatus { connected, named }
    }

    /// By registry and by how it fails: each node has its own moment, and the earliest counts.
    fn registries_down(&self) -> Vec<OutageStatus> {
        let mut known: BTreeMap<(String, OutageKind), (u64, BTreeSet<String>)> = BTreeMap::new();
        let mut note = |outage: Outage, nodes: Vec<String>| {
            let (since, said_by) =
                known.entry((outage.registry, outage.kind)).or_insert((outage.since, BTreeSet::new()));
            *since = outage.since.min(*since);
            said_by.extend(nodes);
        };
        for outage in self.first_hand.borrow().iter() {
            note(outage.clone(), vec![self.node.to_string()]);
        }
        for (outage, peers) in self.holders.outages(MAX_OUTAGES) {
            note(outage, peers.into_iter().map(|peer| self.holders.node_of(peer)).collect());
        }
        let told = known.into_iter().take(MAX_REGISTRIES);
        told.map(|((registry, kind), (since, said_by))| OutageStatus {
            registry,
            how: kind.to_string(),
            since,
            said_by: said_by.into_iter().take(MAX_NAMES).collect(),
        })
        .collect()
    }

    fn recoveries(&self) -> Vec<RecoveryStatus> {
        let running = self.board.running().into_iter();
        let recovery = |(reference, progress): (crate::oci::Reference, std::sync::Arc<super::progress::Progress>)| {
            let (done, total) = progress.sums();
            let from: BTreeSet<_> = progress.blobs().into_values().filter_map(|blob| blob.from).collect();
            RecoveryStatus { image: reference.to_string(), done, total, from: names(&self.holders, from).0 }
        };
        running.map(recovery).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::plan::Plan;
    use crate::model::{ContentChange, MeshEvent, Peer};
    use crate::oci::{Descriptor, Digest};

    fn agent() -> AgentStatus {
        AgentStatus {
            node: "n1".parse().unwrap(),
            me: PeerId::from_public_key([9; 32]),
            holders: Holders::default(),
            board: Board::default(),
            containerd: None,
            images: watch::channel(None).1,
            first_hand: watch::channel(Vec::new()).1,
            rules_file: None,
        }
    }

    fn peer(agent: &AgentStatus, number: u8, outages: &[(&str, OutageKind, u64)]) {
        let (id, address) = (PeerId::from_public_key([number; 32]), "127.0.0.1:1".parse().unwrap());
        let node = format!("n{number}").parse().unwrap();
        agent.holders.apply(MeshEvent::Up(Peer { id, node, transfer: address, gossip: address }));
        let outage = |(registry, kind, since): &(&str, OutageKind, u64)| {
            ContentChange::RegistryDown(Outage { registry: (*registry).into(), kind: *kind, since: *since })
        };
        agent.holders.apply(MeshEvent::Snapshot(id, outages.iter().map(outage).collect()));
    }

    #[test]
    fn a_registry_is_down_since_the_first_who_says_so() {
        let agent = agent();
        peer(&agent, 3, &[("r.test", OutageKind::Refused, 300), ("a.test", OutageKind::Tls, 5)]);
        peer(&agent, 2, &[("r.test", OutageKind::Refused, 200)]);
        peer(&agent, 4, &[]);
        let status = agent.status();
        let down = |registry: &str, how: &str, since, said_by: &[&str]| OutageStatus {
            registry: registry.into(),
            how: how.into(),
            since,
            said_by: said_by.iter().map(ToString::to_string).collect(),
        };
        let expected =
            [down("a.test", "TLS fails", 5, &["n3"]), down("r.test", "connections are refused", 200, &["n2", "n3"])];
        assert_eq!(status.registries_down.unwrap(), expected);
        let peers = status.peers.unwrap();
        assert_eq!(peers.named.iter().map(|peer| peer.node.as_str()).collect::<Vec<_>>(), ["n2", "n3", "n4"]);
        assert_eq!(peers.connected, 3);
    }

    #[test]
    fn a_recovery_is_shown_while_it_runs() {
        let agent = agent();
        let reference = "r.test/a:1".parse().unwrap();
        let progress = agent.board.begin(&reference);
        let digest = Digest::of(b"");
        let blob = Descriptor { media_type: String::new(), digest, size: 7, platform: None, attestation: false };
        progress.expect(&Plan { there: Vec::new(), missing: vec![blob], withheld: Vec::new() });
        let expected = RecoveryStatus { image: "r.test/a:1".into(), done: 0, total: 7, from: Vec::new() };
        assert_eq!(agent.status().recoveries, Some(vec![expected]));
        agent.board.end(&reference, Err("gone".into()));
        assert_eq!(agent.status().recoveries, Some(Vec::new()));
    }
}
