//! Tokens that a real API server issues, and a peer's verdicts on the tokens.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::DeleteParams;
use lighterman::admission::{TokenAdmission, TokenAdmissionOptions};
use lighterman::api_server::{ApiServer, Config, connect};
use lighterman::metrics::Metrics;
use lighterman::model::{Credential, PeerId};
use lighterman::ports::{Admission, Rejection};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::apiserver::{ISSUER, KubeNamespace, SERVICE_ACCOUNT, create, signing_key, with_deadline};
use super::proxy::Proxy;

fn peer(n: u8) -> PeerId {
    PeerId::from_public_key([n; 32])
}

fn token_admission(api_server: &ApiServer, peer: PeerId, options: TokenAdmissionOptions) -> TokenAdmission {
    TokenAdmission::new(api_server, peer, options, Metrics::new())
}

async fn admission(kube: &KubeNamespace, n: u8) -> TokenAdmission {
    token_admission(&connect(kube.config()).await.unwrap(), peer(n), TokenAdmissionOptions::default())
}

fn expect_denied(verdict: Result<impl Sized, Rejection>) -> String {
    match verdict {
        Err(Rejection::Denied(text)) => text,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("admitted"),
    }
}

#[tokio::test]
async fn an_agent_gets_a_token_that_admits_its_own_key_and_no_other() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let pod = kube.pod("agent").await;
        let config = Config { pod_uid: Some(pod.uid), ..kube.config() };
        let agent =
            Arc::new(token_admission(&connect(config).await.unwrap(), peer(1), TokenAdmissionOptions::default()));
        assert!(matches!(agent.credential().await, Err(Rejection::Undecided(_))), "none yet");
        let stop = CancellationToken::new();
        let mut task = JoinSet::new();
        let (running, stopped) = (agent.clone(), stop.clone());
        task.spawn(async move { running.run(stopped).await });
        let credential = loop {
            match agent.credential().await {
                Ok(credential) => break credential,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        stop.cancel();
        task.join_next().await.unwrap().unwrap();

        let other_agent = admission(&kube, 2).await;
        let admitted = other_agent.admit(peer(1), &credential).await.unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert!(admitted.valid_until > now && !admitted.is_in_grace);
        assert!(admitted.valid_until <= now + Duration::from_secs(3600), "a token for a PeerId is not extended");
        // Tokens name the node from Kubernetes 1.30 on.
        let admitted_node = admitted.node.map(|node| node.to_string());
        assert_eq!(admitted_node, (kube.minor().await >= 30).then(|| kube.name.clone()));
        assert!(expect_denied(other_agent.admit(peer(2), &credential).await).contains("another peer"));
    })
    .await;
}

#[tokio::test]
async fn tokens_that_no_agent_holds_are_rejected() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let pod = kube.pod("agent").await;
        let accounts = Api::<ServiceAccount>::namespaced(kube.admin.clone(), &kube.name);
        create(&accounts, json!({ "metadata": { "name": "other" } })).await;
        let agent = admission(&kube, 1).await;
        let audience = || Some(peer(2).to_string());
        let good = kube.token(SERVICE_ACCOUNT, audience(), Some(&pod)).await;
        assert!(agent.admit(peer(2), &Credential::new(good)).await.is_ok());
        for (token, rejection) in [
            (kube.token(SERVICE_ACCOUNT, None, Some(&pod)).await, "another peer"),
            (kube.token(SERVICE_ACCOUNT, Some(peer(3).to_string()), Some(&pod)).await, "another peer"),
            (kube.token(SERVICE_ACCOUNT, audience(), None).await, "not bound to a pod"),
            (kube.token("other", audience(), None).await, "another ServiceAccount"),
        ] {
            let text = expect_denied(agent.admit(peer(2), &Credential::new(token)).await);
            assert!(text.contains(rejection), "{rejection}: {text}");
        }
        let other_kube = KubeNamespace::new().await;
        let pod = other_kube.pod("agent").await;
        let token = other_kube.token(SERVICE_ACCOUNT, audience(), Some(&pod)).await;
        assert!(expect_denied(agent.admit(peer(2), &Credential::new(token)).await).contains("another ServiceAccount"));
    })
    .await;
}

/// Signs claims that the API server would not issue, with the API server's own key.
fn sign_claims(kube: &KubeNamespace, kid: &str, change: impl FnOnce(&mut Value)) -> Credential {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let mut claims = json!({
        "iss": ISSUER, "aud": [peer(2).to_string()], "iat": now, "nbf": now, "exp": now + 3600,
        "sub": format!("system:serviceaccount:{}:{SERVICE_ACCOUNT}", kube.name),
        "kubernetes.io": {
            "namespace": kube.name, "serviceaccount": { "name": SERVICE_ACCOUNT, "uid": "s" }, "pod": { "name": "p", "uid": "p" },
        },
    });
    change(&mut claims);
    let header = Header { kid: Some(kid.to_owned()), ..Header::new(Algorithm::RS256) };
    Credential::new(encode(&header, &claims, &EncodingKey::from_rsa_pem(&signing_key()).unwrap()).unwrap())
}

#[tokio::test]
async fn the_clusters_own_key_does_not_help_an_expired_or_long_lived_token() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let pod = kube.pod("agent").await;
        let token = kube.token(SERVICE_ACCOUNT, None, Some(&pod)).await;
        let kid = jsonwebtoken::decode_header(&token).unwrap().kid.unwrap();
        let agent = admission(&kube, 1).await;
        let forged = sign_claims(&kube, &kid, |_| ());
        assert!(
            expect_denied(agent.admit(peer(2), &forged).await).contains("the API server"),
            "the API server rejects a token of an absent pod"
        );
        // This agent requests no TokenReview of the forgery, so only the signature counts.
        let agent = admission(&kube, 3).await;
        expect_denied(agent.admit(peer(4), &forged).await);
        assert!(agent.admit_relayed(peer(2), &forged).is_ok(), "the forgery has a valid signature");
        let shift = |claim: &'static str, by: i64| {
            sign_claims(&kube, &kid, move |claims| claims[claim] = (claims[claim].as_i64().unwrap() + by).into())
        };
        assert!(expect_denied(agent.admit_relayed(peer(2), &shift("exp", -3700))).contains("expired"));
        assert!(expect_denied(agent.admit_relayed(peer(2), &shift("exp", 3600))).contains("lives longer"));
        let unknown = sign_claims(&kube, "never-published", |_| ());
        assert!(expect_denied(agent.admit(peer(2), &unknown).await).contains("does not publish"));
    })
    .await;
}

#[tokio::test]
async fn cached_keys_verify_tokens_while_the_api_server_is_away() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let pod = kube.pod("agent").await;
        let (proxy, folder) = (Proxy::open().await, tempfile::tempdir().unwrap());
        let options = TokenAdmissionOptions {
            file: Some(folder.path().join("admission.json")),
            grace: Duration::from_secs(86_400),
        };
        let through_proxy = async |options: &TokenAdmissionOptions| {
            let config = kube.config_with(proxy.port(), "admin-of-the-tests");
            token_admission(&connect(config).await.unwrap(), peer(1), options.clone())
        };
        let (with_cached_keys, without_cached_keys) =
            (through_proxy(&options).await, through_proxy(&TokenAdmissionOptions::default()).await);
        let credential = Credential::new(kube.token(SERVICE_ACCOUNT, Some(peer(2).to_string()), Some(&pod)).await);
        with_cached_keys.admit(peer(2), &credential).await.unwrap();
        // `run` saves the cached keys and verdicts even when stopped before the start.
        let stopped = CancellationToken::new();
        stopped.cancel();
        with_cached_keys.run(stopped).await;
        let restarted = through_proxy(&options).await;

        proxy.close().await;
        with_cached_keys.admit(peer(2), &credential).await.unwrap();
        restarted.admit(peer(2), &credential).await.unwrap();
        restarted.admit_relayed(peer(2), &credential).unwrap();
        assert!(matches!(without_cached_keys.admit(peer(2), &credential).await, Err(Rejection::Undecided(_))));
        expect_denied(with_cached_keys.admit(peer(3), &credential).await);
    })
    .await;
}

#[tokio::test]
async fn the_api_server_rejects_a_token_whose_pod_is_gone_and_the_signature_alone_does_not() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let [reviewer, key_verifier] = [admission(&kube, 1).await, admission(&kube, 3).await];
        let pod = kube.pod("agent").await;
        let credential = Credential::new(kube.token(SERVICE_ACCOUNT, Some(peer(2).to_string()), Some(&pod)).await);
        kube.pods().delete(&pod.name, &DeleteParams::default().grace_period(0)).await.unwrap();
        assert!(expect_denied(reviewer.admit(peer(2), &credential).await).contains("the API server"));
        // Only a request to the API server fetches the keys.
        expect_denied(key_verifier.admit(peer(4), &credential).await);
        key_verifier.admit_relayed(peer(2), &credential).unwrap();
        expect_denied(reviewer.admit_relayed(peer(2), &credential));
    })
    .await;
}
