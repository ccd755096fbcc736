//! Serving the list of states of a blob.

use std::sync::Arc;

use tokio::time::timeout;

use super::{ServeError, Stream};
use crate::oci::{Cut, Digest, State};
use crate::transfer::Shared;
use crate::transfer::chains::{Listed, Making};
use crate::transfer::tuning::{READ, STATE};
use crate::wire::Answer;

impl Shared {
    pub(super) async fn send_list(&self, digest: Digest, stream: &mut Stream) -> Result<(), ServeError> {
        if let Some(partial) = self.partials.partial(digest) {
            let chain = partial.chain();
            self.answer(stream, &Answer::Partial { size: chain.cut().size() }).await?;
            self.send_states(chain.states(), stream).await?;
            return self.finish(stream).await;
        }
        let size = match self.asked_of_the_store(self.store.blob(digest)).await {
            Ok(Some(blob)) => blob.size,
            Ok(None) => return self.answer_only(stream, &Answer::Absent).await,
            Err(error) => return self.admit_failure(stream, error).await,
        };
        let Some(listed) = self.chains.of(digest, Cut::usual(size)) else {
            return self.answer_only(stream, &Answer::Busy).await;
        };
        self.answer(stream, &Answer::Blob { size }).await?;
        match listed {
            Listed::Known(chain) => self.send_states(chain.states(), stream).await?,
            Listed::Making(making) => self.send_as_made(making, stream).await?,
        }
        self.finish(stream).await
    }

    /// Whoever asked makes the list, a slice at a time, and sends what there is of it; several who asked for the same take turns. Nothing is
    /// made for those who have left.
    async fn send_as_made(&self, making: Arc<Making>, stream: &mut Stream) -> Result<(), ServeError> {
        let mut sent = 0;
        loop {
            let more = tokio::select! {
                more = self.chains.more(&making, sent, &*self.store) => more?,
                _ = stream.send.stopped() => return Err(ServeError::Left("before the list was made".into())),
            };
            self.send_states(&more.states, stream).await?;
            sent += more.states.len();
            if more.is_end {
                return Ok(());
            }
        }
    }

    async fn send_states(&self, states: &[State], stream: &mut Stream) -> Result<(), ServeError> {
        for some in states.chunks(READ / STATE) {
            let bytes: Vec<u8> = some.iter().flat_map(|state| state.to_bytes()).collect();
            let written = timeout(self.limits.reader, stream.send.write_chunk(bytes.into())).await;
            written.map_err(|_| ServeError::TooSlow)??;
        }
        Ok(())
    }
}
