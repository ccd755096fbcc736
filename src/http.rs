//! One HTTP request to a server outside the cluster, with a bound on everything that comes back.
//!
//! For the two adapters that ask such servers: the registry's and the webhook's. One request is one connection: no pool, no second
//! try, no cookies, no compression, no redirect followed. Proxies are not used either: `HTTPS_PROXY` and its like are not read.
//! How long a request may take is the caller's business, who awaits it under a timeout.

#[cfg(test)]
pub(crate) mod test_server;
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

/// The most bytes of an answer's head. Common servers send at most 8 to 16 KiB; tokens in a header reach a few more.
const MAX_HEAD: usize = 32 << 10;

/// The most headers of an answer: a registry behind a few proxies sends some twenty.
const MAX_HEADERS: usize = 100;

/// The most addresses of a name that are tried. The big registries have about eight of each family.
const MAX_ADDRESSES: usize = 8;

/// An address that says nothing does not hold up the next one for longer (RFC 8305, "Connection Attempt Delay").
const CONNECTION_ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Which certificates an `https` server may show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Certificates {
    /// One for its name, from an authority that we trust.
    Verified,
    /// Any. For a caller that tells no secret and believes no answer, or was told to.
    Any,
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// How.
    pub method: Method,
    /// Where, `http` or `https`. Its user name and password are not sent.
    pub url: &'a Url,
    /// Beyond `Host`, `User-Agent` and the body's length.
    pub headers: HeaderMap,
    /// What is sent; empty for nothing.
    pub body: Bytes,
    /// Who may answer.
    pub certificates: Certificates,
}

impl<'a> Request<'a> {
    /// One without headers and body.
    pub fn new(method: Method, url: &'a Url, certificates: Certificates) -> Self {
        Self { method, url, headers: HeaderMap::new(), body: Bytes::new(), certificates }
    }
}

/// No answer, or none that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// Nobody was reached, or the connection ended before the answer did.
    #[error("{kind} ({reason})")]
    Unreachable {
        /// How.
        kind: OutageKind,
        /// As the system or TLS puts it.
        reason: String,
    },
    /// The server is there and speaks only to clients that have a certificate.
    #[error("it asks for a client certificate")]
    ClientCertificateRequired,
    /// Something else than HTTP/1.1, or a head that is too large.
    #[error("the answer is not HTTP: {0}")]
    NotHttp(String),
    /// The body is longer than what the caller would read.
    #[error("the answer has more than {0} bytes")]
    BodyTooLong(usize),
}

/// Asks servers. Keeps nothing but whom it trusts.
pub struct Client {
    verified: tokio_rustls::TlsConnector,
    any: tokio_rustls::TlsConnector,
}

/// The head of an answer; the body is read when asked for, the connection ends when this is dropped.
pub struct HttpResponse {
    /// The status.
    pub status: StatusCode,
    /// At most a hundred.
    pub headers: HeaderMap,
    body: Incoming,
    _connection: JoinSet<()>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Client {
    /// Trusts Mozilla's list of authorities and those in `ca_file` (PEM, any number), which is read once.
    ///
    /// # Errors
    /// [`TrustError`] when the file cannot be used.
    pub fn new(ca_file: Option<&Path>) -> Result<Self, TrustError> {
        Ok(Self { verified: tls::verified_connector(ca_file)?, any: tls::unverified_connector() })
    }

    /// Sends the request and gives the answer's head.
    ///
    /// # Errors
    /// [`Failure`]. Any status is an answer.
    pub async fn send(&self, request: Request<'_>) -> Result<HttpResponse, HttpError> {
        let Request { method, url, headers, body, certificates } = request;
        let stream = self.connect(url, certificates).await?;
        let mut builder = http1::Builder::new();
        builder.max_headers(MAX_HEADERS).max_buf_size(MAX_HEAD);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(HttpError::from_hyper)?;
        let mut connections = JoinSet::new();
        // Its error is the request's or the body's as well.
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

    /// Connects, with the TLS handshake where the URL asks for TLS, and hangs up.
    ///
    /// # Errors
    /// [`Failure`].
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
    /// The whole body, of at most `most` bytes.
    ///
    /// # Errors
    /// [`Failure::TooLong`], or [`Failure::Unreachable`] when the connection ends before it.
    pub async fn read(mut self, most: usize) -> Result<Bytes, HttpError> {
        let mut read = BytesMut::new();
        while let Some(data) = self.chunk().await? {
            if read.len() + data.len() > most {
                return Err(HttpError::BodyTooLong(most));
            }
            read.extend_from_slice(&data);
        }
        Ok(read.freeze())
    }

    /// The next bytes of the body, 32 KiB at most; `None` at the end of the body.
    ///
    /// # Errors
    /// [`Failure::Unreachable`] when the connection ends before the body.
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

/// Connects to the first address that answers. Both families take turns, so that one which leads nowhere does not use up the
/// addresses, and each begins a little after the one before it.
async fn dial(host: Host<&str>, port: u16) -> Result<TcpStream, HttpError> {
    let addresses: Vec<SocketAddr> = match host {
        Host::Ipv4(address) => vec![(address, port).into()],
        Host::Ipv6(address) => vec![(address, port).into()],
        Host::Domain(name) => match lookup_host((name, port)).await {
            Ok(found) => interleave_families(found.collect()),
            Err(error) => return Err(unreachable(OutageKind::NoSuchHost, error)),
        },
    };
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

/// The resolver's order within each family, the families in turn.
fn interleave_families(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut order = Vec::new();
    loop {
        let before = order.len();
        order.extend(first.next());
        order.extend(second.next());
        if order.len() == before {
            return order;
        }
    }
}

fn unreachable(kind: OutageKind, reason: impl ToString) -> HttpError {
    HttpError::Unreachable { kind, reason: reason.to_string() }
}

/// Nothing that a parsed URL can hold; said rather than assumed.
fn invalid_request(error: impl Error) -> HttpError {
    HttpError::NotHttp(error.to_string())
}

impl HttpError {
    fn from_io(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            // TLS 1.3 has a word for it; servers of 1.2 use the other.
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
            // Somebody accepted and hung up, as a load balancer does that has nobody behind it.
            None => unreachable(OutageKind::Refused, error),
        }
    }
}

#[cfg(test)]
mod tests;
