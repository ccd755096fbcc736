//! `lighterman status`: the state of this node's agent, as a table or as JSON.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;

use super::runtime;
use super::socket::{SocketArgs, printable, with_advice};
use crate::admin::{mesh_summary, mesh_table};
use crate::agent::recovery::progress::human_bytes;
use crate::control::{
    ClockStatus, ContainerdStatus, ImagesStatus, LayerStatus, NextImageStatus, OutageStatus, OwnImageStatus,
    PolicyFileStatus, RecoveryStatus, RetentionStatus, Status, UdpStatus,
};
use crate::decide::transport_choice::MAX_BLOB;

/// Flags of `lighterman status`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct StatusArgs {
    /// Print one JSON object, without the fields that are unknown to the agent
    #[arg(long)]
    json: bool,

    /// Print a table of all other agents instead
    #[arg(long, conflicts_with = "json")]
    peers: bool,

    #[command(flatten)]
    socket: SocketArgs,
}

const EXAMPLES: &str = "\
Examples:
  lighterman status
  lighterman status --peers
  lighterman status --json | jq .registriesDown
  kubectl -n lighterman exec ds/lighterman -- lighterman status

Exit codes: 0 the agent answered, 1 the agent did not answer, 64 wrong flags.";

pub(super) fn run(args: StatusArgs) -> ExitCode {
    let StatusArgs { json, peers, socket } = args;
    let client = socket.client();
    let response = match runtime() {
        Ok(runtime) => runtime.block_on(client.status()).map_err(|error| with_advice(&error)),
        Err(error) => Err(format!("the threads of the runtime cannot be started: {error}")),
    };
    let status = match response {
        Ok(status) => status,
        Err(error) => {
            eprintln!("lighterman: {}", printable(&error));
            return ExitCode::FAILURE;
        }
    };
    let text = match (json, peers, &status.mesh) {
        (true, ..) => serde_json::to_string_pretty(&status).expect("names and numbers are JSON") + "\n",
        (false, true, Some(mesh)) => mesh_table(mesh).lines().map(|line| printable(line) + "\n").collect(),
        (false, true, None) => {
            eprintln!("lighterman: the mesh does not answer; `lighterman status` prints the rest of the agent's state");
            return ExitCode::FAILURE;
        }
        (false, false, _) => table(&status),
    };
    // A closed pipe (`| head`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// Width of the first column, in characters.
const WIDTH: usize = 17;

/// The table: for each row a name, and one line or several.
fn table(status: &Status) -> String {
    let Status {
        node,
        peer_id,
        version,
        containerd,
        mesh,
        udp,
        clock,
        images,
        retained,
        own_image,
        registries_down,
        recoveries,
        policy_file,
    } = status;
    let cell = |text: &Option<String>| vec![text.clone().unwrap_or_else(unknown)];
    let mut rows = vec![("node", cell(node)), ("PeerId", cell(peer_id)), ("version", cell(version))];
    rows.extend(containerd_rows(&containerd.clone().unwrap_or_default()));
    rows.push(("mesh", mesh.as_ref().map_or_else(unknown_lines, mesh_summary)));
    rows.push(("UDP to peers", vec![udp.as_ref().map_or_else(unknown, udp_line)]));
    rows.push(("clock", vec![clock.as_ref().map_or_else(unknown, clock_line)]));
    rows.push(("images", images.as_ref().map_or_else(unknown_lines, |images| vec![images_line(images)])));
    rows.push(("retained layers", vec![retained.as_ref().map_or_else(|| "not managed".into(), retained_line)]));
    rows.push(("own image", own_image.as_ref().map_or_else(|| vec!["not managed".into()], own_image_lines)));
    rows.push(("registries down", lines(registries_down.as_deref(), outage_line)));
    rows.push(("recoveries", lines(recoveries.as_deref(), recovery_line)));
    rows.push(("policy file", policy_file.as_ref().map_or_else(|| vec!["none".into()], policy_file_lines)));
    let mut text = String::new();
    for (name, lines) in rows {
        for (number, line) in lines.iter().enumerate() {
            let name = if number == 0 { name } else { "" };
            text += &format!("{name:WIDTH$} {}\n", printable(line));
        }
    }
    text
}

fn unknown() -> String {
    "unknown".into()
}

fn unknown_lines() -> Vec<String> {
    vec![unknown()]
}

/// One line for each item, and `none` for an empty list.
fn lines<T>(known: Option<&[T]>, line: impl Fn(&T) -> String) -> Vec<String> {
    match known {
        None => unknown_lines(),
        Some([]) => vec!["none".into()],
        Some(all) => all.iter().map(line).collect(),
    }
}

fn containerd_rows(containerd: &ContainerdStatus) -> Vec<(&'static str, Vec<String>)> {
    let ContainerdStatus {
        version,
        content_root,
        blobs_read,
        ingest,
        discards_unpacked_layers,
        unpacking,
        sandbox_image,
        image_verifiers,
    } = containerd;
    let read = blobs_read.map_or_else(unknown, |access| access.to_string());
    let layers = match discards_unpacked_layers {
        Some(true) => "discarded (discard_unpacked_layers), except retained layers".into(),
        Some(false) => "kept".into(),
        None => unknown(),
    };
    vec![
        ("containerd", vec![version.clone().unwrap_or_else(unknown)]),
        ("content root", vec![content_root.clone().unwrap_or_else(unknown)]),
        ("blobs are read", vec![read]),
        ("blobs come in", vec![ingest.clone().unwrap_or_else(unknown)]),
        ("unpacked layers", vec![layers]),
        ("unpacked here", vec![unpacking.clone().unwrap_or_else(unknown)]),
        ("sandbox image", vec![sandbox_image.clone().unwrap_or_else(unknown)]),
        ("image verifiers", lines(image_verifiers.as_deref(), String::clone)),
    ]
}

fn udp_line(udp: &UdpStatus) -> String {
    let UdpStatus { blocked_since, port, nodes } = udp;
    match blocked_since {
        None => "not blocked".into(),
        Some(since) => format!(
            "port {port} is blocked since {}: {nodes} nodes answer over TCP and none over UDP, so only images with layers up to {} MiB are fetched",
            time(*since),
            MAX_BLOB >> 20
        ),
    }
}

fn clock_line(clock: &ClockStatus) -> String {
    let ClockStatus { ahead_seconds, too_far, measured } = clock;
    let measured = time(*measured);
    let off = match ahead_seconds {
        0 => return format!("equal to the API server's at {measured}"),
        1.. => format!("{ahead_seconds} s ahead of"),
        ..0 => format!("{} s behind", ahead_seconds.unsigned_abs()),
    };
    let consequence = if *too_far { "; peers may reject each other's credentials" } else { "" };
    format!("{off} the API server's at {measured}{consequence}")
}

fn images_line(images: &ImagesStatus) -> String {
    let ImagesStatus { announced, incomplete, reasons } = images;
    let reasons: Vec<_> = reasons.iter().map(|(reason, images)| format!("{reason} {images}")).collect();
    let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
    format!("{announced} announced, {incomplete} incomplete{reasons}")
}

fn retained_line(retained: &RetentionStatus) -> String {
    let RetentionStatus { bytes, budget, images, wanted, lacking, lacking_reasons } = retained;
    let reasons: Vec<_> = lacking_reasons.iter().map(|(reason, images)| format!("{reason} {images}")).collect();
    let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
    format!(
        "{} of at most {}, of {images} images; {lacking} of the {wanted} images with retained layers lack layers{reasons}",
        human_bytes(*bytes),
        human_bytes(*budget)
    )
}

fn own_image_lines(own: &OwnImageStatus) -> Vec<String> {
    let OwnImageStatus { current, next, is_template_known } = own;
    let next_line = |NextImageStatus { image, missing }: &NextImageStatus| match missing {
        None => format!("next {image}: fetched"),
        Some(reason) => format!("next {image}: needed, {reason}"),
    };
    let unread = (!is_template_known).then(|| "next unknown: the DaemonSet was not read yet".into());
    current.iter().map(|image| format!("current {image}")).chain(next.iter().map(next_line)).chain(unread).collect()
}

fn outage_line(outage: &OutageStatus) -> String {
    let OutageStatus { registry, how, since, said_by } = outage;
    format!("{registry}: {how}, since {}, seen by {}", time(*since), said_by.join(", "))
}

fn recovery_line(recovery: &RecoveryStatus) -> String {
    let RecoveryStatus { image, done, total, unpacking, from } = recovery;
    let from = if from.is_empty() { String::new() } else { format!(" from {}", from.join(", ")) };
    if *total == 0 {
        return format!("{image}: searching for the missing blobs");
    }
    let unpacking = match unpacking {
        Some(LayerStatus { layer, of }) => format!(", unpacking layer {layer} of {of}"),
        None => String::new(),
    };
    format!("{image}: {} of {}{from}{unpacking}", human_bytes(*done), human_bytes(*total))
}

fn policy_file_lines(file: &PolicyFileStatus) -> Vec<String> {
    let PolicyFileStatus { path, error, in_force_since, sets } = file;
    let since =
        in_force_since.map_or_else(|| "the flags are in force".into(), |at| format!("in force since {}", time(at)));
    let mut lines = vec![format!("{path}, {since}")];
    lines.extend(error.iter().map(|error| format!("the file's present content is not in force: {error}")));
    lines.extend(sets.iter().cloned());
    lines
}

/// RFC 3339, as in the log; a number out of range is printed as a number.
fn time(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    time.map_or_else(|| seconds.to_string(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::BlobAccess;
    use crate::model::MeshStatus;

    #[test]
    fn a_complete_status_is_printed_as_a_table() {
        let status = Status {
            node: Some("n1".into()),
            peer_id: Some("12D3KooWme".into()),
            version: Some("0.1.0".into()),
            containerd: Some(ContainerdStatus {
                version: Some("2.1.9".into()),
                content_root: Some("/var/lib/containerd/io.containerd.content.v1.content".into()),
                blobs_read: Some(BlobAccess::Files),
                ingest: Some("linked".into()),
                discards_unpacked_layers: Some(true),
                unpacking: Some("overlayfs".into()),
                sandbox_image: Some("registry.k8s.io/pause:3.10".into()),
                image_verifiers: Some(Vec::new()),
            }),
            mesh: Some(MeshStatus { alive: 3, release: "0.1.0".into(), ..MeshStatus::default() }),
            udp: Some(UdpStatus { blocked_since: Some(1_700_000_000), port: 4701, nodes: 3 }),
            clock: Some(ClockStatus { ahead_seconds: -42, too_far: true, measured: 1_700_000_000 }),
            images: Some(ImagesStatus {
                announced: 41,
                incomplete: 3,
                reasons: [("layers discarded after unpacking".into(), 2), ("layers lost".into(), 1)].into(),
            }),
            retained: Some(RetentionStatus {
                bytes: 3 << 20,
                budget: 12 << 20,
                images: 2,
                wanted: 3,
                lacking: 1,
                lacking_reasons: [("only the kubelet's credential plugin can pull them".to_owned(), 1)].into(),
            }),
            own_image: Some(OwnImageStatus {
                current: vec!["r.test/lighterman:v1".into()],
                next: vec![
                    NextImageStatus {
                        image: "r.test/lighterman:v2".into(),
                        missing: Some("no peer provides it".into()),
                    },
                    NextImageStatus { image: "r.test/init:v2".into(), missing: None },
                ],
                is_template_known: true,
            }),
            registries_down: Some(vec![OutageStatus {
                registry: "registry.example.com:5000".into(),
                how: "connections are refused".into(),
                since: 1_700_000_000,
                said_by: vec!["n2".into(), "node-10".into()],
            }]),
            recoveries: Some(vec![
                RecoveryStatus {
                    image: "r.test/shop/checkout:v1".into(),
                    done: 3 << 20,
                    total: 12 << 20,
                    unpacking: Some(LayerStatus { layer: 2, of: 5 }),
                    from: vec!["n2".into()],
                },
                RecoveryStatus { image: "r.test/shop/basket:v1".into(), ..RecoveryStatus::default() },
            ]),
            policy_file: Some(PolicyFileStatus {
                path: "/etc/lighterman/policy.yaml".into(),
                error: Some("line 2, column 18: 0 is given".into()),
                in_force_since: Some(1_700_000_000),
                sets: vec!["killSwitch: true".into(), "maxUploadRate: 50Mi".into()],
            }),
        };
        let expected = "\
node              n1
PeerId            12D3KooWme
version           0.1.0
containerd        2.1.9
content root      /var/lib/containerd/io.containerd.content.v1.content
blobs are read    from its files
blobs come in     linked
unpacked layers   discarded (discard_unpacked_layers), except retained layers
unpacked here     overlayfs
sandbox image     registry.k8s.io/pause:3.10
image verifiers   none
mesh              3 alive, 0 suspected, 0 down, 0 banned; 0 neighbors
                  zones: none 1
                  releases: 0.1.0 1
                  inventory: 0 blobs of peers, 0.0 MiB; this node announces 0 items
                  lag: none
UDP to peers      port 4701 is blocked since 2023-11-14T22:13:20Z: 3 nodes answer over TCP and none over UDP, so only images with layers up to 64 MiB are fetched
clock             42 s behind the API server's at 2023-11-14T22:13:20Z; peers may reject each other's credentials
images            41 announced, 3 incomplete (layers discarded after unpacking 2, layers lost 1)
retained layers   3.0 MiB of at most 12.0 MiB, of 2 images; 1 of the 3 images with retained layers lack layers (only the kubelet's credential plugin can pull them 1)
own image         current r.test/lighterman:v1
                  next r.test/lighterman:v2: needed, no peer provides it
                  next r.test/init:v2: fetched
registries down   registry.example.com:5000: connections are refused, since 2023-11-14T22:13:20Z, seen by n2, node-10
recoveries        r.test/shop/checkout:v1: 3.0 MiB of 12.0 MiB from n2, unpacking layer 2 of 5
                  r.test/shop/basket:v1: searching for the missing blobs
policy file       /etc/lighterman/policy.yaml, in force since 2023-11-14T22:13:20Z
                  the file's present content is not in force: line 2, column 18: 0 is given
                  killSwitch: true
                  maxUploadRate: 50Mi
";
        assert_eq!(table(&status), expected);
    }

    #[test]
    fn an_unread_daemonset_is_printed_as_unknown() {
        let own = OwnImageStatus { current: vec!["r.test/lighterman:v1".into()], ..OwnImageStatus::default() };
        let lines = ["current r.test/lighterman:v1", "next unknown: the DaemonSet was not read yet"];
        assert_eq!(own_image_lines(&own), lines);
    }

    #[test]
    fn absent_fields_are_printed_as_unknown() {
        let table = table(&Status::default());
        assert_eq!(table.lines().filter(|line| line.ends_with(" unknown")).count(), 17, "{table}");
        assert!(table.ends_with("policy file       none\n"), "{table}");
    }
}
