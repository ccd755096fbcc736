//! `GET /debug/mesh`: the mesh members, as JSON; as a table with `?format=table` or when the client
//! accepts plain text and no JSON.
//!
//! The page shows names, addresses and PeerIds of nodes, as every client with permission to list
//! nodes can see them. Credentials and inventories are not shown.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::AdminState;
use super::mesh_table::{mesh_summary, mesh_table};
use crate::model::MeshStatus;
use crate::ports::MeshSource;

/// The page requests the mesh status at most once per this time and member, for all clients
/// together, and sends all of them the same bytes. So a few nodes can be watched closely, and a
/// thousand cost little. A connection ends after 30 s, so slow readers keep at most 30 s / 5 ms
/// entries of 300 bytes in memory, which are 2 MiB, or seven responses. Seven responses are 10 MiB
/// in a cluster of 5000 nodes.
const CACHE_PER_MEMBER: Duration = Duration::from_millis(5);
const MIN_CACHE: Duration = Duration::from_millis(100);
const MAX_CACHE: Duration = Duration::from_secs(5);

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// The cached status.
pub(super) struct MeshPage {
    source: Arc<dyn MeshSource>,
    cached: Mutex<Option<CachedStatus>>,
}

struct CachedStatus {
    at: Instant,
    status: MeshStatus,
    json: Option<Bytes>,
    table: Option<Bytes>,
}

fn cache_lifetime(status: &MeshStatus) -> Duration {
    let members = u32::try_from(status.members.len()).unwrap_or(u32::MAX);
    CACHE_PER_MEMBER.saturating_mul(members).clamp(MIN_CACHE, MAX_CACHE)
}

impl MeshPage {
    pub(super) fn new(source: Arc<dyn MeshSource>) -> Self {
        Self { source, cached: Mutex::default() }
    }

    /// The bytes of the response; `None` when the mesh does not answer.
    async fn bytes(&self, as_table: bool) -> Option<Bytes> {
        let mut cached = self.cached.lock().await;
        if cached.as_ref().is_none_or(|answer| answer.at.elapsed() >= cache_lifetime(&answer.status)) {
            let status = self.source.mesh().await;
            *cached = status.map(|status| CachedStatus { at: Instant::now(), status, json: None, table: None });
        }
        let CachedStatus { at: _, status, json, table } = cached.as_mut()?;
        let bytes = match as_table {
            true => {
                table.get_or_insert_with(|| (mesh_summary(status).join("\n") + "\n\n" + &mesh_table(status)).into())
            }
            false => json.get_or_insert_with(|| serde_json::to_vec(status).expect("names and numbers are JSON").into()),
        };
        Some(bytes.clone())
    }
}

pub(super) async fn serve_mesh(
    State(shared): State<Arc<AdminState>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let Some(as_table) = wants_table(query.as_deref(), &headers) else {
        return (StatusCode::BAD_REQUEST, "the format must be json or table\n").into_response();
    };
    match shared.mesh.bytes(as_table).await {
        Some(bytes) => ([(header::CONTENT_TYPE, if as_table { TEXT } else { JSON })], bytes).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the mesh does not answer\n").into_response(),
    }
}

/// The query decides; without a format there, plain text that is accepted without JSON gives the
/// table. `None` for an unknown format.
fn wants_table(query: Option<&str>, headers: &HeaderMap) -> Option<bool> {
    let format = query.into_iter().flat_map(|query| query.split('&')).find_map(|part| part.strip_prefix("format="));
    let accepted = || headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    match format {
        Some("table") => Some(true),
        Some("json") => Some(false),
        Some(_) => None,
        None => {
            Some(accepted().any(|types| types.contains("text/plain")) && !accepted().any(|types| types.contains(JSON)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;

    use super::*;

    struct CountingMesh(AtomicUsize);

    #[async_trait]
    impl MeshSource for CountingMesh {
        async fn mesh(&self) -> Option<MeshStatus> {
            let count = self.0.fetch_add(1, Ordering::Relaxed);
            // The third request gets no answer.
            (count != 2).then(|| MeshStatus { alive: count, ..MeshStatus::default() })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_mesh_status_is_cached_however_often_it_is_requested() {
        let page = MeshPage::new(Arc::new(CountingMesh(AtomicUsize::new(0))));
        let alive = async |page: &MeshPage| {
            let json: MeshStatus = serde_json::from_slice(&page.bytes(false).await?).unwrap();
            Some(json.alive)
        };
        assert_eq!(alive(&page).await, Some(0));
        assert!(page.bytes(true).await.unwrap().starts_with(b"0 alive, "));
        assert_eq!(alive(&page).await, Some(0));
        tokio::time::advance(MIN_CACHE).await;
        assert_eq!(alive(&page).await, Some(1));
        tokio::time::advance(MIN_CACHE).await;
        assert_eq!(alive(&page).await, None, "an outdated status is not served");
        assert_eq!(alive(&page).await, Some(3));
    }

    #[test]
    fn the_query_decides_before_the_header() {
        let accept = |types: &str| HeaderMap::from_iter([(header::ACCEPT, types.parse().unwrap())]);
        for (query, types, table) in [
            (None, "*/*", Some(false)),
            (None, "text/plain", Some(true)),
            (None, "text/plain, application/json", Some(false)),
            (Some("format=table"), "application/json", Some(true)),
            (Some("x=1&format=json"), "text/plain", Some(false)),
            (Some("format=xml"), "*/*", None),
        ] {
            assert_eq!(wants_table(query, &accept(types)), table, "{query:?} {types}");
        }
    }
}
