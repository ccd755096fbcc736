//! Verification of a peer's credential: a ServiceAccount token or a certificate. Pure: keys,
//! authorities and `now` are arguments.
//!
//! The feature `credentials` builds this module without the rest of the agent, for the fuzz
//! targets: a credential is the first input that an agent reads from an unauthenticated peer. Not
//! here: the sources of keys and authorities (the adapters), and the key that the handshake proved
//! ([`crate::identity`]).

pub mod certificate;
pub mod token;
