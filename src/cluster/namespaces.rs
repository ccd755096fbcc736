//! Namespaces' labels and annotations.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client};

use super::cached::Cached;
use super::metadata::metadata;
use super::project::bounded;
use crate::ports::{ClusterError, NamespaceView};

/// A changed annotation counts after this; the pods of one failing Deployment meanwhile share one request.
const FRESH: Duration = Duration::from_secs(5);

/// Namespaces of the pods of one node: a few dozen.
const MOST: usize = 1024;

pub(super) struct Namespaces {
    client: Client,
    cached: Cached<String, Arc<NamespaceView>>,
}

impl Namespaces {
    pub(super) fn new(client: Client) -> Self {
        Self { client, cached: Cached::new(FRESH, MOST) }
    }

    pub(super) async fn namespace(&self, k8s_namespace: &str) -> Result<Arc<NamespaceView>, ClusterError> {
        let ask = async {
            let found = metadata(&Api::<Namespace>::all(self.client.clone()), k8s_namespace, None).await?;
            let labels = bounded(found.labels.unwrap_or_default());
            Ok(Arc::new(NamespaceView { labels, annotations: bounded(found.annotations.unwrap_or_default()) }))
        };
        let answer = self.cached.get(k8s_namespace.to_owned(), ask).await;
        answer.map_err(|failure| failure.about(&format!("namespace {k8s_namespace}")))
    }
}
