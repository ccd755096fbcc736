//! Claims are Leases.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::ListParams;
use lighterman::api_server::{Config, connect};
use lighterman::cluster::KubeCluster;
use lighterman::oci::Digest;
use lighterman::ports::{ClaimError, Claims};

use super::apiserver::{KubeNamespace, create, with_deadline};

fn digest() -> Digest {
    Digest::of(b"an image")
}

async fn agent_on(kube: &KubeNamespace, node: &str) -> KubeCluster {
    KubeCluster::new(&connect(Config { node: node.parse().unwrap(), ..kube.config() }).await.unwrap())
}

fn leases(kube: &KubeNamespace) -> Api<Lease> {
    Api::namespaced(kube.admin.clone(), &kube.name)
}

/// The time to the microsecond, which is the precision of a Lease.
fn now() -> SystemTime {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    SystemTime::UNIX_EPOCH + Duration::from_micros(now.as_micros().try_into().unwrap())
}

#[tokio::test]
async fn only_one_of_two_agents_creates_a_claim() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let (a, b) = (agent_on(&kube, "a").await, agent_on(&kube, "b").await);
        let now = now();
        assert_eq!(a.read(digest()).await.unwrap(), None);
        a.create(digest(), now).await.unwrap();
        assert!(matches!(b.create(digest(), now).await, Err(ClaimError::Lost)));
        let read = b.read(digest()).await.unwrap().unwrap();
        assert_eq!((read.holder.as_deref(), read.renewed), (Some("a"), Some(now)));
        let lease = leases(&kube).get(&format!("lighterman-{}", &digest().hex()[..32])).await.unwrap();
        assert_eq!(lease.spec.unwrap().lease_duration_seconds, Some(15));
        assert_eq!(lease.metadata.labels.unwrap()["app.kubernetes.io/name"], "lighterman");
    })
    .await;
}

#[tokio::test]
async fn an_update_of_an_older_lease_version_loses() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let (a, b) = (agent_on(&kube, "a").await, agent_on(&kube, "b").await);
        let begun = now();
        a.create(digest(), begun).await.unwrap();
        let read = a.read(digest()).await.unwrap().unwrap();
        let later = begun + Duration::from_secs(5);
        a.update(digest(), &read.version, later).await.unwrap();
        assert_eq!(a.read(digest()).await.unwrap().unwrap().renewed, Some(later));
        assert!(matches!(b.update(digest(), &read.version, later).await, Err(ClaimError::Lost)));
        let current = b.read(digest()).await.unwrap().unwrap();
        b.update(digest(), &current.version, later).await.unwrap();
        assert_eq!(a.read(digest()).await.unwrap().unwrap().holder.as_deref(), Some("b"));
        // A claim that was deleted after the read counts as changed.
        let read = b.read(digest()).await.unwrap().unwrap();
        b.release(digest()).await.unwrap();
        assert!(matches!(a.update(digest(), &read.version, later).await, Err(ClaimError::Lost)));
        assert_eq!(a.read(digest()).await.unwrap(), None, "the update does not recreate the claim");
    })
    .await;
}

#[tokio::test]
async fn only_the_holder_releases_a_claim() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let (a, b) = (agent_on(&kube, "a").await, agent_on(&kube, "b").await);
        a.create(digest(), now()).await.unwrap();
        b.release(digest()).await.unwrap();
        assert!(a.read(digest()).await.unwrap().is_some());
        a.release(digest()).await.unwrap();
        assert_eq!(a.read(digest()).await.unwrap(), None);
        a.release(digest()).await.unwrap();
        b.create(digest(), now()).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn abandoned_claims_are_swept_a_few_at_a_time() {
    with_deadline(async {
        let kube = KubeNamespace::new().await;
        let agent = agent_on(&kube, "a").await;
        let now = now();
        let hours_ago = |hours: u64| now - Duration::from_secs(hours * 3600 + 60);
        for i in 0..25_u8 {
            agent.create(Digest::of(&[i]), hours_ago(1)).await.unwrap();
        }
        agent.create(digest(), hours_ago(0)).await.unwrap();
        let foreign = serde_json::json!({
            "metadata": { "name": "of-another-program" },
            "spec": { "holderIdentity": "x", "leaseDurationSeconds": 1, "renewTime": "2001-01-01T00:00:00.000000Z" },
        });
        create(&leases(&kube), foreign).await;
        assert_eq!(agent.delete_abandoned_claims(now).await.unwrap(), 20);
        assert_eq!(agent.delete_abandoned_claims(now).await.unwrap(), 5);
        assert_eq!(agent.delete_abandoned_claims(now).await.unwrap(), 0);
        let left = leases(&kube).list(&ListParams::default()).await.unwrap().items.len();
        assert_eq!(left, 2, "the current claim and the foreign Lease stay");
    })
    .await;
}
