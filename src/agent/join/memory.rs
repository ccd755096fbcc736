//! The joiner's state between two rounds of greetings.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::address_book::AddressBook;
use super::attendance::Attendance;
use super::calls::{Calls, MAX_HINTS};
use crate::decide::lookup::{self, Schedule};
use crate::model::{MAX_MEMBERS, MeshStatus, PeerId, Release};

/// The joiner's state between two rounds.
pub(super) struct Memory {
    pub(super) calls: Calls,
    pub(super) book: AddressBook,
    pub(super) writing: Option<JoinHandle<bool>>,
    pub(super) attendance: Attendance,
    pub(super) up: BTreeSet<PeerId>,
    pub(super) releases: BTreeMap<String, Release>,
    /// Addresses of this agent itself.
    pub(super) myself: BTreeSet<SocketAddr>,
    /// The peers met at each address. A peer may give itself another address.
    pub(super) met: BTreeMap<SocketAddr, PeerId>,
    /// The last reason for which no peer was met at an address. Each reason is logged once.
    pub(super) refused: BTreeMap<SocketAddr, String>,
    pub(super) last_seen: BTreeMap<PeerId, Instant>,
    pub(super) schedule: Schedule,
    /// The log has a warning that there are more members than may be.
    pub(super) is_overflow_logged: bool,
    /// Addresses of the last look-up that named any; at most [`super::MAX_ADDRESSES`].
    pub(super) listed: Vec<SocketAddr>,
}

impl Memory {
    pub(super) fn new(peers_file: PathBuf) -> Self {
        Self {
            calls: Calls::default(),
            book: AddressBook::open(peers_file),
            writing: None,
            attendance: Attendance::default(),
            up: BTreeSet::new(),
            releases: BTreeMap::new(),
            myself: BTreeSet::new(),
            met: BTreeMap::new(),
            refused: BTreeMap::new(),
            last_seen: BTreeMap::new(),
            schedule: Schedule::new(Instant::now().into_std()),
            is_overflow_logged: false,
            listed: Vec::new(),
        }
    }

    /// When names are looked up next.
    pub(super) fn look_up_due(&mut self, now: Instant) -> Instant {
        self.schedule.observe(self.up.len(), now.into_std(), rand::random());
        self.schedule.due().into()
    }

    /// Once in the life of the process; the metric counts on.
    pub(super) fn warn_of_overflow(&mut self, status: &MeshStatus) {
        if status.over_limit > 0 && !std::mem::replace(&mut self.is_overflow_logged, true) {
            let members = status.members.len();
            tracing::warn!(
                limit = MAX_MEMBERS,
                members,
                "the mesh has more members than an agent knows; the others are no providers here"
            );
        }
    }

    pub(super) fn looked_up(&mut self, listed: Option<Vec<SocketAddr>>, now: Instant) {
        self.schedule.resolved(listed.as_deref().map(lookup::agents), now.into_std(), rand::random());
        // A DNS server that starts, or is in trouble, may answer without addresses.
        if let Some(listed) = listed.filter(|listed| !listed.is_empty()) {
            self.listed = listed;
        }
    }

    pub(super) fn begin_round(&mut self, unknown: Vec<SocketAddr>) {
        // Nodes come and go and DNS can answer anything. A table that is full begins anew, at the
        // cost of a line in the log and a greeting for each address.
        if self.refused.len() > MAX_HINTS {
            self.refused.clear();
        }
        if self.met.len() > MAX_HINTS {
            self.met.clear();
        }
        if self.myself.len() > MAX_HINTS {
            self.myself.clear();
        }
        self.calls.hint(unknown);
        if self.up.is_empty() {
            // As at the start: DNS may be away, and peers of the address book may be back.
            let earlier = self.book.addresses();
            self.calls.hint(earlier);
        }
    }
}
