//! The nouns that every floor shares: who a peer is, what a pod looks like to us.
//!
//! Not here: anything of OCI (that is [`crate::oci`]), anything that talks to anybody.

mod content;
mod lease;
mod outage;
mod peer;
mod pod;

pub use content::{ContentChange, MAX_ITEMS, MeshEvent};
pub use lease::{LeaseSnapshot, LeaseVersion};
pub use outage::{Outage, OutageKind};
pub use peer::{Credential, NodeName, NodeNameError, Peer, PeerId, PeerIdError};
pub use pod::{ContainerKind, ContainerView, ImageVolume, Owner, PodRef, PodView, PullPolicy, Waiting};
