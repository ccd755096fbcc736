use tokio::time::timeout;

use super::*;
use crate::testing::MemoryCluster;

/// The task with its inputs. The clock is paused.
struct LayerTestNode {
    cluster: MemoryCluster,
    metrics: Metrics,
    retained: watch::Sender<Option<RetentionStatus>>,
    _images: watch::Sender<Option<ImagesStatus>>,
    stop: CancellationToken,
}

impl LayerTestNode {
    fn new() -> Self {
        let (retained, retained_out) = watch::channel(None);
        let reasons = [("layers lost".to_owned(), 2)].into();
        let (images_in, images) = watch::channel(Some(ImagesStatus { reasons, ..ImagesStatus::default() }));
        let (cluster, metrics, stop) = (MemoryCluster::default(), Metrics::new(), CancellationToken::new());
        let task = LayerWatch {
            node: "n1".parse().unwrap(),
            cluster: Arc::new(cluster.clone()),
            retained: retained_out,
            images,
            fetches: true,
            metrics: metrics.clone(),
        };
        tokio::spawn(task.run(stop.clone()));
        Self { cluster, metrics, retained, _images: images_in, stop }
    }

    /// Publishes the retainer's status every 10 s.
    async fn publish_status(&self, lacking: usize, wanted: usize, minutes: u32) {
        for _ in 0..6 * minutes {
            self.retained.send_replace(Some(RetentionStatus { wanted, lacking, ..RetentionStatus::default() }));
            tokio::time::sleep(Duration::from_secs(10)).await;
        }
    }
}

impl Drop for LayerTestNode {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[tokio::test(start_paused = true)]
async fn the_node_gets_one_event_while_most_images_lack_layers() {
    let test_node = LayerTestNode::new();
    timeout(Duration::from_secs(7200), test_node.publish_status(3, 4, 90)).await.unwrap();
    let [report] = test_node.cluster.node_reports().try_into().unwrap();
    assert_eq!(report.kind.reason(), "ImagesLackLayers");
    for part in ["3 of the 4 images on n1", "layers lost 2"] {
        assert!(report.note.contains(part), "{}", report.note);
    }
    let shown = String::from_utf8(test_node.metrics.render()).unwrap();
    assert!(shown.lines().any(|line| line == r#"lighterman_events_total{reason="ImagesLackLayers"} 1"#), "{shown}");
}

#[tokio::test(start_paused = true)]
async fn an_event_waits_for_the_api_server() {
    let test_node = LayerTestNode::new();
    test_node.cluster.set_unavailable(true);
    test_node.publish_status(1, 1, 10).await;
    assert_eq!(test_node.cluster.node_reports(), []);
    test_node.cluster.set_unavailable(false);
    test_node.publish_status(2, 3, 2).await;
    let [report] = test_node.cluster.node_reports().try_into().unwrap();
    assert!(report.note.contains("2 of the 3 images"), "the Event has the current counts: {}", report.note);
}

#[tokio::test(start_paused = true)]
async fn a_lack_that_ended_while_the_api_server_was_unavailable_makes_no_event() {
    let test_node = LayerTestNode::new();
    test_node.cluster.set_unavailable(true);
    test_node.publish_status(1, 1, 3).await;
    test_node.publish_status(0, 1, 3).await;
    test_node.cluster.set_unavailable(false);
    test_node.publish_status(0, 1, 10).await;
    assert_eq!(test_node.cluster.node_reports(), []);
}
