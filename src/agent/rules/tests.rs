//! Real files, changed as people and the kubelet change them.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

fn flags() -> Rules {
    Rules::default()
}

/// A watched file in a folder of its own.
struct Watched {
    folder: TempDir,
    watch: RulesWatch,
    metrics: Metrics,
}

fn file(folder: &TempDir) -> PathBuf {
    folder.path().join("rules.yaml")
}

async fn watched(folder: TempDir) -> Watched {
    let metrics = Metrics::new();
    Watched { watch: RulesWatch::open(file(&folder), flags(), metrics.clone()).await, metrics, folder }
}

async fn with(content: impl AsRef<[u8]>) -> Watched {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(file(&folder), content).unwrap();
    watched(folder).await
}

impl Watched {
    async fn write(&mut self, content: impl AsRef<[u8]>) {
        std::fs::write(file(&self.folder), content).unwrap();
        self.watch.look().await;
    }

    fn stopped(&self) -> bool {
        self.watch.rules().borrow().policy.kill_switch
    }

    fn error(&self) -> Option<String> {
        self.watch.status().borrow().error.clone()
    }

    fn valid(&self) -> bool {
        let text = String::from_utf8(self.metrics.render()).unwrap();
        text.lines().any(|line| line == "lighterman_rules_file_valid 1")
    }
}

#[tokio::test]
async fn what_the_file_says_is_in_force_at_once_and_when_it_changes() {
    let mut watched = with("killSwitch: true\n").await;
    assert!(watched.stopped() && watched.valid());
    watched.write("maxUploadRate: 1Mi\n").await;
    assert!(!watched.stopped(), "what is no longer said is as the flags have it");
    assert_eq!(watched.watch.rules().borrow().budgets.max_upload_rate, 1 << 20);
    let status = watched.watch.status().borrow().clone();
    assert_eq!((status.sets, status.error), (vec!["maxUploadRate: 1Mi".to_owned()], None));
    assert!(status.in_force_since.is_some());
}

#[tokio::test]
async fn a_wrong_file_changes_nothing_until_it_is_right_again() {
    let mut watched = with("killSwitch: true\n").await;
    for wrong in
        [&b"killSwitch: true\nconcurrentBlobs: 0\n"[..], b"killSwitch: f\xff", &[b'#'; MAX_BYTES + 1], b"<html>"]
    {
        watched.write(wrong).await;
        assert!(watched.stopped() && !watched.valid() && watched.error().is_some());
    }
    watched.write("killSwitch: true\nconcurrentBlobs: 0\n").await;
    assert!(watched.error().unwrap().starts_with("line 2, column 18:"), "{:?}", watched.error());
    watched.write("killSwitch: false\n").await;
    assert!(!watched.stopped() && watched.valid() && watched.error().is_none());
}

#[tokio::test]
async fn a_symlink_swapped_as_the_kubelet_does_it_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let publish = |version: &str, content: &str| {
        let data = folder.path().join(version);
        std::fs::create_dir(&data).unwrap();
        std::fs::write(data.join("rules.yaml"), content).unwrap();
        symlink(version, folder.path().join("..data_tmp")).unwrap();
        std::fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).unwrap();
    };
    publish("..2026_01_01", "killSwitch: true\n");
    symlink("..data/rules.yaml", file(&folder)).unwrap();
    let metrics = Metrics::new();
    let mut watch = RulesWatch::open(file(&folder), flags(), metrics).await;
    assert!(watch.rules().borrow().policy.kill_switch);
    publish("..2026_01_02", "killSwitch: false\n");
    std::fs::remove_dir_all(folder.path().join("..2026_01_01")).unwrap();
    watch.look().await;
    assert!(!watch.rules().borrow().policy.kill_switch);
}

#[tokio::test]
async fn a_file_that_goes_away_leaves_its_rules() {
    let mut watched = with("killSwitch: true\n").await;
    std::fs::remove_file(file(&watched.folder)).unwrap();
    watched.watch.look().await;
    assert!(watched.stopped() && !watched.valid());
    assert_eq!(watched.error().as_deref(), Some("the file is gone"));
    watched.write("killSwitch: true\n").await;
    assert!(watched.stopped() && watched.valid());
}

#[tokio::test]
async fn without_a_file_the_flags_are_in_force_until_one_comes() {
    let mut watched = watched(tempfile::tempdir().unwrap()).await;
    assert_eq!(**watched.watch.rules().borrow(), flags());
    assert!(watched.valid(), "nothing is wrong yet");
    watched.write("killSwitch: true\n").await;
    assert!(watched.stopped());
}

#[tokio::test]
async fn what_is_no_file_is_refused_without_waiting_for_it() {
    let folder = tempfile::tempdir().unwrap();
    nix::unistd::mkfifo(&file(&folder), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let watched = watched(folder).await;
    assert_eq!(watched.error().as_deref(), Some("it is no file"));
}

#[tokio::test]
async fn whoever_waits_hears_of_a_change_and_of_nothing_else() {
    let mut watched = with("killSwitch: false\n").await;
    let mut rules = watched.watch.rules();
    rules.mark_unchanged();
    watched.watch.look().await;
    assert!(!rules.has_changed().unwrap(), "the same file");
    watched.write("killSwitch: false # by Ada\n").await;
    assert!(!rules.has_changed().unwrap(), "it says the same");
    watched.write("killSwitch: true\n").await;
    assert!(rules.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn the_task_looks_by_itself() {
    let watched = with("killSwitch: false\n").await;
    let mut rules = watched.watch.rules();
    let stop = CancellationToken::new();
    let running = tokio::spawn(watched.watch.run(stop.clone()));
    std::fs::write(file(&watched.folder), "killSwitch: true\n").unwrap();
    let changed = rules.wait_for(|rules| rules.policy.kill_switch);
    drop(tokio::time::timeout(Duration::from_secs(3600), changed).await.expect("a look").unwrap());
    stop.cancel();
    running.await.unwrap();
}

#[test]
fn a_change_is_told_field_by_field() {
    let before = Overrides::parse("killSwitch: true\nmaxUploadRate: 1Mi\nconcurrentBlobs: 2").unwrap();
    let now = Overrides::parse("killSwitch: true\nmaxUploadRate: 2Mi\nsalvageOn: [denied]").unwrap();
    let told = ["concurrentBlobs: 2 -> as the flag", "maxUploadRate: 1Mi -> 2Mi", "salvageOn: as the flag -> [denied]"];
    assert_eq!(changes(&before, &now), told);
}

#[tokio::test]
async fn an_agent_that_starts_with_a_wrong_file_recovers_nothing_until_it_is_right() {
    let mut watched = with("killSwitch: ture\n").await;
    assert!(watched.error().is_some() && watched.stopped(), "it may be the file that stops everything");
    watched.write("concurrentBlobs: 3\n").await;
    assert!(!watched.stopped());
}
