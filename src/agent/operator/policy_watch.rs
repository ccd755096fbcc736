//! Keeps the rules in force what the rules file says.
//!
//! The file is read every two seconds. The kubelet changes a ConfigMap's files by swapping a symlink two levels up (`..data`), which leaves
//! watches of the kernel on a folder that is gone, and a modification time can stay the same; to read a few hundred bytes is simple and
//! certain. A file that is wrong, or goes away, changes nothing: what was in force stays.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::policy_file::{MAX_BYTES, PolicyOverrides};
use crate::decide::policy::Policy;
use crate::metrics::Metrics;
use crate::ports::PolicyFileStatus;

/// Short against the minute that the kubelet takes to bring a changed ConfigMap to the node.
const PERIOD: Duration = Duration::from_secs(2);

/// Watches the rules file.
pub struct PolicyWatch {
    path: PathBuf,
    /// What the flags say.
    flags: Policy,
    /// What is in force of the file.
    overrides: PolicyOverrides,
    /// The file as it was when it was last looked at.
    last_read: Option<PolicyFileContent>,
    policy: watch::Sender<Arc<Policy>>,
    status: watch::Sender<PolicyFileStatus>,
    metrics: Metrics,
}

/// What was found at the path.
#[derive(Debug, Clone, PartialEq, Eq)]
enum PolicyFileContent {
    Absent,
    /// Why it cannot be read.
    Unreadable(String),
    Content(Vec<u8>),
}

impl PolicyWatch {
    /// Reads the file once, so that what it says is in force from the first moment. Where it is not there, `flags` are in force; where it
    /// is wrong, they are with the kill switch on, until it is right.
    pub async fn open(path: PathBuf, flags: Policy, metrics: Metrics) -> Self {
        let status = PolicyFileStatus { path: path.display().to_string(), ..PolicyFileStatus::default() };
        let mut watch = Self {
            path,
            overrides: PolicyOverrides::default(),
            last_read: None,
            policy: watch::Sender::new(Arc::new(flags.clone())),
            status: watch::Sender::new(status),
            flags,
            metrics,
        };
        watch.reread().await;
        if watch.status.borrow().error.is_some() && watch.last_read != Some(PolicyFileContent::Absent) {
            // It may be the file that stops everything, with a slip of the pen in it. Agents that run keep what it said before; this one does
            // not know that.
            tracing::error!("nothing is recovered on this node until the rules file can be read");
            watch.policy.send_modify(|rules| Arc::make_mut(rules).opt_in.kill_switch = true);
        }
        watch
    }

    /// What is in force.
    pub fn policy(&self) -> watch::Receiver<Arc<Policy>> {
        self.policy.subscribe()
    }

    /// How it is with the file.
    pub fn status(&self) -> watch::Receiver<PolicyFileStatus> {
        self.status.subscribe()
    }

    /// Looks at the file at intervals until stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(PERIOD)).await.is_some() {
            self.reread().await;
        }
    }

    async fn reread(&mut self) {
        let path = self.path.clone();
        // A node's own disk, yet it may be the slowest thing on a node in trouble.
        let found = tokio::task::spawn_blocking(move || read_file(&path)).await.unwrap_or_else(|error| {
            // A bug of ours: let the supervisor see it.
            std::panic::resume_unwind(error.into_panic())
        });
        if self.last_read.as_ref() == Some(&found) {
            return;
        }
        match &found {
            PolicyFileContent::Absent => self.record_absent(),
            PolicyFileContent::Unreadable(reason) => self.keep_previous(reason.clone()),
            PolicyFileContent::Content(bytes) => match PolicyOverrides::parse_bytes(bytes) {
                Ok(overrides) => self.accept(overrides),
                Err(error) => self.keep_previous(error.to_string()),
            },
        }
        self.last_read = Some(found);
    }

    fn accept(&mut self, overrides: PolicyOverrides) {
        let changes = changes(&self.overrides, &overrides);
        tracing::info!(file = %self.path.display(), changes = changes.join("; "), "the rules file is in force");
        self.policy.send_if_modified(|rules| {
            let now = overrides.apply(&self.flags);
            let news = **rules != now;
            *rules = Arc::new(now);
            news
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let sets = overrides.settings().into_iter().map(|(name, value)| format!("{name}: {value}")).collect();
        self.status.send_modify(|status| {
            *status = PolicyFileStatus {
                path: std::mem::take(&mut status.path),
                error: None,
                in_force_since: Some(now),
                sets,
            };
        });
        self.overrides = overrides;
        self.metrics.policy_file_read(true);
    }

    /// The old rules stay.
    fn keep_previous(&self, reason: String) {
        tracing::error!(file = %self.path.display(), reason, "the rules file is refused; what was in force stays");
        self.status.send_modify(|status| status.error = Some(reason));
        self.metrics.policy_file_read(false);
    }

    fn record_absent(&self) {
        if self.last_read.is_none() {
            tracing::info!(file = %self.path.display(), "there is no rules file yet; the flags are in force");
            self.status.send_modify(|status| status.error = Some("there is no such file yet".into()));
            return;
        }
        tracing::warn!(file = %self.path.display(), "the rules file is gone; what was in force stays");
        self.status.send_modify(|status| status.error = Some("the file is gone".into()));
        self.metrics.policy_file_read(false);
    }
}

fn read_file(path: &Path) -> PolicyFileContent {
    let read = || {
        // To open a pipe would wait for somebody who writes.
        if !std::fs::metadata(path)?.is_file() {
            return Ok(PolicyFileContent::Unreadable("it is no file".into()));
        }
        let mut bytes = Vec::new();
        // One more than may be parsed, so that a longer file is refused there.
        File::open(path)?.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
        Ok(PolicyFileContent::Content(bytes))
    };
    read().unwrap_or_else(|error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => PolicyFileContent::Absent,
        _ => PolicyFileContent::Unreadable(error.to_string()),
    })
}

/// What is said now and was not before, field by field.
fn changes(before: &PolicyOverrides, now: &PolicyOverrides) -> Vec<String> {
    let (before, now): (BTreeMap<_, _>, BTreeMap<_, _>) =
        (before.settings().into_iter().collect(), now.settings().into_iter().collect());
    let names = before.keys().chain(now.keys().filter(|name| !before.contains_key(*name)));
    let changed = names.filter(|name| before.get(*name) != now.get(*name));
    let shown =
        |settings: &BTreeMap<&str, String>, name| settings.get(name).map_or("as the flag", |value| value).to_owned();
    changed.map(|name| format!("{name}: {} -> {}", shown(&before, *name), shown(&now, *name))).collect()
}
