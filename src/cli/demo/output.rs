//! The output of the demo: steps, details, and a bar for each blob during the transfer.

use std::collections::HashMap;
use std::io::Write;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::agent::recovery::progress::RecoveryTracker;
use crate::oci::{Digest, Reference};

/// Interval between redraws of the bars: looks smooth, and costs little.
const REDRAW: Duration = Duration::from_millis(50);

/// Prints to standard output, or to standard error where `--json` has standard output for itself.
pub(super) struct DemoOutput {
    json: bool,
}

impl DemoOutput {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    pub(super) fn step(&self, text: &str) {
        self.line(&format!("\n{text}"));
    }

    /// An indented line below the last step.
    pub(super) fn detail(&self, text: &str) {
        self.line(&format!("  {text}"));
    }

    // A closed pipe (`| head`) is no failure of the demo.
    fn line(&self, text: &str) {
        let _ = if self.json { writeln!(std::io::stderr(), "{text}") } else { writeln!(std::io::stdout(), "{text}") };
    }

    /// Draws a bar for each blob of the recovery until `stop`, and leaves the last state on the
    /// terminal. Without a terminal nothing is drawn.
    pub(super) fn progress(
        &self,
        tracker: RecoveryTracker,
        image: Reference,
        stop: CancellationToken,
    ) -> JoinHandle<()> {
        let bars = MultiProgress::with_draw_target(if self.json {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stdout()
        });
        tokio::spawn(async move {
            let mut drawn: HashMap<Digest, ProgressBar> = HashMap::new();
            let mut last = None;
            loop {
                let stopped = stop.run_until_cancelled(tokio::time::sleep(REDRAW)).await.is_none();
                last = tracker.running().remove(&image).or(last);
                for (digest, blob) in last.iter().flat_map(|progress| progress.blobs()) {
                    let bar = drawn.entry(digest).or_insert_with(|| bars.add(bar(digest, blob.size)));
                    bar.set_position(blob.done);
                    if blob.done == blob.size && !bar.is_finished() {
                        bar.finish();
                    }
                }
                if stopped {
                    return;
                }
            }
        })
    }
}

fn bar(digest: Digest, size: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "  {prefix} {bar:40} {binary_bytes:>11} / {binary_total_bytes:11} {binary_bytes_per_sec}",
    );
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
    ProgressBar::new(size).with_style(style).with_prefix(digest.short())
}
