//! Claims as Leases in the agent's own namespace.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams, Preconditions};

use super::KubeCluster;
use crate::api_server::error::{ApiError, call};
use crate::model::{LeaseSnapshot, LeaseVersion};
use crate::oci::Digest;
use crate::ports::{ClaimError, Claims};

/// Timeout of one request. A claim is advice: without an answer in this time the agent proceeds
/// without the claim.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(2);

/// `leaseDurationSeconds` of the Lease, for readers of `kubectl get leases`. [`crate::decide`] uses
/// the time of the last renewal alone.
const LEASE_SECONDS: i32 = 15;

/// Age of a Lease that no agent uses any more, also where the clocks of two nodes disagree.
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);

/// Leases that one sweep reads and deletes. A cold image costs a handful of Leases, most of which
/// are released; the sweeps of other nodes delete the rest. A page of 500 has a few hundred
/// kilobytes.
const SWEEP_READS: u32 = 500;
const SWEEP_DELETES: usize = 20;

const LABEL: (&str, &str) = ("app.kubernetes.io/name", "lighterman");

impl KubeCluster {
    /// Deletes up to 20 Leases that were not renewed for an hour. Returns the number of deleted
    /// Leases.
    ///
    /// # Errors
    /// [`ClaimError::Unavailable`]; some Leases may be deleted all the same.
    pub async fn delete_abandoned_claims(&self, now: SystemTime) -> Result<usize, ClaimError> {
        let (key, value) = LABEL;
        let ours = ListParams::default().labels(&format!("{key}={value}")).limit(SWEEP_READS);
        let leases = call(CLAIM_TIMEOUT, self.leases().list(&ours)).await?;
        let mut deleted = 0;
        for lease in leases.items.into_iter().filter(|lease| is_abandoned(lease, now)).take(SWEEP_DELETES) {
            deleted += usize::from(self.delete_lease(lease).await?);
        }
        Ok(deleted)
    }

    /// Deletes the Lease in exactly this version; `false` when the Lease is gone or was renewed.
    async fn delete_lease(&self, lease: Lease) -> Result<bool, ClaimError> {
        let ObjectMeta { name: Some(name), uid, resource_version, .. } = lease.metadata else { return Ok(false) };
        let params = DeleteParams::default().preconditions(Preconditions { resource_version, uid });
        match call(CLAIM_TIMEOUT, self.leases().delete(&name, &params)).await {
            Ok(_) => Ok(true),
            Err(ApiError::NotFound(_) | ApiError::Conflict(_)) => Ok(false),
            Err(failure) => Err(failure.into()),
        }
    }

    async fn lease(&self, digest: Digest) -> Result<Option<Lease>, ClaimError> {
        Ok(call(CLAIM_TIMEOUT, self.leases().get_opt(&lease_name(digest))).await?)
    }

    fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), &self.agent_pod.k8s_namespace)
    }

    /// The Lease with this node as holder, to create or to replace the version `read`.
    fn build_lease(
        &self,
        digest: Digest,
        version: Option<&LeaseVersion>,
        now: SystemTime,
    ) -> Result<Lease, ClaimError> {
        let (resource_version, uid) = match version {
            Some(version) => version
                .0
                .split_once('/')
                .map(|(v, u)| (Some(v.to_owned()), Some(u.to_owned())))
                .ok_or(ClaimError::Lost)?,
            None => (None, None),
        };
        let renewed = Timestamp::try_from(now).map_err(|error| ClaimError::Unavailable(error.to_string()))?;
        let (key, value) = LABEL;
        Ok(Lease {
            metadata: ObjectMeta {
                name: Some(lease_name(digest)),
                labels: Some([(key.to_owned(), value.to_owned())].into()),
                resource_version,
                uid,
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.agent_pod.node.to_string()),
                lease_duration_seconds: Some(LEASE_SECONDS),
                renew_time: Some(MicroTime(renewed)),
                ..LeaseSpec::default()
            }),
        })
    }
}

#[async_trait]
impl Claims for KubeCluster {
    async fn read(&self, digest: Digest) -> Result<Option<LeaseSnapshot>, ClaimError> {
        Ok(self.lease(digest).await?.map(|lease| {
            let spec = lease.spec.unwrap_or_default();
            LeaseSnapshot {
                holder: spec.holder_identity,
                renewed: spec.renew_time.map(|MicroTime(time)| time.into()),
                version: lease_version(lease.metadata),
            }
        }))
    }

    async fn create(&self, digest: Digest, now: SystemTime) -> Result<(), ClaimError> {
        let lease = self.build_lease(digest, None, now)?;
        call(CLAIM_TIMEOUT, self.leases().create(&PostParams::default(), &lease)).await?;
        Ok(())
    }

    async fn update(&self, digest: Digest, version: &LeaseVersion, now: SystemTime) -> Result<(), ClaimError> {
        let lease = self.build_lease(digest, Some(version), now)?;
        call(CLAIM_TIMEOUT, self.leases().replace(&lease_name(digest), &PostParams::default(), &lease)).await?;
        Ok(())
    }

    async fn release(&self, digest: Digest) -> Result<(), ClaimError> {
        let Some(lease) = self.lease(digest).await? else { return Ok(()) };
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        if holder == Some(self.agent_pod.node.as_str()) {
            self.delete_lease(lease).await?;
        }
        Ok(())
    }
}

/// The fence of an update: the resource version and the UID. The API server creates a Lease by an
/// update too, so the version alone would restore a Lease that was deleted.
fn lease_version(metadata: ObjectMeta) -> LeaseVersion {
    LeaseVersion(format!("{}/{}", metadata.resource_version.unwrap_or_default(), metadata.uid.unwrap_or_default()))
}

/// Half of the digest distinguishes images, and the name stays readable in `kubectl get leases`.
fn lease_name(digest: Digest) -> String {
    format!("lighterman-{}", &digest.hex()[..32])
}

fn is_abandoned(lease: &Lease, now: SystemTime) -> bool {
    let renewed = lease.spec.as_ref().and_then(|spec| spec.renew_time.as_ref()).map(|time| time.0);
    // The age of a Lease without a renewal counts from its creation.
    let since = renewed.or(lease.metadata.creation_timestamp.as_ref().map(|time| time.0));
    since.is_some_and(|since| now.duration_since(since.into()).is_ok_and(|age| age > ABANDONED_AFTER))
}
