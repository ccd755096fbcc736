//! Everything that a kubelet or a containerd can show, a row each: what the image is like, how a pod asks for it, what its registry does, who
//! opted in, and what has to come of it. `rows` is the table, `stage` plays it.
//!
//! Rows are independent of each other (an image, a repository and a pod of their own), so they run side by side on one cluster.

mod objects;
mod rows;
mod runner;

use crate::images::{PLAIN, Recipe};
use crate::registries::ScriptedRegistry;

pub(crate) use rows::ROWS;
pub(crate) use runner::{CaseOnNode, CaseRunner, import};

/// One row. What it does not say is as in [`CASE`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// Where the pod is; the image is held by another node, with another containerd.
    pub(crate) nodes: Nodes,
    /// What the registry does that the image names.
    pub(crate) registry: ScriptedRegistry,
    pub(crate) recipe: Recipe,
    /// How the pod names the image.
    pub(crate) reference_form: ReferenceForm,
    /// Where in the pod.
    pub(crate) image_use: ImageUse,
    /// `imagePullPolicy`.
    pub(crate) policy: &'static str,
    /// Who wrote which annotation.
    pub(crate) opt_in: OptInForm,
    /// What the pod's node has of the image.
    pub(crate) local_content: LocalContent,
    pub(crate) expectation: Expectation,
}

/// An opted-in pod with one container, whose image another node holds while connections to its registry are refused.
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
    /// One; each row another.
    One,
    /// Every node, as a case of its own: where containerd's versions differ.
    Each,
    /// These, each as a case of its own: the containerd of the others cannot do it.
    Only(&'static [&'static str]),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReferenceForm {
    /// `registry:port/repository:tag`.
    Tag,
    Digest,
    TagAndDigest,
    /// No tag.
    ImpliedLatest,
    /// No registry: `docker.io/library`, which does not exist here.
    ShortName,
    /// A registry by name, without a port; the name does not exist.
    HostName,
    /// A repository of 200 characters and a tag of 128.
    LongName,
    /// The right digest in a registry that somebody invented.
    OtherRegistry,
    /// The right digest in another repository of the same registry.
    OtherRepository,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ImageUse {
    Container,
    InitContainer,
    /// An init container that goes on running.
    Sidecar,
    /// Added to a pod that runs.
    Ephemeral,
    /// A pod that the kubelet reads from a file.
    StaticPod,
    /// A volume of the pod.
    Volume,
    /// One container of two; nobody has the other's image.
    OneOfTwo,
    /// Two pods.
    TwoPods,
    /// A pod that is made by another object.
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
    /// The pod, in a namespace that allows it.
    Pod,
    /// Not the pod but what owns it.
    Owner,
    /// What owns it, and the pod says `ignore`.
    OwnerButPodIgnores,
    /// The pod, and it also says `ignore`.
    PodButIgnores,
    /// The pod says "yes", which is not "true".
    ValueYes,
    /// Nobody.
    None,
    /// The pod, in a namespace that does not allow it.
    ClosedNamespace,
    /// The pod, in a namespace that allows it and that the agents' settings deny.
    DeniedNamespace,
    /// The pod, in a namespace that also allows images which the registry denies.
    EvenIfDenied,
    /// The pod, in a namespace whose list of repositories has the image's.
    Listed,
    /// The pod, in a namespace that lists other repositories only.
    OthersListed,
    /// Pod and namespace, by tote's names.
    Tote,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LocalContent {
    Nothing,
    /// All of it, recorded, but for its own layer.
    NoLayer,
    /// All of it, recorded, but for its configuration.
    NoConfig,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expectation {
    /// The container runs, in the pod that was made, and an Event on it says that the image came from peers.
    Runs,
    /// As `Runs`, and the fault counts as no outage of the registry.
    RunsWithoutOutage,
    /// It does not, nothing was brought, and exactly one Event with this reason has all of these words (in any case).
    Event(&'static str, &'static [&'static str]),
    /// It does not, nothing was brought, and no Event of ours says anything.
    NoEvent,
}

impl Expectation {
    /// Whether the container is to run.
    fn runs(self) -> bool {
        matches!(self, Self::Runs | Self::RunsWithoutOutage)
    }
}

impl Case {
    /// Its part of image names: what a repository may be called.
    fn slug(&self) -> String {
        self.name.replace('_', "-")
    }
}
