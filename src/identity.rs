//! The agent's ed25519 key, one for gossip and for transfer, stored on the node; and the PeerId
//! that a TLS certificate proves.
//!
//! The file is the 32 bytes of the secret key (RFC 8032, section 5.1.5) and nothing else. The file
//! has no version: a release that needs more uses another file name, which older releases do not
//! read.
//!
//! Not here: admission of peers ([`crate::ports::Admission`]).

use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use libp2p_identity::{Keypair, ed25519};
use libp2p_tls::certificate;
use rustls::CertificateError;
use rustls::pki_types::CertificateDer;

use crate::decide::shared_key::{KeyOrigin, key_origin};
use crate::model::{NodeName, PeerId};

/// Extension of the file beside the key file: the name of the node that the key was made for. A
/// disk image that was made after an agent had run brings the key to other nodes; the recorded name
/// reveals the copy.
const NODE_RECORD: &str = "node";

/// Bytes of a node's name (RFC 1123 subdomain) and a line end at most.
const MAX_RECORD: u64 = 254;

/// An agent's key; the PeerId follows from the key.
#[derive(Clone)]
pub struct Identity {
    key: ed25519::Keypair,
}

/// The key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read or written.
    #[error("the key file {path}: {source}")]
    Io {
        /// The key file.
        path: PathBuf,
        /// The error of the read or write.
        source: io::Error,
    },
    /// Other users can read the file, so the key may have leaked.
    #[error(
        "the key file {path} has mode {mode:o}; it must be 600: `chmod 600` the file \
         if the key cannot have leaked, else delete the file"
    )]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// The permission bits.
        mode: u32,
    },
    /// The content is no key.
    #[error("the key file {0} has no ed25519 key; delete the file, and the next start makes a new key")]
    Malformed(PathBuf),
}

impl Identity {
    /// A key for the life of the process.
    pub fn generate() -> Self {
        Self { key: ed25519::Keypair::generate() }
    }

    /// The key of this node: the key at `path`, or a new key when there is no file or the key was
    /// made for another node. The file `identity.node` beside `identity.key` has the node's name.
    ///
    /// Releases before the file `identity.node` ignore that file, so the key survives a rollback; a
    /// key of such a release is kept.
    ///
    /// # Errors
    /// [`IdentityError`]; an unusable key file is never replaced.
    pub fn load_or_create_for_node(path: &Path, node: &NodeName) -> Result<Self, IdentityError> {
        let identity = Self::load_or_create(path)?;
        let recorded = recorded_node(path).map_err(|source| IdentityError::Io { path: path.to_owned(), source })?;
        match key_origin(recorded.as_deref(), node) {
            KeyOrigin::Own => Ok(identity),
            KeyOrigin::Unknown => {
                record_node(path, node).map_err(|source| IdentityError::Io { path: path.to_owned(), source })?;
                Ok(identity)
            }
            KeyOrigin::Copied => {
                let made = Self::replace(path, node)?;
                tracing::warn!(
                    file = %path.display(),
                    made_for = recorded.as_deref().unwrap_or_default().trim(),
                    %node,
                    peer = %made.peer_id(),
                    "the key was made for another node, as on a copied disk; this node has a new key"
                );
                Ok(made)
            }
        }
    }

    /// Replaces the key at `path` by a new key for this node.
    ///
    /// # Errors
    /// [`IdentityError::Io`].
    pub fn replace(path: &Path, node: &NodeName) -> Result<Self, IdentityError> {
        let at = |source| IdentityError::Io { path: path.to_owned(), source };
        let identity = Self::generate();
        // The key first: after a kill between the two writes the next start makes one more key. The
        // other order would leave another node's key with this node's name.
        identity.store(path).map_err(at)?;
        record_node(path, node).map_err(at)?;
        Ok(identity)
    }

    /// Reads the key at `path`, or makes a key and writes the file with mode 0600.
    ///
    /// A kill leaves no half-written key: the file appears by a rename.
    ///
    /// # Errors
    /// [`IdentityError`]; an unusable file is never replaced, because peers identify the node by
    /// this key.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        let at = |source| IdentityError::Io { path: path.to_owned(), source };
        match std::fs::read(path) {
            Ok(mut secret) => {
                let mode = std::fs::metadata(path).map_err(at)?.permissions().mode() & 0o777;
                if mode & 0o077 != 0 {
                    return Err(IdentityError::Exposed { path: path.to_owned(), mode });
                }
                // The parser wipes the secret from `secret`.
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
        write_whole(path, self.key.secret().as_ref())
    }

    /// The PeerId of the key.
    pub fn peer_id(&self) -> PeerId {
        PeerId::from_public_key(self.key.public().to_bytes())
    }

    /// The key as libp2p's crates expect it.
    pub fn keypair(&self) -> Keypair {
        self.key.clone().into()
    }
}

/// The content of the file beside the key; `None` when there is no file or the content is not
/// UTF-8.
fn recorded_node(key: &Path) -> io::Result<Option<String>> {
    let file = match std::fs::File::open(key.with_extension(NODE_RECORD)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_RECORD).read_to_end(&mut bytes)?;
    Ok(String::from_utf8(bytes).ok())
}

fn record_node(key: &Path, node: &NodeName) -> io::Result<()> {
    write_whole(&key.with_extension(NODE_RECORD), format!("{node}\n").as_bytes())
}

/// Writes a file with mode 0600, which appears complete by a rename.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("has no parent folder"))?;
    std::fs::create_dir_all(folder)?;
    let staged = path.with_extension("new");
    let _ = std::fs::remove_file(&staged);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staged)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&staged, path)?;
    std::fs::File::open(folder)?.sync_all()
}

/// Converts libp2p's PeerId; `None` when the key is not ed25519.
pub fn peer_id_of(peer: &libp2p_identity::PeerId) -> Option<PeerId> {
    PeerId::from_multihash(&peer.to_bytes()).ok()
}

/// Converts to libp2p's PeerId.
///
/// # Panics
/// Never for a PeerId that was read from a peer or made from a key; see
/// [`PeerId::from_public_key`].
pub fn libp2p_peer_id(peer: PeerId) -> libp2p_identity::PeerId {
    libp2p_identity::PeerId::from_bytes(&peer.to_multihash()).expect("an identity multihash is a valid PeerId")
}

/// The peer whose key signed the key of `certificate`. The libp2p specification, "TLS handshake",
/// defines such a certificate: self-signed, valid now, and with the extension in which the node's
/// key signs the certificate's key. `more` must be empty: a chain is rejected.
///
/// # Errors
/// `BadEncoding` when the certificate does not parse, `ApplicationVerificationFailure` for a chain
/// and for another kind of key.
pub fn peer_of_certificate(
    certificate: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> Result<PeerId, CertificateError> {
    let parsed = certificate::parse(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let peer = peer_id_of(&parsed.peer_id()).filter(|_| intermediates.is_empty());
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
    fn a_chain_a_changed_certificate_and_another_kind_of_key_are_rejected() {
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
    fn a_created_key_is_loaded_at_the_next_start() {
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
    fn a_key_that_was_copied_to_another_node_is_replaced_on_that_node_alone() {
        let (golden, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (first, second): (NodeName, NodeName) = ("n1".parse().unwrap(), "n2".parse().unwrap());
        let [original, copy] = [&golden, &other].map(|folder| folder.path().join("identity.key"));
        let made = Identity::load_or_create_for_node(&original, &first).unwrap();
        for file in ["identity.key", "identity.node"] {
            std::fs::copy(golden.path().join(file), other.path().join(file)).unwrap();
        }
        let copied = Identity::load_or_create_for_node(&copy, &second).unwrap();
        assert_ne!(copied.peer_id(), made.peer_id());
        for _ in 0..2 {
            assert_eq!(Identity::load_or_create_for_node(&original, &first).unwrap().peer_id(), made.peer_id());
            assert_eq!(Identity::load_or_create_for_node(&copy, &second).unwrap().peer_id(), copied.peer_id(), "once");
        }
        assert_eq!(std::fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_key_of_a_release_without_the_record_survives_an_upgrade_and_a_rollback() {
        let folder = tempfile::tempdir().unwrap();
        let (path, node) = (folder.path().join("identity.key"), "n1".parse().unwrap());
        let old = Identity::load_or_create(&path).unwrap().peer_id();
        assert_eq!(Identity::load_or_create_for_node(&path, &node).unwrap().peer_id(), old, "upgraded");
        assert_eq!(Identity::load_or_create(&path).unwrap().peer_id(), old, "rolled back");
        assert_eq!(Identity::load_or_create_for_node(&path, &node).unwrap().peer_id(), old, "upgraded again");
        std::fs::write(path.with_extension("node"), b"\xff\0").unwrap();
        assert_eq!(
            Identity::load_or_create_for_node(&path, &node).unwrap().peer_id(),
            old,
            "a damaged record is ignored"
        );
        assert_eq!(std::fs::read(path.with_extension("node")).unwrap(), b"n1\n");
    }

    #[test]
    fn a_kill_between_key_and_record_leaves_no_other_nodes_key_under_this_nodes_name() {
        let folder = tempfile::tempdir().unwrap();
        let (path, node) = (folder.path().join("identity.key"), "n2".parse().unwrap());
        let copied = Identity::load_or_create_for_node(&path, &"n1".parse().unwrap()).unwrap().peer_id();
        // A kill between the writes: the new key is stored, the record still names the other node.
        Identity::generate().store(&path).unwrap();
        let made = Identity::load_or_create_for_node(&path, &node).unwrap().peer_id();
        assert_ne!(made, copied);
        assert_eq!(Identity::load_or_create_for_node(&path, &node).unwrap().peer_id(), made);
    }

    #[test]
    fn a_key_that_others_can_read_is_rejected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity.key");
        Identity::load_or_create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Identity::load_or_create(&path), Err(IdentityError::Exposed { mode: 0o644, .. })));
    }

    #[test]
    fn a_file_that_is_no_key_is_rejected_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity.key");
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).open(&path).unwrap().write_all(b"short").unwrap();
        assert!(matches!(Identity::load_or_create(&path), Err(IdentityError::Malformed(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"short");
    }

    #[test]
    fn both_libraries_derive_the_same_peer_id_from_a_key() {
        let identity = Identity::generate();
        let theirs = identity.keypair().public().to_peer_id();
        assert_eq!(theirs.to_string(), identity.peer_id().to_string());
        assert_eq!(libp2p_peer_id(identity.peer_id()), theirs);
        assert_eq!(peer_id_of(&theirs), Some(identity.peer_id()));
    }
}
