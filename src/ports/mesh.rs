//! The mesh as other parts of the agent see it.

use async_trait::async_trait;

use crate::model::MeshStatus;

/// Most members in a status: as many nodes as Kubernetes supports. At some 300 bytes each that is
/// 1.5 MiB, and 3 MiB with names of the longest kind.
pub const MAX_STATUS_MEMBERS: usize = 5000;

/// Returns the status of the mesh.
#[async_trait]
pub trait MeshSource: Send + Sync + 'static {
    /// Current status with at most [`MAX_STATUS_MEMBERS`] members, by node; `None` when the mesh
    /// does not answer within a second.
    async fn mesh(&self) -> Option<MeshStatus>;
}
