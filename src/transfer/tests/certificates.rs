//! The door, with certificates of an operator's authority.

use std::os::unix::fs::PermissionsExt;

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};

use super::*;
use crate::admission::{CertificateAdmission, Files};
use crate::transfer::GreetError;

/// Somebody who issues certificates.
struct Authority {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Authority {
    fn new() -> Self {
        let (mut params, key) = (CertificateParams::default(), KeyPair::generate().unwrap());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self { certificate: params.self_signed(&key).unwrap(), key }
    }

    /// An agent with a certificate of this authority, which believes no other.
    fn agent(&self, shelf: Shelf) -> Node {
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
        let files = Files {
            certificate: write("tls.crt", certificate.pem()),
            key: write("tls.key", key.serialize_pem()),
            authority: write("ca.crt", self.certificate.pem()),
            name: "lighterman".to_owned(),
        };
        // It has read them; the folder may go.
        let admission = CertificateAdmission::open(files, identity.peer_id()).unwrap();
        Node::start_with(&identity, shelf, admission, Limits::DEFAULT)
    }
}

#[tokio::test]
async fn agents_of_one_authority_admit_each_other_and_refuse_one_of_another() {
    within(async {
        let (ours, theirs) = (Authority::new(), Authority::new());
        let blob = blob(1000);
        let [mut a, b] = [(); 2].map(|()| ours.agent(Shelf::with(&blob)));
        let stranger = theirs.agent(Shelf::with(&blob));

        b.meet(a.address()).await;
        let joined = a.joined.recv().await.unwrap();
        assert_eq!(joined.id, b.id);
        b.fetch(a.id, Digest::of(&blob), 1000).await.unwrap();
        a.fetch(b.id, Digest::of(&blob), 1000).await.unwrap();

        for [dialler, listener] in [[&stranger, &a], [&a, &stranger]] {
            let error = dialler.transfer.greet(listener.address(), None).await.unwrap_err();
            let GreetError::Refused { peer, reason, .. } = &error else { panic!("{error}") };
            assert_eq!(*peer, listener.id);
            assert!(reason.starts_with("not admitted: the certificate is not good for this cluster"), "{reason}");
        }
        assert_eq!((a.transfer.peers().len(), stranger.transfer.peers().len()), (1, 0));
        assert!(a.metric(r#"admissions_total{result="denied"} 1"#));
    })
    .await;
}
