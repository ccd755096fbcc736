//! Nudges and deletions that the API server denies.

use std::io::Write;
use std::sync::Mutex;
use std::time::Duration;

use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;

use super::needs::waiting;
use super::salvaging::{REFUSED, Watch, failing, reports};
use super::*;
use crate::decide::rules::Manner;
use crate::model::{Owner, PodView};
use crate::ports::ReportKind;

/// The log of this thread, which is every task's under a paused clock.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> (Self, DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(log.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    /// Lines that contain this text.
    fn lines_with(&self, text: &str) -> Vec<String> {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        log.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test(start_paused = true)]
async fn a_denied_nudge_fails_no_recovery_and_is_logged_once() {
    let (log, _guard) = Log::start();
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.cluster.set_denies(true);
    let mut watch = Watch::start(&harbour);
    for name in ["p", "q"] {
        watch.sees(failing(name, IMAGE, REFUSED)).await;
    }
    watch.rest().await;
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="recovered"} 1"#));
    assert!(harbour.counted(r#"lighterman_nudges_total{result="denied"} 2"#));
    let mut told = reports(&harbour);
    told.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(told, ["p", "q"].map(|name| (name.to_owned(), ReportKind::Salvaged)));
    let lines = log.lines_with("denies the nudge");
    assert_eq!(lines.len(), 1, "{lines:?}");
    for part in ["WARN", "within 90 s", "podRightsWithoutPolicy", "pods is forbidden"] {
        assert!(lines[0].contains(part), "{part}: {}", lines[0]);
    }

    // The pods still wait after a minute, and the right is there by then.
    harbour.cluster.set_denies(false);
    let mut nudged = [watch.nudged().await, watch.nudged().await];
    nudged.sort();
    assert_eq!(nudged, ["p", "q"]);
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_kubelet_that_was_not_nudged_is_not_taken_for_one_that_verifies_credentials() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.cluster.set_denies(true);
    let watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    watch.rest().await;
    // The kubelet begins to back off just after the image came, and looks again at its own sync.
    let mut backing_off = failing("p", IMAGE, REFUSED);
    backing_off.containers[0].waiting = waiting("ImagePullBackOff", REFUSED);
    watch.sees(backing_off).await;
    tokio::time::sleep(Duration::from_secs(89)).await;
    assert!(harbour.counted(r#"lighterman_recoveries_total{outcome="already_here"} 1"#));
    assert_eq!(reports(&harbour), [("p".to_owned(), ReportKind::Salvaged)]);
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_denied_deletion_is_logged_once_and_tried_once_for_each_pod() {
    let (log, _guard) = Log::start();
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.cluster.set_denies(true);
    let watch = Watch::start_as(&harbour, Manner { delete_pods: true, ..Manner::default() });
    let owner = Owner { api_version: "apps/v1".into(), kind: "ReplicaSet".into(), name: "web".into(), uid: "o".into() };
    for name in ["p", "q"] {
        watch.sees(PodView { owner: Some(owner.clone()), ..failing(name, IMAGE, REFUSED) }).await;
    }
    tokio::time::sleep(Duration::from_secs(1800)).await;
    assert!(harbour.counted(r#"lighterman_deletions_total{result="denied"} 2"#));
    assert!(harbour.cluster.deleted().is_empty());
    let lines = log.lines_with("denies the deletion");
    assert_eq!(lines.len(), 1, "{lines:?}");
    watch.stop().await;
}
