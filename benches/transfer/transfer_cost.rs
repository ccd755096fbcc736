//! The cost of one transfer: time, and processor time of both sides.

use std::time::{Duration, Instant};

use nix::sys::resource::UsageWho;

use crate::cpu;
use crate::report::BenchError;

/// Cost of a single transfer of the blob.
pub(crate) struct TransferCost {
    pub(crate) seconds: f64,
    /// Processor time of both sides, and of the receiver.
    pub(crate) both: Duration,
    pub(crate) receiver: Duration,
}

impl TransferCost {
    /// Runs `work` on this thread, which is the receiver's only thread.
    pub(crate) fn of(work: impl FnOnce() -> Result<(), BenchError>) -> Result<Self, BenchError> {
        let before = (cpu::spent(UsageWho::RUSAGE_SELF)?, cpu::spent(UsageWho::RUSAGE_THREAD)?);
        let began = Instant::now();
        work()?;
        let seconds = began.elapsed().as_secs_f64();
        let both = cpu::spent(UsageWho::RUSAGE_SELF)? - before.0;
        let receiver = cpu::spent(UsageWho::RUSAGE_THREAD)? - before.1;
        Ok(Self { seconds, both, receiver })
    }
}
