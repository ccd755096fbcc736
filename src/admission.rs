//! Admission without the API server: by a list of PeerIds, or by certificates of an authority that the operator has.
//!
//! The TLS handshake has proved the key; these say which keys are ours. Admission by ServiceAccount token is
//! [`crate::cluster`]'s.

mod certificate;
mod static_list;

pub use certificate::{CertificateAdmission, CertificateFiles, CertificateFilesError};
pub use static_list::StaticAdmission;
