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
use crate::credential::token::tests::{ISSUER, good, peer, published, sign};

/// What an API server that is not one is asked, and answers.
#[derive(Default)]
struct Fake {
    published: Mutex<Vec<Value>>,
    asked_for_keys: Mutex<u32>,
    token_requests: Mutex<Vec<Value>>,
    reviews: Mutex<Vec<Value>>,
    /// What the next ones say.
    unknown_tokens: AtomicBool,
}

impl Fake {
    fn publish(&self, keys: Vec<Value>) {
        *self.published.lock().unwrap() = keys;
    }

    fn times_reviewed(&self) -> usize {
        self.reviews.lock().unwrap().len()
    }

    fn times_asked(&self) -> u32 {
        *self.asked_for_keys.lock().unwrap()
    }
}

/// An agent of that API server.
async fn agent(fake: &Arc<Fake>, server: &mut JoinSet<()>) -> TokenAdmission {
    agent_at(serve(fake, server).await, Keep::default())
}

fn agent_at(server: SocketAddr, keep: Keep) -> TokenAdmission {
    let client = Client::try_from(kube::Config::new(format!("http://{server}").parse().unwrap())).unwrap();
    let own = Own {
        node: "node-1".parse().unwrap(),
        k8s_namespace: "lighterman".to_owned(),
        pod_name: "agent-x".to_owned(),
        pod_uid: Some("p-1".to_owned()),
        service_account: "agent".to_owned(),
    };
    TokenAdmission::new(&KubeCluster::new(client, own, Duration::ZERO), peer(), keep, Metrics::new())
}

async fn serve(fake: &Arc<Fake>, server: &mut JoinSet<()>) -> SocketAddr {
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
    let review = async |State(fake): State<Arc<Fake>>, body: String| {
        let mut review: Value = serde_json::from_str(&body).unwrap();
        fake.reviews.lock().unwrap().push(review["spec"].clone());
        let passed = !fake.unknown_tokens.load(Ordering::Relaxed);
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

/// A good token of this moment.
fn credential() -> Credential {
    ends_in(3600)
}

/// A good token that ends, or has ended, so many seconds from now.
fn ends_in(seconds: i64) -> Credential {
    let expires = now().as_secs().strict_add_signed(seconds);
    let mut claims = good();
    for (claim, time) in [("iat", expires - 3600), ("nbf", expires - 3600), ("exp", expires)] {
        claims[claim] = time.into();
    }
    Credential::new(sign(&claims))
}

fn denied<T: std::fmt::Debug>(decided: Result<T, Refusal>) -> String {
    match decided {
        Err(Refusal::Denied(text)) => text,
        other => panic!("{other:?}"),
    }
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
        assert_eq!(agent.admit(peer(), &credential()).await.unwrap().node.unwrap().as_str(), "node-1");
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
    let renewed = agent.renewed();
    assert_eq!(agent.obtain().await.unwrap(), Duration::from_secs(600), "what was granted, not what was asked for");
    let spec = fake.token_requests.lock().unwrap()[0]["spec"].take();
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "name": "agent-x", "uid": "p-1" });
    assert_eq!(spec, json!({ "audiences": [peer().to_string()], "boundObjectRef": pod, "expirationSeconds": 3600 }));
    assert_eq!(agent.credential().await.unwrap().expose(), "a.b.c");
    assert!(renewed.has_changed().unwrap());
    wait(Duration::from_secs(600)).await;
    assert!(matches!(agent.credential().await, Err(Refusal::CannotTell(text)) if text.contains("expired")));
}

#[tokio::test]
async fn the_api_server_is_asked_once_about_a_pods_token_and_its_no_counts() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let agent = agent(&fake, &mut server).await;
    assert_eq!(agent.vouch(peer(), &credential()), Err(Refusal::CannotTell("no keys are known yet".into())));
    for _ in 0..3 {
        agent.admit(peer(), &credential()).await.unwrap();
    }
    assert_eq!(fake.times_reviewed(), 1);
    let spec = fake.reviews.lock().unwrap()[0].clone();
    assert_eq!(spec["audiences"], json!([peer().to_string()]));

    // Another pod, so it is asked again.
    fake.unknown_tokens.store(true, Ordering::Relaxed);
    let mut claims = good();
    claims["kubernetes.io"]["pod"]["uid"] = "p-2".into();
    claims["exp"] = (now().as_secs() + 3599).into();
    claims["iat"] = now().as_secs().into();
    claims["nbf"] = now().as_secs().into();
    let stolen = Credential::new(sign(&claims));
    agent.vouch(peer(), &stolen).unwrap();
    for _ in 0..3 {
        assert!(denied(agent.admit(peer(), &stolen).await).contains("the API server"));
    }
    assert!(denied(agent.vouch(peer(), &stolen)).contains("the API server"), "nor by way of another member");
    assert_eq!(fake.times_reviewed(), 2);
    let spent = (0..100).filter(|_| agent.budget.take(1)).count();
    wait(Duration::from_secs(61)).await;
    while agent.budget.take(1) {}
    assert!(denied(agent.admit(peer(), &stolen).await).contains("the API server"), "a no outlasts the budget: {spent}");
}

#[tokio::test]
async fn without_an_answer_or_over_the_budget_the_signature_decides() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let agent = agent(&fake, &mut server).await;
    while agent.budget.take(1) {}
    agent.admit(peer(), &credential()).await.unwrap();
    assert_eq!(fake.times_reviewed(), 0);
    wait(Duration::from_secs(20)).await;
    server.shutdown().await;
    agent.admit(peer(), &credential()).await.unwrap();
    assert_eq!(agent.server.reach(), Reach::Away);
    wait(Duration::from_secs(10)).await;
    agent.keys.wanted().now_or_never().expect("whether it is back is looked for");
}

const GRACE: Duration = Duration::from_secs(24 * 3600);

fn keep_in(folder: &tempfile::TempDir) -> Keep {
    Keep { file: Some(folder.path().join("admission.json")), grace: GRACE }
}

#[tokio::test]
async fn an_expired_token_of_a_known_peer_counts_only_while_the_api_server_is_away() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let (folder, address) = (tempfile::tempdir().unwrap(), serve(&fake, &mut server).await);
    let [knows, knows_not] = [(); 2].map(|()| agent_at(address, keep_in(&folder)));
    let expired = ends_in(-3600);
    // It was good while this agent saw it.
    knows.admit(peer(), &ends_in(1)).await.unwrap();
    knows_not.keys.refetch().await.unwrap();
    assert!(denied(knows.admit(peer(), &expired).await).contains("expired"), "the API server answers");
    wait(Duration::from_secs(11)).await;
    assert!(matches!(knows.vouch(peer(), &expired), Err(Refusal::CannotTell(_))), "whether it does is not known");

    server.shutdown().await;
    let admitted = knows.admit(peer(), &expired).await.unwrap();
    assert!(admitted.on_grace && admitted.until <= now() + GRACE_STEP);
    assert!(knows.vouch(peer(), &expired).unwrap().on_grace);
    let too_old = ends_in(-24 * 3600 - 1);
    assert!(denied(knows.admit(peer(), &too_old).await).contains("expired"));
    assert!(denied(knows_not.admit(peer(), &expired).await).contains("expired"), "one that never saw it");
    let other = PeerId::from_public_key([8; 32]);
    assert!(denied(knows.admit(other, &expired).await).contains("another peer"));
}

#[tokio::test]
async fn an_agent_restarted_while_the_api_server_is_away_knows_its_peers_and_has_its_token() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let (folder, address) = (tempfile::tempdir().unwrap(), serve(&fake, &mut server).await);
    let before = agent_at(address, keep_in(&folder));
    before.admit(peer(), &ends_in(1)).await.unwrap();
    before.obtain().await.unwrap();
    before.save().await;
    server.shutdown().await;

    let after = agent_at(address, keep_in(&folder));
    assert_eq!(after.credential().await.unwrap().expose(), "a.b.c");
    wait(Duration::from_secs(600)).await;
    assert!(matches!(after.credential().await, Err(Refusal::CannotTell(_))), "it has ended");
    after.admit(peer(), &credential()).await.unwrap();
    after.obtain().await.unwrap_err();
    assert_eq!(after.credential().await.unwrap().expose(), "a.b.c", "on grace");
    assert!(after.vouch(peer(), &ends_in(-3600)).unwrap().on_grace);
    wait(GRACE).await;
    assert!(matches!(after.credential().await, Err(Refusal::CannotTell(_))), "grace is over");
}

#[tokio::test]
async fn an_agent_that_is_killed_when_it_has_just_got_its_token_has_it_again() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let (folder, address) = (tempfile::tempdir().unwrap(), serve(&fake, &mut server).await);
    let killed = agent_at(address, keep_in(&folder));
    let running = server.spawn(async move { killed.run(CancellationToken::new()).await });
    let again = async {
        loop {
            let again = agent_at(address, keep_in(&folder));
            if again.credential().await.is_ok() && again.vouch(peer(), &credential()).is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SAVE / 2, again).await.expect("both are kept at once");
    running.abort();
}

#[tokio::test]
async fn a_token_that_could_not_be_kept_is_kept_as_soon_as_it_can_be() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    fake.publish(vec![json!(published())]);
    let (folder, address) = (tempfile::tempdir().unwrap(), serve(&fake, &mut server).await);
    let missing = folder.path().join("missing");
    let keep = Keep { file: Some(missing.join("admission.json")), grace: GRACE };
    let agent = Arc::new(agent_at(address, keep.clone()));
    let running = agent.clone();
    server.spawn(async move { running.run(CancellationToken::new()).await });
    while agent.credential().await.is_err() || fake.times_asked() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Long enough for it to try.
    tokio::time::sleep(Duration::from_millis(200)).await;
    std::fs::create_dir(&missing).unwrap();
    let mut waited = Duration::ZERO;
    while agent_at(address, keep.clone()).credential().await.is_err() {
        assert!(waited < 3 * SAVE, "it was not tried again");
        wait(SAVE / 10).await;
        waited += SAVE / 10;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_key_that_nobody_knows_yet_is_asked_for_behind_the_event_loops_back() {
    let (fake, mut server) = (Arc::new(Fake::default()), JoinSet::new());
    let mut old = json!(published());
    old["kid"] = "k0".into();
    fake.publish(vec![old]);
    let agent = Arc::new(agent(&fake, &mut server).await);
    let running = agent.clone();
    server.spawn(async move { running.run(CancellationToken::new()).await });
    // As if it had been rotated.
    while fake.times_asked() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fake.publish(vec![json!(published())]);
    while let Err(refusal) = agent.vouch(peer(), &credential()) {
        assert!(matches!(refusal, Refusal::CannotTell(_)), "{refusal}");
        wait(Duration::from_secs(1)).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(fake.times_asked(), 2);
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
