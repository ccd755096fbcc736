//! Serves the hash chain of a blob.

use std::sync::Arc;

use tokio::time::timeout;

use super::{ResponseStream, ServeError};
use crate::oci::{Digest, HashState, PieceLayout};
use crate::transfer::Shared;
use crate::transfer::hash_chain_cache::{HashChainLookup, PendingHashChain};
use crate::transfer::tuning::{READ_BYTES, STATE_BYTES};
use crate::wire::Answer;

impl Shared {
    pub(super) async fn serve_hash_chain(&self, digest: Digest, stream: &mut ResponseStream) -> Result<(), ServeError> {
        if let Some(partial) = self.partials.partial(digest) {
            let chain = partial.hash_chain();
            self.answer(stream, &Answer::Partial { size: chain.layout().size() }).await?;
            self.send_states(chain.states(), stream).await?;
            return self.finish(stream).await;
        }
        let size = match self.with_store_timeout(self.store.blob(digest)).await {
            Ok(Some(blob)) => blob.size,
            Ok(None) => return self.answer_and_finish(stream, &Answer::Absent).await,
            Err(error) => return self.answer_store_failure(stream, error).await,
        };
        let Some(lookup) = self.hash_chains.get_or_start(digest, PieceLayout::for_size(size)) else {
            return self.answer_and_finish(stream, &Answer::Busy).await;
        };
        self.answer(stream, &Answer::Blob { size }).await?;
        match lookup {
            HashChainLookup::Cached(chain) => self.send_states(chain.states(), stream).await?,
            HashChainLookup::Pending(pending) => self.send_as_computed(pending, stream).await?,
        }
        self.finish(stream).await
    }

    /// Sends states as they are computed. The requests for one chain take turns to hash a slice
    /// each, and send the states that exist. Hashing stops when the last request ends.
    async fn send_as_computed(
        &self,
        pending: Arc<PendingHashChain>,
        stream: &mut ResponseStream,
    ) -> Result<(), ServeError> {
        let mut sent = 0;
        loop {
            let batch = tokio::select! {
                batch = self.hash_chains.next_states(&pending, sent, &*self.store) => batch?,
                _ = stream.send.stopped() => return Err(ServeError::Left("before the hash chain was complete".into())),
            };
            self.send_states(&batch.states, stream).await?;
            sent += batch.states.len();
            if batch.is_end {
                return Ok(());
            }
        }
    }

    async fn send_states(&self, states: &[HashState], stream: &mut ResponseStream) -> Result<(), ServeError> {
        for chunk in states.chunks(READ_BYTES / STATE_BYTES) {
            let bytes: Vec<u8> = chunk.iter().flat_map(|state| state.to_bytes()).collect();
            let written = timeout(self.timeouts.slow_reader, stream.send.write_chunk(bytes.into())).await;
            written.map_err(|_| ServeError::TooSlow)??;
        }
        Ok(())
    }
}
