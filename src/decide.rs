//! Decisions: values in, values out. No async, no clock, no I/O; `now` is an argument, so tests are exact and simulations
//! drive this same code.

pub mod claim;
pub mod inventory;
pub mod ledger;
pub mod plan;
pub mod pull_failure;
pub mod queue;
