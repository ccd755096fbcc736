//! The watch and the nudge.

use std::time::Duration;

use kube::api::{Patch, PatchParams};
use lighterman::cluster::{KubeCluster, connect};
use lighterman::model::PodRef;
use lighterman::ports::{Cluster, ClusterError, PodEvent};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::apiserver::{Place, pod_requests, within};
use super::proxy::Proxy;

/// A running watch. Dropped, it ends.
struct Watch {
    events: mpsc::Receiver<PodEvent>,
    stop: CancellationToken,
    task: JoinSet<()>,
}

impl Watch {
    fn start(agent: KubeCluster) -> Self {
        let (out, events) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let mut task = JoinSet::new();
        let stopped = stop.clone();
        task.spawn(async move { agent.watch_pods(out, stopped).await });
        Self { events, stop, task }
    }

    async fn next(&mut self) -> PodEvent {
        self.events.recv().await.expect("the watch goes on")
    }

    async fn until(&mut self, wanted: impl Fn(&PodEvent) -> bool) -> PodEvent {
        loop {
            let event = self.next().await;
            if wanted(&event) {
                return event;
            }
        }
    }
}

fn seen(event: &PodEvent) -> Option<&PodRef> {
    match event {
        PodEvent::Seen(view) => Some(&view.pod),
        _ => None,
    }
}

#[tokio::test]
async fn pods_of_this_node_are_seen_and_no_others() {
    within(async {
        let place = Place::new().await;
        let here = place.pod("here").await;
        place.pod_on("elsewhere", "another-node").await;
        let agent = place.agent().await;
        let synced = agent.synced();
        let mut watch = Watch::start(agent);

        assert_eq!(seen(&watch.next().await), Some(&here));
        assert_eq!(watch.next().await, PodEvent::Synced(vec![here.clone()]));
        let mut synced = synced;
        synced.wait_for(|synced| *synced).await.unwrap();

        place.pod_on("elsewhere-later", "another-node").await;
        let later = place.pod("later").await;
        assert_eq!(seen(&watch.next().await), Some(&later));

        let waiting = json!({ "status": { "containerStatuses": [{
            "name": "main", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "waiting": { "reason": "ErrImagePull", "message": "connection refused" } },
        }] } });
        place.pods().patch_status("here", &PatchParams::default(), &Patch::Strategic(waiting)).await.unwrap();
        let PodEvent::Seen(view) = watch.next().await else { panic!("a changed pod is seen") };
        let waiting = view.containers[0].waiting.as_ref().expect("it waits");
        assert_eq!((view.pod, waiting.reason.as_str()), (here.clone(), "ErrImagePull"));
        assert_eq!(view.containers[0].image, "reg.test/app:1");

        place.delete_pod("here").await;
        assert_eq!(watch.until(|event| matches!(event, PodEvent::Gone(_))).await, PodEvent::Gone(here));

        watch.stop.cancel();
        watch.task.join_next().await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_watch_asks_for_one_nodes_pods_from_the_watch_cache() {
    within(async {
        let place = Place::new().await;
        let mut watch = Watch::start(place.agent().await);
        watch.until(|event| matches!(event, PodEvent::Synced(_))).await;
        place.pod("a").await;
        watch.next().await;
        watch.stop.cancel();
        watch.task.join_next().await.unwrap().unwrap();
        let ours = |uri: &str| uri.contains(&format!("spec.nodeName%3D{}&", place.name)) || uri.ends_with(&place.name);
        let requests = || pod_requests().into_iter().filter(|(_, uri)| ours(uri)).collect::<Vec<_>>();
        // A watch is logged when it has ended.
        while requests().len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let requests = requests();
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
async fn the_watch_goes_on_when_the_api_server_is_back() {
    within(async {
        let place = Place::new().await;
        let first = place.pod("first").await;
        let proxy = Proxy::open().await;
        let config = place.config_with(proxy.port(), "admin-of-the-tests");
        let agent = connect(config).await.unwrap();
        let synced = agent.synced();
        let mut watch = Watch::start(agent);
        watch.until(|event| *event == PodEvent::Synced(vec![first.clone()])).await;

        let port = proxy.cut().await;
        let second = place.pod("second").await;
        let _proxy = Proxy::open_on(port).await;
        watch.until(|event| seen(event) == Some(&second)).await;
        assert!(*synced.borrow());
    })
    .await;
}

#[tokio::test]
async fn an_agent_starts_while_the_api_server_is_away() {
    within(async {
        let place = Place::new().await;
        let port = Proxy::open().await.cut().await;
        let agent = connect(place.config_with(port, "admin-of-the-tests")).await.unwrap();
        assert!(matches!(agent.namespace_annotations(&place.name).await, Err(ClusterError::Unavailable(_))));
        let synced = agent.synced();
        let mut watch = Watch::start(agent);
        assert!(!*synced.borrow());
        let _proxy = Proxy::open_on(port).await;
        watch.until(|event| *event == PodEvent::Synced(Vec::new())).await;
    })
    .await;
}

#[tokio::test]
async fn a_nudge_changes_one_annotation_and_nothing_else() {
    within(async {
        let place = Place::new().await;
        let pod = place.pod("web").await;
        let agent = place.agent().await;
        let before = place.pods().get("web").await.unwrap();
        agent.nudge(&pod).await.unwrap();
        let mut after = place.pods().get("web").await.unwrap();
        let annotations = after.metadata.annotations.take().unwrap();
        assert_eq!(annotations.keys().collect::<Vec<_>>(), ["lighterman.dev/nudged-at"]);
        assert_eq!((&after.spec, &after.status), (&before.spec, &before.status));
        assert_eq!(after.metadata.labels, before.metadata.labels);

        agent.nudge(&pod).await.unwrap();
        let again = place.pods().get("web").await.unwrap().metadata.annotations.unwrap();
        assert_ne!(again, annotations, "the same value again would wake nobody");
    })
    .await;
}

#[tokio::test]
async fn a_pod_that_was_replaced_is_not_nudged() {
    within(async {
        let place = Place::new().await;
        let old = place.pod("web").await;
        let agent = place.agent().await;
        place.delete_pod("web").await;
        assert!(matches!(agent.nudge(&old).await, Err(ClusterError::Gone(_))), "deleted");
        place.pod("web").await;
        assert!(matches!(agent.nudge(&old).await, Err(ClusterError::Gone(_))), "another of that name");
        assert_eq!(place.pods().get("web").await.unwrap().metadata.annotations, None);
    })
    .await;
}

#[tokio::test]
async fn a_namespaces_annotations_are_read() {
    within(async {
        let place = Place::new().await;
        let agent = place.agent().await;
        let annotations = agent.namespace_annotations(&place.name).await.unwrap();
        assert_eq!(annotations["lighterman.dev/enabled"], "true");
        assert!(matches!(agent.namespace_annotations("nowhere").await, Err(ClusterError::Gone(_))));
    })
    .await;
}
