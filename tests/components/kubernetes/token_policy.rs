//! The token policy on a real API server: a pod of the agents may request only tokens that are
//! bound to that pod and have one PeerId as audience.

use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::{Api, Client};
use lighterman::model::{PeerId, PodRef};
use serde_json::json;

use super::apiserver::{KubeNamespace, SERVICE_ACCOUNT, create, with_deadline};
use super::rbac::client_with;
use crate::fleet::rbac::{grant_rbac, make_name_unique, rendered};

/// Creates the chart's policies with these values. The API server enforces the policies a moment
/// later.
pub(super) async fn create_policies(kube: &KubeNamespace, values: &str) {
    for mut object in rendered(kube, "templates/admission.yaml", values).await {
        make_name_unique(kube, &mut object["metadata"]["name"]);
        let admin = kube.admin.clone();
        if object["kind"] == "ValidatingAdmissionPolicy" {
            create::<ValidatingAdmissionPolicy>(&Api::all(admin), object).await;
        } else {
            make_name_unique(kube, &mut object["spec"]["policyName"]);
            create::<ValidatingAdmissionPolicyBinding>(&Api::all(admin), object).await;
        }
    }
}

fn bound_to(pod: &PodRef) -> BoundObjectReference {
    BoundObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: Some(pod.name.clone()),
        uid: Some(pod.uid.clone()),
    }
}

/// Requests a token as the user of `client`.
async fn request_token(
    kube: &KubeNamespace,
    client: &Client,
    account: &str,
    audiences: &[&str],
    bound: Option<BoundObjectReference>,
) -> Result<(), String> {
    let audiences = audiences.iter().map(|audience| (*audience).to_owned()).collect();
    let spec = TokenRequestSpec { audiences, bound_object_ref: bound, expiration_seconds: Some(3600) };
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), &kube.name);
    let request = TokenRequest { spec, ..TokenRequest::default() };
    let answer = accounts.create_token_request(account, &PostParams::default(), &request).await;
    answer.map(drop).map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_pod_makes_tokens_bound_to_itself_for_a_peer_id_and_no_others() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        if kube.minor().await < 30 {
            println!("skipped: this API server is older than ValidatingAdmissionPolicy");
            return;
        }
        grant_rbac(&kube, "").await;
        let accounts = Api::<ServiceAccount>::namespaced(kube.admin.clone(), &kube.name);
        create(&accounts, json!({ "metadata": { "name": "other" } })).await;
        let [own, other_pod] = [kube.pod("agent").await, kube.pod("beside").await];
        let agent = client_with(&kube, &kube.token(SERVICE_ACCOUNT, None, Some(&own)).await).await;
        let peer = PeerId::from_public_key([1; 32]).to_string();
        let audience = [peer.as_str()];

        create_policies(&kube, "tokenPolicy=always,podPolicy=false").await;
        // The API server enforces the policy a moment later.
        while request_token(&kube, &agent, SERVICE_ACCOUNT, &audience, None).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        request_token(&kube, &agent, SERVICE_ACCOUNT, &audience, Some(bound_to(&own))).await.unwrap();

        let named_otherwise = BoundObjectReference { name: Some("beside".into()), ..bound_to(&own) };
        let without_uid = BoundObjectReference { uid: None, ..bound_to(&own) };
        let a_secret = BoundObjectReference { kind: Some("Secret".into()), ..bound_to(&own) };
        for (what, audiences, bound, expected) in [
            ("another pod", &audience[..], Some(bound_to(&other_pod)), "own pod"),
            ("another name", &audience, Some(named_otherwise), "own pod"),
            ("any pod of the name", &audience, Some(without_uid), "own pod"),
            ("another kind", &audience, Some(a_secret), "own pod"),
            ("nothing", &audience, None, "own pod"),
            ("the API server", &[], Some(bound_to(&own)), "one PeerId"),
            ("another audience", &["vault"], Some(bound_to(&own)), "one PeerId"),
            ("a name like a PeerId", &["12D3KooW"], Some(bound_to(&own)), "one PeerId"),
            ("one more", &[&peer, "vault"], Some(bound_to(&own)), "one PeerId"),
        ] {
            let rejection = request_token(&kube, &agent, SERVICE_ACCOUNT, audiences, bound).await.unwrap_err();
            assert!(rejection.contains(expected), "{what}: {rejection}");
        }

        // A client whose token is bound to no pod gets no token at all.
        let unbound = client_with(&kube, &kube.token(SERVICE_ACCOUNT, None, None).await).await;
        let rejection =
            request_token(&kube, &unbound, SERVICE_ACCOUNT, &audience, Some(bound_to(&own))).await.unwrap_err();
        assert!(rejection.contains("bound to its pod"), "{rejection}");

        // Other users with the right request tokens without a restriction.
        let rule = json!({ "apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"] });
        let (name, role_ref) =
            ("other", json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "other" }));
        let roles = Api::<k8s_openapi::api::rbac::v1::Role>::namespaced(kube.admin.clone(), &kube.name);
        create(&roles, json!({ "metadata": { "name": name }, "rules": [rule] })).await;
        let subject = json!({ "kind": "ServiceAccount", "name": "other", "namespace": kube.name });
        let bindings = Api::<k8s_openapi::api::rbac::v1::RoleBinding>::namespaced(kube.admin.clone(), &kube.name);
        create(&bindings, json!({ "metadata": { "name": name }, "roleRef": role_ref, "subjects": [subject] })).await;
        let other = client_with(&kube, &kube.token("other", None, None).await).await;
        request_token(&kube, &other, "other", &["vault"], None).await.unwrap();
    })
    .await;
}
