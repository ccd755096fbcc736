//! The end of unused connections, of readers that do not read, and of the agent.

use quinn::ReadError;

use super::content::handshake;
use super::*;
use crate::transfer::close_codes::{DONE, MALFORMED, TOO_SLOW};

#[tokio::test]
async fn a_stopping_agent_lets_a_fetch_end_first() {
    with_deadline(async {
        let (open, opened) = watch::channel(false);
        let large = blob(5 << 20);
        let (digest, size) = (Digest::of(&large), large.len() as u64);
        let provider = TransferTestNode::start(TestStore { open: Some(opened), ..TestStore::with(&large) });
        let limits = Timeouts { dial: BRIEF, ..Timeouts::DEFAULT };
        let fetcher =
            TransferTestNode::start_with(&Identity::generate(), TestStore::default(), TestAdmission::default(), limits);
        fetcher.dial(provider.address()).await;
        let fetch = fetcher.fetch(provider.id, digest, size);
        let stops = async {
            while provider.transfer.0.serve_permits.available_permits() == 4 {
                tokio::task::yield_now().await;
            }
            provider.stop.cancel();
            open.send(true).unwrap();
        };
        let (fetched, ()) = tokio::join!(fetch, stops);
        assert!(fetched.unwrap().1 == large);
        provider.run.await.unwrap();
        let error = fetcher.fetch(provider.id, digest, size).await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_stopping_agent_does_not_wait_for_an_endless_transfer() {
    with_deadline(async {
        let (_shut, opened) = watch::channel(false);
        let blob = blob(1000);
        let limits = Timeouts { drain: BRIEF, ..Timeouts::DEFAULT };
        let key = Identity::generate();
        let store = TestStore { open: Some(opened), ..TestStore::with(&blob) };
        let provider = TransferTestNode::start_with(&key, store, TestAdmission::default(), limits);
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(provider.address()).await;
        let stops = async {
            while provider.transfer.0.serve_permits.available_permits() == 4 {
                tokio::task::yield_now().await;
            }
            provider.stop.cancel();
            provider.run.await.unwrap();
        };
        let (fetched, ()) = tokio::join!(fetcher.fetch(provider.id, Digest::of(&blob), 1000), stops);
        let error = fetched.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
        assert!(error.to_string().contains("stops"), "the close carries its code and reason: {error}");
    })
    .await;
}

#[tokio::test]
async fn a_close_reaches_a_reader_whose_window_is_full() {
    let reader = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    with_deadline(async {
        let (open, opened) = watch::channel(false);
        let (digest, size) = (Digest::of(b"large"), 4 << 20);
        let blobs = HashMap::from([(digest, vec![7; size].into())]);
        let store = TestStore { blobs, open: Some(opened), ..TestStore::default() };
        let limits = Timeouts { drain: BRIEF, ..Timeouts::DEFAULT };
        let provider = TransferTestNode::start_with(&Identity::generate(), store, TestAdmission::default(), limits);
        let address = provider.address();
        let send_request = async move {
            let endpoint = bare_endpoint(&Identity::generate());
            let connection = handshake(&endpoint, address).await;
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            wire::write(&mut send, &Request::Get { digest, offset: 0, length: size as u64 }).await.unwrap();
            send.finish().unwrap();
            assert!(matches!(wire::read(&mut recv).await.unwrap(), Answer::Blob { .. }));
            (connection, recv)
        };
        // The reader acknowledges nothing until its runtime runs again.
        let requested = tokio::task::spawn_blocking(move || (reader.block_on(send_request), reader));
        let ((connection, _recv), reader) = requested.await.unwrap();
        open.send(true).unwrap();
        tokio::time::sleep(BRIEF).await;
        provider.stop.cancel();
        provider.run.await.unwrap();
        // An open socket would answer packets of the closed connection with a stateless reset.
        drop(provider.transfer);
        tokio::task::yield_now().await;
        let ended = tokio::task::spawn_blocking(move || reader.block_on(connection.closed())).await.unwrap();
        assert!(ended.to_string().contains("the agent stops"), "{ended}");
    })
    .await;
}

#[tokio::test]
async fn a_reader_that_does_not_read_times_out() {
    with_deadline(async {
        // More than all windows between the two hold. The blob is never hashed.
        let (digest, size) = (Digest::of(b"large"), 24 << 20);
        let store = TestStore { blobs: HashMap::from([(digest, vec![7; size].into())]), ..TestStore::default() };
        let limits = Timeouts { slow_reader: BRIEF, ..Timeouts::DEFAULT };
        let provider = TransferTestNode::start_with(&Identity::generate(), store, TestAdmission::default(), limits);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = handshake(&endpoint, provider.address()).await;
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        let request = Request::Get { digest, offset: 0, length: size as u64 };
        wire::write(&mut send, &request).await.unwrap();
        send.finish().unwrap();
        assert_eq!(recv.received_reset().await.unwrap(), Some(TOO_SLOW));
        while provider.transfer.0.serve_permits.available_permits() < 4 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_stream_with_more_than_one_request_is_reset() {
    with_deadline(async {
        let blob = blob(1000);
        let provider = TransferTestNode::start(TestStore::with(&blob));
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = handshake(&endpoint, provider.address()).await;
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        for _ in 0..2 {
            wire::write(&mut send, &Request::Have(Digest::of(&blob))).await.unwrap();
        }
        let read = recv.read(&mut [0; 64]).await;
        assert_eq!(read, Err(ReadError::Reset(MALFORMED)));
        assert!(connection.close_reason().is_none(), "the connection stays open");
    })
    .await;
}

#[tokio::test]
async fn a_read_of_the_state_does_not_keep_an_idle_connection_open() {
    with_deadline(async {
        let provider = TransferTestNode::start(TestStore::default());
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(provider.address()).await;
        tokio::time::pause();
        for _ in 0..2 {
            assert!(fetcher.transfer.is_connected(provider.id));
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        fetcher.transfer.0.peers.close_unused(Duration::from_secs(2));
        assert!(!fetcher.transfer.is_connected(provider.id), "the connection was not used for two seconds");
    })
    .await;
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_a_connection_in_use_is_not() {
    with_deadline(async {
        let rogue = Rogue::start(|_, send| async move { drop(send.stopped().await) });
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(rogue.address).await;
        let (_, outbound) = fetcher.transfer.0.peers.find(rogue.id).unwrap();
        let outbound_connection = outbound.connection().unwrap();
        fetcher.transfer.0.peers.close_unused(Duration::ZERO);
        assert!(outbound_connection.close_reason().is_none());
        let connection = rogue.connections.lock()[0].clone();
        drop(outbound_connection);
        fetcher.transfer.0.peers.close_unused(Duration::ZERO);
        let ended = connection.closed().await;
        assert!(matches!(&ended, quinn::ConnectionError::ApplicationClosed(c) if c.error_code == DONE), "{ended}");
        assert_eq!(fetcher.transfer.peers().len(), 1, "the address of the peer stays recorded");
    })
    .await;
}
