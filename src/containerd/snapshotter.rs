//! The snapshotter that layers are unpacked into, which is the one of the CRI plugin.

use std::fmt;
use std::path::Path;

use serde_json::Value;

use super::ContainerdStore;
use super::introspection::SnapshotterPlugin;
use crate::ports::StoreError;

/// Snapshotters that keep whole layers on this node, applied on top of each other. The others
/// (stargz, nydus, soci, overlaybd) have their own ways to a layer's files, and a plainly unpacked
/// layer would only be in their way. erofs takes its layers from its own differ.
pub(super) const SUPPORTED: &[&str] = &["overlayfs", "native", "btrfs", "zfs", "devmapper", "blockfile"];

/// The snapshotter of CRI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Snapshotter {
    /// Layers can be unpacked into this snapshotter.
    Supported(String),
    /// Layers cannot be unpacked; the text has the reason.
    Unsupported(String),
}

impl fmt::Display for Snapshotter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Supported(name) => f.write_str(name),
            Self::Unsupported(reason) => write!(f, "left to containerd: {reason}"),
        }
    }
}

impl ContainerdStore {
    /// Determined once after each start of containerd.
    pub(super) async fn snapshotter(&self) -> Result<Snapshotter, StoreError> {
        let mut cached = self.state.snapshotter.lock().await;
        if let Some(cached) = &*cached {
            return Ok(cached.clone());
        }
        let found = match self.cri_snapshotter().await? {
            Some(name) if !SUPPORTED.contains(&&*name) => {
                Snapshotter::Unsupported(format!("the snapshotter {name} does not keep plain layers on this node"))
            }
            Some(name) if self.snapshotters().await?.iter().all(|plugin| plugin.id != name) => {
                Snapshotter::Unsupported(format!("the snapshotter {name} does not run"))
            }
            Some(name) => Snapshotter::Supported(name),
            None if !self.has_cri().await? => Snapshotter::Unsupported("the CRI plugin does not run".into()),
            None => Snapshotter::Unsupported("the CRI plugin does not name its snapshotter".into()),
        };
        match &found {
            Snapshotter::Supported(name) => tracing::debug!(name, "layers can be unpacked into CRI's snapshotter"),
            Snapshotter::Unsupported(reason) => tracing::debug!(reason, "layers are not unpacked ahead of CRI"),
        }
        Ok(cached.insert(found).clone())
    }

    /// containerd 1.x has the name in CRI's configuration. 2.x has the setting in another plugin,
    /// and CRI returns only the file system.
    async fn cri_snapshotter(&self) -> Result<Option<String>, StoreError> {
        if !self.has_cri().await? {
            return Ok(None);
        }
        if let Some(name) = configured_snapshotter(&self.cri_configuration().await?["containerd"]) {
            return Ok(Some(name));
        }
        let Some(mountpoint) = self.cri_image_file_system().await? else { return Ok(None) };
        Ok(snapshotter_of_folder(Path::new(&mountpoint), &self.snapshotters().await?))
    }
}

/// The default runtime may have its own snapshotter (from 1.7 on). Pods with another runtime are
/// ignored.
fn configured_snapshotter(containerd: &Value) -> Option<String> {
    let runtime = containerd["defaultRuntimeName"].as_str().unwrap_or_default();
    let named = [&containerd["runtimes"][runtime]["snapshotter"], &containerd["snapshotter"]];
    named.into_iter().filter_map(Value::as_str).find(|name| !name.is_empty()).map(str::to_owned)
}

/// Prefix of the folder of a plugin that exports no root: containerd derives the folder from the
/// full plugin name.
const FOLDER_PREFIX: &str = "io.containerd.snapshotter.v1.";

fn snapshotter_of_folder(folder: &Path, plugins: &[SnapshotterPlugin]) -> Option<String> {
    let exported =
        plugins.iter().find(|plugin| plugin.root.as_deref() == Some(folder)).map(|plugin| plugin.id.as_str());
    let named = || folder.file_name()?.to_str()?.strip_prefix(FOLDER_PREFIX);
    exported.or_else(named).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_default_runtime_s_snapshotter_precedes_the_general_setting() {
        let both = |own: &str| {
            json!({"snapshotter": "overlayfs", "defaultRuntimeName": "runc", "runtimes":
                {"runc": {"snapshotter": own}, "kata": {"snapshotter": "devmapper"}}})
        };
        assert_eq!(configured_snapshotter(&both("")).as_deref(), Some("overlayfs"));
        assert_eq!(configured_snapshotter(&both("native")).as_deref(), Some("native"));
        assert_eq!(configured_snapshotter(&json!({"defaultRuntimeName": "runc", "runtimes": {"runc": {}}})), None);
        assert_eq!(configured_snapshotter(&Value::Null), None);
    }

    #[test]
    fn a_folder_maps_to_the_plugin_that_exports_or_names_the_folder() {
        let plugin = |id: &str, root: Option<&str>| SnapshotterPlugin { id: id.into(), root: root.map(Into::into) };
        let plugins = [plugin("native", None), plugin("overlayfs", Some("/data/layers")), plugin("btrfs", Some("/b"))];
        for (folder, name) in [
            ("/data/layers", Some("overlayfs")),
            ("/var/lib/containerd/io.containerd.snapshotter.v1.native", Some("native")),
            ("/var/lib/containerd/io.containerd.snapshotter.v1.stargz", Some("stargz")),
            ("/elsewhere", None),
            ("", None),
        ] {
            assert_eq!(snapshotter_of_folder(Path::new(folder), &plugins).as_deref(), name, "{folder}");
        }
    }
}
