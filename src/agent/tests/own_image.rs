//! The images of the agent's own DaemonSet.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::agent::own_image::{OwnImage, OwnImagePorts};
use crate::agent::progress::Board;
use crate::decide::own_image::{OwnImages, Protection};
use crate::model::OutageKind;
use crate::ports::{ClusterError, OwnDaemonSet, OwnImageStatus, ProtectedImages, RegistryError};

const HOUR: Duration = Duration::from_secs(3600);
const CURRENT: &str = "r.test/shop/checkout:v0";

/// A DaemonSet whose template a test sets, and records that are protected.
struct Ship {
    own: Mutex<Result<OwnImages, ()>>,
    store: Arc<MemoryStore>,
    protection: Mutex<Protection>,
}

#[async_trait]
impl OwnDaemonSet for Ship {
    async fn own_images(&self) -> Result<OwnImages, ClusterError> {
        self.own.lock().unwrap().clone().map_err(|()| ClusterError::Unavailable("the API server is away".into()))
    }
}

#[async_trait]
impl ProtectedImages for Ship {
    async fn protected_images(&self) -> Result<Protection, StoreError> {
        Ok(self.protection.lock().unwrap().clone())
    }

    async fn protect_image(&self, image: &Reference) -> Result<(), StoreError> {
        let records = self.store.images().await?;
        if !records.iter().any(|record| record.name == image.to_string()) {
            return Err(StoreError::Other("no such record".into()));
        }
        self.protection.lock().unwrap().ours.insert(image.clone());
        Ok(())
    }

    async fn release_image(&self, image: &Reference) -> Result<(), StoreError> {
        self.protection.lock().unwrap().ours.remove(image);
        Ok(())
    }
}

struct Sailing {
    ship: Arc<Ship>,
    status: watch::Receiver<Option<OwnImageStatus>>,
    _stop: DropGuard,
}

fn image(name: &str) -> Reference {
    name.parse().unwrap()
}

fn own(current: &str, template: &str) -> OwnImages {
    OwnImages { current: [image(current)].into(), template: Some([image(template)].into()), pull_secrets: Vec::new() }
}

/// An agent that runs [`CURRENT`], and whose DaemonSet names this image.
async fn sail(harbour: &Harbour, template: &str, dry_run: bool) -> Sailing {
    put_image(&*harbour.store, &[CURRENT.to_owned()], &[50], 1).await.unwrap();
    let ship = Arc::new(Ship {
        own: Mutex::new(Ok(own(CURRENT, template))),
        store: Arc::clone(&harbour.store),
        protection: Mutex::default(),
    });
    let ports = OwnImagePorts { daemonset: Arc::clone(&ship) as _, protected: Arc::clone(&ship) as _ };
    let (status_in, status) = watch::channel(None);
    let recoverer = Arc::new(harbour.recoverer());
    let task = OwnImage::new(ports, recoverer, Board::default(), harbour.metrics.clone(), dry_run, status_in);
    let stop = CancellationToken::new();
    tokio::spawn(task.run(stop.clone()));
    Sailing { ship, status, _stop: stop.drop_guard() }
}

impl Sailing {
    /// Waits until the status says why the only next image is missing; `None` once it is here.
    async fn shows(&mut self, is_so: impl Fn(Option<&str>) -> bool) {
        let is_shown = |status: &Option<OwnImageStatus>| {
            let next = status.as_ref().and_then(|status| status.next.first());
            next.is_some_and(|next| is_so(next.missing.as_deref()))
        };
        let shown = tokio::time::timeout(HOUR, self.status.wait_for(is_shown)).await.is_ok();
        if !shown {
            panic!("{:?}", self.status.borrow());
        }
    }

    fn protected(&self) -> BTreeSet<String> {
        self.ship.protection.lock().unwrap().ours.iter().map(ToString::to_string).collect()
    }

    async fn protects(&self, names: &[&str]) {
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

async fn has(harbour: &Harbour, name: &str) -> bool {
    harbour.record_names().await.contains(&image(name).to_string())
}

#[tokio::test(start_paused = true)]
async fn the_next_image_by_digest_comes_from_a_peer_in_an_outage_and_is_protected() {
    let harbour = Harbour::new();
    let made = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let next = format!("r.test/shop/checkout@{}", made.root.digest);
    let mut agent = sail(&harbour, &next, false).await;
    agent.shows(|missing| missing.is_none()).await;
    assert!(has(&harbour, &next).await);
    agent.protects(&[CURRENT, &next]).await;
    assert!(harbour.counted("lighterman_own_images_missing 0") && harbour.counted("lighterman_own_images_protected 2"));
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="recovered"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn the_next_image_is_fetched_when_a_peer_begins_to_provide_it() {
    let harbour = Harbour::new();
    let elsewhere = Harbour::new();
    let made = elsewhere.peer_with(1, IMAGE, Behaviour::Honest).await;
    let mut agent = sail(&harbour, &format!("r.test/shop/checkout@{}", made.root.digest), false).await;
    agent.shows(|missing| missing == Some("no peer provides this image")).await;
    assert!(harbour.counted("lighterman_own_images_missing 1"));
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    agent.shows(|missing| missing.is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_with_another_repository_provides_nothing() {
    let harbour = Harbour::new();
    let made = harbour.peer_with(1, "evil.test/shop/checkout:v1", Behaviour::Honest).await;
    let next = format!("r.test/shop/checkout@{}", made.root.digest);
    let mut agent = sail(&harbour, &next, false).await;
    agent.shows(|missing| missing == Some("no peer provides this image")).await;
    tokio::time::sleep(HOUR).await;
    assert!(!has(&harbour, &next).await);
}

#[tokio::test(start_paused = true)]
async fn a_tag_is_fetched_as_the_digest_that_its_registry_names() {
    let harbour = Harbour::new();
    let made = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.registry.put_tag(image(IMAGE).repository(), "v1", made.root.digest);
    let mut agent = sail(&harbour, IMAGE, false).await;
    agent.shows(|missing| missing.is_none()).await;
    let records = harbour.store.images().await.unwrap();
    let record = records.iter().find(|record| record.name == IMAGE).unwrap();
    assert_eq!(record.target.digest, made.root.digest);
    assert_eq!(harbour.registry.resolves("r.test"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_tag_that_moved_in_its_registry_is_not_taken_for_what_peers_have() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.registry.put_tag(image(IMAGE).repository(), "v1", Digest::of(b"a newer image"));
    let mut agent = sail(&harbour, IMAGE, false).await;
    agent.shows(|missing| missing.is_some_and(|reason| reason.contains("no peer holds"))).await;
    tokio::time::sleep(HOUR).await;
    assert!(!has(&harbour, IMAGE).await);
    assert!((2..=20).contains(&harbour.registry.resolves("r.test")), "it is asked again, and seldom");
}

#[tokio::test(start_paused = true)]
async fn a_tag_whose_registry_does_not_answer_is_left_to_the_kubelet() {
    let harbour = Harbour::new();
    let made = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.registry.put_tag(image(IMAGE).repository(), "v1", made.root.digest);
    let down = RegistryError::Down { registry: "r.test".into(), kind: OutageKind::Refused };
    harbour.registry.set_failure("r.test", Some(down));
    let mut agent = sail(&harbour, IMAGE, false).await;
    agent.shows(|missing| missing.is_some_and(|reason| reason.contains("does not say what the tag is"))).await;
    tokio::time::sleep(HOUR).await;
    assert!(!has(&harbour, IMAGE).await);
    harbour.registry.set_failure("r.test", None);
    agent.shows(|missing| missing.is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_fetched_while_the_kill_switch_is_on_or_imports_are_refused() {
    let harbour = Harbour::new();
    let made = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.rule(|rules| rules.policy.kill_switch = true);
    let mut agent = sail(&harbour, &format!("r.test/shop/checkout@{}", made.root.digest), false).await;
    agent.shows(|missing| missing == Some("recoveries are switched off")).await;
    agent.protects(&[CURRENT]).await;
    harbour.imports.send_replace(Imports::Refused("verifiers".into()));
    harbour.rule(|rules| rules.policy.kill_switch = false);
    agent.shows(|missing| missing.is_some_and(|reason| reason.starts_with("nothing may be imported"))).await;
    assert_eq!(harbour.fetcher.times_asked(peer(1)), 0);
    harbour.imports.send_replace(Imports::Allowed);
    agent.shows(|missing| missing.is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn an_image_over_the_size_limit_is_not_fetched_before_the_limit_is_raised() {
    let harbour = Harbour::new();
    let made = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.rule(|rules| rules.budgets.max_image_bytes = 100);
    let mut agent = sail(&harbour, &format!("r.test/shop/checkout@{}", made.root.digest), false).await;
    agent.shows(|missing| missing.is_some_and(|reason| reason.contains("--max-image-bytes"))).await;
    harbour.rule(|rules| rules.budgets.max_image_bytes = 0);
    agent.shows(|missing| missing.is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_fetches_and_protects_nothing() {
    let harbour = Harbour::new();
    let made = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let mut agent = sail(&harbour, &format!("r.test/shop/checkout@{}", made.root.digest), true).await;
    agent.shows(|missing| missing == Some("recoveries are switched off")).await;
    tokio::time::sleep(HOUR).await;
    assert!(agent.protected().is_empty() && harbour.fetcher.times_asked(peer(1)) == 0);
}

#[tokio::test(start_paused = true)]
async fn an_image_is_released_when_pod_and_template_name_another_one() {
    let harbour = Harbour::new();
    let made = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let next = format!("r.test/shop/checkout@{}", made.root.digest);
    let agent = sail(&harbour, &next, false).await;
    agent.protects(&[CURRENT, &next]).await;
    // An API server that does not answer changes nothing.
    *agent.ship.own.lock().unwrap() = Err(());
    tokio::time::sleep(HOUR).await;
    agent.protects(&[CURRENT, &next]).await;
    *agent.ship.own.lock().unwrap() = Ok(own(&next, &next));
    agent.protects(&[&next]).await;
}
