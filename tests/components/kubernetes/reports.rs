//! Events on pods and on the agent's own node.

use k8s_openapi::api::core::v1::Event;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use lighterman::model::{NodeName, PodReport, PodReportKind};
use lighterman::ports::{ClusterError, NodeReport, NodeReportKind, Nodes, PodWriter};

use super::apiserver::{KubeNamespace, with_deadline};

fn report(kind: PodReportKind, note: &str) -> PodReport {
    PodReport { kind, note: note.to_owned() }
}

async fn events(kube: &KubeNamespace) -> Vec<Event> {
    let events = Api::<Event>::namespaced(kube.admin.clone(), &kube.name);
    events.list(&ListParams::default()).await.unwrap().items
}

#[tokio::test]
async fn a_report_is_one_event_whose_repetitions_are_counted() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let pod = kube.pod("web").await;
        let agent = kube.agent().await;
        let no_provider = report(PodReportKind::NoProvider, "no peer holds reg.test/app:1");
        for _ in 0..3 {
            agent.report(&pod, &no_provider).await.unwrap();
        }
        let [event] = events(&kube).await.try_into().expect("one Event");
        assert_eq!(event.count, Some(3));
        assert_eq!(event.involved_object.uid, Some(pod.uid.clone()));
        assert_eq!(event.reason.as_deref(), Some("ImageNoProvider"));
        assert_eq!(event.type_.as_deref(), Some("Warning"));
        assert!(event.last_timestamp >= event.first_timestamp);

        agent.report(&pod, &report(PodReportKind::Recovered, "from node-2 in 3 s")).await.unwrap();
        assert_eq!(events(&kube).await.len(), 2);
        let description = kube.describe_pod("web").await;
        let line = |word: &str| {
            description.lines().find(|line| line.contains(word)).unwrap_or_else(|| panic!("{description}"))
        };
        let no_provider_line = line("ImageNoProvider");
        for part in ["Warning", "x3 over", "lighterman", "no peer holds reg.test/app:1"] {
            assert!(no_provider_line.contains(part), "{part:?} in {no_provider_line:?}");
        }
        assert!(line("ImageRecovered").contains("Normal"));
    })
    .await;
}

#[tokio::test]
async fn an_expired_event_is_created_again() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let pod = kube.pod("web").await;
        let agent = kube.agent().await;
        let no_provider = report(PodReportKind::NoProvider, "no provider");
        agent.report(&pod, &no_provider).await.unwrap();
        let all = Api::<Event>::namespaced(kube.admin.clone(), &kube.name);
        all.delete_collection(&DeleteParams::default(), &ListParams::default()).await.unwrap();
        agent.report(&pod, &no_provider).await.unwrap();
        assert_eq!(events(&kube).await.len(), 1);
        agent.report(&pod, &no_provider).await.unwrap();
        assert_eq!(events(&kube).await.len(), 1, "later reports count on the new Event");
    })
    .await;
}

#[tokio::test]
async fn a_long_note_is_truncated_and_a_flood_is_rate_limited() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let pod = kube.pod("web").await;
        let agent = kube.agent().await;
        agent.report(&pod, &report(PodReportKind::Failed, &"é".repeat(1000))).await.unwrap();
        assert_eq!(events(&kube).await[0].message.as_ref().unwrap().len(), 1024);
        let mut rate_limited = 0;
        for i in 0..40 {
            match agent.report(&pod, &report(PodReportKind::Failed, &i.to_string())).await {
                Ok(()) => {}
                Err(ClusterError::RateLimited(_)) => rate_limited += 1,
                Err(other) => panic!("{other}"),
            }
        }
        assert!(rate_limited > 0);
    })
    .await;
}

#[tokio::test]
async fn a_node_has_one_event_of_a_reason_that_the_next_report_renews() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let node: NodeName = kube.name.parse().unwrap();
        let on_node = |note: &str| NodeReport { kind: NodeReportKind::ImagesLackLayers, note: note.to_owned() };
        let all = Api::<Event>::namespaced(kube.admin.clone(), "default");
        let of_node = ListParams::default().fields(&format!("involvedObject.kind=Node,involvedObject.name={node}"));
        // The second agent stands for the first agent after a restart.
        for note in ["3 of 4", "4 of 5"] {
            kube.agent().await.report_on_node(&on_node(note)).await.unwrap();
            let [event] = all.list(&of_node).await.unwrap().items.try_into().expect("one Event");
            assert_eq!(event.message.as_deref(), Some(note));
            assert_eq!(
                event.involved_object.uid.as_deref(),
                Some(node.as_str()),
                "kubectl describe filters Events by this UID"
            );
            assert_eq!((event.reason.as_deref(), event.type_.as_deref()), (Some("ImagesLackLayers"), Some("Warning")));
        }
    })
    .await;
}

#[tokio::test]
async fn a_report_on_the_node_is_an_event_of_its_node_object() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let note = "the clock is 90 s behind".to_owned();
        kube.agent().await.report_on_node(&NodeReport { kind: NodeReportKind::ClockSkew, note }).await.unwrap();
        // Events of objects without a namespace are in the namespace `default`.
        let all = Api::<Event>::namespaced(kube.admin.clone(), "default");
        let of_node =
            ListParams::default().fields(&format!("involvedObject.kind=Node,involvedObject.name={}", kube.name));
        let [event] = all.list(&of_node).await.unwrap().items.try_into().expect("one Event");
        assert_eq!(event.reason.as_deref(), Some("NodeClockSkewed"));
        assert_eq!(event.type_.as_deref(), Some("Warning"));
        assert_eq!(event.message.as_deref(), Some("the clock is 90 s behind"));
        assert_eq!(
            event.involved_object.uid.as_deref(),
            Some(&*kube.name),
            "the kubelet uses the node's name as the UID"
        );
    })
    .await;
}
