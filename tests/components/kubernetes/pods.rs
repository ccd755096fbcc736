//! Watch, nudge and deletion of pods, and metadata of namespaces.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use lighterman::api_server::connect;
use lighterman::cluster::KubeCluster;
use lighterman::model::{ContainerKind, ImageVolume, PodEvent, PodRef, PullPolicy};
use lighterman::ports::{ClusterError, PodReader, PodWriter};
use serde_json::json;

use super::apiserver::{KubeNamespace, create, requests, with_deadline};
use super::pod_watch::PodWatch;
use super::proxy::Proxy;

fn applied_pod(event: &PodEvent) -> Option<&PodRef> {
    match event {
        PodEvent::Applied(view) => Some(&view.pod),
        _ => None,
    }
}

#[tokio::test]
async fn pods_of_this_node_are_seen_and_no_others() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let first_pod = kube.pod("here").await;
        kube.pod_on("elsewhere", "another-node").await;
        let agent = kube.agent().await;
        let synced = agent.synced();
        let mut watch = PodWatch::start(agent);

        assert_eq!(applied_pod(&watch.next().await), Some(&first_pod));
        assert_eq!(watch.next().await, PodEvent::Synced(vec![first_pod.clone()]));
        let mut synced = synced;
        synced.wait_for(|synced| *synced).await.unwrap();

        kube.pod_on("elsewhere-later", "another-node").await;
        let later = kube.pod("later").await;
        assert_eq!(applied_pod(&watch.next().await), Some(&later));

        let waiting = json!({ "status": { "containerStatuses": [{
            "name": "main", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "waiting": { "reason": "ErrImagePull", "message": "connection refused" } },
        }] } });
        kube.pods().patch_status("here", &PatchParams::default(), &Patch::Strategic(waiting)).await.unwrap();
        let PodEvent::Applied(view) = watch.next().await else { panic!("a changed pod is seen") };
        let waiting = view.containers[0].waiting.as_ref().expect("the container waits");
        assert_eq!((view.pod, waiting.reason.as_str()), (first_pod.clone(), "ErrImagePull"));
        assert_eq!(view.containers[0].image, "reg.test/app:1");

        kube.delete_pod("here").await;
        assert_eq!(watch.wait_event(|event| matches!(event, PodEvent::Deleted(_))).await, PodEvent::Deleted(first_pod));

        watch.stop().await;
    })
    .await;
}

#[tokio::test]
async fn every_kind_of_container_is_seen_to_wait() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        // API servers before 1.29 drop restart policies of init containers, or have no ephemeral
        // containers.
        if kube.minor().await < 29 {
            return;
        }
        let container = |name: &str| json!({ "name": name, "image": format!("reg.test/{name}:1") });
        let mut sidecar = container("sidecar");
        sidecar["restartPolicy"] = "Always".into();
        let pod = json!({
            "metadata": { "name": "web" },
            "spec": {
                "nodeName": kube.name, "containers": [container("ordinary")],
                "initContainers": [container("init"), sidecar], "imagePullSecrets": [{ "name": "regcred" }],
            },
        });
        create::<Pod>(&kube.pods(), pod).await;
        let debug = Patch::Strategic(json!({ "spec": { "ephemeralContainers": [container("ephemeral")] } }));
        kube.pods().patch_ephemeral_containers("web", &PatchParams::default(), &debug).await.unwrap();
        let waiting_status = |name: &str| {
            json!({
                "name": name, "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "waiting": { "reason": "ImagePullBackOff", "message": name } },
            })
        };
        let status = json!({ "status": {
            "initContainerStatuses": [waiting_status("init"), waiting_status("sidecar")],
            "containerStatuses": [waiting_status("ordinary")], "ephemeralContainerStatuses": [waiting_status("ephemeral")],
        } });
        kube.pods().patch_status("web", &PatchParams::default(), &Patch::Strategic(status)).await.unwrap();

        let view = PodWatch::start(kube.agent().await).wait_pod(|_| true).await;
        let waiting_containers: Vec<_> = view
            .containers
            .iter()
            .map(|container| {
                assert_eq!(container.image, format!("reg.test/{}:1", container.name));
                (container.kind, container.waiting.as_ref().expect("the container waits").message.as_str())
            })
            .collect();
        let expected = [
            (ContainerKind::Init, "init"),
            (ContainerKind::Init, "sidecar"),
            (ContainerKind::Ordinary, "ordinary"),
            (ContainerKind::Ephemeral, "ephemeral"),
        ];
        assert_eq!(waiting_containers, expected);
        assert_eq!((view.pull_secrets, view.owner, view.is_static), (vec!["regcred".to_owned()], None, false));
    })
    .await;
}

#[tokio::test]
async fn image_volumes_are_seen() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        // Image volumes are enabled by default from 1.35 on.
        if kube.minor().await < 35 {
            return;
        }
        let volume = |name: &str, image: &str| json!({ "name": name, "image": { "reference": image } });
        let pod = json!({
            "metadata": { "name": "web" },
            "spec": {
                "nodeName": kube.name, "containers": [{ "name": "main", "image": "reg.test/app:1" }],
                "volumes": [{ "name": "scratch", "emptyDir": {} }, volume("model", "reg.test/model:1"), volume("data", "reg.test/data")],
            },
        });
        create::<Pod>(&kube.pods(), pod).await;
        let view = PodWatch::start(kube.agent().await).wait_pod(|_| true).await;
        let image_volume = |name: &str, image: &str, pull_policy| ImageVolume { name: name.into(), image: image.into(), pull_policy };
        let expected = [
            image_volume("model", "reg.test/model:1", PullPolicy::IfNotPresent),
            image_volume("data", "reg.test/data", PullPolicy::Always),
        ];
        assert_eq!(view.image_volumes, expected);
    })
    .await;
}

#[tokio::test]
async fn the_watch_asks_for_one_nodes_pods_from_the_watch_cache() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let mut watch = PodWatch::start(kube.agent().await);
        watch.wait_event(|event| matches!(event, PodEvent::Synced(_))).await;
        kube.pod("a").await;
        watch.next().await;
        watch.stop().await;
        let is_ours = |uri: &str| uri.contains(&format!("spec.nodeName%3D{}&", kube.name)) || uri.ends_with(&kube.name);
        let of_node = || requests().into_iter().filter(|(_, uri)| is_ours(uri)).collect::<Vec<_>>();
        // The API server logs a watch at the end of the watch.
        while of_node().len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let requests = of_node();
        let (agent, list) = requests.iter().find(|(_, uri)| !uri.contains("watch=true")).expect("a list");
        assert_eq!(agent, concat!("lighterman/", env!("CARGO_PKG_VERSION")));
        assert!(list.contains("resourceVersion=0&") && !list.contains("limit="), "{list}");
        for (_, uri) in &requests {
            assert!(uri.starts_with("/api/v1/pods?"), "{uri}");
        }
    })
    .await;
}

#[tokio::test]
async fn the_watch_resumes_when_the_api_server_is_back() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let first = kube.pod("first").await;
        let proxy = Proxy::open().await;
        let config = kube.config_with(proxy.port(), "admin-of-the-tests");
        let agent = KubeCluster::new(&connect(config).await.unwrap());
        let synced = agent.synced();
        let mut watch = PodWatch::start(agent);
        watch.wait_event(|event| *event == PodEvent::Synced(vec![first.clone()])).await;

        let port = proxy.close().await;
        let second = kube.pod("second").await;
        let _proxy = Proxy::open_on(port).await;
        watch.wait_event(|event| applied_pod(event) == Some(&second)).await;
        assert!(*synced.borrow());
    })
    .await;
}

#[tokio::test]
async fn an_agent_starts_while_the_api_server_is_away() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let port = Proxy::open().await.close().await;
        let agent = KubeCluster::new(&connect(kube.config_with(port, "admin-of-the-tests")).await.unwrap());
        assert!(matches!(agent.namespace(&kube.name).await, Err(ClusterError::Unavailable(_))));
        let synced = agent.synced();
        let mut watch = PodWatch::start(agent);
        assert!(!*synced.borrow());
        let _proxy = Proxy::open_on(port).await;
        watch.wait_event(|event| *event == PodEvent::Synced(Vec::new())).await;
    })
    .await;
}

#[tokio::test]
async fn a_nudge_changes_one_annotation_and_nothing_else() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let pod = kube.pod("web").await;
        let agent = kube.agent().await;
        let before = kube.pods().get("web").await.unwrap();
        agent.nudge(&pod).await.unwrap();
        let mut after = kube.pods().get("web").await.unwrap();
        let annotations = after.metadata.annotations.take().unwrap();
        assert_eq!(annotations.keys().collect::<Vec<_>>(), ["lighterman.dev/nudged-at"]);
        assert_eq!((&after.spec, &after.status), (&before.spec, &before.status));
        assert_eq!(after.metadata.labels, before.metadata.labels);

        agent.nudge(&pod).await.unwrap();
        let again = kube.pods().get("web").await.unwrap().metadata.annotations.unwrap();
        assert_ne!(again, annotations, "a patch without a change would not reach the kubelet");
    })
    .await;
}

#[tokio::test]
async fn a_pod_that_was_replaced_is_not_nudged() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let old = kube.pod("web").await;
        let agent = kube.agent().await;
        kube.delete_pod("web").await;
        assert!(matches!(agent.nudge(&old).await, Err(ClusterError::Gone(_))), "deleted");
        kube.pod("web").await;
        assert!(matches!(agent.nudge(&old).await, Err(ClusterError::Gone(_))), "another of that name");
        assert_eq!(kube.pods().get("web").await.unwrap().metadata.annotations, None);
    })
    .await;
}

#[tokio::test]
async fn only_the_pod_with_the_right_uid_is_deleted() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let old = kube.pod("web").await;
        let agent = kube.agent().await;
        kube.delete_pod("web").await;
        assert!(matches!(agent.delete(&old).await, Err(ClusterError::Gone(_))), "deleted");
        let new = kube.pod("web").await;
        assert!(matches!(agent.delete(&old).await, Err(ClusterError::Gone(_))), "another of that name");
        let deletion_time = || async { kube.pods().get("web").await.unwrap().metadata.deletion_timestamp };
        assert_eq!(deletion_time().await, None);
        agent.delete(&new).await.unwrap();
        assert!(deletion_time().await.is_some(), "the pod stays until the kubelet confirms");
    })
    .await;
}

#[tokio::test]
async fn a_namespaces_labels_and_annotations_are_read() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let agent = kube.agent().await;
        let namespace = agent.namespace(&kube.name).await.unwrap();
        assert_eq!(namespace.annotations["lighterman.dev/enabled"], "true");
        assert_eq!(namespace.labels["kubernetes.io/metadata.name"], kube.name);
        assert!(matches!(agent.namespace("nowhere").await, Err(ClusterError::Gone(_))));
    })
    .await;
}
