//! Admission by certificates of an operator's authority.

use std::os::unix::fs::PermissionsExt;

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};

use super::*;
use crate::admission::{CertificateAdmission, CertificateFiles};
use crate::ports::DialError;

struct TestAuthority {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl TestAuthority {
    fn new() -> Self {
        let (mut params, key) = (CertificateParams::default(), KeyPair::generate().unwrap());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self { certificate: params.self_signed(&key).unwrap(), key }
    }

    /// An agent with a certificate of this authority, which trusts no other authority.
    fn agent(&self, store: TestStore) -> TransferTestNode {
        let (identity, key, folder) =
            (Identity::generate(), KeyPair::generate().unwrap(), tempfile::tempdir().unwrap());
        let params = CertificateParams::new(vec!["lighterman".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.certificate, &self.key).unwrap();
        let write = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            path
        };
        let files = CertificateFiles {
            certificate: write("tls.crt", certificate.pem()),
            key: write("tls.key", key.serialize_pem()),
            authority: write("ca.crt", self.certificate.pem()),
            name: "lighterman".to_owned(),
        };
        // The agent reads the files at once, so the folder may be removed.
        let admission = CertificateAdmission::open(files, identity.peer_id()).unwrap();
        TransferTestNode::start_with(&identity, store, admission, Timeouts::DEFAULT)
    }
}

#[tokio::test]
async fn agents_of_one_authority_admit_each_other_and_reject_an_agent_of_another_authority() {
    with_deadline(async {
        let (ours, theirs) = (TestAuthority::new(), TestAuthority::new());
        let blob = blob(1000);
        let [mut a, b] = [(); 2].map(|()| ours.agent(TestStore::with(&blob)));
        let outsider = theirs.agent(TestStore::with(&blob));

        b.dial(a.address()).await;
        let admitted = a.admitted_peers.recv().await.unwrap();
        assert_eq!(admitted.id, b.id);
        b.fetch(a.id, Digest::of(&blob), 1000).await.unwrap();
        a.fetch(b.id, Digest::of(&blob), 1000).await.unwrap();

        for [dialer, listener] in [[&outsider, &a], [&a, &outsider]] {
            let error = dialer.transfer.dial(listener.address(), None).await.unwrap_err();
            let DialError::Rejected { peer, reason, .. } = &error else { panic!("{error}") };
            assert_eq!(*peer, listener.id);
            assert!(reason.starts_with("not admitted: the certificate is not good for this cluster"), "{reason}");
        }
        assert_eq!((a.transfer.peers().len(), outsider.transfer.peers().len()), (1, 0));
        assert!(a.metric(r#"admissions_total{result="denied"} 1"#));
    })
    .await;
}
