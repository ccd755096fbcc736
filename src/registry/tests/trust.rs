//! Who is told a secret, and who is believed.

use super::*;

/// What a server wants to see; without it, 401 with this challenge.
fn wants(authorization: String, challenge: String) -> impl Fn(&Seen) -> Reply {
    move |seen| match seen.header("authorization") == Some(&authorization) {
        true => named(),
        false => reply(401, &[("WWW-Authenticate", &challenge)], b""),
    }
}

fn bearer(realm: &str) -> String {
    format!("Bearer realm=\"{realm}\",service=\"reg\"")
}

fn token_for(user: &'static str) -> impl Fn(&Seen) -> Reply {
    move |seen| match seen.header("authorization") == Some(&basic(user)) {
        true => reply(200, &[], br#"{"token":"t"}"#),
        false => reply(401, &[], b""),
    }
}

/// What a server was told about who asks, request by request.
fn told(server: &Server) -> Vec<Option<String>> {
    server.seen().iter().map(|seen| seen.header("authorization").map(str::to_owned)).collect()
}

#[tokio::test]
async fn passwords_are_tried_in_order_until_one_is_right() {
    let server = Server::start(wants(basic("b"), "Basic realm=\"x\"".into())).await;
    let secrets = ["a", "b", "c"].map(|user| secret(&server.name(), user));
    assert_eq!(resolve(&client(), &server, &secrets).await, Ok(digest()));
    assert_eq!(told(&server), [None, Some(basic("a")), Some(basic("b"))]);
    let wrong = resolve(&client(), &server, &secrets[..1]).await;
    assert_eq!(wrong, Err(RegistryError::Denied(server.name())));
}

#[tokio::test]
async fn a_token_is_fetched_with_the_password_and_the_registry_sees_the_token_only() {
    let tokens = Server::start(token_for("b")).await;
    let server = Server::start(wants("Bearer t".into(), bearer(&format!("http://{}/token?x=y", tokens.name())))).await;
    let secrets = ["a", "b"].map(|user| secret(&server.name(), user));
    assert_eq!(resolve(&client(), &server, &secrets).await, Ok(digest()));
    assert_eq!(told(&server), [None, Some("Bearer t".into())]);
    assert_eq!(told(&tokens), [Some(basic("a")), Some(basic("b"))]);
    assert_eq!(tokens.asked()[0], "GET /token?x=y&scope=repository%3Ateam%2Fapp%3Apull&service=reg");
}

#[tokio::test]
async fn nobody_gets_a_token_too_where_that_is_allowed() {
    let tokens = Server::start(|seen| match seen.header("authorization") {
        None => reply(200, &[], br#"{"access_token":"t"}"#),
        Some(_) => reply(401, &[], b""),
    });
    let tokens = tokens.await;
    let server = Server::start(wants("Bearer t".into(), bearer(&format!("http://{}/", tokens.name())))).await;
    assert_eq!(resolve(&client(), &server, &[secret(&server.name(), "wrong")]).await, Ok(digest()));
    assert_eq!(told(&tokens), [Some(basic("wrong")), None]);
}

#[tokio::test]
async fn an_identity_token_is_sent_in_a_form() {
    let tokens = Server::start(|_| reply(200, &[], br#"{"access_token":"t"}"#)).await;
    let server = Server::start(wants("Bearer t".into(), bearer(&format!("http://{}/", tokens.name())))).await;
    let secret = json!({ "auths": { server.name(): { "identitytoken": "i&d" } } }).to_string();
    assert_eq!(resolve(&client(), &server, &[PullSecret(secret.into())]).await, Ok(digest()));
    let seen = tokens.seen().remove(0);
    assert_eq!(seen.asked, "POST /");
    let form: Vec<_> = url::form_urlencoded::parse(&seen.body).into_owned().collect();
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
async fn what_the_first_was_told_who_was_let_in_is_the_answer() {
    let server = Server::start(|seen| match seen.header("authorization") {
        Some(authorization) if authorization == basic("b") => reply(404, &[], b""),
        _ => reply(401, &[("WWW-Authenticate", "Basic")], b""),
    });
    let server = server.await;
    let secrets = ["a", "b", "c"].map(|user| secret(&server.name(), user));
    assert_eq!(resolve(&client(), &server, &secrets).await, Err(RegistryError::NotFound(server.name())));
    assert_eq!(told(&server).len(), 4, "the others were tried all the same");
}

#[tokio::test]
async fn a_token_server_that_fails_is_told_apart() {
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
        let tokens = Server::start(move |_| reply(status, &[("Location", "/elsewhere")], &body)).await;
        let server = Server::start(wants("Bearer t".into(), bearer(&format!("http://{}/", tokens.name())))).await;
        let registry = server.name();
        let answer = resolve(&client(), &server, &[]).await;
        match expected {
            Some(reason) => assert!(nonsense(answer).contains(reason), "{what}"),
            None if status == 500 => assert_eq!(answer, down(&server, OutageKind::ServerError)),
            None if status == 429 => assert_eq!(answer, Err(RegistryError::RateLimited(registry))),
            None => assert_eq!(answer, Err(RegistryError::Denied(registry)), "{what}"),
        }
        assert_eq!(tokens.asked().len(), 1, "{what}");
    }
}

#[tokio::test]
async fn a_token_server_that_says_nothing_is_given_up() {
    let tokens = Server::start(|_| Reply::Silence).await;
    let server = Server::start(wants("Bearer t".into(), bearer(&format!("http://{}/", tokens.name())))).await;
    assert_eq!(resolve(&impatient(), &server, &[]).await, down(&server, OutageKind::TimedOut));
}

#[tokio::test]
async fn a_secret_for_another_registry_stays_where_it_is() {
    let tokens = Server::start(|_| reply(401, &[], b"")).await;
    let server = Server::start(wants("Bearer t".into(), bearer(&format!("http://{}/", tokens.name())))).await;
    let port = server.name().rsplit_once(':').unwrap().1.to_owned();
    let keys = ["127.0.0.1".to_owned(), tokens.name(), format!("127.0.0.2:{port}"), format!("{}/other", server.name())];
    let secrets: Vec<_> = keys.iter().map(|key| secret(key, "user")).collect();
    assert_eq!(resolve(&client(), &server, &secrets).await, Err(RegistryError::Denied(server.name())));
    assert_eq!((told(&server), told(&tokens)), (vec![None], vec![None]));
}

#[tokio::test]
async fn no_secret_follows_a_redirect() {
    let elsewhere = Server::start(|_| named()).await;
    let location = format!("http://{}/blob", elsewhere.name());
    let server = Server::start(move |seen| match seen.header("authorization") {
        Some(_) => reply(307, &[("Location", &location)], b""),
        None => reply(401, &[("WWW-Authenticate", "Basic")], b""),
    });
    let server = server.await;
    let secrets = [secret(&server.name(), "user"), secret(&elsewhere.name(), "user")];
    assert_eq!(resolve(&client(), &server, &secrets).await, Ok(digest()));
    assert_eq!(elsewhere.asked(), ["HEAD /blob"]);
    assert_eq!(told(&elsewhere), [None]);
}

#[tokio::test]
async fn only_the_registry_itself_may_ask_who_we_are() {
    let tokens = Server::start(|_| reply(200, &[], br#"{"token":"t"}"#)).await;
    let elsewhere = Server::start(wants("Bearer t".into(), bearer(&format!("http://{}/", tokens.name())))).await;
    let location = format!("http://{}/blob", elsewhere.name());
    let server = Server::start(move |_| reply(307, &[("Location", &location)], b"")).await;
    let secrets = [secret(&server.name(), "user"), secret(&elsewhere.name(), "user")];
    assert_eq!(resolve(&client(), &server, &secrets).await, Err(RegistryError::Denied(server.name())));
    assert_eq!((told(&elsewhere), told(&tokens)), (vec![None], vec![]));
}

#[tokio::test]
async fn a_certificate_of_unknown_origin_is_an_answer_and_not_believed() {
    let (server, _) = Server::start_tls(|_| named()).await;
    let client = strict(&[], &[]);
    assert_eq!(client.ping(&server.name()).await, Ok(()));
    assert_eq!(resolve(&client, &server, &[]).await, down(&server, OutageKind::Tls));
    assert_eq!(server.asked(), ["GET /v2/"]);
    let known_clients_only = Server::start_for_known_clients().await;
    assert_eq!(client.ping(&known_clients_only.name()).await, Ok(()));
}

#[tokio::test]
async fn a_certificate_of_our_own_authority_is_believed() {
    let (tokens, tokens_certificate) = Server::start_tls(token_for("user")).await;
    let challenge = bearer(&format!("https://{}/", tokens.name()));
    let (server, certificate) = Server::start_tls(wants("Bearer t".into(), challenge)).await;
    let secrets = [secret(&server.name(), "user")];
    let both = strict(&[&certificate, &tokens_certificate], &[]);
    assert_eq!(resolve(&both, &server, &secrets).await, Ok(digest()));
    assert_eq!(told(&tokens), [Some(basic("user"))]);
    // The registry alone, also as one that is insecure: its token server still has to prove itself.
    for client in [strict(&[&certificate], &[]), strict(&[], &[&server.name()])] {
        assert_eq!(resolve(&client, &server, &secrets).await, down(&server, OutageKind::Tls));
    }
    assert_eq!(told(&tokens).len(), 1);
}

#[tokio::test]
async fn a_registry_with_tls_sends_nobody_where_there_is_none() {
    let plain = Server::start(|_| reply(200, &[], br#"{"token":"t"}"#)).await;
    let realm = format!("http://{}/", plain.name());
    let (server, certificate) = Server::start_tls(wants("Bearer t".into(), bearer(&realm))).await;
    let secrets = [secret(&server.name(), "user"), secret(&plain.name(), "user")];
    let reason = nonsense(resolve(&strict(&[&certificate], &[]), &server, &secrets).await);
    assert_eq!(reason, "a token server without TLS");
    let (server, certificate) = Server::start_tls(move |_| reply(307, &[("Location", &realm)], b"")).await;
    let reason = nonsense(resolve(&strict(&[&certificate], &[]), &server, &secrets).await);
    assert_eq!(reason, "a redirect without TLS");
    assert_eq!(plain.asked().len(), 0);
}

#[tokio::test]
async fn plain_http_is_for_registries_that_are_called_insecure() {
    let server = Server::start(|_| named()).await;
    let name = server.name();
    assert_eq!(strict(&[], &[]).ping(&name).await, down(&server, OutageKind::Tls));
    assert_eq!(resolve(&strict(&[], &["reg.test"]), &server, &[]).await, down(&server, OutageKind::Tls));
    assert_eq!(server.asked().len(), 0);
    let told_so = strict(&[], &["reg.test", &name]);
    assert_eq!(told_so.ping(&name).await, Ok(()));
    assert_eq!(resolve(&told_so, &server, &[]).await, Ok(digest()));
}

#[tokio::test]
async fn an_insecure_registry_with_tls_is_spoken_to_with_tls() {
    let (server, _) = Server::start_tls(|_| named()).await;
    assert_eq!(resolve(&client(), &server, &[]).await, Ok(digest()), "on loopback");
    assert_eq!(resolve(&strict(&[], &[&server.name()]), &server, &[]).await, Ok(digest()), "by configuration");
}

#[test]
fn an_insecure_registry_is_a_host() {
    for name in ["http://reg.test", "reg.test/app", "*", ""] {
        let config = Config { insecure: vec![name.to_owned()], ..Config::default() };
        assert!(matches!(RegistryClient::new(config), Err(ConfigError::NotARegistry(_))), "{name}");
    }
}
