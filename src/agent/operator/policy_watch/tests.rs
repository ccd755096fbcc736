//! Real files, changed in the ways of users and of the kubelet.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

fn flags() -> Policy {
    Policy::default()
}

/// A watched file in a folder of its own.
struct PolicyFileFixture {
    folder: TempDir,
    watch: PolicyWatch,
    metrics: Metrics,
}

fn file(folder: &TempDir) -> PathBuf {
    folder.path().join("policy.yaml")
}

async fn watch_in(folder: TempDir) -> PolicyFileFixture {
    let metrics = Metrics::new();
    PolicyFileFixture { watch: PolicyWatch::open(file(&folder), flags(), metrics.clone()).await, metrics, folder }
}

async fn watch_file_with(content: impl AsRef<[u8]>) -> PolicyFileFixture {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(file(&folder), content).unwrap();
    watch_in(folder).await
}

impl PolicyFileFixture {
    async fn write(&mut self, content: impl AsRef<[u8]>) {
        std::fs::write(file(&self.folder), content).unwrap();
        self.watch.reread().await;
    }

    fn is_kill_switch_on(&self) -> bool {
        self.watch.policy().borrow().opt_in.kill_switch
    }

    fn error(&self) -> Option<String> {
        self.watch.status().borrow().error.clone()
    }

    fn is_valid(&self) -> bool {
        let text = String::from_utf8(self.metrics.render()).unwrap();
        text.lines().any(|line| line == "lighterman_policy_file_valid 1")
    }
}

#[tokio::test]
async fn the_policy_file_applies_at_the_start_and_after_each_change() {
    let mut fixture = watch_file_with("killSwitch: true\n").await;
    assert!(fixture.is_kill_switch_on() && fixture.is_valid());
    fixture.write("maxUploadRate: 1Mi\n").await;
    assert!(!fixture.is_kill_switch_on(), "a removed setting falls back to the flags");
    assert_eq!(fixture.watch.policy().borrow().budgets.max_upload_rate, 1 << 20);
    let status = fixture.watch.status().borrow().clone();
    assert_eq!((status.sets, status.error), (vec!["maxUploadRate: 1Mi".to_owned()], None));
    assert!(status.in_force_since.is_some());
}

#[tokio::test]
async fn an_invalid_policy_file_leaves_the_policy_in_force() {
    let mut fixture = watch_file_with("killSwitch: true\n").await;
    for invalid in
        [&b"killSwitch: true\nconcurrentBlobs: 0\n"[..], b"killSwitch: f\xff", &[b'#'; MAX_BYTES + 1], b"<html>"]
    {
        fixture.write(invalid).await;
        assert!(fixture.is_kill_switch_on() && !fixture.is_valid() && fixture.error().is_some());
    }
    fixture.write("killSwitch: true\nconcurrentBlobs: 0\n").await;
    assert!(fixture.error().unwrap().starts_with("line 2, column 18:"), "{:?}", fixture.error());
    fixture.write("killSwitch: false\n").await;
    assert!(!fixture.is_kill_switch_on() && fixture.is_valid() && fixture.error().is_none());
}

#[tokio::test]
async fn a_symlink_swapped_like_a_configmap_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let publish = |version: &str, content: &str| {
        let data = folder.path().join(version);
        std::fs::create_dir(&data).unwrap();
        std::fs::write(data.join("policy.yaml"), content).unwrap();
        symlink(version, folder.path().join("..data_tmp")).unwrap();
        std::fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).unwrap();
    };
    publish("..2026_01_01", "killSwitch: true\n");
    symlink("..data/policy.yaml", file(&folder)).unwrap();
    let metrics = Metrics::new();
    let mut watch = PolicyWatch::open(file(&folder), flags(), metrics).await;
    assert!(watch.policy().borrow().opt_in.kill_switch);
    publish("..2026_01_02", "killSwitch: false\n");
    std::fs::remove_dir_all(folder.path().join("..2026_01_01")).unwrap();
    watch.reread().await;
    assert!(!watch.policy().borrow().opt_in.kill_switch);
}

#[tokio::test]
async fn a_removed_policy_file_leaves_its_policy_in_force() {
    let mut fixture = watch_file_with("killSwitch: true\n").await;
    std::fs::remove_file(file(&fixture.folder)).unwrap();
    fixture.watch.reread().await;
    assert!(fixture.is_kill_switch_on() && !fixture.is_valid());
    assert_eq!(fixture.error().as_deref(), Some("the file is gone"));
    fixture.write("killSwitch: true\n").await;
    assert!(fixture.is_kill_switch_on() && fixture.is_valid());
}

#[tokio::test]
async fn the_flags_apply_until_a_policy_file_appears() {
    let mut fixture = watch_in(tempfile::tempdir().unwrap()).await;
    assert_eq!(**fixture.watch.policy().borrow(), flags());
    assert!(fixture.is_valid(), "an absent file is valid before the first file");
    fixture.write("killSwitch: true\n").await;
    assert!(fixture.is_kill_switch_on());
}

#[tokio::test]
async fn a_pipe_is_rejected_without_waiting_for_a_writer() {
    let folder = tempfile::tempdir().unwrap();
    nix::unistd::mkfifo(&file(&folder), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let fixture = watch_in(folder).await;
    assert_eq!(fixture.error().as_deref(), Some("the path is not a regular file"));
}

#[tokio::test]
async fn receivers_are_notified_of_changes_only() {
    let mut fixture = watch_file_with("killSwitch: false\n").await;
    let mut policy = fixture.watch.policy();
    policy.mark_unchanged();
    fixture.watch.reread().await;
    assert!(!policy.has_changed().unwrap(), "the same file");
    fixture.write("killSwitch: false # by Ada\n").await;
    assert!(!policy.has_changed().unwrap(), "the same policy");
    fixture.write("killSwitch: true\n").await;
    assert!(policy.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn the_task_rereads_the_policy_file() {
    let fixture = watch_file_with("killSwitch: false\n").await;
    let mut policy = fixture.watch.policy();
    let stop = CancellationToken::new();
    let running = tokio::spawn(fixture.watch.run(stop.clone()));
    std::fs::write(file(&fixture.folder), "killSwitch: true\n").unwrap();
    let changed = policy.wait_for(|rules| rules.opt_in.kill_switch);
    drop(tokio::time::timeout(Duration::from_secs(3600), changed).await.expect("a read of the file").unwrap());
    stop.cancel();
    running.await.unwrap();
}

#[test]
fn a_change_is_logged_field_by_field() {
    let before = PolicyOverrides::parse("killSwitch: true\nmaxUploadRate: 1Mi\nconcurrentBlobs: 2").unwrap();
    let now = PolicyOverrides::parse("killSwitch: true\nmaxUploadRate: 2Mi\nrecoverOn: [denied]").unwrap();
    let expected =
        ["concurrentBlobs: 2 -> as the flag", "maxUploadRate: 1Mi -> 2Mi", "recoverOn: as the flag -> [denied]"];
    assert_eq!(changes(&before, &now), expected);
}

#[tokio::test]
async fn an_agent_that_starts_with_an_invalid_policy_file_recovers_nothing() {
    let mut fixture = watch_file_with("killSwitch: ture\n").await;
    assert!(fixture.error().is_some() && fixture.is_kill_switch_on(), "the invalid file may turn the kill switch on");
    fixture.write("concurrentBlobs: 3\n").await;
    assert!(!fixture.is_kill_switch_on());
}
