//! Credentials of the kind certificate from unauthenticated connections. The corpus has a valid
//! credential, which the authority beside this file issued.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use lighterman::credential::certificate::{Authority, STATEMENT_LIFE, verify};
use lighterman::model::PeerId;
use lighterman::ports::LEEWAY;
use rustls_pki_types::CertificateDer;

/// Time at which the valid credential of the corpus was signed.
const NOW: Duration = Duration::from_secs(1_800_000_000);

static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| {
    let certificate = CertificateDer::from(&include_bytes!("authority.der")[..]);
    Authority::new(&[certificate], "lighterman").expect("an authority")
});

fuzz_target!(|text: &str| {
    match verify(text, PeerId::from_public_key([7; 32]), &AUTHORITY, NOW) {
        Ok(until) => {
            assert!(
                until <= NOW + LEEWAY + STATEMENT_LIFE && until + LEEWAY >= NOW,
                "the credential does not live too long"
            );
            let stolen = verify(text, PeerId::from_public_key([8; 32]), &AUTHORITY, NOW);
            assert!(stolen.is_err(), "the credential admits no other key");
        }
        Err(flaw) => assert!(flaw.to_string().len() < 128, "the error is short, for the peer and the log"),
    }
});
