//! The API server for tests: apply and delete objects, and watch pods and Events.
//!
//! A single watch serves all tests: repeated requests for dozens of pods would take processor time
//! from the agents under test.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{GroupVersionKind, TypeMeta};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Config};
use parking_lot::{Condvar, Mutex, MutexGuard};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::test_bed::TestError;

/// A connection to the API server, and the watched pods and Events.
pub(crate) struct Cluster {
    runtime: Runtime,
    client: Client,
    cache: Arc<WatchCache>,
}

/// The watched objects, by kind, Kubernetes namespace and name.
#[derive(Default)]
struct WatchCache {
    objects: Mutex<Objects>,
    changed: Condvar,
}

/// The pods and Events at this moment.
#[derive(Default)]
pub(crate) struct Objects {
    pods: BTreeMap<(String, String), Value>,
    events: BTreeMap<(String, String), Value>,
}

impl Objects {
    /// The pods with this label, in the order of their names.
    pub(crate) fn labeled(&self, key: &str, value: &str) -> Vec<&Value> {
        self.pods.values().filter(|pod| pod["metadata"]["labels"][key] == value).collect()
    }

    pub(crate) fn pod(&self, k8s_namespace: &str, name: &str) -> Option<&Value> {
        self.pods.get(&(k8s_namespace.to_owned(), name.to_owned()))
    }

    /// The Events on the pod of this name.
    pub(crate) fn all_events(&self, k8s_namespace: &str, pod: &str) -> Vec<&Value> {
        let about = |event: &&Value| event["involvedObject"]["name"] == pod;
        let of_namespace = self.events.iter().filter(|((namespace, _), _)| namespace == k8s_namespace);
        of_namespace.map(|(_, event)| event).filter(about).collect()
    }

    /// The Events with this reason on the pod of this name.
    pub(crate) fn events(&self, k8s_namespace: &str, pod: &str, reason: &str) -> Vec<&Value> {
        self.all_events(k8s_namespace, pod).into_iter().filter(|event| event["reason"] == reason).collect()
    }

    /// The Events of this component on the pod of this name.
    pub(crate) fn events_of(&self, component: &str, k8s_namespace: &str, pod: &str) -> Vec<&Value> {
        let written = |event: &&Value| event["source"]["component"] == component;
        self.all_events(k8s_namespace, pod).into_iter().filter(written).collect()
    }
}

impl Cluster {
    /// Connects by the kubeconfig, and starts the watches.
    pub(crate) fn connect(kubeconfig: &Path) -> Result<Self, TestError> {
        // rustls is built with two cryptography providers here and needs a default. A second call
        // has no effect.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let runtime = Runtime::new().map_err(|error| error.to_string())?;
        let client = runtime.block_on(async {
            let file = Kubeconfig::read_from(kubeconfig).map_err(|error| error.to_string())?;
            let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
            config
                .map_err(|error| error.to_string())
                .and_then(|c| Client::try_from(c).map_err(|error| error.to_string()))
        })?;
        let cache = Arc::<WatchCache>::default();
        for kind in ["Pod", "Event"] {
            runtime.spawn(watch_objects(client.clone(), kind, cache.clone()));
        }
        Ok(Self { runtime, client, cache })
    }

    /// Calls `look` after every change until the result is `Some`. The error names `what`.
    pub(crate) fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut find: impl FnMut(&Objects) -> Option<T>,
    ) -> Result<T, TestError> {
        let deadline = Instant::now() + limit;
        let mut objects = self.cache.lock();
        loop {
            if let Some(found) = find(&objects) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("waited {} s for {what}", limit.as_secs()));
            }
            self.cache.changed.wait_for(&mut objects, left);
        }
    }

    /// Calls `look` with the objects that the watches have shown so far.
    pub(crate) fn now<T>(&self, read: impl FnOnce(&Objects) -> T) -> T {
        read(&self.cache.lock())
    }

    /// Creates or changes an object by server-side apply.
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

    /// Patches a subresource of a pod, such as `ephemeralcontainers`.
    pub(crate) fn patch_part(&self, pod: &Value, part: &str, patch: &Value) -> Result<(), TestError> {
        let name = pod["metadata"]["name"].as_str().ok_or("a pod without a name")?;
        let api = self.api(pod)?;
        let (parameters, patch) = (PatchParams::default(), Patch::Strategic(patch));
        self.runtime
            .block_on(api.patch_subresource(part, name, &parameters, &patch))
            .map(drop)
            .map_err(|error| format!("{name}: {error}"))
    }

    /// Merges annotations into those of an object.
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

    /// Deletes an object without a grace period. An object that does not exist is no error.
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
        // A panic of another test under the lock leaves complete objects behind.
        self.objects.lock()
    }
}

/// Keeps the objects of one kind up to date. An object that is deleted during an interruption of
/// the watch stays. No test here waits for a deletion.
async fn watch_objects(client: Client, kind: &str, cache: Arc<WatchCache>) {
    let api = Api::<DynamicObject>::all_with(client, &ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", kind)));
    let mut changes = pin!(watcher(api, watcher::Config::default()).default_backoff());
    while let Some(change) = changes.next().await {
        let (object, is_present) = match change {
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => (object, true),
            Ok(watcher::Event::Delete(object)) => (object, false),
            Ok(watcher::Event::Init | watcher::Event::InitDone) | Err(_) => continue,
        };
        let key =
            (object.metadata.namespace.clone().unwrap_or_default(), object.metadata.name.clone().unwrap_or_default());
        let Ok(mut value) = serde_json::to_value(&object) else { continue };
        // The items of a list lack `apiVersion` and `kind`.
        value["apiVersion"] = "v1".into();
        value["kind"] = kind.into();
        let mut objects = cache.lock();
        let objects_of_kind = if kind == "Pod" { &mut objects.pods } else { &mut objects.events };
        if is_present {
            objects_of_kind.insert(key, value)
        } else {
            objects_of_kind.remove(&key)
        };
        cache.changed.notify_all();
    }
}
