//! The simulated part: a kubelet with one pod. The kubelet looks for the image, tries to pull the
//! image, reports the failure, and looks again after a nudge, as a real kubelet does.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::{broadcast, mpsc};

use super::{DemoError, missing_blob};
use crate::model::{ContainerKind, ContainerView, PodEvent, PodRef, PodView, PullPolicy, WaitingState};
use crate::oci::Reference;
use crate::ports::ContentStore;

pub(super) struct Kubelet {
    store: Arc<dyn ContentStore>,
    nudges: broadcast::Receiver<PodRef>,
    watch: mpsc::Sender<PodEvent>,
    pod: PodRef,
    image: Reference,
}

impl Kubelet {
    pub(super) fn new(
        store: Arc<dyn ContentStore>,
        nudges: broadcast::Receiver<PodRef>,
        watch: mpsc::Sender<PodEvent>,
        image: Reference,
    ) -> Self {
        let pod = PodRef { k8s_namespace: "shop".into(), name: "checkout-7d4".into(), uid: "demo".into() };
        Self { store, nudges, watch, pod, image }
    }

    /// Connects to the registry's port, which has no listener, and returns the failure in the form
    /// of a kubelet's message.
    pub(super) async fn try_to_pull(&self, registry: SocketAddr) -> Result<String, DemoError> {
        match TcpStream::connect(registry).await {
            Ok(_) => Err(format!("another process listens at {registry}, the port of the demo's registry").into()),
            Err(error) => {
                let image = &self.image;
                let cause = if error.kind() == std::io::ErrorKind::ConnectionRefused {
                    "connect: connection refused".to_owned()
                } else {
                    error.to_string()
                };
                Ok(format!("failed to pull and unpack image {image}: dial tcp {registry}: {cause}"))
            }
        }
    }

    /// Sends the pod with this failure to the agent's watch, as the API server does.
    pub(super) async fn report_failure(&self, message: &str) -> Result<(), DemoError> {
        let waiting = WaitingState { reason: "ErrImagePull".into(), message: message.into() };
        self.send_pod(Some(waiting)).await
    }

    /// Waits for nudges; starts the pod when the store has a record of the image's exact name.
    pub(super) async fn run_until_started(&mut self) -> Result<(), DemoError> {
        loop {
            let nudged = self.nudges.recv().await?;
            if nudged == self.pod && self.has_image().await? {
                return self.send_pod(None).await;
            }
        }
    }

    async fn has_image(&self) -> Result<bool, DemoError> {
        let name = self.image.to_string();
        let Some(record) = self.store.images().await?.into_iter().find(|record| record.name == name) else {
            return Ok(false);
        };
        let target = record.target.digest;
        self.store.blob(target).await?.map(|_| true).ok_or_else(|| missing_blob(target))
    }

    async fn send_pod(&self, waiting: Option<WaitingState>) -> Result<(), DemoError> {
        let container = ContainerView {
            name: "checkout".into(),
            kind: ContainerKind::Ordinary,
            image: self.image.to_string(),
            pull_policy: PullPolicy::IfNotPresent,
            waiting,
        };
        let annotations = [("lighterman.dev/recover".to_owned(), "true".to_owned())].into();
        let view = PodView {
            pod: self.pod.clone(),
            annotations,
            containers: vec![container],
            image_volumes: Vec::new(),
            owner: None,
            is_static: false,
            priority: 0,
            pull_secrets: Vec::new(),
            is_ending: false,
        };
        Ok(self.watch.send(PodEvent::Applied(Box::new(view))).await?)
    }
}
