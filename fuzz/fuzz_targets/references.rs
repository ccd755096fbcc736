//! Image references of any text, as in pods, image records and user input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lighterman::oci::{Digest, Reference, Repository};

/// Logs and Events have the errors. An error has 80 characters of the text, each at most ten when
/// escaped, and the reason.
const MAX_ERROR: usize = 1024;

fuzz_target!(|text: &str| {
    let reference = match text.parse::<Reference>() {
        Ok(reference) => reference,
        Err(error) => return assert!(error.to_string().len() <= MAX_ERROR, "the error is short, for logs and Events"),
    };
    let normalized = reference.to_string();
    assert_eq!(normalized.parse().as_ref(), Ok(&reference), "a normalized reference stays the same");
    let Repository { registry, path } = reference.repository();
    assert!(Repository::is_registry(registry), "{registry:?}");
    assert!(registry.len() + 1 + path.len() <= 255, "the name has at most 255 bytes");
    assert!(normalized.is_ascii() && !normalized.contains(char::is_whitespace), "{normalized:?}");
    for name in reference.record_names(Digest::of(text.as_bytes())) {
        let named: Reference = name.parse().expect("a record's name is a reference");
        assert_eq!(named.repository(), reference.repository(), "the record is under the same repository");
        assert_eq!(named.to_string(), name, "CRI looks for the same string");
    }
});
