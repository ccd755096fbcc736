//! Registries in memory.

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};

use crate::model::OutageKind;
use crate::oci::{BlobProof, Digest, Hasher, Repository};
use crate::ports::{BlobSink, PullSecret, Registry, RegistryError, RegistryFetchError};

/// All registries of a test; names of other registries do not resolve.
#[derive(Default)]
pub struct MemoryRegistry {
    registries: Mutex<BTreeMap<String, FakeRegistry>>,
}

#[derive(Default)]
struct FakeRegistry {
    tags: BTreeMap<(String, String), Tag>,
    blobs: BTreeMap<Digest, Bytes>,
    /// Blobs require this secret.
    blob_secret: Option<PullSecret>,
    failure: Option<RegistryError>,
    pings: usize,
    resolves: usize,
    blob_requests: usize,
}

struct Tag {
    digest: Digest,
    /// The repository requires this secret.
    secret: Option<PullSecret>,
}

impl MemoryRegistry {
    /// Creates a registry, unless it exists.
    pub fn put_registry(&self, registry: &str) {
        self.lock().entry(registry.to_owned()).or_default();
    }

    /// Creates or moves a public tag, and creates its registry.
    pub fn put_tag(&self, repository: &Repository, tag: &str, digest: Digest) {
        self.put(repository, tag, Tag { digest, secret: None });
    }

    /// Creates or moves a tag that requires this secret, and creates its registry.
    pub fn put_private_tag(&self, repository: &Repository, tag: &str, digest: Digest, secret: PullSecret) {
        self.put(repository, tag, Tag { digest, secret: Some(secret) });
    }

    /// Puts a blob into every repository of a registry.
    pub fn put_blob(&self, registry: &str, bytes: Bytes) {
        self.lock().entry(registry.to_owned()).or_default().blobs.insert(Digest::of(&bytes), bytes);
    }

    /// Replaces the blob's bytes by other bytes of the same length.
    pub fn corrupt_blob(&self, registry: &str, digest: Digest) {
        if let Some(bytes) = self.lock().get_mut(registry).and_then(|fake| fake.blobs.get_mut(&digest)) {
            *bytes = vec![0; bytes.len()].into();
        }
    }

    /// Requires this secret for every later blob of the registry.
    pub fn make_blobs_private(&self, registry: &str, secret: PullSecret) {
        self.lock().entry(registry.to_owned()).or_default().blob_secret = Some(secret);
    }

    /// Number of blob requests to a registry.
    pub fn blob_requests(&self, registry: &str) -> usize {
        self.lock().get(registry).map_or(0, |fake| fake.blob_requests)
    }

    /// Sets the answer to every later request; `None` for true answers. A ping fails only when the
    /// failure is [`RegistryError::Down`].
    pub fn set_failure(&self, registry: &str, failure: Option<RegistryError>) {
        self.lock().entry(registry.to_owned()).or_default().failure = failure;
    }

    /// Number of pings of a registry.
    pub fn pings(&self, registry: &str) -> usize {
        self.lock().get(registry).map_or(0, |fake| fake.pings)
    }

    /// Number of tag requests to a registry.
    pub fn resolves(&self, registry: &str) -> usize {
        self.lock().get(registry).map_or(0, |fake| fake.resolves)
    }

    fn put(&self, repository: &Repository, tag: &str, stored_tag: Tag) {
        let mut registries = self.lock();
        let tags = &mut registries.entry(repository.registry.clone()).or_default().tags;
        tags.insert((repository.path.clone(), tag.to_owned()), stored_tag);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, FakeRegistry>> {
        self.registries.lock()
    }
}

fn no_such_host(registry: &str) -> RegistryError {
    RegistryError::Down { registry: registry.to_owned(), kind: OutageKind::NoSuchHost }
}

#[async_trait]
impl Registry for MemoryRegistry {
    async fn ping(&self, registry: &str) -> Result<(), RegistryError> {
        let mut registries = self.lock();
        let fake = registries.get_mut(registry).ok_or_else(|| no_such_host(registry))?;
        fake.pings += 1;
        match &fake.failure {
            Some(down @ RegistryError::Down { .. }) => Err(down.clone()),
            _ => Ok(()),
        }
    }

    async fn resolve(
        &self,
        repository: &Repository,
        tag: &str,
        secrets: &[PullSecret],
    ) -> Result<Digest, RegistryError> {
        let registry = &repository.registry;
        let mut registries = self.lock();
        let fake = registries.get_mut(registry).ok_or_else(|| no_such_host(registry))?;
        fake.resolves += 1;
        if let Some(failure) = &fake.failure {
            return Err(failure.clone());
        }
        match fake.tags.get(&(repository.path.clone(), tag.to_owned())) {
            None => Err(RegistryError::NotFound(registry.clone())),
            Some(Tag { secret: Some(secret), .. }) if !secrets.contains(secret) => {
                Err(RegistryError::Denied(registry.clone()))
            }
            Some(Tag { digest, .. }) => Ok(*digest),
        }
    }

    async fn fetch_blob(
        &self,
        repository: &Repository,
        digest: Digest,
        size: u64,
        secrets: &[PullSecret],
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, RegistryFetchError> {
        let bytes = self.blob(&repository.registry, digest, secrets)?;
        let mut hasher = Hasher::default();
        hasher.update(&bytes);
        sink.append(&[bytes]).await?;
        let wrong = |error| RegistryFetchError::WrongBytes {
            registry: repository.registry.clone(),
            reason: format!("{error}"),
        };
        hasher.verify(digest, size).map_err(wrong)
    }
}

impl MemoryRegistry {
    fn blob(&self, registry: &str, digest: Digest, secrets: &[PullSecret]) -> Result<Bytes, RegistryError> {
        let mut registries = self.lock();
        let fake = registries.get_mut(registry).ok_or_else(|| no_such_host(registry))?;
        fake.blob_requests += 1;
        if let Some(failure) = &fake.failure {
            return Err(failure.clone());
        }
        if fake.blob_secret.as_ref().is_some_and(|secret| !secrets.contains(secret)) {
            return Err(RegistryError::Denied(registry.to_owned()));
        }
        fake.blobs.get(&digest).cloned().ok_or_else(|| RegistryError::NotFound(registry.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_private_tag_is_for_owners_of_its_secret_while_the_registry_is_up() {
        let registry = MemoryRegistry::default();
        let app = Repository { registry: "reg.test".into(), path: "app".into() };
        assert_eq!(registry.ping("reg.test").await, Err(no_such_host("reg.test")));
        let (digest, secret) = (Digest::of(b"image"), PullSecret(b"secret".to_vec()));
        registry.put_private_tag(&app, "v1", digest, secret.clone());
        assert_eq!(registry.resolve(&app, "v1", &[]).await, Err(RegistryError::Denied("reg.test".into())));
        assert_eq!(registry.resolve(&app, "v1", &[secret]).await, Ok(digest));
        assert_eq!(registry.resolve(&app, "v2", &[]).await, Err(RegistryError::NotFound("reg.test".into())));

        registry.set_failure("reg.test", Some(RegistryError::RateLimited("reg.test".into())));
        assert_eq!(registry.ping("reg.test").await, Ok(()), "status 429 counts as alive");
        let down = RegistryError::Down { registry: "reg.test".into(), kind: OutageKind::TimedOut };
        registry.set_failure("reg.test", Some(down.clone()));
        assert_eq!(registry.ping("reg.test").await, Err(down));
        assert_eq!((registry.pings("reg.test"), registry.resolves("reg.test")), (2, 3));
    }
}
