//! The introduction of this agent to the mesh: addresses, zone and credential. Every change causes
//! a new introduction.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::addresses::{is_address_for_peers, is_local_address};
use crate::model::{Credential, Zone};
use crate::ports::{Admission, ClusterError, MeshCommands, Nodes};
use crate::util::backoff::Backoff;

/// Interval of reads of the node's labels: zones rarely change, and a thousand nodes read.
const ZONE_REFRESH: Duration = Duration::from_secs(3600);

/// Pauses after failed reads of the zone.
const BACKOFF: Backoff = Backoff { first: Duration::from_secs(2), longest: Duration::from_secs(60) };

/// How long the first introduction waits for the zone, because each introduction goes to every
/// node. A healthy API server answers within milliseconds.
const ZONE_TIMEOUT: Duration = Duration::from_secs(1);

/// Retry delay without a credential. A new credential ends the delay.
const CREDENTIAL_RETRY: Duration = Duration::from_secs(2);

/// Keeps this agent's introduction current.
pub struct Introducer {
    /// Distributes the introductions.
    pub mesh: Arc<dyn MeshCommands>,
    /// Source of the credential.
    pub admission: Arc<dyn Admission>,
    /// Source of the zone.
    pub cluster: Arc<dyn Nodes>,
    /// The zone of the settings, which takes precedence.
    pub zone: Option<Zone>,
    /// Receives this agent's zone.
    pub own_zone: watch::Sender<Option<Zone>>,
    /// This node's address, from the settings or from the listening socket; `None` if only peers
    /// see the address.
    pub address: Option<IpAddr>,
    /// The address from which peers see this agent.
    pub observed_address: watch::Receiver<Option<IpAddr>>,
    /// The UDP port for blobs.
    pub transfer_port: u16,
    /// The TCP port for gossip.
    pub gossip_port: u16,
}

/// The content of an introduction.
#[derive(Clone, PartialEq, Eq)]
struct SelfDescription {
    credential: Credential,
    address: IpAddr,
    zone: Option<Zone>,
}

impl Introducer {
    /// Introduces this agent, and introduces each change, until stopped.
    pub async fn run(self, stop: CancellationToken) {
        let mut credential_changes = self.admission.credential_changes();
        let mut observed_address = self.observed_address.clone();
        let mut address = self.address;
        let mut introduced = None;
        let mut failures = 0;
        let first = tokio::time::timeout(ZONE_TIMEOUT, self.read_zone(Duration::ZERO));
        let Some(first) = stop.run_until_cancelled(first).await else { return };
        let zone_read_delay = if matches!(first, Ok(Ok(_))) { ZONE_REFRESH } else { BACKOFF.first };
        let mut zone = first.ok().and_then(Result::ok).flatten();
        let asking = self.read_zone(zone_read_delay);
        tokio::pin!(asking);
        let mut next_introduction = Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep_until(next_introduction) => {}
                Ok(()) = credential_changes.changed() => {}
                Ok(()) = observed_address.changed() => {}
                answer = &mut asking, if self.zone.is_none() => {
                    let pause = match answer {
                        Ok(new_zone) => {
                            (zone, failures) = (new_zone, 0);
                            ZONE_REFRESH.mul_f64(0.9 + rand::random::<f64>() / 5.0)
                        }
                        Err(error) => {
                            if failures == 0 {
                                tracing::info!(%error, "cannot read this node's zone from the API server now");
                            }
                            failures += 1;
                            BACKOFF.jittered_wait(failures - 1, rand::random())
                        }
                    };
                    asking.set(self.read_zone(pause));
                }
            }
            address =
                self.address.or_else(|| own_address(address, *observed_address.borrow_and_update(), is_local_address));
            credential_changes.mark_unchanged();
            next_introduction = Instant::now() + CREDENTIAL_RETRY;
            let (Some(address), Ok(credential)) = (address, self.admission.credential().await) else { continue };
            next_introduction = Instant::now() + ZONE_REFRESH;
            let description = SelfDescription { credential, address, zone: zone.clone() };
            if introduced.as_ref() != Some(&description) {
                self.introduce(&description).await;
                introduced = Some(description);
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
        let (transfer, gossip) =
            (socket_address(address, self.transfer_port), socket_address(address, self.gossip_port));
        tracing::debug!(%transfer, %gossip, ?zone, "introducing this agent");
        self.own_zone.send_replace(zone.clone());
        self.mesh.introduce(credential, transfer, gossip, zone).await;
    }
}

fn socket_address(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// The address to announce without a setting: the address that a peer observed. Only an address of
/// this node counts, so that no peer can divert the others. An earlier address that the node still
/// has stays, so that two observed addresses do not alternate.
fn own_address(current: Option<IpAddr>, observed: Option<IpAddr>, is_local: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let is_usable = |address: &IpAddr| is_address_for_peers(*address) && is_local(*address);
    current.filter(is_usable).or_else(|| observed.map(|address| address.to_canonical()).filter(is_usable))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn an_observed_address_is_used_if_this_node_has_it() {
        let has_addresses = |local_addresses: &'static [u8]| {
            move |seen: IpAddr| local_addresses.iter().any(|last| seen == address(*last))
        };
        assert_eq!(own_address(None, None, has_addresses(&[1])), None);
        assert_eq!(own_address(None, Some(address(9)), has_addresses(&[1])), None, "the address of another host");
        assert_eq!(own_address(None, Some(address(1)), has_addresses(&[1])), Some(address(1)));
        assert_eq!(
            own_address(Some(address(1)), Some(address(2)), has_addresses(&[1, 2])),
            Some(address(1)),
            "no flapping"
        );
        assert_eq!(
            own_address(Some(address(1)), Some(address(2)), has_addresses(&[2])),
            Some(address(2)),
            "the node moved"
        );
        let any_address = |_: IpAddr| true;
        assert_eq!(own_address(None, Some(IpAddr::from([0, 0, 0, 0])), any_address), None);
        assert_eq!(own_address(None, "::ffff:10.0.0.1".parse().ok(), any_address), Some(address(1)));
        assert_eq!(own_address(None, "fe80::1".parse().ok(), any_address), None, "a link-local address");
        let (v4, v6) = (address(1), IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, 0x11]));
        assert_eq!(own_address(None, Some(v6), any_address), Some(v6));
        assert_eq!(own_address(Some(v4), Some(v6), any_address), Some(v4), "a dual-stack node keeps its address");
    }

    #[test]
    fn the_back_off_grows_to_a_minute() {
        let pauses = [1, 2, 5, 6, 7, 1000].map(|failures: u32| BACKOFF.jittered_wait(failures - 1, 1.0).as_secs());
        assert_eq!(pauses, [2, 4, 32, 60, 60, 60]);
        assert_eq!(BACKOFF.jittered_wait(0, 0.0), BACKOFF.first / 2);
    }
}
