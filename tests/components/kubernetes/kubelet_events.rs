//! Events of the kubelet about a pod.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Event, Pod};
use kube::Api;
use lighterman::model::{KubeletEvent, PodEvent, PodRef, PodReport, PodReportKind};
use lighterman::ports::{PodReader, PodWriter};
use serde_json::{Value, json};

use super::apiserver::{KubeNamespace, create, with_deadline};
use super::pod_watch::PodWatch;

/// Creates an Event as kubelets write Events, with changes.
async fn event(kube: &KubeNamespace, pod: &PodRef, name: &str, change: Value) {
    let mut event = json!({
        "metadata": { "name": format!("{}.{name}", pod.name) },
        "involvedObject": { "kind": "Pod", "apiVersion": "v1", "namespace": kube.name, "name": pod.name, "uid": pod.uid },
        "reason": "Failed", "message": name, "type": "Warning",
        "source": { "component": "kubelet", "host": kube.name }, "reportingComponent": "kubelet",
        "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:00:00Z", "count": 1,
    });
    for (key, value) in change.as_object().unwrap() {
        match value.as_object() {
            Some(fields) => event[key].as_object_mut().unwrap().extend(fields.clone()),
            None => event[key] = value.clone(),
        }
    }
    create::<Event>(&Api::namespaced(kube.admin.clone(), &kube.name), event).await;
}

fn expected_event(container: Option<&str>, reason: &str, message: &str) -> KubeletEvent {
    KubeletEvent { reason: reason.to_owned(), container: container.map(str::to_owned), message: message.to_owned() }
}

#[tokio::test]
async fn kubelet_events_of_a_pod_are_read_in_order() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let pod = kube.pod("web").await;
        let agent = kube.agent().await;
        assert_eq!(agent.kubelet_events(&pod).await.unwrap(), []);
        // The API server lists Events by name, and the times have another order. The times are in
        // the future, because a time before the creation of the Event object does not count.
        let year = |year: u32| format!("{year}-01-01T00:00:00Z");
        let field = |path: &str| json!({ "fieldPath": path });
        let init = json!({ "involvedObject": field("spec.initContainers{migrate}"), "lastTimestamp": year(2103) });
        event(&kube, &pod, "a", init).await;
        let sandbox = json!({ "reason": "FailedCreatePodSandBox", "lastTimestamp": year(2101) });
        event(&kube, &pod, "b", sandbox).await;
        let web = json!({ "involvedObject": field("spec.containers{web}"), "lastTimestamp": year(2102), "count": 3 });
        event(&kube, &pod, "c", web).await;

        let other = kube.pod("other").await;
        event(&kube, &other, "d", json!({})).await;
        event(&kube, &pod, "e", json!({ "involvedObject": { "uid": "an-earlier-pod" } })).await;
        let scheduler =
            json!({ "source": { "component": "default-scheduler" }, "reportingComponent": "default-scheduler" });
        event(&kube, &pod, "f", scheduler).await;
        agent.report(&pod, &PodReport { kind: PodReportKind::Failed, note: "ours".to_owned() }).await.unwrap();

        let expected = [
            expected_event(None, "FailedCreatePodSandBox", "b"),
            expected_event(Some("web"), "Failed", "c"),
            expected_event(Some("migrate"), "Failed", "a"),
        ];
        assert_eq!(agent.kubelet_events(&pod).await.unwrap(), expected);
    })
    .await;
}

#[tokio::test]
async fn events_of_a_static_pod_carry_the_uid_of_its_kubelet() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let mirror = json!({
            "metadata": { "name": "etcd", "annotations": { "kubernetes.io/config.mirror": "0123abc" } },
            "spec": { "nodeName": kube.name, "containers": [{ "name": "etcd", "image": "reg.test/etcd:1" }] },
        });
        create::<Pod>(&kube.pods(), mirror).await;
        let agent = Arc::new(kube.agent().await);
        let mut watch = PodWatch::start(agent.clone());
        let PodEvent::Applied(view) = watch.next().await else { panic!("the static pod is seen") };
        assert!(view.is_static);
        assert_ne!(view.pod.uid, "0123abc");

        event(&kube, &view.pod, "a", json!({ "involvedObject": { "uid": "0123abc" } })).await;
        assert_eq!(agent.kubelet_events(&view.pod).await.unwrap(), [expected_event(None, "Failed", "a")]);

        agent.report(&view.pod, &PodReport { kind: PodReportKind::Recovered, note: "here".to_owned() }).await.unwrap();
        let description = kube.describe_pod("etcd").await;
        assert!(description.contains("ImageRecovered"), "{description}");
        agent.nudge(&view.pod).await.unwrap();
    })
    .await;
}
