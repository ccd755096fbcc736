//! Another node with this node's key, found while the agent runs. The younger node makes a new key,
//! and its agent restarts. [`crate::decide::shared_key`] decides which node is younger.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::decide::shared_key::{KeyOwner, must_replace_key};
use crate::identity::Identity;
use crate::model::NodeName;
use crate::ports::{ClusterError, NodeReport, NodeReportKind, Nodes};

/// Interval of checks, each of which reads the metadata of two Node objects. Introductions repeat a
/// finding every few seconds.
const CHECK_PERIOD: Duration = Duration::from_secs(30);

/// Handles another node with this node's key.
pub struct SharedKeyWatch {
    /// Reads the creation times of nodes.
    pub cluster: Arc<dyn Nodes>,
    /// This node.
    pub node: NodeName,
    /// The key's file.
    pub key_file: PathBuf,
    /// The node whose agent proved this key on a QUIC connection.
    pub connected: watch::Receiver<Option<NodeName>>,
    /// The node whose agent signed an introduction with this key.
    pub introduced: watch::Receiver<Option<NodeName>>,
}

/// Decision on one finding.
enum KeyDecision {
    /// The other node makes a new key.
    Keep,
    /// This node has a new key, which counts from the agent's next start.
    Replaced,
}

impl SharedKeyWatch {
    /// Runs until stopped, or until this node has a new key. The end of this task ends
    /// the agent, and the kubelet starts the agent again.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut logged_node = None;
        loop {
            let found = stop.run_until_cancelled(self.next_other_node());
            let Some(other) = found.await else { return };
            match stop.run_until_cancelled(self.decide_key(&other, &mut logged_node)).await {
                None | Some(Ok(KeyDecision::Replaced)) => return,
                Some(Ok(KeyDecision::Keep)) => {}
                Some(Err(error)) => tracing::debug!(%other, %error, "cannot compare the ages of the two nodes yet"),
            }
            if stop.run_until_cancelled(tokio::time::sleep(CHECK_PERIOD)).await.is_none() {
                return;
            }
        }
    }

    /// The next finding. Both senders live as long as the agent.
    async fn next_other_node(&mut self) -> NodeName {
        loop {
            let reported_node = tokio::select! {
                Ok(()) = self.connected.changed() => self.connected.borrow_and_update().clone(),
                Ok(()) = self.introduced.changed() => self.introduced.borrow_and_update().clone(),
                else => std::future::pending().await,
            };
            if let Some(node) = reported_node {
                return node;
            }
        }
    }

    /// `logged_node` is the node that the log named last.
    async fn decide_key(
        &self,
        other: &NodeName,
        logged_node: &mut Option<NodeName>,
    ) -> Result<KeyDecision, ClusterError> {
        let key_owner = async |node: &NodeName| {
            let created = self.cluster.node_created(node).await?;
            Ok::<_, ClusterError>(KeyOwner { node: node.clone(), created })
        };
        let own = key_owner(&self.node).await?;
        let other = match key_owner(other).await {
            Ok(other) => other,
            // An introduction of this agent from before a rename of the node, or a thief of the
            // key.
            Err(ClusterError::Gone(_)) => {
                if logged_node.replace(other.clone()).as_ref() != Some(other) {
                    tracing::warn!(
                        %other,
                        file = %self.key_file.display(),
                        "an agent has the key of this node and names a node that the cluster does not have; where this \
                         node was not renamed, delete the key file and restart the agent"
                    );
                }
                return Ok(KeyDecision::Keep);
            }
            Err(error) => return Err(error),
        };
        if !must_replace_key(&own, &other) {
            if logged_node.replace(other.node.clone()).as_ref() != Some(&other.node) {
                tracing::warn!(
                    other = %other.node,
                    "another node has the key of this node, as after a copy of its disk; the other node is younger \
                     and makes a new key"
                );
            }
            return Ok(KeyDecision::Keep);
        }
        let new_identity = Identity::replace(&self.key_file, &self.node).map_err(|error| {
            tracing::error!(%error, "another node has the key of this node, and a new key cannot be written");
            ClusterError::Other(error.to_string())
        })?;
        tracing::warn!(
            other = %other.node,
            peer = %new_identity.peer_id(),
            "another node has the key of this node, as after a copy of its disk; this node is younger and has a new \
             key; its agent restarts"
        );
        let note = format!(
            "Node {} had the key of node {}, as after a copy of a disk. Node {} is younger and has a new key. Leave {} \
             and the file beside it out of disk images.",
            self.node,
            other.node,
            self.node,
            self.key_file.display()
        );
        let report = NodeReport { kind: NodeReportKind::KeyReplaced, note };
        if let Err(error) = self.cluster.report_on_node(&report).await {
            tracing::debug!(%error, "the Event about the key is not written");
        }
        Ok(KeyDecision::Replaced)
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinHandle;

    use super::*;
    use crate::model::PeerId;
    use crate::testing::MemoryCluster;

    /// A running watch, with a key in its own folder.
    struct KeyTestNode {
        folder: tempfile::TempDir,
        connected: watch::Sender<Option<NodeName>>,
        _introduced: watch::Sender<Option<NodeName>>,
        stop: CancellationToken,
        running: JoinHandle<()>,
    }

    impl KeyTestNode {
        fn start(cluster: &MemoryCluster, node: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (key_file, node) = (folder.path().join("identity.key"), node.parse().unwrap());
            Identity::load_or_create_for_node(&key_file, &node).unwrap();
            let ((connected_in, connected), (introduced_in, introduced)) = (watch::channel(None), watch::channel(None));
            let cluster = Arc::new(cluster.clone());
            let stop = CancellationToken::new();
            let watch = SharedKeyWatch { cluster, node, key_file, connected, introduced };
            let running = tokio::spawn(watch.run(stop.clone()));
            Self { folder, connected: connected_in, _introduced: introduced_in, stop, running }
        }

        fn key(&self) -> PeerId {
            Identity::load_or_create(&self.folder.path().join("identity.key")).unwrap().peer_id()
        }

        fn report_key_on(&self, node: &str) {
            self.connected.send_replace(Some(node.parse().unwrap()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_younger_node_makes_a_new_key_and_the_older_node_keeps_its_key() {
        let cluster = MemoryCluster::default();
        cluster.put_node("older".parse().unwrap(), 100);
        cluster.put_node("younger".parse().unwrap(), 200);
        let (older, younger) = (KeyTestNode::start(&cluster, "older"), KeyTestNode::start(&cluster, "younger"));
        let before = (older.key(), younger.key());
        older.report_key_on("younger");
        younger.report_key_on("older");
        tokio::time::timeout(Duration::from_secs(600), younger.running).await.expect("the task ends").unwrap();
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!older.running.is_finished());
        let after =
            Identity::load_or_create_for_node(&younger.folder.path().join("identity.key"), &"younger".parse().unwrap());
        assert_ne!(after.unwrap().peer_id(), before.1);
        assert_eq!(older.key(), before.0);
        let kinds: Vec<_> = cluster.node_reports().into_iter().map(|report| report.kind).collect();
        assert_eq!(kinds, [NodeReportKind::KeyReplaced]);
        older.stop.cancel();
        older.running.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_is_kept_until_the_api_server_answers() {
        let cluster = MemoryCluster::default();
        cluster.put_node("older".parse().unwrap(), 100);
        cluster.put_node("younger".parse().unwrap(), 200);
        cluster.set_unavailable(true);
        let younger = KeyTestNode::start(&cluster, "younger");
        let before = younger.key();
        younger.report_key_on("older");
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!younger.running.is_finished() && younger.key() == before);
        cluster.set_unavailable(false);
        // The next introduction repeats the finding.
        younger.report_key_on("older");
        tokio::time::timeout(Duration::from_secs(600), younger.running).await.expect("the task ends").unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_is_no_node_changes_no_key() {
        let cluster = MemoryCluster::default();
        cluster.put_node("here".parse().unwrap(), 200);
        let test_node = KeyTestNode::start(&cluster, "here");
        let before = test_node.key();
        test_node.report_key_on("before-the-rename");
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!test_node.running.is_finished() && test_node.key() == before);
        test_node.stop.cancel();
        test_node.running.await.unwrap();
    }
}
