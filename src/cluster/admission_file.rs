//! What admission keeps on the node, so that agents that know each other go on while the API server is away, also over a restart.
//!
//! A file with mode 0600 in a folder of root's. It is believed as far as its age allows and never more; one that cannot be read, or
//! that others could have read or written, counts as none, and the agent starts all the same. One of another version is kept aside
//! ([`read_versioned`]): a rollback does not cost the file.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::jwks::PublishedKeys;
use super::verdict_cache::{MAX_PEERS, PeerVerdict};
use crate::files::{read_versioned, write_private};
use crate::model::{NodeName, PeerId};

/// Changes with the meaning of a field. A new field needs no new version: older builds pass over it, and newer ones do without it.
const VERSION: u32 = 1;

/// 32 768 peers of 200 bytes (PeerId, UID, a node's name and the time), keys and a token; four times as
/// much, for longer names.
const MAX_BYTES: u64 = 32 << 20;

/// A UID has 36 bytes; the longest that are read.
const MAX_UID: usize = 64;

/// The whole file.
#[derive(Serialize, Deserialize)]
pub(super) struct AdmissionFile {
    version: u32,
    pub(super) keys: Option<StoredKeys>,
    pub(super) token: Option<StoredToken>,
    peers: Vec<StoredPeer>,
}

/// The cluster's keys as they were published; they are public.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredKeys {
    pub(super) published: PublishedKeys,
    /// When, in seconds since 1970.
    pub(super) at: u64,
}

/// This agent's own token.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredToken {
    /// Whose: another key's or pod's is of no use.
    pub(super) peer: String,
    pub(super) pod: String,
    pub(super) token: String,
    /// Its end, in seconds since 1970.
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

    /// What the file holds; nothing, and a line in the log, where it cannot be used.
    pub(super) fn load(path: &Path) -> Self {
        match read(path) {
            Ok(kept) => kept,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::empty(),
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "what was known of the mesh is not used");
                Self::empty()
            }
        }
    }

    /// The peers, without those that are none.
    pub(super) fn peers(&mut self) -> Vec<(PeerId, PeerVerdict)> {
        let peers =
            std::mem::take(&mut self.peers).into_iter().take(MAX_PEERS).filter(|kept| kept.pod_uid.len() <= MAX_UID);
        let peers = peers.filter_map(|StoredPeer { peer, pod_uid, node, until }| {
            Some((peer.parse().ok()?, PeerVerdict::new(pod_uid, node, Duration::from_secs(until))))
        });
        peers.collect()
    }

    /// Writes the file whole or not at all.
    pub(super) fn store(&self, path: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(io::Error::other(format!("it would have more than {MAX_BYTES} bytes")));
        }
        write_private(path, &text)
    }
}

fn read(path: &Path) -> io::Result<AdmissionFile> {
    let text = read_versioned(path, MAX_BYTES, VERSION)?;
    // Not the parser's words, which repeat what it found: there is a token in it.
    serde_json::from_slice(&text).map_err(|_| io::Error::other("it is damaged"))
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
    fn an_admission_file_is_read_back_and_private_to_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admission.json");
        admission_file().store(&path).unwrap();
        admission_file().store(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        let mut found = AdmissionFile::load(&path);
        assert_eq!(serde_json::to_value(&found).unwrap(), serde_json::to_value(admission_file()).unwrap());
        assert_eq!(found.peers(), admission_file().peers());
    }

    /// As the first release wrote it.
    const GOLDEN: &str = include_str!("golden/admission-1.json");

    #[test]
    fn the_admission_file_has_the_format_of_released_agents() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admission.json");
        admission_file().store(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), GOLDEN.trim_end(), "other builds read this");
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
            "fields of a later build are passed over"
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
        assert_eq!(
            AdmissionFile::load(&path).peers(),
            admission_file().peers(),
            "this build goes on with a file of its own"
        );
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
        assert!(is_empty(), "there is none");
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
        assert!(is_empty(), "others can read it");
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
