//! The rights that the chart grants suffice, and all other rights are denied.

use std::time::SystemTime;

use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Node, Pod, Secret, ServiceAccount};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use lighterman::admission::{TokenAdmission, TokenAdmissionOptions};
use lighterman::api_server::{ApiServer, connect};
use lighterman::cluster::KubeCluster;
use lighterman::metrics::Metrics;
use lighterman::model::{Owner, PeerId, PodEvent, PodReport, PodReportKind};
use lighterman::oci::Digest;
use lighterman::ports::{Admission, Claims, ClusterError, NodeReport, NodeReportKind, Nodes, PodReader, PodWriter};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::apiserver::{KubeNamespace, SERVICE_ACCOUNT, address, create, with_deadline};
use crate::fleet::rbac::grant_rbac;

/// A token of this namespace's agent, with the rights that were granted before.
async fn token(kube: &KubeNamespace) -> String {
    let pod = kube.pod("agent").await;
    kube.token(SERVICE_ACCOUNT, None, Some(&pod)).await
}

async fn api_server(kube: &KubeNamespace) -> ApiServer {
    connect(kube.config_with(address().port(), &token(kube).await)).await.unwrap()
}

async fn agent(kube: &KubeNamespace) -> KubeCluster {
    KubeCluster::new(&api_server(kube).await)
}

async fn client(kube: &KubeNamespace) -> Client {
    client_with(kube, &token(kube).await).await
}

/// Connects with this token.
pub(super) async fn client_with(kube: &KubeNamespace, token: &str) -> Client {
    let path = kube.config_with(address().port(), token).kubeconfig.unwrap();
    let file = Kubeconfig::read_from(path).unwrap();
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

const PULL_SECRET: &[u8] = br#"{"auths":{"reg.test":{"auth":"dTpw"}}}"#;

async fn make_pull_secret(kube: &KubeNamespace) {
    let data = json!({ ".dockerconfigjson": ByteString(PULL_SECRET.to_vec()) });
    let secret = json!({ "metadata": { "name": "regcred" }, "type": "kubernetes.io/dockerconfigjson", "data": data });
    create::<Secret>(&Api::namespaced(kube.admin.clone(), &kube.name), secret).await;
}

#[tokio::test]
async fn the_charts_rights_suffice() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        grant_rbac(&kube, "podPolicy=always").await;
        let api_server = api_server(&kube).await;
        let agent = KubeCluster::new(&api_server);

        let stop = CancellationToken::new();
        let (out, mut events) = tokio::sync::mpsc::channel(16);
        let read = async {
            while !matches!(events.recv().await.unwrap(), PodEvent::Synced(_)) {}
            // The list and the watch are separate rights.
            let pod = kube.pod("later").await;
            assert!(matches!(events.recv().await.unwrap(), PodEvent::Applied(_)));
            stop.cancel();
            pod
        };
        let ((), pod) = tokio::join!(agent.watch_pods(out, stop.clone()), read);

        agent.namespace(&kube.name).await.unwrap();
        // No such node exists. Only a client with the right gets that answer.
        assert!(matches!(agent.zone().await, Err(ClusterError::Gone(_))));
        let created = agent.node_created(&kube.name.parse().unwrap()).await;
        assert!(matches!(created, Err(ClusterError::Gone(_))), "{created:?}");
        agent.clock().await.unwrap();
        let note = "two nodes had one key".to_owned();
        agent.report_on_node(&NodeReport { kind: NodeReportKind::KeyReplaced, note }).await.unwrap();
        for (api_version, kind) in [
            ("apps/v1", "DaemonSet"),
            ("apps/v1", "Deployment"),
            ("apps/v1", "ReplicaSet"),
            ("apps/v1", "StatefulSet"),
            ("batch/v1", "CronJob"),
            ("batch/v1", "Job"),
            ("v1", "ReplicationController"),
        ] {
            let [api_version, kind, name, uid] = [api_version, kind, "web", "u"].map(str::to_owned);
            // No such owner exists. Only a client with the right gets that answer.
            agent.owners(&kube.name, &Owner { api_version, kind, name, uid }).await.unwrap();
        }
        agent.kubelet_events(&pod).await.unwrap();
        agent.nudge(&pod).await.unwrap();
        for _ in 0..2 {
            let report = PodReport { kind: PodReportKind::Recovered, note: "here it is".to_owned() };
            agent.report(&pod, &report).await.unwrap();
            let report = NodeReport { kind: NodeReportKind::ImagesLackLayers, note: "3 of 4".to_owned() };
            agent.report_on_node(&report).await.unwrap();
        }

        let (digest, now) = (Digest::of(b""), SystemTime::now());
        agent.create(digest, now).await.unwrap();
        let read = agent.read(digest).await.unwrap().unwrap();
        agent.update(digest, &read.version, now).await.unwrap();
        agent.release(digest).await.unwrap();
        agent.create(digest, SystemTime::UNIX_EPOCH).await.unwrap();
        assert_eq!(agent.delete_abandoned_claims(now).await.unwrap(), 1);

        let peer = PeerId::from_public_key([1; 32]);
        let admission = TokenAdmission::new(&api_server, peer, TokenAdmissionOptions::default(), Metrics::new());
        let stop = CancellationToken::new();
        let credential = async {
            let credential = loop {
                match admission.credential().await {
                    Ok(credential) => break credential,
                    Err(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
                }
            };
            stop.cancel();
            credential
        };
        let ((), credential) = tokio::join!(admission.run(stop.clone()), credential);
        let metrics = Metrics::new();
        let other = TokenAdmission::new(&api_server, peer, TokenAdmissionOptions::default(), metrics.clone());
        other.admit(peer, &credential).await.unwrap();
        let metrics_page = String::from_utf8(metrics.render()).unwrap();
        assert!(metrics_page.contains(r#"token_reviews_total{result="passed"} 1"#), "{metrics_page}");
    })
    .await;
}

fn assert_forbidden<T>(what: &str, answer: Result<T, kube::Error>) {
    match answer {
        Err(kube::Error::Api(status)) => assert_eq!(status.code, 403, "{what}: {}", status.message),
        Err(other) => panic!("{what}: {other}"),
        Ok(_) => panic!("{what} is allowed"),
    }
}

#[tokio::test]
async fn rights_beyond_those_of_the_chart_are_denied() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        grant_rbac(&kube, "podPolicy=always").await;
        create(
            &Api::<ServiceAccount>::namespaced(kube.admin.clone(), &kube.name),
            json!({ "metadata": { "name": "x" } }),
        )
        .await;
        let agent = client(&kube).await;

        let pods = Api::<Pod>::namespaced(agent.clone(), &kube.name);
        let image = json!({ "spec": { "containers": [{ "name": "main", "image": "evil.test/x:1" }] } });
        let patch = Patch::Strategic(&image);
        assert_forbidden("deleting a pod", pods.delete("agent", &DeleteParams::default()).await);
        assert_forbidden("patching a pod", pods.patch("agent", &PatchParams::default(), &patch).await);
        let current_pod = kube.pods().get("agent").await.unwrap();
        assert_forbidden("replacing a pod", pods.replace("agent", &PostParams::default(), &current_pod).await);
        assert_forbidden("making a pod", pods.create(&PostParams::default(), &Pod::default()).await);
        // The permitted patch of `pods/status` leaves the image alone.
        pods.patch_status("agent", &PatchParams::default(), &patch).await.unwrap();
        assert_eq!(kube.pods().get("agent").await.unwrap().spec, current_pod.spec);

        let list = ListParams::default();
        assert_forbidden("listing namespaces", Api::<Namespace>::all(agent.clone()).list(&list).await);
        let nodes = Api::<Node>::all(agent.clone());
        assert_forbidden("listing nodes", nodes.list(&list).await);
        assert_forbidden("patching a node", nodes.patch("n", &PatchParams::default(), &patch).await);
        make_pull_secret(&kube).await;
        let secrets = Api::<Secret>::namespaced(agent.clone(), &kube.name);
        assert_forbidden("listing secrets", secrets.list(&list).await);
        assert_forbidden("reading a secret", secrets.get("regcred").await);
        let deployments = Api::<Deployment>::namespaced(agent.clone(), &kube.name);
        assert_forbidden("listing deployments", deployments.list(&list).await);
        assert_forbidden("patching a deployment", deployments.patch("web", &PatchParams::default(), &patch).await);
        let events = Api::<Event>::namespaced(agent.clone(), &kube.name);
        assert_forbidden("deleting an Event", events.delete("web", &DeleteParams::default()).await);
        assert_forbidden(
            "listing config maps",
            Api::<ConfigMap>::namespaced(agent.clone(), &kube.name).list(&list).await,
        );
        let accounts = Api::<ServiceAccount>::namespaced(agent.clone(), &kube.name);
        let request = k8s_openapi::api::authentication::v1::TokenRequest::default();
        let other = accounts.create_token_request("x", &PostParams::default(), &request).await;
        assert_forbidden("a token of another ServiceAccount", other);
        let leases = Api::<k8s_openapi::api::coordination::v1::Lease>::namespaced(agent, "kube-node-lease");
        assert_forbidden("Leases of another namespace", leases.list(&list).await);
    })
    .await;
}

fn assert_right_missing<T>(answer: Result<T, ClusterError>, right: &str) {
    match answer {
        Err(ClusterError::Forbidden(text)) => assert!(text.contains(right), "{text}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("{right} is allowed"),
    }
}

#[tokio::test]
async fn pull_secrets_are_read_in_namespaces_that_were_named_and_no_others() {
    with_deadline(async {
        let [kube, shop, other] = [KubeNamespace::new().await, KubeNamespace::new().await, KubeNamespace::new().await];
        grant_rbac(&kube, &format!("agent.pullSecretNamespaces={{{}}}", shop.name)).await;
        for kube in [&kube, &shop, &other] {
            make_pull_secret(kube).await;
        }
        let agent = agent(&kube).await;
        assert_eq!(agent.pull_secret(&shop.name, "regcred").await.unwrap().0, PULL_SECRET);
        for other_namespace in [&kube, &other] {
            let right = format!(
                "cannot get resource \"secrets\" in API group \"\" in the namespace \"{}\"",
                other_namespace.name
            );
            assert_right_missing(agent.pull_secret(&other_namespace.name, "regcred").await, &right);
        }
        assert!(matches!(agent.pull_secret(&shop.name, "none").await, Err(ClusterError::Gone(_))));
        let path = format!("../../{}/secrets/regcred", shop.name);
        assert!(matches!(agent.pull_secret(&shop.name, &path).await, Err(ClusterError::Gone(_))));

        let opaque = json!({ "metadata": { "name": "opaque" }, "stringData": { ".dockerconfigjson": "password" } });
        create::<Secret>(&Api::namespaced(shop.admin.clone(), &shop.name), opaque).await;
        let error = agent.pull_secret(&shop.name, "opaque").await.unwrap_err().to_string();
        assert!(error.contains("is not a pull secret") && !error.contains("password"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn pods_are_deleted_only_where_the_chart_grants_the_right() {
    with_deadline(async {
        let [granted, not_granted] = [KubeNamespace::new().await, KubeNamespace::new().await];
        grant_rbac(&granted, "agent.deletePods=true,podPolicy=always").await;
        grant_rbac(&not_granted, "podPolicy=always").await;
        let pod = granted.pod("web").await;
        assert_right_missing(agent(&not_granted).await.delete(&pod).await, "cannot delete resource \"pods\"");
        assert_eq!(granted.pods().get("web").await.unwrap().metadata.deletion_timestamp, None);
        agent(&granted).await.delete(&pod).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn rights_without_a_narrowing_policy_are_granted_only_where_a_value_accepts_the_risk() {
    with_deadline(async {
        // helm contacts no cluster here, so the chart finds no policy API.
        for (values, is_granted) in [
            ("agent.deletePods=true", false),
            ("agent.deletePods=true,podPolicy=false,tokenPolicy=always", false),
            ("agent.deletePods=true,podRightsWithoutPolicy=true", true),
            ("agent.deletePods=true,podPolicy=false,podRightsWithoutPolicy=true", true),
            ("agent.deletePods=true,podPolicy=always", true),
        ] {
            let kube = KubeNamespace::new().await;
            grant_rbac(&kube, values).await;
            let (pod, agent) = (kube.pod("web").await, agent(&kube).await);
            let (nudged, deleted) = (agent.nudge(&pod).await, agent.delete(&pod).await);
            if is_granted {
                nudged.and(deleted).unwrap_or_else(|error| panic!("{values}: {error}"));
            } else {
                assert_right_missing(nudged, "cannot patch resource \"pods/status\"");
                assert_right_missing(deleted, "cannot delete resource \"pods\"");
            }
        }
    })
    .await;
}
