//! The binary from outside: exit codes, messages, and the demo.

use std::process::{Command, Output};

use serde_json::Value;

fn lighterman(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lighterman")).args(arguments).env_clear().output().unwrap()
}

#[test]
fn wrong_flags_exit_with_64_and_one_line() {
    let agent = ["agent", "--node-name", "n1"];
    for (arguments, expected) in [
        (vec!["--no-such-flag"], "--no-such-flag"),
        (vec!["sail"], "sail"),
        (vec!["agent"], "--node-name"),
        (vec!["agent", "--node-name", "Not A Name"], "Not A Name"),
        ([&agent[..], &["--concurrent-blobs", "0"]].concat(), "at least 1"),
        ([&agent[..], &["--allow-peer", "12D3"]].concat(), "12D3KooW"),
        ([&agent[..], &["--admission", "static"]].concat(), "--allow-peer"),
        ([&agent[..], &["--admission", "certificate", "--tls-cert", "tls.crt"]].concat(), "--tls-key"),
        ([&agent[..], &["--admission-grace", "86401"]].concat(), "86401"),
        ([&agent[..], &["--listen", "nowhere"]].concat(), "nowhere"),
        (agent.to_vec(), "--pod-name"),
        (vec!["--log", "lighterman=loud", "demo"], "--log"),
        (vec!["demo", "--nodes", "1"], "1"),
        (vec!["demo", "--image-size", "5 parsecs"], "parsecs"),
        (vec!["pull"], "REF"),
        (vec!["pull", "shop//checkout"], "shop//checkout"),
        (vec!["pull", "nginx@sha512:00"], "sha512"),
        (vec!["pull", "nginx", "--timeout", "0"], "--timeout"),
    ] {
        let output = lighterman(&arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
        assert!(text.contains(expected), "{arguments:?}: {text}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["agent", "--help"],
        &["demo", "--help"],
        &["pull", "--help"],
        &["status", "--help"],
    ] {
        let output = lighterman(arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(!output.stdout.is_empty(), "{arguments:?}");
    }
    let help = String::from_utf8(lighterman(&["--help"]).stdout).unwrap();
    assert!(help.contains("Examples:") && help.contains("Exit codes:"), "{help}");
}

/// Arguments of an agent with a containerd socket, so that the agent searches no socket here.
fn agent_on(data: &str) -> [&str; 9] {
    let socket = "/run/containerd/containerd.sock";
    ["agent", "--node-name", "n1", "--pod-name", "p", "--containerd-socket", socket, "--data-dir", data]
}

#[test]
fn an_agent_that_cannot_start_prints_the_reason_and_exits_with_1() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_string_lossy().into_owned();
    let output = lighterman(&agent_on(&data));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("not inside a cluster"), "{text}");
}

#[test]
fn an_invalid_containerd_namespace_exits_with_64() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_string_lossy().into_owned();
    let agent = agent_on(&data);
    let output = lighterman(&[&agent[..], &["--containerd-namespace", "no namespace"]].concat());
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(64), "{text}");
    assert!(text.contains("no namespace"), "{text}");
}

#[test]
fn commands_without_an_agent_name_the_socket_and_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent.sock").to_string_lossy().into_owned();
    for arguments in [&["pull", "nginx"][..], &["pull", "nginx", "--dry-run", "--json"], &["status"]] {
        let output = lighterman(&[arguments, &["--socket", &socket]].concat());
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(&socket) && text.contains("crictl ps"), "{text}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_log_that_goes_to_no_terminal_has_no_color_codes() {
    let output = lighterman(&["--log", "info", "demo", "--image-size", "1MiB", "--json"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains(" INFO ") && !stderr.contains('\u{1b}'), "{stderr}");
}

#[test]
fn the_demo_recovers_an_image_and_verifies_its_digest() {
    let output = lighterman(&["--log", "warn", "demo", "--image-size", "3MiB", "--json"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let text = String::from_utf8(output.stdout).unwrap();
    let result: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(result["recovered"], true);
    assert_eq!(result["verified"], true);
    assert_eq!(result["providers"], serde_json::json!(["node-1"]));
    assert!(result["bytes"].as_u64().unwrap() > 3 << 20, "{result}");
    assert!(result["seconds"].as_f64().unwrap() > 0.0);
    assert!(stderr.contains("connection refused"), "the demo really tries its registry: {stderr}");
}
