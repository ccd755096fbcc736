//! A network in memory: peers answer at addresses, and UDP may be blocked.

use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, sleep};

use crate::model::{Peer, PeerId};
use crate::ports::{DialError, Dialer, ProbeError, Prober};

/// Dials and probes without sockets. An address without an entry never answers.
#[derive(Default)]
pub struct MemoryDialer {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    answers: BTreeMap<SocketAddr, Result<Peer, DialError>>,
    is_udp_blocked: bool,
    dials: Vec<(Instant, SocketAddr)>,
    /// With the life of the verdict, which is zero for a peer that was never dialed.
    peers: BTreeMap<PeerId, (Peer, Duration)>,
}

impl MemoryDialer {
    /// Life of the verdict about a dialed peer.
    pub const VERDICT_LIFE: Duration = Duration::from_secs(3600);

    /// The wait for an address that does not answer.
    pub const SILENCE: Duration = Duration::from_secs(3);

    /// Sets the answer to later dials of this address.
    pub fn put(&self, address: SocketAddr, answer: Result<Peer, DialError>) {
        self.lock().answers.insert(address, answer);
    }

    /// Ends the answers at this address.
    pub fn remove(&self, address: SocketAddr) {
        self.lock().answers.remove(&address);
    }

    /// Drops the packets of UDP from now on, or ends that.
    pub fn set_udp_blocked(&self, is_blocked: bool) {
        self.lock().is_udp_blocked = is_blocked;
    }

    /// The dials so far, in order.
    pub fn dials(&self) -> Vec<(Instant, SocketAddr)> {
        self.lock().dials.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

#[async_trait]
impl Dialer for MemoryDialer {
    async fn dial(&self, address: SocketAddr, expect: Option<PeerId>) -> Result<Peer, DialError> {
        self.lock().dials.push((Instant::now(), address));
        let answer = self.lock().answers.get(&address).cloned();
        let Some(answer) = answer else {
            sleep(Self::SILENCE).await;
            return Err(DialError::Unreachable { address, silent: true, reason: "no answer".into() });
        };
        let peer = answer?;
        if let Some(expected) = expect.filter(|expected| *expected != peer.id) {
            return Err(DialError::AnotherKey { address, expected, found: peer.id });
        }
        self.lock().peers.insert(peer.id, (peer.clone(), Self::VERDICT_LIFE));
        Ok(peer)
    }

    fn admitted_for(&self, peer: PeerId) -> Duration {
        self.lock().peers.get(&peer).map_or(Duration::ZERO, |(_, life)| *life)
    }

    fn add_peer_address(&self, peer: &Peer) {
        self.lock().peers.entry(peer.id).or_insert((peer.clone(), Duration::ZERO)).0 = peer.clone();
    }

    fn peers(&self) -> Vec<Peer> {
        self.lock().peers.values().map(|(peer, _)| peer.clone()).collect()
    }

    fn peer(&self, peer: PeerId) -> Option<Peer> {
        self.lock().peers.get(&peer).map(|(peer, _)| peer.clone())
    }

    fn remove_peer(&self, peer: PeerId) {
        self.lock().peers.remove(&peer);
    }
}

#[async_trait]
impl Prober for MemoryDialer {
    async fn answers_udp(&self, address: SocketAddr) -> Result<bool, ProbeError> {
        let is_answered = {
            let state = self.lock();
            !state.is_udp_blocked && state.answers.contains_key(&address)
        };
        if !is_answered {
            sleep(Self::SILENCE).await;
        }
        Ok(is_answered)
    }

    async fn accepts_tcp(&self, address: SocketAddr) -> bool {
        self.lock().answers.contains_key(&address)
    }
}
