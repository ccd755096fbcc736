//! The policies by which an agent nudges and deletes pods of its own node and changes nothing else.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use lighterman::api_server::connect;
use lighterman::cluster::KubeCluster;
use lighterman::model::PodRef;
use lighterman::ports::{ClusterError, PodWriter};
use serde_json::{Value, json};

use super::apiserver::{KubeNamespace, SERVICE_ACCOUNT, create, with_deadline};
use super::rbac::client_with;
use super::token_policy::create_policies;
use crate::fleet::rbac::grant_rbac;

const OTHER_NODE: &str = "another-node";

/// Attacks that one stolen token permits on pods of every node where no policy denies them.
fn attacks() -> [(&'static str, Value); 3] {
    [
        ("labels removed: the pod leaves its Service", json!({ "metadata": { "labels": { "app": null } } })),
        (
            "podIP replaced: another pod gets the traffic",
            json!({ "status": { "podIP": "10.9.9.9", "podIPs": [{ "ip": "10.9.9.9" }] } }),
        ),
        ("phase Failed: the kubelet kills the pod", json!({ "status": { "phase": "Failed" } })),
    ]
}

fn nudge(value: &str) -> Value {
    json!({ "metadata": { "annotations": { "lighterman.dev/nudged-at": value } } })
}

const NOW: &str = "2026-11-30T14:16:51.123456789Z";

/// A pod that runs: with an owner, a finalizer, and a status as kubelets write them.
async fn running_pod(kube: &KubeNamespace, name: &str, node: &str) -> PodRef {
    let owner = json!({ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "u" });
    let pod = json!({
        "metadata": {
            "name": name, "generateName": "web-", "labels": { "app": "web", "tier": "front" },
            "annotations": { "team": "shop", "owner": "a" },
            "finalizers": ["example.com/keep"], "ownerReferences": [owner],
        },
        "spec": {
            "nodeName": node, "serviceAccountName": SERVICE_ACCOUNT,
            "containers": [{ "name": "main", "image": "reg.test/app:1" }],
        },
    });
    let created = create::<Pod>(&kube.pods(), pod).await;
    let status = json!({ "status": {
        "phase": "Running", "podIP": "10.1.2.3", "podIPs": [{ "ip": "10.1.2.3" }], "hostIP": "192.0.2.7",
        "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": "2026-11-30T14:00:00Z" }],
        "containerStatuses": [{
            "name": "main", "image": "reg.test/app:1", "imageID": "reg.test/app@sha256:00", "ready": true,
            "restartCount": 0, "state": { "running": { "startedAt": "2026-11-30T14:00:00Z" } },
        }],
    } });
    kube.pods().patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    PodRef { k8s_namespace: kube.name.clone(), name: name.to_owned(), uid: created.metadata.uid.unwrap() }
}

/// Patches a pod's status as `client`. An error is the status code and the text of the denial.
async fn patch(kube: &KubeNamespace, client: &Client, name: &str, patch: &Value) -> Result<(), (u16, String)> {
    patch_as(kube, client, name, &PatchParams::default(), &Patch::Merge(patch)).await
}

async fn patch_as(
    kube: &KubeNamespace,
    client: &Client,
    name: &str,
    params: &PatchParams,
    patch: &Patch<&Value>,
) -> Result<(), (u16, String)> {
    let pods = Api::<Pod>::namespaced(client.clone(), &kube.name);
    match pods.patch_status(name, params, patch).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) => Err((status.code, status.message.clone())),
        Err(other) => panic!("{other}"),
    }
}

fn assert_forbidden(what: &str, answer: Result<(), (u16, String)>, text: &str) {
    let (code, message) = answer.expect_err(what);
    assert!(code == 403 && message.contains(text), "{what}: {code} {message}");
}

/// The pod without the nudge's annotation, and without fields that every write changes.
async fn pod_without_nudge(kube: &KubeNamespace, name: &str) -> Value {
    let mut pod = serde_json::to_value(kube.pods().get(name).await.unwrap()).unwrap();
    for field in ["resourceVersion", "managedFields"] {
        pod["metadata"].as_object_mut().unwrap().remove(field);
    }
    pod["metadata"]["annotations"].as_object_mut().unwrap().remove("lighterman.dev/nudged-at");
    pod
}

/// A namespace with rights and policies, and its agent's token. `None` where the API server is too
/// old.
async fn namespace_with_policies(values: &str) -> Option<(KubeNamespace, String)> {
    let kube = KubeNamespace::new().await;
    if kube.minor().await < 30 {
        println!("skipped: this API server is older than ValidatingAdmissionPolicy");
        return None;
    }
    grant_rbac(&kube, values).await;
    let own = kube.pod("agent").await;
    let token = kube.token(SERVICE_ACCOUNT, None, Some(&own)).await;
    create_policies(&kube, values).await;
    Some((kube, token))
}

/// Returns when the API server enforces the policy about nudges, which takes a moment.
async fn wait_enforced(kube: &KubeNamespace, client: &Client) {
    kube.pod("probe").await;
    while patch(kube, client, "probe", &nudge("no time")).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn without_the_policy_one_token_relabels_hijacks_and_kills_pods_of_every_node() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        grant_rbac(&kube, "podRightsWithoutPolicy=true").await;
        let own = kube.pod("agent").await;
        let client = client_with(&kube, &kube.token(SERVICE_ACCOUNT, None, Some(&own)).await).await;
        running_pod(&kube, "victim", OTHER_NODE).await;
        for (what, attack) in attacks() {
            patch(&kube, &client, "victim", &attack).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        }
        let victim = serde_json::to_value(kube.pods().get("victim").await.unwrap()).unwrap();
        assert_eq!(victim["metadata"]["labels"], json!({ "tier": "front" }));
        assert_eq!((&victim["status"]["podIP"], &victim["status"]["phase"]), (&json!("10.9.9.9"), &json!("Failed")));
    })
    .await;
}

#[tokio::test]
async fn the_policy_permits_the_nudge_of_own_pods_and_no_other_change() {
    with_deadline(async {
        let Some((kube, token)) = namespace_with_policies("podPolicy=always").await else { return };
        let client = client_with(&kube, &token).await;
        let agent = KubeCluster::new(&connect(kube.config_of(&token)).await.unwrap());
        let [own, others] =
            [running_pod(&kube, "own", &kube.name).await, running_pod(&kube, "others", OTHER_NODE).await];
        let before = [pod_without_nudge(&kube, "own").await, pod_without_nudge(&kube, "others").await];
        wait_enforced(&kube, &client).await;

        agent.nudge(&own).await.unwrap();
        agent.nudge(&own).await.unwrap();
        patch(&kube, &client, "own", &nudge(NOW)).await.unwrap();

        for pod in ["own", "others"] {
            for (what, attack) in attacks() {
                assert_forbidden(&format!("{what} ({pod})"), patch(&kube, &client, pod, &attack).await, "an agent");
            }
        }
        assert!(matches!(agent.nudge(&others).await, Err(ClusterError::Forbidden(text)) if text.contains("own node")));

        let metadata = |metadata: Value| json!({ "metadata": metadata });
        for (what, change, expected) in [
            ("a label added", metadata(json!({ "labels": { "a": "b" } })), "no labels"),
            ("a condition added", json!({ "status": { "message": "m" } }), "pod's status"),
            ("another annotation", metadata(json!({ "annotations": { "a": "b" } })), "no annotation"),
            ("an annotation changed", metadata(json!({ "annotations": { "team": "b" } })), "no annotation"),
            ("an annotation removed", metadata(json!({ "annotations": { "team": null } })), "no annotation"),
            ("all annotations removed", metadata(json!({ "annotations": null })), "no annotation"),
            ("no time", nudge("now"), "a time"),
            ("a long value", nudge(&format!("{NOW}{NOW}")), "a time"),
            ("a line more", nudge(&format!("{NOW}\n")), "a time"),
            ("no finalizers", metadata(json!({ "finalizers": null })), "no finalizers"),
            ("another finalizer", metadata(json!({ "finalizers": ["example.com/x"] })), "no finalizers"),
            ("another generateName", metadata(json!({ "generateName": "x-" })), "generateName"),
            ("no generateName", metadata(json!({ "generateName": null })), "generateName"),
        ] {
            assert_forbidden(what, patch(&kube, &client, "own", &change).await, expected);
            // A nudge in the same patch permits no other change.
            let mut both = change.clone();
            if expected != "a time" && !both["metadata"]["annotations"].is_null() {
                both["metadata"]["annotations"]["lighterman.dev/nudged-at"] = NOW.into();
                assert_forbidden(what, patch(&kube, &client, "own", &both).await, expected);
            }
        }
        // A pod without any labels, annotations or finalizers.
        let label = metadata(json!({ "labels": { "a": "b" } }));
        assert_forbidden("the first label", patch(&kube, &client, "probe", &label).await, "no labels");
        let finalizer = metadata(json!({ "finalizers": ["example.com/x"] }));
        assert_forbidden("the first finalizer", patch(&kube, &client, "probe", &finalizer).await, "no finalizers");
        patch(&kube, &client, "probe", &nudge(NOW)).await.unwrap();

        // Other kinds of patches.
        let label = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "labels": { "a": "b" } } });
        let apply = patch_as(&kube, &client, "own", &PatchParams::apply("x").force(), &Patch::Apply(&label)).await;
        assert_forbidden("a label applied", apply, "no labels");
        let strategic = patch_as(&kube, &client, "own", &PatchParams::default(), &Patch::Strategic(&label)).await;
        assert_forbidden("a label merged", strategic, "no labels");

        // The API server itself keeps owners and spec, whatever a patch of the status says.
        for change in [
            metadata(json!({ "ownerReferences": null })),
            json!({ "spec": { "containers": [{ "name": "main", "image": "evil.test/x:1" }] } }),
        ] {
            patch(&kube, &client, "own", &change).await.unwrap();
        }
        assert_eq!([pod_without_nudge(&kube, "own").await, pod_without_nudge(&kube, "others").await], before);

        // A kubelet, or any other client with the right, is not restricted.
        patch(&kube, &kube.admin, "own", &attacks()[2].1).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_policy_rejects_a_token_that_is_bound_to_no_pod_or_to_a_pod_without_node() {
    with_deadline(async {
        let Some((kube, token)) = namespace_with_policies("podPolicy=always").await else { return };
        running_pod(&kube, "own", &kube.name).await;
        wait_enforced(&kube, &client_with(&kube, &token).await).await;
        let unscheduled = json!({
            "metadata": { "name": "unscheduled" },
            "spec": { "serviceAccountName": SERVICE_ACCOUNT, "containers": [{ "name": "main", "image": "reg.test/app:1" }] },
        });
        let created = create::<Pod>(&kube.pods(), unscheduled).await;
        let unscheduled =
            PodRef { k8s_namespace: kube.name.clone(), name: "unscheduled".into(), uid: created.metadata.uid.unwrap() };
        for bound in [None, Some(&unscheduled)] {
            let client = client_with(&kube, &kube.token(SERVICE_ACCOUNT, None, bound).await).await;
            for pod in ["own", "unscheduled"] {
                assert_forbidden(pod, patch(&kube, &client, pod, &nudge(NOW)).await, "own node");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn the_policy_permits_the_nudge_of_a_large_pod() {
    with_deadline(async {
        let Some((kube, token)) = namespace_with_policies("podPolicy=always").await else { return };
        wait_enforced(&kube, &client_with(&kube, &token).await).await;
        let containers = (0..100).map(|i| json!({ "name": format!("c{i}"), "image": "reg.test/app:1" }));
        let containers: Vec<_> = containers.collect();
        let annotations = (0..250).map(|i| (format!("example.com/annotation-{i}"), json!("x".repeat(500))));
        let annotations: serde_json::Map<_, _> = annotations.collect();
        let pod = json!({
            "metadata": { "name": "large", "annotations": annotations },
            "spec": { "nodeName": kube.name, "containers": containers },
        });
        let created = create::<Pod>(&kube.pods(), pod).await;
        let waiting_status = |i: usize| {
            json!({
                "name": format!("c{i}"), "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "waiting": { "reason": "ImagePullBackOff", "message": "x".repeat(500) } },
            })
        };
        let status = json!({ "status": { "containerStatuses": (0..100).map(waiting_status).collect::<Vec<_>>() } });
        kube.pods().patch_status("large", &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
        let pod = PodRef { k8s_namespace: kube.name.clone(), name: "large".into(), uid: created.metadata.uid.unwrap() };
        KubeCluster::new(&connect(kube.config_of(&token)).await.unwrap()).nudge(&pod).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_replaced_pod_is_gone_also_where_the_new_one_runs_on_another_node() {
    with_deadline(async {
        let Some((kube, token)) = namespace_with_policies("podPolicy=always,agent.deletePods=true").await else {
            return;
        };
        let agent = KubeCluster::new(&connect(kube.config_of(&token)).await.unwrap());
        let old = kube.pod("web-0").await;
        wait_enforced(&kube, &client_with(&kube, &token).await).await;
        kube.delete_pod("web-0").await;
        let new = kube.pod_on("web-0", OTHER_NODE).await;
        assert!(matches!(agent.nudge(&old).await, Err(ClusterError::Gone(_))));
        assert!(matches!(agent.delete(&old).await, Err(ClusterError::Gone(_))));
        assert!(matches!(agent.nudge(&new).await, Err(ClusterError::Forbidden(_))));
    })
    .await;
}

#[tokio::test]
async fn the_policy_permits_the_deletion_of_own_pods_and_no_others() {
    with_deadline(async {
        let Some((kube, token)) = namespace_with_policies("podPolicy=always,agent.deletePods=true").await else {
            return;
        };
        let agent = KubeCluster::new(&connect(kube.config_of(&token)).await.unwrap());
        let others = kube.pod_on("others", OTHER_NODE).await;
        // Until the API server enforces the policy, deletions of such pods succeed.
        for attempt in 0.. {
            let probe = kube.pod_on(&format!("probe-{attempt}"), OTHER_NODE).await;
            match agent.delete(&probe).await {
                Ok(()) => tokio::time::sleep(Duration::from_millis(100)).await,
                Err(ClusterError::Forbidden(text)) if text.contains("own node") => break,
                Err(other) => panic!("{other}"),
            }
        }
        assert!(matches!(agent.delete(&others).await, Err(ClusterError::Forbidden(text)) if text.contains("own node")));
        let unbound =
            KubeCluster::new(&connect(kube.config_of(&kube.token(SERVICE_ACCOUNT, None, None).await)).await.unwrap());
        let own = kube.pod("own").await;
        assert!(matches!(unbound.delete(&own).await, Err(ClusterError::Forbidden(_))));
        for name in ["others", "own"] {
            assert_eq!(kube.pods().get(name).await.unwrap().metadata.deletion_timestamp, None, "{name}");
        }
        agent.delete(&own).await.unwrap();
        assert!(kube.pods().get("own").await.unwrap().metadata.deletion_timestamp.is_some());

        let preconditions = Preconditions { uid: Some(others.uid), resource_version: None };
        kube.pods().delete("others", &DeleteParams::default().preconditions(preconditions)).await.unwrap();
    })
    .await;
}
