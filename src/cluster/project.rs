//! From the API's pod to the few fields that decisions are made from.

use k8s_openapi::api::core::v1::{Container, ContainerStatus, EphemeralContainer, Pod};

use super::call::cut;
use crate::model::{ContainerKind, ContainerView, PodRef, PodView, PullPolicy, Waiting};
use crate::oci::Reference;

/// The most that is kept of one text. The API bounds a container's message only by the size of the whole object (1.5 MiB), while
/// the cause of a failed pull stands in the first few hundred bytes.
const MAX_TEXT: usize = 4096;

/// The fields that are used; all else is dropped here, `managedFields` first of all.
///
/// `None` for an object without name, namespace or UID, which no API server sends.
pub(super) fn project(pod: Pod) -> Option<PodView> {
    let Pod { metadata, spec, status } = pod;
    let spec = spec.unwrap_or_default();
    let status = status.unwrap_or_default();
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let mut annotations = metadata.annotations.unwrap_or_default();
    // What `kubectl apply` leaves there is as long as the pod itself; what decides anything is a word.
    annotations.retain(|_, value| value.len() <= MAX_TEXT);
    let statuses = [
        status.init_container_statuses.unwrap_or_default(),
        status.container_statuses.unwrap_or_default(),
        status.ephemeral_container_statuses.unwrap_or_default(),
    ];
    let [init, ordinary, ephemeral] = &statuses;
    let containers = (spec.init_containers.into_iter().flatten())
        .map(|container| view(container.into(), ContainerKind::Init, init))
        .chain(spec.containers.into_iter().map(|container| view(container.into(), ContainerKind::Ordinary, ordinary)))
        .chain(
            (spec.ephemeral_containers.into_iter().flatten())
                .map(|container| view(container.into(), ContainerKind::Ephemeral, ephemeral)),
        )
        .collect();
    Some(PodView {
        pod: PodRef { k8s_namespace: metadata.namespace?, name: metadata.name?, uid: metadata.uid? },
        annotations,
        containers,
        ending: metadata.deletion_timestamp.is_some() || ended,
    })
}

/// What the two kinds of container in the API have in common.
struct Spec {
    name: String,
    image: Option<String>,
    pull_policy: Option<String>,
}

impl From<Container> for Spec {
    fn from(container: Container) -> Self {
        Self { name: container.name, image: container.image, pull_policy: container.image_pull_policy }
    }
}

impl From<EphemeralContainer> for Spec {
    fn from(container: EphemeralContainer) -> Self {
        Self { name: container.name, image: container.image, pull_policy: container.image_pull_policy }
    }
}

fn view(spec: Spec, kind: ContainerKind, statuses: &[ContainerStatus]) -> ContainerView {
    let image = spec.image.unwrap_or_default();
    let pull_policy = match spec.pull_policy.as_deref() {
        Some("Always") => PullPolicy::Always,
        Some("Never") => PullPolicy::Never,
        Some("IfNotPresent") => PullPolicy::IfNotPresent,
        _ => default_policy(&image),
    };
    // The statuses come in an order of their own, and later than the spec.
    let status = statuses.iter().find(|status| status.name == spec.name);
    let waiting = status.and_then(|status| status.state.as_ref()?.waiting.as_ref()).map(|waiting| Waiting {
        reason: cut(waiting.reason.as_deref().unwrap_or_default(), MAX_TEXT).to_owned(),
        message: cut(waiting.message.as_deref().unwrap_or_default(), MAX_TEXT).to_owned(),
    });
    ContainerView { name: spec.name, kind, image, pull_policy, waiting }
}

/// What the API server fills in for an absent `imagePullPolicy`.
fn default_policy(image: &str) -> PullPolicy {
    match image.parse::<Reference>() {
        Ok(Reference::Tag(_, tag)) if tag == "latest" => PullPolicy::Always,
        _ => PullPolicy::IfNotPresent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn pod(metadata: serde_json::Value, spec: serde_json::Value, status: serde_json::Value) -> PodView {
        let mut object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "web-0", "namespace": "shop", "uid": "u-1" },
            "spec": { "containers": [] },
        });
        for (key, part) in [("metadata", metadata), ("spec", spec)] {
            object[key].as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
        }
        object["status"] = status;
        project(serde_json::from_value(object).unwrap()).unwrap()
    }

    #[test]
    fn every_kind_of_container_is_seen_with_its_own_status() {
        let waiting = |reason: &str| json!({ "waiting": { "reason": reason, "message": format!("{reason}!") } });
        let status = |name: &str, state: serde_json::Value| json!({ "name": name, "image": "resolved/by:kubelet", "imageID": "", "ready": false, "restartCount": 0, "state": state });
        let seen = pod(
            json!({}),
            json!({
                "initContainers": [{ "name": "migrate", "image": "reg.test/migrate:1" }],
                "containers": [
                    { "name": "web", "image": "reg.test/web:1", "imagePullPolicy": "Never" },
                    { "name": "log", "image": "reg.test/log:1" },
                ],
                "ephemeralContainers": [{ "name": "debug", "image": "reg.test/debug:1" }],
            }),
            json!({
                "initContainerStatuses": [status("migrate", waiting("ErrImagePull"))],
                // In another order than the spec, one running, one not yet reported.
                "containerStatuses": [status("log", json!({ "running": {} })), status("web", waiting("ErrImageNeverPull"))],
                "ephemeralContainerStatuses": [status("debug", waiting("ImagePullBackOff"))],
            }),
        );
        let row =
            |c: &ContainerView| (c.name.clone(), c.kind, c.image.clone(), c.waiting.as_ref().map(|w| w.reason.clone()));
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(
            seen.containers.iter().map(row).collect::<Vec<_>>(),
            [
                ("migrate".into(), ContainerKind::Init, "reg.test/migrate:1".into(), text("ErrImagePull")),
                ("web".into(), ContainerKind::Ordinary, "reg.test/web:1".into(), text("ErrImageNeverPull")),
                ("log".into(), ContainerKind::Ordinary, "reg.test/log:1".into(), None),
                ("debug".into(), ContainerKind::Ephemeral, "reg.test/debug:1".into(), text("ImagePullBackOff")),
            ]
        );
        assert_eq!(seen.containers[0].waiting.as_ref().unwrap().message, "ErrImagePull!");
        assert_eq!(seen.containers[1].pull_policy, PullPolicy::Never);
        assert_eq!(seen.pod, PodRef { k8s_namespace: "shop".into(), name: "web-0".into(), uid: "u-1".into() });
        assert!(!seen.ending);
    }

    #[test]
    fn an_absent_pull_policy_is_what_the_api_server_would_fill_in() {
        for (image, policy) in [
            ("reg.test/a", PullPolicy::Always),
            ("reg.test/a:latest", PullPolicy::Always),
            ("reg.test:5000/a", PullPolicy::Always),
            ("reg.test/a:1", PullPolicy::IfNotPresent),
            (&format!("reg.test/a@{DIGEST}"), PullPolicy::IfNotPresent),
            ("not an image", PullPolicy::IfNotPresent),
        ] {
            let seen = pod(json!({}), json!({ "containers": [{ "name": "c", "image": image }] }), json!({}));
            assert_eq!(seen.containers[0].pull_policy, policy, "{image}");
        }
    }

    #[test]
    fn a_pod_that_is_deleted_or_has_ended_is_ending() {
        let now = "2026-01-01T00:00:00Z";
        assert!(pod(json!({ "deletionTimestamp": now }), json!({}), json!({ "phase": "Running" })).ending);
        for (phase, ending) in [("Pending", false), ("Running", false), ("Succeeded", true), ("Failed", true)] {
            assert_eq!(pod(json!({}), json!({}), json!({ "phase": phase })).ending, ending, "{phase}");
        }
    }

    #[test]
    fn long_texts_are_not_kept() {
        let seen = pod(
            json!({ "annotations": { "lighterman.dev/x": "yes", "kubectl.kubernetes.io/last-applied-configuration": "x".repeat(5000) } }),
            json!({ "containers": [{ "name": "c", "image": "reg.test/a:1" }] }),
            json!({ "containerStatuses": [{
                "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "waiting": { "reason": "ErrImagePull", "message": "é".repeat(5000) } },
            }] }),
        );
        assert_eq!(seen.annotations.keys().collect::<Vec<_>>(), ["lighterman.dev/x"]);
        assert_eq!(seen.containers[0].waiting.as_ref().unwrap().message.len(), MAX_TEXT);
    }
}
