//! A part of the agent: a handle for the other parts, and the tasks that make the part work.

use std::future::Future;
use std::pin::Pin;

use tokio_util::sync::CancellationToken;

/// A part that is built and does not run yet.
pub(super) struct Part<Handle> {
    /// Values and channels that other parts use.
    pub(super) handle: Handle,
    /// Tasks, in the order of their start.
    pub(super) tasks: Tasks,
}

type Run = Pin<Box<dyn Future<Output = ()> + Send>>;
type Start = Box<dyn FnOnce(CancellationToken) -> Run + Send>;

/// Tasks with their names, in the order of their start.
#[derive(Default)]
pub(super) struct Tasks(Vec<(&'static str, Start)>);

impl Tasks {
    /// Adds a task that runs until its token is cancelled.
    pub(super) fn add<F>(&mut self, name: &'static str, task: impl FnOnce(CancellationToken) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.0.push((name, Box::new(|stop| Box::pin(task(stop)))));
    }

    /// Starts every task by `spawn`.
    pub(super) fn start(self, mut spawn: impl FnMut(&'static str, Start)) {
        self.0.into_iter().for_each(|(name, task)| spawn(name, task));
    }
}
