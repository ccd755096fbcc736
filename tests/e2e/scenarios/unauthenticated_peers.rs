//! Unauthenticated peers over both protocols: each is rejected with a reason, and receives nothing.
//! The peers connect from the hub's network namespace, where this process runs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use jsonwebtoken::{EncodingKey, Header};
use libp2p::gossipsub::{self, MessageAuthenticity};
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{NetworkBehaviour, Swarm, SwarmEvent};
use libp2p::{Multiaddr, SwarmBuilder, noise, ping, tcp, yamux};
use lighterman::identity::{Identity, libp2p_peer_id};
use lighterman::metrics::Metrics;
use lighterman::model::{Credential, PeerId};
use lighterman::ports::{Admission, AdmittedPeer, DialError, Dialer, NoPartialBlobs, Rejection};
use lighterman::testing::MemoryStore;
use lighterman::transfer::{Config, Transfer, TransferDependencies};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

use super::{agent_pod, ensure};
use crate::test_bed::{NODES, TestBed, TestError};

/// Deadline of a connection, far longer than a rejection takes.
const WAIT_DEADLINE: Duration = Duration::from_secs(60);

/// The port of every agent, for both protocols.
const PORT: u16 = 4701;

pub(super) fn unauthenticated_peers(bed: &TestBed) -> Result<(), TestError> {
    let runtime = Runtime::new().map_err(|error| error.to_string())?;
    let identity = Identity::generate();
    let (me, node) = (identity.peer_id(), NODES[2].0);
    let pod = agent_pod(bed, node)?;
    let good = token(bed, "lighterman", "lighterman", &me.to_string(), Some(&pod))?;
    let other_peer = Identity::generate().peer_id().to_string();
    let cases = [
        ("no token", String::new(), "no token was shown"),
        ("a token for the API server", token(bed, "lighterman", "lighterman", "", Some(&pod))?, "for another peer"),
        ("another's token", token(bed, "lighterman", "lighterman", &other_peer, Some(&pod))?, "for another peer"),
        ("another account's", token(bed, "default", "default", &me.to_string(), None)?, "another ServiceAccount"),
        ("a token bound to nothing", token(bed, "lighterman", "lighterman", &me.to_string(), None)?, "not bound"),
        ("an expired token", expired(bed, &good)?, "expired"),
    ];
    let agents: Result<Vec<SocketAddr>, TestError> = NODES
        .iter()
        .map(|(node, _)| {
            let address = format!("{}:{PORT}", bed.env(&format!("NODE_{node}_IP"))?);
            address.parse().map_err(|error| format!("{address}: {error}"))
        })
        .collect();
    let agents = agents?;
    let served = || -> Result<f64, TestError> {
        NODES.iter().map(|(node, _)| bed.metric(node, "lighterman_served_bytes_total")).sum()
    };
    let before = served()?;
    for (what, token, expected) in cases {
        for agent in &agents {
            let outcome = runtime.block_on(connect_quic(&identity, &token, *agent));
            match &outcome {
                Err(DialError::Rejected { reason, .. }) if reason.contains(expected) => {}
                other => return Err(format!("{what}, at {agent}: {other:?} instead of: {expected}")),
            }
            let access = runtime.block_on(connect_libp2p(&identity, *agent, outcome.err().and_then(rejecting_peer)))?;
            ensure(access == GossipAccess::Nothing, format!("{what}, at {agent}: libp2p is open: {access:?}"))?;
        }
        println!("  {what}: rejected by {} nodes over both protocols", agents.len());
    }
    ensure(served()? == before, "an agent served bytes meanwhile")?;

    // Agents that reject every connection would pass the checks above. So the valid token must be
    // admitted over both protocols.
    let agent_peer = runtime
        .block_on(connect_quic(&identity, &good, agents[2]))
        .map_err(|error| format!("a good token: {error}"))?;
    let access = runtime.block_on(connect_libp2p(&identity, agents[2], Some(agent_peer)))?;
    ensure(access == GossipAccess::Gossip, format!("with a good token: {access:?}"))
}

/// Requests a token from the API server.
pub(super) fn token(
    bed: &TestBed,
    k8s_namespace: &str,
    account: &str,
    audience: &str,
    pod: Option<&Value>,
) -> Result<String, TestError> {
    let audiences: Vec<_> = Some(audience).filter(|audience| !audience.is_empty()).into_iter().collect();
    let bound = pod.map(|pod| {
        let metadata = &pod["metadata"];
        json!({"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]})
    });
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"audiences": audiences, "boundObjectRef": bound, "expirationSeconds": 3600},
    });
    let file = bed.folder().join("token-request.json");
    std::fs::write(&file, request.to_string()).map_err(|error| error.to_string())?;
    let path = format!("/api/v1/namespaces/{k8s_namespace}/serviceaccounts/{account}/token");
    let answer = bed.kubectl(&["create", "--raw", &path, "-f", &file.to_string_lossy()])?;
    let answer: Value = serde_json::from_str(&answer).map_err(|error| error.to_string())?;
    answer["status"]["token"].as_str().map(str::to_owned).ok_or_else(|| format!("no token in {answer}"))
}

/// The same token with times of two hours ago, signed by the cluster's own key.
fn expired(bed: &TestBed, good: &str) -> Result<String, TestError> {
    let failed = |error: &dyn std::fmt::Display| format!("an expired token: {error}");
    let mut token = jsonwebtoken::dangerous::insecure_decode::<Value>(good).map_err(|error| failed(&error))?;
    for claim in ["iat", "nbf", "exp"] {
        let time = token.claims[claim].as_u64().ok_or("a token without times")?;
        token.claims[claim] = (time - 7200).into();
    }
    let pem = std::fs::read(bed.folder().join("pki/sa.key")).map_err(|error| failed(&error))?;
    let key = EncodingKey::from_rsa_pem(&pem).map_err(|error| failed(&error))?;
    let header = Header { kid: token.header.kid, ..Header::new(token.header.alg) };
    jsonwebtoken::encode(&header, &token.claims, &key).map_err(|error| failed(&error))
}

/// Presents a fixed credential, and admits every peer.
struct FixedCredential {
    credential: Credential,
    renewals: watch::Sender<u64>,
}

#[async_trait]
impl Admission for FixedCredential {
    async fn credential(&self) -> Result<Credential, Rejection> {
        Ok(self.credential.clone())
    }

    fn credential_changes(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        self.admit_relayed(peer, credential)
    }

    fn admit_relayed(&self, _: PeerId, _: &Credential) -> Result<AdmittedPeer, Rejection> {
        Ok(AdmittedPeer { node: None, pod: None, valid_until: Duration::MAX, is_in_grace: false })
    }
}

/// Dials an agent over QUIC, as agents do.
async fn connect_quic(identity: &Identity, token: &str, agent: SocketAddr) -> Result<PeerId, DialError> {
    let node = "stranger".parse().expect("a node's name");
    let config = Config { listen: ([0, 0, 0, 0], 0).into(), gossip_port: 1, node, concurrent_uploads: 1 };
    let fixed_credential =
        FixedCredential { credential: Credential::new(token.to_owned()), renewals: watch::Sender::default() };
    let (admitted_peers, _) = mpsc::channel(1);
    let dependencies = TransferDependencies {
        admission: Arc::new(fixed_credential),
        store: Arc::new(MemoryStore::default()),
        partials: Arc::new(NoPartialBlobs),
        metrics: Metrics::new(),
        admitted_peers,
    };
    let transfer = Transfer::bind(config, identity, dependencies);
    transfer.expect("a socket").dial(agent, None).await.map(|peer| peer.id)
}

/// The agent that rejected the connection.
fn rejecting_peer(error: DialError) -> Option<PeerId> {
    match error {
        DialError::Rejected { peer, .. } => Some(peer),
        _ => None,
    }
}

/// The data that an unauthenticated peer receives over libp2p.
#[derive(Debug, PartialEq, Eq)]
enum GossipAccess {
    /// The connection was closed, and no data arrived.
    Nothing,
    /// The connection was closed after a stream had been open.
    Streams,
    /// The agent sent a gossipsub message or subscription.
    Gossip,
}

#[derive(NetworkBehaviour)]
struct Listener {
    ping: ping::Behaviour,
    gossip: gossipsub::Behaviour,
}

fn listener(identity: &Identity) -> Result<Swarm<Listener>, TestError> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let swarm = SwarmBuilder::with_existing_identity(identity.keypair())
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .map_err(|error| failed(&error))?
        .with_behaviour(|keypair| {
            let authenticity = MessageAuthenticity::Signed(keypair.clone());
            let gossip = gossipsub::Behaviour::new(authenticity, gossipsub::Config::default())?;
            let ping = ping::Behaviour::new(ping::Config::new().with_interval(Duration::from_millis(100)));
            Ok(Listener { ping, gossip })
        })
        .map_err(|error| failed(&error))?;
    Ok(swarm.with_swarm_config(|config| config.with_idle_connection_timeout(WAIT_DEADLINE)).build())
}

/// Connects over libp2p with the same key, until the connection is closed or gossip arrives.
async fn connect_libp2p(
    identity: &Identity,
    agent: SocketAddr,
    peer: Option<PeerId>,
) -> Result<GossipAccess, TestError> {
    let mut swarm = listener(identity)?;
    let peer = libp2p_peer_id(peer.ok_or("no agent proved a key over QUIC")?);
    let address: Multiaddr = format!("/ip4/{}/tcp/{}", agent.ip(), agent.port()).parse().expect("an address");
    swarm.dial(DialOpts::peer_id(peer).addresses(vec![address]).build()).map_err(|error| error.to_string())?;
    let (mut is_open, mut is_answered) = (false, false);
    let watched = async {
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::ConnectionEstablished { .. } => is_open = true,
                SwarmEvent::ConnectionClosed { .. } if is_open && !is_answered => return Ok(GossipAccess::Nothing),
                SwarmEvent::ConnectionClosed { .. } => return Ok(GossipAccess::Streams),
                // The agent may close the connection before this end completes the handshake.
                SwarmEvent::OutgoingConnectionError { .. } => return Ok(GossipAccess::Nothing),
                SwarmEvent::Behaviour(ListenerEvent::Gossip(
                    gossipsub::Event::Subscribed { .. } | gossipsub::Event::Message { .. },
                )) => return Ok(GossipAccess::Gossip),
                SwarmEvent::Behaviour(ListenerEvent::Ping(ping::Event { result: Ok(_), .. })) => is_answered = true,
                _ => {}
            }
        }
    };
    let timed_out = |_| format!("{agent}: the connection neither ends nor delivers data");
    tokio::time::timeout(WAIT_DEADLINE, watched).await.map_err(timed_out)?
}
