//! Objects that helm renders from the chart's values, as a real API server would accept them.

use serde_json::{Value, json};

use super::apiserver::{KubeNamespace, with_deadline};
use crate::fleet::rbac::rendered;

/// Renders a template that has only one object.
async fn render_one(kube: &KubeNamespace, template: &str, values: &str) -> Value {
    let mut objects = rendered(kube, template, values).await;
    assert_eq!(objects.len(), 1, "{template}");
    objects.remove(0)
}

fn named<'a>(items: &'a Value, name: &str) -> Option<&'a Value> {
    items.as_array().unwrap().iter().find(|item| item["name"] == name)
}

#[tokio::test]
async fn the_service_lists_agents_before_they_are_ready() {
    with_deadline(async {
        let service = render_one(&KubeNamespace::new().await, "templates/service.yaml", "").await;
        assert_eq!(service["kind"], "Service");
        assert_eq!(service["spec"]["clusterIP"], "None");
        assert_eq!(service["spec"]["publishNotReadyAddresses"], true);
    })
    .await;
}

#[tokio::test]
async fn a_secret_with_certificates_is_mounted_at_the_configured_paths() {
    with_deadline(async {
        let (kube, template) = (KubeNamespace::new().await, "templates/daemonset.yaml");
        let set =
            render_one(&kube, template, "agent.admission=certificate,agent.tlsName=mesh.test,tlsSecret=mesh-tls").await;
        let pod = &set["spec"]["template"]["spec"];
        let agent = &pod["containers"][0];
        let volume = named(&pod["volumes"], "tls").expect("a volume");
        assert_eq!(volume["secret"], json!({ "secretName": "mesh-tls", "defaultMode": 0o600 }));
        let mount = named(&agent["volumeMounts"], "tls").expect("a mount");
        assert_eq!((&mount["mountPath"], &mount["readOnly"]), (&json!("/etc/lighterman/tls"), &json!(true)));
        for (name, value) in [
            ("LIGHTERMAN_ADMISSION", "certificate"),
            ("LIGHTERMAN_TLS_CERT", "/etc/lighterman/tls/tls.crt"),
            ("LIGHTERMAN_TLS_KEY", "/etc/lighterman/tls/tls.key"),
            ("LIGHTERMAN_TLS_CA", "/etc/lighterman/tls/ca.crt"),
            ("LIGHTERMAN_TLS_NAME", "mesh.test"),
        ] {
            assert_eq!(named(&agent["env"], name).map(|set| &set["value"]), Some(&json!(value)), "{name}");
        }

        let set = render_one(&kube, template, "").await;
        let pod = &set["spec"]["template"]["spec"];
        assert_eq!(named(&pod["volumes"], "tls"), None, "no TLS Secret is set");
        assert_eq!(named(&pod["containers"][0]["env"], "LIGHTERMAN_TLS_KEY"), None);
    })
    .await;
}

/// Paths of the node that the DaemonSet mounts.
fn host_paths(set: &Value) -> Vec<&str> {
    let volumes = set["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
    volumes.iter().filter_map(|volume| volume["hostPath"]["path"].as_str()).collect()
}

#[tokio::test]
async fn a_default_installation_mounts_no_folder_that_a_node_may_lack() {
    with_deadline(async {
        let set = render_one(&KubeNamespace::new().await, "templates/daemonset.yaml", "").await;
        assert_eq!(host_paths(&set), ["/", "/var/lib/lighterman"]);
        let agent = &set["spec"]["template"]["spec"]["containers"][0];
        let mount = named(&agent["volumeMounts"], "host").expect("the node's root");
        assert_eq!((&mount["mountPath"], &mount["mountPropagation"]), (&json!("/host"), &json!("HostToContainer")));
        for (name, value) in [("LIGHTERMAN_HOST_ROOT", "/host"), ("LIGHTERMAN_CONTAINERD_SOCKET", "auto")] {
            assert_eq!(named(&agent["env"], name).map(|set| &set["value"]), Some(&json!(value)), "{name}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_named_root_mounts_its_content_store_and_the_verifiers_only_where_they_are_named() {
    with_deadline(async {
        let (kube, template) = (KubeNamespace::new().await, "templates/daemonset.yaml");
        let content = "/data/containerd/io.containerd.content.v1.content";
        let set = render_one(&kube, template, "containerdRoot=/data/containerd").await;
        assert_eq!(host_paths(&set), ["/run/containerd", content, "/var/lib/lighterman"]);
        let agent = &set["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(named(&agent["env"], "LIGHTERMAN_HOST_ROOT"), None);

        let set =
            render_one(&kube, template, "containerdRoot=/data/containerd,agent.imageVerifierDir=/opt/verifiers").await;
        assert_eq!(host_paths(&set), ["/run/containerd", content, "/opt/verifiers", "/var/lib/lighterman"]);
        let agent = &set["spec"]["template"]["spec"]["containers"][0];
        let verifier_folder = named(&agent["env"], "LIGHTERMAN_IMAGE_VERIFIER_DIR").map(|set| &set["value"]);
        assert_eq!(verifier_folder, Some(&json!("/opt/verifiers")));
    })
    .await;
}

#[tokio::test]
async fn a_quota_admits_pods_of_the_agents_priority_class() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let quota = render_one(&kube, "templates/quota.yaml", "priorityClassName=my-class").await;
        let scope =
            json!({ "matchExpressions": [{ "scopeName": "PriorityClass", "operator": "In", "values": ["my-class"] }] });
        assert_eq!((&quota["kind"], &quota["spec"]["scopeSelector"]), (&json!("ResourceQuota"), &scope));
    })
    .await;
}
