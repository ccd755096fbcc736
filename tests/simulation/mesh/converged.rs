//! A cluster that has converged.

use std::time::Duration;

use lighterman::decide::inventory::Inventory;
use lighterman::model::InventoryItem;

use super::Mesh;
use super::gossipsub::NodeNumber;

/// Time in which nodes connect to their neighbors, and gossipsub's heartbeats build the mesh.
const CONNECT_TIME: Duration = Duration::from_secs(30);

impl Mesh {
    /// A cluster in which each inventory is complete and each node has neighbors.
    pub(crate) fn converged(nodes: usize, images: usize, images_each: usize, seed: u64) -> Self {
        let mut mesh = Self::new(nodes, images, images_each, seed);
        for node in 0..nodes {
            // A real agent gets arbitrary addresses from the headless Service.
            mesh.start(node, &[(node + 1) % nodes, (node + nodes / 2) % nodes]);
            mesh.discard_first_announcements(node);
        }
        let everything = mesh.full_inventory();
        for node in 0..nodes {
            mesh.preload_members(node, &everything);
        }
        mesh.run_for(CONNECT_TIME);
        mesh
    }

    /// Marks the entries of the node's log as published, without a message.
    fn discard_first_announcements(&mut self, node: NodeNumber) {
        let Some(agent) = &mut self.nodes[node].agent else { return };
        agent.protocol.mark_all_published();
        while agent.protocol.next().is_some() {}
    }

    fn full_inventory(&self) -> Inventory {
        let mut inventory = Inventory::default();
        for node in &self.nodes {
            inventory.up(node.peer.clone());
            let items: Vec<InventoryItem> = node.items.iter().map(|item| self.catalogue.item(*item).clone()).collect();
            assert_eq!(inventory.replace(node.peer.id, items), 0, "every node's content fits into the inventory");
        }
        inventory
    }

    fn preload_members(&mut self, node: NodeNumber, everything: &Inventory) {
        let now = self.instant();
        let Some(mut agent) = self.nodes[node].agent.take() else { return };
        for other in &self.nodes {
            if let Some(other) = &other.agent {
                agent.protocol.copy_log_position(&other.protocol, &mut agent.inventory, now);
            }
        }
        agent.inventory = everything.clone();
        agent.inventory.forget(self.nodes[node].peer.id);
        while agent.protocol.next().is_some() {}
        self.nodes[node].agent = Some(agent);
    }
}
