//! The outside world as small traits with small errors. Adapters implement these traits. The
//! contract tests in `src/testing/contract.rs` run on every store, in memory or real.
//!
//! An error answers the caller's next question: retry? another peer? whose fault?

mod admission;
mod claims;
mod cluster;
mod connections;
mod content_store;
mod dialer;
mod fetcher;
mod layer_leases;
mod mesh;
mod notifier;
mod own_image;
mod pieces;
mod registry;
mod unpacker;

pub use admission::{Admission, AdmittedPeer, LEEWAY, Rejection};
pub use claims::{ClaimError, Claims};
pub use cluster::{Cluster, ClusterError, NodeReport, NodeReportKind, Nodes, PodReader, PodWriter, PullSecret};
pub use connections::{ConnectionsError, PullConnections};
pub use content_store::{
    BlobInfo, BlobMetadata, BlobReader, Blobs, Child, ChildKind, ContentStore, ImageRecord, ImageRecords,
    ImportPermission, Pin, Pins, Snapshots, StoreDisks, StoreError, verify_document,
};
pub use dialer::{DialError, Dialer, ProbeError, Prober};
pub use fetcher::{BlobSink, FetchError, Fetcher};
pub use layer_leases::{ContentEvent, LayerLease, LayerLeases, Origin};
pub use mesh::{MAX_STATUS_MEMBERS, MembershipEvent, MeshCommands, MeshSource};
pub use notifier::{MAX_PODS, Notification, Notifier, NotifyError};
pub use own_image::{OwnDaemonSet, ProtectedImages};
pub use pieces::{
    NoPartialBlobs, PartialBlob, PartialBlobs, PieceError, PieceMapUpdates, PieceSink, STAGED_BLOB_LIFE, StagedBlob,
    StateSink,
};
pub use registry::{Registry, RegistryError, RegistryFetchError};
pub use unpacker::{UnpackError, UnpackOutcome, Unpacker};
