//! Ends of containerd's silent connections.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::{PodController, WorkResult};
use crate::decide::pods::Input;
use crate::decide::stalled_connections::{TcpConnection, stalled_connections};
use crate::ports::{ConnectionsError, PullConnections};

/// Result of one search.
pub(super) struct EndedConnections {
    ended: Vec<TcpConnection>,
    error: Option<ConnectionsError>,
}

impl PodController {
    pub(super) fn spawn_end_of_connections(&mut self, after: Duration, silent_before: BTreeSet<SocketAddr>) {
        let Some(connections) = self.connections.clone() else { return };
        self.work
            .spawn(async move { WorkResult::ConnectionsEnded(end_silent(connections, after, silent_before).await) });
    }

    pub(super) fn record_ended_connections(&mut self, outcome: EndedConnections) -> Input {
        let EndedConnections { ended, error } = outcome;
        for connection in &ended {
            self.metrics.stalled_connection("ended");
            let (remote, silent_s) = (connection.remote, connection.silent_for.as_secs());
            tracing::warn!(
                %remote, silent_s,
                "containerd's connection was silent and was ended, so that its pull fails"
            );
        }
        if let Some(error) = error {
            self.metrics.stalled_connection("failed");
            let error = error.to_string();
            if self.logged_connections_error.as_ref() != Some(&error) {
                tracing::warn!(
                    error,
                    "a stalled pull cannot be ended; containerd ends it after image_pull_progress_timeout"
                );
                self.logged_connections_error = Some(error);
            }
        }
        Input::ConnectionsEnded(ended)
    }
}

async fn end_silent(
    connections: Arc<dyn PullConnections>,
    after: Duration,
    silent_before: BTreeSet<SocketAddr>,
) -> EndedConnections {
    let open_connections = match connections.connections().await {
        Ok(open_connections) => open_connections,
        Err(error) => return EndedConnections { ended: Vec::new(), error: Some(error) },
    };
    let mut outcome = EndedConnections { ended: Vec::new(), error: None };
    for connection in stalled_connections(&open_connections, after, &silent_before) {
        match connections.end(&connection).await {
            Ok(true) => outcome.ended.push(connection),
            // The connection ended by itself meanwhile.
            Ok(false) => {}
            Err(error) => {
                outcome.error = Some(error);
                break;
            }
        }
    }
    outcome
}
