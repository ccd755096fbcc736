//! containerd's TCP connections, found by containerd's cgroup.
//!
//! The kernel stores the cgroup of the process that creates a socket, and lists sockets with their
//! cgroup. So the agent needs neither the node's process IDs nor the right to trace: every user may
//! read the process files that the agent reads.

mod cgroup;
mod sock_diag;

use std::io;
use std::path::PathBuf;

use async_trait::async_trait;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use tokio::task::spawn_blocking;

use super::ContainerdStore;
use crate::decide::stalled_connections::{TcpConnection, TcpConnections};
use crate::ports::{ConnectionsError, PullConnections};

#[async_trait]
impl PullConnections for ContainerdStore {
    async fn connections(&self) -> Result<TcpConnections, ConnectionsError> {
        let pid = self.pid().await?;
        let Some(root) = self.state.introspection.host_root() else {
            return Err(ConnectionsError::Indistinguishable("the node's root file system is not mounted".into()));
        };
        blocking(move || {
            let cgroup = cgroup::containerd_cgroup(&root, pid).map_err(ConnectionsError::Indistinguishable)?;
            Ok(sock_diag::list(cgroup)?)
        })
        .await
    }

    async fn end(&self, connection: &TcpConnection) -> Result<bool, ConnectionsError> {
        let connection = *connection;
        blocking(move || Ok(sock_diag::destroy(&connection)?)).await
    }
}

impl ContainerdStore {
    /// containerd's process ID in the node's PID namespace.
    async fn pid(&self) -> Result<u64, ConnectionsError> {
        let mut client = IntrospectionClient::new(self.client.channel());
        let answer = self.client.call(client.server(())).await.map_err(|status| self.client.store_error(&status))?;
        Ok(answer.pid)
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ConnectionsError> + Send + 'static,
) -> Result<T, ConnectionsError> {
    spawn_blocking(work).await.unwrap_or_else(|panicked| Err(io::Error::other(panicked).into()))
}

/// Path of a node's file below `root`.
fn below(root: &std::path::Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}
