//! A running watch of one agent, for tests that need events of pods.

use std::sync::Arc;

use lighterman::cluster::KubeCluster;
use lighterman::model::{PodEvent, PodView};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Drop ends the watch.
pub(super) struct PodWatch {
    events: mpsc::Receiver<PodEvent>,
    stop: CancellationToken,
    task: JoinSet<()>,
}

impl PodWatch {
    pub(super) fn start(agent: impl Into<Arc<KubeCluster>>) -> Self {
        let (out, events) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let mut task = JoinSet::new();
        let (agent, stopped) = (agent.into(), stop.clone());
        task.spawn(async move { agent.watch_pods(out, stopped).await });
        Self { events, stop, task }
    }

    pub(super) async fn next(&mut self) -> PodEvent {
        self.events.recv().await.expect("the watch is still running")
    }

    pub(super) async fn wait_event(&mut self, wanted: impl Fn(&PodEvent) -> bool) -> PodEvent {
        loop {
            let event = self.next().await;
            if wanted(&event) {
                return event;
            }
        }
    }

    /// Waits for the next pod that matches.
    pub(super) async fn wait_pod(&mut self, wanted: impl Fn(&PodView) -> bool) -> PodView {
        loop {
            if let PodEvent::Applied(view) = self.next().await
                && wanted(&view)
            {
                return *view;
            }
        }
    }

    /// Ends the watch as the agent would.
    pub(super) async fn stop(mut self) {
        self.stop.cancel();
        self.task.join_next().await.unwrap().unwrap();
    }
}
