//! Lifetimes of tasks: every task has a name and an owner. The first task to end ends all tasks. At
//! the end, tasks stop in the reverse order of their start, within one grace period, and the
//! remaining tasks are aborted.

use std::future::Future;
use std::time::Duration;

use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Owner of the tasks of one agent.
#[derive(Default)]
pub struct Supervisor {
    tasks: JoinSet<()>,
    /// Running tasks, in the order of their start.
    running: Vec<RunningTask>,
}

struct RunningTask {
    id: Id,
    name: &'static str,
    stop: CancellationToken,
}

/// A task that ended without a request to stop.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("task {task} {how}")]
pub struct TaskEnded {
    /// The task's name.
    pub task: &'static str,
    /// `returned early`, or the text of the panic.
    pub how: String,
}

impl Supervisor {
    /// Starts a task, which must return when its token is canceled and not before.
    pub fn spawn<F>(&mut self, name: &'static str, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let id = self.tasks.spawn(task(stop.clone())).id();
        self.running.push(RunningTask { id, name, stop });
    }

    /// Runs until `shutdown` resolves or a task ends. Then stops the tasks one by one, the last
    /// started first.
    ///
    /// # Errors
    /// [`TaskEnded`] when a task ended by itself.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>, grace: Duration) -> Result<(), TaskEnded> {
        let result = tokio::select! {
            () = shutdown => Ok(()),
            ended = self.next_ended() => Err(ended),
        };
        if let Err(ended) = &result {
            tracing::error!(task = ended.task, how = ended.how, "a task ended, so the agent stops");
        }
        self.stop(grace).await;
        result
    }

    async fn next_ended(&mut self) -> TaskEnded {
        match self.tasks.join_next_with_id().await {
            Some(joined) => self.ended(joined),
            None => std::future::pending().await,
        }
    }

    fn ended(&mut self, joined: Result<(Id, ()), JoinError>) -> TaskEnded {
        let (id, how) = match joined {
            Ok((id, ())) => (id, "returned early".to_owned()),
            Err(error) => (error.id(), error.to_string()),
        };
        let position = self.running.iter().position(|running| running.id == id);
        let task = position.map_or("unknown", |position| self.running.remove(position).name);
        TaskEnded { task, how }
    }

    async fn stop(mut self, grace: Duration) {
        let deadline = Instant::now() + grace;
        while let Some(RunningTask { id, name, stop }) = self.running.pop() {
            stop.cancel();
            let began = Instant::now();
            if tokio::time::timeout_at(deadline, self.join(id)).await.is_err() {
                let left: Vec<_> = self.running.iter().map(|running| running.name).collect();
                tracing::warn!(task = name, ?left, "the grace period is over; the remaining tasks are aborted");
                self.tasks.shutdown().await;
                return;
            }
            tracing::debug!(task = name, took = ?began.elapsed(), "stopped");
        }
    }

    /// Waits for one task. Other tasks that end meanwhile are removed from `running`.
    async fn join(&mut self, wanted: Id) {
        while let Some(joined) = self.tasks.join_next_with_id().await {
            let id = match joined {
                Ok((id, ())) => id,
                Err(error) => {
                    tracing::error!(%error, "a task failed while stopping");
                    error.id()
                }
            };
            self.running.retain(|running| running.id != id);
            if id == wanted {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tasks_stop_in_the_reverse_order_of_their_start() {
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut supervisor = Supervisor::default();
        for name in ["first", "second", "third"] {
            let order = Arc::clone(&order);
            supervisor.spawn(name, |stop| async move {
                stop.cancelled().await;
                tokio::time::sleep(Duration::from_millis(10)).await;
                order.lock().push(name);
            });
        }
        assert_eq!(supervisor.run(async {}, Duration::from_secs(1)).await, Ok(()));
        assert_eq!(*order.lock(), ["third", "second", "first"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_task_to_end_stops_all_tasks_and_is_named() {
        let mut supervisor = Supervisor::default();
        supervisor.spawn("steady", |stop| async move { stop.cancelled().await });
        supervisor.spawn("hasty", |_| async {});
        let ended = supervisor.run(std::future::pending(), Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(ended.task, "hasty");
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_counts_as_an_ended_task() {
        let mut supervisor = Supervisor::default();
        supervisor.spawn("clumsy", |_| async { panic!("oops") });
        let ended = supervisor.run(std::future::pending(), Duration::from_secs(1)).await.unwrap_err();
        assert!(ended.task == "clumsy" && ended.how.contains("oops"), "{ended}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_stop_is_aborted_after_the_grace_period() {
        let mut supervisor = Supervisor::default();
        supervisor.spawn("deaf", |_| std::future::pending());
        let began = Instant::now();
        assert_eq!(supervisor.run(async {}, Duration::from_secs(5)).await, Ok(()));
        assert_eq!(began.elapsed(), Duration::from_secs(5));
    }
}
