//! Everything that a kubelet or a containerd can show, a row each: the image's shape, the form of
//! the reference, the registry's responses, the opt-in, and the expected outcome. `rows` is the
//! table, `runner` runs the rows.
//!
//! Rows are independent: each has an image, a repository and a pod of its own. So rows run in
//! parallel on one cluster.

mod objects;
mod rows;
mod runner;

use crate::images::{PLAIN, Recipe};
use crate::registries::ScriptedRegistry;

pub(crate) use rows::ROWS;
pub(crate) use runner::{CaseOnNode, CaseRunner, import};

/// One row. Fields that a row leaves out are those of [`CASE`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// Nodes of the pod. The provider is another node, with another containerd.
    pub(crate) nodes: Nodes,
    /// The registry that the image names.
    pub(crate) registry: ScriptedRegistry,
    pub(crate) recipe: Recipe,
    /// How the pod names the image.
    pub(crate) reference_form: ReferenceForm,
    /// The place of the image in the pod.
    pub(crate) image_use: ImageUse,
    /// `imagePullPolicy`.
    pub(crate) policy: &'static str,
    /// The annotations, and the object that carries them.
    pub(crate) opt_in: OptInForm,
    /// Content of the image on the pod's node before the pod is made.
    pub(crate) local_content: LocalContent,
    pub(crate) expectation: Expectation,
}

/// An opted-in pod with one container. Another node has the image, and connections to the registry
/// are refused.
pub(crate) const CASE: Case = Case {
    name: "",
    nodes: Nodes::One,
    registry: ScriptedRegistry::Refuses,
    recipe: PLAIN,
    reference_form: ReferenceForm::Tag,
    image_use: ImageUse::Container,
    policy: "IfNotPresent",
    opt_in: OptInForm::Pod,
    local_content: LocalContent::Nothing,
    expectation: Expectation::Runs,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nodes {
    /// A single node. Consecutive rows take different nodes.
    One,
    /// A case on every node, for behavior that differs between containerd's versions.
    Each,
    /// A case on each of these nodes. The containerd of the other nodes lacks the feature.
    Only(&'static [&'static str]),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReferenceForm {
    /// `registry:port/repository:tag`.
    Tag,
    Digest,
    TagAndDigest,
    /// A reference without a tag.
    ImpliedLatest,
    /// A reference without a registry. `docker.io/library` does not exist here.
    ShortName,
    /// A registry by host name, without a port. The host name does not exist.
    HostName,
    /// A repository of 200 characters and a tag of 128.
    LongName,
    /// The right digest in a registry that does not exist.
    OtherRegistry,
    /// The right digest in another repository of the same registry.
    OtherRepository,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ImageUse {
    Container,
    InitContainer,
    /// An init container that keeps running.
    Sidecar,
    /// A container that is added to a running pod.
    Ephemeral,
    /// A pod that the kubelet reads from a file.
    StaticPod,
    /// An image volume of the pod.
    Volume,
    /// One container of two. No node has the image of the other container.
    OneOfTwo,
    /// Two pods.
    TwoPods,
    /// A pod that a controller makes for an owner.
    OwnedBy(OwnerKind),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OwnerKind {
    Deployment,
    StatefulSet,
    DaemonSet,
    Job,
    CronJob,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OptInForm {
    /// The pod opts in, in a namespace that allows recovery.
    Pod,
    /// The owner opts in, the pod does not.
    Owner,
    /// The owner opts in, and the pod is annotated with `ignore`.
    OwnerButPodIgnores,
    /// The pod opts in, and is also annotated with `ignore`.
    PodButIgnores,
    /// The pod's annotation has the value "yes", which is not "true".
    ValueYes,
    /// No object opts in.
    None,
    /// The pod opts in, in a namespace that does not allow recovery.
    ClosedNamespace,
    /// The pod opts in, in a namespace that allows recovery and that the agents' settings deny.
    DeniedNamespace,
    /// The pod opts in, in a namespace that also allows recovery of images that the registry
    /// denies.
    EvenIfDenied,
    /// The pod opts in, in a namespace whose repository list contains the image's repository.
    Listed,
    /// The pod opts in, in a namespace that lists only other repositories.
    OthersListed,
    /// Pod and namespace opt in by tote's annotations.
    Tote,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LocalContent {
    Nothing,
    /// Everything but the image's own layer, with an image record.
    NoLayer,
    /// Everything but the image's config, with an image record.
    NoConfig,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expectation {
    /// The container runs, in the first pod, and an Event on the pod reports a recovery from peers.
    Runs,
    /// As `Runs`, and the fault does not count as an outage of the registry.
    RunsWithoutOutage,
    /// The container does not run and no content is fetched. Exactly one Event with this reason
    /// contains all of these words, in any case.
    Event(&'static str, &'static [&'static str]),
    /// The container does not run, no content is fetched, and the agents write no Event.
    NoEvent,
}

impl Expectation {
    /// Whether the container is expected to run.
    fn runs(self) -> bool {
        matches!(self, Self::Runs | Self::RunsWithoutOutage)
    }
}

impl Case {
    /// The part of image names that is unique to the row, in a form that a repository name permits.
    fn slug(&self) -> String {
        self.name.replace('_', "-")
    }
}
