//! Waits for upload slots, which [`UploadSlots`] grants.
//!
//! A slot counts while bytes move. An upload whose write takes longer than [`UPLOAD_STALL`] is
//! parked: the upload keeps its state, and another upload gets the slot. When the reader reads
//! again, the upload queues for a new slot. A reader that does not read thus holds a slot for a
//! second.

use std::collections::HashMap;
use std::pin::pin;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::timeout;

use super::tuning::{BLOBS_PER_PEER, SLOTS_PER_BLOB, UPLOAD_STALL};
use crate::decide::upload_slots::{SendCounts, UploadSlots, UploadTicket};
use crate::model::PeerId;
use crate::oci::Digest;

pub(super) struct UploadQueue {
    table: Mutex<UploadTable>,
    /// Permits for as many peers as there are slots, with all uploads of each. A parked upload
    /// costs two reads at most, and a share of the windows of its connection.
    parking_permits: Semaphore,
}

struct UploadTable {
    slots: UploadSlots,
    sent: SendCounts,
    waiting: HashMap<UploadTicket, oneshot::Sender<()>>,
    /// Parked uploads by peer, without zeros.
    parked: HashMap<PeerId, usize>,
}

/// One upload; its slot or permit is released when dropped.
pub(super) struct Upload<'a> {
    uploads: &'a UploadQueue,
    peer: PeerId,
    digest: Digest,
    pieces: usize,
    state: UploadState<'a>,
}

enum UploadState<'a> {
    Queued(UploadTicket, oneshot::Receiver<()>),
    Active(UploadTicket),
    Parked { _permit: SemaphorePermit<'a> },
}

/// The queue is full, or the peer has more parked uploads than an honest peer ever requests.
#[derive(Debug)]
pub(super) struct NoUploadSlot;

impl UploadQueue {
    pub(super) fn new(slots: usize) -> Self {
        let table = UploadTable {
            slots: UploadSlots::new(SLOTS_PER_BLOB, slots),
            sent: SendCounts::default(),
            waiting: HashMap::new(),
            parked: HashMap::new(),
        };
        Self { table: Mutex::new(table), parking_permits: Semaphore::new(slots * BLOBS_PER_PEER) }
    }

    /// Queues an upload of a blob of so many pieces.
    ///
    /// # Errors
    /// The queue is full.
    pub(super) fn enqueue(&self, peer: PeerId, digest: Digest, pieces: usize) -> Result<Upload<'_>, NoUploadSlot> {
        let state = self.take_ticket(peer, digest, pieces)?;
        Ok(Upload { uploads: self, peer, digest, pieces, state })
    }

    /// Picks the pieces of `choice` that are present and were sent least, at most `most`. The
    /// picked pieces count as sent.
    pub(super) fn pick_pieces(&self, digest: Digest, pieces: &[u32], limit: u8, has: impl Fn(u32) -> bool) -> Vec<u32> {
        self.lock().sent.choose(digest, pieces, limit.into(), has)
    }

    fn take_ticket(&self, peer: PeerId, digest: Digest, pieces: usize) -> Result<UploadState<'_>, NoUploadSlot> {
        let mut table = self.lock();
        let ticket = table.slots.enqueue(peer, digest, pieces).map_err(|_| NoUploadSlot)?;
        let (grant, granted) = oneshot::channel();
        table.waiting.insert(ticket, grant);
        table.grant_slots();
        Ok(UploadState::Queued(ticket, granted))
    }

    fn release(&self, ticket: UploadTicket) {
        let mut table = self.lock();
        table.waiting.remove(&ticket);
        table.slots.remove(ticket);
        table.grant_slots();
    }

    fn lock(&self) -> MutexGuard<'_, UploadTable> {
        self.table.lock()
    }
}

impl UploadTable {
    fn grant_slots(&mut self) {
        while let Some(ticket) = self.slots.start_next() {
            if let Some(grant) = self.waiting.remove(&ticket) {
                // An upload that was dropped meanwhile releases the slot in `drop`.
                let _ = grant.send(());
            }
        }
    }
}

impl Upload<'_> {
    /// Waits for a slot; a parked upload queues again.
    ///
    /// # Errors
    /// The queue is full.
    pub(super) async fn wait_for_slot(&mut self) -> Result<(), NoUploadSlot> {
        if matches!(self.state, UploadState::Parked { .. }) {
            let state = self.uploads.take_ticket(self.peer, self.digest, self.pieces)?;
            self.unpark();
            self.state = state;
        }
        if let UploadState::Queued(ticket, granted) = &mut self.state {
            // The sender is dropped only with this upload, or after the grant.
            let _ = granted.await;
            self.state = UploadState::Active(*ticket);
        }
        Ok(())
    }

    /// Waits for work that the reader has to allow; parks the upload after [`UPLOAD_STALL`].
    ///
    /// # Errors
    /// The peer has [`BLOBS_PER_PEER`] parked uploads already.
    pub(super) async fn wait_or_park<T>(&mut self, work: impl Future<Output = T>) -> Result<T, NoUploadSlot> {
        let mut work = pin!(work);
        if let Ok(done) = timeout(UPLOAD_STALL, &mut work).await {
            return Ok(done);
        }
        self.park()?;
        Ok(work.await)
    }

    pub(super) fn record_sent(&mut self, bytes: u64) {
        if let UploadState::Active(ticket) = self.state {
            self.uploads.lock().slots.record_sent(ticket, bytes);
        }
    }

    /// Keeps the slot when no parking permit is left: with so many stalled peers, our own link is
    /// slow.
    fn park(&mut self) -> Result<(), NoUploadSlot> {
        let UploadState::Active(ticket) = self.state else { return Ok(()) };
        let mut table = self.uploads.lock();
        let parked = table.parked.get(&self.peer).copied().unwrap_or_default();
        if parked == BLOBS_PER_PEER {
            return Err(NoUploadSlot);
        }
        let Ok(permit) = self.uploads.parking_permits.try_acquire() else { return Ok(()) };
        table.parked.insert(self.peer, parked + 1);
        table.slots.remove(ticket);
        table.grant_slots();
        drop(table);
        self.state = UploadState::Parked { _permit: permit };
        Ok(())
    }

    fn unpark(&self) {
        let mut table = self.uploads.lock();
        if let Some(parked) = table.parked.get_mut(&self.peer) {
            *parked -= 1;
            if *parked == 0 {
                table.parked.remove(&self.peer);
            }
        }
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        match self.state {
            UploadState::Queued(ticket, _) | UploadState::Active(ticket) => self.uploads.release(ticket),
            UploadState::Parked { .. } => self.unpark(),
        }
    }
}
