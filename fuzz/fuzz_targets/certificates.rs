//! Credentials of the kind certificate, as strangers show them. The corpus has a good one, which the authority beside this file issued.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use lighterman::credential::certificate::{Authority, LIFE, verify};
use lighterman::model::PeerId;
use lighterman::ports::LEEWAY;
use rustls_pki_types::CertificateDer;

/// When the good one was signed.
const NOW: Duration = Duration::from_secs(1_800_000_000);

static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| {
    let certificate = CertificateDer::from(&include_bytes!("authority.der")[..]);
    Authority::new(&[certificate], "lighterman").expect("an authority")
});

fuzz_target!(|text: &str| {
    match verify(text, PeerId::from_public_key([7; 32]), &AUTHORITY, NOW) {
        Ok(until) => {
            assert!(until <= NOW + LEEWAY + LIFE && until + LEEWAY >= NOW, "it lives too long");
            let stolen = verify(text, PeerId::from_public_key([8; 32]), &AUTHORITY, NOW);
            assert!(stolen.is_err(), "it admits another key");
        }
        Err(flaw) => assert!(flaw.to_string().len() < 128, "told to the peer and logged"),
    }
});
