//! Finding peers: addresses are greeted at the door ([`crate::transfer`]), and who is admitted there may gossip ([`crate::mesh`]).
//!
//! Not here: who is admitted. Addresses are only hints; anybody may answer there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::holders::Holders;
use crate::mesh::Mesh;
use crate::model::{Peer, PeerId};
use crate::transfer::{GreetError, Transfer};

/// How often names are resolved and unknown addresses greeted, once the start is over. New nodes greet us themselves, so this only
/// mends what went wrong.
const PERIOD: Duration = Duration::from_secs(10);
/// The first rounds, while a cluster starts: of two agents that start together DNS may know neither yet, and it learns of a pod within
/// a second or two.
const FIRST_PERIOD: Duration = Duration::from_secs(1);
/// How long [`FIRST_PERIOD`] is kept up.
const STARTING: Duration = Duration::from_secs(10);
/// Addresses greeted at the same time.
const AT_ONCE: usize = 16;
/// Most addresses taken from one name: more nodes than this need the fuller protocol that does not connect all to all.
const MAX_ADDRESSES: usize = 512;
/// Longest wait for the resolver.
const RESOLVE_WAIT: Duration = Duration::from_secs(5);

/// A peer that was not connected for so long is forgotten: its node is gone, or it greets us again. Longer than a node's restart.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// Keeps this agent connected.
pub struct Joiner {
    /// `host:port` of the first peers; names are resolved again each time.
    pub seeds: Vec<String>,
    /// The door.
    pub transfer: Transfer,
    /// Who may gossip.
    pub mesh: Mesh,
    /// Who is connected.
    pub holders: Holders,
}

impl Joiner {
    /// Runs until stopped. `joined` yields the peers that greeted us and were admitted.
    pub async fn run(self, mut joined: mpsc::Receiver<Peer>, stop: CancellationToken) {
        let began = Instant::now();
        let mut refused = BTreeMap::new();
        let mut myself = BTreeSet::new();
        let mut last_seen = BTreeMap::new();
        let mut next = Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                peer = joined.recv() => match peer {
                    Some(peer) => self.mesh.admit(peer).await,
                    None => { stop.cancelled().await; return }
                },
                () = tokio::time::sleep_until(next) => {
                    // Greeted without waiting for the ends of the rounds: `joined` must be read meanwhile.
                    let greeted = self.greet_missing(&mut myself, &mut refused);
                    tokio::pin!(greeted);
                    loop {
                        tokio::select! {
                            () = stop.cancelled() => return,
                            () = &mut greeted => break,
                            Some(peer) = joined.recv() => self.mesh.admit(peer).await,
                        }
                    }
                    self.forget_the_gone(&mut last_seen, Instant::now()).await;
                    let period = if began.elapsed() < STARTING { FIRST_PERIOD } else { PERIOD };
                    // Spread over a fifth, so that nodes that started together do not stay in step.
                    next = Instant::now() + period.mul_f64(0.9 + rand::random::<f64>() / 5.0);
                }
            }
        }
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

    async fn greet_missing(&self, myself: &mut BTreeSet<SocketAddr>, refused: &mut BTreeMap<SocketAddr, String>) {
        let connected: BTreeSet<_> = self.holders.peers().into_iter().map(|peer| peer.transfer).collect();
        let mut missing = BTreeSet::new();
        for seed in &self.seeds {
            missing.extend(resolve(seed).await.into_iter().filter(|address| !connected.contains(address)));
        }
        missing.retain(|address| !myself.contains(address));
        refused.retain(|address, _| missing.contains(address));
        let greetings = stream::iter(missing)
            .map(|address| async move { (address, self.transfer.greet(address, None).await) })
            .buffer_unordered(AT_ONCE);
        tokio::pin!(greetings);
        while let Some((address, greeted)) = greetings.next().await {
            match greeted {
                Ok(peer) => {
                    refused.remove(&address);
                    self.mesh.admit(peer).await;
                }
                Err(GreetError::Myself(_)) => drop(myself.insert(address)),
                Err(error) => {
                    // Once per address and reason: a node that is down would fill the log.
                    let reason = error.to_string();
                    if refused.get(&address) != Some(&reason) {
                        tracing::info!(%address, %error, "no peer there yet");
                        refused.insert(address, reason);
                    }
                }
            }
        }
    }
}

async fn resolve(seed: &str) -> Vec<SocketAddr> {
    match tokio::time::timeout(RESOLVE_WAIT, tokio::net::lookup_host(seed)).await {
        Ok(Ok(addresses)) => addresses.take(MAX_ADDRESSES).collect(),
        Ok(Err(error)) => {
            tracing::debug!(seed, %error, "cannot resolve");
            Vec::new()
        }
        Err(_) => {
            tracing::debug!(seed, "the resolver does not answer");
            Vec::new()
        }
    }
}
