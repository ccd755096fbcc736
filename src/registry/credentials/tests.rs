use proptest::prelude::*;
use serde_json::json;

use super::*;

fn repository(registry: &str, path: &str) -> Repository {
    Repository { registry: registry.into(), path: path.into() }
}

fn secret(auths: serde_json::Value) -> PullSecret {
    PullSecret(json!({ "auths": auths }).to_string().into_bytes())
}

fn password(user: &str, password: &str) -> RegistryCredential {
    RegistryCredential::Password { user: user.into(), password: password.into() }
}

impl std::fmt::Debug for RegistryCredential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Password { user, password } => write!(f, "{user}:{password}"),
            Self::IdentityToken(token) => write!(f, "token {token}"),
        }
    }
}

/// Whether a secret with this key has a credential for the repository.
fn is_credential_for(key: &str, registry: &str, path: &str) -> bool {
    let secret = secret(json!({ key: { "username": "u", "password": "p" } }));
    !for_repository(&[secret], &repository(registry, path)).is_empty()
}

#[test]
fn a_key_matches_its_host_its_port_and_the_repositories_below_its_path() {
    for (key, registry, path) in [
        ("reg.test", "reg.test", "app"),
        ("https://reg.test", "reg.test", "app"),
        ("http://reg.test/v1/", "reg.test", "a/b"),
        ("reg.test/v2/", "reg.test", "a/b"),
        ("REG.test", "reg.TEST", "app"),
        ("reg.test:5000", "reg.test:5000", "app"),
        ("[::1]:5000", "[::1]:5000", "app"),
        ("[::1]", "[::1]", "app"),
        ("reg.test/team", "reg.test", "team/app"),
        ("reg.test/team/", "reg.test", "team"),
        ("https://reg.test/v2/team", "reg.test", "team/app"),
        ("https://index.docker.io/v1/", "docker.io", "library/nginx"),
        ("docker.io", "docker.io", "me/app"),
        ("registry-1.docker.io", "docker.io", "me/app"),
        ("*.test", "reg.test", "app"),
        ("r*g.test", "reg.test", "app"),
        ("a*c*e.test", "abcde.test", "app"),
        ("*.dkr.*.aws.test", "1.dkr.eu.aws.test", "app"),
    ] {
        assert!(is_credential_for(key, registry, path), "{key} is for {registry}/{path}");
    }
    for (key, registry, path) in [
        ("reg.test", "reg.test:5000", "app"),
        ("reg.test:5000", "reg.test", "app"),
        ("reg.test:5000", "reg.test:5001", "app"),
        ("reg.test", "evil-reg.test", "app"),
        ("reg.test", "reg.test.evil", "app"),
        ("reg.test", "sub.reg.test", "app"),
        ("*.test", "a.reg.test", "app"),
        ("*.test", "test", "app"),
        ("*", "reg.test", "app"),
        ("ab*ba.test", "aba.test", "app"),
        ("r*x*g.test", "reg.test", "app"),
        ("reg.test/team", "reg.test", "team-b/app"),
        ("reg.test/team/app", "reg.test", "team"),
        ("docker.io", "evil-docker.io", "app"),
        ("docker.io:5000", "docker.io", "app"),
        ("reg.test@evil.test", "reg.test", "app"),
        ("", "reg.test", "app"),
        ("https://", "reg.test", "app"),
    ] {
        assert!(!is_credential_for(key, registry, path), "{key} is not for {registry}/{path}");
    }
}

#[test]
fn every_form_of_a_credential_is_read() {
    let of = |entry: serde_json::Value| {
        for_repository(&[secret(json!({ "reg.test": entry }))], &repository("reg.test", "app")).pop()
    };
    // The encodings were made with base64(1).
    for auth in ["dXNlcjpwYTpzcw==", "dXNlcjpwYTpzcw", "dXNlcjpwYTpzcw==\n", "dXNlcjpwYTpzcwo="] {
        assert_eq!(of(json!({ "auth": auth })), Some(password("user", "pa:ss")), "{auth:?}");
    }
    assert_eq!(of(json!({ "username": "user", "password": "p" })), Some(password("user", "p")));
    let both = json!({ "auth": "dXNlcjpwYTpzcw==", "username": "user", "password": "other", "email": "x" });
    assert_eq!(of(both), Some(password("user", "pa:ss")));
    let token = json!({ "auth": "PHRva2VuPjo=", "identitytoken": "t" });
    assert_eq!(of(token), Some(RegistryCredential::IdentityToken("t".into())));
    for nothing in [
        json!({}),
        json!({ "auth": "" }),
        json!({ "auth": "bm8gY29sb24=" }),
        json!({ "auth": "!" }),
        json!({ "auth": 7 }),
        json!({ "username": "user" }),
        json!(null),
    ] {
        assert_eq!(of(nothing.clone()), None, "{nothing}");
    }
}

#[test]
fn credentials_are_ordered_by_secret_and_then_by_the_longest_path() {
    let entry = |user: &str| json!({ "username": user, "password": "p" });
    let first = secret(json!({
        "*.test": entry("glob"), "reg.test": entry("host"), "reg.test/team": entry("team"),
        "reg.test/team/app": entry("app"), "reg.test/broken": { "auth": "!" }, "other.test": entry("other"),
    }));
    let second = secret(json!({ "reg.test": entry("second"), "https://reg.test": entry("host") }));
    let found = for_repository(&[first, second], &repository("reg.test", "team/app"));
    let users = ["app", "team", "host", "glob", "second"].map(|user| password(user, "p"));
    assert_eq!(found, users);
}

#[test]
fn an_invalid_secret_has_no_credentials_and_their_number_is_bounded() {
    let app_repository = repository("reg.test", "app");
    for text in ["", "[]", "{}", r#"{"auths":[]}"#, r#"{"auths":null}"#, "<html>"] {
        assert_eq!(for_repository(&[PullSecret(text.into())], &app_repository), [], "{text}");
    }
    let one = |user: usize| secret(json!({ "reg.test": { "username": user.to_string(), "password": "p" } }));
    let many: Vec<_> = (0..100).map(one).collect();
    assert_eq!(for_repository(&many, &app_repository).len(), MAX_CREDENTIALS);
    let padded = [one(1).0, vec![b' '; MAX_SECRET]].concat();
    assert_eq!(for_repository(&[PullSecret(padded)], &app_repository), []);
}

#[test]
fn a_header_with_a_password_is_marked_as_a_secret() {
    let header = password("user", "pa:ss").basic_header().unwrap();
    assert_eq!(header, "Basic dXNlcjpwYTpzcw==");
    assert_eq!(format!("{header:?}"), "Sensitive");
}

proptest! {
    #[test]
    fn every_spelling_of_a_key_matches_the_same_host(
        host in "[a-z]{1,8}(\\.[a-z]{1,8}){1,3}", port in proptest::option::of(1_u16..), other in "[a-z]{1,8}(\\.[a-z]{1,8}){1,3}",
        path in "[a-z]{3,8}(/[a-z]{1,8}){0,3}", scheme in "(https?://)?", end in "(/|/v1/|/v2/|/v2)?",
    ) {
        let registry = match port { Some(port) => format!("{host}:{port}"), None => host.clone() };
        let other_registry = registry.replacen(&host, &other, 1);
        for key in [format!("{scheme}{registry}{end}"), format!("{scheme}{registry}/{path}")] {
            prop_assert!(is_credential_for(&key, &registry, &path), "{}", key);
            prop_assert_eq!(is_credential_for(&key, &other_registry, &path), host == other, "{} for {}", key, other_registry);
        }
    }

    #[test]
    fn a_star_matches_a_part_of_one_label(
        begin in "[ab]{0,3}", star in "[abc]{0,4}", end in "[ab]{0,3}", rest in "[a-z]{1,5}",
    ) {
        let key = format!("{begin}*{end}.{rest}");
        let fitting = format!("{begin}{star}{end}.{rest}");
        prop_assert!(is_host_match(&key, &fitting));
        let (longer, other_end) = (format!("x.{fitting}"), format!("{fitting}x"));
        prop_assert!(!is_host_match(&key, &longer));
        prop_assert!(!is_host_match(&key, &other_end));
    }

    #[test]
    fn an_encoded_password_is_decoded(user in "[^:\\x00]{1,20}", word in "[a-zA-Z0-9:= -~]{0,20}") {
        let auth = STANDARD.encode(format!("{user}:{word}"));
        prop_assert_eq!(decode_auth(&auth), Some(password(&user, &word)));
    }

    #[test]
    fn any_secret_is_read_without_a_panic(text in "\\PC{0,100}", key in "\\PC{0,40}") {
        let app_repository = repository("reg.test", "app");
        for_repository(&[PullSecret(text.clone().into_bytes())], &app_repository);
        for_repository(&[secret(json!({ key: { "auth": text } }))], &app_repository);
    }
}
