//! A containerd of one test: process, folders and socket.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::{Container, CreateContainerRequest};
use containerd_client::to_any;
use containerd_client::tonic::Request;
use lighterman::containerd::{Config, ContainerdStore};
use lighterman::oci::Digest;
use tempfile::TempDir;

/// Drop kills the process, also when a test panics.
pub(crate) struct Daemon {
    binaries: PathBuf,
    process: Child,
    folder: TempDir,
}

/// All files are in one folder, so the machine's own containerd is untouched. The CRI plugin
/// manages images without a network. NRI's socket has a fixed path, which two daemons cannot share.
const CONFIGURATION: &str = r#"
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.btrfs"]
[grpc]
  address = "{folder}/containerd.sock"
[ttrpc]
  address = "{folder}/ttrpc.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
"#;

/// containerd is ready in a third of a second here; a busy machine takes longer.
const START_DEADLINE: Duration = Duration::from_secs(60);

impl Daemon {
    /// Starts the containerd of this name in the testbed.
    pub(crate) async fn start(version: &str) -> Self {
        Self::start_in(version, tempfile::tempdir().unwrap(), "").await
    }

    /// Starts containerd in this folder, with additional configuration.
    pub(crate) async fn start_in(version: &str, folder: TempDir, more: &str) -> Self {
        let binaries = testbed().join(version).join("bin");
        assert!(
            binaries.join("containerd").exists(),
            "no containerd in {}: run `make testbed`, or set LIGHTERMAN_TESTBED to the testbed's folder",
            binaries.display()
        );
        let configuration = CONFIGURATION.replace("{folder}", folder.path().to_str().unwrap()) + more;
        std::fs::write(folder.path().join("config.toml"), configuration).unwrap();
        let daemon = Self { process: spawn(&binaries, folder.path()), binaries, folder };
        daemon.wait_ready().await;
        daemon
    }

    /// Sends SIGKILL, as the kernel does when memory is short.
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Starts containerd again, on the folders of the killed process.
    pub(crate) async fn restart(&mut self) {
        self.process = spawn(&self.binaries, self.folder.path());
        self.wait_ready().await;
    }

    pub(crate) fn config(&self, containerd_namespace: &str) -> Config {
        let containerd_namespace = containerd_namespace.to_owned();
        let staging = Some(self.folder.path().join("staging"));
        Config { socket: self.socket(), containerd_namespace, content_root: None, host_root: Some("/".into()), staging }
    }

    pub(crate) fn store(&self, containerd_namespace: &str) -> ContainerdStore {
        ContainerdStore::new(self.config(containerd_namespace)).unwrap()
    }

    /// Runs `ctr`, containerd's own client, and returns the output.
    pub(crate) fn ctr(&self, containerd_namespace: &str, arguments: &[&str]) -> String {
        let mut ctr = Command::new(self.binaries.join("ctr"));
        ctr.arg("--address").arg(self.socket()).arg("--namespace").arg(containerd_namespace).args(arguments);
        let output = ctr.output().unwrap();
        assert!(output.status.success(), "ctr {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Creates the record of a container that never runs, with CRI's label of a sandbox.
    pub(crate) async fn make_container(&self, containerd_namespace: &str, id: &str, image: &str) {
        let container = Container {
            id: id.into(),
            image: image.into(),
            labels: HashMap::from([("io.cri-containerd.kind".into(), "sandbox".into())]),
            runtime: Some(Runtime { name: "io.containerd.runc.v2".into(), options: None }),
            spec: Some(to_any(&CreateContainerRequest::default())),
            ..Container::default()
        };
        let channel = containerd_client::connect(self.socket()).await.unwrap();
        let mut request = Request::new(CreateContainerRequest { container: Some(container) });
        request.metadata_mut().insert("containerd-namespace", containerd_namespace.parse().unwrap());
        ContainersClient::new(channel).create(request).await.unwrap();
    }

    /// File of a blob in the content store.
    pub(crate) fn file_of(&self, digest: Digest) -> PathBuf {
        self.content_root().join("blobs/sha256").join(digest.hex())
    }

    /// Root folder of the content store.
    pub(crate) fn content_root(&self) -> PathBuf {
        self.folder.path().join("root/io.containerd.content.v1.content")
    }

    /// Folder of all files of this containerd.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("containerd.sock")
    }

    async fn wait_ready(&self) {
        let store = self.store("default");
        let waiting = async {
            while store.ready().await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(START_DEADLINE, waiting).await.is_err() {
            let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            panic!("containerd is not ready within the deadline:\n{log}");
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn(binaries: &Path, folder: &Path) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(folder.join("log")).unwrap();
    Command::new(binaries.join("containerd"))
        .arg("--config")
        .arg(folder.join("config.toml"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// Folder where `make testbed` installs programs.
pub(crate) fn testbed() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home_cache = || variable("HOME").unwrap_or_default().join(".cache");
    let cache = || {
        variable("LIGHTERMAN_CACHE")
            .unwrap_or_else(|| variable("XDG_CACHE_HOME").unwrap_or_else(home_cache).join("lighterman"))
    };
    variable("LIGHTERMAN_TESTBED").unwrap_or_else(|| cache().join("testbed"))
}
