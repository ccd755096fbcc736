//! Secrets and certificates: which servers receive a secret, and which servers are trusted.

use super::*;

/// A server that replies to this authorization, and sends 401 with the challenge otherwise.
fn requiring_authorization(authorization: String, challenge: String) -> impl Fn(&ReceivedRequest) -> Reply {
    move |request| match request.header("authorization") == Some(&authorization) {
        true => digest_reply(),
        false => reply(401, &[("WWW-Authenticate", &challenge)], b""),
    }
}

fn bearer(realm: &str) -> String {
    format!("Bearer realm=\"{realm}\",service=\"reg\"")
}

fn token_for(user: &'static str) -> impl Fn(&ReceivedRequest) -> Reply {
    move |request| match request.header("authorization") == Some(&basic(user)) {
        true => reply(200, &[], br#"{"token":"t"}"#),
        false => reply(401, &[], b""),
    }
}

/// The `Authorization` headers that a server received, in order.
fn authorizations(server: &HttpTestServer) -> Vec<Option<String>> {
    server.requests().iter().map(|request| request.header("authorization").map(str::to_owned)).collect()
}

#[tokio::test]
async fn passwords_are_tried_in_order_until_one_is_right() {
    let server = HttpTestServer::start(requiring_authorization(basic("b"), "Basic realm=\"x\"".into())).await;
    let secrets = ["a", "b", "c"].map(|user| secret(&server.host_port(), user));
    assert_eq!(resolve(&client(), &server, &secrets).await, Ok(digest()));
    assert_eq!(authorizations(&server), [None, Some(basic("a")), Some(basic("b"))]);
    let wrong = resolve(&client(), &server, &secrets[..1]).await;
    assert_eq!(wrong, Err(RegistryError::Denied(server.host_port())));
}

#[tokio::test]
async fn a_token_is_fetched_with_the_password_and_the_registry_receives_only_the_token() {
    let tokens = HttpTestServer::start(token_for("b")).await;
    let server = HttpTestServer::start(requiring_authorization(
        "Bearer t".into(),
        bearer(&format!("http://{}/token?x=y", tokens.host_port())),
    ))
    .await;
    let secrets = ["a", "b"].map(|user| secret(&server.host_port(), user));
    assert_eq!(resolve(&client(), &server, &secrets).await, Ok(digest()));
    assert_eq!(authorizations(&server), [None, Some("Bearer t".into())]);
    assert_eq!(authorizations(&tokens), [Some(basic("a")), Some(basic("b"))]);
    assert_eq!(tokens.request_lines()[0], "GET /token?x=y&scope=repository%3Ateam%2Fapp%3Apull&service=reg");
}

#[tokio::test]
async fn an_anonymous_token_is_requested_after_wrong_passwords() {
    let tokens = HttpTestServer::start(|request| match request.header("authorization") {
        None => reply(200, &[], br#"{"access_token":"t"}"#),
        Some(_) => reply(401, &[], b""),
    });
    let tokens = tokens.await;
    let server = HttpTestServer::start(requiring_authorization(
        "Bearer t".into(),
        bearer(&format!("http://{}/", tokens.host_port())),
    ))
    .await;
    assert_eq!(resolve(&client(), &server, &[secret(&server.host_port(), "wrong")]).await, Ok(digest()));
    assert_eq!(authorizations(&tokens), [Some(basic("wrong")), None]);
}

#[tokio::test]
async fn an_identity_token_is_sent_in_a_form() {
    let tokens = HttpTestServer::start(|_| reply(200, &[], br#"{"access_token":"t"}"#)).await;
    let server = HttpTestServer::start(requiring_authorization(
        "Bearer t".into(),
        bearer(&format!("http://{}/", tokens.host_port())),
    ))
    .await;
    let secret = json!({ "auths": { server.host_port(): { "identitytoken": "i&d" } } }).to_string();
    assert_eq!(resolve(&client(), &server, &[PullSecret(secret.into())]).await, Ok(digest()));
    let request = tokens.requests().remove(0);
    assert_eq!(request.request_line, "POST /");
    let form: Vec<_> = url::form_urlencoded::parse(&request.body).into_owned().collect();
    let parameter = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let expected = [
        parameter("scope", "repository:team/app:pull"),
        parameter("service", "reg"),
        parameter("grant_type", "refresh_token"),
        parameter("client_id", "lighterman"),
        parameter("refresh_token", "i&d"),
    ];
    assert_eq!(form, expected);
}

#[tokio::test]
async fn the_reply_to_the_first_accepted_credential_is_the_result() {
    let server = HttpTestServer::start(|request| match request.header("authorization") {
        Some(authorization) if authorization == basic("b") => reply(404, &[], b""),
        _ => reply(401, &[("WWW-Authenticate", "Basic")], b""),
    });
    let server = server.await;
    let secrets = ["a", "b", "c"].map(|user| secret(&server.host_port(), user));
    assert_eq!(resolve(&client(), &server, &secrets).await, Err(RegistryError::NotFound(server.host_port())));
    assert_eq!(authorizations(&server).len(), 4, "the other credentials were tried too");
}

#[tokio::test]
async fn each_failure_of_a_token_server_maps_to_its_error() {
    let large = format!(r#"{{"token":"{}"}}"#, "t".repeat(1 << 20)).into_bytes();
    for (what, status, body, expected) in [
        ("denied", 403, Vec::new(), None),
        ("wrong", 400, Vec::new(), None),
        ("broken", 500, Vec::new(), None),
        ("busy", 429, Vec::new(), None),
        ("a page", 200, b"<html>".to_vec(), Some("token")),
        ("empty", 200, b"{}".to_vec(), Some("token")),
        ("a header of its own", 200, br#"{"token":"t\r\nx: y"}"#.to_vec(), Some("token")),
        ("large", 200, large, Some("more than 65536")),
        ("elsewhere", 302, Vec::new(), Some("status 302")),
    ] {
        let tokens = HttpTestServer::start(move |_| reply(status, &[("Location", "/elsewhere")], &body)).await;
        let server = HttpTestServer::start(requiring_authorization(
            "Bearer t".into(),
            bearer(&format!("http://{}/", tokens.host_port())),
        ))
        .await;
        let registry = server.host_port();
        let answer = resolve(&client(), &server, &[]).await;
        match expected {
            Some(reason) => assert!(invalid_response_reason(answer).contains(reason), "{what}"),
            None if status == 500 => assert_eq!(answer, down(&server, OutageKind::ServerError)),
            None if status == 429 => assert_eq!(answer, Err(RegistryError::RateLimited(registry))),
            None => assert_eq!(answer, Err(RegistryError::Denied(registry)), "{what}"),
        }
        assert_eq!(tokens.request_lines().len(), 1, "{what}");
    }
}

#[tokio::test]
async fn a_silent_token_server_times_out() {
    let tokens = HttpTestServer::start(|_| Reply::Silence).await;
    let server = HttpTestServer::start(requiring_authorization(
        "Bearer t".into(),
        bearer(&format!("http://{}/", tokens.host_port())),
    ))
    .await;
    assert_eq!(resolve(&client_with_short_timeouts(), &server, &[]).await, down(&server, OutageKind::TimedOut));
}

#[tokio::test]
async fn a_secret_for_another_registry_is_not_sent() {
    let tokens = HttpTestServer::start(|_| reply(401, &[], b"")).await;
    let server = HttpTestServer::start(requiring_authorization(
        "Bearer t".into(),
        bearer(&format!("http://{}/", tokens.host_port())),
    ))
    .await;
    let port = server.host_port().rsplit_once(':').unwrap().1.to_owned();
    let keys = [
        "127.0.0.1".to_owned(),
        tokens.host_port(),
        format!("127.0.0.2:{port}"),
        format!("{}/other", server.host_port()),
    ];
    let secrets: Vec<_> = keys.iter().map(|key| secret(key, "user")).collect();
    assert_eq!(resolve(&client(), &server, &secrets).await, Err(RegistryError::Denied(server.host_port())));
    assert_eq!((authorizations(&server), authorizations(&tokens)), (vec![None], vec![None]));
}

#[tokio::test]
async fn no_secret_follows_a_redirect() {
    let elsewhere = HttpTestServer::start(|_| digest_reply()).await;
    let location = format!("http://{}/blob", elsewhere.host_port());
    let server = HttpTestServer::start(move |request| match request.header("authorization") {
        Some(_) => reply(307, &[("Location", &location)], b""),
        None => reply(401, &[("WWW-Authenticate", "Basic")], b""),
    });
    let server = server.await;
    let secrets = [secret(&server.host_port(), "user"), secret(&elsewhere.host_port(), "user")];
    assert_eq!(resolve(&client(), &server, &secrets).await, Ok(digest()));
    assert_eq!(elsewhere.request_lines(), ["HEAD /blob"]);
    assert_eq!(authorizations(&elsewhere), [None]);
}

#[tokio::test]
async fn only_the_registry_itself_may_send_a_challenge() {
    let tokens = HttpTestServer::start(|_| reply(200, &[], br#"{"token":"t"}"#)).await;
    let elsewhere = HttpTestServer::start(requiring_authorization(
        "Bearer t".into(),
        bearer(&format!("http://{}/", tokens.host_port())),
    ))
    .await;
    let location = format!("http://{}/blob", elsewhere.host_port());
    let server = HttpTestServer::start(move |_| reply(307, &[("Location", &location)], b"")).await;
    let secrets = [secret(&server.host_port(), "user"), secret(&elsewhere.host_port(), "user")];
    assert_eq!(resolve(&client(), &server, &secrets).await, Err(RegistryError::Denied(server.host_port())));
    assert_eq!((authorizations(&elsewhere), authorizations(&tokens)), (vec![None], vec![]));
}

#[tokio::test]
async fn an_untrusted_certificate_satisfies_a_ping_and_not_a_tag_request() {
    let (server, _) = HttpTestServer::start_tls(|_| digest_reply()).await;
    let client = client_trusting(&[], &[]);
    assert_eq!(client.ping(&server.host_port()).await, Ok(()));
    assert_eq!(resolve(&client, &server, &[]).await, down(&server, OutageKind::Tls));
    assert_eq!(server.request_lines(), ["GET /v2/"]);
    let known_clients_only = HttpTestServer::start_requiring_client_certificate().await;
    assert_eq!(client.ping(&known_clients_only.host_port()).await, Ok(()));
}

#[tokio::test]
async fn a_certificate_of_a_configured_authority_is_trusted() {
    let (tokens, tokens_certificate) = HttpTestServer::start_tls(token_for("user")).await;
    let challenge = bearer(&format!("https://{}/", tokens.host_port()));
    let (server, certificate) = HttpTestServer::start_tls(requiring_authorization("Bearer t".into(), challenge)).await;
    let secrets = [secret(&server.host_port(), "user")];
    let both = client_trusting(&[&certificate, &tokens_certificate], &[]);
    assert_eq!(resolve(&both, &server, &secrets).await, Ok(digest()));
    assert_eq!(authorizations(&tokens), [Some(basic("user"))]);
    // The token server's certificate is verified although the registry is trusted, or is insecure.
    for client in [client_trusting(&[&certificate], &[]), client_trusting(&[], &[&server.host_port()])] {
        assert_eq!(resolve(&client, &server, &secrets).await, down(&server, OutageKind::Tls));
    }
    assert_eq!(authorizations(&tokens).len(), 1);
}

#[tokio::test]
async fn a_registry_with_tls_may_not_refer_to_a_url_without_tls() {
    let plain = HttpTestServer::start(|_| reply(200, &[], br#"{"token":"t"}"#)).await;
    let realm = format!("http://{}/", plain.host_port());
    let (server, certificate) =
        HttpTestServer::start_tls(requiring_authorization("Bearer t".into(), bearer(&realm))).await;
    let secrets = [secret(&server.host_port(), "user"), secret(&plain.host_port(), "user")];
    let reason = invalid_response_reason(resolve(&client_trusting(&[&certificate], &[]), &server, &secrets).await);
    assert_eq!(reason, "a token server without TLS");
    let (server, certificate) = HttpTestServer::start_tls(move |_| reply(307, &[("Location", &realm)], b"")).await;
    let reason = invalid_response_reason(resolve(&client_trusting(&[&certificate], &[]), &server, &secrets).await);
    assert_eq!(reason, "a redirect without TLS");
    assert_eq!(plain.request_lines().len(), 0);
}

#[tokio::test]
async fn plain_http_is_used_only_for_registries_configured_as_insecure() {
    let server = HttpTestServer::start(|_| digest_reply()).await;
    let name = server.host_port();
    assert_eq!(client_trusting(&[], &[]).ping(&name).await, down(&server, OutageKind::Tls));
    assert_eq!(resolve(&client_trusting(&[], &["reg.test"]), &server, &[]).await, down(&server, OutageKind::Tls));
    assert_eq!(server.request_lines().len(), 0);
    let insecure_client = client_trusting(&[], &["reg.test", &name]);
    assert_eq!(insecure_client.ping(&name).await, Ok(()));
    assert_eq!(resolve(&insecure_client, &server, &[]).await, Ok(digest()));
}

#[tokio::test]
async fn an_insecure_registry_with_tls_is_contacted_over_tls() {
    let (server, _) = HttpTestServer::start_tls(|_| digest_reply()).await;
    assert_eq!(resolve(&client(), &server, &[]).await, Ok(digest()), "on loopback");
    assert_eq!(
        resolve(&client_trusting(&[], &[&server.host_port()]), &server, &[]).await,
        Ok(digest()),
        "by configuration"
    );
}

#[test]
fn the_name_of_an_insecure_registry_must_be_a_host() {
    for name in ["http://reg.test", "reg.test/app", "*", ""] {
        let config = Config { insecure: vec![name.to_owned()], ..Config::default() };
        assert!(matches!(RegistryClient::new(config), Err(ConfigError::NotARegistry(_))), "{name}");
    }
}
