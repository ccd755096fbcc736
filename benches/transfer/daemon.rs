//! Programs beside the benchmark: containerds and a registry, from the test bed.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use lighterman::containerd::Config;
use lighterman::oci::{Digest, Reference};
use lighterman::testing::image::MadeImage;

use crate::cpu;
use crate::report::BenchError;

/// A child process. Killed when dropped, also after a failed benchmark.
struct Daemon {
    process: Child,
    log: PathBuf,
}

/// Both programs are ready in a third of a second. A busy machine takes longer.
const START_DEADLINE: Duration = Duration::from_secs(60);

impl Daemon {
    fn start(program: &Path, arguments: &[&str], log: PathBuf) -> Result<Self, BenchError> {
        let output = File::create(&log)?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let process = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
        Ok(Self { process, log })
    }

    fn wait_until(&self, is_ready: impl Fn() -> bool) -> Result<(), BenchError> {
        let began = Instant::now();
        while !is_ready() {
            if began.elapsed() > START_DEADLINE {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                return Err(format!("the program does not become ready: {log}").into());
            }
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = (self.process.kill(), self.process.wait());
    }
}

/// The containerd namespace of all content.
pub(crate) const NAMESPACE: &str = "bench";

/// All paths are in one folder. NRI is disabled: its socket has a fixed path, which two daemons
/// cannot share.
const CONFIGURATION: &str = r#"
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = [{disabled}"io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.btrfs"]
[grpc]
  address = "{folder}/containerd.sock"
[ttrpc]
  address = "{folder}/ttrpc.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
"#;

/// An empty containerd 2.
pub(crate) struct Containerd {
    ctr: PathBuf,
    folder: PathBuf,
    daemon: Daemon,
}

impl Containerd {
    /// Starts containerd without CRI, for benchmarks without containers.
    pub(crate) fn start(folder: PathBuf) -> Result<Self, BenchError> {
        Self::start_without(folder, "\"io.containerd.grpc.v1.cri\", ")
    }

    /// Starts containerd with CRI, whose configuration names the snapshotter for unpacking.
    pub(crate) fn start_with_cri(folder: PathBuf) -> Result<Self, BenchError> {
        Self::start_without(folder, "")
    }

    fn start_without(folder: PathBuf, disabled: &str) -> Result<Self, BenchError> {
        std::fs::create_dir(&folder)?;
        let configuration = folder.join("config.toml");
        let text = CONFIGURATION.replace("{folder}", &folder.to_string_lossy()).replace("{disabled}", disabled);
        std::fs::write(&configuration, text)?;
        let arguments = ["--config", &configuration.to_string_lossy()];
        let daemon = Daemon::start(&component("containerd-2.3/bin/containerd")?, &arguments, folder.join("log"))?;
        let started = Self { ctr: component("containerd-2.3/bin/ctr")?, folder, daemon };
        started.daemon.wait_until(|| started.ctr(&["version"]).is_ok())?;
        Ok(started)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("containerd.sock")
    }

    /// The first words of a `ctr` command for this containerd.
    pub(crate) fn ctr_command(&self) -> String {
        format!("{} -a {} -n {NAMESPACE}", self.ctr.display(), self.socket().display())
    }

    /// Runs `ctr` and returns the output.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> Result<String, BenchError> {
        let mut ctr = Command::new(&self.ctr);
        let output = ctr.arg("-a").arg(self.socket()).args(["-n", NAMESPACE]).args(arguments).output()?;
        if !output.status.success() {
            return Err(format!("ctr {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr)).into());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The configuration of an agent's store on this containerd.
    pub(crate) fn config(&self) -> Config {
        let staging = Some(self.folder.join("staging"));
        Config {
            socket: self.socket(),
            containerd_namespace: NAMESPACE.into(),
            content_root: None,
            host_root: Some("/".into()),
            staging,
        }
    }

    /// The file of a blob in the content store.
    pub(crate) fn file_of(&self, digest: Digest) -> PathBuf {
        self.folder.join("root/io.containerd.content.v1.content/blobs/sha256").join(digest.hex())
    }

    /// Checks that the record points to the right manifest, and that all content exists.
    pub(crate) fn check(&self, reference: &Reference, image: &MadeImage) -> Result<(), BenchError> {
        let name = format!("name=={reference}");
        let (digest, parts) = (image.target.digest.to_string(), image.blobs.len());
        let checked = self.ctr(&["images", "check", &name])?;
        if checked.contains(&digest) && checked.contains(&format!(" complete ({parts}/{parts})")) {
            return Ok(());
        }
        Err(format!("the image is incomplete or another one ({digest}, {parts} blobs): {checked}").into())
    }

    /// Removes every image, and content without a name that a failed command left behind.
    pub(crate) fn empty(&self) -> Result<(), BenchError> {
        let content = ["content", "ls", "-q"];
        let remove = |command: &[&str], listed: String| match listed.lines().collect::<Vec<_>>()[..] {
            [] => Ok(String::new()),
            ref names => self.ctr(&[command, names].concat()),
        };
        // `--sync` waits for the garbage collection.
        remove(&["images", "rm", "--sync"], self.ctr(&["images", "ls", "-q"])?)?;
        remove(&["content", "rm"], self.ctr(&content)?)?;
        let left = self.ctr(&content)?;
        if left.is_empty() { Ok(()) } else { Err(format!("content is left after the removal: {left}").into()) }
    }

    /// The version that containerd reports.
    pub(crate) fn version(&self) -> Result<String, BenchError> {
        let text = self.ctr(&["version"])?;
        let server = text.split_once("Server:").map_or("", |(_, server)| server);
        let version = server.lines().find_map(|line| line.trim().strip_prefix("Version:"));
        Ok(format!("containerd {}", version.unwrap_or("of unknown version").trim()))
    }

    pub(crate) fn cpu(&self) -> Result<Duration, BenchError> {
        cpu::spent_by(self.daemon.process.id())
    }
}

const REGISTRY: &str = r#"
version: 0.1
log: { level: error, accesslog: { disabled: true } }
storage: { filesystem: { rootdirectory: "{folder}/registry" } }
http: { addr: "{address}" }
"#;

/// A registry with plain HTTP.
pub(crate) struct Registry {
    /// Host and port.
    pub(crate) address: String,
    daemon: Daemon,
}

impl Registry {
    pub(crate) fn start(folder: &Path) -> Result<Self, BenchError> {
        // The kernel picks a free port. Another program is unlikely to bind the port before the
        // registry.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let text = REGISTRY.replace("{folder}", &folder.to_string_lossy()).replace("{address}", &address.to_string());
        let configuration = folder.join("registry.yml");
        std::fs::write(&configuration, text)?;
        let arguments = ["serve", &configuration.to_string_lossy()];
        let daemon = Daemon::start(&component("bin/docker-registry")?, &arguments, folder.join("registry.log"))?;
        daemon.wait_until(|| TcpStream::connect(address).is_ok())?;
        Ok(Self { address: address.to_string(), daemon })
    }

    /// The registry's version. `--version` prints the path, the module and the version.
    pub(crate) fn version() -> Result<String, BenchError> {
        let output = Command::new(component("bin/docker-registry")?).arg("--version").output()?;
        let text = String::from_utf8(output.stdout)?;
        Ok(format!("registry {}", text.split_whitespace().last().unwrap_or("of unknown version")))
    }

    pub(crate) fn cpu(&self) -> Result<Duration, BenchError> {
        cpu::spent_by(self.daemon.process.id())
    }
}

/// The path of a program of the test bed.
fn component(path: &str) -> Result<PathBuf, BenchError> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home_cache = || variable("HOME").unwrap_or_default().join(".cache");
    let cache = || {
        variable("LIGHTERMAN_CACHE")
            .unwrap_or_else(|| variable("XDG_CACHE_HOME").unwrap_or_else(home_cache).join("lighterman"))
    };
    let program = variable("LIGHTERMAN_TESTBED").unwrap_or_else(|| cache().join("testbed")).join(path);
    if !program.exists() {
        let program = program.display();
        return Err(format!("{program} is missing: run `make testbed`, or set LIGHTERMAN_TESTBED to its folder").into());
    }
    Ok(program)
}
