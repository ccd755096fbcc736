//! The rights that the chart grants suffice, and nothing else is allowed.

use std::time::SystemTime;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use lighterman::cluster::{TokenAdmission, connect};
use lighterman::model::PeerId;
use lighterman::oci::Digest;
use lighterman::ports::{Admission, Claims, Cluster, PodEvent, PodReport, ReportKind};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::apiserver::{Place, SERVICE_ACCOUNT, address, make, within};

/// The chart's rules.
fn cluster_rules() -> Value {
    json!([
        { "apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"] },
        { "apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"] },
        { "apiGroups": [""], "resources": ["namespaces"], "verbs": ["get"] },
        { "apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"] },
    ])
}

fn own_rules() -> Value {
    json!([
        { "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "list", "create", "update", "delete"] },
        { "apiGroups": [""], "resources": ["serviceaccounts/token"], "resourceNames": [SERVICE_ACCOUNT], "verbs": ["create"] },
    ])
}

/// Grants the rules to this place's ServiceAccount.
async fn grant(place: &Place) {
    let name = format!("lighterman-{}", place.name);
    let group = "rbac.authorization.k8s.io";
    let subjects = json!([{ "kind": "ServiceAccount", "name": SERVICE_ACCOUNT, "namespace": place.name }]);
    let admin = || place.admin.clone();
    make::<ClusterRole>(&Api::all(admin()), json!({ "metadata": { "name": name }, "rules": cluster_rules() })).await;
    make::<Role>(&Api::namespaced(admin(), &place.name), json!({ "metadata": { "name": name }, "rules": own_rules() }))
        .await;
    let bind = |kind: &str, role: &str| {
        json!({
            "metadata": { "name": format!("{}-{role}", place.name).replace(':', "-") },
            "roleRef": { "apiGroup": group, "kind": kind, "name": role }, "subjects": subjects,
        })
    };
    make::<ClusterRoleBinding>(&Api::all(admin()), bind("ClusterRole", &name)).await;
    let discovery = "system:service-account-issuer-discovery";
    make::<ClusterRoleBinding>(&Api::all(admin()), bind("ClusterRole", discovery)).await;
    make::<RoleBinding>(&Api::namespaced(admin(), &place.name), bind("Role", &name)).await;
}

#[tokio::test]
async fn the_charts_rights_suffice() {
    within(async {
        let place = Place::new().await;
        grant(&place).await;
        let pod = place.pod("agent").await;
        let token = place.token(SERVICE_ACCOUNT, None, Some(&pod)).await;
        let agent = connect(place.config_with(address().port(), &token)).await.unwrap();

        let stop = CancellationToken::new();
        let (out, mut events) = tokio::sync::mpsc::channel(16);
        let read = async {
            while !matches!(events.recv().await.unwrap(), PodEvent::Synced(_)) {}
            // The list and the watch are rights of their own.
            place.pod("later").await;
            assert!(matches!(events.recv().await.unwrap(), PodEvent::Seen(_)));
            stop.cancel();
        };
        tokio::join!(agent.watch_pods(out, stop.clone()), read);

        agent.namespace_annotations(&place.name).await.unwrap();
        agent.nudge(&pod).await.unwrap();
        for _ in 0..2 {
            let report = PodReport { kind: ReportKind::Salvaged, note: "here it is".to_owned() };
            agent.report(&pod, &report).await.unwrap();
        }

        let (digest, now) = (Digest::of(b""), SystemTime::now());
        agent.create(digest, now).await.unwrap();
        let read = agent.read(digest).await.unwrap().unwrap();
        agent.update(digest, &read.version, now).await.unwrap();
        agent.release(digest).await.unwrap();
        agent.create(digest, SystemTime::UNIX_EPOCH).await.unwrap();
        assert_eq!(agent.sweep(now).await.unwrap(), 1);

        let peer = PeerId::from_public_key([1; 32]);
        let admission = TokenAdmission::new(&agent, peer);
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
        admission.admit(peer, &credential).await.unwrap();
    })
    .await;
}

fn forbidden<T>(what: &str, answer: Result<T, kube::Error>) {
    match answer {
        Err(kube::Error::Api(status)) => assert_eq!(status.code, 403, "{what}: {}", status.message),
        Err(other) => panic!("{what}: {other}"),
        Ok(_) => panic!("{what} is allowed"),
    }
}

#[tokio::test]
async fn nothing_more_is_allowed() {
    within(async {
        let place = Place::new().await;
        grant(&place).await;
        let pod = place.pod("agent").await;
        make(
            &Api::<ServiceAccount>::namespaced(place.admin.clone(), &place.name),
            json!({ "metadata": { "name": "x" } }),
        )
        .await;
        let token = place.token(SERVICE_ACCOUNT, None, Some(&pod)).await;
        let path = place.config_with(address().port(), &token).kubeconfig.unwrap();
        let file = Kubeconfig::read_from(path).unwrap();
        let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
        let agent = Client::try_from(config).unwrap();

        let pods = Api::<Pod>::namespaced(agent.clone(), &place.name);
        let image = json!({ "spec": { "containers": [{ "name": "main", "image": "evil.test/x:1" }] } });
        let patch = Patch::Strategic(&image);
        forbidden("deleting a pod", pods.delete("agent", &DeleteParams::default()).await);
        forbidden("patching a pod", pods.patch("agent", &PatchParams::default(), &patch).await);
        let whole = place.pods().get("agent").await.unwrap();
        forbidden("replacing a pod", pods.replace("agent", &PostParams::default(), &whole).await);
        forbidden("making a pod", pods.create(&PostParams::default(), &Pod::default()).await);
        // What it may patch leaves the image alone.
        pods.patch_status("agent", &PatchParams::default(), &patch).await.unwrap();
        assert_eq!(place.pods().get("agent").await.unwrap().spec, whole.spec);

        let list = ListParams::default();
        forbidden("listing namespaces", Api::<Namespace>::all(agent.clone()).list(&list).await);
        forbidden("listing secrets", Api::<Secret>::namespaced(agent.clone(), &place.name).list(&list).await);
        forbidden("listing config maps", Api::<ConfigMap>::namespaced(agent.clone(), &place.name).list(&list).await);
        let accounts = Api::<ServiceAccount>::namespaced(agent.clone(), &place.name);
        let request = k8s_openapi::api::authentication::v1::TokenRequest::default();
        let other = accounts.create_token_request("x", &PostParams::default(), &request).await;
        forbidden("a token of another ServiceAccount", other);
        let leases = Api::<k8s_openapi::api::coordination::v1::Lease>::namespaced(agent, "kube-node-lease");
        forbidden("Leases of another namespace", leases.list(&list).await);
    })
    .await;
}
