//! From a reference to the content it means and the peers that may be asked for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use crate::agent::peers::inventory_view::PeerInventory;
use crate::agent::recovery::blob_fetcher::BlobFetcher;
use crate::agent::recovery::recover_error::{RecoverError, format_digest_counts};
use crate::decide::policy::ResolveOptions;
use crate::decide::tag::{TagChoice, newest};
use crate::model::PeerId;
use crate::oci::{Digest, Document, MAX_INDEX_DEPTH, Platform, Reference, Repository};
use crate::ports::{Cluster, PullSecret, Registry};

/// Longest wait for a registry and for the secrets it is asked with; the recovery waits as well, and has peers to ask instead.
const REGISTRY_TIMEOUT: Duration = Duration::from_secs(8);

/// Pull secrets that a registry is asked with, as many as the kubelet would hardly try either.
const MAX_SECRETS: usize = 8;

/// An image that somebody wants here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryRequest {
    /// Its name.
    pub reference: Reference,
    /// Secrets that its pods pull with, by namespace and name. Read only where that was allowed.
    pub pull_secrets: Vec<(String, String)>,
    /// The kubelet found content of the image missing or damaged: blobs that are here are not trusted.
    pub verify_layers: bool,
    /// The content that the registry named just now, where it was asked already.
    pub resolved_digest: Option<Digest>,
}

impl From<Reference> for RecoveryRequest {
    fn from(reference: Reference) -> Self {
        Self { reference, pull_secrets: Vec::new(), verify_layers: false, resolved_digest: None }
    }
}

/// Reads references.
pub struct ReferenceResolver {
    /// Who holds what.
    pub inventory: PeerInventory,
    /// The source registries.
    pub registry: Arc<dyn Registry>,
    /// Where pull secrets are.
    pub cluster: Arc<dyn Cluster>,
    /// What runs here.
    pub platform: Platform,
    /// How.
    pub options: ResolveOptions,
}

impl ReferenceResolver {
    /// Which content the reference means: its own digest, else what the registry says where that is asked, else what the peers that know
    /// the tag make of it. With it, what to tell where a tag was decided without its registry.
    pub(in crate::agent) async fn resolve(
        &self,
        request: &RecoveryRequest,
        blob_fetcher: &BlobFetcher,
    ) -> Result<(Digest, Option<String>), RecoverError> {
        if let Some(root) = request.resolved_digest {
            return Ok((root, None));
        }
        let (repository, tag) = match &request.reference {
            Reference::Digest(_, digest) => return Ok((*digest, None)),
            Reference::Tag(repository, tag) => (repository, tag),
        };
        if self.options.ask_registry
            && let Some(digest) = self.resolve_at_registry(request, repository, tag).await
        {
            return Ok((digest, None));
        }
        let digests = self.inventory.tag_digests(repository, tag);
        let counts = digests.iter().map(|(digest, peers)| (*digest, peers.len())).collect();
        let chosen = match self.options.tag_policy.choose(&counts) {
            TagChoice::Digest(digest) => Some(digest),
            TagChoice::Unknown => return Err(RecoverError::NoProvider { reference: request.reference.clone() }),
            TagChoice::Disagreement => None,
            TagChoice::NeedsBuildTimes => {
                let mut built = BTreeMap::new();
                for (digest, peers) in &digests {
                    built.insert(*digest, self.creation_time(*digest, peers, blob_fetcher).await);
                }
                newest(&built)
            }
        };
        let chosen = chosen.ok_or_else(|| RecoverError::TagDisagreement {
            reference: request.reference.clone(),
            digests: counts.iter().map(|(digest, peers)| (*digest, *peers)).collect(),
        })?;
        let peers = counts.get(&chosen).copied().unwrap_or_default();
        let nodes = if peers == 1 { "node" } else { "nodes" };
        let mut tag_note =
            format!("The tag was taken for this digest, as on {peers} other {nodes}; its registry was not asked.");
        if counts.len() > 1 {
            let digest_counts: Vec<_> = counts.iter().map(|(digest, peers)| (*digest, *peers)).collect();
            let policy = self.options.tag_policy.name();
            tag_note += &format!(
                " Nodes disagree on the tag ({}); --tag-policy {policy} decided.",
                format_digest_counts(&digest_counts)
            );
            tracing::warn!(reference = %request.reference, %chosen, tag_note, "peers disagree on the tag");
        }
        Ok((chosen, Some(tag_note)))
    }

    /// The peers that hold the image under the very repository that the pod names, unless that was widened.
    pub(in crate::agent) fn providers(&self, reference: &Reference, root: Digest) -> Result<Vec<PeerId>, RecoverError> {
        let providers = match self.options.any_repository {
            true => self.inventory.blob_providers(root),
            false => self.inventory.image_providers(reference.repository(), root),
        };
        if providers.is_empty() {
            return Err(RecoverError::NoProvider { reference: reference.clone() });
        }
        Ok(providers)
    }

    /// Whether a recovery that begins now finds whom to ask.
    pub(in crate::agent) fn has_provider(&self, reference: &Reference) -> bool {
        match reference {
            Reference::Digest(_, root) => self.providers(reference, *root).is_ok(),
            Reference::Tag(repository, tag) => {
                let digests = self.inventory.tag_digests(repository, tag);
                let counts = digests.iter().map(|(digest, peers)| (*digest, peers.len())).collect();
                match self.options.tag_policy.choose(&counts) {
                    TagChoice::Digest(root) => self.providers(reference, root).is_ok(),
                    TagChoice::NeedsBuildTimes => true,
                    TagChoice::Unknown | TagChoice::Disagreement => false,
                }
            }
        }
    }

    /// What the source registry says the tag is; `None` when it does not say. A denial is no verdict here: we may lack the secrets that
    /// the kubelet has.
    async fn resolve_at_registry(
        &self,
        request: &RecoveryRequest,
        repository: &Repository,
        tag: &str,
    ) -> Option<Digest> {
        let said = self.registry_digest(request, repository, tag).await;
        said.inspect_err(|error| {
            tracing::info!(reference = %request.reference, %error, "the registry does not say what the tag is; peers are asked");
        })
        .ok()
    }

    /// The digest that the source registry says the tag has now, or why it does not say.
    pub(in crate::agent) async fn registry_digest(
        &self,
        request: &RecoveryRequest,
        repository: &Repository,
        tag: &str,
    ) -> Result<Digest, String> {
        let question = async {
            let secrets = self.secrets(request).await;
            self.registry.resolve(repository, tag, &secrets).await
        };
        match tokio::time::timeout(REGISTRY_TIMEOUT, question).await {
            Ok(said) => said.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {} s", REGISTRY_TIMEOUT.as_secs())),
        }
    }

    /// The pull secrets that could be read.
    pub(in crate::agent) async fn secrets(&self, request: &RecoveryRequest) -> Vec<PullSecret> {
        let allowed = |namespace: &str| self.options.pull_secret_namespaces.iter().any(|name| name == namespace);
        let mut secrets = Vec::new();
        for (namespace, name) in request.pull_secrets.iter().filter(|(name, _)| allowed(name)).take(MAX_SECRETS) {
            match self.cluster.pull_secret(namespace, name).await {
                Ok(secret) => secrets.push(secret),
                Err(error) => tracing::warn!(namespace, name, %error, "cannot read a pull secret"),
            }
        }
        secrets
    }

    /// When an image says that it was built. From its config, which its provider sends; nothing of it is kept.
    async fn creation_time(
        &self,
        root: Digest,
        providers: &[PeerId],
        blob_fetcher: &BlobFetcher,
    ) -> Option<jiff::Timestamp> {
        #[derive(Deserialize)]
        struct Config {
            created: Option<String>,
        }
        let mut digest = root;
        for _ in 0..=MAX_INDEX_DEPTH {
            let bytes = blob_fetcher.peek(digest, providers).await.ok()?;
            match Document::parse(&bytes).ok()? {
                Document::Index(index) => digest = index.select(&self.platform)?.digest,
                Document::Manifest(manifest) => {
                    let config = blob_fetcher.peek(manifest.config.digest, providers).await.ok()?;
                    return serde_json::from_slice::<Config>(&config).ok()?.created?.parse().ok();
                }
            }
        }
        None
    }
}
