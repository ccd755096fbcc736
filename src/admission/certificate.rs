//! Admission by certificate: the agent signs for its PeerId with the key of a certificate that the operator's authority issued.
//!
//! The files are looked at again, because whoever issues them (cert-manager, as a rule) replaces them long before their end. Not here:
//! what makes a certificate good ([`crate::credential::certificate`]).

use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
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

/// How often the files are looked at: the kubelet brings a changed Secret within a minute or so anyway.
const RELOAD_INTERVAL: Duration = Duration::from_secs(30);

/// A statement is signed anew when it is so old: the other half of its life is left for a peer that is hard to reach.
const RESIGN_AFTER: Duration = STATEMENT_LIFE.checked_div(2).expect("two is not zero");

/// A chain, a bundle of authorities or a key; the largest of them have some ten KiB.
const MAX_FILE: u64 = 256 << 10;

/// Where everything is, and what agents' certificates must be for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The agent's certificate and those between it and the authority's, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM; readable by its owner alone.
    pub key: PathBuf,
    /// The authorities that are believed, PEM.
    pub authority: PathBuf,
    /// The DNS name that every agent's certificate carries.
    pub name: String,
}

/// The files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateFilesError {
    /// One cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others than its owner may know the key.
    #[error("the key {path} has mode {mode:o}; it must be 600")]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// One holds something else.
    #[error("{path}: {reason}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// No agent would admit this one.
    #[error("peers would not admit this agent: {0}")]
    Rejected(#[from] CertificateRejection),
}

/// Admits owners of certificates of one authority.
pub struct CertificateAdmission {
    peer: PeerId,
    files: CertificateFiles,
    current: RwLock<Arc<SignedCredential>>,
    renewals: watch::Sender<u64>,
}

/// What the files held, and the statement that was signed with it.
struct SignedCredential {
    read: FileContents,
    authority: Authority,
    credential: Credential,
    issued: Duration,
}

/// The files as they are on disk.
#[derive(PartialEq, Eq)]
struct FileContents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    authority: Vec<u8>,
}

impl CertificateAdmission {
    /// For the agent whose key is `peer`.
    ///
    /// # Errors
    /// [`CertificateError`]; files that go bad later change nothing before the last statement ends.
    pub fn open(files: CertificateFiles, peer: PeerId) -> Result<Self, CertificateFilesError> {
        let material = SignedCredential::sign(FileContents::read(&files)?, &files, peer, now())?;
        Ok(Self { peer, files, current: RwLock::new(Arc::new(material)), renewals: watch::Sender::default() })
    }

    /// Looks at the files, and signs again, until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(RELOAD_INTERVAL)).await.is_some() {
            let looking = self.clone();
            match spawn_blocking(move || looking.reload(now())).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the certificate's files cannot be used; the last ones stay"),
                Err(error) => tracing::error!(%error, "looking at the certificate's files failed"),
            }
        }
    }

    fn reload(&self, now: Duration) -> Result<(), CertificateFilesError> {
        let (read, before) = (FileContents::read(&self.files)?, self.signed_credential());
        if read == before.read && now < before.issued + RESIGN_AFTER {
            return Ok(());
        }
        let material = SignedCredential::sign(read, &self.files, self.peer, now)?;
        *self.current.write().expect("nothing panics while holding it") = Arc::new(material);
        self.renewals.send_modify(|renewals| *renewals += 1);
        Ok(())
    }

    fn signed_credential(&self) -> Arc<SignedCredential> {
        self.current.read().expect("nothing panics while holding it").clone()
    }
}

#[async_trait]
impl Admission for CertificateAdmission {
    async fn credential(&self) -> Result<Credential, Rejection> {
        let material = self.signed_credential();
        if now() > material.issued + STATEMENT_LIFE {
            return Err(Rejection::Undecided("this agent's certificate cannot be used any more".to_owned()));
        }
        Ok(material.credential.clone())
    }

    fn credential_changes(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        self.admit_relayed(peer, credential)
    }

    fn admit_relayed(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        let decided = verify(credential.expose(), peer, &self.signed_credential().authority, now());
        let valid_until = decided.map_err(|flaw| Rejection::Denied(flaw.to_string()))?;
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
            fits.then_some(bytes).ok_or_else(|| malformed(path, format!("it has more than {MAX_FILE} bytes")))
        });
        Ok(Self { certificate: certificate?, key: key?, authority: authority? })
    }
}

impl SignedCredential {
    /// Signs for `peer`, and makes sure that peers will agree.
    fn sign(
        read: FileContents,
        files: &CertificateFiles,
        peer: PeerId,
        now: Duration,
    ) -> Result<Self, CertificateFilesError> {
        let certificates = |path: &Path, bytes: &[u8]| {
            let all = CertificateDer::pem_slice_iter(bytes).collect::<Result<Vec<_>, _>>();
            let all = all.map_err(|error| malformed(path, format!("not certificates in PEM: {error}")))?;
            if all.is_empty() { Err(malformed(path, "it holds no certificate".to_owned())) } else { Ok(all) }
        };
        let chain = certificates(&files.certificate, &read.certificate)?;
        let authorities = certificates(&files.authority, &read.authority)?;
        let authority = Authority::new(&authorities, &files.name)
            .map_err(|error: AuthorityError| malformed(&files.authority, error.to_string()))?;
        // What is wrong with a key is not repeated: the text could be part of it.
        let no_key = |_| malformed(&files.key, "it holds no private key of a kind that signs".to_owned());
        let key = PrivateKeyDer::from_pem_slice(&read.key).map_err(|_| no_key(()))?;
        let key = any_supported_type(&key).map_err(|_| no_key(()))?;
        let signer = key.choose_scheme(&authority.schemes()).ok_or_else(|| no_key(()))?;
        let signature = signer.sign(&statement(peer, now)).map_err(|_| no_key(()))?;
        let credential = encode_credential(now, signer.scheme(), &signature, &chain);
        if credential.expose().len() > MAX_BYTES {
            return Err(CertificateRejection::TooLong.into());
        }
        verify(credential.expose(), peer, &authority, now)?;
        Ok(Self { read, authority, credential, issued: now })
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> CertificateFilesError {
    move |source| CertificateFilesError::Io { path: path.to_owned(), source }
}

fn malformed(path: &Path, reason: String) -> CertificateFilesError {
    CertificateFilesError::Malformed { path: path.to_owned(), reason }
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests;
