//! Admission without the API server: by a list of PeerIds, or by certificates of the operator's
//! authority.
//!
//! The TLS handshake proves the key; an admission decides which keys belong to agents. Admission by
//! ServiceAccount token is in [`crate::cluster`].

mod certificate;
mod static_list;

pub use certificate::{CertificateAdmission, CertificateFiles, CertificateFilesError};
pub use static_list::StaticAdmission;
