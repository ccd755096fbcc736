//! Fetches the hash chain of a blob.

use tokio::time::timeout;

use super::BlobRequest;
use crate::oci::{HashChain, HashState, PieceLayout};
use crate::ports::{FetchError, StateSink};
use crate::transfer::Shared;
use crate::transfer::tuning::STATE_BYTES;
use crate::wire::Request;

/// Bytes of a blob whose states a peer has to send within [`Timeouts::stall`]; at least one state.
/// A peer that hashes slower than 1.6 MB/s is not worth the wait: a peer with the chain sends
/// pieces sooner.
const MIN_HASHED_PER_STALL: u64 = 16 << 20;

impl Shared {
    /// The states arrive as the peer computes them, which takes the time to read and hash the blob.
    /// The wait ends when no more states arrive.
    pub(super) async fn fetch_hash_chain(
        &self,
        wanted: BlobRequest,
        layout: PieceLayout,
        on_states: StateSink<'_>,
    ) -> Result<HashChain, FetchError> {
        let request = Request::HashChain(wanted.digest);
        let (answer, mut recv, _connection) = self.request(wanted.peer, wanted.digest, &request).await?;
        wanted.check_answer(&answer)?;
        let stall = self.timeouts.stall;
        let on_timeout = |_| wanted.stalled(stall.as_secs());
        let expected = layout.piece_count() - 1;
        let states_per_read = layout.pieces_within(0..MIN_HASHED_PER_STALL).len().max(1);
        let mut states = Vec::with_capacity(expected);
        while states.len() < expected {
            let mut bytes = vec![0; STATE_BYTES * states_per_read.min(expected - states.len())];
            let read = timeout(stall, recv.read_exact(&mut bytes)).await.map_err(on_timeout)?;
            read.map_err(|error| wanted.too_short(error))?;
            let known = states.len();
            states.extend(bytes.as_chunks::<STATE_BYTES>().0.iter().map(|state| HashState::from_bytes(*state)));
            on_states(&states[known..]);
        }
        let after = timeout(stall, recv.read_chunk(1, true)).await.map_err(on_timeout)?;
        match after.map_err(|error| wanted.read_failed(&error))? {
            None => HashChain::unverified(wanted.digest, layout, states)
                .map_err(|error| wanted.protocol_error(error.to_string())),
            Some(_) => Err(wanted.protocol_error(format!("sends more than {expected} states"))),
        }
    }
}
