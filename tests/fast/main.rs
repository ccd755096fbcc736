//! Tests that need nothing but the build: the rules of the source, and the binary as a user types it.

mod command_line;
mod control_socket;
mod floors;
