//! What containerd tells about itself: where its content is, and whether the CRI plugin runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use tokio::sync::Mutex;

use super::ContainerdStore;
use crate::ports::StoreError;

/// Asked once per connection: a containerd that was restarted may have another configuration.
pub(super) struct Surroundings {
    configured_root: Option<PathBuf>,
    found: Mutex<Option<Found>>,
}

#[derive(Clone)]
struct Found {
    content_root: Option<Arc<Path>>,
    cri: bool,
}

impl Surroundings {
    pub(super) fn new(configured_root: Option<PathBuf>) -> Self {
        Self { configured_root, found: Mutex::new(None) }
    }

    pub(super) async fn forget(&self) {
        *self.found.lock().await = None;
    }
}

impl ContainerdStore {
    /// The content store's folder, if this process can see it. Files in it are only an optimisation: each is looked for.
    pub(super) async fn content_root(&self) -> Result<Option<Arc<Path>>, StoreError> {
        Ok(self.look_around().await?.content_root)
    }

    pub(super) async fn has_cri(&self) -> Result<bool, StoreError> {
        Ok(self.look_around().await?.cri)
    }

    async fn look_around(&self) -> Result<Found, StoreError> {
        let mut found = self.state.surroundings.found.lock().await;
        if let Some(found) = &*found {
            return Ok(found.clone());
        }
        let request = self.link.request(PluginsRequest { filters: Vec::new() });
        let mut client = IntrospectionClient::new(self.link.channel());
        let answer = self.link.call(client.plugins(request)).await;
        let plugins = answer.map_err(|status| self.link.failed(&status))?.plugins;
        let loaded = |kind: &str, id: &str| {
            plugins.iter().find(|plugin| plugin.r#type == kind && plugin.id == id && plugin.init_err.is_none())
        };
        let exported = loaded("io.containerd.content.v1", "content").and_then(|plugin| plugin.exports.get("root"));
        let root = self.state.surroundings.configured_root.clone().or_else(|| exported.map(PathBuf::from));
        let visible = root.filter(|root| root.join("blobs/sha256").is_dir());
        let cri = loaded("io.containerd.grpc.v1", "cri").is_some();
        tracing::debug!(content_root = ?visible, cri, "looked around in containerd");
        Ok(found.insert(Found { content_root: visible.map(Arc::from), cri }).clone())
    }
}
