//! A peer's list of states.

use tokio::time::timeout;

use super::Wanted;
use crate::oci::{Chain, Cut, State};
use crate::ports::{FetchError, Heard};
use crate::transfer::Shared;
use crate::transfer::tuning::STATE;
use crate::wire::Request;

/// The part of a blob, in bytes, for which a peer has to send the states within `Limits::stall`; at least one state. One that hashes slower
/// than 1.6 MB/s is not worth waiting for: the pieces come sooner from somebody who has the list.
const HASHED: u64 = 16 << 20;

impl Shared {
    /// The states come as they are made, which takes the time to read and hash the blob; the wait ends when they stop coming.
    pub(super) async fn list(&self, wanted: Wanted, cut: Cut, heard: Heard<'_>) -> Result<Chain, FetchError> {
        let request = Request::Chain(wanted.digest);
        let (answer, mut recv, _line) = self.ask(wanted.peer, wanted.digest, &request).await?;
        wanted.granted(&answer)?;
        let stall = self.limits.stall;
        let slow = |_| wanted.stalled(stall.as_secs());
        let expected = cut.pieces() - 1;
        let at_a_time = cut.within(0..HASHED).len().max(1);
        let mut states = Vec::with_capacity(expected);
        while states.len() < expected {
            let mut bytes = vec![0; STATE * at_a_time.min(expected - states.len())];
            let read = timeout(stall, recv.read_exact(&mut bytes)).await.map_err(slow)?;
            read.map_err(|error| wanted.too_short(error))?;
            let known = states.len();
            states.extend(bytes.as_chunks::<STATE>().0.iter().map(|state| State::from_bytes(*state)));
            heard(&states[known..]);
        }
        let after = timeout(stall, recv.read_chunk(1, true)).await.map_err(slow)?;
        match after.map_err(|error| wanted.cut_off(&error))? {
            None => Chain::claimed(wanted.digest, cut, states).map_err(|error| wanted.protocol(error.to_string())),
            Some(_) => Err(wanted.protocol(format!("sends more than {expected} states"))),
        }
    }
}
