//! The agent's key: one ed25519 key for gossip and for bulk transfer, kept on the node; and whose key a TLS certificate proves.
//!
//! The file is the 32 bytes of the secret key (RFC 8032, section 5.1.5) and nothing else. It has no version: a release that needs
//! more keeps it in a file of another name, which an older release does not look for.
//!
//! Not here: who is admitted (that is [`crate::ports::Admission`]'s).

use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use libp2p_identity::{Keypair, ed25519};
use libp2p_tls::certificate;
use rustls::CertificateError;
use rustls::pki_types::CertificateDer;

use crate::model::PeerId;

/// A key and the name that follows from it.
#[derive(Clone)]
pub struct Identity {
    key: ed25519::Keypair,
}

/// The key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Reading or writing it failed.
    #[error("the key file {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is readable by others, so the key may be known to them.
    #[error(
        "the key file {path} has mode {mode:o}; it must be 600: `chmod 600` it if nobody else can have read it, else delete it"
    )]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It holds something else than a key.
    #[error("the key file {0} holds no ed25519 key; delete it to have a new one made")]
    Malformed(PathBuf),
}

impl Identity {
    /// A key that lives as long as the process.
    pub fn generate() -> Self {
        Self { key: ed25519::Keypair::generate() }
    }

    /// Reads the key at `path`, or makes one and keeps it there with mode 0600.
    ///
    /// A kill in between leaves no half-written key: the file appears whole, by a rename.
    ///
    /// # Errors
    /// [`IdentityError`]; an unusable file is never replaced, because the peers know the node by its key.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        let at = |source| IdentityError::Io { path: path.to_owned(), source };
        match std::fs::read(path) {
            Ok(mut secret) => {
                let mode = std::fs::metadata(path).map_err(at)?.permissions().mode() & 0o777;
                if mode & 0o077 != 0 {
                    return Err(IdentityError::Exposed { path: path.to_owned(), mode });
                }
                // The secret is wiped from `secret` by the parser.
                let secret = ed25519::SecretKey::try_from_bytes(&mut secret)
                    .map_err(|_| IdentityError::Malformed(path.to_owned()))?;
                Ok(Self { key: secret.into() })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let identity = Self::generate();
                identity.store(path).map_err(at)?;
                Ok(identity)
            }
            Err(error) => Err(at(error)),
        }
    }

    fn store(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().ok_or_else(|| io::Error::other("has no parent folder"))?;
        std::fs::create_dir_all(folder)?;
        let staged = path.with_extension("new");
        let _ = std::fs::remove_file(&staged);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staged)?;
        file.write_all(self.key.secret().as_ref())?;
        file.sync_all()?;
        std::fs::rename(&staged, path)?;
        std::fs::File::open(folder)?.sync_all()
    }

    /// The name that others know this key by.
    pub fn peer_id(&self) -> PeerId {
        PeerId::from_public_key(self.key.public().to_bytes())
    }

    /// The key in the form that libp2p's crates take.
    pub fn keypair(&self) -> Keypair {
        self.key.clone().into()
    }
}

/// Our name of a peer, from libp2p's; `None` when its key is not ed25519.
pub fn peer_id_of(peer: &libp2p_identity::PeerId) -> Option<PeerId> {
    PeerId::from_multihash(&peer.to_bytes()).ok()
}

/// libp2p's name of a peer.
///
/// # Panics
/// Never for a name that was read from a peer or made from a key; see [`PeerId::from_public_key`].
pub fn libp2p_peer_id(peer: PeerId) -> libp2p_identity::PeerId {
    libp2p_identity::PeerId::from_bytes(&peer.to_multihash()).expect("an identity multihash is a valid PeerId")
}

/// The peer whose key signed the key of this certificate, which has to be a libp2p one (libp2p specification, "TLS handshake"):
/// self-signed, valid now, with the extension in which the node's key signs the certificate's, and alone.
///
/// # Errors
/// As rustls wants them.
pub fn peer_of_certificate(
    certificate: &CertificateDer<'_>,
    more: &[CertificateDer<'_>],
) -> Result<PeerId, CertificateError> {
    let parsed = certificate::parse(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let peer = peer_id_of(&parsed.peer_id()).filter(|_| more.is_empty());
    peer.ok_or(CertificateError::ApplicationVerificationFailure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_names_the_key_that_it_was_made_for() {
        let identity = Identity::generate();
        let (certificate, _) = certificate::generate(&identity.keypair()).unwrap();
        assert_eq!(peer_of_certificate(&certificate, &[]), Ok(identity.peer_id()));
    }

    #[test]
    fn a_chain_a_changed_certificate_and_another_kind_of_key_are_refused() {
        let (certificate, _) = certificate::generate(&Identity::generate().keypair()).unwrap();
        assert!(peer_of_certificate(&certificate, std::slice::from_ref(&certificate)).is_err(), "a chain");
        for at in (0..certificate.len()).step_by(7) {
            let mut bytes = certificate.to_vec();
            bytes[at] ^= 1;
            assert!(peer_of_certificate(&bytes.into(), &[]).is_err(), "byte {at} changed");
        }
        assert!(peer_of_certificate(&CertificateDer::from(Vec::new()), &[]).is_err(), "nothing");
    }

    #[test]
    fn a_key_is_kept_and_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/identity.key");
        let made = Identity::load_or_create(&path).unwrap();
        let found = Identity::load_or_create(&path).unwrap();
        assert_eq!(made.peer_id(), found.peer_id());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_file_is_as_released_agents_read_and_write_it() {
        // RFC 8032, section 7.1, test 1: a secret key and its public key.
        const SECRET: [u8; 32] = *b"\x9d\x61\xb1\x9d\xef\xfd\x5a\x60\xba\x84\x4a\xf4\x92\xec\x2c\xc4\
            \x44\x49\xc5\x69\x7b\x32\x69\x19\x70\x3b\xac\x03\x1c\xae\x7f\x60";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity.key");
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).open(&path).unwrap().write_all(&SECRET).unwrap();
        let found = Identity::load_or_create(&path).unwrap();
        assert_eq!(found.peer_id().public_key()[..4], [0xd7, 0x5a, 0x98, 0x01]);
        let again = folder.path().join("again.key");
        found.store(&again).unwrap();
        assert_eq!(std::fs::read(&again).unwrap(), SECRET);
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity.key");
        Identity::load_or_create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Identity::load_or_create(&path), Err(IdentityError::Exposed { mode: 0o644, .. })));
    }

    #[test]
    fn a_file_that_is_no_key_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity.key");
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).open(&path).unwrap().write_all(b"short").unwrap();
        assert!(matches!(Identity::load_or_create(&path), Err(IdentityError::Malformed(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"short");
    }

    #[test]
    fn both_libraries_know_the_key_by_the_same_name() {
        let identity = Identity::generate();
        let theirs = identity.keypair().public().to_peer_id();
        assert_eq!(theirs.to_string(), identity.peer_id().to_string());
        assert_eq!(libp2p_peer_id(identity.peer_id()), theirs);
        assert_eq!(peer_id_of(&theirs), Some(identity.peer_id()));
    }
}
