//! A cluster that has been running for long.

use std::time::Duration;

use lighterman::decide::inventory::Inventory;
use lighterman::model::Item;

use super::Mesh;
use super::router::NodeNumber;

/// Until nodes have met their neighbours, and gossipsub's heartbeats have made a mesh of them.
const MEETING: Duration = Duration::from_secs(30);

impl Mesh {
    /// Everybody knows everybody and everything, and has its neighbours.
    pub(crate) fn converged(nodes: usize, images: usize, images_each: usize, seed: u64) -> Self {
        let mut mesh = Self::new(nodes, images, images_each, seed);
        for node in 0..nodes {
            // The usual seed is the headless Service, which gives any addresses.
            mesh.start(node, &[(node + 1) % nodes, (node + nodes / 2) % nodes]);
            mesh.tell_nobody(node);
        }
        let everything = mesh.everything();
        for node in 0..nodes {
            mesh.acquaint(node, &everything);
        }
        mesh.run_for(MEETING);
        mesh
    }

    /// It makes its log's entries, which nobody hears.
    fn tell_nobody(&mut self, node: NodeNumber) {
        let Some(agent) = &mut self.nodes[node].agent else { return };
        agent.protocol.have_told();
        while agent.protocol.next().is_some() {}
    }

    fn everything(&self) -> Inventory {
        let mut table = Inventory::default();
        for node in &self.nodes {
            table.up(node.peer.clone());
            let items: Vec<Item> = node.held.iter().map(|item| self.catalogue.item(*item).clone()).collect();
            assert_eq!(table.replace(node.peer.id, items), 0, "nobody holds too much");
        }
        table
    }

    fn acquaint(&mut self, node: NodeNumber, everything: &Inventory) {
        let now = self.instant();
        let Some(mut agent) = self.nodes[node].agent.take() else { return };
        for other in &self.nodes {
            if let Some(other) = &other.agent {
                agent.protocol.acquaint(&other.protocol, &mut agent.table, now);
            }
        }
        agent.table = everything.clone();
        agent.table.forget(self.nodes[node].peer.id);
        while agent.protocol.next().is_some() {}
        self.nodes[node].agent = Some(agent);
    }
}
