//! A cluster in memory: namespaces, Events, nudges and Leases, shared by the agents of one process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::broadcast;

use crate::decide::clock_skew::ClockSample;
use crate::model::{
    Annotations, KubeletEvent, LeaseSnapshot, LeaseVersion, NamespaceView, NodeName, Owner, PodRef, PodReport, Zone,
};
use crate::oci::Digest;
use crate::ports::{ClaimError, Claims, ClusterError, NodeReport, Nodes, PodReader, PodWriter, PullSecret};

/// The cluster. Clones share state.
#[derive(Clone)]
pub struct MemoryCluster {
    state: Arc<Mutex<State>>,
    nudges: broadcast::Sender<PodRef>,
}

#[derive(Default)]
struct State {
    namespaces: BTreeMap<String, Arc<NamespaceView>>,
    owners: BTreeMap<(String, Owner), Vec<Arc<Annotations>>>,
    kubelet_events: BTreeMap<PodRef, Vec<KubeletEvent>>,
    pull_secrets: BTreeMap<(String, String), PullSecret>,
    zone: Option<Zone>,
    deleted: Vec<PodRef>,
    reports: Vec<(PodRef, PodReport)>,
    node_reports: Vec<NodeReport>,
    nodes: BTreeMap<NodeName, SystemTime>,
    /// Seconds that nodes' clocks are ahead of this cluster's.
    clocks_ahead: i64,
    leases: BTreeMap<Digest, LeaseSnapshot>,
    versions: u64,
    is_unavailable: bool,
    is_forbidden: bool,
    /// Delay of each answer about a namespace.
    namespace_delay: Duration,
}

impl Default for MemoryCluster {
    fn default() -> Self {
        // Holds the nudges of one burst; receivers keep up.
        Self { state: Arc::default(), nudges: broadcast::Sender::new(256) }
    }
}

impl MemoryCluster {
    /// Creates a namespace, or replaces its annotations.
    pub fn put_namespace(&self, name: &str, annotations: &[(&str, &str)]) {
        let annotations = annotations.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        self.lock().namespaces.insert(name.into(), Arc::new(NamespaceView { labels: BTreeMap::new(), annotations }));
    }

    /// Replaces a namespace's labels.
    pub fn label_namespace(&self, name: &str, labels: &[(&str, &str)]) {
        let labels = labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let mut state = self.lock();
        let namespace = state.namespaces.entry(name.into()).or_default();
        Arc::make_mut(namespace).labels = labels;
    }

    /// Sets the annotations of an owner and of the owners above, the nearest first.
    pub fn put_owners(&self, k8s_namespace: &str, owner: &Owner, annotations: Vec<Annotations>) {
        let annotations = annotations.into_iter().map(Arc::new).collect();
        self.lock().owners.insert((k8s_namespace.into(), owner.clone()), annotations);
    }

    /// Adds an Event of the kubelet on a pod.
    pub fn put_kubelet_event(&self, pod: &PodRef, event: KubeletEvent) {
        self.lock().kubelet_events.entry(pod.clone()).or_default().push(event);
    }

    /// Creates a pull secret.
    pub fn put_pull_secret(&self, k8s_namespace: &str, name: &str, secret: PullSecret) {
        self.lock().pull_secrets.insert((k8s_namespace.into(), name.into()), secret);
    }

    /// Puts every node into this zone.
    pub fn put_zone(&self, zone: Zone) {
        self.lock().zone = Some(zone);
    }

    /// Deleted pods so far.
    pub fn deleted(&self) -> Vec<PodRef> {
        self.lock().deleted.clone()
    }

    /// Receives every later nudge.
    pub fn nudges(&self) -> broadcast::Receiver<PodRef> {
        self.nudges.subscribe()
    }

    /// Events on pods so far.
    pub fn reports(&self) -> Vec<(PodRef, PodReport)> {
        self.lock().reports.clone()
    }

    /// Events on nodes so far.
    pub fn node_reports(&self) -> Vec<NodeReport> {
        self.lock().node_reports.clone()
    }

    /// Creates a node, so many seconds after 1970.
    pub fn put_node(&self, node: NodeName, created: u64) {
        self.lock().nodes.insert(node, SystemTime::UNIX_EPOCH + Duration::from_secs(created));
    }

    /// Sets the clocks of all nodes ahead of this cluster's, by so many seconds.
    pub fn set_clocks_ahead(&self, seconds: i64) {
        self.lock().clocks_ahead = seconds;
    }

    /// Starts or ends an outage of the API server.
    pub fn set_unavailable(&self, is_unavailable: bool) {
        self.lock().is_unavailable = is_unavailable;
    }

    /// Delays every answer about a namespace from now on, as a slow API server does.
    pub fn delay_namespaces(&self, delay: Duration) {
        self.lock().namespace_delay = delay;
    }

    /// Denies nudges and deletions from now on, as for an agent without the rights, or permits them
    /// again.
    pub fn set_forbidden(&self, is_forbidden: bool) {
        self.lock().is_forbidden = is_forbidden;
    }

    /// Claims of one node.
    pub fn claims_of(&self, node: NodeName) -> MemoryClaims {
        MemoryClaims { cluster: self.clone(), node }
    }

    /// Number of Lease writes so far, and the present holder of each Lease.
    pub fn leases(&self) -> (u64, BTreeMap<Digest, Option<String>>) {
        let state = self.lock();
        (state.versions, state.leases.iter().map(|(digest, lease)| (*digest, lease.holder.clone())).collect())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn available_state(&self) -> Result<MutexGuard<'_, State>, ClusterError> {
        let state = self.lock();
        if state.is_unavailable { Err(ClusterError::Unavailable("the API server is away".into())) } else { Ok(state) }
    }

    fn permitted_state(&self) -> Result<MutexGuard<'_, State>, ClusterError> {
        let state = self.available_state()?;
        if state.is_forbidden { Err(ClusterError::Forbidden("pods is forbidden".into())) } else { Ok(state) }
    }
}

#[async_trait]
impl PodReader for MemoryCluster {
    async fn namespace(&self, name: &str) -> Result<Arc<NamespaceView>, ClusterError> {
        let delay = self.lock().namespace_delay;
        tokio::time::sleep(delay).await;
        let state = self.available_state()?;
        state.namespaces.get(name).cloned().ok_or_else(|| ClusterError::Gone(format!("namespace {name}")))
    }

    async fn owners(&self, k8s_namespace: &str, owner: &Owner) -> Result<Vec<Arc<Annotations>>, ClusterError> {
        let state = self.available_state()?;
        Ok(state.owners.get(&(k8s_namespace.to_owned(), owner.clone())).cloned().unwrap_or_default())
    }

    async fn kubelet_events(&self, pod: &PodRef) -> Result<Vec<KubeletEvent>, ClusterError> {
        Ok(self.available_state()?.kubelet_events.get(pod).cloned().unwrap_or_default())
    }

    async fn pull_secret(&self, k8s_namespace: &str, name: &str) -> Result<PullSecret, ClusterError> {
        let secrets = &self.available_state()?.pull_secrets;
        let secret = secrets.get(&(k8s_namespace.to_owned(), name.to_owned())).cloned();
        secret.ok_or_else(|| ClusterError::Gone(format!("secret {k8s_namespace}/{name}")))
    }
}

#[async_trait]
impl PodWriter for MemoryCluster {
    async fn delete(&self, pod: &PodRef) -> Result<(), ClusterError> {
        self.permitted_state()?.deleted.push(pod.clone());
        Ok(())
    }

    async fn nudge(&self, pod: &PodRef) -> Result<(), ClusterError> {
        drop(self.permitted_state()?);
        // A nudge without a receiver is lost; the port promises no delivery.
        let _ = self.nudges.send(pod.clone());
        Ok(())
    }

    async fn report(&self, pod: &PodRef, report: &PodReport) -> Result<(), ClusterError> {
        self.available_state()?.reports.push((pod.clone(), report.clone()));
        Ok(())
    }
}

#[async_trait]
impl Nodes for MemoryCluster {
    async fn zone(&self) -> Result<Option<Zone>, ClusterError> {
        Ok(self.available_state()?.zone.clone())
    }

    async fn report_on_node(&self, report: &NodeReport) -> Result<(), ClusterError> {
        self.available_state()?.node_reports.push(report.clone());
        Ok(())
    }

    async fn node_created(&self, node: &NodeName) -> Result<SystemTime, ClusterError> {
        let created = self.available_state()?.nodes.get(node).copied();
        created.ok_or_else(|| ClusterError::Gone(format!("node {node}")))
    }

    async fn clock(&self) -> Result<ClockSample, ClusterError> {
        let ahead = self.available_state()?.clocks_ahead;
        let now = crate::util::clock::unix_time();
        let date = now.as_secs().saturating_add_signed(-ahead);
        Ok(ClockSample { sent: now, took: Duration::ZERO, received: now, date: Duration::from_secs(date) })
    }
}

/// The Leases of a [`MemoryCluster`], as one node writes them.
#[derive(Clone)]
pub struct MemoryClaims {
    cluster: MemoryCluster,
    node: NodeName,
}

impl MemoryClaims {
    fn available_state(&self) -> Result<MutexGuard<'_, State>, ClaimError> {
        self.cluster.available_state().map_err(|error| ClaimError::Unavailable(error.to_string()))
    }

    fn write(&self, state: &mut State, digest: Digest, now: SystemTime) {
        state.versions += 1;
        let version = LeaseVersion(state.versions.to_string());
        let lease = LeaseSnapshot { holder: Some(self.node.to_string()), renewed: Some(now), version };
        state.leases.insert(digest, lease);
    }
}

#[async_trait]
impl Claims for MemoryClaims {
    async fn read(&self, digest: Digest) -> Result<Option<LeaseSnapshot>, ClaimError> {
        Ok(self.available_state()?.leases.get(&digest).cloned())
    }

    async fn create(&self, digest: Digest, now: SystemTime) -> Result<(), ClaimError> {
        let mut state = self.available_state()?;
        if state.leases.contains_key(&digest) {
            return Err(ClaimError::Lost);
        }
        self.write(&mut state, digest, now);
        Ok(())
    }

    async fn update(&self, digest: Digest, version: &LeaseVersion, now: SystemTime) -> Result<(), ClaimError> {
        let mut state = self.available_state()?;
        if state.leases.get(&digest).is_none_or(|lease| lease.version != *version) {
            return Err(ClaimError::Lost);
        }
        self.write(&mut state, digest, now);
        Ok(())
    }

    async fn release(&self, digest: Digest) -> Result<(), ClaimError> {
        let mut state = self.available_state()?;
        if state.leases.get(&digest).is_some_and(|lease| lease.holder.as_deref() == Some(self.node.as_str())) {
            state.leases.remove(&digest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_claim_is_fenced_by_the_version_that_was_read() {
        let cluster = MemoryCluster::default();
        let (a, b) = (cluster.claims_of("a".parse().unwrap()), cluster.claims_of("b".parse().unwrap()));
        let (digest, now) = (Digest::of(b"image"), SystemTime::now());
        a.create(digest, now).await.unwrap();
        assert!(matches!(b.create(digest, now).await, Err(ClaimError::Lost)));
        let read = b.read(digest).await.unwrap().unwrap();
        a.update(digest, &read.version, now).await.unwrap();
        assert!(matches!(b.update(digest, &read.version, now).await, Err(ClaimError::Lost)));
        b.release(digest).await.unwrap();
        assert!(a.read(digest).await.unwrap().is_some(), "only the holder releases");
        a.release(digest).await.unwrap();
        assert!(a.read(digest).await.unwrap().is_none());
    }
}
