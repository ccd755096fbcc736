//! The nouns that every floor shares: peers, pods, gossip messages, inventory items, and pieces.
//!
//! Not here: the types of OCI ([`crate::oci`]), and everything that does I/O.

mod bits;
mod gossip;
mod inventory;
mod kubernetes;
mod lease;
mod mesh_status;
mod outage;
mod peer;
mod pieces;
mod pod;
mod pod_report;
mod recovery;

pub use bits::Bits;
pub use gossip::{
    Gossip, Introduction, InventorySnapshot, LeaveNotice, LogEntry, LogHead, MAX_MEMBERS, MemberSummary, NameError,
    Profile, Refutation, Release, Signature, Suspicion, SyncReply, SyncRequest, Zone,
};
pub use inventory::{InventoryChange, InventoryItem, MAX_CHANGES, MAX_ITEMS, MeshEvent, changes_digest, state_digest};
pub use kubernetes::{Annotations, KubeletEvent, NamespaceView, PodEvent};
pub use lease::{LeaseSnapshot, LeaseVersion};
pub use mesh_status::{MemberState, MemberStatus, MeshStatus};
pub use outage::{Outage, OutageKind};
pub use peer::{Credential, NodeName, NodeNameError, Peer, PeerId, PeerIdError};
pub use pieces::{MAX_HAVE_PIECES, MAX_REQUEST_PIECES, PieceMapUpdate, PieceRequest};
pub use pod::{ContainerKind, ContainerView, ImageVolume, Owner, PodRef, PodView, PullPolicy, WaitingState};
pub use pod_report::{PodReport, PodReportKind};
pub use recovery::{RecoveredImage, RecoveryOutcome, ResolvedImage};
