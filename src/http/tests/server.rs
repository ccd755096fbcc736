//! A server on loopback for tests of HTTP clients. The server records requests and sends any reply
//! that a test needs.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// A received request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReceivedRequest {
    /// `GET /path`.
    pub(crate) request_line: String,
    /// Names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl ReceivedRequest {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// The reply to a request.
pub(crate) enum Reply {
    /// Sends these bytes and closes the connection.
    Bytes(Vec<u8>),
    /// Never answers.
    Silence,
    /// Sends these bytes and then nothing more.
    Stall(Vec<u8>),
    /// Sends these bytes singly, at most a hundred a second.
    Trickle(Vec<u8>),
}

/// A reply with this status, these headers and this body.
pub(crate) fn reply(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut head = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n", body.len());
    head.extend(headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")));
    Reply::Bytes([head.as_bytes(), b"\r\n", body].concat())
}

/// A running server, which ends on drop.
pub(crate) struct HttpTestServer {
    port: u16,
    requests: Arc<Mutex<Vec<ReceivedRequest>>>,
    _serving: JoinSet<()>,
}

impl HttpTestServer {
    /// Starts a server without TLS.
    pub(crate) async fn start(answer: impl Fn(&ReceivedRequest) -> Reply + Send + Sync + 'static) -> Self {
        Self::serve(None, answer).await
    }

    /// Starts a server with TLS and a self-signed certificate for `127.0.0.1`, which is returned as
    /// PEM.
    pub(crate) async fn start_tls(
        answer: impl Fn(&ReceivedRequest) -> Reply + Send + Sync + 'static,
    ) -> (Self, String) {
        let (acceptor, pem) = acceptor(None);
        (Self::serve(Some(acceptor), answer).await, pem)
    }

    /// Starts a server with TLS that requires a certificate from clients.
    pub(crate) async fn start_requiring_client_certificate() -> Self {
        let verifier = |roots| {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap()
        };
        let (acceptor, _) = acceptor(Some(&verifier));
        Self::serve(Some(acceptor), |_| reply(200, &[], b"")).await
    }

    async fn serve(
        tls: Option<TlsAcceptor>,
        answer: impl Fn(&ReceivedRequest) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (requests, answer) = (Arc::<Mutex<Vec<ReceivedRequest>>>::default(), Arc::new(answer));
        let received = Arc::clone(&requests);
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (tls, received, answer) = (tls.clone(), Arc::clone(&received), Arc::clone(&answer));
                open.spawn(async move {
                    match tls {
                        None => serve_connection(stream, &received, &*answer).await,
                        Some(acceptor) => {
                            let Ok(stream) = acceptor.accept(stream).await else { return };
                            serve_connection(stream, &received, &*answer).await;
                        }
                    }
                });
            }
        });
        Self { port, requests, _serving: serving }
    }

    /// `127.0.0.1:port`.
    pub(crate) fn host_port(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn requests(&self) -> Vec<ReceivedRequest> {
        self.requests.lock().clone()
    }

    /// The request lines, in order.
    pub(crate) fn request_lines(&self) -> Vec<String> {
        self.requests().into_iter().map(|seen| seen.request_line).collect()
    }
}

type ClientVerifier = Arc<dyn rustls::server::danger::ClientCertVerifier>;

fn acceptor(clients: Option<&dyn Fn(rustls::RootCertStore) -> ClientVerifier>) -> (TlsAcceptor, String) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.key_pair.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(verifier) => {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(made.cert.der().clone()).unwrap();
            builder.with_client_cert_verifier(verifier(roots))
        }
    };
    let config = builder.with_single_cert(vec![made.cert.der().clone()], key.into()).unwrap();
    (TlsAcceptor::from(Arc::new(config)), made.cert.pem())
}

/// Serves one request. An error of the client ends the connection.
async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    received: &Mutex<Vec<ReceivedRequest>>,
    answer: &(dyn Fn(&ReceivedRequest) -> Reply + Send + Sync),
) {
    let mut stream = BufReader::new(stream);
    // A TLS record: a plain server answers a TLS record as a bad request.
    if matches!(stream.fill_buf().await, Ok([0x16, ..])) {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        let _ = stream.shutdown().await;
        return;
    }
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if !matches!(stream.read_line(&mut line).await, Ok(1..)) {
            return;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let request_line = lines.remove(0).trim_end_matches(" HTTP/1.1").to_owned();
    let split = |line: &String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let headers: BTreeMap<_, _> = lines.iter().filter_map(split).collect();
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    if stream.read_exact(&mut body).await.is_err() {
        return;
    }
    let request = ReceivedRequest { request_line, headers, body };
    received.lock().push(request.clone());
    match answer(&request) {
        Reply::Silence => std::future::pending().await,
        Reply::Stall(bytes) => {
            let _ = stream.write_all(&bytes).await;
            std::future::pending().await
        }
        Reply::Trickle(bytes) => {
            for byte in bytes {
                let _ = stream.write_all(&[byte]).await;
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        }
        Reply::Bytes(bytes) => {
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
        }
    }
}
