use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::*;
use crate::cluster::token::tests::{ISSUER, good, peer, published, sign};

/// What an API server that is not one is asked, and answers.
#[derive(Default)]
struct Fake {
    published: Mutex<Vec<Value>>,
    asked_for_keys: Mutex<u32>,
    token_requests: Mutex<Vec<Value>>,
}

impl Fake {
    fn publish(&self, keys: Vec<Value>) {
        *self.published.lock().unwrap() = keys;
    }

    fn times_asked(&self) -> u32 {
        *self.asked_for_keys.lock().unwrap()
    }
}

/// An agent of that API server.
async fn agent(fake: &Arc<Fake>, server: &mut JoinSet<()>) -> TokenAdmission {
    let jwks = async |State(fake): State<Arc<Fake>>| {
        *fake.asked_for_keys.lock().unwrap() += 1;
        json!({ "keys": *fake.published.lock().unwrap() }).to_string()
    };
    let token = async |State(fake): State<Arc<Fake>>, body: String| {
        let mut request: Value = serde_json::from_str(&body).unwrap();
        fake.token_requests.lock().unwrap().push(request.clone());
        request["status"] = json!({ "token": "a.b.c", "expirationTimestamp": "2030-01-01T00:00:00Z" });
        request["spec"]["expirationSeconds"] = 600.into();
        request.to_string()
    };
    let routes = Router::new()
        .route("/.well-known/openid-configuration", get(async || json!({ "issuer": ISSUER }).to_string()))
        .route("/openid/v1/jwks", get(jwks))
        .route("/api/v1/namespaces/lighterman/serviceaccounts/agent/token", post(token))
        .with_state(fake.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    server.spawn(async move { axum::serve(listener, routes).await.unwrap() });
    let client = Client::try_from(kube::Config::new(address.parse().unwrap())).unwrap();
    let own = Own {
        node: "node-1".parse().unwrap(),
        k8s_namespace: "lighterman".to_owned(),
        pod_name: "agent-x".to_owned(),
        pod_uid: Some("p-1".to_owned()),
        service_account: "agent".to_owned(),
    };
    TokenAdmission::new(&KubeCluster::new(client, own, Duration::ZERO), peer())
}

/// A good token of this moment.
fn credential() -> Credential {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let mut claims = good();
    for (claim, time) in [("iat", now), ("nbf", now), ("exp", now + 3600)] {
        claims[claim] = time.into();
    }
    Credential::new(sign(&claims))
}

/// Lets time pass while nothing is under way; a clock that stood still during real requests would make them time out.
async fn wait(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

#[tokio::test]
async fn keys_are_asked_for_once_and_kept() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let agent = agent(&fake, &mut server).await;
    for _ in 0..3 {
        assert_eq!(agent.admit(peer(), &credential()).await.unwrap().unwrap().as_str(), "node-1");
    }
    server.shutdown().await;
    agent.admit(peer(), &credential()).await.unwrap();
    assert_eq!(fake.times_asked(), 1);
}

#[tokio::test]
async fn a_new_key_is_learnt_from_the_first_token_it_signed_but_not_every_ten_milliseconds() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    let mut old = json!(published());
    old["kid"] = "k0".into();
    fake.publish(vec![old]);
    let agent = agent(&fake, &mut server).await;
    for _ in 0..20 {
        let refused = agent.admit(peer(), &credential()).await.unwrap_err();
        assert_eq!(refused, Refusal::Denied(Flaw::UnknownKey.to_string()));
    }
    assert_eq!(fake.times_asked(), 1);

    fake.publish(vec![json!(published())]);
    wait(Duration::from_secs(10)).await;
    agent.admit(peer(), &credential()).await.unwrap();
    assert_eq!(fake.times_asked(), 2);
}

#[tokio::test]
async fn an_unknown_key_cannot_be_judged_while_the_api_server_is_away() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    let mut old = json!(published());
    old["kid"] = "k0".into();
    fake.publish(vec![old]);
    let agent = agent(&fake, &mut server).await;
    agent.admit(peer(), &credential()).await.unwrap_err();
    server.shutdown().await;
    wait(Duration::from_secs(10)).await;
    assert!(matches!(agent.admit(peer(), &credential()).await, Err(Refusal::CannotTell(_))));
}

#[tokio::test]
async fn the_token_is_asked_for_this_key_and_this_pod_and_not_shown_after_its_end() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    let agent = agent(&fake, &mut server).await;
    assert_eq!(agent.obtain().await.unwrap(), Duration::from_secs(600), "what was granted, not what was asked for");
    let spec = fake.token_requests.lock().unwrap()[0]["spec"].take();
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "name": "agent-x", "uid": "p-1" });
    assert_eq!(spec, json!({ "audiences": [peer().to_string()], "boundObjectRef": pod, "expirationSeconds": 3600 }));
    assert_eq!(agent.credential().await.unwrap().expose(), "a.b.c");
    wait(Duration::from_secs(600)).await;
    assert!(matches!(agent.credential().await, Err(Refusal::CannotTell(text)) if text.contains("expired")));
}

#[test]
fn a_token_is_renewed_well_before_it_expires() {
    assert_eq!(renewal(MAX_LIFE, 0.0), Duration::from_secs(2700));
    assert_eq!(renewal(MAX_LIFE, 1.0), Duration::from_secs(3060));
}

#[test]
fn pauses_grow_and_stay_bounded() {
    let pauses: Vec<_> = (1..=8).map(|failures| pause(failures, 1.0).as_secs()).collect();
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(pause(u32::MAX, 0.0), LAST_PAUSE / 2);
}
