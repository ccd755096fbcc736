//! `lighterman pull` and `lighterman status` as a user runs them, against a real control socket.

use std::path::PathBuf;
use std::process::Output;
use std::sync::Arc;

use async_trait::async_trait;
use lighterman::control::{Config, ControlServer};
use lighterman::control::{PullFailure, PullProgress, PullRequest, Status, StatusSource};
use lighterman::model::{MemberStatus, MeshStatus};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

struct FixedStatus;

#[async_trait]
impl StatusSource for FixedStatus {
    async fn status(&self) -> Status {
        let member = |node: &str| MemberStatus { node: node.into(), ..MemberStatus::default() };
        let mesh = MeshStatus { down: 2, members: vec![member("n2"), member("n\u{1b}3")], ..MeshStatus::default() };
        Status { node: Some("n1".into()), mesh: Some(mesh), ..Status::default() }
    }
}

const IMAGE: &str = "r.test/shop/checkout:v1";

/// Runs the binary against a socket that answers each pull with these steps.
async fn lighterman(arguments: &[&str], steps: Vec<PullProgress>) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let socket: PathBuf = folder.path().join("agent.sock");
    let (pull_sender, mut pulls) = mpsc::channel::<PullRequest>(1);
    let control =
        ControlServer::bind(Config { socket: socket.clone() }, Arc::new(FixedStatus), pull_sender).await.unwrap();
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    let serving = tokio::spawn(control.run(stop.clone()));
    let answering = tokio::spawn(async move {
        let mut open = Vec::new();
        while let Some(Some(request)) = stopping.run_until_cancelled(pulls.recv()).await {
            assert_eq!(request.reference.to_string(), IMAGE);
            for step in &steps {
                request.progress.send(step.clone()).await.unwrap();
            }
            open.push(request);
        }
    });
    let binary = tokio::process::Command::new(env!("CARGO_BIN_EXE_lighterman"))
        .args(arguments)
        .arg("--socket")
        .arg(socket)
        .env_clear()
        .output();
    let output = binary.await.unwrap();
    stop.cancel();
    serving.await.unwrap();
    answering.await.unwrap();
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn steps() -> Vec<PullProgress> {
    let (digest, node) = (format!("sha256:{}", "0".repeat(64)), vec!["n2".to_owned()]);
    vec![
        PullProgress::Resolved { digest: digest.clone(), providers: node.clone(), more_providers: 0 },
        PullProgress::Planned { missing_bytes: 10 << 20, missing_blobs: 2 },
        PullProgress::Bytes { done: 1 << 20, total: 10 << 20 },
        PullProgress::Bytes { done: 10 << 20, total: 10 << 20 },
        PullProgress::Done { digest, bytes: 10 << 20, fetched: 3, there: 1, milliseconds: 1500, from: node },
    ]
}

#[tokio::test]
async fn a_pull_without_a_terminal_prints_lines() {
    let output = lighterman(&["pull", IMAGE], steps()).await;
    let expected = format!(
        "{IMAGE} is sha256:{}, provided by n2\n2 blobs, 10.0 MiB to fetch\n 10 % of 10.0 MiB\n100 % of 10.0 MiB\n\
         {IMAGE} is on this node: 3 blobs, 10.0 MiB from n2 in 1.5 s (1 present before)\n",
        "0".repeat(64)
    );
    assert_eq!((text(&output.stdout), output.status.code()), (expected, Some(0)), "{}", text(&output.stderr));
}

#[tokio::test]
async fn json_output_has_one_object_for_each_step() {
    let output = lighterman(&["pull", IMAGE, "--json"], steps()).await;
    let printed: Vec<PullProgress> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((printed, output.status.code()), (steps(), Some(0)));
}

#[tokio::test]
async fn a_failure_names_the_image_and_a_remedy() {
    let message = "no peer holds the image (asked: \u{1b}[2Jn2)".to_owned();
    let failed = PullProgress::Failed { kind: PullFailure::NoProvider, message, retryable: true };
    let output = lighterman(&["pull", IMAGE], vec![failed]).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(IMAGE) && stderr.contains("n2") && stderr.contains("lighterman status"), "{stderr}");
    assert!(!stderr.contains('\u{1b}'), "no escape sequence reaches the terminal: {stderr:?}");
}

/// Exit code and a word of the remedy. A new kind does not compile without both.
fn expected_end(kind: PullFailure) -> (i32, &'static str) {
    match kind {
        PullFailure::NoProvider => (1, "crictl images"),
        PullFailure::Disagreement => (1, "by digest"),
        PullFailure::Unusable => (1, "platform"),
        PullFailure::OverLimit => (1, "policy file"),
        PullFailure::Closed => (1, "setting"),
        PullFailure::FetchFailed => (1, "log on this node"),
        PullFailure::StoreFailed => (1, "containerd"),
        PullFailure::Abandoned => (1, "agent runs"),
        PullFailure::Busy => (1, "other pulls"),
        PullFailure::Other => (1, "agent's log"),
    }
}

#[tokio::test]
async fn every_kind_of_failure_prints_the_text_with_a_remedy_and_exits_with_1() {
    for kind in [
        PullFailure::NoProvider,
        PullFailure::Disagreement,
        PullFailure::Unusable,
        PullFailure::OverLimit,
        PullFailure::Closed,
        PullFailure::FetchFailed,
        PullFailure::StoreFailed,
        PullFailure::Abandoned,
        PullFailure::Busy,
        PullFailure::Other,
    ] {
        let failed = PullProgress::failed(kind, "the cause. Failed at: n2".to_owned());
        let output = lighterman(&["pull", IMAGE], vec![failed]).await;
        let (code, remedy) = expected_end(kind);
        assert_eq!(output.status.code(), Some(code), "{kind:?}");
        let stderr = text(&output.stderr);
        let (cause, advice) = stderr.split_once(". Failed at: n2. ").expect("the text and the remedy");
        assert!(cause.ends_with("the cause") && advice.contains(remedy), "{kind:?}: {stderr}");
    }
}

#[tokio::test]
async fn a_pull_past_its_deadline_is_aborted() {
    // The agent sends nothing more and keeps the connection open.
    let output = lighterman(&["pull", IMAGE, "--timeout", "1"], steps()[..1].to_vec()).await;
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.contains(IMAGE) && stderr.contains("--timeout"), "{stderr}");
}

#[tokio::test]
async fn a_status_is_a_table_or_json() {
    let output = lighterman(&["status"], Vec::new()).await;
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stdout).starts_with("node              n1\n"), "{}", text(&output.stdout));
    let output = lighterman(&["status", "--json"], Vec::new()).await;
    assert_eq!(serde_json::from_slice::<Status>(&output.stdout).unwrap(), FixedStatus.status().await);
}

#[tokio::test]
async fn peers_are_printed_as_a_separate_table() {
    let output = lighterman(&["status", "--peers"], Vec::new()).await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    let first: Vec<_> = table.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(first, ["NODE", "n2", "n\u{fffd}3"], "one line per peer, and no escape sequence");
}

#[tokio::test]
async fn a_status_without_an_agent_exits_with_1() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock");
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_lighterman"));
    let output = command.args(["status", "--peers", "--socket"]).arg(&socket).env_clear().output().await.unwrap();
    let stderr = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()), "{stderr}");
    assert!(stderr.contains(socket.to_str().unwrap()), "{stderr}");
}
