//! General tools without words of this project. Each tool exists once.

pub mod backoff;
pub mod clock;
pub mod token_bucket;
