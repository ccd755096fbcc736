//! containerd's own account of its plugins: the content root, CRI and its settings, snapshotters.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::{ListContainersRequest, Plugin, PluginsRequest};
use tokio::sync::Mutex;

use super::client::MAX_MESSAGE;
use super::content::blocking;
use super::{ConfigError, ContainerdStore, IngestMode, Snapshotter};
use crate::files::below_root;
use crate::ports::StoreError;

/// Properties of a node's containerd, as far as this process can see them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerdInfo {
    /// Version in containerd's own form: `1.6.20`, `v2.1.4`.
    pub version: String,
    /// Folder of the content store, if this process can see it and it has content.
    pub content_root: Option<PathBuf>,
    /// Ingest mode of staged blobs; `None` until containerd has created the folder for blobs.
    pub ingest: Option<IngestMode>,
    /// Whether the CRI plugin runs, without which there are no pods.
    pub cri: bool,
    /// Whether containerd discards layers after unpacking, so that no peer can fetch them. `None`
    /// for an unknown setting: 2.x keeps it in a part of the configuration that no API shows. Then
    /// only images without layers are a sign.
    pub discards_unpacked_layers: Option<bool>,
    /// Snapshotter into which layers can be unpacked ahead of CRI.
    pub snapshotter: Snapshotter,
    /// Image of pod sandboxes, as CRI writes its name: from the configuration (1.x), else from the
    /// newest sandbox. `None` on a 2.x without a sandbox.
    pub sandbox_image: Option<String>,
    /// Programs that can forbid the pull of an image, and that an import bypasses.
    pub verifiers: ImageVerifiers,
}

/// Programs that containerd runs before it pulls an image. containerd reports only that it would
/// run them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageVerifiers {
    /// containerd runs none: the plugin is missing (1.x), or the folder is absent or has no
    /// program.
    None,
    /// The folder has programs.
    Found,
    /// The plugin runs, but this process cannot see the folder.
    Unseen,
}

/// Default sockets of containerd: k3s and RKE2, k0s, MicroK8s, containerd. containerd's own is the
/// last, because Docker on a node of another distribution installs a containerd there that is not
/// the kubelet's.
const DEFAULT_SOCKETS: &[&str] = &[
    "run/k3s/containerd/containerd.sock",
    "run/k0s/containerd.sock",
    "var/snap/microk8s/common/run/containerd.sock",
    "run/containerd/containerd.sock",
];

/// Default folder of image verifiers (containerd 2: `bin_dir` of
/// `io.containerd.image-verifier.v1.bindir`).
pub const IMAGE_VERIFIER_DIR: &str = "/opt/containerd/image-verifier/bin";

/// The first default socket under `root` that accepts a connection, else the first that exists.
/// `root` is `/` or the mount of the node's file system. A removed distribution may leave its
/// socket.
///
/// # Errors
/// [`ConfigError::NoSocket`] with the paths.
pub fn find_socket(root: &Path) -> Result<PathBuf, ConfigError> {
    let is_socket = |path: &&PathBuf| path.metadata().is_ok_and(|file| file.file_type().is_socket());
    let is_listening = |path: &&PathBuf| UnixStream::connect(path).is_ok();
    let sockets: Vec<_> = DEFAULT_SOCKETS.iter().map(|socket| below_root(root, Path::new(socket))).collect();
    let found = sockets.iter().find(is_listening).or_else(|| sockets.iter().find(is_socket));
    found.cloned().ok_or(ConfigError::NoSocket(sockets))
}

/// Cached properties of one connection: a restarted containerd may have another configuration.
pub(super) struct Introspection {
    configured_root: Option<PathBuf>,
    host_root: Option<PathBuf>,
    plugins: Mutex<Option<PluginInfo>>,
}

#[derive(Clone)]
struct PluginInfo {
    /// Path of the content store, visible or not.
    content_root: Option<Arc<Path>>,
    cri: bool,
    snapshotters: Arc<[SnapshotterPlugin]>,
    /// containerd can run programs before a pull. The API does not show them, nor whether there are
    /// any.
    has_verifier_plugin: bool,
}

/// A running snapshotter.
pub(super) struct SnapshotterPlugin {
    /// Plugin ID.
    pub(super) id: String,
    /// Folder of the snapshotter, if exported.
    pub(super) root: Option<PathBuf>,
}

impl Introspection {
    pub(super) fn new(configured_root: Option<PathBuf>, host_root: Option<PathBuf>) -> Self {
        Self { configured_root, host_root, plugins: Mutex::new(None) }
    }

    /// Path of a node's folder for this process, if visible at all.
    pub(super) fn host_path(&self, folder: &Path) -> PathBuf {
        self.host_root.as_ref().map_or_else(|| folder.to_owned(), |root| below_root(root, folder))
    }

    /// The node's root file system as this process sees it, if mounted.
    pub(super) fn host_root(&self) -> Option<PathBuf> {
        self.host_root.clone()
    }

    /// Whether a folder that is absent here is absent on the node.
    fn has_host_root(&self) -> bool {
        self.host_root.is_some()
    }

    pub(super) async fn clear(&self) {
        *self.plugins.lock().await = None;
    }
}

impl ContainerdStore {
    /// Inspects containerd. `verifiers` is the node's folder of image verifiers:
    /// [`IMAGE_VERIFIER_DIR`], unless containerd has another setting.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when containerd does not answer.
    pub async fn inspect(&self, verifiers: &Path) -> Result<ContainerdInfo, StoreError> {
        let version = self.ready().await?;
        let PluginInfo { content_root: _, cri, snapshotters: _, has_verifier_plugin } = self.plugins().await?;
        let content_root = self.content_root().await?.map(|root| root.to_path_buf());
        let ingest = self.ingest_mode().await?;
        let configuration = if cri { self.cri_configuration().await? } else { serde_json::Value::Null };
        let snapshotter = self.snapshotter().await?;
        let discards_unpacked_layers = discards_unpacked_layers(&configuration);
        let sandbox_image = match configuration["sandboxImage"].as_str() {
            Some(image) => Some(image.to_owned()),
            None => self.image_of_newest_sandbox().await?,
        };
        let introspection = &self.state.introspection;
        let (folder, has_host_root) = (introspection.host_path(verifiers), introspection.has_host_root());
        let verifiers = match has_verifier_plugin {
            true => blocking(move || find_image_verifiers(&folder, has_host_root)).await?,
            false => ImageVerifiers::None,
        };
        Ok(ContainerdInfo {
            version,
            content_root,
            ingest,
            cri,
            discards_unpacked_layers,
            snapshotter,
            sandbox_image,
            verifiers,
        })
    }

    /// Folder of the content store, if this process can see it. An optimization only: each file is
    /// looked for.
    pub(super) async fn content_root(&self) -> Result<Option<Arc<Path>>, StoreError> {
        let root = self.plugins().await?.content_root;
        // Looked for on each call: containerd creates the folder with the first blob.
        Ok(root.filter(|root| root.join("blobs/sha256").is_dir()))
    }

    /// Folder of the content store, visible or not.
    pub(super) async fn named_content_root(&self) -> Result<Option<Arc<Path>>, StoreError> {
        Ok(self.plugins().await?.content_root)
    }

    /// Whether the root is visible and has no blobs yet, or its parent: containerd 2 creates the
    /// root with the first blob.
    pub(super) async fn is_without_content(&self) -> Result<bool, StoreError> {
        let root = self.plugins().await?.content_root;
        let is_visible = |root: &Path| root.is_dir() || root.parent().is_some_and(Path::is_dir);
        Ok(root.is_some_and(|root| is_visible(&root) && !root.join("blobs/sha256").is_dir()))
    }

    /// Whether containerd discards layers after unpacking; `None` for an unknown setting.
    pub(super) async fn discards_layers(&self) -> Result<Option<bool>, StoreError> {
        Ok(if self.has_cri().await? { discards_unpacked_layers(&self.cri_configuration().await?) } else { None })
    }

    pub(super) async fn has_cri(&self) -> Result<bool, StoreError> {
        Ok(self.plugins().await?.cri)
    }

    /// Running snapshotters.
    pub(super) async fn snapshotters(&self) -> Result<Arc<[SnapshotterPlugin]>, StoreError> {
        Ok(self.plugins().await?.snapshotters)
    }

    async fn plugins(&self) -> Result<PluginInfo, StoreError> {
        let mut cached = self.state.introspection.plugins.lock().await;
        if let Some(cached) = &*cached {
            return Ok(cached.clone());
        }
        let request = self.client.request(PluginsRequest { filters: Vec::new() });
        let mut client = IntrospectionClient::new(self.client.channel());
        let answer = self.client.call(client.plugins(request)).await;
        let plugins = answer.map_err(|status| self.client.store_error(&status))?.plugins;
        let mut loaded = plugins.iter().filter(|plugin| plugin.init_err.is_none());
        let plugin = |kind: &str, id: &str| loaded.clone().find(|plugin| plugin.r#type == kind && plugin.id == id);
        let exported = plugin("io.containerd.content.v1", "content").and_then(|plugin| plugin.exports.get("root"));
        let to_host_path = |root: &String| self.state.introspection.host_path(Path::new(root));
        let root = self.state.introspection.configured_root.clone().or_else(|| exported.map(to_host_path));
        let content_root = root.map(Arc::from);
        let cri = plugin("io.containerd.grpc.v1", "cri").is_some();
        let snapshotter = |plugin: &Plugin| SnapshotterPlugin {
            id: plugin.id.clone(),
            root: plugin.exports.get("root").map(PathBuf::from),
        };
        let is_snapshotter = |plugin: &&Plugin| plugin.r#type == "io.containerd.snapshotter.v1";
        let snapshotters = loaded.clone().filter(is_snapshotter).map(snapshotter).collect();
        let has_verifier_plugin = loaded.any(|plugin| plugin.r#type == "io.containerd.image-verifier.v1");
        tracing::debug!(?content_root, cri, has_verifier_plugin, "read containerd's plugins");
        Ok(cached.insert(PluginInfo { content_root, cri, snapshotters, has_verifier_plugin }).clone())
    }

    /// CRI creates a container for each pod's sandbox, and containerd stores the name of that
    /// container's image.
    async fn image_of_newest_sandbox(&self) -> Result<Option<String>, StoreError> {
        let filters = vec!["labels.\"io.cri-containerd.kind\"==sandbox".to_owned()];
        let mut client = ContainersClient::new(self.client.channel()).max_decoding_message_size(MAX_MESSAGE);
        let listed = self.client.call(client.list(self.client.request(ListContainersRequest { filters }))).await;
        let sandboxes = listed.map_err(|status| self.client.store_error(&status))?.containers;
        let named = sandboxes.into_iter().filter(|sandbox| !sandbox.image.is_empty());
        let newest = named.max_by_key(|sandbox| sandbox.created_at.map(|at| (at.seconds, at.nanos)));
        Ok(newest.map(|sandbox| sandbox.image))
    }
}

fn discards_unpacked_layers(configuration: &serde_json::Value) -> Option<bool> {
    configuration["containerd"]["discardUnpackedLayers"].as_bool()
}

/// containerd runs every executable regular file, and nothing without the folder.
fn find_image_verifiers(folder: &Path, has_host_root: bool) -> ImageVerifiers {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if has_host_root && error.kind() == io::ErrorKind::NotFound => return ImageVerifiers::None,
        Err(_) => return ImageVerifiers::Unseen,
    };
    // A link may point to a path that exists only on the node, so it counts as a program.
    let is_program = |path: PathBuf| match path.metadata() {
        Ok(file) => file.is_file() && file.permissions().mode() & 0o111 != 0,
        Err(_) => path.is_symlink(),
    };
    if entries.flatten().any(|entry| is_program(entry.path())) { ImageVerifiers::Found } else { ImageVerifiers::None }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_first_listening_default_socket_is_chosen() {
        let root = tempfile::tempdir().unwrap();
        let sockets: Vec<_> = DEFAULT_SOCKETS.iter().map(|socket| root.path().join(socket)).collect();
        assert_eq!(find_socket(root.path()), Err(ConfigError::NoSocket(sockets)));
        let message = find_socket(Path::new("/nothing/is/here")).unwrap_err().to_string();
        assert!(
            DEFAULT_SOCKETS.iter().all(|socket| message.contains(&format!("/nothing/is/here/{socket}"))),
            "{message}"
        );
        let (k3s, own) = (root.path().join(DEFAULT_SOCKETS[0]), root.path().join(DEFAULT_SOCKETS[3]));
        for socket in [&own, &k3s] {
            fs::create_dir_all(socket.parent().unwrap()).unwrap();
        }
        fs::write(&k3s, "no socket").unwrap();
        let docker = UnixListener::bind(&own).unwrap();
        assert_eq!(find_socket(root.path()), Ok(own.clone()));
        fs::remove_file(&k3s).unwrap();
        let listening = UnixListener::bind(&k3s).unwrap();
        assert_eq!(find_socket(root.path()), Ok(k3s.clone()), "the kubelet's socket beside Docker's");
        drop(listening);
        assert_eq!(find_socket(root.path()), Ok(own), "nothing listens on k3s' leftover socket");
        drop(docker);
        assert_eq!(find_socket(root.path()), Ok(k3s), "nothing listens anywhere yet");
    }

    #[test]
    fn only_executable_files_count_as_image_verifiers() {
        let folder = tempfile::tempdir().unwrap();
        let verifiers_in = |folder: &Path| find_image_verifiers(folder, false);
        let absent = folder.path().join("absent");
        assert_eq!(
            (verifiers_in(&absent), find_image_verifiers(&absent, true)),
            (ImageVerifiers::Unseen, ImageVerifiers::None)
        );
        let file = folder.path().join("readme");
        fs::write(&file, "x").unwrap();
        fs::create_dir(folder.path().join("folder")).unwrap();
        assert_eq!(verifiers_in(folder.path()), ImageVerifiers::None);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(verifiers_in(folder.path()), ImageVerifiers::Found);
    }
}
