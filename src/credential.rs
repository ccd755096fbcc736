//! What a peer shows to be let in, read and judged. Pure: keys, authorities and `now` are arguments.
//!
//! Built without the rest of the agent as well, because it is what strangers reach first: the fuzz targets need no more (feature
//! `door`). Not here: where keys and authorities come from (the adapters), and whose key the handshake proved
//! ([`crate::identity`]).

pub mod certificate;
pub mod token;
