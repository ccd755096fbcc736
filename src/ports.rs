//! What the agent asks of the world, as small traits with small errors. Adapters keep these contracts; the tests in
//! `src/testing/contract.rs` say what they are and run on every store, in memory or real.
//!
//! Not here: how any of it is done. An error answers the caller's next question: try again? another peer? whose fault?

mod admission;
mod claims;
mod cluster;
mod connections;
mod content;
mod control;
mod fetch;
mod notify;
mod own_image;
mod pieces;
mod registry;
mod retain;
mod unpack;

pub use admission::{Admission, Admitted, LEEWAY, Refusal};
pub use claims::{ClaimError, Claims};
pub use cluster::{
    Annotations, Cluster, ClusterError, KubeletEvent, NamespaceView, NodeReport, NodeReportKind, PodEvent, PodReport,
    PullSecret, ReportKind,
};
pub use connections::{ConnectionsError, PullConnections};
pub use content::{
    BlobInfo, BlobReader, BlobSink, BlobWriter, Child, ChildKind, ContentStore, ImageRecord, Imports, Pin, Remembered,
    Snapshots, StoreError,
};
pub use control::{
    BlobAccess, ClockStatus, ContainerdStatus, ImagesStatus, LayerStatus, MAX_MEMBERS, MAX_NAMES, MeshSource,
    NextImageStatus, OutageStatus, OwnImageStatus, PullFailure, PullProgress, PullRequest, RecoveryStatus,
    RetainedStatus, RulesFileStatus, Status, StatusSource, UdpStatus,
};
pub use fetch::{FetchError, Fetcher};
pub use notify::{MAX_PODS, Notification, Notifier, NotifyError};
pub use own_image::{OwnDaemonSet, ProtectedImages};
pub use pieces::{
    Following, Heard, NoPartials, Partial, Partials, PieceError, PieceFetcher, PieceSink, STAGED_LIFE, Staged,
};
pub use registry::{BlobError, Registry, RegistryError};
pub use retain::{ContentEvent, LayerLease, LayerLeases, Origin};
pub use unpack::{UnpackError, Unpacked, Unpacker};
