//! Watches the policy file and keeps the policy in force up to date.
//!
//! The file is read every two seconds. The kubelet updates a ConfigMap by a swap of the symlink
//! `..data`, through which the file's own symlink leads. A kernel watch would stay on the deleted
//! folder, and a modification time may not change. A read of a few hundred bytes is simple and
//! certain. An invalid or removed file changes nothing: the earlier policy stays in force.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::policy_file::{MAX_BYTES, PolicyOverrides};
use crate::control::PolicyFileStatus;
use crate::decide::policy::Policy;
use crate::metrics::Metrics;
use crate::util::clock;

/// Short against the minute in which the kubelet brings a changed ConfigMap to the node.
const PERIOD: Duration = Duration::from_secs(2);

/// Watches the policy file.
pub struct PolicyWatch {
    path: PathBuf,
    /// The policy of the flags.
    flags: Policy,
    /// The overrides in force, from the file.
    overrides: PolicyOverrides,
    /// The file at the last read.
    last_read: Option<PolicyFileContent>,
    policy: watch::Sender<Arc<Policy>>,
    status: watch::Sender<PolicyFileStatus>,
    metrics: Metrics,
}

/// Result of a read.
#[derive(Debug, Clone, PartialEq, Eq)]
enum PolicyFileContent {
    Absent,
    /// The reason.
    Unreadable(String),
    Content(Vec<u8>),
}

impl PolicyWatch {
    /// Reads the file once, so that its policy is in force from the start. Without a file, `flags`
    /// are in force. With an invalid file, `flags` are in force with the kill switch on, until the
    /// file is valid.
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
            // The invalid file may be one that turns the kill switch on. Running agents keep the
            // earlier policy, and a starting agent has none.
            tracing::error!("nothing is recovered on this node until the policy file can be read");
            watch.policy.send_modify(|policy| Arc::make_mut(policy).opt_in.kill_switch = true);
        }
        watch
    }

    /// The policy in force.
    pub fn policy(&self) -> watch::Receiver<Arc<Policy>> {
        self.policy.subscribe()
    }

    /// Status of the file.
    pub fn status(&self) -> watch::Receiver<PolicyFileStatus> {
        self.status.subscribe()
    }

    /// Reads the file at intervals until stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(PERIOD)).await.is_some() {
            self.reread().await;
        }
    }

    async fn reread(&mut self) {
        let path = self.path.clone();
        // Blocking: a node's own disk may be the slowest part of a failing node.
        let content = tokio::task::spawn_blocking(move || read_file(&path)).await.unwrap_or_else(|error| {
            // A panic of a task is a bug, which the supervisor reports.
            std::panic::resume_unwind(error.into_panic())
        });
        if self.last_read.as_ref() == Some(&content) {
            return;
        }
        match &content {
            PolicyFileContent::Absent => self.record_absent(),
            PolicyFileContent::Unreadable(reason) => self.keep_previous(reason.clone()),
            PolicyFileContent::Content(bytes) => match PolicyOverrides::parse_bytes(bytes) {
                Ok(overrides) => self.accept(overrides),
                Err(error) => self.keep_previous(error.to_string()),
            },
        }
        self.last_read = Some(content);
    }

    fn accept(&mut self, overrides: PolicyOverrides) {
        let changes = changes(&self.overrides, &overrides);
        tracing::info!(file = %self.path.display(), changes = changes.join("; "), "the policy file is in force");
        self.policy.send_if_modified(|policy| {
            let new_policy = overrides.apply(&self.flags);
            let is_changed = **policy != new_policy;
            *policy = Arc::new(new_policy);
            is_changed
        });
        let now = clock::unix_time().as_secs();
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

    /// Keeps the earlier policy in force.
    fn keep_previous(&self, reason: String) {
        tracing::error!(
            file = %self.path.display(), reason,
            "the policy file is refused; the earlier policy stays in force"
        );
        self.status.send_modify(|status| status.error = Some(reason));
        self.metrics.policy_file_read(false);
    }

    fn record_absent(&self) {
        if self.last_read.is_none() {
            tracing::info!(file = %self.path.display(), "there is no policy file yet; the flags are in force");
            self.status.send_modify(|status| status.error = Some("there is no such file yet".into()));
            return;
        }
        tracing::warn!(file = %self.path.display(), "the policy file is gone; the earlier policy stays in force");
        self.status.send_modify(|status| status.error = Some("the file is gone".into()));
        self.metrics.policy_file_read(false);
    }
}

fn read_file(path: &Path) -> PolicyFileContent {
    let read = || {
        // An open of a pipe would block until a program writes.
        if !std::fs::metadata(path)?.is_file() {
            return Ok(PolicyFileContent::Unreadable("the path is not a regular file".into()));
        }
        let mut bytes = Vec::new();
        // One byte more than the parser accepts, so that the parser refuses a longer file.
        File::open(path)?.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
        Ok(PolicyFileContent::Content(bytes))
    };
    read().unwrap_or_else(|error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => PolicyFileContent::Absent,
        _ => PolicyFileContent::Unreadable(error.to_string()),
    })
}

/// Changed settings, with their values before and now.
fn changes(before: &PolicyOverrides, now: &PolicyOverrides) -> Vec<String> {
    let (before, now): (BTreeMap<_, _>, BTreeMap<_, _>) =
        (before.settings().into_iter().collect(), now.settings().into_iter().collect());
    let names = before.keys().chain(now.keys().filter(|name| !before.contains_key(*name)));
    let changed = names.filter(|name| before.get(*name) != now.get(*name));
    let shown =
        |settings: &BTreeMap<&str, String>, name| settings.get(name).map_or("as the flag", |value| value).to_owned();
    changed.map(|name| format!("{name}: {} -> {}", shown(&before, *name), shown(&now, *name))).collect()
}
