//! Admission of peers: by ServiceAccount token, by certificate, or by a static list of PeerIds.
//!
//! The TLS handshake proves the peer's key. An admission decides whether an agent owns the key, and
//! is asked by [`crate::transfer`] for every new connection ([`crate::ports::Admission`]).

mod certificate;
mod static_list;
mod token;

pub use certificate::{CertificateAdmission, CertificateFiles, CertificateFilesError};
pub use static_list::StaticAdmission;
pub use token::{TokenAdmission, TokenAdmissionOptions};
