//! Telling which pieces of a blob there are, as they come.

use std::sync::Arc;

use tokio::time::{sleep, timeout};

use super::{ServeError, Stream, broken};
use crate::model::{Availability, Bits, MAX_NEWS};
use crate::oci::Digest;
use crate::ports::{Partial, StoreError};
use crate::transfer::Shared;
use crate::transfer::tuning::NEWS_EVERY;
use crate::wire::{self, Answer};

impl Shared {
    /// Takes no slot: a word is a packet.
    pub(super) async fn tell_pieces(&self, digest: Digest, stream: &mut Stream) -> Result<(), ServeError> {
        let Ok(_followed) = stream.followed.clone().try_acquire_owned() else {
            return self.answer_only(stream, &Answer::Busy).await;
        };
        match self.partials.partial(digest) {
            Some(partial) => self.tell_partial(digest, partial, stream).await,
            None => self.tell(digest, stream).await,
        }
    }

    async fn tell_partial(
        &self,
        digest: Digest,
        partial: Arc<dyn Partial>,
        stream: &mut Stream,
    ) -> Result<(), ServeError> {
        let (mut changes, mut told, size) = (partial.changes(), partial.held(), partial.chain().cut().size());
        // Not held while nothing changes: a reader may take its time, and what is fetched no more costs memory and space on the disk.
        drop(partial);
        self.answer(stream, &Answer::Partial { size }).await?;
        self.say(&Availability::These(told.clone()), stream).await?;
        loop {
            let changed = async {
                let changed = changes.changed().await;
                sleep(NEWS_EVERY).await;
                changed
            };
            tokio::select! {
                changed = changed => if changed.is_err() { break },
                () = stream.stop.cancelled() => return Err(StoreError::Absent(digest).into()),
                _ = stream.send.stopped() => return Ok(()),
            }
            changes.mark_unchanged();
            let Some(held) = self.partials.partial(digest).map(|partial| partial.held()) else { break };
            // What is fetched anew is not what was followed.
            if changes.has_changed().is_err() {
                break;
            }
            for news in news(&told, &held).chunks(MAX_NEWS) {
                self.say(&Availability::Also(news.to_vec()), stream).await?;
            }
            told = held;
        }
        match self.asked_of_the_store(self.store.blob(digest)).await? {
            Some(_) => self.say(&Availability::Whole, stream).await?,
            None => return Err(StoreError::Absent(digest).into()),
        }
        self.finish(stream).await
    }

    async fn say(&self, word: &Availability, stream: &mut Stream) -> Result<(), ServeError> {
        let said = timeout(self.limits.reader, wire::write_in(&mut stream.send, word, stream.format)).await;
        said.map_err(|_| ServeError::TooSlow)?.map_err(broken)
    }
}

fn news(told: &Bits, held: &Bits) -> Vec<u32> {
    held.ones().filter(|piece| !told.get(*piece)).filter_map(|piece| u32::try_from(piece).ok()).collect()
}
