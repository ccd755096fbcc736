//! `lighterman pull REF`: an image from peers, by hand. The agent of this node does it; here it is asked and watched.

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
use crate::oci::Reference;
use crate::ports::{PullFailure, PullProgress};

/// Flags of `lighterman pull`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct PullArgs {
    /// The image, as a pod names it
    #[arg(value_name = "REF")]
    reference: Reference,

    /// Only say what it is and who holds it
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    socket: SocketArgs,

    /// Give up after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,

    /// Print what happens as JSON objects, one a line
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
The agent of this node fetches the image from the nodes that hold it under the same registry and repository, and tells
containerd of it as a pull would. No annotation is needed: whoever may open the agent's socket is root on the node.
To stop it, press Ctrl-C; what has come already is found again by the next attempt, or collected.

Examples:
  lighterman pull docker.io/library/nginx:1.27
  lighterman pull --dry-run registry.example.com/shop/checkout@sha256:...
  kubectl -n lighterman exec ds/lighterman -- lighterman pull nginx:1.27

Exit codes: 0 the image is here (or, with --dry-run, could be had), 1 it is not, 64 wrong reference or flags.";

/// Asks for the image and shows how it goes.
pub(super) fn run(args: PullArgs) -> ExitCode {
    let PullArgs { reference, dry_run, socket, timeout, json } = args;
    let mut show = PullOutput::new(&reference, dry_run, json);
    let client = socket.client();
    let work = async {
        let pulled = pull(&client, &reference, dry_run, |progress| show.show(progress));
        tokio::time::timeout(Duration::from_secs(timeout), pulled).await
    };
    let pulled = match runtime() {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => return fail(&format!("no threads: {error}")),
    };
    match pulled {
        Ok(Ok(PullProgress::Failed { kind, message, .. })) => {
            fail(&format!("{reference}: {message}. {}", advice(kind)))
        }
        Ok(Ok(_)) => ExitCode::SUCCESS,
        Ok(Err(error)) => fail(&format!("{reference}: {}", with_advice(&error))),
        Err(_) => {
            fail(&format!("{reference}: not here after {timeout} s, given up. A longer --timeout lets it go on."))
        }
    }
}

/// Asks for the image, passes on everything that happens, and answers the last of it.
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

/// What to do about a failure.
fn advice(kind: PullFailure) -> &'static str {
    match kind {
        PullFailure::NoProvider => {
            "`lighterman status` says which nodes are connected; `crictl images` on a node says what it holds, and under which name."
        }
        PullFailure::Disagreement => "Nodes hold different images under this tag.",
        PullFailure::Unusable => "What the nodes hold under this name does not run here.",
        PullFailure::OverLimit => "Change the limit in the rules file or the agent's flags, or free some space.",
        PullFailure::Closed => "The message names the setting.",
        PullFailure::FetchFailed => "Try again; the agent's log, here and on the nodes asked, says more.",
        PullFailure::StoreFailed => "This node's containerd is at fault: see its log and its disk.",
        PullFailure::Abandoned => "The agent stops or restarts; try again when it runs.",
        PullFailure::Busy => "Try again when one of them has ended.",
        PullFailure::Other => "The agent's log says more.",
    }
}
