//! Two containerds, a registry and one image: everything by which the image can get from the one to the other.

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

/// Two containerds with the image, one of them with its unpacked form as well, the registry, and what is being written.
pub(crate) const NEEDED: u64 = 6 << 30;

/// 1 GiB, as unequal as layers are.
pub(crate) const LAYERS: [u64; 5] = [512 << 20, 256 << 20, 128 << 20, 64 << 20, 64 << 20];

/// Runs of a command before it is called broken: five in a row that fail by chance, where a fifth do, are one in 3000.
const TRIES: usize = 5;

/// How the image gets there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TransferMethod {
    /// Our recovery, which reads the source's files and has the destination adopt those that it wrote.
    Ours,
    /// Our recovery, which reads and writes through the content API.
    OursApiOnly,
    ExportImport,
    ExportImportUnpack,
    RegistryFetch,
}

impl TransferMethod {
    /// What a shell is told, `None` where it is our own code that runs.
    pub(crate) fn command(self) -> Option<&'static str> {
        match self {
            Self::Ours | Self::OursApiOnly => None,
            Self::ExportImport => Some("$CTR_A images export - $IMAGE | $CTR_B images import --local --no-unpack -"),
            Self::ExportImportUnpack => Some("$CTR_A images export - $IMAGE | $CTR_B images import --local -"),
            Self::RegistryFetch => Some("$CTR_B content fetch --plain-http $IMAGE"),
        }
    }
}

/// What one way took, once.
pub(crate) struct Cost {
    pub(crate) seconds: f64,
    /// Processor time of: this process, the commands, the source's containerd, the destination's, the registry.
    pub(crate) cpu: [Duration; 5],
}

/// Dropped in this order: nothing uses the folder when it goes.
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
    pub(crate) fn start(place: Storage) -> Result<Self, BenchError> {
        let source = Containerd::start(place.path().join("a"))?;
        let destination = Containerd::start(place.path().join("b"))?;
        let registry = Registry::start(place.path())?;
        let reference: Reference = format!("{}/bench/image:1", registry.address).parse()?;
        note("making the image");
        let image = Builder::new_current_thread().enable_all().build()?.block_on(async {
            let store = ContainerdStore::new(source.config())?;
            Ok::<_, BenchError>(put_image(&store, &[reference.to_string()], &LAYERS, 1).await?)
        })?;
        source.ctr(&["images", "push", "--plain-http", &reference.to_string()])?;
        let with_files = AgentPair::start(&source, &destination, ContentAccess::Files, UnpackMode::AfterRecovery)?;
        let without_files = AgentPair::start(&source, &destination, ContentAccess::ApiOnly, UnpackMode::AfterRecovery)?;
        Ok(Self { with_files, without_files, source, destination, registry, image, reference, storage: place })
    }

    /// Moves the image once, into a containerd that has nothing of it, looks whether it is whole, and removes it again. Commands that
    /// fail are given another chance: `ctr images export` into a pipe was seen to lose its last bytes, in a fifth of its runs.
    pub(crate) fn run(&self, way: TransferMethod) -> Result<Cost, BenchError> {
        for _ in 1..TRIES {
            match self.attempt(way) {
                Err(error) if way.command().is_some() => note(&format!("once more: {error}")),
                done => return done,
            }
            self.destination.empty()?;
        }
        self.attempt(way)
    }

    fn attempt(&self, way: TransferMethod) -> Result<Cost, BenchError> {
        self.storage.settle()?;
        let before = self.cpu()?;
        let began = Instant::now();
        match way.command() {
            Some(command) => self.shell(command)?,
            None if way == TransferMethod::Ours => self.with_files.recover(&self.reference)?,
            None => self.without_files.recover(&self.reference)?,
        }
        let seconds = began.elapsed().as_secs_f64();
        let after = self.cpu()?;
        self.destination.check(&self.reference, &self.image)?;
        self.destination.empty()?;
        let cpu = std::array::from_fn(|who| after[who].saturating_sub(before[who]));
        Ok(Cost { seconds, cpu })
    }

    /// The programs beside this one.
    pub(crate) fn versions(&self) -> Result<String, BenchError> {
        Ok(format!("{}, {}", self.destination.version()?, Registry::version()?))
    }

    fn shell(&self, command: &str) -> Result<(), BenchError> {
        let command = command
            .replace("$CTR_A", &self.source.ctr_words())
            .replace("$CTR_B", &self.destination.ctr_words())
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
