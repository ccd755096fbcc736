//! The kubelet's Events on a pod.
//!
//! An Event is a hint, not evidence: each user who may write Events in a namespace can write them
//! in the kubelet's name.

use k8s_openapi::api::core::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, Client};

use super::pod_view::MAX_TEXT;
use crate::api_server::error::{REQUEST_TIMEOUT, call, truncate};
use crate::model::{KubeletEvent, PodRef};
use crate::ports::ClusterError;

/// Most Events of a pod in one answer. A kubelet writes 25 Events on one object in a burst and then
/// one in 5 min, and the API server deletes an Event after an hour: 37 Events. The API server sorts
/// by name, so a lower limit would cut off the newest Events.
const MAX_EVENTS: u32 = 100;

/// The kubelet's Events on a pod, the oldest first. `uid` is the kubelet's UID of the pod.
///
/// The API server has no watch cache of Events, so each call reads all Events of the namespace from
/// etcd. Callers use this for single pods whose status leaves the cause open.
pub(super) async fn kubelet_events(
    client: &Client,
    pod: &PodRef,
    uid: &str,
) -> Result<Vec<KubeletEvent>, ClusterError> {
    let events = Api::<Event>::namespaced(client.clone(), &pod.k8s_namespace);
    let PodRef { k8s_namespace, name, .. } = pod;
    let of_pod =
        format!("involvedObject.namespace={k8s_namespace},involvedObject.name={name},involvedObject.uid={uid}");
    let selection = ListParams::default().fields(&format!("{of_pod},source=kubelet")).limit(MAX_EVENTS);
    let found = call(REQUEST_TIMEOUT, events.list(&selection)).await;
    let mut found = found.map_err(|failure| failure.into_cluster_error(&format!("pod {pod}")))?.items;
    found.sort_by_key(last_seen);
    Ok(found.into_iter().map(event_view).collect())
}

/// The time of the last repetition. Old and new recorders fill in different fields.
fn last_seen(event: &Event) -> Option<Timestamp> {
    let micro =
        [event.series.as_ref().and_then(|series| series.last_observed_time.as_ref()), event.event_time.as_ref()];
    let whole = [event.last_timestamp.as_ref(), event.metadata.creation_timestamp.as_ref()];
    micro.into_iter().flatten().map(|time| time.0).chain(whole.into_iter().flatten().map(|time| time.0)).max()
}

fn event_view(event: Event) -> KubeletEvent {
    KubeletEvent {
        reason: truncate(event.reason.as_deref().unwrap_or_default(), MAX_TEXT).to_owned(),
        container: event.involved_object.field_path.as_deref().and_then(container_of_field_path),
        message: truncate(event.message.as_deref().unwrap_or_default(), MAX_TEXT).to_owned(),
    }
}

/// The container name in a path such as `spec.containers{web}`.
fn container_of_field_path(field_path: &str) -> Option<String> {
    let (list, name) = field_path.strip_suffix('}')?.split_once('{')?;
    let lists = ["spec.containers", "spec.initContainers", "spec.ephemeralContainers"];
    // A container name is a DNS label, so has at most 63 characters.
    (lists.contains(&list) && name.len() <= 63).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_container_name_is_read_from_the_field_path() {
        for (field_path, name) in [
            ("spec.containers{web}", Some("web")),
            ("spec.initContainers{migrate}", Some("migrate")),
            ("spec.ephemeralContainers{debug}", Some("debug")),
            ("spec.containers{web", None),
            ("spec.containers", None),
            ("spec.volumes{web}", None),
            ("implicitly required container POD", None),
            ("", None),
            (&format!("spec.containers{{{}}}", "x".repeat(64)), None),
        ] {
            assert_eq!(container_of_field_path(field_path).as_deref(), name, "{field_path}");
        }
    }

    #[test]
    fn an_event_is_as_old_as_its_last_repetition() {
        let at = |fields: serde_json::Value| {
            let mut event =
                json!({ "metadata": { "creationTimestamp": "2026-01-01T00:00:01Z" }, "involvedObject": {} });
            event.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            last_seen(&serde_json::from_value(event).unwrap()).unwrap().to_string()
        };
        assert_eq!(at(json!({})), "2026-01-01T00:00:01Z");
        assert_eq!(at(json!({ "lastTimestamp": "2026-01-01T00:00:02Z" })), "2026-01-01T00:00:02Z");
        let series = json!({ "count": 2, "lastObservedTime": "2026-01-01T00:00:04.000000Z" });
        assert_eq!(at(json!({ "eventTime": "2026-01-01T00:00:03.000000Z" })), "2026-01-01T00:00:03Z");
        let both = json!({ "eventTime": "2026-01-01T00:00:03.000000Z", "series": series });
        assert_eq!(at(both), "2026-01-01T00:00:04Z");
    }

    #[test]
    fn a_long_event_message_is_truncated() {
        let event = Event { message: Some("é".repeat(MAX_TEXT)), ..Event::default() };
        assert_eq!(event_view(event).message.len(), MAX_TEXT);
    }
}
