//! Events on the agent's own node.
//!
//! A node has no namespace: Events on nodes are in the namespace `default`, as the kubelets' Events
//! are. `kubectl describe node` selects them by the node's name as UID.

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;

use super::pod_events::{COMPONENT, MAX_NAME, MAX_NOTE};
use crate::api_server::error::{ApiError, REQUEST_TIMEOUT, call, truncate};
use crate::model::NodeName;
use crate::ports::{ClusterError, NodeReport};

/// The namespace of Events on objects without one (`validateEvent` of Kubernetes demands it).
const NAMESPACE: &str = "default";

/// Writes the node's Event of this reason, or updates the text and time of the existing Event. A
/// node has one Event of each reason, whatever number of restarts its agent has.
pub(super) async fn report(client: &Client, node: &NodeName, report: &NodeReport) -> Result<(), ClusterError> {
    let api = Api::<Event>::namespaced(client.clone(), NAMESPACE);
    let NodeReport { kind, note } = report;
    let (name, note, now) = (event_name(node, kind.reason()), truncate(note, MAX_NOTE), Timestamp::now());
    let text = |text: &str| Some(text.to_owned());
    let event = Event {
        metadata: ObjectMeta { name: text(&name), namespace: text(NAMESPACE), ..ObjectMeta::default() },
        involved_object: ObjectReference {
            api_version: text("v1"),
            kind: text("Node"),
            name: text(node.as_str()),
            uid: text(node.as_str()),
            ..ObjectReference::default()
        },
        type_: text("Warning"),
        reason: text(kind.reason()),
        message: text(note),
        source: Some(EventSource { component: text(COMPONENT), host: text(node.as_str()) }),
        reporting_component: text(COMPONENT),
        reporting_instance: text(node.as_str()),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        count: Some(1),
        ..Event::default()
    };
    let written = match call(REQUEST_TIMEOUT, api.create(&PostParams::default(), &event)).await {
        Err(ApiError::Conflict(_)) => {
            let patch = Patch::Merge(json!({ "message": note, "lastTimestamp": Time(now) }));
            call(REQUEST_TIMEOUT, api.patch(&name, &PatchParams::default(), &patch)).await
        }
        created => created,
    };
    written.map(drop).map_err(|failure| failure.into_cluster_error(&format!("namespace {NAMESPACE}")))
}

/// The name of the node's only Event of this reason. A long node name is truncated, and must not
/// end with a dot or dash then.
fn event_name(node: &NodeName, reason: &str) -> String {
    let suffix = format!(".lighterman.{}", reason.to_ascii_lowercase());
    let node = truncate(node.as_str(), MAX_NAME - suffix.len()).trim_end_matches(['.', '-']);
    format!("{node}{suffix}")
}
