//! Serves the piece map of a blob, and its updates as pieces arrive.

use std::sync::Arc;

use tokio::time::{sleep, timeout};

use super::{ResponseStream, ServeError, wire_failure};
use crate::model::{Bits, MAX_HAVE_PIECES, PieceMapUpdate};
use crate::oci::Digest;
use crate::ports::{PartialBlob, StoreError};
use crate::transfer::Shared;
use crate::transfer::tuning::PIECE_MAP_INTERVAL;
use crate::wire::{self, Answer};

impl Shared {
    /// Takes no upload slot: an update is a packet.
    pub(super) async fn serve_follow(&self, digest: Digest, stream: &mut ResponseStream) -> Result<(), ServeError> {
        let Ok(_follow_permit) = stream.follow_permits.clone().try_acquire_owned() else {
            return self.answer_and_finish(stream, &Answer::Busy).await;
        };
        match self.partials.partial(digest) {
            Some(partial) => self.send_piece_map_updates(digest, partial, stream).await,
            None => self.serve_have(digest, stream).await,
        }
    }

    async fn send_piece_map_updates(
        &self,
        digest: Digest,
        partial: Arc<dyn PartialBlob>,
        stream: &mut ResponseStream,
    ) -> Result<(), ServeError> {
        let (mut changes, mut sent, size) =
            (partial.changes(), partial.piece_map(), partial.hash_chain().layout().size());
        // Not held between updates: the reader may be slow, and an abandoned download costs memory
        // and disk space.
        drop(partial);
        self.answer(stream, &Answer::Partial { size }).await?;
        self.send_piece_map(&PieceMapUpdate::Map(sent.clone()), stream).await?;
        loop {
            let changed = async {
                let changed = changes.changed().await;
                sleep(PIECE_MAP_INTERVAL).await;
                changed
            };
            tokio::select! {
                changed = changed => if changed.is_err() { break },
                () = stream.stop.cancelled() => return Err(StoreError::Absent(digest).into()),
                _ = stream.send.stopped() => return Ok(()),
            }
            changes.mark_unchanged();
            let Some(current) = self.partials.partial(digest).map(|partial| partial.piece_map()) else { break };
            // A download that was started anew is not the followed one.
            if changes.has_changed().is_err() {
                break;
            }
            for pieces in added_pieces(&sent, &current).chunks(MAX_HAVE_PIECES) {
                self.send_piece_map(&PieceMapUpdate::Have(pieces.to_vec()), stream).await?;
            }
            sent = current;
        }
        match self.with_store_timeout(self.store.blob(digest)).await? {
            Some(_) => self.send_piece_map(&PieceMapUpdate::HaveAll, stream).await?,
            None => return Err(StoreError::Absent(digest).into()),
        }
        self.finish(stream).await
    }

    async fn send_piece_map(&self, update: &PieceMapUpdate, stream: &mut ResponseStream) -> Result<(), ServeError> {
        let written = timeout(self.timeouts.slow_reader, wire::write_in(&mut stream.send, update, stream.format)).await;
        written.map_err(|_| ServeError::TooSlow)?.map_err(wire_failure)
    }
}

fn added_pieces(sent: &Bits, current: &Bits) -> Vec<u32> {
    current.ones().filter(|piece| !sent.get(*piece)).filter_map(|piece| u32::try_from(piece).ok()).collect()
}
