//! The certificate by which a TLS handshake proves a peer's key: the first message of an
//! unauthenticated connection.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lighterman::identity::peer_of_certificate;
use rustls_pki_types::CertificateDer;

fuzz_target!(|bytes: &[u8]| {
    let certificate = CertificateDer::from(bytes);
    let Ok(peer) = peer_of_certificate(&certificate, &[]) else { return };
    let name = peer.to_string();
    assert_eq!(name.parse(), Ok(peer), "the text of a PeerId parses");
    assert!(peer_of_certificate(&certificate, &[certificate.clone()]).is_err(), "a chain is rejected");
});
