//! Introductions of this agent to a mesh in memory under a paused clock.

use parking_lot::Mutex;
use std::net::IpAddr;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::membership::joiner::introducer::Introducer;
use crate::model::Credential;
use crate::ports::{Admission, AdmittedPeer, Rejection};
use crate::testing::{MemoryIntroduction, MemoryMesh};

const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 1));

/// Has the credential of the last renewal, if there was one.
#[derive(Default)]
struct MemoryCredential {
    credential: Mutex<Option<Credential>>,
    renewals: watch::Sender<u64>,
}

impl MemoryCredential {
    fn renew(&self, text: &str) {
        *self.credential.lock() = Some(Credential::new(text.to_owned()));
        self.renewals.send_modify(|renewals| *renewals += 1);
    }
}

#[async_trait]
impl Admission for MemoryCredential {
    async fn credential(&self) -> Result<Credential, Rejection> {
        self.credential.lock().clone().ok_or_else(|| Rejection::Undecided("no token yet".into()))
    }

    fn credential_changes(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    async fn admit(&self, _: PeerId, _: &Credential) -> Result<AdmittedPeer, Rejection> {
        unreachable!("an introducer admits no peer")
    }

    fn admit_relayed(&self, _: PeerId, _: &Credential) -> Result<AdmittedPeer, Rejection> {
        unreachable!("an introducer admits no peer")
    }
}

/// A running introducer of a node in the zone `eu-1a`.
struct IntroducedNode {
    credential: Arc<MemoryCredential>,
    cluster: MemoryCluster,
    mesh: Arc<MemoryMesh>,
    own_zone: watch::Receiver<Option<Zone>>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl IntroducedNode {
    fn start(cluster: MemoryCluster) -> Self {
        cluster.put_zone("eu-1a".parse().unwrap());
        let (credential, mesh) = (Arc::<MemoryCredential>::default(), Arc::new(MemoryMesh::new(mpsc::channel(1).0)));
        let (own_zone_in, own_zone) = watch::channel(None);
        let introducer = Introducer {
            mesh: mesh.clone(),
            admission: credential.clone(),
            cluster: Arc::new(cluster.clone()),
            zone: None,
            own_zone: own_zone_in,
            address: Some(ADDRESS),
            observed_address: watch::channel(None).1,
            transfer_port: 4701,
            gossip_port: 4702,
        };
        let stop = CancellationToken::new();
        let running = tokio::spawn(introducer.run(stop.clone()));
        Self { credential, cluster, mesh, own_zone, stop, running }
    }

    /// The introductions so far: credential and zone.
    fn introductions(&self) -> Vec<(String, Option<String>)> {
        let introductions = self.mesh.introductions().into_iter();
        introductions
            .map(|MemoryIntroduction { credential, transfer, gossip, zone }| {
                assert_eq!((transfer, gossip), ((ADDRESS, 4701).into(), (ADDRESS, 4702).into()));
                (credential.expose().to_owned(), zone.map(|zone| zone.to_string()))
            })
            .collect()
    }

    async fn stop(self) {
        self.stop.cancel();
        self.running.await.unwrap();
    }
}

fn introduction(credential: &str, zone: Option<&str>) -> (String, Option<String>) {
    (credential.to_owned(), zone.map(str::to_owned))
}

#[tokio::test(start_paused = true)]
async fn an_agent_introduces_itself_once_for_each_credential() {
    let node = IntroducedNode::start(MemoryCluster::default());
    sleep(Duration::from_secs(60)).await;
    assert_eq!(node.introductions(), [], "an agent without a credential cannot join");
    node.credential.renew("first");
    sleep(Duration::from_millis(1)).await;
    assert_eq!(node.introductions(), [introduction("first", Some("eu-1a"))]);
    sleep(Duration::from_secs(24 * 3600)).await;
    node.credential.renew("second");
    sleep(Duration::from_millis(1)).await;
    let expected = [introduction("first", Some("eu-1a")), introduction("second", Some("eu-1a"))];
    assert_eq!(node.introductions(), expected, "a day without a change causes no introduction");
    assert_eq!(node.own_zone.borrow().as_ref().map(ToString::to_string).as_deref(), Some("eu-1a"));
    node.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_introduces_itself_again_when_the_api_server_returns_the_zone() {
    let cluster = MemoryCluster::default();
    cluster.set_unavailable(true);
    let node = IntroducedNode::start(cluster);
    node.credential.renew("c");
    sleep(Duration::from_secs(600)).await;
    assert_eq!(node.introductions(), [introduction("c", None)], "joining does not wait for the zone");
    node.cluster.set_unavailable(false);
    sleep(Duration::from_secs(61)).await;
    assert_eq!(node.introductions(), [introduction("c", None), introduction("c", Some("eu-1a"))]);
    node.stop().await;
}
