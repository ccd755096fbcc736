//! What helm makes of the chart's values, as a real API server would take it.

use serde_json::{Value, json};

use super::apiserver::{Place, within};
use crate::fleet::rights::rendered;

/// The only object of a template.
async fn only(place: &Place, template: &str, values: &str) -> Value {
    let mut objects = rendered(place, template, values).await;
    assert_eq!(objects.len(), 1, "{template}");
    objects.remove(0)
}

fn named<'a>(list: &'a Value, name: &str) -> Option<&'a Value> {
    list.as_array().unwrap().iter().find(|item| item["name"] == name)
}

#[tokio::test]
async fn peers_are_found_before_they_are_ready() {
    within(async {
        let service = only(&Place::new().await, "templates/service.yaml", "").await;
        assert_eq!(service["kind"], "Service");
        assert_eq!(service["spec"]["clusterIP"], "None");
        assert_eq!(service["spec"]["publishNotReadyAddresses"], true);
    })
    .await;
}

#[tokio::test]
async fn a_secret_with_certificates_is_mounted_where_the_agent_is_told_to_look() {
    within(async {
        let (place, template) = (Place::new().await, "templates/daemonset.yaml");
        let set =
            only(&place, template, "agent.admission=certificate,agent.tlsName=mesh.test,tlsSecret=mesh-tls").await;
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

        let set = only(&place, template, "").await;
        let pod = &set["spec"]["template"]["spec"];
        assert_eq!(named(&pod["volumes"], "tls"), None, "not asked for");
        assert_eq!(named(&pod["containers"][0]["env"], "LIGHTERMAN_TLS_KEY"), None);
    })
    .await;
}
