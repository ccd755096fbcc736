//! Peers that misbehave.

use futures::future::BoxFuture;
use quinn::SendStream;
use tokio::task::AbortHandle;

use super::*;

type RogueHandler = Arc<dyn Fn(Request, SendStream) -> BoxFuture<'static, ()> + Send + Sync>;

/// A peer that is admitted like any other, and then answers by a given handler.
pub(super) struct Rogue {
    pub(super) id: PeerId,
    pub(super) address: SocketAddr,
    task: AbortHandle,
    pub(super) connections: Arc<Mutex<Vec<Connection>>>,
}

impl Rogue {
    pub(super) fn start<F>(handler: impl Fn(Request, SendStream) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let identity = Identity::generate();
        let endpoint = bare_endpoint(&identity);
        let address = endpoint.local_addr().unwrap();
        let handler: RogueHandler = Arc::new(move |request, send| Box::pin(handler(request, send)));
        let connections = Arc::new(Mutex::new(Vec::new()));
        let seen = connections.clone();
        let task = tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let Ok(connection) = incoming.await else { continue };
                seen.lock().push(connection.clone());
                tokio::spawn(run_rogue_connection(connection, handler.clone()));
            }
        });
        Self { id: identity.peer_id(), address, task: task.abort_handle(), connections }
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run_rogue_connection(connection: Connection, handler: RogueHandler) {
    let (mut send, mut recv) = connection.accept_bi().await.unwrap();
    wire::read::<Hello>(&mut recv).await.unwrap();
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(8));
    wire::write(&mut send, &Welcome::Admitted(hello())).await.unwrap();
    send.finish().unwrap();
    while let Ok((send, mut recv)) = connection.accept_bi().await {
        let request = wire::read(&mut recv).await.unwrap();
        tokio::spawn(handler(request, send));
    }
}

/// Answers as a provider of a blob of this size.
pub(super) async fn answer_blob(send: &mut SendStream, size: u64) {
    wire::write(send, &Answer::Blob { size }).await.unwrap();
}
