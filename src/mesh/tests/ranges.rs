//! Ranges over real meshes on loopback.

use std::collections::HashMap;

use async_trait::async_trait;
use bytes::Bytes;
use libp2p::request_response::{self, OutboundFailure};
use tokio::sync::Semaphore;

use super::node::within_deadline;
use super::*;
use crate::decide::transport_choice::{MAX_RANGES_OF_A_PEER, RANGE};
use crate::mesh::stack::MAX_SERVED_RANGES;
use crate::oci::Digest;
use crate::util::token_bucket::Rate;
use crate::wire::{self, Answer, Request};

/// Serves `blobs`, one request per permit.
struct TestRangeServer {
    blobs: HashMap<Digest, Bytes>,
    permits: Arc<Semaphore>,
}

impl TestRangeServer {
    fn of(blobs: &[Bytes]) -> Arc<Self> {
        Self::with(blobs, Semaphore::MAX_PERMITS)
    }

    fn with(blobs: &[Bytes], permits: usize) -> Arc<Self> {
        let blobs = blobs.iter().map(|blob| (Digest::of(blob), blob.clone())).collect();
        Arc::new(Self { blobs, permits: Arc::new(Semaphore::new(permits)) })
    }
}

#[async_trait]
impl RangeServer for TestRangeServer {
    async fn serve(&self, _: PeerId, request: Request) -> RangeResponse {
        self.permits.acquire().await.unwrap().forget();
        let Request::Get { digest, offset, length } = request else { return Answer::Failed.into() };
        let Some(blob) = self.blobs.get(&digest) else { return Answer::Absent.into() };
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
        RangeResponse { answer: Answer::Blob { size: blob.len() as u64 }, bytes: blob.slice(range) }
    }
}

async fn provider(network: &TestNetwork, server: Arc<dyn RangeServer>) -> MeshTestNode {
    serving(NodeOptions { network: network.clone(), ..NodeOptions::default() }, server).await
}

async fn serving(options: NodeOptions, server: Arc<dyn RangeServer>) -> MeshTestNode {
    let node = MeshTestNode::start_serving(options, Some(server)).await;
    node.introduce(node.address).await;
    node
}

fn get(digest: Digest, offset: u64, length: u64) -> Request {
    Request::Get { digest, offset, length }
}

fn content(length: u64) -> Bytes {
    (0..length).map(|at| (at % 251) as u8).collect()
}

#[tokio::test]
async fn a_neighbor_sends_the_range_of_a_blob_that_was_requested() {
    let network = TestNetwork::default();
    let blob = content(RANGE + 1000);
    let (a, b) = (
        MeshTestNode::start(&network).await,
        provider(&network, TestRangeServer::of(std::slice::from_ref(&blob))).await,
    );
    network.connect(a.id(), b.id()).await;
    a.until_up(b.id()).await;
    assert!(a.mesh.is_connected(b.id()) && !a.mesh.is_connected(a.id()));
    let digest = Digest::of(&blob);
    for (offset, length) in [(0, RANGE), (RANGE, 1000), (500, 0)] {
        let range =
            within_deadline("a range", a.mesh.request_range(b.id(), get(digest, offset, length))).await.unwrap();
        assert_eq!(range.answer, Answer::Blob { size: blob.len() as u64 });
        assert_eq!(range.bytes, blob.slice(offset as usize..(offset + length) as usize));
    }
    let absent = within_deadline("no range", a.mesh.request_range(b.id(), get(Digest::of(b"none"), 0, 1))).await;
    assert_eq!(absent.unwrap(), Answer::Absent.into());
    let nothing = within_deadline("an agent without a server", b.mesh.request_range(a.id(), get(digest, 0, 1))).await;
    assert_eq!(nothing.unwrap(), Answer::Absent.into());
}

#[tokio::test]
async fn a_peer_without_a_connection_is_not_dialed_for_a_range() {
    let a = MeshTestNode::start(&TestNetwork::default()).await;
    let other = Identity::generate().peer_id();
    let result = within_deadline("an answer", a.mesh.request_range(other, get(Digest::of(b""), 0, 0))).await;
    assert_eq!(result, Err(RangeError::NotConnected));
}

#[tokio::test]
async fn a_peer_that_was_not_admitted_gets_no_range() {
    let blob = content(10);
    let node = provider(&TestNetwork::default(), TestRangeServer::of(std::slice::from_ref(&blob))).await;
    let mut unadmitted_peer = RawPeer::start(&node).await;
    unadmitted_peer.dial(&node);
    unadmitted_peer.send_range_request(&node, wire::encode(&get(Digest::of(&blob), 0, 10)).unwrap());
    let failure = unadmitted_peer.until("the request fails", range_failure).await;
    assert!(matches!(failure, OutboundFailure::ConnectionClosed | OutboundFailure::DialFailure), "{failure:?}");
}

fn range_failure(event: SwarmEvent<BehaviourEvent>) -> Option<OutboundFailure> {
    match event {
        SwarmEvent::Behaviour(BehaviourEvent::Ranges(request_response::Event::OutboundFailure { error, .. })) => {
            Some(error)
        }
        SwarmEvent::Behaviour(BehaviourEvent::Ranges(request_response::Event::Message { message, .. })) => {
            panic!("a rejected peer got a message: {message:?}")
        }
        _ => None,
    }
}

#[tokio::test]
async fn a_peer_whose_admission_is_revoked_gets_no_further_range() {
    let network = TestNetwork::default();
    let blob = content(10);
    let (a, b) = (
        MeshTestNode::start(&network).await,
        provider(&network, TestRangeServer::of(std::slice::from_ref(&blob))).await,
    );
    network.connect(a.id(), b.id()).await;
    a.until_up(b.id()).await;
    b.until_up(a.id()).await;
    let request = || get(Digest::of(&blob), 0, 10);
    assert_eq!(within_deadline("a range", a.mesh.request_range(b.id(), request())).await.unwrap().bytes, blob);
    network.remove(b.id());
    b.mesh.revoke_admission(a.id()).await;
    b.until_alone().await;
    let rejected = within_deadline("an end", a.mesh.request_range(b.id(), request())).await;
    assert!(matches!(rejected, Err(RangeError::NotConnected | RangeError::NoAnswer(_))), "{rejected:?}");
}

#[tokio::test]
async fn invalid_long_or_too_many_range_requests_are_faults() {
    let ranges = Rate::per_second(4, 0);
    let limits = NeighborRateLimits { ranges, ..NeighborRateLimits::DEFAULT };
    let a = serving(NodeOptions { limits, ..NodeOptions::default() }, TestRangeServer::of(&[])).await;
    let mut culprit = RawPeer::introduced_to(&a).await;
    let digest = Digest::of(b"");
    for (count, request) in
        [(1, wire::encode(&get(digest, 0, RANGE + 1)).unwrap()), (2, wire::encode(&Request::Follow(digest)).unwrap())]
    {
        culprit.send_range_request(&a, request);
        let line = format!("peer_faults_total{{fault=\"malformed\"}} {count}\n");
        culprit.while_driven(a.until_counted("malformed", |a| a.has_counted(&line))).await;
    }
    culprit.send_range_request(&a, vec![0; 1000]);
    culprit.while_driven(a.until_counted("another version", |a| a.has_counted_rejection("other_version"))).await;
    for _ in 0..2 {
        culprit.send_range_request(&a, wire::encode(&get(digest, 0, 1)).unwrap());
    }
    culprit.while_driven(a.until_counted("too many", |a| a.has_counted_fault("too_many"))).await;
}

#[tokio::test]
async fn a_provider_reads_a_bounded_number_of_ranges_at_a_time() {
    let blob = content(10);
    let server = TestRangeServer::with(std::slice::from_ref(&blob), 0);
    let permits = Arc::clone(&server.permits);
    let a = provider(&TestNetwork::default(), server).await;
    let mut greedy = RawPeer::introduced_to(&a).await;
    let limit = 2 * MAX_RANGES_OF_A_PEER;
    assert!(limit <= MAX_SERVED_RANGES);
    for _ in 0..=limit {
        greedy.send_range_request(&a, wire::encode(&get(Digest::of(&blob), 0, 10)).unwrap());
    }
    assert_eq!(greedy.until("the request beyond the limit is rejected", response).await, Answer::Busy.into());
    permits.add_permits(limit);
    for _ in 0..limit {
        assert_eq!(greedy.until("the other requests are served", response).await.bytes, blob);
    }
}

fn response(event: SwarmEvent<BehaviourEvent>) -> Option<RangeResponse> {
    match event {
        SwarmEvent::Behaviour(BehaviourEvent::Ranges(request_response::Event::Message {
            message: request_response::Message::Response { response, .. },
            ..
        })) => Some(response),
        _ => None,
    }
}
