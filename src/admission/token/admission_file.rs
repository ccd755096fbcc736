//! The state of admission on the node's disk, so that verified agents admit each other during an
//! API-server outage, also after a restart.
//!
//! The file has mode 0600, in a folder that root owns. Keys, token and verdicts expire as in
//! memory. An unreadable file, and a file that other users can read or write, counts as empty, and
//! the agent starts all the same. A file of another version is renamed ([`read_versioned`]), so
//! that a rollback of the agent does not destroy the file.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use super::verdict_cache::{MAX_PEERS, PeerVerdict};
use crate::files::{read_versioned, write_private};
use crate::model::{NodeName, PeerId};

/// Changes with the meaning of a field. A new field needs no new version: older builds skip the
/// field, and newer builds work without the field.
const VERSION: u32 = 1;

/// Most bytes of the file: 32 768 peers of 200 bytes (PeerId, UID, node name and time), the keys
/// and a token, times four for longer names.
const MAX_BYTES: u64 = 32 << 20;

/// Most bytes of a UID. Kubernetes' UIDs have 36.
const MAX_UID: usize = 64;

#[derive(Serialize, Deserialize)]
pub(super) struct AdmissionFile {
    version: u32,
    pub(super) keys: Option<StoredKeys>,
    pub(super) token: Option<StoredToken>,
    peers: Vec<StoredPeer>,
}

/// The two published documents, unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PublishedKeys {
    pub(super) discovery: String,
    pub(super) jwks: String,
}

/// The cluster's signing keys, as published. These keys are public.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredKeys {
    pub(super) published: PublishedKeys,
    /// Time of the fetch, in seconds since 1970.
    pub(super) at: u64,
}

/// This agent's own token.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredToken {
    /// The key and the pod of the token. An agent with another key or pod does not use the token.
    pub(super) peer: String,
    pub(super) pod: String,
    pub(super) token: String,
    /// The token's expiry, in seconds since 1970.
    pub(super) until: u64,
}

#[derive(Serialize, Deserialize)]
struct StoredPeer {
    peer: String,
    pod_uid: String,
    node: Option<NodeName>,
    until: u64,
}

impl AdmissionFile {
    pub(super) fn new(
        keys: Option<StoredKeys>,
        token: Option<StoredToken>,
        peers: impl IntoIterator<Item = (PeerId, PeerVerdict)>,
    ) -> Self {
        let peers = peers.into_iter().take(MAX_PEERS).map(|(peer, verdict)| StoredPeer {
            peer: peer.to_string(),
            pod_uid: verdict.pod_uid,
            node: verdict.node,
            until: verdict.expires.as_secs(),
        });
        Self { version: VERSION, keys, token, peers: peers.collect() }
    }

    pub(super) fn empty() -> Self {
        Self::new(None, None, [])
    }

    /// Reads the file. An unusable file counts as empty, and the log says why.
    pub(super) fn load(path: &Path) -> Self {
        match read(path) {
            Ok(stored) => stored,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::empty(),
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "the stored keys, token and verdicts are not used");
                Self::empty()
            }
        }
    }

    /// Takes the peers; an entry without a valid PeerId or UID is skipped.
    pub(super) fn peers(&mut self) -> Vec<(PeerId, PeerVerdict)> {
        let peers = std::mem::take(&mut self.peers)
            .into_iter()
            .take(MAX_PEERS)
            .filter(|stored| stored.pod_uid.len() <= MAX_UID);
        let peers = peers.filter_map(|StoredPeer { peer, pod_uid, node, until }| {
            Some((peer.parse().ok()?, PeerVerdict::new(pod_uid, node, Duration::from_secs(until))))
        });
        peers.collect()
    }

    /// Replaces the file atomically.
    pub(super) fn store(&self, path: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(io::Error::other(format!("the file would have more than {MAX_BYTES} bytes")));
        }
        write_private(path, &text)
    }
}

/// Writes the file, one write at a time. A dropped [`AdmissionWriter::write`] does not end its
/// write, and an older write must not replace the content of a newer one.
#[derive(Default)]
pub(super) struct AdmissionWriter(Arc<Mutex<()>>);

impl AdmissionWriter {
    /// Writes the present contents after every earlier write.
    pub(super) async fn write(&self, path: PathBuf, contents: impl FnOnce() -> AdmissionFile) -> io::Result<()> {
        let turn = Arc::clone(&self.0).lock_owned().await;
        let contents = contents();
        let written = spawn_blocking(move || {
            let _turn = turn;
            contents.store(&path)
        });
        written.await?
    }
}

fn read(path: &Path) -> io::Result<AdmissionFile> {
    let text = read_versioned(path, MAX_BYTES, VERSION)?;
    // The parser's error quotes the file, which contains a token.
    serde_json::from_slice(&text).map_err(|_| io::Error::other("the file is damaged"))
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

    use super::*;

    fn admission_file() -> AdmissionFile {
        let keys = StoredKeys { published: PublishedKeys { discovery: "d".into(), jwks: "j".into() }, at: 5 };
        let token = StoredToken { peer: "p".into(), pod: "u".into(), token: "secret".into(), until: 7 };
        let peer = PeerId::from_public_key([3; 32]);
        let verdict = PeerVerdict::new("u-3".into(), Some("node-3".parse().unwrap()), Duration::from_secs(9));
        AdmissionFile::new(Some(keys), Some(token), [(peer, verdict)])
    }

    #[test]
    fn a_write_waits_for_an_earlier_write_whose_caller_was_dropped() {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.max_blocking_threads(1).build().unwrap().block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("admission.json");
            let writer = AdmissionWriter::default();
            // The only thread for blocking work waits, so the first write is begun and not done.
            let (release, released) = std::sync::mpsc::channel::<()>();
            let blocked = spawn_blocking(move || released.recv());
            let mut older = Box::pin(writer.write(path.clone(), AdmissionFile::empty));
            assert!(futures::poll!(&mut older).is_pending());
            drop(older);
            let mut newer = Box::pin(writer.write(path.clone(), || panic!("the older write is not done")));
            assert!(futures::poll!(&mut newer).is_pending());
            drop(newer);
            release.send(()).unwrap();
            blocked.await.unwrap().unwrap();
            writer.write(path.clone(), admission_file).await.unwrap();
            assert_eq!(AdmissionFile::load(&path).peers().len(), 1);
        });
    }

    #[test]
    fn an_admission_file_is_read_back_and_private_to_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admission.json");
        admission_file().store(&path).unwrap();
        admission_file().store(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
        let mut found = AdmissionFile::load(&path);
        assert_eq!(serde_json::to_value(&found).unwrap(), serde_json::to_value(admission_file()).unwrap());
        assert_eq!(found.peers(), admission_file().peers());
    }

    /// The file of the first release.
    const GOLDEN: &str = include_str!("golden/admission-1.json");

    #[test]
    fn the_admission_file_has_the_format_of_released_agents() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admission.json");
        admission_file().store(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), GOLDEN.trim_end(), "other releases read this format");
        write_private(&path, GOLDEN.as_bytes()).unwrap();
        assert_eq!(
            serde_json::to_value(AdmissionFile::load(&path)).unwrap(),
            serde_json::to_value(admission_file()).unwrap()
        );
        let newer = GOLDEN.replace(r#""version":1"#, r#""version":1,"added":{"later":[1]}"#);
        let newer = newer.replace(r#""node":"node-3""#, r#""node":"node-3","added":"later""#);
        write_private(&path, newer.as_bytes()).unwrap();
        assert_eq!(
            AdmissionFile::load(&path).peers(),
            admission_file().peers(),
            "unknown fields of a later release are skipped"
        );
    }

    #[test]
    fn an_admission_file_of_a_later_version_survives_a_rollback() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admission.json");
        let later = r#"{"version":2,"peers":"elsewhere"}"#;
        write_private(&path, later.as_bytes()).unwrap();
        assert!(AdmissionFile::load(&path).peers().is_empty());
        admission_file().store(&path).unwrap();
        assert_eq!(AdmissionFile::load(&path).peers(), admission_file().peers(), "this release writes its own file");
        let aside = folder.path().join("admission.json.version-2");
        assert_eq!(std::fs::read_to_string(&aside).unwrap(), later);
        assert_eq!(std::fs::metadata(&aside).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn an_unusable_admission_file_counts_as_empty() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admission.json");
        let is_empty = || {
            let mut found = AdmissionFile::load(&path);
            found.keys.is_none() && found.token.is_none() && found.peers().is_empty()
        };
        assert!(is_empty(), "no file");
        let write = |text: &[u8], mode| {
            let _ = std::fs::remove_file(&path);
            OpenOptions::new().write(true).create_new(true).mode(mode).open(&path).unwrap().write_all(text).unwrap();
        };
        let good = serde_json::to_vec(&admission_file()).unwrap();
        let other = String::from_utf8(good.clone()).unwrap().replace(r#""version":1"#, r#""version":2"#);
        let too_long = [&good[..], &b" ".repeat(MAX_BYTES as usize)].concat();
        for text in [&b""[..], b"{}", b"\xff\xfe", &good[..good.len() / 2], other.as_bytes(), &too_long] {
            write(text, 0o600);
            assert!(is_empty(), "{} bytes", text.len());
        }
        write(&good, 0o640);
        assert!(is_empty(), "other users can read the file");
        let elsewhere = folder.path().join("elsewhere.json");
        admission_file().store(&elsewhere).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert!(is_empty(), "a link");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(is_empty(), "a folder");
    }
}
