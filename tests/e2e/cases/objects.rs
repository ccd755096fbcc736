//! The Kubernetes objects of a row: pods, and the owners of pods.

use serde_json::{Value, json};

use super::{ImageUse, OptInForm, OwnerKind};
use crate::pods::pod_spec;

/// Label of a row's pods.
pub(crate) const LABEL: &str = "e2e-case";

/// Name of the container that uses the row's image, wherever in the pod, and of the image volume.
pub(crate) const CONTAINER: &str = "c";

/// An image that every node has from the start.
const PRELOADED_IMAGE: &str = "local.test/pause:1";

/// An image that no node ever has.
const ABSENT_IMAGE: &str = "10.77.0.1:5001/nobody/has:v1";

/// The inputs of a row's objects.
pub(crate) struct CaseObjects<'a> {
    pub(crate) id: &'a str,
    pub(crate) node: &'a str,
    pub(crate) image: &'a str,
    pub(crate) policy: &'a str,
    pub(crate) opt_in: OptInForm,
}

impl OptInForm {
    /// The namespace with the annotations of this case.
    pub(crate) fn k8s_namespace(self) -> &'static str {
        match self {
            Self::ClosedNamespace => "e2e-closed",
            Self::DeniedNamespace => "kube-public",
            Self::EvenIfDenied => "e2e-even-if-denied",
            Self::Listed => "e2e-listed",
            Self::OthersListed => "e2e-lists-others",
            Self::Tote => "e2e-tote",
            Self::None | Self::Pod | Self::Owner | Self::ValueYes => "e2e-allowed",
            Self::OwnerButPodIgnores | Self::PodButIgnores => "e2e-allowed",
        }
    }

    fn of_pod(self) -> Value {
        match self {
            Self::Pod
            | Self::ClosedNamespace
            | Self::DeniedNamespace
            | Self::EvenIfDenied
            | Self::Listed
            | Self::OthersListed => {
                json!({"lighterman.dev/recover": "true"})
            }
            Self::Owner | Self::None => json!({}),
            Self::OwnerButPodIgnores => json!({"lighterman.dev/ignore": "true"}),
            Self::PodButIgnores => json!({"lighterman.dev/recover": "true", "lighterman.dev/ignore": "true"}),
            Self::ValueYes => json!({"lighterman.dev/recover": "yes"}),
            Self::Tote => json!({"tote.dev/recover": "true"}),
        }
    }

    fn of_owner(self) -> Value {
        match self {
            Self::Owner | Self::OwnerButPodIgnores => json!({"lighterman.dev/recover": "true"}),
            _ => json!({}),
        }
    }
}

/// The namespaces and their annotations.
pub(crate) fn namespaces() -> [Value; 7] {
    let namespace = |name: &str, annotations: Value| {
        let metadata = json!({"name": name, "annotations": annotations});
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    };
    [
        namespace("e2e-allowed", json!({"lighterman.dev/allow": "true"})),
        namespace("e2e-closed", json!({})),
        namespace("kube-public", json!({"lighterman.dev/allow": "true"})),
        namespace(
            "e2e-even-if-denied",
            json!({"lighterman.dev/allow": "true", "lighterman.dev/recover-on-denied": "true"}),
        ),
        namespace(
            "e2e-listed",
            json!({"lighterman.dev/allow": "true", "lighterman.dev/repositories": "10.77.0.1:5001/namespace-lists-**"}),
        ),
        namespace(
            "e2e-lists-others",
            json!({"lighterman.dev/allow": "true", "lighterman.dev/repositories": "10.77.0.1:5001/others/*, r.test/**"}),
        ),
        namespace("e2e-tote", json!({"tote.dev/allow": "true"})),
    ]
}

impl CaseObjects<'_> {
    /// The objects to apply, in this order.
    pub(crate) fn objects(&self, image_use: ImageUse) -> Vec<Value> {
        match image_use {
            ImageUse::OwnedBy(owner) => vec![self.owner(owner)],
            ImageUse::TwoPods => [1, 2].map(|number| self.pod(&format!("{}-{number}", self.id), image_use)).to_vec(),
            _ => vec![self.pod(self.id, image_use)],
        }
    }

    fn pod(&self, name: &str, image_use: ImageUse) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": self.opt_in.k8s_namespace(),
                "labels": {LABEL: self.id}, "annotations": self.opt_in.of_pod(),
            },
            "spec": self.spec(image_use),
        })
    }

    fn spec(&self, image_use: ImageUse) -> Value {
        let node = (image_use != ImageUse::StaticPod).then_some(self.node);
        let mut spec = pod_spec(PRELOADED_IMAGE, node);
        let container = json!({"name": CONTAINER, "image": self.image, "imagePullPolicy": self.policy});
        let other_container = json!({"name": "other", "image": PRELOADED_IMAGE, "imagePullPolicy": "IfNotPresent"});
        let mut init = container.clone();
        match image_use {
            ImageUse::Container | ImageUse::StaticPod | ImageUse::TwoPods | ImageUse::OwnedBy(_) => {
                spec["containers"] = json!([container]);
            }
            ImageUse::InitContainer => {
                init["command"] = json!(["/bin/busybox", "true"]);
                (spec["initContainers"], spec["containers"]) = (json!([init]), json!([other_container]));
            }
            ImageUse::Sidecar => {
                init["restartPolicy"] = "Always".into();
                (spec["initContainers"], spec["containers"]) = (json!([init]), json!([other_container]));
            }
            ImageUse::Ephemeral => spec["containers"] = json!([other_container]),
            ImageUse::OneOfTwo => {
                let other = json!({"name": "other", "image": ABSENT_IMAGE, "imagePullPolicy": "IfNotPresent"});
                spec["containers"] = json!([other, container]);
            }
            ImageUse::Volume => {
                let volume = json!({"name": CONTAINER, "image": {"reference": self.image, "pullPolicy": self.policy}});
                let mounted = json!({
                    "name": CONTAINER, "image": PRELOADED_IMAGE, "imagePullPolicy": "IfNotPresent",
                    "volumeMounts": [{"name": CONTAINER, "mountPath": "/volume"}],
                });
                (spec["volumes"], spec["containers"]) = (json!([volume]), json!([mounted]));
            }
        }
        spec
    }

    /// The patch that adds an ephemeral container.
    pub(crate) fn ephemeral(&self) -> Value {
        json!({"spec": {"ephemeralContainers": [
            {"name": CONTAINER, "image": self.image, "imagePullPolicy": self.policy}
        ]}})
    }

    fn owner(&self, owner: OwnerKind) -> Value {
        let labels = json!({LABEL: self.id});
        let mut spec = self.spec(ImageUse::OwnedBy(owner));
        if owner == OwnerKind::DaemonSet {
            // The DaemonSet controller chooses the node.
            spec["nodeSelector"] = json!({"kubernetes.io/hostname": self.node});
            spec["nodeName"] = Value::Null;
        }
        let template = json!({"metadata": {"labels": labels, "annotations": self.opt_in.of_pod()}, "spec": spec});
        let selected = json!({"selector": {"matchLabels": labels}, "template": template});
        let mut job = json!({"template": template});
        job["template"]["spec"]["restartPolicy"] = "Never".into();
        let (version, kind, spec) = match owner {
            OwnerKind::Deployment => ("apps/v1", "Deployment", selected),
            OwnerKind::DaemonSet => ("apps/v1", "DaemonSet", selected),
            OwnerKind::StatefulSet => {
                let mut set = selected;
                set["serviceName"] = "none".into();
                ("apps/v1", "StatefulSet", set)
            }
            OwnerKind::Job => ("batch/v1", "Job", job),
            // One job is enough. The job begins at the next full minute.
            OwnerKind::CronJob => (
                "batch/v1",
                "CronJob",
                json!({"schedule": "* * * * *", "concurrencyPolicy": "Forbid", "jobTemplate": {"spec": job}}),
            ),
        };
        json!({
            "apiVersion": version, "kind": kind, "spec": spec,
            "metadata": {
                "name": self.id, "namespace": self.opt_in.k8s_namespace(), "annotations": self.opt_in.of_owner(),
            },
        })
    }
}
