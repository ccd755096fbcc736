//! The address book: peers of an earlier process, in a file on the node. With the address book an
//! agent finds the mesh while DNS and the API server are both down.
//!
//! Entries are hints like any address. A peer must be admitted first, so a wrong file costs some
//! failed dials. The file has nodes and addresses, and no secret.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::files::{read_versioned, write_private};
use crate::model::{NodeName, Peer, PeerId, Release, Zone};
use crate::util::clock;

/// Peers in the file. One answer is enough: when nine of ten nodes are gone, 25 are left.
pub(super) const MAX_PEERS: usize = 256;

/// Longest file that is read. An entry has at most 750 bytes: a node's name 253, a zone 63, a
/// PeerId 52, a release 32, two addresses of up to 58, and some 200 for names and numbers. A
/// written file is always shorter.
const MAX_BYTES: u64 = (MAX_PEERS as u64) << 10;

/// A peer that was not seen for this long is dropped: another host may have its address by then.
const RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);

/// Interval of writes that only renew [`KnownPeer::last_seen`].
const REWRITE_AFTER: Duration = Duration::from_secs(3600);

/// Changes with the meaning of a field. A new field needs no new version: older builds ignore the
/// field, and newer builds accept files without the field.
const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct KnownPeer {
    #[serde(with = "as_text")]
    pub(super) peer_id: PeerId,
    pub(super) node: NodeName,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) zone: Option<Zone>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) release: Option<Release>,
    pub(super) transfer: SocketAddr,
    pub(super) gossip: SocketAddr,
    /// In seconds since 1970.
    pub(super) last_seen: u64,
}

#[derive(Serialize, Deserialize)]
struct AddressBookFile {
    version: u32,
    peers: Vec<KnownPeer>,
}

/// The address book, and its file.
pub(super) struct AddressBook {
    path: PathBuf,
    /// At most [`MAX_PEERS`].
    peers: Vec<KnownPeer>,
    /// The peers in the file.
    written: Vec<KnownPeer>,
    /// Ranks the peers: random, and constant during the life of the process, so that a peer that
    /// comes or goes changes little.
    rank: RandomState,
}

impl KnownPeer {
    pub(super) fn new(peer: &Peer, release: Option<Release>, now: u64) -> Self {
        let Peer { id, node, zone, transfer, gossip } = peer.clone();
        Self { peer_id: id, node, zone, release, transfer, gossip, last_seen: now }
    }

    fn is_fresh(&self, now: u64) -> bool {
        now.saturating_sub(self.last_seen) <= RETENTION.as_secs()
    }
}

impl AddressBook {
    /// Opens the file. An unusable file counts as empty, with a line in the log.
    pub(super) fn open(path: PathBuf) -> Self {
        let peers = match read(&path, now()) {
            Ok(peers) => peers,
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "the address book is not used; peers are found by DNS");
                Vec::new()
            }
        };
        Self { path, written: peers.clone(), peers, rank: RandomState::new() }
    }

    /// The peers' addresses, in random order.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let mut addresses: Vec<_> = self.peers.iter().map(|peer| peer.transfer).collect();
        addresses.sort_by_cached_key(|address| self.rank.hash_one(address));
        addresses
    }

    /// Replaces the live peers. Returns the path and the text of the file if the file changed.
    pub(super) fn update(&mut self, live_peers: Vec<KnownPeer>) -> Option<(PathBuf, Vec<u8>)> {
        let now = now();
        self.peers = select_peers(live_peers, std::mem::take(&mut self.peers), now, |peer| self.rank.hash_one(peer));
        if !is_worth_writing(&self.written, &self.peers) {
            return None;
        }
        self.written.clone_from(&self.peers);
        let file = AddressBookFile { version: VERSION, peers: self.peers.clone() };
        Some((self.path.clone(), serde_json::to_vec_pretty(&file).expect("names and numbers are JSON")))
    }

    /// Marks the file as not written, so that the next update writes again.
    pub(super) fn mark_unwritten(&mut self) {
        self.written.clear();
    }
}

/// Writes the file completely or not at all, and returns whether the write succeeded. May block for
/// as long as the disk takes.
pub(super) fn write_file(path: &Path, text: &[u8]) -> bool {
    let written = write_private(path, text);
    if let Err(error) = &written {
        tracing::warn!(file = %path.display(), %error, "cannot write the address book");
    }
    written.is_ok()
}

/// Selects [`MAX_PEERS`] peers. Live peers come first, from each zone in turn, so that the loss of
/// a zone does not lose all of them. Then come the remembered peers that were seen last, which
/// matters when all peers are gone at once.
fn select_peers(
    live_peers: Vec<KnownPeer>,
    saved_peers: Vec<KnownPeer>,
    now: u64,
    rank: impl Fn(&PeerId) -> u64,
) -> Vec<KnownPeer> {
    let mut zones: BTreeMap<Option<Zone>, Vec<KnownPeer>> = BTreeMap::new();
    let live_ids: BTreeSet<_> = live_peers.iter().map(|peer| peer.peer_id).collect();
    live_peers.into_iter().for_each(|peer| zones.entry(peer.zone.clone()).or_default().push(peer));
    let mut queues: VecDeque<VecDeque<_>> = zones
        .into_values()
        .map(|mut peers| {
            peers.sort_by_cached_key(|peer| rank(&peer.peer_id));
            peers.into()
        })
        .collect();
    let mut selected = Vec::new();
    while selected.len() < MAX_PEERS
        && let Some(mut zone) = queues.pop_front()
    {
        if let Some(peer) = zone.pop_front() {
            selected.push(peer);
            queues.push_back(zone);
        }
    }
    let mut dead_peers: Vec<_> = saved_peers;
    dead_peers.retain(|peer| !live_ids.contains(&peer.peer_id) && peer.is_fresh(now));
    dead_peers.sort_by_key(|peer| std::cmp::Reverse(peer.last_seen));
    dead_peers.truncate(MAX_PEERS - selected.len());
    selected.extend(dead_peers);
    // Sorted by name: a reader finds a node, and the order alone changes nothing.
    selected.sort_by(|a, b| (&a.node, a.peer_id).cmp(&(&b.node, b.peer_id)));
    selected
}

fn is_worth_writing(written: &[KnownPeer], peers: &[KnownPeer]) -> bool {
    let is_same = |(old, new): (&KnownPeer, &KnownPeer)| {
        let last_seen = new.last_seen;
        KnownPeer { last_seen, ..old.clone() } == *new
            && last_seen.saturating_sub(old.last_seen) < REWRITE_AFTER.as_secs()
    };
    written.len() != peers.len() || !written.iter().zip(peers).all(is_same)
}

fn read(path: &Path, now: u64) -> io::Result<Vec<KnownPeer>> {
    match read_versioned(path, MAX_BYTES, VERSION) {
        Ok(text) => decode(&text, now).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The entries of a file that are still useful.
fn decode(text: &[u8], now: u64) -> Result<Vec<KnownPeer>, String> {
    let AddressBookFile { version: _, peers } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if peers.len() > MAX_PEERS {
        return Err(format!("the file has {} peers, more than {MAX_PEERS}", peers.len()));
    }
    let mut peers_by_id = BTreeMap::new();
    for mut peer in peers.into_iter().filter(|peer| peer.is_fresh(now)) {
        // The clock went back.
        peer.last_seen = peer.last_seen.min(now);
        peers_by_id.insert(peer.peer_id, peer);
    }
    Ok(peers_by_id.into_values().collect())
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    clock::unix_time().as_secs()
}

/// A PeerId in its usual text form.
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::model::PeerId;

    pub(super) fn serialize<S: Serializer>(peer: &PeerId, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(peer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PeerId, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests;
