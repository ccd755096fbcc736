//! A read view of the peers: the inventory, and whether UDP reaches them.

pub mod inventory_view;
pub mod udp_state;
