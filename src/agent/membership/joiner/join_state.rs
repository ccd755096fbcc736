use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::address_book::AddressBook;
use super::dial_queue::{DialQueue, MAX_HINTS};
use super::membership_log::MembershipLog;
use crate::decide::dns_schedule::{self, DnsSchedule};
use crate::model::{MAX_MEMBERS, MeshStatus, PeerId, Release};
use crate::util::clock;

/// State of the joiner between two rounds.
pub(super) struct JoinState {
    pub(super) dial_queue: DialQueue,
    pub(super) address_book: AddressBook,
    pub(super) save_task: Option<JoinHandle<bool>>,
    pub(super) membership_log: MembershipLog,
    pub(super) live_peers: BTreeSet<PeerId>,
    pub(super) releases: BTreeMap<String, Release>,
    /// Addresses of this agent itself.
    pub(super) own_addresses: BTreeSet<SocketAddr>,
    /// The peer that answered at each address. A peer may announce another address.
    pub(super) peers_by_address: BTreeMap<SocketAddr, PeerId>,
    /// The last failure at each address. Each failure is logged once.
    pub(super) logged_failures: BTreeMap<SocketAddr, String>,
    pub(super) last_seen: BTreeMap<PeerId, Instant>,
    pub(super) lookup_schedule: DnsSchedule,
    /// The log has the warning about too many members.
    pub(super) is_overflow_logged: bool,
    /// Addresses of the last look-up with any result; at most [`super::MAX_ADDRESSES`].
    pub(super) bootstrap_addresses: Vec<SocketAddr>,
}

impl JoinState {
    pub(super) fn new(peers_file: PathBuf) -> Self {
        Self {
            dial_queue: DialQueue::default(),
            address_book: AddressBook::open(peers_file),
            save_task: None,
            membership_log: MembershipLog::default(),
            live_peers: BTreeSet::new(),
            releases: BTreeMap::new(),
            own_addresses: BTreeSet::new(),
            peers_by_address: BTreeMap::new(),
            logged_failures: BTreeMap::new(),
            last_seen: BTreeMap::new(),
            lookup_schedule: DnsSchedule::new(clock::now()),
            is_overflow_logged: false,
            bootstrap_addresses: Vec::new(),
        }
    }

    /// When names are looked up next.
    pub(super) fn next_lookup_at(&mut self, now: Instant) -> Instant {
        self.lookup_schedule.record_peers(self.live_peers.len(), now.into_std(), rand::random());
        self.lookup_schedule.due().into()
    }

    /// Warns once in the life of the process; the metric continues.
    pub(super) fn warn_of_overflow(&mut self, status: &MeshStatus) {
        if status.over_limit > 0 && !std::mem::replace(&mut self.is_overflow_logged, true) {
            let members = status.members.len();
            tracing::warn!(
                limit = MAX_MEMBERS,
                members,
                "the mesh has more members than an agent tracks; the others are no providers here"
            );
        }
    }

    pub(super) fn on_looked_up(&mut self, addresses: Option<Vec<SocketAddr>>, now: Instant) {
        self.lookup_schedule.record_lookup(
            addresses.as_deref().map(dns_schedule::count_agents),
            now.into_std(),
            rand::random(),
        );
        // A DNS server that starts or fails may answer without addresses.
        if let Some(addresses) = addresses.filter(|listed| !listed.is_empty()) {
            self.bootstrap_addresses = addresses;
        }
    }

    pub(super) fn begin_round(&mut self, unconnected: Vec<SocketAddr>) {
        // Nodes come and go, and DNS may answer with any addresses. A full table is cleared, at the
        // cost of a log line and a dial for each address.
        if self.logged_failures.len() > MAX_HINTS {
            self.logged_failures.clear();
        }
        if self.peers_by_address.len() > MAX_HINTS {
            self.peers_by_address.clear();
        }
        if self.own_addresses.len() > MAX_HINTS {
            self.own_addresses.clear();
        }
        self.dial_queue.insert_hints(unconnected);
        if self.live_peers.is_empty() {
            // As at the start: DNS may be down, and peers of the address book may be back.
            let saved_addresses = self.address_book.addresses();
            self.dial_queue.insert_hints(saved_addresses);
        }
    }
}
