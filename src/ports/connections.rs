//! The TCP connections on which containerd waits for registries.

use async_trait::async_trait;

use crate::decide::stalled_connections::{TcpConnection, TcpConnections};

/// Lists and ends containerd's TCP connections.
#[async_trait]
pub trait PullConnections: Send + Sync {
    /// Lists the connections of containerd, and of nothing else on the node.
    ///
    /// # Errors
    /// [`ConnectionsError`].
    async fn connections(&self) -> Result<TcpConnections, ConnectionsError>;

    /// Ends a connection like a fault of the network: containerd's next read fails, and the other
    /// end receives a reset. Returns `false` when the connection had ended before.
    ///
    /// # Errors
    /// [`ConnectionsError`].
    async fn end(&self, connection: &TcpConnection) -> Result<bool, ConnectionsError>;
}

/// Reason for connections that could not be listed or ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionsError {
    /// containerd's connections look like those of other programs here. The text names the remedy.
    #[error("containerd's connections cannot be distinguished from those of other programs: {0}")]
    Indistinguishable(String),
    /// containerd does not return its process ID.
    #[error("containerd does not return its process ID: {0}")]
    Containerd(#[from] super::StoreError),
    /// The kernel refuses (`EPERM`: the agent needs NET_ADMIN; `EOPNOTSUPP`: the kernel lacks
    /// `CONFIG_INET_DIAG_DESTROY`).
    #[error("the kernel: {0} (required: NET_ADMIN, the node's network and CONFIG_INET_DIAG_DESTROY)")]
    Kernel(#[from] std::io::Error),
}
