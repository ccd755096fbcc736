//! The conversion of the API's pod into the few fields that decisions use.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, ContainerStatus, EphemeralContainer, Pod, Volume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::mirror_pods::MIRROR_ANNOTATION;
use crate::api_server::error::{is_object_name, truncate};
use crate::decide::allowed_repositories::MAX_LIST;
use crate::decide::opt_in::affects_opt_in;
use crate::model::{ContainerKind, ContainerView, ImageVolume, Owner, PodRef, PodView, PullPolicy, WaitingState};
use crate::oci::Reference;

/// Most bytes of one text. The API bounds a container's message only by the size of the whole
/// object (1.5 MiB), and the cause of a failed pull is within the first few hundred bytes. An image
/// name of this length is invalid.
pub(super) const MAX_TEXT: usize = 4096;

/// Most containers of each kind, and most image volumes, of one pod. The API bounds both only by
/// the size of the whole object, which has room for ten thousand. Real pods have a dozen.
const MAX_ITEMS: usize = 128;

/// Most pull secrets of one pod: each costs a request.
const MAX_SECRETS: usize = 16;

/// Most bytes of a text in an owner reference: an API group (253), a slash and a version (63).
/// Names, kinds and UIDs are shorter.
const MAX_REFERENCE: usize = 253 + 1 + 63;

/// Most bytes of an annotation's value. The annotation of `kubectl apply` is as long as the object
/// itself; the annotations of lighterman have a word or a short list.
const MAX_VALUE: usize = 1024;

/// Most bytes of the value of an annotation that decides: a list of repositories.
const MAX_DECIDING_VALUE: usize = MAX_LIST;

/// Most labels, and most annotations, of one object: the first by name. The API bounds all
/// annotations together by 256 KiB, and labels by the object's size. A user who can add more can
/// also change the annotations that count.
const MAX_PAIRS: usize = 128;

/// Keeps the fields that decisions use, and drops all other fields, above all `managedFields`.
///
/// `None` for an object without name, namespace or UID, which no API server sends.
pub(super) fn pod_view(pod: Pod) -> Option<PodView> {
    let Pod { metadata, spec, status } = pod;
    let spec = spec.unwrap_or_default();
    let status = status.unwrap_or_default();
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let annotations = metadata.annotations.unwrap_or_default();
    let is_static = annotations.contains_key(MIRROR_ANNOTATION);
    let statuses = [
        status.init_container_statuses.unwrap_or_default(),
        status.container_statuses.unwrap_or_default(),
        status.ephemeral_container_statuses.unwrap_or_default(),
    ];
    let [init, ordinary, ephemeral] = &statuses;
    let containers = (spec.init_containers.into_iter().flatten().take(MAX_ITEMS))
        .map(|container| container_view(container.into(), ContainerKind::Init, init))
        .chain(
            (spec.containers.into_iter().take(MAX_ITEMS))
                .map(|container| container_view(container.into(), ContainerKind::Ordinary, ordinary)),
        )
        .chain(
            (spec.ephemeral_containers.into_iter().flatten().take(MAX_ITEMS))
                .map(|container| container_view(container.into(), ContainerKind::Ephemeral, ephemeral)),
        )
        .collect();
    let secrets = spec.image_pull_secrets.into_iter().flatten().map(|secret| secret.name);
    Some(PodView {
        pod: PodRef { k8s_namespace: metadata.namespace?, name: metadata.name?, uid: metadata.uid? },
        annotations: bounded_pairs(annotations),
        containers,
        image_volumes: spec.volumes.into_iter().flatten().filter_map(image_volume).take(MAX_ITEMS).collect(),
        owner: controlling_owner(metadata.owner_references.unwrap_or_default()),
        is_static,
        priority: spec.priority.unwrap_or(0),
        pull_secrets: secrets.filter(|name| is_object_name(name)).take(MAX_SECRETS).collect(),
        is_ending: metadata.deletion_timestamp.is_some() || ended,
    })
}

/// Labels or annotations within the bounds [`MAX_VALUE`] and [`MAX_PAIRS`]. An annotation that
/// decides is never dropped for the length of its value: without a namespace's list of
/// repositories, pods of the namespace could recover any image. A value beyond
/// [`MAX_DECIDING_VALUE`] is truncated to a length that every parser rejects. Truncation may take
/// three bytes more, because a character stays whole.
pub(super) fn bounded_pairs(pairs: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let is_deciding_key = |key: &str| key.rsplit_once('/').is_some_and(|(_, name)| affects_opt_in(name));
    let (deciding, others): (Vec<_>, Vec<_>) = pairs.into_iter().partition(|(key, _)| is_deciding_key(key));
    let deciding = deciding.into_iter().map(|(key, value)| (key, truncate(&value, MAX_DECIDING_VALUE + 4).to_owned()));
    let others = others.into_iter().filter(|(_, value)| value.len() <= MAX_VALUE);
    others.take(MAX_PAIRS).chain(deciding.take(MAX_PAIRS)).collect()
}

/// The owner that controls the object; the API server accepts at most one.
pub(super) fn controlling_owner(references: Vec<OwnerReference>) -> Option<Owner> {
    let reference = references.into_iter().find(|reference| reference.controller == Some(true))?;
    let OwnerReference { api_version, kind, name, uid, .. } = reference;
    let is_bounded = [&api_version, &kind, &name, &uid].iter().all(|text| text.len() <= MAX_REFERENCE);
    is_bounded.then_some(Owner { api_version, kind, name, uid })
}

fn image_volume(volume: Volume) -> Option<ImageVolume> {
    let source = volume.image?;
    let image = truncate(&source.reference?, MAX_TEXT).to_owned();
    let pull_policy = pull_policy(source.pull_policy.as_deref(), &image);
    Some(ImageVolume { name: volume.name, image, pull_policy })
}

/// The common fields of the API's two container types.
struct ContainerSpec {
    name: String,
    image: Option<String>,
    pull_policy: Option<String>,
}

impl From<Container> for ContainerSpec {
    fn from(container: Container) -> Self {
        Self { name: container.name, image: container.image, pull_policy: container.image_pull_policy }
    }
}

impl From<EphemeralContainer> for ContainerSpec {
    fn from(container: EphemeralContainer) -> Self {
        Self { name: container.name, image: container.image, pull_policy: container.image_pull_policy }
    }
}

fn container_view(spec: ContainerSpec, kind: ContainerKind, statuses: &[ContainerStatus]) -> ContainerView {
    let image = truncate(spec.image.as_deref().unwrap_or_default(), MAX_TEXT).to_owned();
    let pull_policy = pull_policy(spec.pull_policy.as_deref(), &image);
    // The order of the statuses differs from the order in the spec, and a status comes later.
    let status = statuses.iter().find(|status| status.name == spec.name);
    let waiting = match status {
        Some(status) => status.state.as_ref().and_then(|state| state.waiting.as_ref()).map(|waiting| WaitingState {
            reason: truncate(waiting.reason.as_deref().unwrap_or_default(), MAX_TEXT).to_owned(),
            message: truncate(waiting.message.as_deref().unwrap_or_default(), MAX_TEXT).to_owned(),
        }),
        // The kubelet has not reported the container yet.
        None => Some(WaitingState { reason: String::new(), message: String::new() }),
    };
    ContainerView { name: spec.name, kind, image, pull_policy, waiting }
}

/// `imagePullPolicy`, or the API server's default where the field is absent.
fn pull_policy(spec: Option<&str>, image: &str) -> PullPolicy {
    match spec {
        Some("Always") => PullPolicy::Always,
        Some("Never") => PullPolicy::Never,
        Some("IfNotPresent") => PullPolicy::IfNotPresent,
        _ => match image.parse::<Reference>() {
            Ok(Reference::Tag(_, tag)) if tag == "latest" => PullPolicy::Always,
            _ => PullPolicy::IfNotPresent,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::allowed_repositories::RepositoryList;
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
        pod_view(serde_json::from_value(object).unwrap()).unwrap()
    }

    #[test]
    fn every_kind_of_container_has_the_status_of_its_name() {
        let waiting = |reason: &str| json!({ "waiting": { "reason": reason, "message": format!("{reason}!") } });
        let status = |name: &str, state: serde_json::Value| json!({ "name": name, "image": "resolved/by:kubelet", "imageID": "", "ready": false, "restartCount": 0, "state": state });
        let view = pod(
            json!({}),
            json!({
                "initContainers": [
                    { "name": "migrate", "image": "reg.test/migrate:1" },
                    { "name": "proxy", "image": "reg.test/proxy:1", "restartPolicy": "Always" },
                ],
                "containers": [
                    { "name": "web", "image": "reg.test/web:1", "imagePullPolicy": "Never" },
                    { "name": "log", "image": "reg.test/log:1" },
                ],
                "ephemeralContainers": [{ "name": "debug", "image": "reg.test/debug:1" }],
            }),
            json!({
                "initContainerStatuses": [status("migrate", waiting("ErrImagePull")), status("proxy", waiting("PodInitializing"))],
                // The order differs from the spec; one container runs, and one is not yet reported.
                "containerStatuses": [status("log", json!({ "running": {} })), status("web", waiting("ErrImageNeverPull"))],
                "ephemeralContainerStatuses": [status("debug", waiting("ImagePullBackOff"))],
            }),
        );
        let row =
            |c: &ContainerView| (c.name.clone(), c.kind, c.image.clone(), c.waiting.as_ref().map(|w| w.reason.clone()));
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(
            view.containers.iter().map(row).collect::<Vec<_>>(),
            [
                ("migrate".into(), ContainerKind::Init, "reg.test/migrate:1".into(), text("ErrImagePull")),
                ("proxy".into(), ContainerKind::Init, "reg.test/proxy:1".into(), text("PodInitializing")),
                ("web".into(), ContainerKind::Ordinary, "reg.test/web:1".into(), text("ErrImageNeverPull")),
                ("log".into(), ContainerKind::Ordinary, "reg.test/log:1".into(), None),
                ("debug".into(), ContainerKind::Ephemeral, "reg.test/debug:1".into(), text("ImagePullBackOff")),
            ]
        );
        assert_eq!(view.containers[0].waiting.as_ref().unwrap().message, "ErrImagePull!");
        assert_eq!(view.containers[2].pull_policy, PullPolicy::Never);
        assert_eq!(view.pod, PodRef { k8s_namespace: "shop".into(), name: "web-0".into(), uid: "u-1".into() });
        assert!(!view.is_ending);
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
            let view = pod(json!({}), json!({ "containers": [{ "name": "c", "image": image }] }), json!({}));
            assert_eq!(view.containers[0].pull_policy, policy, "{image}");
            let view =
                pod(json!({}), json!({ "volumes": [{ "name": "v", "image": { "reference": image } }] }), json!({}));
            assert_eq!(view.image_volumes[0].pull_policy, policy, "{image}");
        }
    }

    #[test]
    fn image_volumes_are_part_of_the_pod_view() {
        let view = pod(
            json!({}),
            json!({ "volumes": [
                { "name": "scratch", "emptyDir": {} },
                { "name": "model", "image": { "reference": "reg.test/model:1", "pullPolicy": "Never" } },
            ] }),
            json!({}),
        );
        let model =
            ImageVolume { name: "model".into(), image: "reg.test/model:1".into(), pull_policy: PullPolicy::Never };
        assert_eq!(view.image_volumes, [model]);
    }

    #[test]
    fn the_owner_is_the_controlling_reference() {
        let reference = |kind: &str, controller: Option<bool>| {
            let mut reference = json!({ "apiVersion": "apps/v1", "kind": kind, "name": "web", "uid": "u-2" });
            reference["controller"] = controller.into();
            reference
        };
        let owner =
            |references: serde_json::Value| pod(json!({ "ownerReferences": references }), json!({}), json!({})).owner;
        let controlled = owner(json!([
            reference("Other", None),
            reference("Another", Some(false)),
            reference("ReplicaSet", Some(true)),
        ]));
        let [api_version, kind, name, uid] = ["apps/v1", "ReplicaSet", "web", "u-2"].map(str::to_owned);
        assert_eq!(controlled, Some(Owner { api_version, kind, name, uid }));
        assert_eq!(owner(json!([reference("Other", None)])), None);
        assert_eq!(owner(json!([reference(&"x".repeat(MAX_REFERENCE + 1), Some(true))])), None);
    }

    #[test]
    fn static_pods_priorities_and_pull_secrets_are_part_of_the_pod_view() {
        let view = pod(
            json!({ "annotations": { "kubernetes.io/config.mirror": "hash" } }),
            json!({ "priority": -5, "imagePullSecrets": [{ "name": "regcred" }, { "name": "../x" }, {}] }),
            json!({}),
        );
        assert_eq!((view.is_static, view.priority), (true, -5));
        assert_eq!(view.pull_secrets, ["regcred"]);
        let plain = pod(json!({}), json!({}), json!({}));
        assert_eq!((plain.is_static, plain.priority), (false, 0));
    }

    #[test]
    fn the_size_of_a_pod_view_is_bounded() {
        let many = |item: fn(usize) -> serde_json::Value| (0..1000).map(item).collect::<Vec<_>>();
        let container = |i| json!({ "name": format!("c-{i}"), "image": "reg.test/a:1" });
        let view = pod(
            json!({ "annotations": (0..1000).map(|i| (format!("a-{i}"), "".into())).collect::<serde_json::Map<_, _>>() }),
            json!({
                "initContainers": many(container), "containers": many(container), "ephemeralContainers": many(container),
                "volumes": many(|i| json!({ "name": format!("v-{i}"), "image": { "reference": "reg.test/a:1" } })),
                "imagePullSecrets": many(|i| json!({ "name": format!("s-{i}") })),
            }),
            json!({}),
        );
        assert_eq!(view.containers.len(), 3 * MAX_ITEMS);
        assert_eq!((view.image_volumes.len(), view.pull_secrets.len()), (MAX_ITEMS, MAX_SECRETS));
        assert_eq!(view.annotations.len(), MAX_PAIRS);
    }

    #[test]
    fn a_pod_that_is_deleted_or_has_ended_is_ending() {
        let now = "2026-01-01T00:00:00Z";
        assert!(pod(json!({ "deletionTimestamp": now }), json!({}), json!({ "phase": "Running" })).is_ending);
        for (phase, ending) in [("Pending", false), ("Running", false), ("Succeeded", true), ("Failed", true)] {
            assert_eq!(pod(json!({}), json!({}), json!({ "phase": phase })).is_ending, ending, "{phase}");
        }
    }

    #[test]
    fn a_list_of_repositories_that_is_too_long_is_invalid_and_not_absent() {
        let list = |globs: usize| vec!["r.test/team/app"; globs].join(",");
        let bounded = |value: String| {
            let many = (0..MAX_PAIRS).map(|number| (format!("a.dev/{number:03}"), String::new()));
            bounded_pairs(many.chain([("lighterman.dev/repositories".to_owned(), value)]).collect())
        };
        let parsed = |value: String| RepositoryList::parse(&bounded(value)["lighterman.dev/repositories"]);
        assert!(parsed(list(64)).is_ok(), "a list of a kilobyte is whole");
        assert!(parsed(list(65)).is_err());
        assert!(parsed("r.test/*".to_owned() + &" ".repeat(MAX_LIST)).is_err(), "a cut list would permit other images");
    }

    #[test]
    fn long_annotations_are_dropped_and_long_messages_are_truncated() {
        let view = pod(
            json!({ "annotations": { "lighterman.dev/x": "yes", "kubectl.kubernetes.io/last-applied-configuration": "x".repeat(5000) } }),
            json!({ "containers": [{ "name": "c", "image": "reg.test/a:1" }] }),
            json!({ "containerStatuses": [{
                "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "waiting": { "reason": "ErrImagePull", "message": "é".repeat(5000) } },
            }] }),
        );
        assert_eq!(view.annotations.keys().collect::<Vec<_>>(), ["lighterman.dev/x"]);
        assert_eq!(view.containers[0].waiting.as_ref().unwrap().message.len(), MAX_TEXT);
    }
}
