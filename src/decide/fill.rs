//! Sources and times of fetches for images that lack layers.
//!
//! Peers have precedence. The image's registry gets requests only while healthy, and so seldom that
//! a cluster whose nodes all discarded their layers does not load the registry: the first nodes
//! fetch an image from there, and all other nodes fetch the image from these nodes.
//!
//! # Load on a registry
//! A node fetches one image at a time, at a limited rate. Before each fetch from a registry the
//! node draws a pause, uniform between zero and twice the mean. The mean grows with the nodes that
//! have the image (5 s each) and with the members of the cluster (1 s each). So in a cluster of any
//! size a fetch of the same image begins every 5 s on average, and a fetch of any image every
//! second. An image of 200 MB takes 25 s at 8 MiB/s, and peers see the layers some seconds later: a
//! registry sends this image about seven times in all, to one node or to 5000. A thousand images of
//! 200 MB, each on other nodes, cost a registry 200 MB/s for a quarter of an hour.
//!
//! No fetch here records an outage or a denial for pods. Not here: the choice of the layers to
//! retain ([`super::retain`]), and the health of registries ([`super::outage`]).

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

pub use self::outcome::{FetchFrom, FillFailure, FillSource, UnfilledReason};
use crate::oci::Digest;
use crate::util::backoff::Backoff;

mod outcome;
#[cfg(test)]
mod tests;

/// Bytes per second from registries, by default: 7 % of a 1 Gbit/s link, and 1 GB in two minutes.
pub const RATE: u64 = 8 << 20;

/// Mean time between two fetches of the same image from its registry, in the whole cluster.
const SAME_IMAGE_INTERVAL: Duration = Duration::from_secs(5);

/// Mean time between two fetches of any images from registries, in the whole cluster.
const ANY_IMAGE_INTERVAL: Duration = Duration::from_secs(1);

/// Mean pause of a node between two images from peers, for each member. Peers share the load of
/// their copies, so the pause has a bound.
const PEER_PAUSE: Duration = Duration::from_secs(1);

/// The longest of these means.
const MAX_PEER_PAUSE: Duration = Duration::from_secs(60);

/// Delay of the first fetch from a registry after the start: the pauses need the members and their
/// inventories, which arrive within seconds after an agent joins.
const START_DELAY: Duration = Duration::from_secs(20);

/// Pause of an image after its peers failed, or after this node's store or disk failed.
const PEER_RETRY_DELAY: Duration = Duration::from_secs(30 * 60);

/// Pause of an image after its registry denied the image or did not have the image. A new pull
/// secret of a pod ends the pause. A changed right at the registry is found twice a day, at the
/// cost of one request for each such image and node.
const REJECTION_RETRY_DELAY: Duration = Duration::from_secs(12 * 3600);

/// Pause of an image after its registry sent wrong bytes, which a cache in between may have. Also
/// after a denial while a secret could not be read, which the API server may permit later.
const WRONG_BYTES_RETRY_DELAY: Duration = Duration::from_secs(3600);

/// Pauses of a registry that failed or limits the rate.
const BACKOFF: Backoff = Backoff { first: Duration::from_secs(120), longest: Duration::from_secs(3600) };

/// Longest pause that a registry may request: the window of Docker Hub's limit.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(6 * 3600);

/// Bound on the remembered images, and on the remembered registries. A node has a few hundred
/// images. Beyond the bound, a failed image is retried after the usual pauses.
const MAX_ENTRIES: usize = 1024;

/// A pull secret, by namespace and name.
pub type SecretName = (String, String);

/// An image that lacks layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncompleteImage {
    /// The manifest.
    pub manifest: Digest,
    /// The registry in the image's name.
    pub registry: String,
    /// Pull secrets that pods name beside the image.
    pub secrets: BTreeSet<SecretName>,
    /// Peers that have the image under this name have every missing layer.
    pub has_providers: bool,
    /// Nodes that have the manifest, this node included.
    pub nodes: usize,
    /// The registry has answered this agent, and no outage is known here or at a peer.
    pub is_healthy: bool,
    /// The budget and the disk have room for the layers.
    pub fits: bool,
}

/// The fetches of one node: one at a time, with the results of earlier ones.
#[derive(Debug)]
pub struct FillScheduler {
    from: FetchFrom,
    started: Instant,
    in_flight: Option<Digest>,
    /// The pause before the next image from peers.
    peer_pause: RandomPause,
    /// The image that is fetched from its registry next, unless peers have the layers earlier.
    plan: Option<(Digest, RandomPause)>,
    /// Images whose peers or whose write on this node failed, or whose layers a recovery fetches.
    postponed: HashMap<Digest, Postponement>,
    /// Images that their registry denied, does not have, or sent with wrong bytes.
    rejected: HashMap<Digest, RegistryRejection>,
    registries: HashMap<String, RegistryBackOff>,
}

/// A pause whose length is a share of twice a mean. The mean may change meanwhile: an agent sees
/// the members of its cluster some time after the start.
#[derive(Debug, Clone, Copy)]
struct RandomPause {
    since: Instant,
    /// From 0 to 1.
    share: f64,
}

#[derive(Debug)]
struct Postponement {
    until: Instant,
    /// The registry may get requests meanwhile.
    peers_only: bool,
}

#[derive(Debug)]
struct RegistryRejection {
    reason: UnfilledReason,
    /// The secrets that pods named then.
    secrets: BTreeSet<SecretName>,
    until: Instant,
}

#[derive(Debug)]
struct RegistryBackOff {
    failures: u32,
    until: Instant,
}

impl RandomPause {
    fn is_over(self, mean: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= mean.mul_f64(2.0 * self.share.clamp(0.0, 1.0))
    }
}

impl FillScheduler {
    /// `random` is from 0 to 1.
    pub fn new(from: FetchFrom, now: Instant, random: f64) -> Self {
        Self {
            from,
            started: now,
            in_flight: None,
            peer_pause: RandomPause { since: now, share: random },
            plan: None,
            postponed: HashMap::new(),
            rejected: HashMap::new(),
            registries: HashMap::new(),
        }
    }

    /// The image that is being fetched.
    pub fn in_flight(&self) -> Option<Digest> {
        self.in_flight
    }

    /// The image to fetch now, which counts as in flight from then on. `members` are the agents of
    /// the cluster, this one included; `random` yields numbers from 0 to 1.
    pub fn start_next(
        &mut self,
        images: &[IncompleteImage],
        members: usize,
        now: Instant,
        mut random: impl FnMut() -> f64,
    ) -> Option<(Digest, FillSource)> {
        self.drop_expired(now);
        if self.in_flight.is_some() || self.from == FetchFrom::None {
            return None;
        }
        let from_peers: Vec<_> = images.iter().filter(|image| self.can_come_from_peers(image)).collect();
        let mean = times(PEER_PAUSE, members).min(MAX_PEER_PAUSE);
        let (source, manifest) = match pick(&from_peers, random()) {
            Some(image) if self.peer_pause.is_over(mean, now) => (FillSource::Peers, image.manifest),
            _ => (FillSource::Registry, self.take_planned(images, members, now, random)?),
        };
        self.in_flight = Some(manifest);
        Some((manifest, source))
    }

    /// The planned image, if its pause is over. A plan ends when the image is complete, peers have
    /// the layers, or the registry may get no request.
    fn take_planned(
        &mut self,
        images: &[IncompleteImage],
        members: usize,
        now: Instant,
        mut random: impl FnMut() -> f64,
    ) -> Option<Digest> {
        let from_registry: Vec<_> = images.iter().filter(|image| self.can_come_from_registry(image, now)).collect();
        let plan = self.plan.filter(|(manifest, _)| from_registry.iter().any(|image| image.manifest == *manifest));
        let (manifest, pause) = match plan {
            Some(plan) => plan,
            None => (pick(&from_registry, random())?.manifest, RandomPause { since: now, share: random() }),
        };
        self.plan = Some((manifest, pause));
        let nodes = from_registry.iter().find(|image| image.manifest == manifest)?.nodes;
        let mean = times(SAME_IMAGE_INTERVAL, nodes).max(times(ANY_IMAGE_INTERVAL, members));
        let is_settled = now.saturating_duration_since(self.started) >= START_DELAY;
        if !is_settled || !pause.is_over(mean, now) {
            return None;
        }
        self.plan = None;
        Some(manifest)
    }

    /// Records the end of the fetch in flight. `random` is from 0 to 1.
    pub fn record_end(
        &mut self,
        image: &IncompleteImage,
        result: Result<FillSource, FillFailure>,
        now: Instant,
        random: f64,
    ) {
        self.in_flight = None;
        self.peer_pause = RandomPause { since: now, share: random };
        let manifest = image.manifest;
        match result {
            Ok(FillSource::Peers) => {}
            Ok(FillSource::Registry) => drop(self.registries.remove(&image.registry)),
            Err(failure @ (FillFailure::Peers | FillFailure::Local | FillFailure::NeededByRecovery)) => {
                let peers_only = failure == FillFailure::Peers;
                insert_bounded(
                    &mut self.postponed,
                    manifest,
                    Postponement { until: now + PEER_RETRY_DELAY, peers_only },
                );
            }
            Err(FillFailure::Denied { unread: true }) => {
                self.record_rejection(image, UnfilledReason::UnreadableSecret, now + WRONG_BYTES_RETRY_DELAY)
            }
            Err(FillFailure::Denied { unread: false }) => {
                self.record_rejection(image, UnfilledReason::KubeletCredentials, now + REJECTION_RETRY_DELAY)
            }
            Err(FillFailure::Gone) => self.record_rejection(image, UnfilledReason::Gone, now + REJECTION_RETRY_DELAY),
            Err(FillFailure::WrongBytes) => {
                self.record_rejection(image, UnfilledReason::Pending, now + WRONG_BYTES_RETRY_DELAY)
            }
            Err(FillFailure::Down) => self.record_registry_failure(&image.registry, Duration::ZERO, now),
            Err(FillFailure::RateLimited(retry_after)) => {
                self.record_registry_failure(&image.registry, retry_after.unwrap_or_default(), now)
            }
        }
    }

    /// Why the image lacks layers.
    pub fn unfilled_reason(&self, image: &IncompleteImage) -> UnfilledReason {
        if self.in_flight == Some(image.manifest) {
            return UnfilledReason::Fetching;
        }
        if self.from == FetchFrom::None {
            return UnfilledReason::NotFetched;
        }
        if !image.fits {
            return UnfilledReason::NoRoom;
        }
        match self.registry_rejection(image) {
            Some(rejection) if !self.can_come_from_peers(image) => rejection.reason,
            _ => UnfilledReason::Pending,
        }
    }

    fn can_come_from_peers(&self, image: &IncompleteImage) -> bool {
        image.fits && image.has_providers && !self.postponed.contains_key(&image.manifest)
    }

    fn can_come_from_registry(&self, image: &IncompleteImage, now: Instant) -> bool {
        self.from == FetchFrom::Registry
            && image.fits
            && image.is_healthy
            && self.postponed.get(&image.manifest).is_none_or(|postponed| postponed.peers_only)
            && !self.can_come_from_peers(image)
            && self.registry_rejection(image).is_none()
            && self.registries.get(&image.registry).is_none_or(|registry| registry.until <= now)
    }

    /// Why the registry gets no request for the image. A secret that no pod named at the refusal
    /// may permit the image.
    fn registry_rejection(&self, image: &IncompleteImage) -> Option<&RegistryRejection> {
        self.rejected.get(&image.manifest).filter(|rejection| image.secrets.is_subset(&rejection.secrets))
    }

    fn record_rejection(&mut self, image: &IncompleteImage, reason: UnfilledReason, until: Instant) {
        insert_bounded(
            &mut self.rejected,
            image.manifest,
            RegistryRejection { reason, secrets: image.secrets.clone(), until },
        );
    }

    /// Starts the registry's back-off, for all of its images. `wish` is the pause that the registry
    /// requested.
    fn record_registry_failure(&mut self, registry: &str, retry_after: Duration, now: Instant) {
        let failures = self.registries.get(registry).map_or(0, |before| before.failures);
        let until = now + BACKOFF.wait(failures).max(retry_after.min(MAX_RETRY_AFTER));
        insert_bounded(
            &mut self.registries,
            registry.to_owned(),
            RegistryBackOff { failures: failures.saturating_add(1), until },
        );
    }

    /// A registry's failures count until the registry had a pause of the longest length.
    fn drop_expired(&mut self, now: Instant) {
        self.postponed.retain(|_, postponed| postponed.until > now);
        self.rejected.retain(|_, rejection| rejection.until > now);
        self.registries.retain(|_, registry| registry.until + MAX_RETRY_AFTER > now);
    }
}

fn insert_bounded<K: std::hash::Hash + Eq, V>(map: &mut HashMap<K, V>, key: K, value: V) {
    if map.len() < MAX_ENTRIES || map.contains_key(&key) {
        map.insert(key, value);
    }
}

/// The image at this share of the list, from 0 to 1.
fn pick<'a>(images: &[&'a IncompleteImage], share: f64) -> Option<&'a IncompleteImage> {
    let index = (share.clamp(0.0, 1.0) * images.len() as f64) as usize;
    images.get(index.min(images.len().saturating_sub(1))).copied()
}

fn times(duration: Duration, count: usize) -> Duration {
    duration.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
}
