//! One query to one registry: the digest of a tag, or the content of a blob. The first request has
//! no credential. After a challenge the client tries each credential of the pull secrets for this
//! registry, and last an anonymous request.

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

/// Indexes first, as containerd requests manifests, so the tag has the same digest as for
/// containerd.
const MANIFEST_MEDIA_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// registry.k8s.io redirects once, to a region; a second redirect may change the host's spelling.
const MAX_REDIRECTS: usize = 4;

/// Bytes of a token server's response at most. Tokens go into headers, which servers bound by 8 to
/// 32 KiB.
const MAX_TOKEN_RESPONSE: usize = 64 << 10;

/// The OAuth 2 client ID in requests to token servers.
const CLIENT_ID: &str = "lighterman";

/// A tag or a blob of a repository, with the registry's address.
pub(super) struct RegistryRequest<'a> {
    http: &'a Client,
    endpoint: RegistryEndpoint,
    repository: &'a Repository,
    url: Url,
}

/// The registry's reply to a query.
pub(super) enum QueryReply<T> {
    Success(T),
    /// Status 401 and the challenge; `None` when the client supports no challenge of the reply.
    Unauthorized(Option<Challenge>),
}

/// A query that is sent with one credential.
pub(super) trait RegistryQuery {
    type Output: Send;

    fn execute(
        request: &RegistryRequest<'_>,
        authorization: Option<&HeaderValue>,
    ) -> impl Future<Output = Result<QueryReply<Self::Output>, RegistryError>> + Send;
}

/// The query for the digest of a tag: HEAD, which registries do not count as a pull, and GET where
/// HEAD gives no digest.
struct TagQuery;

impl RegistryQuery for TagQuery {
    type Output = Digest;

    async fn execute(
        request: &RegistryRequest<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<QueryReply<Digest>, RegistryError> {
        let (head, redirected) =
            request.send_following_redirects(Method::HEAD, MANIFEST_MEDIA_TYPES, authorization).await?;
        match head.status {
            StatusCode::OK => {
                if let Some(digest) = request.digest_from_headers(&head.headers)? {
                    return Ok(QueryReply::Success(digest));
                }
            }
            StatusCode::METHOD_NOT_ALLOWED => {}
            _ => return request.unsuccessful_reply(&head, redirected),
        }
        let (answer, redirected) =
            request.send_following_redirects(Method::GET, MANIFEST_MEDIA_TYPES, authorization).await?;
        if answer.status != StatusCode::OK {
            return request.unsuccessful_reply(&answer, redirected);
        }
        let header_digest = request.digest_from_headers(&answer.headers)?;
        let content = request.read(answer, MAX_DOCUMENT_BYTES as usize).await?;
        if Document::parse(&content).is_err() {
            return Err(request.invalid_response("a body that is no manifest"));
        }
        let digest = Digest::of(&content);
        match header_digest {
            Some(header_digest) if header_digest != digest => {
                Err(request.invalid_response("a manifest with the digest of another"))
            }
            _ => Ok(QueryReply::Success(digest)),
        }
    }
}

/// Maps a failed request to the registry, or to its token server or a redirect's target.
pub(super) fn registry_error(registry: &str, failure: HttpError) -> RegistryError {
    let registry = registry.to_owned();
    match failure {
        HttpError::Unreachable { kind, .. } => RegistryError::Down { registry, kind },
        HttpError::ClientCertificateRequired => RegistryError::Denied(registry),
        HttpError::NotHttp(_) => {
            RegistryError::InvalidResponse { registry, reason: "a response that is not HTTP".into() }
        }
        HttpError::BodyTooLong(limit) => {
            RegistryError::InvalidResponse { registry, reason: format!("more than {limit} bytes") }
        }
    }
}

impl<'a> RegistryRequest<'a> {
    /// The caller has validated the names in `path`, which is relative to the repository.
    pub(super) fn new(http: &'a Client, endpoint: RegistryEndpoint, repository: &'a Repository, path: &str) -> Self {
        let mut url = endpoint.base.clone();
        url.set_path(&format!("/v2/{}/{path}", repository.path));
        Self { http, endpoint, repository, url }
    }

    /// # Errors
    /// As [`Self::send_with_credentials`].
    pub(super) async fn resolve(&self, secrets: &[PullSecret]) -> Result<Digest, RegistryError> {
        self.send_with_credentials::<TagQuery>(secrets).await
    }

    /// # Errors
    /// The first error of a credential that is no denial: such a credential was accepted. An outage
    /// ends the query at once.
    pub(super) async fn send_with_credentials<A: RegistryQuery>(
        &self,
        secrets: &[PullSecret],
    ) -> Result<A::Output, RegistryError> {
        let challenge = match A::execute(self, None).await? {
            QueryReply::Success(output) => return Ok(output),
            QueryReply::Unauthorized(None) => return Err(self.denied()),
            QueryReply::Unauthorized(Some(challenge)) => challenge,
        };
        let credentials = credentials::for_repository(secrets, self.repository);
        let mut first_error = None;
        for credential in credentials.iter().map(Some).chain([None]) {
            match self.send_as::<A>(&challenge, credential).await {
                Ok(output) => return Ok(output),
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
            QueryReply::Success(output) => Ok(output),
            QueryReply::Unauthorized(_) => Err(self.denied()),
        }
    }

    /// The digest in the headers of a successful reply, if any.
    fn digest_from_headers(&self, headers: &HeaderMap) -> Result<Option<Digest>, RegistryError> {
        if is_html_page(headers) {
            return Err(self.invalid_response("an HTML page instead of a reply"));
        }
        let Some(value) = headers.get(CONTENT_DIGEST) else { return Ok(None) };
        let text = value.to_str().map_err(|_| self.invalid_response("a digest that is not ASCII text"))?;
        text.trim().parse().map(Some).map_err(|error| self.invalid_response(error))
    }

    /// The reply for any status except 200.
    pub(super) fn unsuccessful_reply<T>(
        &self,
        answer: &HttpResponse,
        redirected: bool,
    ) -> Result<QueryReply<T>, RegistryError> {
        match answer.status.as_u16() {
            // Only the registry itself may send a challenge, not the target of a redirect.
            401 if !redirected => Ok(QueryReply::Unauthorized(challenge::preferred_challenge(&answer.headers))),
            // No registry sends a page: another server has the registry's name.
            404 if is_html_page(&answer.headers) => Err(self.invalid_response("an HTML page instead of a reply")),
            404 => Err(RegistryError::NotFound(self.registry())),
            _ => Err(self.status_error(answer.status)),
        }
    }

    /// The error for a status of any server.
    fn status_error(&self, status: StatusCode) -> RegistryError {
        let registry = self.registry();
        match status.as_u16() {
            401 | 403 => RegistryError::Denied(registry),
            429 => RegistryError::RateLimited(registry),
            500..=599 => RegistryError::Down { registry, kind: OutageKind::ServerError },
            other => self.invalid_response(format_args!("status {other}")),
        }
    }

    /// Sends the request and follows redirects. The second value is true after a redirect; the
    /// redirect's target got no credential.
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
        Err(self.invalid_response(format_args!("more than {MAX_REDIRECTS} redirects")))
    }

    /// A token for this repository, as a header. Without a credential the token permits anonymous
    /// access.
    async fn fetch_token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        credential: Option<&RegistryCredential>,
    ) -> Result<HeaderValue, RegistryError> {
        let mut url = self.require_safe_url(Url::parse(realm).ok(), "a token server")?;
        // The registry's own scope, if any: some registries name a repository otherwise.
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
            // OAuth 2's status for an invalid refresh token.
            400 => return Err(self.denied()),
            _ => return Err(self.status_error(answer.status)),
        }
        let content = self.read(answer, MAX_TOKEN_RESPONSE).await?;
        bearer_header(&content).ok_or_else(|| self.invalid_response("a reply without a usable token"))
    }

    /// Accepts a URL that the registry names when the URL is as safe as the registry itself.
    fn require_safe_url(&self, url: Option<Url>, what: &str) -> Result<Url, RegistryError> {
        match url {
            Some(url) if url.scheme() == "https" => Ok(url),
            Some(url) if url.scheme() == "http" && self.endpoint.insecure => Ok(url),
            Some(url) if url.scheme() == "http" => Err(self.invalid_response(format_args!("{what} without TLS"))),
            _ => Err(self.invalid_response(format_args!("{what} without an HTTP URL"))),
        }
    }

    /// An insecure registry may have any certificate; another host that the registry names may not.
    fn certificates(&self, url: &Url) -> Certificates {
        let is_same_origin = |url: &Url, base: &Url| {
            url.host() == base.host() && url.port_or_known_default() == base.port_or_known_default()
        };
        if self.endpoint.insecure && is_same_origin(url, &self.endpoint.base) {
            Certificates::Any
        } else {
            Certificates::Verified
        }
    }

    async fn send(&self, request: Request<'_>) -> Result<HttpResponse, RegistryError> {
        self.http.send(request).await.map_err(|failure| self.map_http_error(failure))
    }

    async fn read(&self, answer: HttpResponse, limit: usize) -> Result<Bytes, RegistryError> {
        answer.read(limit).await.map_err(|failure| self.map_http_error(failure))
    }

    pub(super) fn registry(&self) -> String {
        self.repository.registry.clone()
    }

    fn map_http_error(&self, failure: HttpError) -> RegistryError {
        tracing::debug!(registry = self.repository.registry, %failure, "a registry query failed");
        registry_error(&self.repository.registry, failure)
    }

    fn denied(&self) -> RegistryError {
        RegistryError::Denied(self.registry())
    }

    fn invalid_response(&self, reason: impl std::fmt::Display) -> RegistryError {
        RegistryError::InvalidResponse { registry: self.registry(), reason: reason.to_string() }
    }
}

fn is_html_page(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.trim_start().get(..9).is_some_and(|kind| kind.eq_ignore_ascii_case("text/html"))
}

fn form_body(parameters: &[(&str, &str)]) -> Bytes {
    url::form_urlencoded::Serializer::new(String::new()).extend_pairs(parameters).finish().into()
}

/// The token in a token server's response; both field names are in use.
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
