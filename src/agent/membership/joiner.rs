//! Finds peers: dials addresses ([`Dialer`]), and admits the verified peers to gossip
//! ([`MeshCommands`]).
//!
//! Addresses come from DNS and settings, from the address book of an earlier process, and from the
//! mesh, which requests handshakes with missing neighbors. [`crate::decide::dns_schedule`] decides
//! when DNS is queried. The mesh also reports members that this agent never dialed, with their
//! addresses: blobs can be fetched from every member.
//!
//! Not here: admission. An address is only a hint, and any program may answer there.

mod address_book;
mod dial_queue;
mod dns;
pub mod introducer;
mod join_state;
mod membership_log;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use rand::seq::SliceRandom;
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use self::address_book::KnownPeer;
use self::dial_queue::DialTarget;
pub use self::dns::{DnsResolver, SystemDnsResolver};
use self::join_state::JoinState;
use crate::addresses::is_local_address;
use crate::agent::peers::inventory_view::PeerInventory;
use crate::metrics::Metrics;
use crate::model::{MeshStatus, NodeName, Peer, PeerId, Release};
use crate::ports::{DialError, Dialer, MembershipEvent, MeshCommands, MeshSource};

/// Interval of new rounds with the addresses of the last look-up while the agent is short of peers.
/// Dead peers are forgotten at the same interval.
const RETRY_PERIOD: Duration = Duration::from_secs(10);
/// Concurrent dials.
const MAX_DIALS: usize = 16;
/// Addresses taken from DNS and settings in one round, at random. The next round takes others.
const MAX_ADDRESSES: usize = 512;
/// Longest random delay of the first dials, so that a thousand nodes that start together do not
/// dial the same agents at the same moment.
const MAX_START_DELAY: Duration = Duration::from_secs(2);
/// Share of one address in the first delay: few nodes need no spread.
const START_DELAY_PER_ADDRESS: Duration = Duration::from_millis(4);

/// A peer without a connection for this long is forgotten: its node is gone, or dials this agent
/// again. Longer than a node's restart.
const REMOVE_AFTER: Duration = Duration::from_secs(600);

/// Interval of the mesh's metrics, a usual scrape interval of Prometheus.
const COUNT_PERIOD: Duration = Duration::from_secs(15);

/// Counts of the mesh between two updates of the address book, which is written at most every 30 s.
const COUNTS_PER_SAVE: u64 = 2;

/// Longest wait for a write of the address book at the end.
const FINAL_SAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Life of an admission whose verdict never expires.
const MAX_ADMISSION: Duration = Duration::from_secs(365 * 24 * 3600);

/// Keeps this agent connected.
pub struct Joiner {
    /// `host:port` of the first peers.
    pub bootstrap_names: Vec<String>,
    /// Resolves the names of the first peers.
    pub resolver: Arc<dyn DnsResolver>,
    /// File of the address book.
    pub peers_file: PathBuf,
    /// Dials peers.
    pub dialer: Arc<dyn Dialer>,
    /// The UDP port on which this agent listens.
    pub transfer_port: u16,
    /// Admits peers to gossip.
    pub mesh: Arc<dyn MeshCommands>,
    /// Status of the same mesh.
    pub mesh_status: Arc<dyn MeshSource>,
    /// Connected peers.
    pub inventory: PeerInventory,
    /// Metrics of the mesh.
    pub metrics: Metrics,
    /// Receives the addresses of the last look-up.
    pub bootstrap_addresses: watch::Sender<Vec<SocketAddr>>,
    /// Receives the node whose agent signed an introduction with this agent's key.
    pub shared_key: watch::Sender<Option<NodeName>>,
}

impl Joiner {
    /// Runs until stopped. `joined` yields admitted peers that dialed this agent, and `news` yields
    /// the events of the mesh.
    pub async fn run(
        self,
        mut admitted_peers: mpsc::Receiver<Peer>,
        mut mesh_events: mpsc::Receiver<MembershipEvent>,
        stop: CancellationToken,
    ) {
        let began = Instant::now();
        let mut state = JoinState::new(self.peers_file.clone());
        let mut dials = FuturesUnordered::new();
        let saved_addresses = state.address_book.addresses();
        let mut quiet_until = began + start_delay(saved_addresses.len());
        state.dial_queue.insert_hints(saved_addresses);
        let mut is_first_lookup = true;
        let mut lookups = FuturesUnordered::new();
        let mut retry = began + RETRY_PERIOD;
        let counting = self.read_mesh_status(Duration::ZERO);
        tokio::pin!(counting);
        let mut counts = 0;
        loop {
            let is_quiet = Instant::now() < quiet_until;
            while dials.len() < MAX_DIALS && !is_quiet {
                let Some(target) = state.dial_queue.start_next() else { break };
                let dialer = &self.dialer;
                dials.push(dialer.dial(target.address, target.expected_peer).map(move |dialed| (target, dialed)));
            }
            let due = state.membership_log.due();
            let look_up = state.next_lookup_at(Instant::now());
            tokio::select! {
                () = stop.cancelled() => break,
                Some(peer) = admitted_peers.recv() => self.admit(peer).await,
                Some(event) = mesh_events.recv() => self.on_mesh_event(event, &mut state).await,
                Some((target, dialed)) = dials.next() => self.on_dial_ended(target, dialed, &mut state).await,
                () = sleep_until(look_up), if lookups.is_empty() => lookups.push(self.look_up()),
                Some(addresses) = lookups.next() => {
                    state.on_looked_up(addresses, Instant::now());
                    self.bootstrap_addresses.send_replace(state.bootstrap_addresses.clone());
                    let unconnected = self.unconnected_addresses(&state);
                    if std::mem::take(&mut is_first_lookup) {
                        quiet_until = quiet_until.max(Instant::now() + start_delay(unconnected.len()));
                    }
                    state.begin_round(unconnected);
                }
                () = sleep_until(retry) => {
                    if state.lookup_schedule.is_short() {
                        let unconnected = self.unconnected_addresses(&state);
                        state.begin_round(unconnected);
                    }
                    self.remove_dead_peers(&mut state.last_seen, Instant::now()).await;
                    retry = Instant::now() + RETRY_PERIOD;
                }
                status = &mut counting => {
                    self.metrics.mesh_counted(&status);
                    state.warn_of_overflow(&status);
                    state.releases = member_releases(&status);
                    counts += 1;
                    if counts % COUNTS_PER_SAVE == 0 {
                        self.save_address_book(&mut state);
                    }
                    counting.set(self.read_mesh_status(COUNT_PERIOD));
                }
                () = sleep_until(quiet_until), if is_quiet => {}
                () = sleep_until(due.unwrap_or(began)), if due.is_some() => state.membership_log.write_summary(),
            }
        }
        if let Some(save_task) = state.save_task.take() {
            // One write at a time. A write that the disk holds up goes on; its content is recent.
            if tokio::time::timeout(FINAL_SAVE_TIMEOUT, save_task).await.is_err() {
                return;
            }
        }
        self.save_address_book(&mut state);
        if let Some(save_task) = state.save_task.take() {
            let _ = tokio::time::timeout(FINAL_SAVE_TIMEOUT, save_task).await;
        }
    }

    /// Addresses of other agents from DNS and settings, in random order; `None` where no name was
    /// resolved.
    async fn look_up(&self) -> Option<Vec<SocketAddr>> {
        let (mut addresses, mut is_answered) = (BTreeSet::new(), false);
        let resolv_conf = self.resolver.resolv_conf();
        for bootstrap_name in &self.bootstrap_names {
            let resolved = self.resolver.resolve(&dns::qualified_name(bootstrap_name, &resolv_conf)).await;
            self.metrics.names_looked_up(resolved.is_some());
            is_answered |= resolved.is_some();
            addresses.extend(resolved.unwrap_or_default());
        }
        let mut addresses: Vec<_> =
            addresses.into_iter().filter(|address| !is_own_address(*address, self.transfer_port)).collect();
        addresses.shuffle(&mut rand::rng());
        addresses.truncate(MAX_ADDRESSES);
        is_answered.then_some(addresses)
    }

    async fn read_mesh_status(&self, pause: Duration) -> MeshStatus {
        sleep(pause).await;
        self.mesh_status.mesh().await.unwrap_or_default()
    }

    async fn admit(&self, peer: Peer) {
        let validity = self.dialer.admitted_for(peer.id).min(MAX_ADMISSION);
        self.mesh.admit(peer, validity).await;
    }

    async fn on_mesh_event(&self, event: MembershipEvent, state: &mut JoinState) {
        match event {
            MembershipEvent::Up(peer) => {
                self.dialer.add_peer_address(&peer);
                // The mesh also reports a peer that moved, which is no new peer.
                if state.live_peers.insert(peer.id) {
                    state.membership_log.peer_up(&peer, Instant::now());
                }
            }
            MembershipEvent::Down(peer) => {
                state.live_peers.remove(&peer);
                let known = self.dialer.peer(peer);
                state.membership_log.peer_down(peer, known.as_ref().map(|known| &known.node), Instant::now());
            }
            MembershipEvent::Handshake(peer) => {
                if !state.dial_queue.insert_requested(peer.id, peer.transfer) {
                    self.mesh.report_rejection(peer.id).await;
                }
            }
            MembershipEvent::SharedKey(node) => drop(self.shared_key.send_replace(Some(node))),
        }
        self.metrics.peers_connected(self.inventory.peer_count());
    }

    async fn on_dial_ended(&self, target: DialTarget, dialed: Result<Peer, DialError>, state: &mut JoinState) {
        state.dial_queue.finish(target, dialed.is_ok());
        let is_silent = dialed.as_ref().is_err_and(DialError::is_silence);
        match dialed {
            Ok(peer) => {
                state.logged_failures.remove(&target.address);
                state.peers_by_address.insert(target.address, peer.id);
                return self.admit(peer).await;
            }
            Err(DialError::OwnAddress(_)) => drop(state.own_addresses.insert(target.address)),
            Err(error) => {
                // One line per address and reason: a node that is down would fill the log.
                let reason = error.to_string();
                if state.logged_failures.get(&target.address) != Some(&reason) {
                    tracing::info!(address = %target.address, %error, "no peer there yet");
                    state.logged_failures.insert(target.address, reason);
                }
            }
        }
        match target.expected_peer {
            Some(expected_peer) if is_silent => self.mesh.report_unreachable(expected_peer).await,
            Some(expected_peer) => self.mesh.report_rejection(expected_peer).await,
            None => {}
        }
    }

    /// Addresses of the last look-up without a live peer, and without this agent's own addresses.
    fn unconnected_addresses(&self, state: &JoinState) -> Vec<SocketAddr> {
        let mut addresses = state.bootstrap_addresses.clone();
        let connected: BTreeMap<_, _> =
            self.inventory.peers().into_iter().map(|peer| (peer.id, peer.transfer)).collect();
        let connected_addresses: BTreeSet<_> = connected.values().copied().collect();
        addresses.retain(|address| {
            let is_connected = state.peers_by_address.get(address).is_some_and(|peer| connected.contains_key(peer));
            !is_connected && !connected_addresses.contains(address) && !state.own_addresses.contains(address)
        });
        addresses
    }

    /// Forgets peers that were not connected for the address book's retention.
    async fn remove_dead_peers(&self, last_seen: &mut BTreeMap<PeerId, Instant>, now: Instant) {
        let connected: BTreeSet<_> = self.inventory.peers().into_iter().map(|peer| peer.id).collect();
        let known: BTreeSet<_> = self.dialer.peers().into_iter().map(|peer| peer.id).collect();
        last_seen.retain(|peer, _| known.contains(peer));
        for peer in known {
            let seen = last_seen.entry(peer).or_insert(now);
            if connected.contains(&peer) {
                *seen = now;
            } else if now.duration_since(*seen) > REMOVE_AFTER {
                tracing::info!(%peer, "peer not connected for {} min, forgotten", REMOVE_AFTER.as_secs() / 60);
                self.mesh.revoke_admission(peer).await;
                self.dialer.remove_peer(peer);
            }
        }
    }

    /// Updates the address book. A task writes the file, one write at a time.
    fn save_address_book(&self, state: &mut JoinState) {
        match state.save_task.take_if(|task| task.is_finished()).map(FutureExt::now_or_never) {
            Some(Some(Ok(true))) => {}
            Some(_) => state.address_book.mark_unwritten(),
            None if state.save_task.is_some() => return,
            None => {}
        }
        let now = address_book::now();
        let release = |peer: &Peer| state.releases.get(&peer.id.to_string()).cloned();
        let live_peers =
            self.inventory.peers().into_iter().map(|peer| KnownPeer::new(&peer, release(&peer), now)).collect();
        if let Some((path, text)) = state.address_book.update(live_peers) {
            state.save_task = Some(spawn_blocking(move || address_book::write_file(&path, &text)));
        }
    }
}

/// Whether this agent, which listens on `port`, listens on `address`. DNS lists every agent, this
/// one included.
fn is_own_address(address: SocketAddr, port: u16) -> bool {
    address.port() == port && is_local_address(address.ip().to_canonical())
}

/// Delay of the first dials to so many addresses.
fn start_delay(addresses: usize) -> Duration {
    let max_delay =
        START_DELAY_PER_ADDRESS.saturating_mul(u32::try_from(addresses).unwrap_or(u32::MAX)).min(MAX_START_DELAY);
    max_delay.mul_f64(rand::random())
}

/// The release of each member, by PeerId.
fn member_releases(status: &MeshStatus) -> BTreeMap<String, Release> {
    let members = status.members.iter();
    members.filter_map(|member| Some((member.peer_id.clone(), member.release.parse().ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_takes_its_own_address_out_of_an_answer() {
        let at = |address: &str| address.parse::<SocketAddr>().unwrap();
        assert!(is_own_address(at("127.0.0.1:4701"), 4701));
        assert!(is_own_address(at("[::ffff:127.0.0.1]:4701"), 4701));
        assert!(!is_own_address(at("127.0.0.1:4711"), 4701), "another agent of this machine");
        assert!(!is_own_address(at("198.51.100.1:4701"), 4701), "another node");
    }
}
