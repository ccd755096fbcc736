//! One question to one registry: which digest does this tag have, or the content of a blob. Without a secret first; when the
//! registry asks who we are, as each of those that the pull secrets have for it, and last as nobody.

use bytes::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION};
use hyper::{Method, StatusCode};
use serde::Deserialize;
use url::Url;

use super::RegistryEndpoint;
use super::challenge::{self, Challenge};
use super::credentials::{self, RegistryCredential};
use crate::http::{Certificates, Client, HttpError, HttpResponse, Request};
use crate::model::OutageKind;
use crate::oci::{Digest, Document, MAX_DOCUMENT_BYTES, Repository};
use crate::ports::{PullSecret, RegistryError};

/// Indexes first: what containerd asks for, and so what a tag means to it.
const MANIFEST_MEDIA_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// registry.k8s.io redirects once, to a region; a second may change the host's spelling.
const MAX_REDIRECTS: usize = 4;

/// The most bytes of a token server's answer. Tokens go into headers, which servers bound by 8 to 32 KiB.
const MAX_TOKEN_RESPONSE: usize = 64 << 10;

/// Whom a token server is told that we are, where it asks.
const CLIENT_ID: &str = "lighterman";

/// A tag or a blob of a repository, and where to ask.
pub(super) struct RegistryRequest<'a> {
    http: &'a Client,
    endpoint: RegistryEndpoint,
    repository: &'a Repository,
    url: Url,
}

/// What the registry says.
pub(super) enum QueryReply<T> {
    Success(T),
    /// 401, and what it wants to see; `None` when that is nothing that we have.
    Unauthorized(Option<Challenge>),
}

/// Asks one question with these credentials, and reads the answer.
pub(super) trait RegistryQuery {
    type Output: Send;

    fn execute(
        question: &RegistryRequest<'_>,
        authorization: Option<&HeaderValue>,
    ) -> impl Future<Output = Result<QueryReply<Self::Output>, RegistryError>> + Send;
}

/// The digest of a tag.
struct TagQuery;

impl RegistryQuery for TagQuery {
    type Output = Digest;

    async fn execute(
        request: &RegistryRequest<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<QueryReply<Digest>, RegistryError> {
        request.fetch_digest(authorization).await
    }
}

/// What becomes of a failed request to a registry, or to the token server or redirect that stands for it.
pub(super) fn registry_error(registry: &str, failure: HttpError) -> RegistryError {
    let registry = registry.to_owned();
    match failure {
        HttpError::Unreachable { kind, .. } => RegistryError::Down { registry, kind },
        HttpError::ClientCertificateRequired => RegistryError::Denied(registry),
        HttpError::NotHttp(_) => RegistryError::InvalidResponse { registry, reason: "what is not HTTP".into() },
        HttpError::BodyTooLong(most) => {
            RegistryError::InvalidResponse { registry, reason: format!("more than {most} bytes") }
        }
    }
}

impl<'a> RegistryRequest<'a> {
    /// Both names are well-formed: they go into a URL.
    pub(super) fn for_tag(http: &'a Client, endpoint: RegistryEndpoint, repository: &'a Repository, tag: &str) -> Self {
        let mut url = endpoint.base.clone();
        url.set_path(&format!("/v2/{}/manifests/{tag}", repository.path));
        Self { http, endpoint, repository, url }
    }

    /// The repository's name is well-formed.
    pub(super) fn for_blob(
        http: &'a Client,
        endpoint: RegistryEndpoint,
        repository: &'a Repository,
        digest: Digest,
    ) -> Self {
        let mut url = endpoint.base.clone();
        url.set_path(&format!("/v2/{}/blobs/{digest}", repository.path));
        Self { http, endpoint, repository, url }
    }

    /// # Errors
    /// As [`Question::answer`].
    pub(super) async fn resolve(&self, secrets: &[PullSecret]) -> Result<Digest, RegistryError> {
        self.send_with_credentials::<TagQuery>(secrets).await
    }

    /// # Errors
    /// What the first of our identities was told that was not simply denied: a registry that lets somebody in knows best.
    pub(super) async fn send_with_credentials<A: RegistryQuery>(
        &self,
        secrets: &[PullSecret],
    ) -> Result<A::Output, RegistryError> {
        let challenge = match A::execute(self, None).await? {
            QueryReply::Success(given) => return Ok(given),
            QueryReply::Unauthorized(None) => return Err(self.denied()),
            QueryReply::Unauthorized(Some(challenge)) => challenge,
        };
        let credentials = credentials::for_repository(secrets, self.repository);
        let mut first_error = None;
        for credential in credentials.iter().map(Some).chain([None]) {
            match self.send_as::<A>(&challenge, credential).await {
                Ok(given) => return Ok(given),
                Err(RegistryError::Denied(_)) => {}
                Err(down @ RegistryError::Down { .. }) => return Err(down),
                Err(other) => drop(first_error.get_or_insert(other)),
            }
        }
        Err(first_error.unwrap_or_else(|| self.denied()))
    }

    async fn send_as<A: RegistryQuery>(
        &self,
        challenge: &Challenge,
        credential: Option<&RegistryCredential>,
    ) -> Result<A::Output, RegistryError> {
        let authorization = match challenge {
            Challenge::Basic => credential.and_then(RegistryCredential::basic_header).ok_or_else(|| self.denied())?,
            Challenge::Bearer { realm, service, scope } => {
                self.fetch_token(realm, service.as_deref(), scope.as_deref(), credential).await?
            }
        };
        match A::execute(self, Some(&authorization)).await? {
            QueryReply::Success(given) => Ok(given),
            QueryReply::Unauthorized(_) => Err(self.denied()),
        }
    }

    /// HEAD, which registries that count pulls do not count; GET where HEAD does not say.
    async fn fetch_digest(&self, authorization: Option<&HeaderValue>) -> Result<QueryReply<Digest>, RegistryError> {
        let (head, redirected) =
            self.send_following_redirects(Method::HEAD, MANIFEST_MEDIA_TYPES, authorization).await?;
        match head.status {
            StatusCode::OK => {
                if let Some(digest) = self.digest_from_headers(&head.headers)? {
                    return Ok(QueryReply::Success(digest));
                }
            }
            StatusCode::METHOD_NOT_ALLOWED => {}
            _ => return self.unsuccessful_reply(&head, redirected),
        }
        let (answer, redirected) =
            self.send_following_redirects(Method::GET, MANIFEST_MEDIA_TYPES, authorization).await?;
        if answer.status != StatusCode::OK {
            return self.unsuccessful_reply(&answer, redirected);
        }
        let named = self.digest_from_headers(&answer.headers)?;
        let content = self.read(answer, MAX_DOCUMENT_BYTES as usize).await?;
        if Document::parse(&content).is_err() {
            return Err(self.invalid_response("what is no manifest"));
        }
        let digest = Digest::of(&content);
        match named {
            Some(named) if named != digest => Err(self.invalid_response("a manifest with another's digest")),
            _ => Ok(QueryReply::Success(digest)),
        }
    }

    /// The digest that a good answer names, if it names one.
    fn digest_from_headers(&self, headers: &HeaderMap) -> Result<Option<Digest>, RegistryError> {
        if is_html_page(headers) {
            return Err(self.invalid_response("a page for people"));
        }
        let Some(value) = headers.get(CONTENT_DIGEST) else { return Ok(None) };
        let text = value.to_str().map_err(|_| self.invalid_response("a digest that is no text"))?;
        text.trim().parse().map(Some).map_err(|error| self.invalid_response(error))
    }

    /// What any status but 200 means.
    pub(super) fn unsuccessful_reply<T>(
        &self,
        answer: &HttpResponse,
        redirected: bool,
    ) -> Result<QueryReply<T>, RegistryError> {
        match answer.status.as_u16() {
            // Nobody but the registry itself may ask who we are.
            401 if !redirected => Ok(QueryReply::Unauthorized(challenge::preferred_challenge(&answer.headers))),
            // Not what a registry says to this: some other server has its name.
            404 if is_html_page(&answer.headers) => Err(self.invalid_response("a page for people")),
            404 => Err(RegistryError::NotFound(self.repository.registry.clone())),
            _ => Err(self.status_error(answer.status)),
        }
    }

    /// What a status means wherever it comes from.
    fn status_error(&self, status: StatusCode) -> RegistryError {
        let registry = self.repository.registry.clone();
        match status.as_u16() {
            401 | 403 => RegistryError::Denied(registry),
            429 => RegistryError::RateLimited(registry),
            500..=599 => RegistryError::Down { registry, kind: OutageKind::ServerError },
            other => self.invalid_response(format_args!("status {other}")),
        }
    }

    /// Asks for the manifest or blob, and where it is redirected to. The second value says whether it was: then no secret was sent there.
    pub(super) async fn send_following_redirects(
        &self,
        method: Method,
        accept: &'static str,
        mut authorization: Option<&HeaderValue>,
    ) -> Result<(HttpResponse, bool), RegistryError> {
        let mut url = self.url.clone();
        for redirects in 0..=MAX_REDIRECTS {
            let mut request = Request::new(method.clone(), &url, self.certificates(&url));
            request.headers.insert(ACCEPT, HeaderValue::from_static(accept));
            if let Some(value) = authorization.take() {
                request.headers.insert(AUTHORIZATION, value.clone());
            }
            let answer = self.send(request).await?;
            if !matches!(answer.status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((answer, redirects > 0));
            }
            let location = answer.headers.get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok());
            url = self.require_safe_url(next, "a redirect")?;
        }
        Err(self.invalid_response("redirects without end"))
    }

    /// A token for this repository, as a header. `who` may be nobody: then it allows what anybody may.
    async fn fetch_token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        credential: Option<&RegistryCredential>,
    ) -> Result<HeaderValue, RegistryError> {
        let mut url = self.require_safe_url(Url::parse(realm).ok(), "a token server")?;
        // The registry's own word for it where it has one: some know a repository by another name than we do.
        let scope = scope.map_or_else(|| format!("repository:{}:pull", self.repository.path), str::to_owned);
        let mut parameters = vec![("scope", scope.as_str())];
        parameters.extend(service.map(|service| ("service", service)));

        let mut headers = HeaderMap::new();
        let (method, body) = if let Some(RegistryCredential::IdentityToken(token)) = credential {
            parameters.extend([("grant_type", "refresh_token"), ("client_id", CLIENT_ID), ("refresh_token", token)]);
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
            (Method::POST, form_body(&parameters))
        } else {
            url.query_pairs_mut().extend_pairs(parameters);
            headers.extend(credential.and_then(RegistryCredential::basic_header).map(|basic| (AUTHORIZATION, basic)));
            (Method::GET, Bytes::new())
        };
        let certificates = self.certificates(&url);
        let answer = self.send(Request { method, url: &url, headers, body, certificates }).await?;
        match answer.status.as_u16() {
            200 => {}
            // OAuth 2's word for a wrong refresh token.
            400 => return Err(self.denied()),
            _ => return Err(self.status_error(answer.status)),
        }
        let content = self.read(answer, MAX_TOKEN_RESPONSE).await?;
        bearer_header(&content).ok_or_else(|| self.invalid_response("a token that is none"))
    }

    /// A URL that the registry names may be asked when it is as safe as the registry itself.
    fn require_safe_url(&self, url: Option<Url>, what: &str) -> Result<Url, RegistryError> {
        match url {
            Some(url) if url.scheme() == "https" => Ok(url),
            Some(url) if url.scheme() == "http" && self.endpoint.insecure => Ok(url),
            Some(url) if url.scheme() == "http" => Err(self.invalid_response(format_args!("{what} without TLS"))),
            _ => Err(self.invalid_response(format_args!("{what} that is nowhere"))),
        }
    }

    /// An insecure registry is excused, another host that it names is not.
    fn certificates(&self, url: &Url) -> Certificates {
        let same = |url: &Url, base: &Url| {
            url.host() == base.host() && url.port_or_known_default() == base.port_or_known_default()
        };
        if self.endpoint.insecure && same(url, &self.endpoint.base) {
            Certificates::Any
        } else {
            Certificates::Verified
        }
    }

    async fn send(&self, request: Request<'_>) -> Result<HttpResponse, RegistryError> {
        self.http.send(request).await.map_err(|failure| self.map_http_error(failure))
    }

    async fn read(&self, answer: HttpResponse, most: usize) -> Result<Bytes, RegistryError> {
        answer.read(most).await.map_err(|failure| self.map_http_error(failure))
    }

    /// The registry's name.
    pub(super) fn registry(&self) -> String {
        self.repository.registry.clone()
    }

    fn map_http_error(&self, failure: HttpError) -> RegistryError {
        tracing::debug!(registry = self.repository.registry, %failure, "no answer to a question");
        registry_error(&self.repository.registry, failure)
    }

    fn denied(&self) -> RegistryError {
        RegistryError::Denied(self.repository.registry.clone())
    }

    fn invalid_response(&self, reason: impl std::fmt::Display) -> RegistryError {
        RegistryError::InvalidResponse { registry: self.repository.registry.clone(), reason: reason.to_string() }
    }
}

fn is_html_page(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.trim_start().get(..9).is_some_and(|kind| kind.eq_ignore_ascii_case("text/html"))
}

fn form_body(parameters: &[(&str, &str)]) -> Bytes {
    url::form_urlencoded::Serializer::new(String::new()).extend_pairs(parameters).finish().into()
}

/// The token in a token server's answer; both names are in use.
fn bearer_header(content: &[u8]) -> Option<HeaderValue> {
    #[derive(Deserialize)]
    struct TokenResponse {
        token: Option<String>,
        access_token: Option<String>,
    }
    let TokenResponse { token, access_token } = serde_json::from_slice(content).ok()?;
    let token = [token, access_token].into_iter().flatten().find(|token| !token.is_empty())?;
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}
