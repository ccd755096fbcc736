//! Tests that need only the build: rules about the source, and the binary as a user runs it.

mod code_lines;
mod command_line;
mod control_socket;
mod cycles;
mod floors;
mod metrics_page;
mod prose;
