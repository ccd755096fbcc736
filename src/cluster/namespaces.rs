//! The labels and annotations of namespaces.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client};

use super::metadata::metadata;
use super::pod_view::bounded_pairs;
use super::response_cache::ResponseCache;
use crate::model::NamespaceView;
use crate::ports::ClusterError;

/// Time until a changed annotation counts. Within this time the pods of a failing Deployment share
/// one request.
const CACHE_TTL: Duration = Duration::from_secs(5);

/// Most namespaces in the cache. The pods of a node are in a few dozen.
const MAX_NAMESPACES: usize = 1024;

pub(super) struct Namespaces {
    client: Client,
    cache: ResponseCache<String, Arc<NamespaceView>>,
}

impl Namespaces {
    pub(super) fn new(client: Client) -> Self {
        Self { client, cache: ResponseCache::new(CACHE_TTL, MAX_NAMESPACES) }
    }

    pub(super) async fn namespace(&self, k8s_namespace: &str) -> Result<Arc<NamespaceView>, ClusterError> {
        let fetch = async {
            let found = metadata(&Api::<Namespace>::all(self.client.clone()), k8s_namespace, None).await?;
            let labels = bounded_pairs(found.labels.unwrap_or_default());
            Ok(Arc::new(NamespaceView { labels, annotations: bounded_pairs(found.annotations.unwrap_or_default()) }))
        };
        let answer = self.cache.get(k8s_namespace.to_owned(), fetch).await;
        answer.map_err(|failure| failure.into_cluster_error(&format!("namespace {k8s_namespace}")))
    }
}
