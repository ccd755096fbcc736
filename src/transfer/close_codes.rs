//! Close codes of connections and streams. The numbers are part of the protocol: the other end acts
//! on them.

use quinn::{Connection, VarInt};

use super::congestion::lift_window;

/// Closes a connection. The reason reaches the peer even when the congestion window is full.
pub(super) fn close(connection: &Connection, code: VarInt, reason: &[u8]) {
    lift_window(connection);
    connection.close(code, reason);
}

/// No fault: the connection is not used any more, or the agent stops.
pub(super) const DONE: VarInt = VarInt::from_u32(0);
/// The reason with [`DONE`] when the agent stops.
pub(super) const AGENT_STOPS: &[u8] = b"the agent stops";
/// The peer is not admitted; the close carries the reason as text.
pub(super) const REJECTED: VarInt = VarInt::from_u32(1);
/// The peer violated the protocol.
pub(super) const PROTOCOL: VarInt = VarInt::from_u32(2);
/// The peer has newer connections.
pub(super) const SUPERSEDED: VarInt = VarInt::from_u32(3);
/// The ends have no common MAJOR of the transfer protocol; the close carries this agent's versions
/// as text.
pub(super) const OTHER_VERSION: VarInt = VarInt::from_u32(4);

/// On a stream: our content store failed.
pub(super) const STORE_FAILED: VarInt = VarInt::from_u32(16);
/// On a stream: the blob was removed from the store during the upload.
pub(super) const BLOB_REMOVED: VarInt = VarInt::from_u32(17);
/// On a stream: the reader does not read, or reads too slowly.
pub(super) const TOO_SLOW: VarInt = VarInt::from_u32(18);
/// On a stream: the request is malformed, or data follows the request.
pub(super) const MALFORMED: VarInt = VarInt::from_u32(19);
/// On a stream: the request needs equal MAJORs, and the connection speaks the previous MAJOR.
pub(super) const OTHER_MAJOR: VarInt = VarInt::from_u32(20);
