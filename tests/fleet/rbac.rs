//! Rights that the chart grants.

use std::fs;
use std::path::PathBuf;

use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::Api;
use serde_json::Value;
use tokio::process::Command;

use super::apiserver::{KubeNamespace, create, program};

/// Renders a template of the chart with helm, for an agent of this namespace.
pub(crate) async fn rendered(kube: &KubeNamespace, template: &str, values: &str) -> Vec<Value> {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/charts/lighterman");
    let run = async |program: PathBuf, arguments: &[&str]| {
        let output = Command::new(&program).args(arguments).output().await.expect("the program starts");
        assert!(output.status.success(), "{}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let arguments = ["template", "lighterman", chart, "-n", &kube.name, "-s", template, "--set", values];
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), run(program("helm"), &arguments).await).unwrap();
    // kubectl converts the YAML documents into JSON.
    let (config, file) = (kube.config().kubeconfig.unwrap(), file.path().to_str().unwrap());
    let kubeconfig = config.to_str().unwrap();
    let arguments = ["--kubeconfig", kubeconfig, "create", "--dry-run=client", "-o", "json", "-f", file];
    let objects = run(program("kubectl"), &arguments).await;
    serde_json::Deserializer::from_slice(&objects).into_iter().collect::<Result<_, _>>().unwrap()
}

/// Renames a cluster-wide object of the chart, because other tests create that object too.
pub(crate) fn make_name_unique(kube: &KubeNamespace, name: &mut Value) {
    if name.as_str().unwrap().starts_with("lighterman") {
        *name = format!("{}-{}", name.as_str().unwrap(), kube.name).into();
    }
}

/// Grants the rights that the chart grants with these values.
pub(crate) async fn grant_rbac(kube: &KubeNamespace, values: &str) {
    for mut object in rendered(kube, "templates/rbac.yaml", values).await {
        let kind = object["kind"].as_str().unwrap().to_owned();
        let admin = kube.admin.clone();
        if kind.starts_with("Cluster") {
            make_name_unique(kube, &mut object["metadata"]["name"]);
        }
        if kind == "ClusterRoleBinding" {
            make_name_unique(kube, &mut object["roleRef"]["name"]);
        }
        let namespace = object["metadata"]["namespace"].as_str().map(str::to_owned);
        match (kind.as_str(), namespace) {
            ("ServiceAccount", _) => {}
            ("ClusterRole", _) => drop(create::<ClusterRole>(&Api::all(admin), object).await),
            ("ClusterRoleBinding", _) => drop(create::<ClusterRoleBinding>(&Api::all(admin), object).await),
            ("Role", Some(namespace)) => drop(create::<Role>(&Api::namespaced(admin, &namespace), object).await),
            ("RoleBinding", Some(namespace)) => {
                drop(create::<RoleBinding>(&Api::namespaced(admin, &namespace), object).await);
            }
            (kind, _) => panic!("templates/rbac.yaml has an unexpected {kind}"),
        }
    }
}
