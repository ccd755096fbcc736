//! `lighterman demo`: real agents on loopback with real libp2p and QUIC, an image in the content
//! store of the first node, a registry that is down, and a pod on the second node that needs the
//! image.
//!
//! Only Kubernetes is simulated: an in-memory cluster (watch, nudge, Event), and a kubelet that
//! looks for the image, tries to pull the image, and starts the pod.

mod kubelet;
mod node;
mod output;

use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use self::kubelet::Kubelet;
use self::node::DemoNode;
use self::output::DemoOutput;
use super::runtime;
use crate::agent::recovery::progress::human_bytes;
use crate::config::loopback;
use crate::identity::Identity;
use crate::layout::LayoutStore;
use crate::model::RecoveredImage;
use crate::oci::{Digest, Hasher, Reference};
use crate::ports::{Blobs, ImageRecords, StoreError};
use crate::simulated::MemoryCluster;
use crate::simulated::image::{MadeImage, put_image};

/// Flags of `lighterman demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Number of agents
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=32))]
    nodes: u32,

    /// Size of the image in bytes, or with the unit KiB, MiB or GiB
    #[arg(long, default_value = "256MiB", value_name = "SIZE", value_parser = parse_size)]
    image_size: u64,

    /// Print one JSON object as the last line of standard output, and all other lines to standard
    /// error
    #[arg(long)]
    json: bool,

    /// Folder for the content stores, which are removed at the end
    #[arg(long, value_name = "FOLDER", default_value_os_t = std::env::temp_dir())]
    folder: std::path::PathBuf,
}

/// The result for `--json`.
#[derive(Debug, Serialize)]
struct DemoOutcome {
    /// Whether the image was recovered and the pod started.
    recovered: bool,
    /// Bytes sent between nodes.
    bytes: u64,
    /// Time from the kubelet's failed pull to the running pod.
    seconds: f64,
    /// The nodes that sent the bytes.
    providers: Vec<String>,
    /// Whether every blob on the second node's disk has the hash of its digest.
    verified: bool,
}

type DemoError = Box<dyn std::error::Error + Send + Sync>;

/// Deadline of each step: an image of 8 GiB at a tenth of the usual speed.
const DEADLINE: Duration = Duration::from_secs(300);

pub(super) fn run(args: DemoArgs) -> ExitCode {
    let json = args.json;
    let result = runtime().map_err(DemoError::from).and_then(|runtime| runtime.block_on(run_demo(args)));
    let outcome = match result {
        Ok(outcome) => outcome,
        Err(error) => {
            eprintln!("lighterman demo: {error}");
            DemoOutcome { recovered: false, bytes: 0, seconds: 0.0, providers: Vec::new(), verified: false }
        }
    };
    if json {
        let line = serde_json::to_string(&outcome).expect("numbers and names are JSON");
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    if outcome.recovered && outcome.verified { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn run_demo(args: DemoArgs) -> Result<DemoOutcome, DemoError> {
    let DemoArgs { nodes: count, image_size, json, folder } = args;
    let output = DemoOutput::new(json);
    let folder = tempfile::Builder::new().prefix("lighterman-demo-").tempdir_in(&folder)?;

    output
        .step(&format!("Starting {count} agents, each with a key, a content store on disk and two ports on loopback."));
    let cluster = MemoryCluster::default();
    cluster.put_namespace("shop", &[("lighterman.dev/allow", "true")]);
    let mut nodes = start_nodes(count, folder.path(), &cluster).await?;
    for node in &nodes {
        output.detail(&format!(
            "{}  {}  blobs udp {}  metrics http://{}/metrics",
            node.name, node.peer, node.transfer, node.admin
        ));
    }
    output.step("Each agent admits the other agents by key, connects, and receives their inventories.");
    within("connections between all agents", async { nodes[0].wait_for_peers(nodes.len() - 1).await }).await?;

    let registry = closed_port()?;
    let reference: Reference = format!("{registry}/shop/checkout:v1").parse()?;
    let image = put_on_first(&nodes[0], &reference, image_size).await?;
    let digest = image.target.digest;
    output.step(&format!("{} has {reference}:", nodes[0].name));
    output.detail(&format!("{digest}, {} layers, {}", image.blobs.len() - 1, human_bytes(image.bytes())));
    within("the announcement of the image", nodes[1].wait_for_provider(&reference, digest)).await?;

    output.step(&format!("A pod on {} needs the image. The node's kubelet tries the registry:", nodes[1].name));
    let pods = nodes[1].take_pods().ok_or("the node has a kubelet already")?;
    let store = Arc::<LayoutStore>::clone(&nodes[1].store);
    let mut kubelet = Kubelet::new(store, cluster.nudges(), pods, reference.clone());
    let failure = kubelet.try_to_pull(registry).await?;
    output.detail(&failure);
    let began = Instant::now();
    kubelet.report_failure(&failure).await?;

    let watching = CancellationToken::new();
    let bars = output.progress(nodes[1].tracker.clone(), reference.clone(), watching.clone());
    let started = within("the start of the pod", kubelet.run_until_started()).await;
    watching.cancel();
    bars.await?;
    started?;
    let took = began.elapsed();
    let recovered = match nodes[1].tracker.ended(&reference) {
        Some(Ok(recovered)) => recovered,
        Some(Err(error)) => return Err(error.into()),
        None => return Err("the pod runs, but no image was recovered".into()),
    };
    output.step(&format!("The pod runs, {:.2} s after the failed pull.", took.as_secs_f64()));
    let providers = show_recovery(&output, &nodes, &recovered);
    for (_, report) in cluster.reports() {
        output.detail(&format!("Event {}: {}", report.kind.reason(), report.note));
    }

    output.step("Reading every blob from the disk and verifying its hash:");
    let verified = verify(&*nodes[1].store, &image).await?;
    output.detail(&format!("{} blobs, {digest}: {}", image.blobs.len() + 1, if verified { "right" } else { "WRONG" }));

    for node in nodes.drain(..).rev() {
        node.stop().await?;
    }
    Ok(DemoOutcome { recovered: true, bytes: recovered.bytes, seconds: took.as_secs_f64(), providers, verified })
}

async fn start_nodes(count: u32, folder: &Path, cluster: &MemoryCluster) -> Result<Vec<DemoNode>, DemoError> {
    let identities: Vec<_> = (0..count).map(|_| Identity::generate()).collect();
    let admitted: Vec<_> = identities.iter().map(Identity::peer_id).collect();
    let mut nodes: Vec<DemoNode> = Vec::new();
    for (number, identity) in (1..).zip(identities) {
        let join_addresses = nodes.first().map(|first| first.transfer.to_string()).into_iter().collect();
        let name = format!("node-{number}");
        nodes.push(DemoNode::start(&name, &folder.join(&name), identity, &admitted, join_addresses, cluster).await?);
    }
    Ok(nodes)
}

/// Puts an image with layers of unequal sizes into the node's store, as real images have.
async fn put_on_first(node: &DemoNode, reference: &Reference, size: u64) -> Result<MadeImage, StoreError> {
    let layers = [size / 2, size / 4, size / 8, size / 16, size / 16];
    let image = put_image(&*node.store, &[reference.to_string()], &layers, rand::random()).await?;
    // The image gets a record by digest too, as after a pull.
    for name in reference.record_names(image.target.digest) {
        node.store.put_image(&crate::ports::ImageRecord { name, target: image.target.clone() }).await?;
    }
    Ok(image)
}

fn show_recovery(output: &DemoOutput, nodes: &[DemoNode], recovered: &RecoveredImage) -> Vec<String> {
    let rate = recovered.bytes as f64 / 1e6 / recovered.took.as_secs_f64().max(1e-9);
    output.detail(&format!(
        "{} in {} blobs fetched in {:.2} s: {rate:.0} MB/s, encrypted, each blob hashed during the transfer and synced to disk",
        human_bytes(recovered.bytes),
        recovered.fetched,
        recovered.took.as_secs_f64(),
    ));
    let mut names = Vec::new();
    for (peer, bytes) in &recovered.providers {
        let name =
            nodes.iter().find(|node| node.peer == *peer).map_or_else(|| peer.to_string(), |node| node.name.clone());
        output.detail(&format!("from {name}: {}", human_bytes(*bytes)));
        names.push(name);
    }
    names
}

async fn verify(store: &dyn Blobs, image: &MadeImage) -> Result<bool, StoreError> {
    for blob in std::iter::once(&image.target).chain(&image.blobs) {
        let mut reader = store.open(blob.digest).await?;
        let mut hasher = Hasher::default();
        loop {
            let bytes = reader.read_at(hasher.size(), 1 << 20).await?;
            if bytes.is_empty() {
                break;
            }
            hasher.update(&bytes);
        }
        if hasher.verify(blob.digest, blob.size).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A port without a listener: the registry that is down.
fn closed_port() -> std::io::Result<std::net::SocketAddr> {
    TcpListener::bind(loopback())?.local_addr()
}

async fn within<T>(what: &str, work: impl Future<Output = Result<T, DemoError>>) -> Result<T, DemoError> {
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(result) => result,
        Err(_) => Err(format!("the demo waited {} s for {what}", DEADLINE.as_secs()).into()),
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].trim() {
        "" | "B" => 0,
        "KiB" | "K" => 10,
        "MiB" | "M" => 20,
        "GiB" | "G" => 30,
        unit => return Err(format!("{unit:?} is not a unit; use KiB, MiB or GiB")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size"))?;
    // The demo writes the image to the disk twice, so larger sizes are refused.
    number
        .checked_shl(shift)
        .filter(|size| *size >> shift == number && (1..=16 << 30).contains(size))
        .ok_or_else(|| "at most 16GiB".into())
}

fn missing_blob(digest: Digest) -> DemoError {
    format!("the content store lacks the blob {digest}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed_with_binary_units() {
        assert_eq!(parse_size("1"), Ok(1));
        assert_eq!(parse_size("4KiB"), Ok(4096));
        assert_eq!(parse_size("256MiB"), Ok(256 << 20));
        for bad in ["", "MiB", "1TiB", "17GiB", "-1", "99999999999999999999GiB", "0"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
