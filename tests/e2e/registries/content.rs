//! `Content` holds the published images. A healthy registry serves these images.

use std::collections::BTreeMap;

use serde_json::Value;

use super::server::{Request, Response};

pub(super) const JSON: &str = "application/json";
const BLOB: &str = "application/octet-stream";

/// The published images, and the number of requests.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// From `REPOSITORY:TAG` to the digest.
    pub(super) tags: BTreeMap<String, String>,
    /// By digest.
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
    /// Number of requests, by port, method and path.
    pub(super) counts: BTreeMap<(u16, String, String), usize>,
}

impl Content {
    /// The response of a healthy registry.
    pub(super) fn serve(&self, request: &Request) -> Response {
        let unknown = || error("404 Not Found", "MANIFEST_UNKNOWN", "manifest unknown");
        let Some(path) = request.path.strip_prefix("/v2/") else { return unknown() };
        if path.is_empty() {
            return Response::new("200 OK", JSON, "{}");
        }
        if let Some((_, digest)) = path.split_once("/blobs/") {
            return self.blobs.get(digest).map_or_else(unknown, |blob| Response::new("200 OK", BLOB, blob.clone()));
        }
        let Some((repository, reference)) = path.split_once("/manifests/") else { return unknown() };
        let tagged = self.tags.get(&format!("{repository}:{reference}")).map_or(reference, String::as_str);
        let Some(manifest) = self.blobs.get(tagged) else { return unknown() };
        let document: Value = serde_json::from_slice(manifest).unwrap_or_default();
        let media_type = document["mediaType"].as_str().unwrap_or(JSON);
        Response::new("200 OK", media_type, manifest.clone()).with_header(format!("Docker-Content-Digest: {tagged}"))
    }
}

pub(super) fn error(status: &str, code: &str, message: &str) -> Response {
    Response::new(status, JSON, serde_json::json!({"errors": [{"code": code, "message": message}]}).to_string())
}
