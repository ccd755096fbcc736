//! The agent's status for operators, collected from the parts of the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::agent::operator::manual_pull::node_names;
use crate::agent::peers::inventory_view::PeerInventory;
use crate::agent::recovery::progress::RecoveryTracker;
use crate::control::{
    ClockStatus, ContainerdStatus, ImagesStatus, LayerStatus, MAX_NAMES, OutageStatus, OwnImageStatus,
    PolicyFileStatus, RecoveryStatus, RetentionStatus, Status, StatusSource,
};
use crate::mesh::Mesh;
use crate::model::{MeshStatus, NodeName, Outage, OutageKind, PeerId};
use crate::ports::{MAX_STATUS_MEMBERS, MeshSource};

/// Outages of peers that are read. Each peer may announce many, and a reader needs few.
const MAX_OUTAGES: usize = 4096;

/// Registries in the status. More are down only when the whole network is.
const MAX_REGISTRIES: usize = 64;

/// Longest wait for the mesh. A healthy mesh answers within milliseconds.
const MESH_WAIT: Duration = Duration::from_secs(1);

/// Reads the mesh's status.
pub struct MeshView(pub Mesh);

#[async_trait]
impl MeshSource for MeshView {
    async fn mesh(&self) -> Option<MeshStatus> {
        let status = tokio::time::timeout(MESH_WAIT, self.0.status()).await.ok()??;
        Some(bound_members(status))
    }
}

fn bound_members(mut status: MeshStatus) -> MeshStatus {
    status.members.sort();
    status.members.truncate(MAX_STATUS_MEMBERS);
    status
}

/// Collects the status of one agent.
pub struct AgentStatus {
    /// This node.
    pub node: NodeName,
    /// This agent.
    pub own_peer: PeerId,
    /// Members of the mesh.
    pub mesh: Arc<dyn MeshSource>,
    /// Peers and their content.
    pub inventory: PeerInventory,
    /// Running recoveries.
    pub tracker: RecoveryTracker,
    /// containerd's version and settings, as far as containerd reported them; `None` with another
    /// store.
    pub containerd: Option<watch::Receiver<ContainerdStatus>>,
    /// This node's clock; `None` in the channel before the first comparison.
    pub clock: watch::Receiver<Option<ClockStatus>>,
    /// The last announcement; `None` in the channel before the first.
    pub images: watch::Receiver<Option<ImagesStatus>>,
    /// Retained layers; `None` in the channel where no layers are retained.
    pub retained: watch::Receiver<Option<RetentionStatus>>,
    /// Images of the agent's own DaemonSet; `None` in the channel where the agent does not manage
    /// them.
    pub own_image: watch::Receiver<Option<OwnImageStatus>>,
    /// Registries that this node itself found down.
    pub observed_outages: watch::Receiver<Vec<Outage>>,
    /// Status of the policy file; `None` without a policy file.
    pub policy_file: Option<watch::Receiver<PolicyFileStatus>>,
}

#[async_trait]
impl StatusSource for AgentStatus {
    async fn status(&self) -> Status {
        Status {
            node: Some(self.node.to_string()),
            peer_id: Some(self.own_peer.to_string()),
            version: Some(env!("CARGO_PKG_VERSION").into()),
            containerd: self.containerd.as_ref().map(|status| status.borrow().clone()),
            mesh: self.mesh.mesh().await,
            udp: Some(self.inventory.udp().status()),
            clock: self.clock.borrow().clone(),
            images: self.images.borrow().clone(),
            retained: self.retained.borrow().clone(),
            own_image: self.own_image.borrow().clone(),
            registries_down: Some(self.registries_down()),
            recoveries: Some(self.recoveries()),
            policy_file: self.policy_file.as_ref().map(|file| file.borrow().clone()),
        }
    }
}

impl AgentStatus {
    /// Outages by registry and kind. Nodes see an outage at different times, and the earliest
    /// counts.
    fn registries_down(&self) -> Vec<OutageStatus> {
        let mut outages: BTreeMap<(String, OutageKind), (u64, BTreeSet<String>)> = BTreeMap::new();
        let mut record_outage = |outage: Outage, nodes: Vec<String>| {
            let (since, reporting_nodes) =
                outages.entry((outage.registry, outage.kind)).or_insert((outage.since, BTreeSet::new()));
            *since = outage.since.min(*since);
            reporting_nodes.extend(nodes);
        };
        for outage in self.observed_outages.borrow().iter() {
            record_outage(outage.clone(), vec![self.node.to_string()]);
        }
        for (outage, peers) in self.inventory.outages(MAX_OUTAGES) {
            record_outage(outage, peers.into_iter().map(|peer| self.inventory.node_of(peer)).collect());
        }
        let listed = outages.into_iter().take(MAX_REGISTRIES);
        listed
            .map(|((registry, kind), (since, reporting_nodes))| OutageStatus {
                registry,
                how: kind.to_string(),
                since,
                said_by: reporting_nodes.into_iter().take(MAX_NAMES).collect(),
            })
            .collect()
    }

    fn recoveries(&self) -> Vec<RecoveryStatus> {
        let running = self.tracker.running().into_iter();
        let recovery = |(reference, progress): (
            crate::oci::Reference,
            std::sync::Arc<crate::agent::recovery::progress::Progress>,
        )| {
            let (done, total) = progress.byte_totals();
            let from: BTreeSet<_> = progress.blobs().into_values().flat_map(|blob| blob.from).collect();
            let unpacking = progress.unpacking().map(|(layer, of)| LayerStatus { layer, of });
            RecoveryStatus {
                image: reference.to_string(),
                done,
                total,
                unpacking,
                from: node_names(&self.inventory, from).0,
            }
        };
        running.map(recovery).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::plan::FetchPlan;
    use crate::model::{InventoryItem, MeshEvent, Peer};
    use crate::oci::{Descriptor, Digest};

    struct UnansweredMesh;

    #[async_trait]
    impl MeshSource for UnansweredMesh {
        async fn mesh(&self) -> Option<MeshStatus> {
            None
        }
    }

    fn agent() -> AgentStatus {
        AgentStatus {
            node: "n1".parse().unwrap(),
            own_peer: PeerId::from_public_key([9; 32]),
            mesh: Arc::new(UnansweredMesh),
            inventory: PeerInventory::default(),
            tracker: RecoveryTracker::default(),
            containerd: None,
            clock: watch::channel(None).1,
            images: watch::channel(None).1,
            retained: watch::channel(None).1,
            own_image: watch::channel(None).1,
            observed_outages: watch::channel(Vec::new()).1,
            policy_file: None,
        }
    }

    fn peer(agent: &AgentStatus, number: u8, outages: &[(&str, OutageKind, u64)]) {
        let (id, address) = (PeerId::from_public_key([number; 32]), "127.0.0.1:1".parse().unwrap());
        let node = format!("n{number}").parse().unwrap();
        agent.inventory.apply(MeshEvent::Up(Peer { id, node, zone: None, transfer: address, gossip: address }));
        let outage = |(registry, kind, since): &(&str, OutageKind, u64)| {
            InventoryItem::Outage(Outage { registry: (*registry).into(), kind: *kind, since: *since })
        };
        agent.inventory.apply(MeshEvent::Snapshot(id, outages.iter().map(outage).collect()));
    }

    #[tokio::test]
    async fn a_registry_is_down_since_the_earliest_outage_that_a_node_reports() {
        let agent = agent();
        peer(&agent, 3, &[("r.test", OutageKind::Refused, 300), ("a.test", OutageKind::Tls, 5)]);
        peer(&agent, 2, &[("r.test", OutageKind::Refused, 200)]);
        peer(&agent, 4, &[]);
        let status = agent.status().await;
        let outage_status = |registry: &str, how: &str, since, nodes: &[&str]| OutageStatus {
            registry: registry.into(),
            how: how.into(),
            since,
            said_by: nodes.iter().map(ToString::to_string).collect(),
        };
        let expected = [
            outage_status("a.test", "TLS fails", 5, &["n3"]),
            outage_status("r.test", "connections are refused", 200, &["n2", "n3"]),
        ];
        assert_eq!(status.registries_down.unwrap(), expected);
        assert_eq!(status.mesh, None, "a mesh that does not answer has no status");
    }

    #[test]
    fn members_are_sorted_by_node_and_bounded() {
        let member = |number: usize| crate::model::MemberStatus {
            node: format!("n{number:05}"),
            ..crate::model::MemberStatus::default()
        };
        let status = MeshStatus { members: (0..6000).rev().map(member).collect(), ..MeshStatus::default() };
        let members = bound_members(status).members;
        assert_eq!((members.len(), &*members[0].node, &*members[4999].node), (5000, "n00000", "n04999"));
    }

    #[tokio::test]
    async fn a_recovery_is_shown_while_it_runs() {
        let agent = agent();
        let reference = "r.test/a:1".parse().unwrap();
        let progress = agent.tracker.begin(&reference);
        let digest = Digest::of(b"");
        let blob = Descriptor { media_type: String::new(), digest, size: 7, platform: None, attestation: false };
        progress.set_plan(&FetchPlan { present: Vec::new(), missing: vec![blob], withheld: Vec::new() });
        progress.set_unpacking(1, 2);
        let unpacking = Some(LayerStatus { layer: 1, of: 2 });
        let expected = RecoveryStatus { image: "r.test/a:1".into(), done: 0, total: 7, unpacking, from: Vec::new() };
        assert_eq!(agent.status().await.recoveries, Some(vec![expected]));
        agent.tracker.end(&reference, Err("gone".into()));
        assert_eq!(agent.status().await.recoveries, Some(Vec::new()));
    }
}
