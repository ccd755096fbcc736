//! Admission by certificate: the agent signs for its PeerId with the key of a certificate from the
//! operator's authority.
//!
//! The issuer, usually cert-manager, replaces the files long before they expire, so the agent reads
//! the files again. Not here: the verification of a certificate
//! ([`crate::credential::certificate`]).

use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::RwLock;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use crate::credential::certificate::{
    Authority, AuthorityError, CertificateRejection, MAX_BYTES, STATEMENT_LIFE, encode_credential, statement, verify,
};
use crate::model::{Credential, PeerId};
use crate::ports::{Admission, AdmittedPeer, Rejection};
use crate::util::clock::unix_time;

/// Interval of reading the files. The kubelet updates a mounted Secret only about once a minute.
const RELOAD_INTERVAL: Duration = Duration::from_secs(30);

/// Age at which a statement is signed anew. The other half of its life covers peers that are hard
/// to reach.
const RESIGN_AFTER: Duration = STATEMENT_LIFE.checked_div(2).expect("two is not zero");

/// Bytes of a chain, a bundle of authorities or a key at most. The largest have some ten KiB.
const MAX_FILE: u64 = 256 << 10;

/// The paths of the files, and the name that agents' certificates must carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    /// PEM: the agent's certificate and the intermediates up to the authority.
    pub certificate: PathBuf,
    /// PEM: the agent's private key, with mode 600.
    pub key: PathBuf,
    /// PEM: the trusted authorities.
    pub authority: PathBuf,
    /// The DNS name in every agent's certificate.
    pub name: String,
}

/// The certificate files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateFilesError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the read.
        source: io::Error,
    },
    /// Other users can read the key.
    #[error("the key {path} has mode {mode:o}; it must be 600")]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// The permission bits.
        mode: u32,
    },
    /// The content of a file is malformed.
    #[error("{path}: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The defect of the content.
        reason: String,
    },
    /// Peers would reject this agent's own credential.
    #[error("peers would not admit this agent: {0}")]
    Rejected(#[from] CertificateRejection),
}

/// Admits owners of certificates that the authority issued.
pub struct CertificateAdmission {
    peer: PeerId,
    files: CertificateFiles,
    current: RwLock<Arc<SignedCredential>>,
    renewals: watch::Sender<u64>,
}

/// The file contents, and the credential signed with them.
struct SignedCredential {
    contents: FileContents,
    authority: Authority,
    credential: Credential,
    issued: Duration,
}

#[derive(PartialEq, Eq)]
struct FileContents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    authority: Vec<u8>,
}

impl CertificateAdmission {
    /// Reads the files and signs for `peer`, this agent's key.
    ///
    /// # Errors
    /// [`CertificateFilesError`]. Files that become unusable later change nothing until the last
    /// statement expires.
    pub fn open(files: CertificateFiles, peer: PeerId) -> Result<Self, CertificateFilesError> {
        let signed = SignedCredential::sign(FileContents::read(&files)?, &files, peer, unix_time())?;
        Ok(Self { peer, files, current: RwLock::new(Arc::new(signed)), renewals: watch::Sender::default() })
    }

    /// Reads the files and renews the statement, until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(RELOAD_INTERVAL)).await.is_some() {
            let admission = self.clone();
            match spawn_blocking(move || admission.reload(unix_time())).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the certificate files cannot be used; the previous credential stays")
                }
                Err(error) => tracing::error!(%error, "reading the certificate files failed"),
            }
        }
    }

    fn reload(&self, now: Duration) -> Result<(), CertificateFilesError> {
        let (contents, previous) = (FileContents::read(&self.files)?, self.signed_credential());
        if contents == previous.contents && now < previous.issued + RESIGN_AFTER {
            return Ok(());
        }
        let signed = SignedCredential::sign(contents, &self.files, self.peer, now)?;
        *self.current.write() = Arc::new(signed);
        self.renewals.send_modify(|renewals| *renewals += 1);
        Ok(())
    }

    fn signed_credential(&self) -> Arc<SignedCredential> {
        self.current.read().clone()
    }
}

#[async_trait]
impl Admission for CertificateAdmission {
    async fn credential(&self) -> Result<Credential, Rejection> {
        let signed = self.signed_credential();
        if unix_time() > signed.issued + STATEMENT_LIFE {
            return Err(Rejection::Undecided(
                "this agent's last statement has expired; check the certificate files".to_owned(),
            ));
        }
        Ok(signed.credential.clone())
    }

    fn credential_changes(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        self.admit_relayed(peer, credential)
    }

    fn admit_relayed(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        let verdict = verify(credential.expose(), peer, &self.signed_credential().authority, unix_time());
        let valid_until = verdict.map_err(|rejection| Rejection::Denied(rejection.to_string()))?;
        Ok(AdmittedPeer { node: None, pod: None, valid_until, is_in_grace: false })
    }
}

impl FileContents {
    fn read(files: &CertificateFiles) -> Result<Self, CertificateFilesError> {
        let mode = std::fs::metadata(&files.key).map_err(at(&files.key))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(CertificateFilesError::Exposed { path: files.key.clone(), mode });
        }
        let [certificate, key, authority] = [&files.certificate, &files.key, &files.authority].map(|path| {
            let mut bytes = Vec::new();
            let file = std::fs::File::open(path).map_err(at(path))?;
            file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(at(path))?;
            let fits = bytes.len() as u64 <= MAX_FILE;
            fits.then_some(bytes).ok_or_else(|| malformed(path, format!("the file has more than {MAX_FILE} bytes")))
        });
        Ok(Self { certificate: certificate?, key: key?, authority: authority? })
    }
}

impl SignedCredential {
    /// Signs for `peer`, and verifies the credential as peers do.
    fn sign(
        contents: FileContents,
        files: &CertificateFiles,
        peer: PeerId,
        now: Duration,
    ) -> Result<Self, CertificateFilesError> {
        let certificates = |path: &Path, bytes: &[u8]| {
            let all = CertificateDer::pem_slice_iter(bytes).collect::<Result<Vec<_>, _>>();
            let all = all.map_err(|error| malformed(path, format!("not certificates in PEM: {error}")))?;
            if all.is_empty() { Err(malformed(path, "the file has no certificate".to_owned())) } else { Ok(all) }
        };
        let chain = certificates(&files.certificate, &contents.certificate)?;
        let authorities = certificates(&files.authority, &contents.authority)?;
        let authority = Authority::new(&authorities, &files.name)
            .map_err(|error: AuthorityError| malformed(&files.authority, error.to_string()))?;
        // A parser's error is not repeated: the text could contain a part of the key.
        let no_key = |_| malformed(&files.key, "the file has no private key of a supported kind".to_owned());
        let key = PrivateKeyDer::from_pem_slice(&contents.key).map_err(|_| no_key(()))?;
        let key = any_supported_type(&key).map_err(|_| no_key(()))?;
        let signer = key.choose_scheme(&authority.schemes()).ok_or_else(|| no_key(()))?;
        let signature = signer.sign(&statement(peer, now)).map_err(|_| no_key(()))?;
        let credential = encode_credential(now, signer.scheme(), &signature, &chain);
        if credential.expose().len() > MAX_BYTES {
            return Err(CertificateRejection::TooLong.into());
        }
        verify(credential.expose(), peer, &authority, now)?;
        Ok(Self { contents, authority, credential, issued: now })
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> CertificateFilesError {
    move |source| CertificateFilesError::Io { path: path.to_owned(), source }
}

fn malformed(path: &Path, reason: String) -> CertificateFilesError {
    CertificateFilesError::Malformed { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests;
