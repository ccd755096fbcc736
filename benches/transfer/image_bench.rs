//! Two containerds, a registry and one image, with all methods to move the image.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lighterman::containerd::ContainerdStore;
use lighterman::oci::Reference;
use lighterman::testing::image::{MadeImage, put_image};
use nix::sys::resource::UsageWho;
use tokio::runtime::Builder;

use crate::agents::{AgentPair, ContentAccess, UnpackMode};
use crate::cpu;
use crate::daemon::{Containerd, Registry};
use crate::report::{BenchError, note};
use crate::storage::Storage;

/// Space for the image in two containerds, unpacked in one of them, in the registry, and in files
/// that are being written.
pub(crate) const NEEDED: u64 = 6 << 30;

/// 1 GiB, in layers as unequal as they usually are.
pub(crate) const LAYERS: [u64; 5] = [512 << 20, 256 << 20, 128 << 20, 64 << 20, 64 << 20];

/// Runs of a command before the benchmark fails. At a failure rate of a fifth, five failures in a
/// row have a probability of 1 in 3000.
const TRIES: usize = 5;

/// The method that moves the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TransferMethod {
    /// A recovery that reads the source's files, and whose files the destination's containerd
    /// adopts.
    Ours,
    /// A recovery that reads and writes through the content API.
    OursApiOnly,
    ExportImport,
    ExportImportUnpack,
    RegistryFetch,
}

impl TransferMethod {
    /// The shell command, or `None` for a recovery.
    pub(crate) fn command(self) -> Option<&'static str> {
        match self {
            Self::Ours | Self::OursApiOnly => None,
            Self::ExportImport => Some("$CTR_A images export - $IMAGE | $CTR_B images import --local --no-unpack -"),
            Self::ExportImportUnpack => Some("$CTR_A images export - $IMAGE | $CTR_B images import --local -"),
            Self::RegistryFetch => Some("$CTR_B content fetch --plain-http $IMAGE"),
        }
    }
}

/// Cost of a single run.
pub(crate) struct Cost {
    pub(crate) seconds: f64,
    /// Processor time of this process, of the commands, of the source's containerd, of the
    /// destination's containerd, and of the registry.
    pub(crate) cpu: [Duration; 5],
}

/// Fields are dropped in this order, so that no process uses the folder when it is removed.
pub(crate) struct ImageBench {
    with_files: AgentPair,
    without_files: AgentPair,
    source: Containerd,
    destination: Containerd,
    registry: Registry,
    pub(crate) image: MadeImage,
    reference: Reference,
    pub(crate) storage: Storage,
}

impl ImageBench {
    pub(crate) fn start(storage: Storage) -> Result<Self, BenchError> {
        let source = Containerd::start(storage.path().join("a"))?;
        let destination = Containerd::start(storage.path().join("b"))?;
        let registry = Registry::start(storage.path())?;
        let reference: Reference = format!("{}/bench/image:1", registry.address).parse()?;
        note("making the image");
        let image = Builder::new_current_thread().enable_all().build()?.block_on(async {
            let store = ContainerdStore::new(source.config())?;
            Ok::<_, BenchError>(put_image(&store, &[reference.to_string()], &LAYERS, 1).await?)
        })?;
        source.ctr(&["images", "push", "--plain-http", &reference.to_string()])?;
        let with_files = AgentPair::start(&source, &destination, ContentAccess::Files, UnpackMode::AfterRecovery)?;
        let without_files = AgentPair::start(&source, &destination, ContentAccess::ApiOnly, UnpackMode::AfterRecovery)?;
        Ok(Self { with_files, without_files, source, destination, registry, image, reference, storage })
    }

    /// Moves the image once into an empty containerd, checks the image, and removes it. A failed
    /// command is retried: `ctr images export` into a pipe lost the last bytes in a fifth of its
    /// runs.
    pub(crate) fn run(&self, method: TransferMethod) -> Result<Cost, BenchError> {
        for _ in 1..TRIES {
            match self.attempt(method) {
                Err(error) if method.command().is_some() => note(&format!("retry after: {error}")),
                done => return done,
            }
            self.destination.empty()?;
        }
        self.attempt(method)
    }

    fn attempt(&self, method: TransferMethod) -> Result<Cost, BenchError> {
        self.storage.settle()?;
        let before = self.cpu()?;
        let began = Instant::now();
        match method.command() {
            Some(command) => self.shell(command)?,
            None if method == TransferMethod::Ours => self.with_files.recover(&self.reference)?,
            None => self.without_files.recover(&self.reference)?,
        }
        let seconds = began.elapsed().as_secs_f64();
        let after = self.cpu()?;
        self.destination.check(&self.reference, &self.image)?;
        self.destination.empty()?;
        let cpu = std::array::from_fn(|process| after[process].saturating_sub(before[process]));
        Ok(Cost { seconds, cpu })
    }

    /// The versions of the other programs.
    pub(crate) fn versions(&self) -> Result<String, BenchError> {
        Ok(format!("{}, {}", self.destination.version()?, Registry::version()?))
    }

    fn shell(&self, command: &str) -> Result<(), BenchError> {
        let command = command
            .replace("$CTR_A", &self.source.ctr_command())
            .replace("$CTR_B", &self.destination.ctr_command())
            .replace("$IMAGE", &self.reference.to_string());
        let mut bash = Command::new("bash");
        let output = bash.args(["-o", "pipefail", "-c", &command]).stdin(Stdio::null()).output()?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!("{command}: {}", String::from_utf8_lossy(&output.stderr)).into())
    }

    fn cpu(&self) -> Result<[Duration; 5], BenchError> {
        Ok([
            cpu::spent(UsageWho::RUSAGE_SELF)?,
            cpu::spent(UsageWho::RUSAGE_CHILDREN)?,
            self.source.cpu()?,
            self.destination.cpu()?,
            self.registry.cpu()?,
        ])
    }
}
