//! Resolves a reference: to the digest of its content, and to the peers that provide the content.

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
use crate::ports::{PodReader, PullSecret, Registry};

/// Longest wait for a registry's answer, with the reads of the pull secrets. The recovery waits
/// too, and the peers' digests are the alternative.
const REGISTRY_TIMEOUT: Duration = Duration::from_secs(8);

/// Most pull secrets for one resolution. The kubelet hardly tries that many either.
const MAX_SECRETS: usize = 8;

/// An image to recover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryRequest {
    /// Reference as the pods name the image.
    pub reference: Reference,
    /// Pull secrets of the image's pods, by namespace and name. Only secrets of permitted
    /// namespaces are read.
    pub pull_secrets: Vec<(String, String)>,
    /// The kubelet found content of the image missing or damaged, so the layers that are here are
    /// hashed.
    pub verify_layers: bool,
    /// Digest of the tag, if the registry has just answered.
    pub resolved_digest: Option<Digest>,
}

impl From<Reference> for RecoveryRequest {
    fn from(reference: Reference) -> Self {
        Self { reference, pull_secrets: Vec::new(), verify_layers: false, resolved_digest: None }
    }
}

/// Resolves references to digests.
pub struct ReferenceResolver {
    /// Peers with their images and tags.
    pub inventory: PeerInventory,
    /// Registries of the images.
    pub registry: Arc<dyn Registry>,
    /// Reads pull secrets.
    pub cluster: Arc<dyn PodReader>,
    /// Platform of this node.
    pub platform: Platform,
    /// Sources and limits of the resolution.
    pub options: ResolveOptions,
}

impl ReferenceResolver {
    /// Resolves the reference to a digest. The sources in order: the registry's answer in the
    /// request, the digest in the reference, the registry where `ask_registry` is set, and the
    /// peers' tags under the tag policy. A digest from the peers' tags comes with a text for the
    /// Event.
    pub(in crate::agent) async fn resolve(
        &self,
        request: &RecoveryRequest,
        blob_fetcher: &BlobFetcher,
    ) -> Result<(Digest, Option<String>), RecoverError> {
        if let Some(digest) = request.resolved_digest {
            return Ok((digest, None));
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
                let mut creation_times = BTreeMap::new();
                for (digest, peers) in &digests {
                    creation_times.insert(*digest, self.creation_time(*digest, peers, blob_fetcher).await);
                }
                newest(&creation_times)
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

    /// The peers that have the image under the reference's own repository. With `any_repository`,
    /// all peers that have the digest.
    pub(in crate::agent) fn providers(
        &self,
        reference: &Reference,
        digest: Digest,
    ) -> Result<Vec<PeerId>, RecoverError> {
        let providers = match self.options.any_repository {
            true => self.inventory.blob_providers(digest),
            false => self.inventory.image_providers(reference.repository(), digest),
        };
        if providers.is_empty() {
            return Err(RecoverError::NoProvider { reference: reference.clone() });
        }
        Ok(providers)
    }

    /// Whether a recovery that begins now has a provider. Build times are not read for this.
    pub(in crate::agent) fn has_provider(&self, reference: &Reference) -> bool {
        match reference {
            Reference::Digest(_, digest) => self.providers(reference, *digest).is_ok(),
            Reference::Tag(repository, tag) => {
                let digests = self.inventory.tag_digests(repository, tag);
                let counts = digests.iter().map(|(digest, peers)| (*digest, peers.len())).collect();
                match self.options.tag_policy.choose(&counts) {
                    TagChoice::Digest(digest) => self.providers(reference, digest).is_ok(),
                    TagChoice::NeedsBuildTimes => true,
                    TagChoice::Unknown | TagChoice::Disagreement => false,
                }
            }
        }
    }

    /// The tag's digest from the source registry; `None` without an answer. A denial is no verdict
    /// here: the agent may lack pull secrets that the kubelet has.
    async fn resolve_at_registry(
        &self,
        request: &RecoveryRequest,
        repository: &Repository,
        tag: &str,
    ) -> Option<Digest> {
        let result = self.registry_digest(request, repository, tag).await;
        result
            .inspect_err(|error| {
                let reference = &request.reference;
                tracing::info!(%reference, %error, "the registry did not resolve the tag; the peers' tags decide");
            })
            .ok()
    }

    /// The tag's present digest at the source registry, or why there is no answer.
    pub(in crate::agent) async fn registry_digest(
        &self,
        request: &RecoveryRequest,
        repository: &Repository,
        tag: &str,
    ) -> Result<Digest, String> {
        let resolution = async {
            let secrets = self.secrets(request).await;
            self.registry.resolve(repository, tag, &secrets).await
        };
        match tokio::time::timeout(REGISTRY_TIMEOUT, resolution).await {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {} s", REGISTRY_TIMEOUT.as_secs())),
        }
    }

    /// The image's pull secrets, as far as they are readable and in permitted namespaces.
    pub(in crate::agent) async fn secrets(&self, request: &RecoveryRequest) -> Vec<PullSecret> {
        let allowed = |namespace: &str| self.options.pull_secret_namespaces.iter().any(|name| name == namespace);
        let mut secrets = Vec::new();
        for (namespace, name) in request.pull_secrets.iter().filter(|(name, _)| allowed(name)).take(MAX_SECRETS) {
            match self.cluster.pull_secret(namespace, name).await {
                Ok(secret) => secrets.push(secret),
                Err(error) => tracing::warn!(namespace, name, %error, "a pull secret cannot be read and is skipped"),
            }
        }
        secrets
    }

    /// The build time in the image's config. A provider sends the config, and nothing is stored.
    async fn creation_time(
        &self,
        image_digest: Digest,
        providers: &[PeerId],
        blob_fetcher: &BlobFetcher,
    ) -> Option<jiff::Timestamp> {
        #[derive(Deserialize)]
        struct Config {
            created: Option<String>,
        }
        let mut digest = image_digest;
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
