//! Makes, watches and deletes pods of the test bed.

use std::time::Duration;

use serde_json::{Value, json};

use crate::test_bed::{TestBed, TestError, wait_for};

/// Deadline that suffices on a slow machine. No test measures this time.
pub(crate) const WAIT_DEADLINE: Duration = Duration::from_secs(120);

/// The namespace of one test. Deleted when dropped.
pub(crate) struct TestNamespace<'a> {
    pub(crate) bed: &'a TestBed,
    pub(crate) name: String,
}

impl<'a> TestNamespace<'a> {
    /// A namespace that allows recovery.
    pub(crate) fn new(bed: &'a TestBed, name: &str) -> Result<Self, TestError> {
        bed.apply(&json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "annotations": {"lighterman.dev/allow": "true"}}}))?;
        let space = Self { bed, name: name.to_owned() };
        Self::wait_usable(bed, name)?;
        Ok(space)
    }

    /// Waits for the ServiceAccount, which a controller makes. The API server refuses pods that
    /// come earlier.
    pub(crate) fn wait_usable(bed: &TestBed, name: &str) -> Result<(), TestError> {
        wait_for("the namespace's ServiceAccount", WAIT_DEADLINE, || {
            Ok(bed.kubectl(&["-n", name, "get", "serviceaccount", "default"]).ok().map(drop))
        })
    }

    /// Creates a pod of this image on this node.
    pub(crate) fn pod(&self, name: &str, node: &str, image: &str, opted_in: bool) -> Result<(), TestError> {
        let annotations = if opted_in { json!({"lighterman.dev/recover": "true"}) } else { json!({}) };
        self.bed.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": self.name, "annotations": annotations},
            "spec": pod_spec(image, Some(node)),
        }))
    }

    /// Creates an opted-in pod that mounts a ServiceAccount token, as most pods do.
    pub(crate) fn pod_with_token(&self, name: &str, node: &str, image: &str) -> Result<(), TestError> {
        let mut spec = pod_spec(image, Some(node));
        spec["automountServiceAccountToken"] = true.into();
        self.bed.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": self.name, "annotations": {"lighterman.dev/recover": "true"},
            },
            "spec": spec,
        }))
    }

    pub(crate) fn get_pod(&self, name: &str) -> Result<Value, TestError> {
        self.bed.get(&["-n", &self.name, "pod", name])
    }

    /// Waits until the pod runs without a restart. A pod whose sandbox dies looks healthy for a
    /// second.
    pub(crate) fn wait_running(&self, name: &str) -> Result<Value, TestError> {
        let running = wait_for(&format!("pod {name} to run"), WAIT_DEADLINE, || {
            let pod = self.get_pod(name)?;
            Ok(is_running(&pod).then_some(pod))
        });
        running.map_err(|error| format!("{error}\n{}", self.bed.diagnostics()))
    }

    /// Waits until the kubelet failed to pull, by any of the kubelet's reasons.
    pub(crate) fn wait_failing(&self, name: &str) -> Result<(), TestError> {
        wait_for(&format!("pod {name} to fail to pull"), WAIT_DEADLINE, || {
            let pod = self.get_pod(name)?;
            let reason = waiting_reason(&pod);
            // A fast recovery may have started the pod already.
            Ok((matches!(reason, "ErrImagePull" | "ImagePullBackOff") || is_running(&pod)).then_some(()))
        })
    }

    /// Waits for the Event that reports the recovery from peers. Returns the Event's note.
    pub(crate) fn wait_recovered(&self, pod: &str) -> Result<String, TestError> {
        wait_for(&format!("the Event on pod {pod}"), WAIT_DEADLINE, || {
            Ok(self.events(pod, "ImageRecovered")?.into_iter().next())
        })
    }

    /// The notes of the Events with this reason on a pod.
    pub(crate) fn events(&self, pod: &str, reason: &str) -> Result<Vec<String>, TestError> {
        let selector = format!("involvedObject.name={pod},reason={reason}");
        let events = self.bed.get(&["-n", &self.name, "events", "--field-selector", &selector])?;
        let items = events["items"].as_array().cloned().unwrap_or_default();
        Ok(items.iter().filter_map(|event| event["message"].as_str().map(str::to_owned)).collect())
    }
}

impl Drop for TestNamespace<'_> {
    fn drop(&mut self) {
        let _ = self.bed.kubectl(&["delete", "namespace", &self.name, "--wait=false"]);
        let _ = self.bed.kubectl(&["-n", &self.name, "delete", "pods", "--all", "--grace-period=0", "--force"]);
    }
}

/// A pod spec with one container and no grace period.
pub(crate) fn pod_spec(image: &str, node: Option<&str>) -> Value {
    let mut spec = json!({
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "c", "image": image, "imagePullPolicy": "IfNotPresent"}],
    });
    if let Some(node) = node {
        spec["nodeName"] = node.into();
    }
    spec
}

pub(crate) fn is_running(pod: &Value) -> bool {
    let status = &pod["status"]["containerStatuses"][0];
    status["state"]["running"].is_object() && status["restartCount"] == 0
}

pub(crate) fn waiting_reason(pod: &Value) -> &str {
    pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"].as_str().unwrap_or_default()
}
