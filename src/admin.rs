//! The admin port: metrics and health, for probes and Prometheus, and the mesh, for people. The only listener that asks nobody who
//! they are, so it shows nothing secret and changes nothing.

mod mesh;
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
use server::LimitedServer;

/// Something that has to hold before the agent is ready.
pub struct ReadinessCheck {
    /// Shown when it does not hold.
    pub name: &'static str,
    /// Whether it holds now.
    pub passes: watch::Receiver<bool>,
}

/// The admin server, bound and not yet serving.
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

/// `[::]` takes IPv4 as well, whatever `net.ipv6.bindv6only` of the node says: the kubelet of a
/// dual-stack node probes at its IPv4 address.
fn listener(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // An agent that is started again is not kept out by connections of the one before.
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
    /// As the system says, with the address.
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

    /// Where it really listens.
    ///
    /// # Errors
    /// As the system says.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.server.listener.local_addr()
    }

    /// Serves until stopped.
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
