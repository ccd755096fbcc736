//! From a reference to the content it means and the peers that may be asked for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use super::bring::Bring;
use super::holders::Holders;
use super::recover_error::{RecoverError, list};
use crate::decide::rules::ResolveSettings;
use crate::decide::tag::{Choice, newest};
use crate::model::PeerId;
use crate::oci::{Digest, Document, MAX_INDEX_DEPTH, Platform, Reference, Repository};
use crate::ports::{Cluster, PullSecret, Registry};

/// Longest wait for a registry and for the secrets it is asked with; the recovery waits as well, and has peers to ask instead.
const REGISTRY_WAIT: Duration = Duration::from_secs(8);

/// Pull secrets that a registry is asked with, as many as the kubelet would hardly try either.
const MAX_SECRETS: usize = 8;

/// An image that somebody wants here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its name.
    pub reference: Reference,
    /// Secrets that its pods pull with, by namespace and name. Read only where that was allowed.
    pub pull_secrets: Vec<(String, String)>,
    /// The kubelet found content of the image missing or damaged: blobs that are here are not trusted.
    pub in_doubt: bool,
    /// The content that the registry named just now, where it was asked already.
    pub root: Option<Digest>,
}

impl From<Reference> for Wanted {
    fn from(reference: Reference) -> Self {
        Self { reference, pull_secrets: Vec::new(), in_doubt: false, root: None }
    }
}

/// Reads references.
pub struct Resolver {
    /// Who holds what.
    pub holders: Holders,
    /// The source registries.
    pub registry: Arc<dyn Registry>,
    /// Where pull secrets are.
    pub cluster: Arc<dyn Cluster>,
    /// What runs here.
    pub platform: Platform,
    /// How.
    pub settings: ResolveSettings,
}

impl Resolver {
    /// Which content the reference means: its own digest, else what the registry says where that is asked, else what the peers that know
    /// the tag make of it. With it, what to tell where a tag was decided without its registry.
    pub(super) async fn resolve(
        &self,
        wanted: &Wanted,
        bring: &Bring,
    ) -> Result<(Digest, Option<String>), RecoverError> {
        if let Some(root) = wanted.root {
            return Ok((root, None));
        }
        let (repository, tag) = match &wanted.reference {
            Reference::Digest(_, digest) => return Ok((*digest, None)),
            Reference::Tag(repository, tag) => (repository, tag),
        };
        if self.settings.ask_registry
            && let Some(digest) = self.ask_registry(wanted, repository, tag).await
        {
            return Ok((digest, None));
        }
        let meanings = self.holders.of_tag(repository, tag);
        let counts = meanings.iter().map(|(digest, peers)| (*digest, peers.len())).collect();
        let chosen = match self.settings.tag_policy.choose(&counts) {
            Choice::One(digest) => Some(digest),
            Choice::Unknown => return Err(RecoverError::NoProvider { reference: wanted.reference.clone() }),
            Choice::Disagreement => None,
            Choice::ByAge => {
                let mut built = BTreeMap::new();
                for (digest, peers) in &meanings {
                    built.insert(*digest, self.built_at(*digest, peers, bring).await);
                }
                newest(&built)
            }
        };
        let chosen = chosen.ok_or_else(|| RecoverError::Disagreement {
            reference: wanted.reference.clone(),
            meanings: counts.iter().map(|(digest, peers)| (*digest, *peers)).collect(),
        })?;
        let peers = counts.get(&chosen).copied().unwrap_or_default();
        let nodes = if peers == 1 { "node" } else { "nodes" };
        let mut settled =
            format!("The tag was taken for this digest, as on {peers} other {nodes}; its registry was not asked.");
        if counts.len() > 1 {
            let meanings: Vec<_> = counts.iter().map(|(digest, peers)| (*digest, *peers)).collect();
            let policy = self.settings.tag_policy.name();
            settled += &format!(" Nodes disagree on the tag ({}); --tag-policy {policy} decided.", list(&meanings));
            tracing::warn!(reference = %wanted.reference, %chosen, settled, "peers disagree on the tag");
        }
        Ok((chosen, Some(settled)))
    }

    /// The peers that hold the image under the very repository that the pod names, unless that was widened.
    pub(super) fn providers(&self, reference: &Reference, root: Digest) -> Result<Vec<PeerId>, RecoverError> {
        let providers = match self.settings.any_repository {
            true => self.holders.of_blob(root),
            false => self.holders.of_image(reference.repository(), root),
        };
        if providers.is_empty() {
            return Err(RecoverError::NoProvider { reference: reference.clone() });
        }
        Ok(providers)
    }

    /// Whether a recovery that begins now finds whom to ask.
    pub(super) fn has_provider(&self, reference: &Reference) -> bool {
        match reference {
            Reference::Digest(_, root) => self.providers(reference, *root).is_ok(),
            Reference::Tag(repository, tag) => {
                let meanings = self.holders.of_tag(repository, tag);
                let counts = meanings.iter().map(|(digest, peers)| (*digest, peers.len())).collect();
                match self.settings.tag_policy.choose(&counts) {
                    Choice::One(root) => self.providers(reference, root).is_ok(),
                    Choice::ByAge => true,
                    Choice::Unknown | Choice::Disagreement => false,
                }
            }
        }
    }

    /// What the source registry says the tag is; `None` when it does not say. A denial is no verdict here: we may lack the secrets that
    /// the kubelet has.
    async fn ask_registry(&self, wanted: &Wanted, repository: &Repository, tag: &str) -> Option<Digest> {
        let said = self.ask(wanted, repository, tag).await;
        said.inspect_err(|error| {
            tracing::info!(reference = %wanted.reference, %error, "the registry does not say what the tag is; peers are asked");
        })
        .ok()
    }

    /// The digest that the source registry says the tag has now, or why it does not say.
    pub(super) async fn ask(&self, wanted: &Wanted, repository: &Repository, tag: &str) -> Result<Digest, String> {
        let asked = async {
            let secrets = self.secrets(wanted).await;
            self.registry.resolve(repository, tag, &secrets).await
        };
        match tokio::time::timeout(REGISTRY_WAIT, asked).await {
            Ok(said) => said.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {} s", REGISTRY_WAIT.as_secs())),
        }
    }

    /// The pull secrets that could be read.
    pub(super) async fn secrets(&self, wanted: &Wanted) -> Vec<PullSecret> {
        let allowed = |namespace: &str| self.settings.pull_secret_namespaces.iter().any(|name| name == namespace);
        let mut secrets = Vec::new();
        for (namespace, name) in wanted.pull_secrets.iter().filter(|(name, _)| allowed(name)).take(MAX_SECRETS) {
            match self.cluster.pull_secret(namespace, name).await {
                Ok(secret) => secrets.push(secret),
                Err(error) => tracing::warn!(namespace, name, %error, "cannot read a pull secret"),
            }
        }
        secrets
    }

    /// When an image says that it was built. From its config, which its provider sends; nothing of it is kept.
    async fn built_at(&self, root: Digest, providers: &[PeerId], bring: &Bring) -> Option<jiff::Timestamp> {
        #[derive(Deserialize)]
        struct Config {
            created: Option<String>,
        }
        let mut digest = root;
        for _ in 0..=MAX_INDEX_DEPTH {
            let bytes = bring.peek(digest, providers).await.ok()?;
            match Document::parse(&bytes).ok()? {
                Document::Index(index) => digest = index.select(&self.platform)?.digest,
                Document::Manifest(manifest) => {
                    let config = bring.peek(manifest.config.digest, providers).await.ok()?;
                    return serde_json::from_slice::<Config>(&config).ok()?.created?.parse().ok();
                }
            }
        }
        None
    }
}
