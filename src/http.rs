//! One HTTP request to a server outside the cluster, with a bound on every part of the response.
//!
//! Two adapters use this client: the registry's and the webhook's. One request is one connection:
//! no pool, no retry, no cookies, no compression, and no redirect followed. Proxies are not used
//! either: the client does not read `HTTPS_PROXY` and similar variables. The caller bounds the time
//! of a request by a timeout.

mod tls;

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderMap, HeaderValue, USER_AGENT};
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::AlertDescription;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::sleep;
use url::{Host, Url};

use crate::model::OutageKind;
pub use tls::TrustError;

const USER_AGENT_VALUE: &str = concat!("lighterman/", env!("CARGO_PKG_VERSION"));

/// Bytes of a response's head at most. Common servers send at most 8 to 16 KiB; a head with tokens
/// has a few more.
const MAX_HEAD: usize = 32 << 10;

/// Headers of a response at most: a registry behind a few proxies sends some twenty.
const MAX_HEADERS: usize = 100;

/// Addresses of a name that are tried at most. The big registries have about eight of each family.
const MAX_ADDRESSES: usize = 8;

/// Delay before the next address is tried beside a silent address (RFC 8305, "Connection Attempt
/// Delay").
const CONNECTION_ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// The certificates that the client accepts of an `https` server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Certificates {
    /// A certificate for the server's name, from a trusted authority.
    Verified,
    /// Any certificate. For a caller that sends no secret and trusts no response, or whose
    /// configuration permits any certificate.
    Any,
}

/// A request to send.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// The method.
    pub method: Method,
    /// An `http` or `https` URL. The client does not send the URL's user name and password.
    pub url: &'a Url,
    /// Headers besides `Host`, `User-Agent` and the body's length.
    pub headers: HeaderMap,
    /// The body; may be empty.
    pub body: Bytes,
    /// The accepted certificates.
    pub certificates: Certificates,
}

impl<'a> Request<'a> {
    /// A request without headers and body.
    pub fn new(method: Method, url: &'a Url, certificates: Certificates) -> Self {
        Self { method, url, headers: HeaderMap::new(), body: Bytes::new(), certificates }
    }
}

/// Why a request has no usable response.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// The server was not reached, or the connection ended before the response did.
    #[error("{kind} ({reason})")]
    Unreachable {
        /// The kind of the failure.
        kind: OutageKind,
        /// The error of the system or of TLS.
        reason: String,
    },
    /// The server answers only clients with a certificate.
    #[error("the server requires a client certificate")]
    ClientCertificateRequired,
    /// The response is not HTTP/1.1, or the head is too large.
    #[error("the answer is not HTTP: {0}")]
    NotHttp(String),
    /// The body exceeds the caller's limit.
    #[error("the answer has more than {0} bytes")]
    BodyTooLong(usize),
}

/// An HTTP client. The only state is the list of trusted authorities.
pub struct Client {
    verified: tokio_rustls::TlsConnector,
    any: tokio_rustls::TlsConnector,
}

/// The head of a response. The caller reads the body in chunks; a drop closes the connection.
pub struct HttpResponse {
    /// The status code.
    pub status: StatusCode,
    /// At most a hundred headers.
    pub headers: HeaderMap,
    body: Incoming,
    _connection: JoinSet<()>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Client {
    /// Trusts Mozilla's list of authorities and the authorities in `ca_file` (PEM, any number),
    /// which is read once.
    ///
    /// # Errors
    /// [`TrustError`] when the file cannot be used.
    pub fn new(ca_file: Option<&Path>) -> Result<Self, TrustError> {
        Ok(Self { verified: tls::verified_connector(ca_file)?, any: tls::unverified_connector() })
    }

    /// Sends the request and returns the response's head.
    ///
    /// # Errors
    /// [`HttpError`]. A response with any status is no error.
    pub async fn send(&self, request: Request<'_>) -> Result<HttpResponse, HttpError> {
        let Request { method, url, headers, body, certificates } = request;
        let stream = self.connect(url, certificates).await?;
        let mut builder = http1::Builder::new();
        builder.max_headers(MAX_HEADERS).max_buf_size(MAX_HEAD);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(HttpError::from_hyper)?;
        let mut connections = JoinSet::new();
        // An error of the connection is also the error of the request or of the body.
        connections.spawn(async move { drop(connection.await) });

        let mut message = hyper::Request::new(Full::new(body));
        *message.method_mut() = method;
        *message.uri_mut() =
            url[url::Position::BeforePath..url::Position::AfterQuery].parse().map_err(invalid_request)?;
        *message.headers_mut() = headers;
        let host = &url[url::Position::BeforeHost..url::Position::AfterPort];
        message.headers_mut().insert(HOST, HeaderValue::from_str(host).map_err(invalid_request)?);
        message.headers_mut().insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_VALUE));
        let (head, body) = sender.send_request(message).await.map_err(HttpError::from_hyper)?.into_parts();
        Ok(HttpResponse { status: head.status, headers: head.headers, body, _connection: connections })
    }

    /// Connects, with the TLS handshake for an `https` URL, and closes the connection.
    ///
    /// # Errors
    /// [`HttpError`].
    pub async fn probe(&self, url: &Url, certificates: Certificates) -> Result<(), HttpError> {
        self.connect(url, certificates).await.map(drop)
    }

    async fn connect(&self, url: &Url, certificates: Certificates) -> Result<Box<dyn Stream>, HttpError> {
        let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
            return Err(unreachable(OutageKind::NoSuchHost, "the URL names no host"));
        };
        let name = tls::server_name(&host).ok_or_else(|| unreachable(OutageKind::NoSuchHost, "not a host's name"))?;
        let stream = dial(host, port).await?;
        let connector = match (url.scheme(), certificates) {
            ("http", _) => return Ok(Box::new(stream)),
            (_, Certificates::Verified) => &self.verified,
            (_, Certificates::Any) => &self.any,
        };
        let stream = connector.connect(name, stream).await.map_err(|error| HttpError::from_io(&error))?;
        Ok(Box::new(stream))
    }
}

impl HttpResponse {
    /// The complete body, of at most `most` bytes.
    ///
    /// # Errors
    /// [`HttpError::BodyTooLong`], or [`HttpError::Unreachable`] when the connection ends before
    /// the body.
    pub async fn read(mut self, limit: usize) -> Result<Bytes, HttpError> {
        let mut read = BytesMut::new();
        while let Some(data) = self.chunk().await? {
            if read.len() + data.len() > limit {
                return Err(HttpError::BodyTooLong(limit));
            }
            read.extend_from_slice(&data);
        }
        Ok(read.freeze())
    }

    /// The next bytes of the body, 32 KiB at most; `None` at the end of the body.
    ///
    /// # Errors
    /// [`HttpError::Unreachable`] when the connection ends before the body.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, HttpError> {
        while let Some(frame) = self.body.frame().await {
            // A frame without data is a trailer.
            if let Ok(data) = frame.map_err(HttpError::from_hyper)?.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }
}

async fn dial(host: Host<&str>, port: u16) -> Result<TcpStream, HttpError> {
    match host {
        Host::Ipv4(address) => connect_first(vec![(address, port).into()]).await,
        Host::Ipv6(address) => connect_first(vec![(address, port).into()]).await,
        Host::Domain(name) => match lookup_host((name, port)).await {
            Ok(found) => connect_first(interleave_families(found.collect())).await,
            Err(error) => Err(unreachable(OutageKind::NoSuchHost, error)),
        },
    }
}

/// Connects to the first address that answers. The two families alternate, so that an unreachable
/// family does not use up the addresses. Each attempt begins [`CONNECTION_ATTEMPT_DELAY`] after the
/// previous attempt, and goes on beside the next. hyper-util's connector instead waits for each
/// address of a family, so that one silent address uses up half of a deadline or more.
async fn connect_first(addresses: Vec<SocketAddr>) -> Result<TcpStream, HttpError> {
    let mut attempts: FuturesUnordered<_> = (0_u32..)
        .zip(addresses.into_iter().take(MAX_ADDRESSES))
        .map(|(position, address)| async move {
            sleep(CONNECTION_ATTEMPT_DELAY * position).await;
            TcpStream::connect(address).await
        })
        .collect();
    let mut failure = unreachable(OutageKind::NoSuchHost, "the name has no address");
    while let Some(attempt) = attempts.next().await {
        match attempt {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = HttpError::from_io(&error),
        }
    }
    Err(failure)
}

/// Keeps the resolver's order within each family, and alternates the families.
fn interleave_families(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut interleaved = Vec::new();
    loop {
        let before = interleaved.len();
        interleaved.extend(first.next());
        interleaved.extend(second.next());
        if interleaved.len() == before {
            return interleaved;
        }
    }
}

fn unreachable(kind: OutageKind, reason: impl ToString) -> HttpError {
    HttpError::Unreachable { kind, reason: reason.to_string() }
}

/// A parsed URL cannot cause this error; the client returns an error instead of a panic.
fn invalid_request(error: impl Error) -> HttpError {
    HttpError::NotHttp(error.to_string())
}

impl HttpError {
    fn from_io(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            // TLS 1.3 has an alert for a missing certificate; servers with TLS 1.2 send the other
            // alert.
            Some(rustls::Error::AlertReceived(
                AlertDescription::CertificateRequired | AlertDescription::BadCertificate,
            )) => Self::ClientCertificateRequired,
            Some(failed) => unreachable(OutageKind::Tls, failed),
            None if error.kind() == io::ErrorKind::TimedOut => unreachable(OutageKind::TimedOut, error),
            None => unreachable(OutageKind::Refused, error),
        }
    }

    fn from_hyper(error: hyper::Error) -> Self {
        match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
            Some(failed) => Self::from_io(failed),
            None if error.is_parse() => Self::NotHttp(error.to_string()),
            // The server accepted and closed the connection, like a load balancer without backends.
            None => unreachable(OutageKind::Refused, error),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
