//! Classifies containerd's errors.

use std::error::Error;
use std::path::Path;

use containerd_client::tonic::{Code, Status};

use crate::oci::Digest;
use crate::ports::StoreError;

/// By code, except for a locked ref and a full disk: containerd has no codes for them, only
/// messages.
pub(super) fn classify(socket: &Path, digest: Option<Digest>, status: &Status) -> StoreError {
    let text = format!("containerd at {}: {}", socket.display(), status.message());
    if let Some(digest) = digest {
        // `ref … locked for …`: another stream writes the same ref (content/local/locks.go, code
        // Unavailable).
        if status.message().contains("locked for") {
            return StoreError::Busy(digest);
        }
        // The operating system's messages for ENOSPC and EDQUOT; the code is Unknown.
        let full = ["no space left on device", "disk quota exceeded"];
        if status.code() == Code::ResourceExhausted || full.iter().any(|words| status.message().contains(words)) {
            return StoreError::Full(digest);
        }
        match status.code() {
            Code::NotFound => return StoreError::Absent(digest),
            Code::AlreadyExists => return StoreError::AlreadyExists(digest),
            _ => {}
        }
    }
    // An answer of containerd has no source; a broken connection has one.
    let is_transport_error = status.source().is_some();
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded => StoreError::Unavailable(text),
        _ if is_transport_error => StoreError::Unavailable(text),
        _ => StoreError::Other(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classified(status: &Status) -> (StoreError, StoreError) {
        let socket = Path::new("/run/c.sock");
        (classify(socket, Some(Digest::of(b"")), status), classify(socket, None, status))
    }

    #[test]
    fn grpc_codes_map_to_store_errors() {
        assert!(matches!(classified(&Status::not_found("content")), (StoreError::Absent(_), StoreError::Other(_))));
        assert!(matches!(
            classified(&Status::already_exists("content")),
            (StoreError::AlreadyExists(_), StoreError::Other(_))
        ));
        assert!(matches!(classified(&Status::failed_precondition("unexpected digest")).0, StoreError::Other(_)));
        assert!(matches!(classified(&Status::resource_exhausted("full")).0, StoreError::Full(_)));
        for status in [Status::unavailable("x"), Status::cancelled("x"), Status::deadline_exceeded("x")] {
            assert!(matches!(classified(&status), (StoreError::Unavailable(_), StoreError::Unavailable(_))));
        }
    }

    #[test]
    fn error_messages_classify_faults_without_a_code() {
        let locked = Status::unavailable("ref k8s.io/1/lighterman-x locked for 2s (since y): unavailable");
        assert!(matches!(classified(&locked).0, StoreError::Busy(_)));
        let full = Status::unknown("write /var/lib/containerd/…/data: no space left on device");
        assert!(matches!(classified(&full).0, StoreError::Full(_)));
    }

    #[test]
    fn a_broken_connection_names_the_socket() {
        let broken = Status::from_error("connection reset".into());
        assert_eq!(broken.code(), Code::Unknown);
        let (StoreError::Unavailable(text), _) = classified(&broken) else { panic!("{broken:?}") };
        assert!(text.contains("/run/c.sock"), "{text}");
    }
}
