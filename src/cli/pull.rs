//! `lighterman pull REF`: requests an image of this node's agent, and prints the progress. The
//! agent fetches the image from peers.

mod output;
#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use self::output::PullOutput;
use super::runtime;
use super::socket::{SocketArgs, printable, with_advice};
use crate::control::{Client, ClientError};
use crate::control::{PullFailure, PullProgress};
use crate::oci::Reference;

/// Flags of `lighterman pull`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct PullArgs {
    /// The image, as in a pod's spec
    #[arg(value_name = "REF")]
    reference: Reference,

    /// Only print the image's digest and its providers
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    socket: SocketArgs,

    /// Seconds until the command gives up
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,

    /// Print each step as a JSON object, one per line
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
The agent of this node fetches the image from the nodes that have it under the same registry and repository, and records
the image in containerd as a pull does. No annotation is needed: only root of the node may open the agent's socket.
Ctrl-C stops the pull. The next pull reuses the fetched bytes, or containerd collects them.

Examples:
  lighterman pull docker.io/library/nginx:1.27
  lighterman pull --dry-run registry.example.com/shop/checkout@sha256:...
  kubectl -n lighterman exec ds/lighterman -- lighterman pull nginx:1.27

Exit codes: 0 the image is on this node (with --dry-run: it has a provider), 1 it is not, 64 wrong reference or flags.";

pub(super) fn run(args: PullArgs) -> ExitCode {
    let PullArgs { reference, dry_run, socket, timeout, json } = args;
    let mut output = PullOutput::new(&reference, dry_run, json);
    let client = socket.client();
    let work = async {
        let pulled = pull(&client, &reference, dry_run, |progress| output.show(progress));
        tokio::time::timeout(Duration::from_secs(timeout), pulled).await
    };
    let pulled = match runtime() {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => return fail(&format!("the threads of the runtime cannot be started: {error}")),
    };
    match pulled {
        Ok(Ok(PullProgress::Failed { kind, message, .. })) => fail(&failure_line(&reference, kind, &message)),
        Ok(Ok(_)) => ExitCode::SUCCESS,
        Ok(Err(error)) => fail(&format!("{reference}: {}", with_advice(&error))),
        Err(_) => {
            fail(&format!("{reference}: the pull did not end within {timeout} s. Retry with a longer --timeout."))
        }
    }
}

/// Requests the image, reports each step, and returns the last step.
async fn pull(
    client: &Client,
    reference: &Reference,
    dry_run: bool,
    mut report: impl FnMut(&PullProgress),
) -> Result<PullProgress, ClientError> {
    let mut pulling = client.pull(reference, dry_run).await?;
    loop {
        let progress = pulling.next().await?;
        report(&progress);
        if progress.is_last(dry_run) {
            return Ok(progress);
        }
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("lighterman: {}", printable(message));
    ExitCode::FAILURE
}

/// The line that a failure prints: the agent's text, equal to the text of the pod's Event, and the
/// remedy.
fn failure_line(reference: &Reference, kind: PullFailure, message: &str) -> String {
    format!("{reference}: {message}. {}", advice(kind))
}

/// The remedy of a failure.
fn advice(kind: PullFailure) -> &'static str {
    match kind {
        PullFailure::NoProvider => {
            "`lighterman status --peers` lists the connected nodes; `crictl images` on a node lists its images with their names."
        }
        PullFailure::Disagreement => "Nodes have different images under this tag: name the image by digest.",
        PullFailure::Unusable => "The nodes' image of this name has no usable manifest for this node's platform.",
        PullFailure::OverLimit => "Change the limit in the policy file or the agent's flags, or free some space.",
        PullFailure::Closed => "Change the setting that the message names.",
        PullFailure::FetchFailed => "Retry; see the agent's log on this node and on the providers.",
        PullFailure::StoreFailed => "This node's containerd is at fault: see its log and its disk.",
        PullFailure::Abandoned => "The agent stops or restarts: retry when the agent runs.",
        PullFailure::Busy => "Retry when one of the other pulls has ended.",
        PullFailure::Other => "See the agent's log.",
    }
}
