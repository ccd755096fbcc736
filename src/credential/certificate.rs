//! Verification of a certificate credential, for clusters that have an authority of their own.
//!
//! The agent's key stays ed25519, and the agent's name stays the PeerId. The credential is a
//! statement, "this PeerId is mine, at this time", signed with the certificate's private key, and
//! the chain up to the operator's authority. A statement is valid for an hour and for that PeerId
//! alone, so a copied statement is useless to another key.

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use rustls::SignatureScheme;
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::model::{Credential, PeerId};
use crate::ports::LEEWAY;

/// The beginning of a statement, after 64 spaces. As in TLS 1.3 (RFC 8446, section 4.4.3), the
/// spaces keep a signature that the same key made for TLS, of either version, from counting as a
/// statement.
const CONTEXT: &[u8] = b"lighterman admission by certificate, version 1\0";

/// The first part of the credential's text: kind and version.
const KIND: &str = "certificate-1";

/// A statement is valid as long as a ServiceAccount token.
pub const STATEMENT_LIFE: Duration = Duration::from_secs(3600);

/// Certificates in a chain: the agent's own and three below the authority's. Each costs one
/// signature verification.
pub const MAX_CHAIN: usize = 4;

/// Bytes of a credential at most. [`crate::wire::Hello`] has room for 16 KiB, of which a node's
/// name and bincode's lengths take less than 1 KiB. A certificate has 0.5 to 2 KiB, a third more in
/// base64.
pub const MAX_BYTES: usize = 15 << 10;

/// The trusted authorities, and the DNS name that an agent's certificate must carry.
#[derive(Debug, Clone)]
pub struct Authority {
    anchors: Vec<TrustAnchor<'static>>,
    name: ServerName<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// Why a certificate credential is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CertificateRejection {
    /// The credential is empty.
    #[error("no certificate was shown")]
    Absent,
    /// The credential exceeds [`MAX_CHAIN`] or [`MAX_BYTES`].
    #[error("the chain is longer than {MAX_CHAIN} certificates or {MAX_BYTES} bytes")]
    TooLong,
    /// The credential is of another kind or damaged.
    #[error("not a certificate with a statement")]
    Malformed,
    /// The statement is older than [`STATEMENT_LIFE`], perhaps because a peer replays an old
    /// statement.
    #[error("the statement has expired, or the clocks differ")]
    Expired,
    /// The statement is from the future.
    #[error("the statement is not valid yet, or the clocks differ")]
    TooEarly,
    /// The chain ends at another authority, a certificate has expired, or the usage is neither
    /// client nor server authentication.
    #[error("the certificate is not good for this cluster: {0}")]
    Chain(&'static str),
    /// The certificate does not carry the name of the agents.
    #[error("the certificate is for another name")]
    Name,
    /// Another key signed the statement, or the statement is for another PeerId.
    #[error("the statement is not signed by the certificate's key for this peer")]
    Signature,
}

/// An authority's certificate or the required name cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AuthorityError(String);

impl Authority {
    /// Trusts chains that end at one of `certificates`, for the DNS name `name`.
    ///
    /// # Errors
    /// [`AuthorityError`] for a malformed certificate, for no certificate, and for a `name` that is
    /// no DNS name.
    pub fn new(certificates: &[CertificateDer<'_>], name: &str) -> Result<Self, AuthorityError> {
        let anchor = |certificate| webpki::anchor_from_trusted_cert(certificate).map(|anchor| anchor.to_owned());
        let anchors = certificates.iter().map(anchor).collect::<Result<Vec<_>, _>>();
        let anchors =
            anchors.map_err(|error| AuthorityError(format!("malformed certificate of an authority: {error}")))?;
        if anchors.is_empty() {
            return Err(AuthorityError("the file has no certificate of an authority".to_owned()));
        }
        let name = ServerName::try_from(name.to_owned()).ok().filter(|name| matches!(name, ServerName::DnsName(_)));
        let name =
            name.ok_or_else(|| AuthorityError("the name in the agents' certificates is no DNS name".to_owned()))?;
        Ok(Self { anchors, name, algorithms: aws_lc_rs::default_provider().signature_verification_algorithms })
    }

    /// The signature schemes that [`verify`] accepts; a signer chooses one of these.
    pub fn schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.mapping.iter().map(|(scheme, _)| *scheme).collect()
    }

    /// Checks that the chain leads to a trusted authority, is valid now, and carries the agents'
    /// name.
    fn check_chain(
        &self,
        leaf: &EndEntityCert<'_>,
        intermediates: &[CertificateDer<'_>],
        now: Duration,
    ) -> Result<(), CertificateRejection> {
        let verify_usage = |usage| {
            let now = UnixTime::since_unix_epoch(now);
            leaf.verify_for_usage(self.algorithms.all, &self.anchors, intermediates, now, usage, None, None).map(drop)
        };
        // An agent is client and server; issuers often allow only one of the two usages.
        let verified = match verify_usage(KeyUsage::client_auth()) {
            Err(webpki::Error::RequiredEkuNotFoundContext(_)) => verify_usage(KeyUsage::server_auth()),
            result => result,
        };
        verified.map_err(|error| {
            CertificateRejection::Chain(match error {
                webpki::Error::CertExpired { .. } => "a certificate has expired",
                webpki::Error::CertNotValidYet { .. } => "a certificate is not valid yet",
                webpki::Error::UnknownIssuer => "another authority issued the certificate",
                webpki::Error::RequiredEkuNotFoundContext(_) => "a certificate is for another purpose",
                _ => "the chain does not lead to the authority",
            })
        })?;
        leaf.verify_is_valid_for_subject_name(&self.name).map_err(|_| CertificateRejection::Name)
    }
}

/// The bytes that are signed: context, PeerId, and seconds since 1970.
pub fn statement(peer: PeerId, issued: Duration) -> Vec<u8> {
    [&[b' '; 64], CONTEXT, &peer.to_multihash(), &issued.as_secs().to_be_bytes()].concat()
}

/// The text of a credential: kind, second, scheme, signature and chain, joined by dots.
pub fn encode_credential(
    issued: Duration,
    scheme: SignatureScheme,
    signature: &[u8],
    chain: &[CertificateDer<'_>],
) -> Credential {
    let head = format!("{KIND}.{}.{}.{}", issued.as_secs(), u16::from(scheme), BASE64.encode(signature));
    Credential::new(chain.iter().fold(head, |text, certificate| format!("{text}.{}", BASE64.encode(certificate))))
}

struct ParsedCredential {
    issued: Duration,
    scheme: SignatureScheme,
    signature: Vec<u8>,
    leaf: CertificateDer<'static>,
    intermediates: Vec<CertificateDer<'static>>,
}

fn parse_credential(text: &str) -> Result<ParsedCredential, CertificateRejection> {
    match text.len() {
        0 => return Err(CertificateRejection::Absent),
        1..=MAX_BYTES => {}
        _ => return Err(CertificateRejection::TooLong),
    }
    let mut parts = text.split('.');
    let mut next = || parts.next().ok_or(CertificateRejection::Malformed);
    if next()? != KIND {
        return Err(CertificateRejection::Malformed);
    }
    let issued = Duration::from_secs(next()?.parse().map_err(|_| CertificateRejection::Malformed)?);
    let scheme = SignatureScheme::from(next()?.parse::<u16>().map_err(|_| CertificateRejection::Malformed)?);
    let bytes = |part: &str| BASE64.decode(part).map_err(|_| CertificateRejection::Malformed);
    let signature = bytes(next()?)?;
    let leaf = CertificateDer::from(bytes(next()?)?);
    // One certificate more than [`MAX_CHAIN`] allows is read, so a longer chain is detected.
    let intermediates = parts.take(MAX_CHAIN).map(|part| Ok(bytes(part)?.into())).collect::<Result<Vec<_>, _>>()?;
    if intermediates.len() == MAX_CHAIN {
        Err(CertificateRejection::TooLong)
    } else {
        Ok(ParsedCredential { issued, scheme, signature, leaf, intermediates })
    }
}

/// Verifies that `text` admits `peer`, and returns the end of the statement's life, since 1970. A
/// certificate may expire before that end; the peer's next statement is then rejected.
///
/// # Errors
/// The first [`CertificateRejection`] found.
pub fn verify(
    text: &str,
    peer: PeerId,
    authority: &Authority,
    now: Duration,
) -> Result<Duration, CertificateRejection> {
    let ParsedCredential { issued, scheme, signature, leaf, intermediates } = parse_credential(text)?;
    let until = issued.saturating_add(STATEMENT_LIFE);
    if until.saturating_add(LEEWAY) < now {
        return Err(CertificateRejection::Expired);
    }
    if issued > now.saturating_add(LEEWAY) {
        return Err(CertificateRejection::TooEarly);
    }
    let end_entity = EndEntityCert::try_from(&leaf).map_err(|_| CertificateRejection::Malformed)?;
    authority.check_chain(&end_entity, &intermediates, now)?;
    let statement = statement(peer, issued);
    let supported = authority.algorithms.mapping.iter().find(|(known, _)| *known == scheme);
    let is_signed = supported.is_some_and(|(_, algorithms)| {
        algorithms.iter().any(|algorithm| end_entity.verify_signature(*algorithm, &statement, &signature).is_ok())
    });
    if is_signed { Ok(until) } else { Err(CertificateRejection::Signature) }
}
