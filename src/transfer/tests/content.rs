//! Transfers and answers for a peer that keeps to the protocol.

use super::*;

#[tokio::test]
async fn a_blob_of_any_size_arrives_and_is_verified() {
    let sizes = [
        (0, "nothing follows the answer"),
        (1, "the least"),
        (1199, "one packet"),
        (64 << 10, "the least bytes per stall"),
        ((256 << 10) - 1, "one read, nearly"),
        (256 << 10, "one read"),
        ((256 << 10) + 1, "a read of one byte"),
        (5 << 20, "more than a stream's window, several batches"),
    ];
    let blobs: Vec<Bytes> = sizes.iter().map(|(size, _)| blob(*size)).collect();
    let store = TestStore { blobs: blobs.iter().map(|b| (Digest::of(b), b.clone())).collect(), ..TestStore::default() };
    with_deadline(async {
        let (provider, fetcher) = (TransferTestNode::start(store), TransferTestNode::start(TestStore::default()));
        fetcher.dial(provider.address()).await;
        for ((size, why), blob) in sizes.iter().zip(&blobs) {
            let digest = Digest::of(blob);
            let (verified, bytes) = fetcher.fetch(provider.id, digest, *size as u64).await.unwrap();
            assert_eq!((verified.digest(), verified.size()), (digest, *size as u64), "{why}");
            assert!(bytes == *blob, "{why}");
            assert_eq!(fetcher.transfer.size_of(provider.id, digest).await.unwrap(), Some(*size as u64), "{why}");
        }
        let total: usize = sizes.iter().map(|(size, _)| size).sum();
        assert!(fetcher.metric(&format!("fetched_bytes_total {total}")));
        assert!(provider.metric(&format!("served_bytes_total {total}")));
    })
    .await;
}

#[tokio::test]
async fn many_blobs_are_fetched_over_one_connection_at_once() {
    let blobs: Vec<Bytes> = (1..=4).map(|i| blob(i * 300_000)).collect();
    let store = TestStore { blobs: blobs.iter().map(|b| (Digest::of(b), b.clone())).collect(), ..TestStore::default() };
    with_deadline(async {
        let (mut provider, fetcher) = (TransferTestNode::start(store), TransferTestNode::start(TestStore::default()));
        // The address is recorded, and no connection exists: all fetches share the connection that
        // the first one dials.
        let peer = provider.transfer.dial(fetcher.address(), None).await.unwrap();
        assert_eq!(peer.id, fetcher.id);
        let fetches = blobs.iter().map(|b| fetcher.fetch(provider.id, Digest::of(b), b.len() as u64));
        for (fetched, blob) in futures::future::join_all(fetches).await.into_iter().zip(&blobs) {
            assert!(fetched.unwrap().1 == *blob);
        }
        assert_eq!(provider.admitted_peers.recv().await.unwrap().id, fetcher.id);
        assert!(provider.admitted_peers.try_recv().is_err(), "the fetcher dialed once");
    })
    .await;
}

#[tokio::test]
async fn packets_grow_to_the_mtu_of_the_path() {
    let blob = blob(4 << 20);
    with_deadline(async {
        let (provider, fetcher) =
            (TransferTestNode::start(TestStore::with(&blob)), TransferTestNode::start(TestStore::default()));
        fetcher.dial(provider.address()).await;
        let fetch = || fetcher.fetch(provider.id, Digest::of(&blob), blob.len() as u64);
        fetch().await.unwrap();
        let (_, outbound) = fetcher.transfer.0.peers.find(provider.id).unwrap();
        let received = || outbound.connection().unwrap().stats().udp_rx;
        let before = received();
        fetch().await.unwrap();
        let after = received();
        let each = (after.bytes - before.bytes) / (after.datagrams - before.datagrams);
        // Loopback carries more than our largest packet; the last packet of a batch is shorter.
        assert!(each > 5000, "{each} bytes a packet");
    })
    .await;
}

#[tokio::test]
async fn a_request_for_an_absent_blob_is_answered_absent() {
    with_deadline(async {
        let (provider, fetcher) =
            (TransferTestNode::start(TestStore::default()), TransferTestNode::start(TestStore::default()));
        fetcher.dial(provider.address()).await;
        let digest = Digest::of(b"nowhere");
        let error = fetcher.fetch(provider.id, digest, 7).await.unwrap_err();
        assert!(matches!(error, FetchError::Absent { peer, .. } if peer == provider.id), "{error}");
        assert_eq!(fetcher.transfer.size_of(provider.id, digest).await.unwrap(), None);
        assert!(fetcher.metric(r#"fetch_failures_total{reason="absent"} 1"#));
    })
    .await;
}

#[tokio::test]
async fn a_provider_at_its_limit_answers_busy_and_serves_again_later() {
    with_deadline(async {
        let (open, opened) = watch::channel(false);
        let blob = blob(1000);
        let (digest, size) = (Digest::of(&blob), blob.len() as u64);
        let provider = TransferTestNode::start(TestStore { open: Some(opened), ..TestStore::with(&blob) });
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(provider.address()).await;
        let mut fetches: Vec<_> = (0..5).map(|_| Box::pin(fetcher.fetch(provider.id, digest, size))).collect();
        // Four uploads are allowed, so one of five gets `Busy`.
        let (first, _, rest) = futures::future::select_all(fetches.drain(..)).await;
        assert!(matches!(first.unwrap_err(), FetchError::Busy { peer } if peer == provider.id));
        open.send(true).unwrap();
        for fetched in futures::future::join_all(rest).await {
            fetched.unwrap();
        }
        // A slot is free once the reader's last packet is acknowledged, some milliseconds after the
        // read.
        while let Err(error) = fetcher.fetch(provider.id, digest, size).await {
            assert!(error.is_retryable(), "{error}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_range_beyond_the_blob_is_rejected_and_a_range_within_the_blob_is_served() {
    with_deadline(async {
        let blob = blob(1000);
        let digest = Digest::of(&blob);
        let provider = TransferTestNode::start(TestStore::with(&blob));
        let fetcher = bare_endpoint(&Identity::generate());
        let connection = handshake(&fetcher, provider.address()).await;
        for (offset, length) in [(0, 1001), (1000, 1), (u64::MAX, 2), (1, u64::MAX)] {
            let (answer, bytes) = request(&connection, &Request::Get { digest, offset, length }).await;
            assert_eq!((answer, bytes.len()), (Answer::Invalid { size: 1000 }, 0), "{length} at {offset}");
        }
        for (offset, length) in [(0, 0), (1000, 0), (999, 1), (10, 500)] {
            let (answer, bytes) = request(&connection, &Request::Get { digest, offset, length }).await;
            assert_eq!(answer, Answer::Blob { size: 1000 });
            assert_eq!(bytes, blob[offset as usize..(offset + length) as usize], "{length} at {offset}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_cancelled_fetch_frees_the_providers_slot_and_keeps_the_connection() {
    with_deadline(async {
        let large = blob(5 << 20);
        let (digest, size) = (Digest::of(&large), large.len() as u64);
        let (provider, fetcher) =
            (TransferTestNode::start(TestStore::with(&large)), TransferTestNode::start(TestStore::default()));
        fetcher.dial(provider.address()).await;
        for _ in 0..8 {
            let (seen, mut first) = mpsc::channel(1);
            let mut sink = BlockedSink(seen);
            tokio::select! {
                _ = fetcher.transfer.fetch(provider.id, digest, size, &mut sink) => panic!("the sink never returns"),
                _ = first.recv() => {}
            }
        }
        // Eight cancelled fetches that kept their slots would hold all four twice.
        while let Err(error) = fetcher.fetch(provider.id, digest, size).await {
            assert!(error.is_retryable(), "{error}");
        }
    })
    .await;
}

/// Takes the first batch, reports the batch, and never returns.
struct BlockedSink(mpsc::Sender<()>);

#[async_trait]
impl BlobSink for BlockedSink {
    async fn append(&mut self, _: &[Bytes]) -> Result<(), StoreError> {
        self.0.send(()).await.unwrap();
        std::future::pending().await
    }
}

pub(super) async fn handshake(endpoint: &Endpoint, address: SocketAddr) -> Connection {
    let connection = endpoint.connect(address, "lighterman").unwrap().await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    wire::write(&mut send, &hello()).await.unwrap();
    assert!(matches!(wire::read(&mut recv).await.unwrap(), Welcome::Admitted(_)));
    connection
}

async fn request(connection: &Connection, request: &Request) -> (Answer, Vec<u8>) {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    wire::write(&mut send, request).await.unwrap();
    send.finish().unwrap();
    let answer = wire::read(&mut recv).await.unwrap();
    (answer, recv.read_to_end(1 << 20).await.unwrap())
}
