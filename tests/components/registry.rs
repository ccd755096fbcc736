//! The registry adapter against a real registry (distribution): open, with passwords, and with a
//! token server.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::extract::RawQuery;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::get;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::Method;
use lighterman::http::{Certificates, Client, Request};
use lighterman::model::OutageKind;
use lighterman::oci::{Digest, Repository};
use lighterman::ports::{BlobSink, PullSecret, Registry, RegistryError, RegistryFetchError, StoreError};
use lighterman::registry::{Config, RegistryClient};
use serde_json::json;
use tempfile::TempDir;
use url::Url;

use crate::containerd::daemon::testbed;

/// Deadline of each wait in a test. Long, so that a slow machine fails no test.
const WAIT_DEADLINE: Duration = Duration::from_secs(60);

/// User `user` with the password `pass:word`: a bcrypt hash, made with crypt(3).
const HTPASSWD: &str = "user:$2b$04$abcdefghijklmnopqrstuu7govE5p0NSk1WUEk5C2Qm3hpPC6VJ66\n";

/// A registry's folder: content, configuration, log and certificates.
pub(crate) struct RegistryFolder(TempDir);

/// Drop kills the process, also when a test panics.
pub(crate) struct RegistryProcess {
    pub(crate) name: String,
    process: Child,
}

impl RegistryFolder {
    pub(crate) fn empty() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Makes a folder that holds one image, `team/app:v1`.
    async fn with_image() -> (Self, Digest) {
        let folder = Self::empty();
        let digest = push(&folder.serve("")).await;
        (folder, digest)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// Starts a registry with further settings. Settings of `http` come first, and indented.
    pub(crate) fn serve(&self, settings: &str) -> RegistryProcess {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let root = self.path("content");
        let configuration = format!(
            "version: 0.1\nlog: {{ accesslog: {{ disabled: true }} }}\nstorage: {{ filesystem: {{ rootdirectory: {root} }} }}\n\
             http:\n  addr: {address}\n{settings}"
        );
        std::fs::write(self.path("config.yml"), configuration).unwrap();
        let log = std::fs::File::create(self.path("log")).unwrap();
        let process = Command::new(testbed().join("bin/docker-registry"))
            .arg("serve")
            .env("OTEL_TRACES_EXPORTER", "none")
            .arg(self.path("config.yml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry starts; `make testbed` installs the program");
        let registry = RegistryProcess { name: address.to_string(), process };
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            let log = || std::fs::read_to_string(self.path("log")).unwrap_or_default();
            assert!(begun.elapsed() < WAIT_DEADLINE, "the registry listens within the deadline; its log:\n{}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }
}

impl Drop for RegistryProcess {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl RegistryProcess {
    fn app(&self) -> Repository {
        Repository { registry: self.name.clone(), path: "team/app".into() }
    }

    fn secret(&self, password: &str) -> PullSecret {
        let auth = STANDARD.encode(format!("user:{password}"));
        PullSecret(json!({ "auths": { format!("http://{}/v1/", self.name): { "auth": auth } } }).to_string().into())
    }

    fn denied(&self) -> Result<Digest, RegistryError> {
        Err(RegistryError::Denied(self.name.clone()))
    }
}

fn client() -> RegistryClient {
    RegistryClient::new(Config { ping_limit: WAIT_DEADLINE, resolve_limit: WAIT_DEADLINE, ..Config::default() })
        .unwrap()
}

async fn send(method: Method, url: &Url, kind: &str, body: Bytes) -> lighterman::http::HttpResponse {
    let mut request = Request::new(method, url, Certificates::Any);
    request.headers.insert("content-type", kind.parse().unwrap());
    request.body = body;
    Client::new(None).unwrap().send(request).await.unwrap()
}

/// Pushes a blob to the repository `team/app`.
pub(crate) async fn push_blob(registry: &RegistryProcess, bytes: Bytes) {
    let base = Url::parse(&format!("http://{}/v2/team/app/", registry.name)).unwrap();
    let begun = send(Method::POST, &base.join("blobs/uploads/").unwrap(), "text/plain", Bytes::new()).await;
    let mut upload = base.join(begun.headers["location"].to_str().unwrap()).unwrap();
    upload.query_pairs_mut().append_pair("digest", &Digest::of(&bytes).to_string());
    let uploaded = send(Method::PUT, &upload, "application/octet-stream", bytes).await;
    assert_eq!(uploaded.status, StatusCode::CREATED);
}

/// Pushes a manifest to the repository `team/app`, which has the manifest's blobs already.
pub(crate) async fn push_manifest(registry: &RegistryProcess, tag: &str, kind: &str, bytes: Bytes) {
    let url = Url::parse(&format!("http://{}/v2/team/app/manifests/{tag}", registry.name)).unwrap();
    assert_eq!(send(Method::PUT, &url, kind, bytes).await.status, StatusCode::CREATED);
}

/// Pushes an image without layers as `team/app:v1`.
async fn push(registry: &RegistryProcess) -> Digest {
    let config = Bytes::from_static(b"{}");
    push_blob(registry, config.clone()).await;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let config = json!({
        "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": Digest::of(&config).to_string(), "size": config.len(),
    });
    let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [] }).to_string();
    let digest = Digest::of(manifest.as_bytes());
    push_manifest(registry, "v1", kind, manifest.into()).await;
    digest
}

#[tokio::test]
async fn an_open_registry_resolves_its_tags_until_it_is_down() {
    let (folder, digest) = RegistryFolder::with_image().await;
    let registry = folder.serve("");
    let client = client();
    assert_eq!(client.ping(&registry.name).await, Ok(()));
    assert_eq!(client.resolve(&registry.app(), "v1", &[]).await, Ok(digest));
    assert_eq!(client.resolve(&registry.app(), "v1", &[registry.secret("unneeded")]).await, Ok(digest));
    let not_found = Err(RegistryError::NotFound(registry.name.clone()));
    assert_eq!(client.resolve(&registry.app(), "v2", &[]).await, not_found);
    let other = Repository { path: "team/other".into(), ..registry.app() };
    assert_eq!(client.resolve(&other, "v1", &[]).await, not_found);

    let name = registry.name.clone();
    drop(registry);
    assert_eq!(client.ping(&name).await, Err(RegistryError::Down { registry: name, kind: OutageKind::Refused }));
}

#[tokio::test]
async fn a_registry_with_passwords_and_tls_requires_the_right_password() {
    let (folder, digest) = RegistryFolder::with_image().await;
    let certified_key = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let [htpasswd, certificate, key] = ["htpasswd", "tls.crt", "tls.key"].map(|name| folder.path(name));
    std::fs::write(&htpasswd, HTPASSWD).unwrap();
    std::fs::write(&certificate, certified_key.cert.pem()).unwrap();
    std::fs::write(&key, certified_key.key_pair.serialize_pem()).unwrap();
    let settings = format!(
        "  tls: {{ certificate: {certificate}, key: {key} }}\nauth: {{ htpasswd: {{ realm: tests, path: {htpasswd} }} }}\n"
    );
    let registry = folder.serve(&settings);
    let (client, app) = (client(), registry.app());
    assert_eq!(client.ping(&registry.name).await, Ok(()), "a 401 proves that the registry answers");
    assert_eq!(client.resolve(&app, "v1", &[]).await, registry.denied());
    assert_eq!(client.resolve(&app, "v1", &[registry.secret("wrong")]).await, registry.denied());
    let secrets = [registry.secret("wrong"), registry.secret("pass:word")];
    assert_eq!(client.resolve(&app, "v1", &secrets).await, Ok(digest));
    let not_found = Err(RegistryError::NotFound(registry.name.clone()));
    assert_eq!(client.resolve(&app, "v2", &secrets).await, not_found);
}

#[tokio::test]
async fn a_registry_with_a_token_server_requires_its_token() {
    let (folder, digest) = RegistryFolder::with_image().await;
    let (realm, _serving) = token_server(Path::new(&folder.path("tokens.crt"))).await;
    let bundle = folder.path("tokens.crt");
    let settings = format!(
        "auth: {{ token: {{ realm: \"{realm}\", service: tests, issuer: tests, rootcertbundle: {bundle} }} }}\n"
    );
    let registry = folder.serve(&settings);
    let (client, app) = (client(), registry.app());
    assert_eq!(client.ping(&registry.name).await, Ok(()), "a 401 proves that the registry answers");
    assert_eq!(client.resolve(&app, "v1", &[registry.secret("pass:word")]).await, Ok(digest));
    assert_eq!(client.resolve(&app, "v1", &[registry.secret("wrong")]).await, registry.denied());
    assert_eq!(client.resolve(&app, "v1", &[]).await, registry.denied(), "a token without rights is denied");
}

/// Keeps the written bytes.
struct BufferSink(Vec<u8>);

#[async_trait::async_trait]
impl BlobSink for BufferSink {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        chunks.iter().for_each(|chunk| self.0.extend_from_slice(chunk));
        Ok(())
    }
}

/// Whether the registry serves the blob's bytes with these secrets.
async fn fetch_and_compare(
    registry: &RegistryProcess,
    blob: &Bytes,
    secrets: &[PullSecret],
) -> Result<bool, RegistryFetchError> {
    let (mut sink, size) = (BufferSink(Vec::new()), blob.len() as u64);
    client().fetch_blob(&registry.app(), Digest::of(blob), size, secrets, &mut sink).await?;
    Ok(sink.0 == *blob)
}

#[tokio::test]
async fn a_layer_is_fetched_from_an_open_registry_and_from_a_closed_registry_with_its_password() {
    let (folder, layer) = (RegistryFolder::empty(), Bytes::from(vec![7; 3 << 20]));
    let open = folder.serve("");
    push_blob(&open, layer.clone()).await;
    assert!(fetch_and_compare(&open, &layer, &[]).await.unwrap());
    let gone = fetch_and_compare(&open, &Bytes::from_static(b"never pushed"), &[]).await;
    assert!(matches!(gone, Err(RegistryFetchError::Gone(_))), "{gone:?}");
    let (app, size) = (open.app(), layer.len() as u64);
    drop(open);
    let down = client().fetch_blob(&app, Digest::of(&layer), size, &[], &mut BufferSink(Vec::new())).await;
    assert!(matches!(down, Err(RegistryFetchError::Down { kind: OutageKind::Refused, .. })), "{down:?}");

    let htpasswd = folder.path("htpasswd");
    std::fs::write(&htpasswd, HTPASSWD).unwrap();
    let closed = folder.serve(&format!("auth: {{ htpasswd: {{ realm: tests, path: {htpasswd} }} }}\n"));
    let denied = fetch_and_compare(&closed, &layer, &[closed.secret("wrong")]).await;
    assert!(matches!(denied, Err(RegistryFetchError::Denied(_))), "{denied:?}");
    assert!(fetch_and_compare(&closed, &layer, &[closed.secret("wrong"), closed.secret("pass:word")]).await.unwrap());
}

#[tokio::test]
async fn a_layer_is_fetched_from_a_registry_with_a_token_server() {
    let (folder, layer) = (RegistryFolder::empty(), Bytes::from(vec![7; 1 << 20]));
    push_blob(&folder.serve(""), layer.clone()).await;
    let bundle = folder.path("tokens.crt");
    let (realm, _serving) = token_server(Path::new(&bundle)).await;
    let settings = format!(
        "auth: {{ token: {{ realm: \"{realm}\", service: tests, issuer: tests, rootcertbundle: {bundle} }} }}\n"
    );
    let registry = folder.serve(&settings);
    assert!(fetch_and_compare(&registry, &layer, &[registry.secret("pass:word")]).await.unwrap());
    let denied = fetch_and_compare(&registry, &layer, &[]).await;
    assert!(matches!(denied, Err(RegistryFetchError::Denied(_))), "{denied:?}");
}

/// Starts a token server and writes its certificate to `bundle`. The user gets a token with the
/// right to pull, and a request without credentials gets a token without rights. Other credentials
/// get 401.
async fn token_server(bundle: &Path) -> (String, tokio::task::JoinSet<()>) {
    let certified_key = rcgen::generate_simple_self_signed(vec!["tests".to_owned()]).unwrap();
    std::fs::write(bundle, certified_key.cert.pem()).unwrap();
    let key = jsonwebtoken::EncodingKey::from_ec_pem(certified_key.key_pair.serialize_pem().as_bytes()).unwrap();
    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
    header.x5c = Some(vec![STANDARD.encode(certified_key.cert.der())]);
    let handler = async move |RawQuery(query): RawQuery, headers: HeaderMap| {
        let parameters: Vec<_> = url::form_urlencoded::parse(query.unwrap().as_bytes()).into_owned().collect();
        assert!(parameters.contains(&("service".to_owned(), "tests".to_owned())), "{parameters:?}");
        let expected = format!("Basic {}", STANDARD.encode("user:pass:word"));
        let access = match headers.get("authorization") {
            None => json!([]),
            Some(authorization) if *authorization == expected => {
                assert!(
                    parameters.contains(&("scope".to_owned(), "repository:team/app:pull".to_owned())),
                    "{parameters:?}"
                );
                json!([{ "type": "repository", "name": "team/app", "actions": ["pull"] }])
            }
            Some(_) => return (StatusCode::UNAUTHORIZED, String::new()),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let claims = json!({
            "iss": "tests", "sub": "user", "aud": "tests", "iat": now, "nbf": now - 60, "exp": now + 600, "jti": "1",
            "access": access,
        });
        let token = jsonwebtoken::encode(&header, &claims, &key).unwrap();
        (StatusCode::OK, json!({ "token": token }).to_string())
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let realm = format!("http://{}/token", listener.local_addr().unwrap());
    let mut serving = tokio::task::JoinSet::new();
    serving
        .spawn(async move { axum::serve(listener, axum::Router::new().route("/token", get(handler))).await.unwrap() });
    (realm, serving)
}
