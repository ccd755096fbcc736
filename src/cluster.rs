//! The Kubernetes API: the watch of this node's pods, the owners of pods, the nudge, Events, claims
//! as Leases, and admission by ServiceAccount token.
//!
//! The agent never reads pods of other nodes, and writes no field of a pod but one annotation. Pull
//! secrets and the deletion of pods need rights that the chart gives only on request. Not here:
//! decisions ([`crate::decide`]), and admission by certificate or by a list of PeerIds
//! ([`crate::admission`]).

mod claims;
mod clock;
mod kubelet_events;
mod metadata;
mod mirror_pods;
mod namespaces;
mod node_events;
mod node_metadata;
mod nudge;
mod own_image;
mod owners;
mod pod_deletion;
mod pod_events;
mod pod_view;
mod pod_watch;
mod response_cache;
mod secrets;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use kube::Client;
use tokio::sync::watch;

use crate::api_server::{AgentPod, ApiServer};
use crate::decide::clock_skew::ClockSample;
use crate::model::{Annotations, KubeletEvent, NamespaceView, NodeName, Owner, PodRef, PodReport, Zone};
use crate::ports::{ClusterError, NodeReport, Nodes, PodReader, PodWriter, PullSecret};

/// This agent's client of the API server.
pub struct KubeCluster {
    client: Client,
    agent_pod: AgentPod,
    start_jitter: Duration,
    synced: watch::Sender<bool>,
    namespaces: namespaces::Namespaces,
    owners: owners::Owners,
    mirror_pods: mirror_pods::MirrorPods,
    own_pod: own_image::OwnPodTracker,
    events: pod_events::EventRecorder,
}

impl KubeCluster {
    /// Uses this connection. No request is sent.
    pub fn new(api_server: &ApiServer) -> Self {
        let ApiServer { client, agent_pod, start_jitter } = api_server.clone();
        Self {
            namespaces: namespaces::Namespaces::new(client.clone()),
            owners: owners::Owners::new(client.clone()),
            mirror_pods: mirror_pods::MirrorPods::default(),
            own_pod: own_image::OwnPodTracker::default(),
            events: pod_events::EventRecorder::new(client.clone(), agent_pod.node.clone()),
            synced: watch::Sender::new(false),
            client,
            agent_pod,
            start_jitter,
        }
    }
}

#[async_trait]
impl PodReader for KubeCluster {
    async fn namespace(&self, k8s_namespace: &str) -> Result<Arc<NamespaceView>, ClusterError> {
        self.namespaces.namespace(k8s_namespace).await
    }

    async fn owners(&self, k8s_namespace: &str, owner: &Owner) -> Result<Vec<Arc<Annotations>>, ClusterError> {
        self.owners.ancestor_annotations(k8s_namespace, owner).await
    }

    async fn kubelet_events(&self, pod: &PodRef) -> Result<Vec<KubeletEvent>, ClusterError> {
        kubelet_events::kubelet_events(&self.client, pod, &self.mirror_pods.kubelet_uid(pod)).await
    }

    async fn pull_secret(&self, k8s_namespace: &str, name: &str) -> Result<PullSecret, ClusterError> {
        secrets::pull_secret(&self.client, k8s_namespace, name).await
    }
}

#[async_trait]
impl PodWriter for KubeCluster {
    async fn delete(&self, pod: &PodRef) -> Result<(), ClusterError> {
        pod_deletion::delete_pod(&self.client, pod).await
    }

    async fn nudge(&self, pod: &PodRef) -> Result<(), ClusterError> {
        nudge::nudge(&self.client, pod).await
    }

    async fn report(&self, pod: &PodRef, report: &PodReport) -> Result<(), ClusterError> {
        self.events.report(pod, &self.mirror_pods.kubelet_uid(pod), report).await
    }
}

#[async_trait]
impl Nodes for KubeCluster {
    async fn zone(&self) -> Result<Option<Zone>, ClusterError> {
        node_metadata::zone(&self.client, &self.agent_pod.node).await
    }

    async fn report_on_node(&self, report: &NodeReport) -> Result<(), ClusterError> {
        node_events::report(&self.client, &self.agent_pod.node, report).await
    }

    async fn node_created(&self, node: &NodeName) -> Result<SystemTime, ClusterError> {
        node_metadata::creation_time(&self.client, node).await
    }

    async fn clock(&self) -> Result<ClockSample, ClusterError> {
        clock::sample_clock(&self.client).await
    }
}
