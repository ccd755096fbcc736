//! Finding peers: addresses are greeted at the door ([`crate::transfer`]), and who is admitted there may gossip ([`crate::mesh`]).
//!
//! Addresses come from DNS and from settings, from the address book of an earlier process, and from the mesh, which asks for the
//! neighbours that it lacks. When DNS is asked is decided by [`crate::decide::lookup`]. The mesh also says who is there whom this agent never met, and where: so anybody can be fetched from.
//!
//! Not here: who is admitted. Addresses are only hints; anybody may answer there.

mod address_book;
mod attendance;
mod calls;
pub mod introduce;
mod memory;
mod names;

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
use self::calls::Call;
use self::memory::Memory;
pub use self::names::{Resolver, SystemResolver};
use super::holders::Holders;
use crate::addresses::is_of_this_node;
use crate::mesh::{Mesh, MeshNews};
use crate::metrics::Metrics;
use crate::model::{MeshStatus, NodeName, Peer, PeerId, Release};
use crate::ports::MeshSource;
use crate::transfer::{GreetError, Transfer};

/// How often an agent that is short of peers greets the addresses of the last look-up again, and how
/// often peers that are gone are forgotten.
const PERIOD: Duration = Duration::from_secs(10);
/// Addresses greeted at the same time.
const AT_ONCE: usize = 16;
/// Most addresses taken from DNS and settings in one round, at random; the next round takes others.
const MAX_ADDRESSES: usize = 512;
/// The first greetings wait for up to this long, at random, so that the doors of a thousand nodes that start together are not all
/// knocked at in the same moment...
const LONGEST_SPREAD: Duration = Duration::from_secs(2);
/// ...and the fewer there are to greet, the shorter: three nodes have nothing to spread.
const SPREAD_EACH: Duration = Duration::from_millis(4);

/// A peer that was not connected for so long is forgotten: its node is gone, or it greets us again. Longer than a node's restart.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// How often the mesh is counted for the metrics, as often as Prometheus asks.
const COUNT_PERIOD: Duration = Duration::from_secs(15);

/// Of these countings each second one brings the address book up to date: it is written at most every 30 s.
const COUNTS_PER_NOTE: u64 = 2;

/// Longest that the end waits for the address book to be on disk.
const LAST_NOTE: Duration = Duration::from_secs(2);

/// A verdict that never ends is told to the mesh as one of this length.
const LONGEST_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);

/// Keeps this agent connected.
pub struct Joiner {
    /// `host:port` of the first peers.
    pub seeds: Vec<String>,
    /// Resolves their names.
    pub resolver: Arc<dyn Resolver>,
    /// Where known peers are kept.
    pub peers_file: PathBuf,
    /// The door.
    pub transfer: Transfer,
    /// Who may gossip.
    pub mesh: Mesh,
    /// The same mesh, counted.
    pub status: Arc<dyn MeshSource>,
    /// Who is connected.
    pub holders: Holders,
    /// Where the mesh is counted.
    pub metrics: Metrics,
    /// Where the addresses of the last look-up go.
    pub listed: watch::Sender<Vec<SocketAddr>>,
    /// The node whose agent has this agent's key, from gossip.
    pub shared_key: watch::Sender<Option<NodeName>>,
}

impl Joiner {
    /// Runs until stopped. `joined` yields the peers that greeted us and were admitted, `news` what the mesh has to say.
    pub async fn run(
        self,
        mut joined: mpsc::Receiver<Peer>,
        mut news: mpsc::Receiver<MeshNews>,
        stop: CancellationToken,
    ) {
        let began = Instant::now();
        let mut memory = Memory::new(self.peers_file.clone());
        let mut greetings = FuturesUnordered::new();
        let earlier = memory.book.addresses();
        let mut quiet_until = began + spread(earlier.len());
        memory.calls.hint(earlier);
        let mut is_first = true;
        let mut looking_up = FuturesUnordered::new();
        let mut retry = began + PERIOD;
        let counting = self.count(Duration::ZERO);
        tokio::pin!(counting);
        let mut counts = 0;
        loop {
            let is_quiet = Instant::now() < quiet_until;
            while greetings.len() < AT_ONCE && !is_quiet {
                let Some(call) = memory.calls.next() else { break };
                let transfer = &self.transfer;
                greetings.push(transfer.greet(call.address, call.meant).map(move |greeted| (call, greeted)));
            }
            let due = memory.attendance.due();
            let look_up = memory.look_up_due(Instant::now());
            tokio::select! {
                () = stop.cancelled() => break,
                Some(peer) = joined.recv() => self.admit(peer).await,
                Some(news) = news.recv() => self.hear(news, &mut memory).await,
                Some((call, greeted)) = greetings.next() => self.ended(call, greeted, &mut memory).await,
                () = sleep_until(look_up), if looking_up.is_empty() => looking_up.push(self.look_up()),
                Some(listed) = looking_up.next() => {
                    memory.looked_up(listed, Instant::now());
                    self.listed.send_replace(memory.listed.clone());
                    let unknown = self.unknown(&memory);
                    if std::mem::take(&mut is_first) {
                        quiet_until = quiet_until.max(Instant::now() + spread(unknown.len()));
                    }
                    memory.begin_round(unknown);
                }
                () = sleep_until(retry) => {
                    if memory.schedule.is_short() {
                        let unknown = self.unknown(&memory);
                        memory.begin_round(unknown);
                    }
                    self.forget_the_gone(&mut memory.last_seen, Instant::now()).await;
                    retry = Instant::now() + PERIOD;
                }
                status = &mut counting => {
                    self.metrics.mesh_counted(&status);
                    memory.warn_of_overflow(&status);
                    memory.releases = releases(&status);
                    counts += 1;
                    if counts % COUNTS_PER_NOTE == 0 {
                        self.note(&mut memory);
                    }
                    counting.set(self.count(COUNT_PERIOD));
                }
                () = sleep_until(quiet_until), if is_quiet => {}
                () = sleep_until(due.unwrap_or(began)), if due.is_some() => memory.attendance.sum_up(),
            }
        }
        if let Some(writing) = memory.writing.take() {
            // One at a time.
            let _ = tokio::time::timeout(LAST_NOTE, writing).await;
        }
        self.note(&mut memory);
        if let Some(writing) = memory.writing.take() {
            let _ = tokio::time::timeout(LAST_NOTE, writing).await;
        }
    }

    /// Where other agents may be, by DNS and by settings, in random order; `None` where no name was resolved.
    async fn look_up(&self) -> Option<Vec<SocketAddr>> {
        let (mut addresses, mut is_answered) = (BTreeSet::new(), false);
        let (resolv_conf, port) = (self.resolver.resolv_conf(), self.transfer.local_addr().port());
        for seed in &self.seeds {
            let resolved = self.resolver.resolve(&names::qualified(seed, &resolv_conf)).await;
            self.metrics.names_looked_up(resolved.is_some());
            is_answered |= resolved.is_some();
            addresses.extend(resolved.unwrap_or_default());
        }
        let mut addresses: Vec<_> = addresses.into_iter().filter(|address| !is_own(*address, port)).collect();
        addresses.shuffle(&mut rand::rng());
        addresses.truncate(MAX_ADDRESSES);
        is_answered.then_some(addresses)
    }

    async fn count(&self, pause: Duration) -> MeshStatus {
        sleep(pause).await;
        self.status.mesh().await.unwrap_or_default()
    }

    async fn admit(&self, peer: Peer) {
        let life = self.transfer.admitted_for(peer.id).min(LONGEST_LIFE);
        self.mesh.admit(peer, life).await;
    }

    async fn hear(&self, news: MeshNews, memory: &mut Memory) {
        match news {
            MeshNews::Up(peer) => {
                self.transfer.know(&peer);
                // One that moved is told as well.
                if memory.up.insert(peer.id) {
                    memory.attendance.up(&peer, Instant::now());
                }
            }
            MeshNews::Down(peer) => {
                memory.up.remove(&peer);
                let known = self.transfer.peer(peer);
                memory.attendance.down(peer, known.as_ref().map(|known| &known.node), Instant::now());
            }
            MeshNews::Greet(peer) => {
                if !memory.calls.ask(peer.id, peer.transfer) {
                    self.mesh.declined(peer.id).await;
                }
            }
            MeshNews::SharedKey(node) => drop(self.shared_key.send_replace(Some(node))),
        }
        self.metrics.peers_connected(self.holders.count());
    }

    async fn ended(&self, call: Call, greeted: Result<Peer, GreetError>, memory: &mut Memory) {
        memory.calls.ended(call, greeted.is_ok());
        let is_silent = greeted.as_ref().is_err_and(GreetError::is_silence);
        match greeted {
            Ok(peer) => {
                memory.refused.remove(&call.address);
                memory.met.insert(call.address, peer.id);
                return self.admit(peer).await;
            }
            Err(GreetError::Myself(_)) => drop(memory.myself.insert(call.address)),
            Err(error) => {
                // Once per address and reason: a node that is down would fill the log.
                let reason = error.to_string();
                if memory.refused.get(&call.address) != Some(&reason) {
                    tracing::info!(address = %call.address, %error, "no peer there yet");
                    memory.refused.insert(call.address, reason);
                }
            }
        }
        match call.meant {
            Some(meant) if is_silent => self.mesh.unreachable(meant).await,
            Some(meant) => self.mesh.declined(meant).await,
            None => {}
        }
    }

    /// Those of the last look-up where nobody is known who is up.
    fn unknown(&self, memory: &Memory) -> Vec<SocketAddr> {
        let mut addresses = memory.listed.clone();
        let up: BTreeMap<_, _> = self.holders.peers().into_iter().map(|peer| (peer.id, peer.transfer)).collect();
        let taken: BTreeSet<_> = up.values().copied().collect();
        addresses.retain(|address| {
            let is_met = memory.met.get(address).is_some_and(|peer| up.contains_key(peer));
            !is_met && !taken.contains(address) && !memory.myself.contains(address)
        });
        addresses
    }

    /// Lets go of peers that have not been connected for a long time.
    async fn forget_the_gone(&self, last_seen: &mut BTreeMap<PeerId, Instant>, now: Instant) {
        let connected: BTreeSet<_> = self.holders.peers().into_iter().map(|peer| peer.id).collect();
        let known: BTreeSet<_> = self.transfer.peers().into_iter().map(|peer| peer.id).collect();
        last_seen.retain(|peer, _| known.contains(peer));
        for peer in known {
            let seen = last_seen.entry(peer).or_insert(now);
            if connected.contains(&peer) {
                *seen = now;
            } else if now.duration_since(*seen) > FORGET_AFTER {
                tracing::info!(%peer, "not seen for {} min, forgotten", FORGET_AFTER.as_secs() / 60);
                self.mesh.dismiss(peer).await;
                self.transfer.forget(peer);
            }
        }
    }

    /// Brings the address book up to date. Its file is written beside everything else, one at a time.
    fn note(&self, memory: &mut Memory) {
        match memory.writing.take_if(|writing| writing.is_finished()).map(FutureExt::now_or_never) {
            Some(Some(Ok(true))) => {}
            Some(_) => memory.book.was_not_written(),
            None if memory.writing.is_some() => return,
            None => {}
        }
        let now = address_book::now();
        let release = |peer: &Peer| memory.releases.get(&peer.id.to_string()).cloned();
        let alive = self.holders.peers().into_iter().map(|peer| KnownPeer::new(&peer, release(&peer), now)).collect();
        if let Some((path, text)) = memory.book.update(alive) {
            memory.writing = Some(spawn_blocking(move || address_book::store(&path, &text)));
        }
    }
}

/// Whether the agent of this node that listens on `port` listens there. DNS names every agent, this one
/// included.
fn is_own(address: SocketAddr, port: u16) -> bool {
    address.port() == port && is_of_this_node(address.ip().to_canonical())
}

/// How long the first greetings of so many addresses wait.
fn spread(addresses: usize) -> Duration {
    let most = SPREAD_EACH.saturating_mul(u32::try_from(addresses).unwrap_or(u32::MAX)).min(LONGEST_SPREAD);
    most.mul_f64(rand::random())
}

/// What each member runs, by PeerId.
fn releases(status: &MeshStatus) -> BTreeMap<String, Release> {
    let members = status.members.iter();
    members.filter_map(|member| Some((member.peer_id.clone(), member.release.parse().ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_takes_its_own_address_out_of_an_answer() {
        let at = |address: &str| address.parse::<SocketAddr>().unwrap();
        assert!(is_own(at("127.0.0.1:4701"), 4701));
        assert!(is_own(at("[::ffff:127.0.0.1]:4701"), 4701));
        assert!(!is_own(at("127.0.0.1:4711"), 4701), "another agent of this machine");
        assert!(!is_own(at("198.51.100.1:4701"), 4701), "another node");
    }
}
