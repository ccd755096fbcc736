//! Whose turn it is to be sent pieces: waits on [`Slots`], which decides.
//!
//! A slot counts while bytes move. An upload of which nothing moved for [`MOVES`] is parked: it keeps what it has, somebody else gets the slot,
//! and when its reader takes something again it queues for another. So readers that do not read cost others nothing but a moment.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::timeout;

use super::tuning::{BLOBS_PER_PEER, MOVES, SLOTS_PER_BLOB};
use crate::decide::slots::{Sent, Slots, Ticket};
use crate::model::PeerId;
use crate::oci::Digest;

/// All uploads of this node.
pub(super) struct Uploads {
    table: Mutex<Table>,
    /// For as many peers as there are slots, all that they may park. Each costs two reads at most, and a share of its connection's windows.
    parking: Semaphore,
}

struct Table {
    slots: Slots,
    sent: Sent,
    waiting: HashMap<Ticket, oneshot::Sender<()>>,
    /// By peer; those that have none are not in it.
    parked: HashMap<PeerId, usize>,
}

/// One of them; its place is free again when dropped.
pub(super) struct Upload<'a> {
    uploads: &'a Uploads,
    peer: PeerId,
    digest: Digest,
    pieces: usize,
    place: Place<'a>,
}

enum Place<'a> {
    Queue(Ticket, oneshot::Receiver<()>),
    Slot(Ticket),
    Parked { _permit: SemaphorePermit<'a> },
}

/// The queue is full, or more uploads of this peer stand still than an honest one ever asks for.
#[derive(Debug)]
pub(super) struct NoPlace;

impl Uploads {
    pub(super) fn new(slots: usize) -> Self {
        let table = Table {
            slots: Slots::new(SLOTS_PER_BLOB, slots),
            sent: Sent::default(),
            waiting: HashMap::new(),
            parked: HashMap::new(),
        };
        Self { table: Mutex::new(table), parking: Semaphore::new(slots * BLOBS_PER_PEER) }
    }

    /// A place in the queue, for a blob of so many pieces.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn queue(&self, peer: PeerId, digest: Digest, pieces: usize) -> Result<Upload<'_>, NoPlace> {
        let place = self.enqueue(peer, digest, pieces)?;
        Ok(Upload { uploads: self, peer, digest, pieces, place })
    }

    /// Those of the choice that are here and were sent the least; they count as sent from now on.
    pub(super) fn choose(&self, digest: Digest, choice: &[u32], most: u8, has: impl Fn(u32) -> bool) -> Vec<u32> {
        self.lock().sent.choose(digest, choice, most.into(), has)
    }

    fn enqueue(&self, peer: PeerId, digest: Digest, pieces: usize) -> Result<Place<'_>, NoPlace> {
        let mut table = self.lock();
        let ticket = table.slots.enqueue(peer, digest, pieces).map_err(|_| NoPlace)?;
        let (granted, waits) = oneshot::channel();
        table.waiting.insert(ticket, granted);
        table.grant();
        Ok(Place::Queue(ticket, waits))
    }

    fn leave(&self, ticket: Ticket) {
        let mut table = self.lock();
        table.waiting.remove(&ticket);
        table.slots.done(ticket);
        table.grant();
    }

    /// Nothing that runs under it panics half-way through a change, so a poisoned one is as good.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn grant(&mut self) {
        while let Some(ticket) = self.slots.turn() {
            if let Some(granted) = self.waiting.remove(&ticket) {
                // One that is gone in this moment gives it back when it is dropped.
                let _ = granted.send(());
            }
        }
    }
}

impl Upload<'_> {
    /// Waits for a slot; one that is parked queues again.
    ///
    /// # Errors
    /// The queue has no room for it any more.
    pub(super) async fn turn(&mut self) -> Result<(), NoPlace> {
        if matches!(self.place, Place::Parked { .. }) {
            let place = self.uploads.enqueue(self.peer, self.digest, self.pieces)?;
            self.unpark();
            self.place = place;
        }
        if let Place::Queue(ticket, granted) = &mut self.place {
            // Its other end is dropped only with this place, or when it was told.
            let _ = granted.await;
            self.place = Place::Slot(*ticket);
        }
        Ok(())
    }

    /// Waits for something that the reader has to do; when it takes long, without a slot.
    ///
    /// # Errors
    /// The peer has as many uploads that stand still as it may have.
    pub(super) async fn moving<T>(&mut self, work: impl Future<Output = T>) -> Result<T, NoPlace> {
        let mut work = pin!(work);
        if let Ok(done) = timeout(MOVES, &mut work).await {
            return Ok(done);
        }
        self.park()?;
        Ok(work.await)
    }

    /// So many bytes were sent.
    pub(super) fn sent(&mut self, bytes: u64) {
        if let Place::Slot(ticket) = self.place {
            self.uploads.lock().slots.sent(ticket, bytes);
        }
    }

    /// Where there is no room to park the slot is kept: when so many peers stand still it is our own link that is slow.
    fn park(&mut self) -> Result<(), NoPlace> {
        let Place::Slot(ticket) = self.place else { return Ok(()) };
        let mut table = self.uploads.lock();
        let parked = table.parked.get(&self.peer).copied().unwrap_or_default();
        if parked == BLOBS_PER_PEER {
            return Err(NoPlace);
        }
        let Ok(permit) = self.uploads.parking.try_acquire() else { return Ok(()) };
        table.parked.insert(self.peer, parked + 1);
        table.slots.done(ticket);
        table.grant();
        drop(table);
        self.place = Place::Parked { _permit: permit };
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
        match self.place {
            Place::Queue(ticket, _) | Place::Slot(ticket) => self.uploads.leave(ticket),
            Place::Parked { .. } => self.unpark(),
        }
    }
}
