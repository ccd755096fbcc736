//! The test bed of the tests: a running cluster, commands in the cluster, and the agents'
//! DaemonSet.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use crate::api::Cluster;
use crate::registries::{self, Registries};
use crate::stalls;

/// The nodes and the series of their containerd.
pub(crate) const NODES: [(&str, &str); 3] = [("n17", "1.7"), ("n23", "2.3"), ("n24", "2.4")];

/// A running cluster. Dropping the value stops the cluster.
pub(crate) struct TestBed {
    scripts: PathBuf,
    run: PathBuf,
    keep: bool,
    nodes: Vec<String>,
    /// `None` until the cluster is up.
    cluster: Option<Cluster>,
    registries: Registries,
}

/// The output of a failed command, or the name of a condition that did not hold in time.
pub(crate) type TestError = String;

impl TestBed {
    /// Starts the cluster and the agents. With `stalls`, the cluster has the nodes of the stall
    /// rows.
    pub(crate) fn up(stalls: bool) -> Result<Self, TestError> {
        let stalled = if stalls { Vec::from(stalls::nodes()) } else { Vec::new() };
        let mut nodes = NODES.to_vec();
        nodes.extend(stalled.iter().map(|(node, containerd)| (*node, containerd.as_str())));
        let variables = [
            ("LIGHTERMAN_ZONES", ""),
            ("LIGHTERMAN_PULL_TIMEOUT", &stalls::pull_timeout()),
            ("LIGHTERMAN_PARALLEL_PULLS", &format!("{}={}", stalls::ENDING, stalls::PARALLEL)),
            ("LIGHTERMAN_PROXIES", &registries::proxies()),
        ];
        let mut bed = Self::start("", &nodes, &variables)?;
        // Some hardened nodes have no IPv6 address at all, loopback included.
        bed.ctl(&["in", NODES[0].0, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"])?;
        bed.serve_faulty_registries()?;
        bed.import_agents()?;
        bed.deploy(&bed.for_tests(shipped_manifest()?)?)?;
        Ok(bed)
    }

    /// Starts a cluster of these nodes without agents. The variables are those of `up.sh`.
    pub(crate) fn start(suffix: &str, nodes: &[(&str, &str)], variables: &[(&str, &str)]) -> Result<Self, TestError> {
        // The path is short because the path of a Unix socket below this folder has at most 107
        // bytes.
        let run = std::env::temp_dir().join(format!("lm-e2e-{}{suffix}", std::process::id()));
        let mut bed = Self {
            scripts: Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/testbed"),
            run,
            keep: std::env::var_os("LIGHTERMAN_KEEP").is_some(),
            nodes: nodes.iter().map(|(name, _)| (*name).to_owned()).collect(),
            cluster: None,
            registries: Registries::default(),
        };
        let nodes = nodes.iter().map(|(name, containerd)| format!("{name}={containerd}"));
        let mut up = Command::new(bed.scripts.join("up.sh"));
        up.arg(&bed.run).args(nodes).envs(variables.iter().copied());
        print!("{}", output(&mut up)?);
        bed.enter_hub()?;
        bed.cluster = Some(Cluster::connect(Path::new(&bed.env("KUBECONFIG")?))?);
        Ok(bed)
    }

    /// Moves the calling thread into the hub's network namespace, where the API server and the
    /// registries are. Threads that start later inherit the namespace.
    fn enter_hub(&self) -> Result<(), TestError> {
        let path = format!("/run/netns/{}", self.env("HUB_NETNS")?);
        let entered = File::open(&path).and_then(|file| setns(file, CloneFlags::CLONE_NEWNET).map_err(Into::into));
        entered.map_err(|error| format!("{path}: {error}"))
    }

    /// Starts the scripted registries, and configures containerd for plain HTTP and the test
    /// authority.
    fn serve_faulty_registries(&mut self) -> Result<(), TestError> {
        self.registries = Registries::serve()?;
        for node in &self.nodes {
            let config = self.env(&format!("NODE_{node}_CONFIG"))?;
            for registry in registries::names() {
                let folder = Path::new(&config).join("certs.d").join(&registry);
                let hosts = format!("server = \"http://{registry}\"\n[host.\"http://{registry}\"]\n");
                let written = fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join("hosts.toml"), hosts));
                written.map_err(|error| format!("{}: {error}", folder.display()))?;
            }
            let config = Path::new(&config);
            let authority = registries::authority_pem()?;
            fs::write(config.join("e2e-ca.pem"), authority).map_err(|error| error.to_string())?;
            for registry in registries::trusted() {
                let folder = config.join("certs.d").join(&registry);
                let hosts = format!(
                    "server = \"https://{registry}\"\n[host.\"https://{registry}\"]\nca = \"/etc/containerd/e2e-ca.pem\"\n"
                );
                let written = fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join("hosts.toml"), hosts));
                written.map_err(|error| format!("{}: {error}", folder.display()))?;
            }
        }
        Ok(())
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().map(String::as_str)
    }

    /// The scripted registries.
    pub(crate) fn registries(&self) -> &Registries {
        &self.registries
    }

    /// The API server.
    ///
    /// # Panics
    /// Panics before the cluster is up.
    pub(crate) fn cluster(&self) -> &Cluster {
        self.cluster.as_ref().expect("the test bed is up")
    }

    /// Imports the agents' image into each containerd.
    pub(crate) fn import_agents(&self) -> Result<(), TestError> {
        let image = std::env::var("LIGHTERMAN_IMAGE").map_err(
            |_| "LIGHTERMAN_IMAGE does not name the agent's image: run `make test`, or `make image` and set it",
        )?;
        self.nodes().try_for_each(|node| self.ctl(&["ctr", node, "images", "import", &image]).map(drop))
    }

    /// Installs the agents by a manifest, as users do, and waits until the agents are ready.
    pub(crate) fn deploy(&self, manifest: &str) -> Result<(), TestError> {
        self.install(manifest)?;
        let agents = if self.has_ending_agent() { &["lighterman", ENDING_AGENT][..] } else { &["lighterman"] };
        agents.iter().try_for_each(|name| {
            let name = format!("daemonset/{name}");
            let rollout = ["-n", "lighterman", "rollout", "status", &name, "--timeout=90s"];
            self.kubectl(&rollout).map(drop).map_err(|error| format!("{error}\n{}", self.diagnostics()))
        })
    }

    /// Adds the settings of the tests to a manifest: tote's annotations, and registries without
    /// TLS.
    pub(crate) fn for_tests(&self, manifest: String) -> Result<String, TestError> {
        let insecure = [&registries::names()[..], &[REGISTRY.to_owned()]].concat().join(",");
        let changed =
            [("LIGHTERMAN_ANNOTATION_PREFIX", "lighterman.dev,tote.dev"), ("LIGHTERMAN_INSECURE_REGISTRY", &insecure)];
        let manifest = changed.into_iter().fold(manifest, |text, (name, value)| set_variable(&text, name, value));
        if self.has_ending_agent() { with_ending_agent(&manifest) } else { Ok(manifest) }
    }

    fn has_ending_agent(&self) -> bool {
        self.nodes().any(|node| node == stalls::ENDING)
    }

    pub(crate) fn install(&self, manifest: &str) -> Result<(), TestError> {
        let file = self.run.join("lighterman.yaml");
        fs::write(&file, manifest).map_err(|error| error.to_string())?;
        self.kubectl(&["apply", "-f", &file.to_string_lossy()]).map(drop)
    }

    pub(crate) fn ctl(&self, arguments: &[&str]) -> Result<String, TestError> {
        output(Command::new(self.scripts.join("ctl.sh")).arg(&self.run).args(arguments))
    }

    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<String, TestError> {
        self.ctl(&[&["kubectl"], arguments].concat())
    }

    /// Reads an object, or a list of objects.
    pub(crate) fn get(&self, arguments: &[&str]) -> Result<Value, TestError> {
        let text = self.kubectl(&[&["get"], arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).map_err(|error| format!("kubectl get {arguments:?}: {error}"))
    }

    pub(crate) fn apply(&self, object: &Value) -> Result<(), TestError> {
        self.cluster().apply(object)
    }

    /// Makes an image with a shell and random layers of these sizes (MiB), and pushes the image.
    /// Returns the manifest's digest.
    pub(crate) fn push_image(&self, name: &str, layers: &[u32]) -> Result<String, TestError> {
        let made = self.push_image_with(name, layers, &[])?;
        made["manifest"].as_str().map(str::to_owned).ok_or_else(|| format!("no manifest in {made}"))
    }

    /// As `push_image`, with further options of `mkimage.sh`. Returns the output of `mkimage.sh`.
    pub(crate) fn push_image_with(&self, name: &str, layers: &[u32], options: &[&str]) -> Result<Value, TestError> {
        let tar = self.run.join("image.tar");
        let busybox = self.busybox();
        let mut make = Command::new(self.scripts.join("mkimage.sh"));
        make.arg(&tar).arg(format!("{}/{name}", self.env("REGISTRY")?));
        make.arg("--file").arg(format!("{}:/bin/busybox", busybox.display()));
        make.args(["--entrypoint", "/bin/busybox,sleep,99999"]).args(options);
        for size in layers {
            make.args(["--random", &size.to_string()]);
        }
        let made = serde_json::from_str(&output(&mut make)?).map_err(|error| error.to_string())?;
        self.ctl(&["push", &tar.to_string_lossy(), name])?;
        Ok(made)
    }

    /// A statically linked shell.
    pub(crate) fn busybox(&self) -> PathBuf {
        testbed().join("bin/busybox")
    }

    /// The folder of this run. Commands inside the nodes see this folder too.
    pub(crate) fn folder(&self) -> &Path {
        &self.run
    }

    /// A value from the `env` file of the run.
    pub(crate) fn env(&self, key: &str) -> Result<String, TestError> {
        let text = fs::read_to_string(self.run.join("env")).map_err(|error| error.to_string())?;
        let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        found.map(str::to_owned).ok_or_else(|| format!("{key} is not in the run's env"))
    }

    /// A metric of one node's agent, by the full name with labels. 0 for a metric that the agent
    /// does not export yet.
    pub(crate) fn metric(&self, node: &str, name: &str) -> Result<f64, TestError> {
        let ip: IpAddr = self.env(&format!("NODE_{node}_IP"))?.parse().map_err(|error| format!("{node}: {error}"))?;
        let text = self.get_admin(SocketAddr::new(ip, 4702), "/metrics")?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        Ok(value.unwrap_or(0.0))
    }

    /// The response of an admin port.
    pub(crate) fn get_admin(&self, address: SocketAddr, path: &str) -> Result<String, TestError> {
        let text = (|| {
            let mut connection = TcpStream::connect(address)?;
            connection.set_read_timeout(Some(Duration::from_secs(10)))?;
            write!(connection, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            connection.read_to_string(&mut text).map(|_| text)
        })();
        text.map_err(|error: std::io::Error| format!("{address}: {error}"))
    }

    /// The agents' logs, all pods, and all Events.
    pub(crate) fn diagnostics(&self) -> String {
        let commands: [&[&str]; 3] = [
            &["-n", "lighterman", "logs", "-l", "app.kubernetes.io/name=lighterman", "--prefix", "--tail=60"],
            &["get", "pods", "-A", "-o", "wide"],
            &["get", "events", "-A", "--sort-by=.lastTimestamp"],
        ];
        let outputs = commands.map(|arguments| self.kubectl(arguments).unwrap_or_else(|error| error));
        outputs.join("\n---\n")
    }
}

impl Drop for TestBed {
    fn drop(&mut self) {
        if self.keep {
            println!("the test bed stays up in {} (LIGHTERMAN_KEEP)", self.run.display());
            return;
        }
        if let Err(error) = output(Command::new(self.scripts.join("down.sh")).arg(&self.run).arg("--purge")) {
            eprintln!("{error}");
        }
    }
}

/// The folder of the test bed's binaries, built by `setup.sh`.
pub(crate) fn testbed() -> PathBuf {
    std::env::var_os("LIGHTERMAN_TESTBED").map_or_else(|| cache().join("testbed"), PathBuf::from)
}

/// The scripts' cache folder, by the same rules as `scripts/lib.sh`.
pub(crate) fn cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let home = || set("HOME").unwrap_or_default().join(".cache");
    set("LIGHTERMAN_CACHE").unwrap_or_else(|| set("XDG_CACHE_HOME").unwrap_or_else(home).join("lighterman"))
}

/// The manifest that users apply.
pub(crate) fn shipped_manifest() -> Result<String, TestError> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests/lighterman.yaml");
    fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))
}

/// The DaemonSet on the node whose agent ends stalled pulls.
const ENDING_AGENT: &str = "lighterman-ending";

/// Adds a second DaemonSet for the node whose agent ends stalled pulls, and excludes that node from
/// the first DaemonSet.
fn with_ending_agent(manifest: &str) -> Result<String, TestError> {
    const ANY_NODE: &str = "      nodeSelector:\n        kubernetes.io/os: linux\n";
    let documents: Vec<_> = manifest.split("\n---\n").collect();
    let is_daemon_set = |document: &&&str| document.lines().any(|line| line == "kind: DaemonSet");
    let agents = documents.iter().find(is_daemon_set).ok_or("the manifest has no DaemonSet")?;
    if !agents.contains(ANY_NODE) {
        return Err("the DaemonSet has no nodeSelector kubernetes.io/os: linux".into());
    }
    let node = stalls::ENDING;
    let ending_node = format!("      nodeSelector:\n        kubernetes.io/hostname: {node}\n");
    let ending = agents
        .replacen("  name: lighterman\n", &format!("  name: {ENDING_AGENT}\n"), 1)
        .replace(ANY_NODE, &ending_node);
    let ending = set_variable(&ending, "LIGHTERMAN_END_STALLED_PULLS", "true");
    let terms = format!("[{{matchExpressions: [{{key: kubernetes.io/hostname, operator: NotIn, values: [{node}]}}]}}]");
    let other_nodes = format!(
        "{ANY_NODE}      affinity: {{nodeAffinity: {{requiredDuringSchedulingIgnoredDuringExecution: {{nodeSelectorTerms: {terms}}}}}}}\n"
    );
    Ok(format!("{}\n---\n{ending}\n", manifest.trim_end().replace(ANY_NODE, &other_nodes)))
}

/// Sets an environment variable of the agents, and replaces a value that the manifest has.
pub(crate) fn set_variable(manifest: &str, name: &str, value: &str) -> String {
    let mut lines: Vec<_> = manifest.lines().collect();
    let is_named = |line: &&str| line.trim() == format!("- name: {name}");
    if let Some(index) = lines.iter().position(is_named) {
        lines.drain(index..index + 2);
    }
    // Every agent has the variable with the node's name.
    let Some(first) = lines.iter().position(|line| line.trim() == "- name: LIGHTERMAN_NODE_NAME") else {
        return manifest.to_owned();
    };
    let indent = " ".repeat(lines[first].len() - lines[first].trim_start().len());
    let variable = format!("{indent}- name: {name}\n{indent}  value: \"{value}\"");
    lines.insert(first, &variable);
    lines.join("\n")
}

/// The registry of the test bed.
pub(crate) const REGISTRY: &str = "10.77.0.1:5000";

/// Runs a command. Returns the standard output, or an error with all output.
pub(crate) fn output(command: &mut Command) -> Result<String, TestError> {
    let done = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    if done.status.success() { Ok(out.into_owned()) } else { Err(format!("{command:?}: {}\n{out}{err}", done.status)) }
}

/// Calls `look` every 100 ms until the result is `Some`. The error names `what`.
pub(crate) fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut poll: impl FnMut() -> Result<Option<T>, TestError>,
) -> Result<T, TestError> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = poll()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(format!("waited {} s for {what}", limit.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
