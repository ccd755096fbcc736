//! The output of a pull: a bar on a terminal, plain lines elsewhere, JSON for programs.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

use crate::agent::recovery::progress::human_bytes;
use crate::control::PullProgress;
use crate::oci::Reference;

pub(super) struct PullOutput {
    reference: String,
    dry_run: bool,
    mode: OutputMode,
}

enum OutputMode {
    Json,
    Bar(ProgressBar),
    /// A line for each tenth of the bytes; the number is the last printed tenth.
    Lines(u64),
}

impl PullOutput {
    pub(super) fn new(reference: &Reference, dry_run: bool, json: bool) -> Self {
        let mode = if json {
            OutputMode::Json
        } else if std::io::stderr().is_terminal() {
            OutputMode::Bar(bar())
        } else {
            OutputMode::Lines(0)
        };
        Self { reference: reference.to_string(), dry_run, mode }
    }

    /// Prints one step. The caller prints a failure, but for JSON, which contains each step.
    pub(super) fn show(&mut self, progress: &PullProgress) {
        match (&mut self.mode, progress) {
            (OutputMode::Json, progress) => {
                line(&serde_json::to_string(progress).expect("names and numbers are JSON"));
            }
            (OutputMode::Bar(bar), PullProgress::Bytes { done, total }) => {
                bar.set_length(*total);
                bar.set_position(*done);
            }
            (OutputMode::Lines(printed), PullProgress::Bytes { done, total }) => {
                let tenth = tenths(*done, *total);
                if tenth > *printed {
                    *printed = tenth;
                    line(&format!("{:>3} % of {}", tenth * 10, human_bytes(*total)));
                }
            }
            (mode, progress) => {
                if let Some(text) = sentence(&self.reference, self.dry_run, progress) {
                    match mode {
                        OutputMode::Bar(bar) => bar.suspend(|| line(&text)),
                        OutputMode::Json | OutputMode::Lines(_) => line(&text),
                    }
                }
                if let (OutputMode::Bar(bar), true) = (mode, progress.is_last(self.dry_run)) {
                    bar.finish_and_clear();
                }
            }
        }
    }
}

fn sentence(reference: &str, dry_run: bool, progress: &PullProgress) -> Option<String> {
    match progress {
        PullProgress::Resolved { digest, providers, more_providers } => {
            let more = if *more_providers > 0 { format!(" and {more_providers} more") } else { String::new() };
            let end = if dry_run { "; a dry run fetches nothing" } else { "" };
            Some(format!("{reference} is {digest}, provided by {}{more}{end}", providers.join(", ")))
        }
        PullProgress::Planned { missing_bytes, missing_blobs } => {
            Some(format!("{missing_blobs} blobs, {} to fetch", human_bytes(*missing_bytes)))
        }
        PullProgress::Unpacking { layer, of } => Some(format!("unpacking layer {layer} of {of}")),
        PullProgress::Done { bytes, fetched: 0, there, .. } if *bytes == 0 => {
            Some(format!("{reference} is on this node; all {there} blobs were present before"))
        }
        PullProgress::Done { bytes, fetched, there, milliseconds, from, .. } => Some(format!(
            "{reference} is on this node: {fetched} blobs, {} from {} in {}.{} s ({there} present before)",
            human_bytes(*bytes),
            from.join(", "),
            milliseconds / 1000,
            milliseconds % 1000 / 100,
        )),
        PullProgress::Bytes { .. } | PullProgress::Failed { .. } | PullProgress::Other => None,
    }
}

fn tenths(done: u64, total: u64) -> u64 {
    if total == 0 { 10 } else { u64::try_from(u128::from(done) * 10 / u128::from(total)).unwrap_or(10) }
}

// A closed pipe (`| head`) is no failure of the pull.
fn line(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{bar:40} {binary_bytes:>11} / {binary_total_bytes:11} {binary_bytes_per_sec} {eta}",
    );
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_progress_step_is_printed_as_one_sentence() {
        let resolved = PullProgress::Resolved {
            digest: "sha256:00".into(),
            providers: vec!["n1".into(), "n2".into()],
            more_providers: 3,
        };
        let done = |bytes, fetched, there| PullProgress::Done {
            digest: "sha256:00".into(),
            bytes,
            fetched,
            there,
            milliseconds: 2345,
            from: vec!["n1".into()],
        };
        for (progress, dry_run, expected) in [
            (resolved.clone(), false, "r.test/a:1 is sha256:00, provided by n1, n2 and 3 more"),
            (resolved, true, "r.test/a:1 is sha256:00, provided by n1, n2 and 3 more; a dry run fetches nothing"),
            (PullProgress::Planned { missing_bytes: 3 << 20, missing_blobs: 4 }, false, "4 blobs, 3.0 MiB to fetch"),
            (PullProgress::Unpacking { layer: 3, of: 5 }, false, "unpacking layer 3 of 5"),
            (
                done(1 << 20, 4, 1),
                false,
                "r.test/a:1 is on this node: 4 blobs, 1.0 MiB from n1 in 2.3 s (1 present before)",
            ),
            (done(0, 0, 5), false, "r.test/a:1 is on this node; all 5 blobs were present before"),
        ] {
            assert_eq!(sentence("r.test/a:1", dry_run, &progress).as_deref(), Some(expected));
        }
    }

    #[test]
    fn extreme_sizes_are_printed_without_overflow() {
        assert_eq!((tenths(0, 0), tenths(u64::MAX, u64::MAX), tenths(1, u64::MAX)), (10, 10, 0));
    }
}
