//! A proxy between an agent and the API server, so that a test can cut off one agent alone.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::apiserver::address;

/// Forwards connections until the proxy is cut or dropped.
pub(super) struct Proxy {
    port: u16,
    connections: JoinSet<()>,
}

impl Proxy {
    pub(super) async fn open() -> Self {
        Self::open_on(0).await
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Ends every connection and accepts no more. Returns the port, on which a later proxy can
    /// open.
    pub(super) async fn close(mut self) -> u16 {
        self.connections.shutdown().await;
        self.port
    }

    pub(super) async fn open_on(port: u16) -> Self {
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut connections = JoinSet::new();
        connections.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (mut from, _) = listener.accept().await.unwrap();
                open.spawn(async move {
                    let mut to = TcpStream::connect(address()).await.unwrap();
                    let _ = copy_bidirectional(&mut from, &mut to).await;
                });
            }
        });
        Self { port, connections }
    }
}
