//! The images that pods of opted-in namespaces name. Pod events pass through this task to the pod
//! controller.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::decide::fill::SecretName;
use crate::decide::policy::Policy;
use crate::model::{NamespaceView, PodEvent, PodRef, PodView};
use crate::oci::Reference;
use crate::ports::{ClusterError, PodReader};

/// A namespace's opt-in is read again for a new pod after this time.
const REFRESH_WITH_NEW_POD: Duration = Duration::from_secs(60);

/// The interval without a new pod: 10 namespaces on each of 5000 nodes make 83 requests per second.
const REFRESH_PERIOD: Duration = Duration::from_secs(600);

/// Interval of checks for due reads, and retry delay after a failed read.
const TICK_PERIOD: Duration = Duration::from_secs(10);

/// Concurrent requests to the API server.
const MAX_REQUESTS: usize = 4;

/// Images that pods of this node name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UsedImages {
    /// By pods of namespaces that opted in.
    pub opted_in: BTreeSet<Reference>,
    /// By pods of namespaces whose opt-in was not read yet.
    pub undecided: BTreeSet<Reference>,
    /// Pull secrets of the pods that name an image, of any namespace.
    pub pull_secrets: BTreeMap<Reference, BTreeSet<SecretName>>,
}

/// Follows the pods of this node.
pub struct PodImages {
    cluster: Arc<dyn PodReader>,
    policy: watch::Receiver<Arc<Policy>>,
    used: watch::Sender<Arc<UsedImages>>,
    /// The images of the agent's own DaemonSet, which count as images of an opted-in namespace.
    own_images: watch::Receiver<Arc<BTreeSet<Reference>>>,
    /// The images of each pod that has not ended.
    pods: BTreeMap<PodRef, PodReferences>,
    namespaces: BTreeMap<String, Namespace>,
    requests: JoinSet<(String, Result<Arc<NamespaceView>, ClusterError>)>,
}

/// Images and pull secrets of a pod.
struct PodReferences {
    images: BTreeSet<Reference>,
    pull_secrets: Vec<String>,
}

#[derive(Default)]
struct Namespace {
    view: Option<Arc<NamespaceView>>,
    /// Time of the last request.
    requested_at: Option<Instant>,
    is_in_flight: bool,
    /// A pod arrived since that request.
    is_due: bool,
}

impl PodImages {
    /// Builds the task. `used` receives the images.
    pub fn new(
        cluster: Arc<dyn PodReader>,
        policy: watch::Receiver<Arc<Policy>>,
        used: watch::Sender<Arc<UsedImages>>,
    ) -> Self {
        let (own, namespaces) = (watch::channel(Arc::default()).1, BTreeMap::new());
        Self { cluster, policy, used, own_images: own, pods: BTreeMap::new(), namespaces, requests: JoinSet::new() }
    }

    /// Counts the images of the agent's own DaemonSet as well.
    #[must_use]
    pub fn with_own_images(self, own: watch::Receiver<Arc<BTreeSet<Reference>>>) -> Self {
        Self { own_images: own, ..self }
    }

    /// Passes events on until stopped.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<PodEvent>,
        forward: mpsc::Sender<PodEvent>,
        stop: CancellationToken,
    ) {
        let mut tick = interval(TICK_PERIOD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                event = events.recv() => {
                    // The watch ends only when the agent does.
                    let Some(event) = event else { return stop.cancelled().await };
                    self.on_pod_event(&event);
                    let sent = stop.run_until_cancelled(forward.send(event)).await;
                    if sent.is_none_or(|sent| sent.is_err()) {
                        return stop.cancelled().await;
                    }
                }
                Some(answered) = self.requests.join_next() => self.on_answer(answered),
                Ok(()) = self.policy.changed() => {}
                Ok(()) = self.own_images.changed() => {}
                _ = tick.tick() => {}
            }
            self.request_namespaces();
            self.publish();
        }
    }

    fn on_pod_event(&mut self, event: &PodEvent) {
        match event {
            PodEvent::Applied(pod) if pod.is_ending => drop(self.pods.remove(&pod.pod)),
            PodEvent::Applied(pod) => {
                let references = PodReferences { images: images(pod), pull_secrets: pod.pull_secrets.clone() };
                if self.pods.insert(pod.pod.clone(), references).is_none() {
                    self.namespaces.entry(pod.pod.k8s_namespace.clone()).or_default().is_due = true;
                }
            }
            PodEvent::Deleted(pod) => drop(self.pods.remove(pod)),
            PodEvent::Synced(pods) => {
                let existing: BTreeSet<_> = pods.iter().collect();
                self.pods.retain(|pod, _| existing.contains(pod));
            }
        }
        let used_namespaces: BTreeSet<_> = self.pods.keys().map(|pod| &pod.k8s_namespace).collect();
        self.namespaces.retain(|name, _| used_namespaces.contains(name));
    }

    fn request_namespaces(&mut self) {
        for (name, namespace) in &mut self.namespaces {
            let limit = match (namespace.is_due, &namespace.view) {
                (_, None) => TICK_PERIOD,
                (true, Some(_)) => REFRESH_WITH_NEW_POD,
                (false, Some(_)) => REFRESH_PERIOD,
            };
            let is_due = namespace.requested_at.is_none_or(|at| at.elapsed() >= limit);
            if namespace.is_in_flight || !is_due || self.requests.len() >= MAX_REQUESTS {
                continue;
            }
            (namespace.is_in_flight, namespace.is_due, namespace.requested_at) = (true, false, Some(Instant::now()));
            let (name, cluster) = (name.clone(), Arc::clone(&self.cluster));
            self.requests.spawn(async move {
                let answer = cluster.namespace(&name).await;
                (name, answer)
            });
        }
    }

    /// A failed read keeps the earlier result.
    fn on_answer(
        &mut self,
        answered: Result<(String, Result<Arc<NamespaceView>, ClusterError>), tokio::task::JoinError>,
    ) {
        let (name, answer) = answered.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        let Some(namespace) = self.namespaces.get_mut(&name) else { return };
        namespace.is_in_flight = false;
        match answer {
            Ok(view) => namespace.view = Some(view),
            Err(error) => tracing::debug!(namespace = name, %error, "cannot read the opt-in of a namespace"),
        }
    }

    fn publish(&self) {
        let policy = self.policy.borrow();
        let mut used = UsedImages { opted_in: (**self.own_images.borrow()).clone(), ..UsedImages::default() };
        for (PodRef { k8s_namespace: name, .. }, PodReferences { images, pull_secrets }) in &self.pods {
            for image in images.iter().filter(|_| !pull_secrets.is_empty()) {
                let secrets = pull_secrets.iter().map(|secret| (name.clone(), secret.clone()));
                used.pull_secrets.entry(image.clone()).or_default().extend(secrets);
            }
            match self.namespaces.get(name).and_then(|namespace| namespace.view.as_ref()) {
                None => used.undecided.extend(images.iter().cloned()),
                Some(view) if policy.opt_in.is_namespace_opted_in(name, &view.labels, &view.annotations) => {
                    used.opted_in.extend(images.iter().cloned());
                }
                Some(_) => {}
            }
        }
        self.used.send_if_modified(|before| {
            let changed = **before != used;
            if changed {
                *before = Arc::new(used);
            }
            changed
        });
    }
}

fn images(pod: &PodView) -> BTreeSet<Reference> {
    let containers = pod.containers.iter().map(|container| &container.image);
    let volumes = pod.image_volumes.iter().map(|volume| &volume.image);
    containers.chain(volumes).filter_map(|image| image.parse().ok()).collect()
}
