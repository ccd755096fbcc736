//! TLS servers that clients reject, each for another reason.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rcgen::{BasicConstraints, Certificate, CertificateParams, IsCa, KeyPair, date_time_ymd};
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection};

use crate::test_bed::TestError;

/// Fault of a TLS server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TlsFault {
    /// A self-signed certificate.
    SelfSigned,
    /// The certificate expired in 2020.
    Expired,
    /// The certificate names another host.
    OtherHost,
    /// The server answers the handshake with the alert `handshake_failure`.
    Alert,
}

impl TlsFault {
    pub(crate) const ALL: [Self; 4] = [Self::SelfSigned, Self::Expired, Self::OtherHost, Self::Alert];

    pub(crate) fn port(self) -> u16 {
        match self {
            Self::SelfSigned => 5601,
            Self::Expired => 5602,
            Self::OtherHost => 5603,
            Self::Alert => 5604,
        }
    }

    /// Whether clients trust the authority of the certificate.
    pub(crate) fn is_trusted(self) -> bool {
        matches!(self, Self::Expired | Self::OtherHost)
    }
}

struct Authority {
    certificate: Certificate,
    key: KeyPair,
}

/// The authority, generated once per process.
fn test_authority() -> Result<&'static Authority, TestError> {
    static AUTHORITY: OnceLock<Result<Authority, TestError>> = OnceLock::new();
    let authority = AUTHORITY.get_or_init(|| {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().map_err(|error| error.to_string())?;
        let certificate = parameters.self_signed(&key).map_err(|error| error.to_string())?;
        Ok(Authority { certificate, key })
    });
    authority.as_ref().map_err(Clone::clone)
}

/// The authority's certificate (PEM).
pub(crate) fn authority_pem() -> Result<String, TestError> {
    Ok(test_authority()?.certificate.pem())
}

/// Serves each fault at the fault's port, and a faultless TLS server at `port`. The threads live as
/// long as the tests.
pub(super) fn serve(address: &str, port: u16) -> Result<(), TestError> {
    for fault in TlsFault::ALL {
        let host = if fault == TlsFault::OtherHost { "elsewhere.test" } else { address };
        listen(address, fault.port(), Some(fault), config(host, Some(fault))?)?;
    }
    listen(address, port, None, config(address, None)?)
}

fn config(host: &str, fault: Option<TlsFault>) -> Result<Arc<ServerConfig>, TestError> {
    let build = || -> Result<_, Box<dyn std::error::Error>> {
        let key = KeyPair::generate()?;
        let mut parameters = CertificateParams::new([host.to_owned()])?;
        if fault == Some(TlsFault::Expired) {
            parameters.not_after = date_time_ymd(2020, 1, 1);
        }
        let Authority { certificate: issuer, key: issuer_key } = test_authority()?;
        let certificate = match fault {
            Some(TlsFault::SelfSigned) => parameters.self_signed(&key)?,
            _ => parameters.signed_by(&key, issuer, issuer_key)?,
        };
        let key = PrivateKeyDer::try_from(key.serialize_der())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(builder.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key)?)
    };
    build().map(Arc::new).map_err(|error| format!("a TLS server: {error}"))
}

fn listen(address: &str, port: u16, fault: Option<TlsFault>, config: Arc<ServerConfig>) -> Result<(), TestError> {
    let listener = TcpListener::bind((address, port)).map_err(|error| format!("{address}:{port}: {error}"))?;
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let config = Arc::clone(&config);
            // The handshake fails on either side. No test depends on the end of the connection.
            std::thread::spawn(move || drop(respond(connection, fault, config)));
        }
    });
    Ok(())
}

fn respond(mut connection: TcpStream, fault: Option<TlsFault>, config: Arc<ServerConfig>) -> std::io::Result<()> {
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    if fault == Some(TlsFault::Alert) {
        let mut hello = [0; 1024];
        let _ = connection.read(&mut hello)?;
        // A record of type "alert", TLS 1.2, two bytes: fatal, handshake_failure.
        return connection.write_all(&[0x15, 3, 3, 0, 2, 2, 40]);
    }
    let mut server = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let handshake = server.complete_io(&mut connection);
    // Sends the alert of a server that cannot parse the client's first bytes.
    while server.wants_write() {
        server.write_tls(&mut connection)?;
    }
    handshake.map(drop)
}
