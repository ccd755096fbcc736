//! The trusted authorities: Mozilla's list, compiled in, and the operator's own.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore, SignatureScheme, WantsVerifier};
use tokio_rustls::TlsConnector;
use url::Host;

/// The file of additional authorities cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The file cannot be read, or is not PEM.
    #[error("the certificates in {path}: {source}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// The error of the read or of the parser.
        source: pem::Error,
    },
    /// A certificate of the file cannot be an authority's.
    #[error("the certificates in {path}: {source}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// The defect of the certificate.
        source: rustls::Error,
    },
    /// The file has no certificate.
    #[error("no certificate in {0}")]
    Empty(PathBuf),
}

/// A connector that verifies the server's certificate and name.
pub(super) fn verified_connector(ca_file: Option<&Path>) -> Result<TlsConnector, TrustError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = ca_file {
        let pem = |source| TrustError::Pem { path: path.to_owned(), source };
        let before = roots.len();
        for certificate in CertificateDer::pem_file_iter(path).map_err(pem)? {
            let added = roots.add(certificate.map_err(pem)?);
            added.map_err(|source| TrustError::Certificate { path: path.to_owned(), source })?;
        }
        if roots.len() == before {
            return Err(TrustError::Empty(path.to_owned()));
        }
    }
    Ok(connector(builder(provider()).with_root_certificates(roots).with_no_client_auth()))
}

/// A connector that accepts any certificate.
pub(super) fn unverified_connector() -> TlsConnector {
    let provider = provider();
    let verifier = Arc::new(AcceptAnyCertificate(Arc::clone(&provider)));
    let config = builder(provider).dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    connector(config)
}

pub(super) fn server_name(host: &Host<&str>) -> Option<ServerName<'static>> {
    match host {
        Host::Domain(name) => ServerName::try_from((*name).to_owned()).ok(),
        Host::Ipv4(address) => Some(std::net::IpAddr::from(*address).into()),
        Host::Ipv6(address) => Some(std::net::IpAddr::from(*address).into()),
    }
}

/// Passed explicitly, so the connectors do not depend on the default provider of the process.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn builder(provider: Arc<CryptoProvider>) -> ConfigBuilder<ClientConfig, WantsVerifier> {
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    builder.expect("the provider has cipher suites for TLS 1.2 and 1.3")
}

fn connector(mut config: ClientConfig) -> TlsConnector {
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    TlsConnector::from(Arc::new(config))
}

/// Verifies nothing; see [`super::Certificates::Any`].
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _more: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
