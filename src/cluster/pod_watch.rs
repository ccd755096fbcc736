//! The watch of this node's pods.

use std::pin::pin;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::{WatchStreamExt, watcher};
use rand::Rng;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::KubeCluster;
use super::pod_view::pod_view;
use crate::api_server::error::error_chain;
use crate::model::{NodeName, PodEvent, PodRef};

impl KubeCluster {
    /// Sends every event of this node's pods to `out` until `stop`, or until the receiver closes.
    /// While `out` is full the watch waits: the API server then ends the watch, and the agent
    /// resumes at the last resource version.
    pub async fn watch_pods(&self, sender: mpsc::Sender<PodEvent>, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            let jitter = rand::rng().random_range(0.0..=1.0);
            tokio::time::sleep(self.start_jitter.mul_f64(jitter)).await;
            self.watch(sender).await;
        })
        .await;
    }

    /// Whether the first list of this node's pods is complete. The value stays true when the API
    /// server becomes unreachable later: the agent works without the API server too.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    async fn watch(&self, sender: mpsc::Sender<PodEvent>) {
        let pods = Api::<Pod>::all(self.client.clone());
        // kube's back-off: 0.8 s to 30 s, with jitter. After two minutes without an error the next
        // error starts at 0.8 s again.
        let mut events = pin!(watcher(pods, watch_config(&self.agent_pod.node)).default_backoff());
        let mut listed = Vec::new();
        while let Some(event) = events.next().await {
            let event = match event {
                Ok(event) => event,
                Err(error) => {
                    tracing::warn!(node = %self.agent_pod.node, error = error_chain(&error), "the watch of this node's pods failed; the agent retries");
                    continue;
                }
            };
            let Some(event) = translate(event, &mut listed) else { continue };
            self.mirror_pods.apply_event(&event);
            self.own_pod.apply_event(&self.agent_pod, &event);
            let is_synced = matches!(event, PodEvent::Synced(_));
            if sender.send(event).await.is_err() {
                return;
            }
            if is_synced {
                self.synced.send_replace(true);
            }
        }
    }
}

/// This node's pods, from the API server's watch cache.
///
/// The list has one page. With pages, kube omits `resourceVersion=0`, and the list becomes a quorum
/// read, for which etcd reads every pod of the cluster. A node has a few hundred pods at most (the
/// kubelet's default limit is 110).
fn watch_config(node: &NodeName) -> watcher::Config {
    let mut selection = watcher::Config::default().fields(&format!("spec.nodeName={node}")).any_semantic();
    selection.page_size = None;
    selection
}

/// `listed` collects the pods of a list until the list is complete.
fn translate(event: watcher::Event<Pod>, listed: &mut Vec<PodRef>) -> Option<PodEvent> {
    match event {
        watcher::Event::Init => {
            listed.clear();
            None
        }
        watcher::Event::InitApply(pod) => {
            let view = pod_view(pod)?;
            listed.push(view.pod.clone());
            Some(PodEvent::Applied(Box::new(view)))
        }
        watcher::Event::InitDone => Some(PodEvent::Synced(std::mem::take(listed))),
        watcher::Event::Apply(pod) => pod_view(pod).map(|view| PodEvent::Applied(Box::new(view))),
        watcher::Event::Delete(pod) => pod_view(pod).map(|view| PodEvent::Deleted(view.pod)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    fn pod(name: &str) -> Pod {
        let name = Some(name.to_owned());
        let metadata = ObjectMeta { name: name.clone(), namespace: name.clone(), uid: name, ..ObjectMeta::default() };
        Pod { metadata, ..Pod::default() }
    }

    #[test]
    fn an_interrupted_pod_list_starts_again() {
        let mut listed = Vec::new();
        let mut names = |events: Vec<watcher::Event<Pod>>| {
            let events: Vec<_> = events.into_iter().filter_map(|event| translate(event, &mut listed)).collect();
            match events.last() {
                Some(PodEvent::Synced(pods)) => pods.iter().map(|pod| pod.name.clone()).collect(),
                _ => vec!["not synced".to_owned()],
            }
        };
        use watcher::Event::{Init, InitApply, InitDone};
        assert_eq!(names(vec![Init, InitApply(pod("a"))]), ["not synced"]);
        assert_eq!(names(vec![Init, InitApply(pod("b")), InitDone]), ["b"]);
        assert_eq!(names(vec![Init, InitDone]), Vec::<String>::new());
    }

    #[test]
    fn this_nodes_pods_are_listed_without_a_quorum_read() {
        let selection = watch_config(&"node-1".parse().unwrap());
        assert_eq!(selection.field_selector.as_deref(), Some("spec.nodeName=node-1"));
        let list = kube::api::ListParams::default().fields("spec.nodeName=node-1").match_any();
        assert_eq!(selection.list_semantic, watcher::ListSemantic::Any);
        // With a limit, this request would lack its resource version; see `watch_config`.
        let request = kube::core::Request::new("/api/v1/pods").list(&list).unwrap();
        assert_eq!(selection.page_size, list.limit);
        assert!(request.uri().query().unwrap().contains("resourceVersion=0"), "{}", request.uri());
    }
}
