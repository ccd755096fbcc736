//! Whether a certificate admits the owner of a key: for clusters that have an authority of their own.
//!
//! The node's key stays ed25519 and its name the PeerId. What is shown is a statement, "this PeerId is mine, at this time", signed
//! with the certificate's private key, and the chain up to the operator's authority. The statement is worth something for an hour and
//! to that PeerId alone, so that one who copies it gains nothing.

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use rustls::SignatureScheme;
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::model::{Credential, PeerId};
use crate::ports::LEEWAY;

/// What a statement begins with, after 64 spaces. As in TLS 1.3 (RFC 8446, section 4.4.3) they are there so that nothing that the same
/// key signs for TLS, of either version, can be taken for a statement.
const CONTEXT: &[u8] = b"lighterman admission by certificate, version 1\0";

/// The first part of the text: which kind of credential, and which version of it.
const KIND: &str = "certificate-1";

/// How long a statement is good: as long as a ServiceAccount token.
pub const STATEMENT_LIFE: Duration = Duration::from_secs(3600);

/// Certificates in a chain: the agent's own and three below the authority's. Each costs a signature to verify.
pub const MAX_CHAIN: usize = 4;

/// The longest text. What [`crate::wire::Hello`] has room for is 16 KiB, of which a node's name and bincode's lengths take less than
/// 1 KiB. A certificate has 0.5 to 2 KiB, a third more in base64.
pub const MAX_BYTES: usize = 15 << 10;

/// Who is believed, and what their certificates have to say.
#[derive(Debug, Clone)]
pub struct Authority {
    anchors: Vec<TrustAnchor<'static>>,
    name: ServerName<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// Why a certificate does not admit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CertificateRejection {
    /// Nothing.
    #[error("no certificate was shown")]
    Absent,
    /// More than a chain has.
    #[error("the chain is longer than {MAX_CHAIN} certificates or {MAX_BYTES} bytes")]
    TooLong,
    /// Not of this kind, or damaged.
    #[error("not a certificate with a statement")]
    Malformed,
    /// The statement is old, or was copied long ago.
    #[error("the statement has expired, or the clocks differ")]
    Expired,
    /// From the future.
    #[error("the statement is not valid yet, or the clocks differ")]
    TooEarly,
    /// Another authority, a certificate that has ended, or one for another purpose.
    #[error("the certificate is not good for this cluster: {0}")]
    Chain(&'static str),
    /// Not an agent's.
    #[error("the certificate is for another name")]
    Name,
    /// Another key signed it, or for another PeerId.
    #[error("the statement is not signed by the certificate's key for this peer")]
    Signature,
}

/// A certificate of an authority, or the name that is required, cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AuthorityError(String);

impl Authority {
    /// Believes chains that end at one of these certificates, for this DNS name.
    ///
    /// # Errors
    /// [`AuthorityError`] for one that is no certificate, for none at all, and for a name that is none.
    pub fn new(certificates: &[CertificateDer<'_>], name: &str) -> Result<Self, AuthorityError> {
        let anchor = |certificate| webpki::anchor_from_trusted_cert(certificate).map(|anchor| anchor.to_owned());
        let anchors = certificates.iter().map(anchor).collect::<Result<Vec<_>, _>>();
        let anchors = anchors.map_err(|error| AuthorityError(format!("no authority's certificate: {error}")))?;
        if anchors.is_empty() {
            return Err(AuthorityError("no certificate of an authority".to_owned()));
        }
        let name = ServerName::try_from(name.to_owned()).ok().filter(|name| matches!(name, ServerName::DnsName(_)));
        let name = name.ok_or_else(|| AuthorityError("the name required of agents is no DNS name".to_owned()))?;
        Ok(Self { anchors, name, algorithms: aws_lc_rs::default_provider().signature_verification_algorithms })
    }

    /// The signatures that are understood, for the one who signs.
    pub fn schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.mapping.iter().map(|(scheme, _)| *scheme).collect()
    }

    /// The chain leads to us, is valid now, and is an agent's.
    fn check_chain(
        &self,
        own: &EndEntityCert<'_>,
        above: &[CertificateDer<'_>],
        now: Duration,
    ) -> Result<(), CertificateRejection> {
        let trusted = |usage| {
            let now = UnixTime::since_unix_epoch(now);
            own.verify_for_usage(self.algorithms.all, &self.anchors, above, now, usage, None, None).map(drop)
        };
        // Agents are both; issuers often allow only one of the two.
        let trusted = match trusted(KeyUsage::client_auth()) {
            Err(webpki::Error::RequiredEkuNotFoundContext(_)) => trusted(KeyUsage::server_auth()),
            decided => decided,
        };
        trusted.map_err(|error| {
            CertificateRejection::Chain(match error {
                webpki::Error::CertExpired { .. } => "it has expired",
                webpki::Error::CertNotValidYet { .. } => "it is not valid yet",
                webpki::Error::UnknownIssuer => "another authority issued it",
                webpki::Error::RequiredEkuNotFoundContext(_) => "it is for another purpose",
                _ => "it does not lead to the authority",
            })
        })?;
        own.verify_is_valid_for_subject_name(&self.name).map_err(|_| CertificateRejection::Name)
    }
}

/// What is signed: the context, the PeerId, and the second.
pub fn statement(peer: PeerId, issued: Duration) -> Vec<u8> {
    [&[b' '; 64], CONTEXT, &peer.to_multihash(), &issued.as_secs().to_be_bytes()].concat()
}

/// The credential, from its parts.
pub fn encode_credential(
    issued: Duration,
    scheme: SignatureScheme,
    signature: &[u8],
    chain: &[CertificateDer<'_>],
) -> Credential {
    let head = format!("{KIND}.{}.{}.{}", issued.as_secs(), u16::from(scheme), BASE64.encode(signature));
    Credential::new(chain.iter().fold(head, |text, certificate| format!("{text}.{}", BASE64.encode(certificate))))
}

/// A credential's parts.
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
    let own = CertificateDer::from(bytes(next()?)?);
    // One more than is allowed, so that what is longer is seen.
    let above = parts.take(MAX_CHAIN).map(|part| Ok(bytes(part)?.into())).collect::<Result<Vec<_>, _>>()?;
    if above.len() == MAX_CHAIN {
        Err(CertificateRejection::TooLong)
    } else {
        Ok(ParsedCredential { issued, scheme, signature, leaf: own, intermediates: above })
    }
}

/// Whether `text` admits `peer`; until when, since 1970. A certificate that ends sooner is noticed with the next statement.
///
/// # Errors
/// The first [`Flaw`] found.
pub fn verify(
    text: &str,
    peer: PeerId,
    authority: &Authority,
    now: Duration,
) -> Result<Duration, CertificateRejection> {
    let ParsedCredential { issued, scheme, signature, leaf: own, intermediates: above } = parse_credential(text)?;
    let until = issued.saturating_add(STATEMENT_LIFE);
    if until.saturating_add(LEEWAY) < now {
        return Err(CertificateRejection::Expired);
    }
    if issued > now.saturating_add(LEEWAY) {
        return Err(CertificateRejection::TooEarly);
    }
    let own = EndEntityCert::try_from(&own).map_err(|_| CertificateRejection::Malformed)?;
    authority.check_chain(&own, &above, now)?;
    let statement = statement(peer, issued);
    let named = authority.algorithms.mapping.iter().find(|(known, _)| *known == scheme);
    let signed = named.is_some_and(|(_, algorithms)| {
        algorithms.iter().any(|algorithm| own.verify_signature(*algorithm, &statement, &signature).is_ok())
    });
    if signed { Ok(until) } else { Err(CertificateRejection::Signature) }
}
