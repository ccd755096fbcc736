//! The nouns that every floor shares: who a peer is, what a pod looks like to us, what agents say to each other.
//!
//! Not here: anything of OCI (that is [`crate::oci`]), anything that talks to anybody.

mod bits;
mod content;
mod gossip;
mod lease;
mod mesh_status;
mod mesh_table;
mod outage;
mod peer;
mod pieces;
mod pod;

pub use bits::Bits;
pub use content::{ContentChange, Item, MAX_CHANGES, MAX_ITEMS, MeshEvent, changes_digest, state_digest};
pub use gossip::{
    Entry, Farewell, Gossip, Head, Introduction, MAX_MEMBERS, Mark, NameError, Profile, Question, Refutation, Release,
    Reply, Signature, Snapshot, Suspicion, Zone,
};
pub use lease::{LeaseSnapshot, LeaseVersion};
pub use mesh_status::{MemberState, MemberStatus, MeshStatus};
pub use outage::{Outage, OutageKind};
pub use peer::{Credential, NodeName, NodeNameError, Peer, PeerId, PeerIdError};
pub use pieces::{Availability, MAX_CHOICE, MAX_NEWS, Order};
pub use pod::{ContainerKind, ContainerView, ImageVolume, Owner, PodRef, PodView, PullPolicy, Waiting};
