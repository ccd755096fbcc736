//! TLS for both directions: the libp2p certificate that carries the node's key, and a verifier that
//! accepts exactly that.
//!
//! The configurations of `libp2p_tls` are not used. `libp2p_tls` prefers ChaCha20, which costs
//! twice the CPU of AES on processors with AES instructions, and writes session keys to the file in
//! SSLKEYLOGFILE. Not here: the verdict about a key, which is [`crate::ports::Admission`]'s.

use std::sync::Arc;

use libp2p_tls::certificate;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::crypto::ring::cipher_suite;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, PeerIncompatible, SignatureScheme};

use crate::identity::{Identity, peer_of_certificate};
use crate::model::PeerId;
use crate::wire::{FIRST_MAJOR, Format, Versions};

/// The ALPN name of a MAJOR of the transfer protocol. The listener chooses the newest common MAJOR,
/// so both ends have the format of `Hello` before the first message.
fn alpn(format: Format) -> Vec<u8> {
    match format.version().major {
        FIRST_MAJOR => b"lighterman/1".to_vec(),
        major => format!("lighterman/{major}").into_bytes(),
    }
}

/// The ALPN name for ends without a common MAJOR. TLS's own refusal cannot carry the versions of
/// the listener; the close of such a connection does.
const NO_COMMON_MAJOR: &[u8] = b"lighterman/versions";

/// The ALPN names of these versions, the preferred one first.
fn protocols(versions: Versions) -> Vec<Vec<u8>> {
    versions.formats().map(alpn).chain([NO_COMMON_MAJOR.to_vec()]).collect()
}

/// The common format of a connection; `None` without a common MAJOR.
pub(super) fn format_of(connection: &quinn::Connection, versions: Versions) -> Option<Format> {
    let handshake = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
    let chosen = handshake.protocol?;
    versions.formats().find(|format| alpn(*format) == chosen)
}

/// The certificate could not be created, or rustls rejects the configuration.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The node's key did not sign the certificate.
    #[error("the TLS certificate cannot be created: {0}")]
    Certificate(#[from] certificate::GenError),
    /// The configuration is inconsistent.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

pub(super) struct Tls {
    pub(super) client: Arc<QuicClientConfig>,
    pub(super) server: Arc<QuicServerConfig>,
}

impl Tls {
    /// Creates one certificate for the endpoint's life; its key is never stored.
    pub(super) fn new(identity: &Identity, versions: Versions) -> Result<Self, TlsError> {
        let (certificate, key) = certificate::generate(&identity.keypair())?;
        let (client, server) = configs(&certificate, &key, versions)?;
        let no_aes = |_| rustls::Error::General("AES-128-GCM, which QUIC begins with, is missing".into());
        Ok(Self {
            client: Arc::new(client.try_into().map_err(no_aes)?),
            server: Arc::new(server.try_into().map_err(no_aes)?),
        })
    }
}

fn configs(
    certificate: &CertificateDer<'static>,
    key: &PrivateKeyDer<'static>,
    versions: Versions,
) -> Result<(rustls::ClientConfig, rustls::ServerConfig), rustls::Error> {
    let provider = Arc::new(provider());
    let verifier = Arc::new(Libp2pVerifier);
    // Not parsed by rustls, which looks for the fields of a web server's certificate and does not
    // support the libp2p extension.
    let signer = provider.key_provider.load_private_key(key.clone_key())?;
    let resolver = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate.clone()], signer)));

    let mut client = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_client_cert_resolver(resolver.clone());
    client.alpn_protocols = protocols(versions);
    client.enable_sni = false;
    // Every connection proves both keys anew: a resumed session would outlive a peer's verdict.
    client.resumption = Resumption::disabled();

    let mut server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(resolver);
    server.alpn_protocols = protocols(versions);
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    Ok((client, server))
}

/// Passed explicitly, so that the process's default provider has no influence.
///
/// ring's AES-GCM processes several blocks at once (VAES) on processors without AVX-512 too, where
/// aws-lc's does not. ring takes 0.26 ns a byte against 0.6 in packets of 1414 bytes, each way.
/// Both ends together save 0.7 ns of the 5.9 that a fetched byte cost. With AVX-512 the two were
/// not compared. aws-lc has the key exchange that resists quantum computers.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
        ..aws_lc_rs::default_provider()
    }
}

/// The peer at the other end, after the handshake.
pub(super) fn peer_of(connection: &quinn::Connection) -> Option<PeerId> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    peer_of_certificate(chain.first()?, chain.get(1..)?).ok()
}

/// Accepts exactly one libp2p certificate (libp2p specification, "TLS handshake"): self-signed,
/// valid now, with the extension in which the node's key signs the key of the certificate.
#[derive(Debug)]
struct Libp2pVerifier;

/// The scheme of [`certificate::generate`], and so of every agent.
const SCHEMES: [SignatureScheme; 1] = [SignatureScheme::ECDSA_NISTP256_SHA256];

fn verify_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    let parsed = certificate::parse(certificate).map_err(|_| CertificateError::BadEncoding)?;
    parsed.verify_signature(signed.scheme, message, signed.signature()).map_err(|_| CertificateError::BadSignature)?;
    Ok(HandshakeSignatureValid::assertion())
}

/// Never called, since TLS 1.2 is not configured; rejects all the same.
fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(PeerIncompatible::Tls12NotOffered.into())
}

impl ServerCertVerifier for Libp2pVerifier {
    /// Accepts any key. The expected key is compared after the handshake and before our `Hello`,
    /// where the error can name the key that was found.
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        peer_of_certificate(certificate, intermediates)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SCHEMES.to_vec()
    }
}

impl ClientCertVerifier for Libp2pVerifier {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        peer_of_certificate(certificate, intermediates)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SCHEMES.to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_cipher_is_preferred_and_nothing_is_resumed_or_logged() {
        let (certificate, key) = certificate::generate(&Identity::generate().keypair()).unwrap();
        let (client, server) = configs(&certificate, &key, Versions::TRANSFER).unwrap();
        let first = client.crypto_provider().cipher_suites[0].suite();
        assert_eq!(first, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert_eq!((server.send_tls13_tickets, server.session_storage.can_cache()), (0, false));
        assert!(!client.key_log.will_log("CLIENT_TRAFFIC_SECRET_0"));
        assert!(!server.key_log.will_log("SERVER_TRAFFIC_SECRET_0"));
    }

    /// Performs a handshake in memory. Returns the cipher, or the first error of either end.
    fn handshake(
        client: rustls::ClientConfig,
        server: rustls::ServerConfig,
    ) -> Result<rustls::CipherSuite, rustls::Error> {
        let name = "lighterman".try_into().unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(client), name).unwrap();
        let mut server = rustls::ServerConnection::new(Arc::new(server)).unwrap();
        for _ in 0..4 {
            let mut flight = Vec::new();
            client.write_tls(&mut flight).unwrap();
            server.read_tls(&mut &flight[..]).unwrap();
            server.process_new_packets()?;
            let mut flight = Vec::new();
            server.write_tls(&mut flight).unwrap();
            client.read_tls(&mut &flight[..]).unwrap();
            client.process_new_packets()?;
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        Ok(server.negotiated_cipher_suite().unwrap().suite())
    }

    fn pair() -> (rustls::ClientConfig, rustls::ServerConfig) {
        let (certificate, key) = certificate::generate(&Identity::generate().keypair()).unwrap();
        configs(&certificate, &key, Versions::TRANSFER).unwrap()
    }

    #[test]
    fn two_agents_agree_on_the_cheapest_cipher() {
        assert_eq!(handshake(pair().0, pair().1), Ok(rustls::CipherSuite::TLS13_AES_128_GCM_SHA256));
    }

    #[test]
    fn a_dialer_without_a_certificate_is_rejected() {
        let mut anonymous = rustls::ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Libp2pVerifier))
            .with_no_client_auth();
        anonymous.alpn_protocols = protocols(Versions::TRANSFER);
        assert_eq!(handshake(anonymous, pair().1), Err(rustls::Error::NoCertificatesPresented));
    }

    #[test]
    fn another_protocol_is_rejected() {
        for alpn in [b"libp2p".to_vec(), b"lighterman/2".to_vec()] {
            let mut client = pair().0;
            client.alpn_protocols = vec![alpn];
            assert!(handshake(client, pair().1).is_err());
        }
    }

    #[test]
    fn a_certificate_without_its_key_is_rejected() {
        let (stolen, _) = certificate::generate(&Identity::generate().keypair()).unwrap();
        let (_, other_key) = certificate::generate(&Identity::generate().keypair()).unwrap();
        let (client, server) = configs(&stolen, &other_key, Versions::TRANSFER).unwrap();
        assert!(handshake(client, pair().1).is_err(), "a dialler's");
        assert!(handshake(pair().0, server).is_err(), "a listener's");
    }
}
