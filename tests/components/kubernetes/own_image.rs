//! The DaemonSet that the agent belongs to, read with the rights that the chart grants.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use lighterman::api_server::connect;
use lighterman::cluster::KubeCluster;
use lighterman::decide::own_image::OwnImages;
use lighterman::ports::OwnDaemonSet;
use serde_json::{Value, json};

use super::apiserver::{KubeNamespace, SERVICE_ACCOUNT, address, create, requests, with_deadline};
use super::pod_watch::PodWatch;
use crate::fleet::rbac::grant_rbac;

fn template(image: &str) -> Value {
    let spec = json!({
        "restartPolicy": "Always",
        "initContainers": [{ "name": "init", "image": "reg.test/init:1" }],
        "containers": [{ "name": "agent", "image": image }],
    });
    json!({ "metadata": { "labels": { "app": "lighterman" } }, "spec": spec })
}

/// Creates the DaemonSet of this namespace and returns the UID.
async fn daemonset(kube: &KubeNamespace, image: &str) -> String {
    let spec = json!({ "selector": { "matchLabels": { "app": "lighterman" } }, "template": template(image) });
    let object = json!({ "metadata": { "name": "lighterman" }, "spec": spec });
    let created = create::<DaemonSet>(&daemonsets(kube), object).await;
    created.metadata.uid.unwrap()
}

fn daemonsets(kube: &KubeNamespace) -> Api<DaemonSet> {
    Api::namespaced(kube.admin.clone(), &kube.name)
}

/// Creates the agent's pod, owned by the DaemonSet of this UID, and connects an agent with a token
/// of its own.
async fn agent(kube: &KubeNamespace, uid: &str) -> Arc<KubeCluster> {
    let owner =
        json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "name": "lighterman", "uid": uid, "controller": true });
    let pod = json!({
        "metadata": { "name": "agent", "ownerReferences": [owner] },
        "spec": {
            "nodeName": kube.name, "serviceAccountName": SERVICE_ACCOUNT,
            "containers": [{ "name": "agent", "image": "reg.test/lighterman:v1" }],
        },
    });
    create::<Pod>(&kube.pods(), pod).await;
    let token = kube.token(SERVICE_ACCOUNT, None, None).await;
    Arc::new(KubeCluster::new(&connect(kube.config_with(address().port(), &token)).await.unwrap()))
}

fn names(images: &OwnImages) -> (Vec<String>, Option<Vec<String>>) {
    let OwnImages { current, template, pull_secrets: _ } = images;
    let text = |images: &std::collections::BTreeSet<_>| images.iter().map(ToString::to_string).collect();
    (text(current), template.as_ref().map(text))
}

/// The API server's watch cache follows etcd by some milliseconds.
async fn wait_template(agent: &KubeCluster, template: Option<&[&str]>) {
    let template: Option<Vec<_>> = template.map(|images| images.iter().map(ToString::to_string).collect());
    while names(&agent.own_images().await.unwrap()) != (vec!["reg.test/lighterman:v1".to_owned()], template.clone()) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_template_of_the_own_daemonset_is_read_with_the_charts_rights() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        grant_rbac(&kube, "podPolicy=always").await;
        let uid = daemonset(&kube, "reg.test/lighterman:v1").await;
        let agent = agent(&kube, &uid).await;
        assert_eq!(agent.own_images().await.unwrap(), OwnImages::default(), "the agent's pod is not seen yet");
        let mut watch = PodWatch::start(Arc::clone(&agent));
        watch.wait_pod(|view| view.pod.name == "agent").await;
        wait_template(&agent, Some(&["reg.test/init:1", "reg.test/lighterman:v1"])).await;

        let next = Patch::Strategic(json!({ "spec": { "template": template("reg.test/lighterman:v2") } }));
        daemonsets(&kube).patch("lighterman", &PatchParams::default(), &next).await.unwrap();
        wait_template(&agent, Some(&["reg.test/init:1", "reg.test/lighterman:v2"])).await;

        // The DaemonSet is read from the watch cache, by name: no list, no watch, no quorum read.
        let path = format!("/apis/apps/v1/namespaces/{}/daemonsets", kube.name);
        let daemonset_requests: Vec<_> = requests()
            .into_iter()
            .filter(|(user_agent, uri)| user_agent.starts_with("lighterman/") && uri.starts_with(&path))
            .collect();
        assert!(!daemonset_requests.is_empty());
        for (_, uri) in daemonset_requests {
            assert_eq!(uri, format!("{path}/lighterman?&resourceVersion=0"));
        }

        daemonsets(&kube).delete("lighterman", &DeleteParams::default()).await.unwrap();
        wait_template(&agent, None).await;
        daemonset(&kube, "reg.test/lighterman:v3").await;
        wait_template(&agent, None).await;
        watch.stop().await;
    })
    .await;
}
