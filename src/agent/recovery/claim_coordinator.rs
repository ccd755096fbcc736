//! Claims of recoveries. A Lease names the node that leads a recovery, for operators and for work
//! that should happen once.
//!
//! No recovery waits for a claim. A claim that is lost, stolen or unreachable changes nothing about
//! the fetched content. Claims never serialize the downloads of several nodes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::agent::peers::inventory_view::PeerInventory;
use crate::decide::claim::{LeaseStep, claim_delay, lease_step};
use crate::metrics::Metrics;
use crate::model::{NodeName, PeerId};
use crate::oci::{Digest, Reference};
use crate::ports::{ClaimError, Claims};

/// Claims digests for this node.
pub struct ClaimCoordinator {
    claims: Arc<dyn Claims>,
    inventory: PeerInventory,
    metrics: Metrics,
    node: NodeName,
    own_peer: PeerId,
    /// Claims that this node holds, or may hold because a write got no answer. A running recovery
    /// has the image's claim, the zone's, or both if the zone became known meanwhile.
    claimed: Mutex<HashMap<Reference, HashSet<Digest>>>,
}

impl ClaimCoordinator {
    /// Claims in the name of `node`.
    pub fn new(
        claims: Arc<dyn Claims>,
        inventory: PeerInventory,
        metrics: Metrics,
        node: NodeName,
        own_peer: PeerId,
    ) -> Self {
        Self { claims, inventory, metrics, node, own_peer, claimed: Mutex::default() }
    }

    /// Tries to claim the digest, after the better-ranked nodes had time to claim. Never fails,
    /// because the claim is advice.
    ///
    /// Tries once, without renewal. Without zones, the claim only names the node that leads. With
    /// zones, [`ClaimCoordinator::claim_zone`] decides.
    ///
    /// The future may be dropped at any time. [`ClaimCoordinator::release_all`] then releases a
    /// claim that a lost answer may have granted.
    pub(in crate::agent) async fn try_claim_image(&self, reference: &Reference, digest: Digest) {
        let others: Vec<_> = self.inventory.peers().into_iter().map(|peer| peer.id).collect();
        tokio::time::sleep(claim_delay(self.own_peer, digest, &others)).await;
        let result = self.acquire(reference, digest).await;
        self.count_attempt(&result);
    }

    fn count_attempt(&self, result: &Result<bool, ClaimError>) {
        let label = match result {
            Ok(true) => "held",
            Ok(false) | Err(ClaimError::Lost) => "taken_by_other",
            Err(ClaimError::Unavailable(reason)) => {
                tracing::debug!(reason, "the recovery goes on without a claim");
                "out_of_reach"
            }
        };
        self.metrics.claim_tried(label);
    }

    pub(in crate::agent::recovery) fn peer(&self) -> PeerId {
        self.own_peer
    }

    pub(in crate::agent::recovery) fn node(&self) -> NodeName {
        self.node.clone()
    }

    /// Tries to take or renew the claim to fetch an image for this node's zone. Returns the node
    /// that holds the claim now, if there is one.
    ///
    /// # Errors
    /// [`ClaimError`]; the holder is then unknown.
    pub(in crate::agent) async fn claim_zone(
        &self,
        reference: &Reference,
        claim: Digest,
    ) -> Result<Option<NodeName>, ClaimError> {
        let result = self.acquire(reference, claim).await;
        self.count_attempt(&result);
        match result {
            Ok(true) => Ok(Some(self.node.clone())),
            Ok(false) => {
                let lease = self.claims.read(claim).await?;
                Ok(lease.and_then(|lease| lease.holder?.parse().ok()))
            }
            Err(error) => Err(error),
        }
    }

    async fn acquire(&self, reference: &Reference, digest: Digest) -> Result<bool, ClaimError> {
        let now = SystemTime::now();
        let lease = self.claims.read(digest).await?;
        let step = lease_step(lease.as_ref(), &self.node, now);
        if step != LeaseStep::Skip {
            self.claimed.lock().entry(reference.clone()).or_default().insert(digest);
        }
        match step {
            LeaseStep::Create => self.claims.create(digest, now).await?,
            LeaseStep::Update(version) => self.claims.update(digest, &version, now).await?,
            LeaseStep::Skip => return Ok(false),
        }
        Ok(true)
    }

    /// Releases the claims of a recovery that ended.
    pub(in crate::agent) async fn release_all(&self, reference: &Reference) {
        let claimed = self.claimed.lock().remove(reference);
        for digest in claimed.into_iter().flatten() {
            if let Err(error) = self.claims.release(digest).await {
                tracing::debug!(%digest, %error, "the claim cannot be released; the claim expires by itself");
            }
        }
    }
}
