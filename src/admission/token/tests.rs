use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};
use futures::FutureExt;
use kube::Client;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::*;
use crate::credential::token::tests::{ISSUER, good_claims, peer, published, sign};

/// An API server for tokens, keys and reviews, with a record of its requests.
#[derive(Default)]
struct FakeApiServer {
    published: Mutex<Vec<Value>>,
    key_requests: Mutex<u32>,
    token_requests: Mutex<Vec<Value>>,
    reviews: Mutex<Vec<Value>>,
    /// The verdict of the next reviews.
    rejects_tokens: AtomicBool,
}

impl FakeApiServer {
    fn publish(&self, keys: Vec<Value>) {
        *self.published.lock() = keys;
    }

    fn review_count(&self) -> usize {
        self.reviews.lock().len()
    }

    fn key_request_count(&self) -> u32 {
        *self.key_requests.lock()
    }
}

/// An agent whose API server is `fake`.
async fn agent(fake: &Arc<FakeApiServer>, server: &mut JoinSet<()>) -> TokenAdmission {
    agent_at(serve(fake, server).await, TokenAdmissionOptions::default())
}

fn agent_at(server: SocketAddr, options: TokenAdmissionOptions) -> TokenAdmission {
    let client = Client::try_from(kube::Config::new(format!("http://{server}").parse().unwrap())).unwrap();
    let agent_pod = AgentPod {
        node: "node-1".parse().unwrap(),
        k8s_namespace: "lighterman".to_owned(),
        pod_name: "agent-x".to_owned(),
        pod_uid: Some("p-1".to_owned()),
        service_account: "agent".to_owned(),
    };
    let api_server = ApiServer { client, agent_pod, start_jitter: Duration::ZERO };
    TokenAdmission::new(&api_server, peer(), options, Metrics::new())
}

async fn serve(fake: &Arc<FakeApiServer>, server: &mut JoinSet<()>) -> SocketAddr {
    let jwks = async |State(fake): State<Arc<FakeApiServer>>| {
        *fake.key_requests.lock() += 1;
        json!({ "keys": *fake.published.lock() }).to_string()
    };
    let token = async |State(fake): State<Arc<FakeApiServer>>, body: String| {
        let mut request: Value = serde_json::from_str(&body).unwrap();
        fake.token_requests.lock().push(request.clone());
        request["status"] = json!({ "token": "a.b.c", "expirationTimestamp": "2030-01-01T00:00:00Z" });
        request["spec"]["expirationSeconds"] = 600.into();
        request.to_string()
    };
    let review = async |State(fake): State<Arc<FakeApiServer>>, body: String| {
        let mut review: Value = serde_json::from_str(&body).unwrap();
        fake.reviews.lock().push(review["spec"].clone());
        let passed = !fake.rejects_tokens.load(Ordering::Relaxed);
        review["status"] = json!({ "authenticated": passed, "audiences": review["spec"]["audiences"],
            "user": { "username": "system:serviceaccount:lighterman:agent" } });
        review.to_string()
    };
    let routes = Router::new()
        .route("/.well-known/openid-configuration", get(async || json!({ "issuer": ISSUER }).to_string()))
        .route("/openid/v1/jwks", get(jwks))
        .route("/api/v1/namespaces/lighterman/serviceaccounts/agent/token", post(token))
        .route("/apis/authentication.k8s.io/v1/tokenreviews", post(review))
        .with_state(fake.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    server.spawn(async move { axum::serve(listener, routes).await.unwrap() });
    address
}

/// A valid token that expires in an hour.
fn credential() -> Credential {
    credential_expiring_in(3600)
}

/// A token with a valid signature that expires `seconds` from now; a negative number is an expired
/// token.
fn credential_expiring_in(seconds: i64) -> Credential {
    let expires = unix_time().as_secs().strict_add_signed(seconds);
    let mut claims = good_claims();
    for (claim, time) in [("iat", expires - 3600), ("nbf", expires - 3600), ("exp", expires)] {
        claims[claim] = time.into();
    }
    Credential::new(sign(&claims))
}

fn rejection_text<T: std::fmt::Debug>(result: Result<T, Rejection>) -> String {
    match result {
        Err(Rejection::Denied(text)) => text,
        other => panic!("{other:?}"),
    }
}

/// Advances the clock while no request is in flight. A paused clock would make real requests time
/// out.
async fn advance_clock(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

async fn has_token_and_keys(agent: &TokenAdmission) -> bool {
    agent.credential().await.is_ok() && agent.admit_relayed(peer(), &credential()).is_ok()
}

/// Waits until a running agent has no request in flight. No peer is admitted here, because an
/// unknown key would cause another request.
async fn wait_for_token_and_keys(agent: &TokenAdmission) {
    while agent.credential().await.is_err() || agent.keys.cached().is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn signing_keys_are_fetched_once_and_cached() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let agent = agent(&fake, &mut server).await;
    for _ in 0..3 {
        assert_eq!(agent.admit(peer(), &credential()).await.unwrap().node.unwrap().as_str(), "node-1");
    }
    server.shutdown().await;
    agent.admit(peer(), &credential()).await.unwrap();
    assert_eq!(fake.key_request_count(), 1);
}

#[tokio::test]
async fn a_token_of_an_unknown_key_refetches_the_keys_at_a_bounded_rate() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    let mut old = json!(published());
    old["kid"] = "k0".into();
    fake.publish(vec![old]);
    let agent = agent(&fake, &mut server).await;
    for _ in 0..20 {
        let rejection = agent.admit(peer(), &credential()).await.unwrap_err();
        assert_eq!(rejection, Rejection::Denied(TokenRejection::UnknownKey.to_string()));
    }
    assert_eq!(fake.key_request_count(), 1);

    fake.publish(vec![json!(published())]);
    advance_clock(Duration::from_secs(10)).await;
    agent.admit(peer(), &credential()).await.unwrap();
    assert_eq!(fake.key_request_count(), 2);
}

#[tokio::test]
async fn a_token_of_an_unknown_key_has_no_verdict_while_the_api_server_is_unreachable() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    let mut old = json!(published());
    old["kid"] = "k0".into();
    fake.publish(vec![old]);
    let agent = agent(&fake, &mut server).await;
    agent.admit(peer(), &credential()).await.unwrap_err();
    server.shutdown().await;
    advance_clock(Duration::from_secs(10)).await;
    assert!(matches!(agent.admit(peer(), &credential()).await, Err(Rejection::Undecided(_))));
}

#[tokio::test]
async fn the_token_request_names_this_key_and_pod_and_an_expired_token_is_not_sent() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    let agent = agent(&fake, &mut server).await;
    let renewed = agent.credential_changes();
    assert_eq!(
        agent.request_token().await.unwrap(),
        Duration::from_secs(600),
        "the granted lifetime, not the requested lifetime"
    );
    let spec = fake.token_requests.lock()[0]["spec"].take();
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "name": "agent-x", "uid": "p-1" });
    assert_eq!(spec, json!({ "audiences": [peer().to_string()], "boundObjectRef": pod, "expirationSeconds": 3600 }));
    assert_eq!(agent.credential().await.unwrap().expose(), "a.b.c");
    assert!(renewed.has_changed().unwrap());
    advance_clock(Duration::from_secs(600)).await;
    assert!(matches!(agent.credential().await, Err(Rejection::Undecided(text)) if text.contains("expired")));
}

#[tokio::test]
async fn a_pods_token_is_reviewed_once_and_a_rejection_counts() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let agent = agent(&fake, &mut server).await;
    let no_keys = Rejection::Undecided("the cluster's signing keys were not fetched yet".into());
    assert_eq!(agent.admit_relayed(peer(), &credential()), Err(no_keys));
    for _ in 0..3 {
        agent.admit(peer(), &credential()).await.unwrap();
    }
    assert_eq!(fake.review_count(), 1);
    let spec = fake.reviews.lock()[0].clone();
    assert_eq!(spec["audiences"], json!([peer().to_string()]));

    // A token of another pod needs its own review.
    fake.rejects_tokens.store(true, Ordering::Relaxed);
    let mut claims = good_claims();
    claims["kubernetes.io"]["pod"]["uid"] = "p-2".into();
    claims["exp"] = (unix_time().as_secs() + 3599).into();
    claims["iat"] = unix_time().as_secs().into();
    claims["nbf"] = unix_time().as_secs().into();
    let stolen = Credential::new(sign(&claims));
    agent.admit_relayed(peer(), &stolen).unwrap();
    for _ in 0..3 {
        assert!(rejection_text(agent.admit(peer(), &stolen).await).contains("the API server"));
    }
    assert!(
        rejection_text(agent.admit_relayed(peer(), &stolen)).contains("the API server"),
        "a relayed token is rejected too"
    );
    assert_eq!(fake.review_count(), 2);
    let spent = (0..100).filter(|_| agent.budget.try_take(1)).count();
    advance_clock(Duration::from_secs(61)).await;
    while agent.budget.try_take(1) {}
    assert!(
        rejection_text(agent.admit(peer(), &stolen).await).contains("the API server"),
        "the rejection outlasts the budget of {spent} reviews"
    );
}

#[tokio::test]
async fn the_signature_decides_without_a_review_or_over_the_review_budget() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let agent = agent(&fake, &mut server).await;
    while agent.budget.try_take(1) {}
    agent.admit(peer(), &credential()).await.unwrap();
    assert_eq!(fake.review_count(), 0);
    advance_clock(Duration::from_secs(20)).await;
    server.shutdown().await;
    agent.admit(peer(), &credential()).await.unwrap();
    assert_eq!(agent.api_server.reachability(), Reachability::Unreachable);
    advance_clock(Duration::from_secs(10)).await;
    agent.keys.refetch_requested().now_or_never().expect("the agent probes the API server");
}

const GRACE: Duration = Duration::from_secs(24 * 3600);

fn options_in(folder: &tempfile::TempDir) -> TokenAdmissionOptions {
    TokenAdmissionOptions { file: Some(folder.path().join("admission.json")), grace: GRACE }
}

#[tokio::test]
async fn an_expired_token_of_a_verified_peer_is_accepted_only_while_the_api_server_is_unreachable() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let (folder, address) = (tempfile::tempdir().unwrap(), serve(&fake, &mut server).await);
    let [with_history, without_history] = [(); 2].map(|()| agent_at(address, options_in(&folder)));
    let expired = credential_expiring_in(-3600);
    // This agent verified a token of the peer before the expiry.
    with_history.admit(peer(), &credential_expiring_in(1)).await.unwrap();
    without_history.keys.refetch().await.unwrap();
    assert!(rejection_text(with_history.admit(peer(), &expired).await).contains("expired"), "the API server answers");
    advance_clock(Duration::from_secs(11)).await;
    assert!(
        matches!(with_history.admit_relayed(peer(), &expired), Err(Rejection::Undecided(_))),
        "the API server's state is unknown"
    );

    server.shutdown().await;
    let admitted = with_history.admit(peer(), &expired).await.unwrap();
    assert!(admitted.is_in_grace && admitted.valid_until <= unix_time() + GRACE_VERDICT_TTL);
    assert!(with_history.admit_relayed(peer(), &expired).unwrap().is_in_grace);
    let too_old = credential_expiring_in(-24 * 3600 - 1);
    assert!(rejection_text(with_history.admit(peer(), &too_old).await).contains("expired"));
    assert!(
        rejection_text(without_history.admit(peer(), &expired).await).contains("expired"),
        "the agent never verified the peer"
    );
    let other = PeerId::from_public_key([8; 32]);
    assert!(rejection_text(with_history.admit(other, &expired).await).contains("another peer"));
}

#[tokio::test]
async fn an_agent_restarted_while_the_api_server_is_unreachable_reloads_its_peers_and_its_token() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let (folder, address) = (tempfile::tempdir().unwrap(), serve(&fake, &mut server).await);
    let before = agent_at(address, options_in(&folder));
    before.admit(peer(), &credential_expiring_in(1)).await.unwrap();
    before.request_token().await.unwrap();
    before.save().await;
    server.shutdown().await;

    let after = agent_at(address, options_in(&folder));
    assert_eq!(after.credential().await.unwrap().expose(), "a.b.c");
    advance_clock(Duration::from_secs(600)).await;
    assert!(matches!(after.credential().await, Err(Rejection::Undecided(_))), "the token has expired");
    after.admit(peer(), &credential()).await.unwrap();
    after.request_token().await.unwrap_err();
    assert_eq!(after.credential().await.unwrap().expose(), "a.b.c", "on grace");
    assert!(after.admit_relayed(peer(), &credential_expiring_in(-3600)).unwrap().is_in_grace);
    advance_clock(GRACE).await;
    assert!(matches!(after.credential().await, Err(Rejection::Undecided(_))), "grace is over");
}

#[tokio::test]
async fn a_killed_agent_reloads_the_token_that_it_just_received() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let (folder, address) = (tempfile::tempdir().unwrap(), serve(&fake, &mut server).await);
    let killed = Arc::new(agent_at(address, options_in(&folder)));
    let agent = killed.clone();
    let running = server.spawn(async move { agent.run(CancellationToken::new()).await });
    wait_for_token_and_keys(&killed).await;
    let again = async {
        while !has_token_and_keys(&agent_at(address, options_in(&folder))).await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    // The clock stands still while the file is written.
    tokio::time::pause();
    tokio::time::timeout(SAVE_INTERVAL / 2, again).await.expect("token and keys are written at once");
    running.abort();
}

#[tokio::test]
async fn an_unsaved_token_is_saved_when_the_folder_becomes_writable() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let (folder, address) = (tempfile::tempdir().unwrap(), serve(&fake, &mut server).await);
    let missing = folder.path().join("missing");
    let options = TokenAdmissionOptions { file: Some(missing.join("admission.json")), grace: GRACE };
    let agent = Arc::new(agent_at(address, options.clone()));
    let running = agent.clone();
    server.spawn(async move { running.run(CancellationToken::new()).await });
    wait_for_token_and_keys(&agent).await;
    // The clock stands still during each write, so the first writes end, and fail, in this second.
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(1)).await;
    std::fs::create_dir(&missing).unwrap();
    let saved = async {
        while !has_token_and_keys(&agent_at(address, options.clone())).await {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::time::timeout(SAVE_INTERVAL + Duration::from_secs(1), saved).await.expect("the write is retried");
}

#[tokio::test]
async fn a_token_of_an_unknown_key_refetches_the_keys_without_blocking_the_event_loop() {
    let (fake, mut server) = (Arc::new(FakeApiServer::default()), JoinSet::new());
    let mut old = json!(published());
    old["kid"] = "k0".into();
    fake.publish(vec![old]);
    let agent = Arc::new(agent(&fake, &mut server).await);
    let running = agent.clone();
    server.spawn(async move { running.run(CancellationToken::new()).await });
    // The cluster rotates its signing key.
    while fake.key_request_count() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fake.publish(vec![json!(published())]);
    while let Err(rejection) = agent.admit_relayed(peer(), &credential()) {
        assert!(matches!(rejection, Rejection::Undecided(_)), "{rejection}");
        advance_clock(Duration::from_secs(1)).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(fake.key_request_count(), 2);
}

#[test]
fn a_token_is_renewed_well_before_it_expires() {
    assert_eq!(renewal_delay(MAX_LIFE, 0.0), Duration::from_secs(2700));
    assert_eq!(renewal_delay(MAX_LIFE, 1.0), Duration::from_secs(3060));
}

#[test]
fn the_backoff_grows_to_its_maximum() {
    let delays: Vec<_> = (0..8).map(|failures| BACKOFF.jittered_wait(failures, 1.0).as_secs()).collect();
    assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(BACKOFF.jittered_wait(u32::MAX, 0.0), BACKOFF.longest / 2);
}
