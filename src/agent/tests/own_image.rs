//! The images of the agent's own DaemonSet.

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::agent::recovery::progress::RecoveryTracker;
use crate::agent::retention::own_image::{OwnImageController, OwnImagePorts};
use crate::control::OwnImageStatus;
use crate::decide::own_image::{OwnImages, Protection};
use crate::model::OutageKind;
use crate::ports::{ClusterError, ImageRecords, OwnDaemonSet, ProtectedImages, RegistryError};

const HOUR: Duration = Duration::from_secs(3600);
const CURRENT: &str = "r.test/shop/checkout:v0";

/// A DaemonSet whose images the test sets, and the protected image records.
struct FakeDaemonSet {
    own: Mutex<Result<OwnImages, ()>>,
    store: Arc<MemoryStore>,
    protection: Mutex<Protection>,
}

#[async_trait]
impl OwnDaemonSet for FakeDaemonSet {
    async fn own_images(&self) -> Result<OwnImages, ClusterError> {
        self.own.lock().clone().map_err(|()| ClusterError::Unavailable("the API server is unavailable".into()))
    }
}

#[async_trait]
impl ProtectedImages for FakeDaemonSet {
    async fn protected_images(&self) -> Result<Protection, StoreError> {
        Ok(self.protection.lock().clone())
    }

    async fn protect_image(&self, image: &Reference) -> Result<(), StoreError> {
        let records = self.store.images().await?;
        if !records.iter().any(|record| record.name == image.to_string()) {
            return Err(StoreError::Other("no such record".into()));
        }
        self.protection.lock().ours.insert(image.clone());
        Ok(())
    }

    async fn release_image(&self, image: &Reference) -> Result<(), StoreError> {
        self.protection.lock().ours.remove(image);
        Ok(())
    }
}

struct RunningOwnImage {
    daemonset: Arc<FakeDaemonSet>,
    status: watch::Receiver<Option<OwnImageStatus>>,
    _stop: DropGuard,
}

fn image(name: &str) -> Reference {
    name.parse().unwrap()
}

fn own(current: &str, template: &str) -> OwnImages {
    OwnImages { current: [image(current)].into(), template: Some([image(template)].into()), pull_secrets: Vec::new() }
}

/// Starts an agent that runs [`CURRENT`], and whose DaemonSet names `template`.
async fn start_agent(node: &TestNode, template: &str, dry_run: bool) -> RunningOwnImage {
    put_image(&*node.store, &[CURRENT.to_owned()], &[50], 1).await.unwrap();
    let daemonset = Arc::new(FakeDaemonSet {
        own: Mutex::new(Ok(own(CURRENT, template))),
        store: Arc::clone(&node.store),
        protection: Mutex::default(),
    });
    let ports = OwnImagePorts { daemonset: Arc::clone(&daemonset) as _, protected: Arc::clone(&daemonset) as _ };
    let (status_in, status) = watch::channel(None);
    let recoverer = Arc::new(node.recoverer());
    let task =
        OwnImageController::new(ports, recoverer, RecoveryTracker::default(), node.metrics.clone(), dry_run, status_in);
    let stop = CancellationToken::new();
    tokio::spawn(task.run(stop.clone()));
    RunningOwnImage { daemonset, status, _stop: stop.drop_guard() }
}

impl RunningOwnImage {
    /// Waits until `is_so` accepts the reason why the next image is missing. The reason is `None`
    /// for an image on this node.
    async fn wait_for_status(&mut self, is_expected: impl Fn(Option<&str>) -> bool) {
        let is_shown = |status: &Option<OwnImageStatus>| {
            let next = status.as_ref().and_then(|status| status.next.first());
            next.is_some_and(|next| is_expected(next.missing.as_deref()))
        };
        let shown = tokio::time::timeout(HOUR, self.status.wait_for(is_shown)).await.is_ok();
        if !shown {
            panic!("{:?}", self.status.borrow());
        }
    }

    fn protected(&self) -> BTreeSet<String> {
        self.daemonset.protection.lock().ours.iter().map(ToString::to_string).collect()
    }

    async fn wait_for_protected(&self, names: &[&str]) {
        let expected: BTreeSet<_> = names.iter().map(ToString::to_string).collect();
        let reached = async {
            while self.protected() != expected {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        if tokio::time::timeout(HOUR, reached).await.is_err() {
            panic!("{:?} is protected", self.protected());
        }
    }
}

async fn has_record(node: &TestNode, name: &str) -> bool {
    node.record_names().await.contains(&image(name).to_string())
}

#[tokio::test(start_paused = true)]
async fn the_next_image_by_digest_comes_from_a_peer_in_an_outage_and_is_protected() {
    let node = TestNode::new();
    let made = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let next = format!("r.test/shop/checkout@{}", made.target.digest);
    let mut agent = start_agent(&node, &next, false).await;
    agent.wait_for_status(|missing| missing.is_none()).await;
    assert!(has_record(&node, &next).await);
    agent.wait_for_protected(&[CURRENT, &next]).await;
    assert!(node.has_metric("lighterman_own_images_missing 0") && node.has_metric("lighterman_own_images_protected 2"));
    assert!(node.has_metric(r#"lighterman_recoveries_total{outcome="recovered"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn the_next_image_is_fetched_when_a_provider_appears() {
    let node = TestNode::new();
    let other_node = TestNode::new();
    let made = other_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let mut agent = start_agent(&node, &format!("r.test/shop/checkout@{}", made.target.digest), false).await;
    agent.wait_for_status(|missing| missing == Some("no peer provides this image")).await;
    assert!(node.has_metric("lighterman_own_images_missing 1"));
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    agent.wait_for_status(|missing| missing.is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_with_another_repository_provides_nothing() {
    let node = TestNode::new();
    let made = node.add_provider(1, "evil.test/shop/checkout:v1", Behaviour::Honest).await;
    let next = format!("r.test/shop/checkout@{}", made.target.digest);
    let mut agent = start_agent(&node, &next, false).await;
    agent.wait_for_status(|missing| missing == Some("no peer provides this image")).await;
    tokio::time::sleep(HOUR).await;
    assert!(!has_record(&node, &next).await);
}

#[tokio::test(start_paused = true)]
async fn a_tag_is_fetched_as_the_digest_that_its_registry_names() {
    let node = TestNode::new();
    let made = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.registry.put_tag(image(IMAGE).repository(), "v1", made.target.digest);
    let mut agent = start_agent(&node, IMAGE, false).await;
    agent.wait_for_status(|missing| missing.is_none()).await;
    let records = node.store.images().await.unwrap();
    let record = records.iter().find(|record| record.name == IMAGE).unwrap();
    assert_eq!(record.target.digest, made.target.digest);
    assert_eq!(node.registry.resolves("r.test"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_tag_that_moved_in_its_registry_is_not_recovered_from_peers() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.registry.put_tag(image(IMAGE).repository(), "v1", Digest::of(b"a newer image"));
    let mut agent = start_agent(&node, IMAGE, false).await;
    agent.wait_for_status(|missing| missing.is_some_and(|reason| reason.contains("no peer holds"))).await;
    tokio::time::sleep(HOUR).await;
    assert!(!has_record(&node, IMAGE).await);
    assert!((2..=20).contains(&node.registry.resolves("r.test")), "the agent resolves the tag again, and seldom");
}

#[tokio::test(start_paused = true)]
async fn a_tag_whose_registry_does_not_answer_is_left_to_the_kubelet() {
    let node = TestNode::new();
    let made = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.registry.put_tag(image(IMAGE).repository(), "v1", made.target.digest);
    let down = RegistryError::Down { registry: "r.test".into(), kind: OutageKind::Refused };
    node.registry.set_failure("r.test", Some(down));
    let mut agent = start_agent(&node, IMAGE, false).await;
    agent.wait_for_status(|missing| missing.is_some_and(|reason| reason.contains("did not resolve the tag"))).await;
    tokio::time::sleep(HOUR).await;
    assert!(!has_record(&node, IMAGE).await);
    node.registry.set_failure("r.test", None);
    agent.wait_for_status(|missing| missing.is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_fetched_while_the_kill_switch_is_on_or_imports_are_refused() {
    let node = TestNode::new();
    let made = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.change_policy(|policy| policy.opt_in.kill_switch = true);
    let mut agent = start_agent(&node, &format!("r.test/shop/checkout@{}", made.target.digest), false).await;
    agent.wait_for_status(|missing| missing == Some("recoveries are switched off")).await;
    agent.wait_for_protected(&[CURRENT]).await;
    node.imports.send_replace(ImportPermission::Refused("verifiers".into()));
    node.change_policy(|policy| policy.opt_in.kill_switch = false);
    agent.wait_for_status(|missing| missing.is_some_and(|reason| reason.starts_with("nothing may be imported"))).await;
    assert_eq!(node.fetcher.request_count(peer(1)), 0);
    node.imports.send_replace(ImportPermission::Allowed);
    agent.wait_for_status(|missing| missing.is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn an_image_over_the_size_limit_is_not_fetched_before_the_limit_is_raised() {
    let node = TestNode::new();
    let made = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.change_policy(|policy| policy.budgets.max_image_bytes = 100);
    let mut agent = start_agent(&node, &format!("r.test/shop/checkout@{}", made.target.digest), false).await;
    agent.wait_for_status(|missing| missing.is_some_and(|reason| reason.contains("--max-image-bytes"))).await;
    node.change_policy(|policy| policy.budgets.max_image_bytes = 0);
    agent.wait_for_status(|missing| missing.is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_fetches_and_protects_nothing() {
    let node = TestNode::new();
    let made = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let mut agent = start_agent(&node, &format!("r.test/shop/checkout@{}", made.target.digest), true).await;
    agent.wait_for_status(|missing| missing == Some("recoveries are switched off")).await;
    tokio::time::sleep(HOUR).await;
    assert!(agent.protected().is_empty() && node.fetcher.request_count(peer(1)) == 0);
}

#[tokio::test(start_paused = true)]
async fn an_image_is_released_when_pod_and_template_name_another_image() {
    let node = TestNode::new();
    let made = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let next = format!("r.test/shop/checkout@{}", made.target.digest);
    let agent = start_agent(&node, &next, false).await;
    agent.wait_for_protected(&[CURRENT, &next]).await;
    // An API server that does not answer changes nothing.
    *agent.daemonset.own.lock() = Err(());
    tokio::time::sleep(HOUR).await;
    agent.wait_for_protected(&[CURRENT, &next]).await;
    *agent.daemonset.own.lock() = Ok(own(&next, &next));
    agent.wait_for_protected(&[&next]).await;
}
