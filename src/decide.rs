//! Decisions: values in, values out. No async, no clock, no I/O; `now` is an argument, so tests are exact and simulations
//! drive this same code.

pub mod bucket;
pub mod cause;
pub mod claim;
pub mod clock_skew;
pub mod connection_limit;
pub mod disk;
pub mod fill;
pub mod gossip;
pub mod inventory;
pub mod layer_notice;
pub mod ledger;
pub mod lookup;
pub mod opt_in;
pub mod outage;
pub mod pieces;
pub mod pin_term;
pub mod plan;
pub mod pod_keys;
pub mod pull_failure;
pub mod queue;
pub mod repositories;
pub mod reserve;
pub mod retain;
pub mod review_budget;
pub mod rules;
pub mod selector;
pub mod shared_key;
pub mod slots;
pub mod subnet;
pub mod tag;
pub mod trust;
pub mod udp_path;
pub mod unpacking;
pub mod way;
pub mod wholeness;
