//! What the agent asks of the world, as small traits with small errors. Adapters keep these contracts; the tests in
//! `src/testing/contract.rs` say what they are and run on every store, in memory or real.
//!
//! Not here: how any of it is done. An error answers the caller's next question: try again? another peer? whose fault?

mod admission;
mod claims;
mod cluster;
mod content;
mod fetch;

pub use admission::{Admission, Refusal};
pub use claims::{ClaimError, Claims};
pub use cluster::{Cluster, ClusterError, PodEvent, PodReport, ReportKind};
pub use content::{
    BlobInfo, BlobReader, BlobSink, BlobWriter, Child, ChildKind, ContentStore, ImageRecord, Pin, Remembered,
    StoreError,
};
pub use fetch::{FetchError, Fetcher};
