//! Owners of a pod, up to the workload.

use std::fmt::Debug;
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::GetParams;
use kube::{Api, Resource};
use lighterman::model::Owner;
use lighterman::ports::Cluster;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::apiserver::{KubeNamespace, create, requests, with_deadline};
use super::pod_watch::PodWatch;

fn template() -> Value {
    let spec = json!({ "restartPolicy": "Always", "containers": [{ "name": "main", "image": "reg.test/app:1" }] });
    json!({ "metadata": { "labels": { "app": "web" } }, "spec": spec })
}

fn replicated() -> Value {
    json!({ "selector": { "matchLabels": { "app": "web" } }, "template": template() })
}

fn job() -> Value {
    let mut template = template();
    template["spec"]["restartPolicy"] = "Never".into();
    json!({ "template": template })
}

/// Creates an object with the object's name in the annotation `is`.
async fn create_owned<K>(kube: &KubeNamespace, name: &str, spec: Value, owner: Option<&Owner>) -> Owner
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned,
{
    let mut metadata = json!({ "name": name, "annotations": { "is": name } });
    metadata["ownerReferences"] = owner.map(|owner| json!([reference(owner)])).into();
    let api = Api::<K>::namespaced(kube.admin.clone(), &kube.name);
    let created = create(&api, json!({ "metadata": metadata, "spec": spec })).await;
    Owner {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: name.to_owned(),
        uid: created.meta().uid.clone().unwrap(),
    }
}

fn reference(owner: &Owner) -> Value {
    let Owner { api_version, kind, name, uid } = owner;
    json!({ "apiVersion": api_version, "kind": kind, "name": name, "uid": uid, "controller": true })
}

/// The watch cache follows etcd by some milliseconds.
async fn wait_cached<K>(kube: &KubeNamespace, name: &str)
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let api = Api::<K>::namespaced(kube.admin.clone(), &kube.name);
    while api.get_with(name, &GetParams::any()).await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Annotation `is` of each owner, the nearest owner first.
async fn owner_annotations(agent: &impl Cluster, kube: &KubeNamespace, owner: &Owner) -> Vec<String> {
    let owners = agent.owners(&kube.name, owner).await.unwrap();
    owners.iter().map(|annotations| annotations["is"].clone()).collect()
}

#[tokio::test]
async fn a_pods_owners_are_followed_to_the_workload() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let deployment = create_owned::<Deployment>(&kube, "web", replicated(), None).await;
        let replica_set = create_owned::<ReplicaSet>(&kube, "web-1", replicated(), Some(&deployment)).await;
        let cron_job = create_owned::<CronJob>(
            &kube,
            "nightly",
            json!({ "schedule": "@daily", "jobTemplate": { "spec": job() } }),
            None,
        )
        .await;
        let job = create_owned::<Job>(&kube, "nightly-1", job(), Some(&cron_job)).await;
        let mut watch = PodWatch::start(kube.agent().await);
        let agent = kube.agent().await;
        for (owner, names) in [(replica_set, ["web-1", "web"]), (job, ["nightly-1", "nightly"])] {
            let pod = json!({
                "metadata": { "name": format!("{}-pod", owner.name), "ownerReferences": [reference(&owner)] },
                "spec": { "nodeName": kube.name, "containers": [{ "name": "main", "image": "reg.test/app:1" }] },
            });
            create::<Pod>(&kube.pods(), pod).await;
            let reported_owner = watch.wait_pod(|_| true).await.owner.expect("the pod has an owner");
            assert_eq!(reported_owner, owner);
            assert_eq!(owner_annotations(&agent, &kube, &reported_owner).await, names);
        }
    })
    .await;
}

#[tokio::test]
async fn the_list_of_owners_ends_where_an_owner_is_gone_replaced_or_of_another_kind() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let agent = kube.agent().await;
        let deployment = create_owned::<Deployment>(&kube, "web", replicated(), None).await;
        let replaced = Owner { uid: "earlier".to_owned(), ..deployment.clone() };
        assert!(owner_annotations(&agent, &kube, &replaced).await.is_empty());
        let of_replaced = create_owned::<ReplicaSet>(&kube, "of-replaced", replicated(), Some(&replaced)).await;
        assert_eq!(owner_annotations(&agent, &kube, &of_replaced).await, ["of-replaced"]);

        let gone = Owner { name: "gone".to_owned(), ..deployment.clone() };
        assert!(owner_annotations(&agent, &kube, &gone).await.is_empty());
        let rollout =
            Owner { api_version: "argoproj.io/v1alpha1".to_owned(), kind: "Rollout".to_owned(), ..deployment };
        let of_rollout = create_owned::<ReplicaSet>(&kube, "of-rollout", replicated(), Some(&rollout)).await;
        assert_eq!(owner_annotations(&agent, &kube, &of_rollout).await, ["of-rollout"]);

        // A name that leads to another path is never requested: this name would lead to a Service
        // that exists.
        create_owned::<Service>(&kube, "web", json!({ "ports": [{ "port": 80 }] }), None).await;
        let path = format!("../../../../../api/v1/namespaces/{}/services/web", kube.name);
        assert!(owner_annotations(&agent, &kube, &Owner { name: path, ..of_rollout }).await.is_empty());
        assert!(!requests().iter().any(|(_, uri)| uri.contains("..")));
    })
    .await;
}

#[tokio::test]
async fn references_that_lead_in_a_circle_end() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let agent = kube.agent().await;
        let first = create_owned::<Deployment>(&kube, "first", replicated(), None).await;
        let second = create_owned::<Deployment>(&kube, "second", replicated(), Some(&first)).await;
        let api = Api::<Deployment>::namespaced(kube.admin.clone(), &kube.name);
        let circle = json!({ "metadata": { "ownerReferences": [reference(&second)] } });
        api.patch("first", &Default::default(), &kube::api::Patch::Merge(circle)).await.unwrap();
        assert_eq!(owner_annotations(&agent, &kube, &second).await, ["second", "first", "second", "first"]);
    })
    .await;
}

#[tokio::test]
async fn many_pods_of_one_workload_cost_one_request_for_each_owner() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let deployment = create_owned::<Deployment>(&kube, "web", replicated(), None).await;
        let replica_set = create_owned::<ReplicaSet>(&kube, "web-1", replicated(), Some(&deployment)).await;
        wait_cached::<Deployment>(&kube, "web").await;
        wait_cached::<ReplicaSet>(&kube, "web-1").await;
        let agent = kube.agent().await;
        for answer in join_all((0..100).map(|_| owner_annotations(&agent, &kube, &replica_set))).await {
            assert_eq!(answer, ["web-1", "web"]);
        }
        let last = Owner { name: "last".to_owned(), ..deployment };
        assert!(owner_annotations(&agent, &kube, &last).await.is_empty());
        // The API server logs a request a moment after the response.
        let logged = loop {
            let is_ours = |(agent, uri): &(String, String)| {
                agent.starts_with("lighterman") && uri.contains(&format!("/{}/", kube.name))
            };
            let mut logged: Vec<_> = requests().into_iter().filter(is_ours).map(|(_, uri)| uri).collect();
            if logged.iter().any(|uri| uri.ends_with("/last")) && logged.len() >= 4 {
                logged.sort();
                break logged;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let uri = |path: &str| format!("/apis/apps/v1/namespaces/{}/{path}", kube.name);
        let cached = |path: &str| uri(path) + "?&resourceVersion=0";
        // A 404 from the watch cache is confirmed by a quorum read.
        let last = [uri("deployments/last"), cached("deployments/last")];
        assert_eq!(logged[..2], last);
        assert_eq!(logged[2..], [cached("deployments/web"), cached("replicasets/web-1")]);
    })
    .await;
}
