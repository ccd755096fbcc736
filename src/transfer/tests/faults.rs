//! Peers that send wrong content, fail, stall and die.

use super::*;
use crate::oci::VerifyError;

const SIZE: u64 = 100_000;

fn digest() -> Digest {
    Digest::of(&blob(SIZE as usize))
}

async fn fetch_from(rogue: &Rogue, timeouts: Timeouts) -> (FetchError, TransferTestNode) {
    let fetcher =
        TransferTestNode::start_with(&Identity::generate(), TestStore::default(), TestAdmission::default(), timeouts);
    fetcher.dial(rogue.address).await;
    let error = fetcher.fetch(rogue.id, digest(), SIZE).await.unwrap_err();
    (error, fetcher)
}

#[tokio::test]
async fn wrong_content_is_detected_and_names_the_peer() {
    let wrong = {
        let mut bytes = blob(SIZE as usize).to_vec();
        bytes[70_000] ^= 1;
        Bytes::from(bytes)
    };
    let right = blob(SIZE as usize);
    let cases = [
        ("other bytes", SIZE, wrong, SIZE),
        ("one byte less", SIZE, right.slice(1..), SIZE - 1),
        ("one byte more", SIZE, [&right[..], &[0]].concat().into(), SIZE + 1),
        ("another size", SIZE - 1, right.slice(1..), SIZE - 1),
        ("another size, right bytes", SIZE + 1, right.clone(), SIZE + 1),
        ("nothing", SIZE, Bytes::new(), 0),
    ];
    for (what, promised, bytes, received) in cases {
        with_deadline(async {
            let rogue = Rogue::start(move |_, mut send| {
                let bytes = bytes.clone();
                async move {
                    answer_blob(&mut send, promised).await;
                    let _ = send.write_chunk(bytes).await;
                }
            });
            let (error, fetcher) = fetch_from(&rogue, Timeouts::DEFAULT).await;
            let FetchError::Corrupt { peer, source } = &error else { panic!("{what}: {error}") };
            assert_eq!(*peer, rogue.id, "{what}");
            match source {
                VerifyError::Size { actual_size, .. } => assert_eq!(*actual_size, received, "{what}"),
                VerifyError::Digest { .. } => assert_eq!(what, "other bytes"),
                VerifyError::Piece { .. } => panic!("{what}: no pieces were requested"),
            }
            // A wrong size may be the fault of the manifest.
            assert_eq!(error.is_peer_fault(), what == "other bytes", "{what}");
            assert!(fetcher.metric(r#"fetch_failures_total{reason="corrupt"} 1"#));
        })
        .await;
    }
}

#[tokio::test]
async fn an_endless_stream_is_stopped_at_the_size() {
    with_deadline(async {
        let rogue = Rogue::start(|_, mut send| async move {
            answer_blob(&mut send, SIZE).await;
            while send.write_chunk(blob(64 << 10)).await.is_ok() {}
        });
        let (error, _) = fetch_from(&rogue, Timeouts::DEFAULT).await;
        assert!(matches!(error, FetchError::Corrupt { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_stops_sending_times_out() {
    with_deadline(async {
        let rogue = Rogue::start(|_, mut send| async move {
            answer_blob(&mut send, SIZE).await;
            send.write_chunk(blob(1000)).await.unwrap();
            // The stream is never finished.
            let _ = send.stopped().await;
        });
        let (error, _) = fetch_from(&rogue, Timeouts { stall: BRIEF, ..Timeouts::DEFAULT }).await;
        assert!(matches!(error, FetchError::Stalled { peer, .. } if peer == rogue.id), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_dripping_peer_times_out_although_bytes_keep_coming() {
    with_deadline(async {
        let rogue = Rogue::start(|_, mut send| async move {
            answer_blob(&mut send, SIZE).await;
            // Pauses far below the timeout, and far too few bytes each time.
            while send.write_all(&[7; 10]).await.is_ok() {
                tokio::time::sleep(BRIEF / 20).await;
            }
        });
        let (error, _) = fetch_from(&rogue, Timeouts { stall: BRIEF, ..Timeouts::DEFAULT }).await;
        assert!(matches!(error, FetchError::Stalled { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_does_not_answer_times_out() {
    with_deadline(async {
        let rogue = Rogue::start(|_, send| async move { drop(send.stopped().await) });
        let (error, fetcher) = fetch_from(&rogue, Timeouts { answer: BRIEF, ..Timeouts::DEFAULT }).await;
        assert!(matches!(error, FetchError::Stalled { .. }), "{error}");
        let error = fetcher.transfer.size_of(rogue.id, digest()).await.unwrap_err();
        assert!(matches!(error, FetchError::Stalled { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_malformed_answer_breaks_the_protocol() {
    let current = Versions::TRANSFER.current().version();
    let version = [current.major, current.minor];
    let garbage = [&[0, 0, 0, 1], &version[..], &[0xff]].concat();
    let oversized = [&[0xff, 0, 0, 0], &version[..], &[0]].concat();
    for bytes in [garbage, oversized, Vec::new()] {
        with_deadline(async {
            let bytes = Bytes::from(bytes);
            let rogue = Rogue::start(move |_, mut send| {
                let bytes = bytes.clone();
                async move { send.write_chunk(bytes).await.unwrap() }
            });
            let (error, _) = fetch_from(&rogue, Timeouts::DEFAULT).await;
            assert!(matches!(error, FetchError::Protocol { peer, .. } if peer == rogue.id), "{error}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_peer_whose_connection_ends_in_mid_stream_is_unreachable() {
    with_deadline(async {
        let (sent, mut half) = mpsc::channel(1);
        let rogue = Rogue::start(move |_, mut send| {
            let sent = sent.clone();
            async move {
                answer_blob(&mut send, SIZE).await;
                send.write_chunk(blob(50_000)).await.unwrap();
                sent.send(()).await.unwrap();
                let _ = send.stopped().await;
            }
        });
        let connections = rogue.connections.clone();
        let ends = async {
            half.recv().await.unwrap();
            connections.lock().iter().for_each(|c| c.close(VarInt::from_u32(0), b"dying"));
        };
        let ((error, _), ()) = tokio::join!(fetch_from(&rogue, Timeouts::DEFAULT), ends);
        assert!(matches!(error, FetchError::Unreachable { peer, .. } if peer == rogue.id), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_fetch_from_a_peer_that_is_removed_meanwhile_ends_at_once() {
    with_deadline(async {
        let (sent, mut half) = mpsc::channel(1);
        let rogue = Rogue::start(move |_, mut send| {
            let sent = sent.clone();
            async move {
                answer_blob(&mut send, SIZE).await;
                sent.send(()).await.unwrap();
                let _ = send.stopped().await;
            }
        });
        // No timeout may end the fetch instead.
        let limits =
            Timeouts { stall: Duration::from_secs(600), answer: Duration::from_secs(600), ..Timeouts::DEFAULT };
        let fetcher =
            TransferTestNode::start_with(&Identity::generate(), TestStore::default(), TestAdmission::default(), limits);
        fetcher.dial(rogue.address).await;
        let removes = async {
            half.recv().await.unwrap();
            fetcher.transfer.remove_peer(rogue.id);
        };
        let (fetched, ()) = tokio::join!(fetcher.fetch(rogue.id, digest(), SIZE), removes);
        let error = fetched.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_peer_whose_pooled_connection_died_is_dialed_again() {
    with_deadline(async {
        let key = Identity::generate();
        let blob = blob(1000);
        let provider =
            TransferTestNode::start_with(&key, TestStore::with(&blob), TestAdmission::default(), Timeouts::DEFAULT);
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(provider.address()).await;
        fetcher.fetch(provider.id, Digest::of(&blob), 1000).await.unwrap();
        // The provider closes our connection. The connection is still in the pool when the next
        // fetch begins.
        provider.transfer.remove_peer(fetcher.id);
        fetcher.fetch(provider.id, Digest::of(&blob), 1000).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn concurrent_fetches_from_a_dead_peer_share_one_failed_dial() {
    with_deadline(async {
        let limits = Timeouts { dial: BRIEF, ..Timeouts::DEFAULT };
        let fetcher =
            TransferTestNode::start_with(&Identity::generate(), TestStore::default(), TestAdmission::default(), limits);
        // The socket is bound, and nothing reads from it.
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        let id = Identity::generate().peer_id();
        let peer = Peer { id, node: "gone".parse().unwrap(), zone: None, transfer: address, gossip: address };
        fetcher.transfer.0.peers.insert(&peer, unbounded_admission()).unwrap();
        let fetches = (0..4).map(|_| fetcher.fetch(id, digest(), SIZE));
        for fetched in futures::future::join_all(fetches).await {
            let error = fetched.unwrap_err();
            assert!(matches!(error, FetchError::Unreachable { peer, .. } if peer == id), "{error}");
        }
        let (_, outbound) = fetcher.transfer.0.peers.find(id).unwrap();
        assert_eq!(outbound.failures(), 1, "all four fetches share the outcome of one dial");
    })
    .await;
}

#[tokio::test]
async fn a_store_failure_of_the_provider_ends_the_fetch_and_is_no_fault_of_the_peer() {
    with_deadline(async {
        let large = blob(1 << 20);
        let provider = TransferTestNode::start(TestStore { fails_at: Some(512 << 10), ..TestStore::with(&large) });
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(provider.address()).await;
        let error = fetcher.fetch(provider.id, Digest::of(&large), 1 << 20).await.unwrap_err();
        assert!(matches!(error, FetchError::StoreFailed { peer } if peer == provider.id), "{error}");
        assert!(!error.is_peer_fault());
    })
    .await;
}

#[tokio::test]
async fn a_failing_sink_ends_the_fetch_as_a_local_failure() {
    struct FullSink;
    #[async_trait]
    impl BlobSink for FullSink {
        async fn append(&mut self, _: &[Bytes]) -> Result<(), StoreError> {
            Err(StoreError::Full(digest()))
        }
    }
    with_deadline(async {
        let (provider, fetcher) = (
            TransferTestNode::start(TestStore::with(&blob(SIZE as usize))),
            TransferTestNode::start(TestStore::default()),
        );
        fetcher.dial(provider.address()).await;
        let error = fetcher.transfer.fetch(provider.id, digest(), SIZE, &mut FullSink).await.unwrap_err();
        assert!(matches!(error, FetchError::Sink(StoreError::Full(_))), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_provider_that_cannot_open_a_blob_answers_failed() {
    with_deadline(async {
        let provider = TransferTestNode::start(TestStore { broken: true, ..TestStore::with(&blob(10)) });
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(provider.address()).await;
        let digest = Digest::of(&blob(10));
        for error in [
            fetcher.fetch(provider.id, digest, 10).await.map(drop).unwrap_err(),
            fetcher.transfer.size_of(provider.id, digest).await.map(drop).unwrap_err(),
        ] {
            assert!(matches!(error, FetchError::StoreFailed { peer } if peer == provider.id), "{error}");
            assert!(!error.is_peer_fault() && !error.is_retryable());
        }
    })
    .await;
}

#[tokio::test]
async fn a_size_that_the_manifest_overstates_is_no_fault_of_the_peer() {
    with_deadline(async {
        let content = blob(SIZE as usize);
        let provider = TransferTestNode::start(TestStore::with(&content));
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(provider.address()).await;
        let error = fetcher.fetch(provider.id, digest(), SIZE + 1).await.unwrap_err();
        let FetchError::Corrupt { source: VerifyError::Size { actual_size, .. }, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!((*actual_size, error.is_peer_fault()), (SIZE, false));
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_contradicts_itself_about_the_size_breaks_the_protocol() {
    with_deadline(async {
        let rogue = Rogue::start(|_, mut send| async move {
            wire::write(&mut send, &Answer::Invalid { size: SIZE }).await.unwrap();
        });
        let (error, _) = fetch_from(&rogue, Timeouts::DEFAULT).await;
        assert!(matches!(error, FetchError::Protocol { .. }), "{error}");
    })
    .await;
}
