//! What this agent says of itself to the mesh, kept true: where it is, its zone, and the credential that vouches for it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::addresses::{is_address_for_peers, is_local_address};
use crate::mesh::Mesh;
use crate::model::{Credential, Zone};
use crate::ports::{Admission, Cluster, ClusterError};

/// A node's labels are read again after so long: zones hardly ever change, and a thousand nodes ask.
const ZONE_REFRESH: Duration = Duration::from_secs(3600);

/// The first pause after the API server did not tell the zone; it doubles up to the last.
const MIN_BACKOFF: Duration = Duration::from_secs(2);
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// The first introduction waits for the zone for so long, because each one goes to every node. An API server that is there answers
/// within milliseconds.
const ZONE_TIMEOUT: Duration = Duration::from_secs(1);

/// A missing credential is asked for again after so long, if nobody says before that there is one.
const CREDENTIAL_RETRY: Duration = Duration::from_secs(2);

/// Keeps the mesh's idea of this agent true.
pub struct Introducer {
    /// Where it is told.
    pub mesh: Mesh,
    /// The credential.
    pub admission: Arc<dyn Admission>,
    /// Knows the zone.
    pub cluster: Arc<dyn Cluster>,
    /// The zone as it was set, which wins.
    pub zone: Option<Zone>,
    /// Where this agent learns its own zone.
    pub own_zone: watch::Sender<Option<Zone>>,
    /// This node's address, if it is known without asking: as it was set, or the one that is listened on.
    pub address: Option<IpAddr>,
    /// Where peers say that they see this agent.
    pub observed_address: watch::Receiver<Option<IpAddr>>,
    /// The UDP port where blobs are served.
    pub transfer_port: u16,
    /// The TCP port of gossip.
    pub gossip_port: u16,
}

/// What is told.
#[derive(Clone, PartialEq, Eq)]
struct SelfDescription {
    credential: Credential,
    address: IpAddr,
    zone: Option<Zone>,
}

impl Introducer {
    /// Introduces this agent, and again whenever something changed, until stopped.
    pub async fn run(self, stop: CancellationToken) {
        let mut renewed = self.admission.credential_changes();
        let mut observed = self.observed_address.clone();
        let mut address = self.address;
        let mut introduced = None;
        let mut failures = 0;
        let first = tokio::time::timeout(ZONE_TIMEOUT, self.read_zone(Duration::ZERO));
        let Some(first) = stop.run_until_cancelled(first).await else { return };
        let asked_again = if matches!(first, Ok(Ok(_))) { ZONE_REFRESH } else { MIN_BACKOFF };
        let mut zone = first.ok().and_then(Result::ok).flatten();
        let asking = self.read_zone(asked_again);
        tokio::pin!(asking);
        let mut next = Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep_until(next) => {}
                Ok(()) = renewed.changed() => {}
                Ok(()) = observed.changed() => {}
                answer = &mut asking, if self.zone.is_none() => {
                    let pause = match answer {
                        Ok(found) => {
                            (zone, failures) = (found, 0);
                            ZONE_REFRESH.mul_f64(0.9 + rand::random::<f64>() / 5.0)
                        }
                        Err(error) => {
                            if failures == 0 {
                                tracing::info!(%error, "this node's zone cannot be asked for now");
                            }
                            failures += 1;
                            backoff(failures, rand::random())
                        }
                    };
                    asking.set(self.read_zone(pause));
                }
            }
            address = self.address.or_else(|| own_address(address, *observed.borrow_and_update(), is_local_address));
            renewed.mark_unchanged();
            next = Instant::now() + CREDENTIAL_RETRY;
            let (Some(address), Ok(credential)) = (address, self.admission.credential().await) else { continue };
            next = Instant::now() + ZONE_REFRESH;
            let now = SelfDescription { credential, address, zone: zone.clone() };
            if introduced.as_ref() != Some(&now) {
                self.introduce(&now).await;
                introduced = Some(now);
            }
        }
    }

    /// The zone, after a pause.
    async fn read_zone(&self, pause: Duration) -> Result<Option<Zone>, ClusterError> {
        if self.zone.is_some() {
            return Ok(self.zone.clone());
        }
        sleep(pause).await;
        self.cluster.zone().await
    }

    async fn introduce(&self, description: &SelfDescription) {
        let SelfDescription { credential, address, zone } = description.clone();
        let (transfer, gossip) = (at(address, self.transfer_port), at(address, self.gossip_port));
        tracing::debug!(%transfer, %gossip, ?zone, "introducing this agent");
        self.own_zone.send_replace(zone.clone());
        self.mesh.introduce(credential, transfer, gossip, zone).await;
    }
}

fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// The address to give to others where none was set: the one that a peer saw. Only an address that this node really has is believed,
/// so that no peer can send the others elsewhere; and one that it still has is kept, so that two peers that see two do not make it
/// change all the time.
fn own_address(before: Option<IpAddr>, observed: Option<IpAddr>, is_ours: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let ours = |address: &IpAddr| is_address_for_peers(*address) && is_ours(*address);
    before.filter(ours).or_else(|| observed.map(|address| address.to_canonical()).filter(ours))
}

/// The pause after so many failures in a row, half of it at random (`chance` from 0 to 1).
fn backoff(failures: u32, chance: f64) -> Duration {
    let longest = MIN_BACKOFF.saturating_mul(1 << failures.saturating_sub(1).min(6)).min(MAX_BACKOFF);
    longest.mul_f64(0.5 + 0.5 * chance)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn an_observed_address_is_used_if_this_node_has_it() {
        let has = |ours: &'static [u8]| move |seen: IpAddr| ours.iter().any(|last| seen == address(*last));
        assert_eq!(own_address(None, None, has(&[1])), None);
        assert_eq!(own_address(None, Some(address(9)), has(&[1])), None, "a liar's word, or a gateway's");
        assert_eq!(own_address(None, Some(address(1)), has(&[1])), Some(address(1)));
        assert_eq!(own_address(Some(address(1)), Some(address(2)), has(&[1, 2])), Some(address(1)), "no flapping");
        assert_eq!(own_address(Some(address(1)), Some(address(2)), has(&[2])), Some(address(2)), "the node moved");
        let everything = |_: IpAddr| true;
        assert_eq!(own_address(None, Some(IpAddr::from([0, 0, 0, 0])), everything), None);
        assert_eq!(own_address(None, "::ffff:10.0.0.1".parse().ok(), everything), Some(address(1)));
        assert_eq!(own_address(None, "fe80::1".parse().ok(), everything), None, "of one link");
        let (v4, v6) = (address(1), IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, 0x11]));
        assert_eq!(own_address(None, Some(v6), everything), Some(v6));
        assert_eq!(own_address(Some(v4), Some(v6), everything), Some(v4), "a node of both families keeps one");
    }

    #[test]
    fn the_back_off_grows_to_a_minute() {
        let pauses = [1, 2, 5, 6, 7, 1000].map(|failures| backoff(failures, 1.0).as_secs());
        assert_eq!(pauses, [2, 4, 32, 60, 60, 60]);
        assert_eq!(backoff(1, 0.0), MIN_BACKOFF / 2);
    }
}
