//! The API server as tests use it: objects applied and taken away, and what is watched of pods and Events.
//!
//! One watch serves every test: with dozens of pods at once, asking again and again would take the machine from those who are tested.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{GroupVersionKind, TypeMeta};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::test_bed::TestError;

/// A connection to the API server, and what is known of its pods and Events.
pub(crate) struct Cluster {
    runtime: Runtime,
    client: Client,
    seen: Arc<WatchCache>,
}

/// What the watches have shown, by kind, Kubernetes namespace and name.
#[derive(Default)]
struct WatchCache {
    objects: Mutex<Objects>,
    changed: Condvar,
}

/// The pods and Events of this moment.
#[derive(Default)]
pub(crate) struct Objects {
    pods: BTreeMap<(String, String), Value>,
    events: BTreeMap<(String, String), Value>,
}

impl Objects {
    /// The pods that carry this label, in the order of their names.
    pub(crate) fn labelled(&self, key: &str, value: &str) -> Vec<&Value> {
        self.pods.values().filter(|pod| pod["metadata"]["labels"][key] == value).collect()
    }

    /// One pod.
    pub(crate) fn pod(&self, k8s_namespace: &str, name: &str) -> Option<&Value> {
        self.pods.get(&(k8s_namespace.to_owned(), name.to_owned()))
    }

    /// The Events on a pod of this name.
    pub(crate) fn all_events(&self, k8s_namespace: &str, pod: &str) -> Vec<&Value> {
        let about = |event: &&Value| event["involvedObject"]["name"] == pod;
        let of_namespace = self.events.iter().filter(|((namespace, _), _)| namespace == k8s_namespace);
        of_namespace.map(|(_, event)| event).filter(about).collect()
    }

    /// Those with this reason.
    pub(crate) fn events(&self, k8s_namespace: &str, pod: &str, reason: &str) -> Vec<&Value> {
        self.all_events(k8s_namespace, pod).into_iter().filter(|event| event["reason"] == reason).collect()
    }

    /// Those that this component wrote.
    pub(crate) fn events_of(&self, component: &str, k8s_namespace: &str, pod: &str) -> Vec<&Value> {
        let written = |event: &&Value| event["source"]["component"] == component;
        self.all_events(k8s_namespace, pod).into_iter().filter(written).collect()
    }
}

impl Cluster {
    /// Connects as the kubeconfig says, and begins to watch.
    pub(crate) fn connect(kubeconfig: &Path) -> Result<Self, TestError> {
        // The library that is tested decides which provider there is; a second call changes nothing.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let runtime = Runtime::new().map_err(|error| error.to_string())?;
        let client = runtime.block_on(async {
            let file = Kubeconfig::read_from(kubeconfig).map_err(|error| error.to_string())?;
            let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
            config
                .map_err(|error| error.to_string())
                .and_then(|c| Client::try_from(c).map_err(|error| error.to_string()))
        })?;
        let seen = Arc::<WatchCache>::default();
        for kind in ["Pod", "Event"] {
            runtime.spawn(watch_objects(client.clone(), kind, seen.clone()));
        }
        Ok(Self { runtime, client, seen })
    }

    /// Looks whenever something has changed until something is there; says what was waited for when it does not come.
    pub(crate) fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&Objects) -> Option<T>,
    ) -> Result<T, TestError> {
        let deadline = Instant::now() + limit;
        let mut objects = self.seen.lock();
        loop {
            if let Some(found) = look(&objects) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("waited {} s for {what}", limit.as_secs()));
            }
            let waited = self.seen.changed.wait_timeout(objects, left);
            objects = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Reads what has been seen so far.
    pub(crate) fn now<T>(&self, look: impl FnOnce(&Objects) -> T) -> T {
        look(&self.seen.lock())
    }

    /// Makes an object, or makes it so.
    pub(crate) fn apply(&self, object: &Value) -> Result<(), TestError> {
        let name = object["metadata"]["name"].as_str().ok_or("an object without a name")?;
        let patch = Patch::Apply(object);
        let parameters = PatchParams::apply("e2e").force();
        let api = self.api(object)?;
        self.runtime
            .block_on(api.patch(name, &parameters, &patch))
            .map(drop)
            .map_err(|error| format!("{name}: {error}"))
    }

    /// Changes a part of a pod that has an address of its own, such as `ephemeralcontainers`.
    pub(crate) fn patch_part(&self, pod: &Value, part: &str, patch: &Value) -> Result<(), TestError> {
        let name = pod["metadata"]["name"].as_str().ok_or("a pod without a name")?;
        let api = self.api(pod)?;
        let (parameters, patch) = (PatchParams::default(), Patch::Strategic(patch));
        self.runtime
            .block_on(api.patch_subresource(part, name, &parameters, &patch))
            .map(drop)
            .map_err(|error| format!("{name}: {error}"))
    }

    /// Changes annotations of an object.
    pub(crate) fn annotate(&self, object: &Value, annotations: &Value) -> Result<(), TestError> {
        let name = object["metadata"]["name"].as_str().ok_or("an object without a name")?;
        let (parameters, patch) =
            (PatchParams::default(), Patch::Merge(json!({"metadata": {"annotations": annotations}})));
        let api = self.api(object)?;
        self.runtime
            .block_on(api.patch(name, &parameters, &patch))
            .map(drop)
            .map_err(|error| format!("{name}: {error}"))
    }

    /// Takes an object away without waiting for what it would like to do first; one that is gone is gone.
    pub(crate) fn delete(&self, object: &Value) -> Result<(), TestError> {
        let name = object["metadata"]["name"].as_str().ok_or("an object without a name")?;
        let api = self.api(object)?;
        match self.runtime.block_on(api.delete(name, &DeleteParams::default().grace_period(0))) {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(format!("{name}: {error}")),
        }
    }

    fn api(&self, object: &Value) -> Result<Api<DynamicObject>, TestError> {
        let text = |field: &str| object[field].as_str().map(str::to_owned).ok_or(format!("an object without {field}"));
        let types = TypeMeta { api_version: text("apiVersion")?, kind: text("kind")? };
        let kind = GroupVersionKind::try_from(&types).map_err(|error| error.to_string())?;
        let resource = ApiResource::from_gvk(&kind);
        Ok(match object["metadata"]["namespace"].as_str() {
            Some(k8s_namespace) => Api::namespaced_with(self.client.clone(), k8s_namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        })
    }
}

impl WatchCache {
    fn lock(&self) -> MutexGuard<'_, Objects> {
        // A test that failed while it looked has changed nothing.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps one kind of object up to date. An object that went away while the watch was interrupted stays; nothing here waits for
/// an object to be gone.
async fn watch_objects(client: Client, kind: &str, seen: Arc<WatchCache>) {
    let api = Api::<DynamicObject>::all_with(client, &ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", kind)));
    let mut changes = pin!(watcher(api, watcher::Config::default()).default_backoff());
    while let Some(change) = changes.next().await {
        let (object, is_there) = match change {
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => (object, true),
            Ok(watcher::Event::Delete(object)) => (object, false),
            Ok(watcher::Event::Init | watcher::Event::InitDone) | Err(_) => continue,
        };
        let key =
            (object.metadata.namespace.clone().unwrap_or_default(), object.metadata.name.clone().unwrap_or_default());
        let Ok(mut value) = serde_json::to_value(&object) else { continue };
        // Lists leave out what their items are.
        value["apiVersion"] = "v1".into();
        value["kind"] = kind.into();
        let mut objects = seen.lock();
        let known = if kind == "Pod" { &mut objects.pods } else { &mut objects.events };
        if is_there {
            known.insert(key, value)
        } else {
            known.remove(&key)
        };
        seen.changed.notify_all();
    }
}
