//! The end: of connections that nobody uses, of readers that do not read, of the agent.

use quinn::ReadError;

use super::content::introduce;
use super::*;
use crate::transfer::codes::{DONE, MALFORMED, TOO_SLOW};

#[tokio::test]
async fn stopping_lets_a_fetch_end_first() {
    within(async {
        let (open, opened) = watch::channel(false);
        let large = blob(5 << 20);
        let (digest, size) = (Digest::of(&large), large.len() as u64);
        let holder = Node::start(Shelf { open: Some(opened), ..Shelf::with(&large) });
        let limits = Limits { dial: BRIEF, ..Limits::DEFAULT };
        let fetcher = Node::start_with(&Identity::generate(), Shelf::default(), Guests::default(), limits);
        fetcher.meet(holder.address()).await;
        let fetch = fetcher.fetch(holder.id, digest, size);
        let stops = async {
            while holder.transfer.0.serving.available_permits() == 4 {
                tokio::task::yield_now().await;
            }
            holder.stop.cancel();
            open.send(true).unwrap();
        };
        let (fetched, ()) = tokio::join!(fetch, stops);
        assert!(fetched.unwrap().1 == large);
        holder.run.await.unwrap();
        let error = fetcher.fetch(holder.id, digest, size).await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn stopping_does_not_wait_for_a_transfer_that_does_not_end() {
    within(async {
        let (_shut, opened) = watch::channel(false);
        let blob = blob(1000);
        let limits = Limits { drain: BRIEF, ..Limits::DEFAULT };
        let key = Identity::generate();
        let shelf = Shelf { open: Some(opened), ..Shelf::with(&blob) };
        let holder = Node::start_with(&key, shelf, Guests::default(), limits);
        let fetcher = Node::start(Shelf::default());
        fetcher.meet(holder.address()).await;
        let stops = async {
            while holder.transfer.0.serving.available_permits() == 4 {
                tokio::task::yield_now().await;
            }
            holder.stop.cancel();
            holder.run.await.unwrap();
        };
        let (fetched, ()) = tokio::join!(fetcher.fetch(holder.id, Digest::of(&blob), 1000), stops);
        let error = fetched.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
        assert!(error.to_string().contains("stops"), "the closing code and its reason arrived: {error}");
    })
    .await;
}

#[tokio::test]
async fn a_reader_hears_of_the_end_although_no_more_may_be_under_way() {
    let reader = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    within(async {
        let (open, opened) = watch::channel(false);
        let (digest, size) = (Digest::of(b"large"), 4 << 20);
        let blobs = HashMap::from([(digest, vec![7; size].into())]);
        let shelf = Shelf { blobs, open: Some(opened), ..Shelf::default() };
        let limits = Limits { drain: BRIEF, ..Limits::DEFAULT };
        let holder = Node::start_with(&Identity::generate(), shelf, Guests::default(), limits);
        let address = holder.address();
        let asks = async move {
            let endpoint = bare_endpoint(&Identity::generate());
            let connection = introduce(&endpoint, address).await;
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            wire::write(&mut send, &Request::Get { digest, offset: 0, length: size as u64 }).await.unwrap();
            send.finish().unwrap();
            assert!(matches!(wire::read(&mut recv).await.unwrap(), Answer::Blob { .. }));
            (connection, recv)
        };
        // Until it is driven again it acknowledges nothing.
        let asked = tokio::task::spawn_blocking(move || (reader.block_on(asks), reader));
        let ((connection, _recv), reader) = asked.await.unwrap();
        open.send(true).unwrap();
        tokio::time::sleep(BRIEF).await;
        holder.stop.cancel();
        holder.run.await.unwrap();
        // A socket that is still there would tell whoever writes to it that it knows nothing of the connection.
        drop(holder.transfer);
        tokio::task::yield_now().await;
        let ended = tokio::task::spawn_blocking(move || reader.block_on(connection.closed())).await.unwrap();
        assert!(ended.to_string().contains("the agent stops"), "{ended}");
    })
    .await;
}

#[tokio::test]
async fn a_reader_that_does_not_read_is_given_up() {
    within(async {
        // More than all windows between the two hold. Nobody hashes it.
        let (digest, size) = (Digest::of(b"large"), 24 << 20);
        let shelf = Shelf { blobs: HashMap::from([(digest, vec![7; size].into())]), ..Shelf::default() };
        let limits = Limits { reader: BRIEF, ..Limits::DEFAULT };
        let holder = Node::start_with(&Identity::generate(), shelf, Guests::default(), limits);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = introduce(&endpoint, holder.address()).await;
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        let request = Request::Get { digest, offset: 0, length: size as u64 };
        wire::write(&mut send, &request).await.unwrap();
        send.finish().unwrap();
        assert_eq!(recv.received_reset().await.unwrap(), Some(TOO_SLOW));
        while holder.transfer.0.serving.available_permits() < 4 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_stream_with_more_than_one_request_is_reset() {
    within(async {
        let blob = blob(1000);
        let holder = Node::start(Shelf::with(&blob));
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = introduce(&endpoint, holder.address()).await;
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        for _ in 0..2 {
            wire::write(&mut send, &Request::Have(Digest::of(&blob))).await.unwrap();
        }
        let read = recv.read(&mut [0; 64]).await;
        assert_eq!(read, Err(ReadError::Reset(MALFORMED)));
        assert!(connection.close_reason().is_none(), "the connection serves on");
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_nobody_uses_is_closed_and_one_in_use_is_not() {
    within(async {
        let rogue = Rogue::start(|_, send| async move { drop(send.stopped().await) });
        let fetcher = Node::start(Shelf::default());
        fetcher.meet(rogue.address).await;
        let (_, outbound) = fetcher.transfer.0.peers.find(rogue.id).unwrap();
        let line = outbound.line().unwrap();
        fetcher.transfer.0.peers.sweep(Duration::ZERO);
        assert!(line.close_reason().is_none());
        let connection = rogue.connections.lock().unwrap()[0].clone();
        drop(line);
        fetcher.transfer.0.peers.sweep(Duration::ZERO);
        let ended = connection.closed().await;
        assert!(matches!(&ended, quinn::ConnectionError::ApplicationClosed(c) if c.error_code == DONE), "{ended}");
        assert_eq!(fetcher.transfer.peers().len(), 1, "its address is still known");
    })
    .await;
}
