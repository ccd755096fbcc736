//! The admin port: metrics and health for probes and Prometheus, and the mesh page for operators.
//! This listener authenticates no client, so all pages are read-only and show no secret.

mod mesh;
mod mesh_table;
mod server;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::ports::MeshSource;
pub use mesh_table::{mesh_summary, mesh_table};
use server::LimitedServer;

/// A condition of readiness.
pub struct ReadinessCheck {
    /// The name in the response while the condition fails.
    pub name: &'static str,
    /// Whether the condition holds now.
    pub passes: watch::Receiver<bool>,
}

/// The admin server, bound but not serving yet.
pub struct AdminServer {
    server: LimitedServer,
}

struct AdminState {
    metrics: Metrics,
    checks: Vec<ReadinessCheck>,
    mesh: mesh::MeshPage,
}

/// Connections that the kernel completes before they are accepted. The limit of connections is
/// smaller, and the server accepts at once.
const BACKLOG: i32 = 128;

/// Binds the listener. `[::]` accepts IPv4 as well, independent of the node's
/// `net.ipv6.bindv6only`: the kubelet of a dual-stack node probes at the node's IPv4 address.
fn listener(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // Connections of the previous process, in TIME_WAIT, do not keep a restarted agent from
    // binding.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

impl AdminServer {
    /// Binds the port.
    ///
    /// # Errors
    /// The system's error, with the address.
    pub async fn bind(
        listen: SocketAddr,
        metrics: Metrics,
        checks: Vec<ReadinessCheck>,
        mesh: Arc<dyn MeshSource>,
    ) -> std::io::Result<Self> {
        let listener = listener(listen)
            .map_err(|error| std::io::Error::new(error.kind(), format!("admin port {listen}: {error}")))?;
        let router = Router::new()
            .route("/metrics", get(serve_metrics))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(serve_readiness))
            .route("/debug/mesh", get(mesh::serve_mesh))
            .with_state(Arc::new(AdminState { metrics: metrics.clone(), checks, mesh: mesh::MeshPage::new(mesh) }));
        Ok(Self { server: LimitedServer { listener, router, metrics } })
    }

    /// The bound address.
    ///
    /// # Errors
    /// The system's error.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.server.listener.local_addr()
    }

    /// Serves until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        self.server.run(stop).await;
    }
}

async fn serve_metrics(State(shared): State<Arc<AdminState>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], shared.metrics.render())
}

async fn serve_readiness(State(shared): State<Arc<AdminState>>) -> impl IntoResponse {
    let missing: Vec<_> =
        shared.checks.iter().filter(|check| !*check.passes.borrow()).map(|check| check.name).collect();
    if missing.is_empty() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", missing.join(", ")))
    }
}
