//! What this agent sees of its peers: a read view of the inventory, and whether UDP reaches them.

pub mod inventory_view;
pub mod udp_state;
