use std::os::unix::fs::OpenOptionsExt;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P384_SHA384, PKCS_ED25519, date_time_ymd,
};
use tempfile::TempDir;

use super::*;

fn peer(n: u8) -> PeerId {
    PeerId::from_public_key([n; 32])
}

/// A certificate authority.
struct Issuer {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Issuer {
    fn params() -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    }

    fn root() -> Self {
        let key = KeyPair::generate().unwrap();
        Self { certificate: Self::params().self_signed(&key).unwrap(), key }
    }

    fn below(&self) -> Self {
        let key = KeyPair::generate().unwrap();
        Self { certificate: Self::params().signed_by(&key, &self.certificate, &self.key).unwrap(), key }
    }

    fn issue(&self, params: CertificateParams, key: &KeyPair) -> String {
        params.signed_by(key, &self.certificate, &self.key).unwrap().pem()
    }
}

fn for_name(name: &str) -> CertificateParams {
    CertificateParams::new(vec![name.to_owned()]).unwrap()
}

fn write(path: &Path, text: &str) {
    let _ = std::fs::remove_file(path);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
    io::Write::write_all(&mut file, text.as_bytes()).unwrap();
}

/// Writes the files of an agent, and returns their paths.
fn files(folder: &TempDir, chain: &str, key: &KeyPair, authority: &Issuer) -> CertificateFiles {
    let at = |name: &str| folder.path().join(name);
    write(&at("tls.crt"), chain);
    write(&at("tls.key"), &key.serialize_pem());
    write(&at("ca.crt"), &authority.certificate.pem());
    CertificateFiles {
        certificate: at("tls.crt"),
        key: at("tls.key"),
        authority: at("ca.crt"),
        name: "lighterman".into(),
    }
}

/// An agent with a good certificate.
fn agent(authority: &Issuer, n: u8) -> (TempDir, CertificateAdmission) {
    let (folder, key) = (tempfile::tempdir().unwrap(), KeyPair::generate().unwrap());
    let files = files(&folder, &authority.issue(for_name("lighterman"), &key), &key, authority);
    (folder, CertificateAdmission::open(files, peer(n)).unwrap())
}

/// Why an agent with these certificates would not be admitted.
fn rejection_of(params: CertificateParams, signer: &Issuer, authority: &Issuer) -> CertificateRejection {
    let (folder, key) = (tempfile::tempdir().unwrap(), KeyPair::generate().unwrap());
    let files = files(&folder, &signer.issue(params, &key), &key, authority);
    match CertificateAdmission::open(files, peer(1)) {
        Err(CertificateFilesError::Rejected(rejection)) => rejection,
        other => panic!("{:?}", other.map(drop)),
    }
}

#[tokio::test]
async fn an_agent_with_a_certificate_of_the_authority_is_admitted_by_its_own_key_alone() {
    let authority = Issuer::root();
    let ((_one, a), (_other, b)) = (agent(&authority, 1), agent(&authority, 2));
    let credential = a.credential().await.unwrap();
    let admitted = b.admit(peer(1), &credential).await.unwrap();
    assert!(
        admitted.valid_until > unix_time()
            && admitted.valid_until <= unix_time() + STATEMENT_LIFE
            && !admitted.is_in_grace
    );
    assert_eq!(b.admit_relayed(peer(1), &credential), Ok(admitted));
    assert_eq!(
        b.admit_relayed(peer(3), &credential),
        Err(Rejection::Denied(CertificateRejection::Signature.to_string()))
    );
}

#[test]
fn every_usual_kind_of_key_and_either_purpose_is_accepted() {
    let authority = Issuer::root();
    let purpose = |purpose| {
        let mut params = for_name("lighterman");
        params.extended_key_usages = vec![purpose];
        params
    };
    let server = purpose(ExtendedKeyUsagePurpose::ServerAuth);
    let client = purpose(ExtendedKeyUsagePurpose::ClientAuth);
    for (params, kind) in [(server, &PKCS_ECDSA_P384_SHA384), (client, &PKCS_ED25519)] {
        let (folder, key) = (tempfile::tempdir().unwrap(), KeyPair::generate_for(kind).unwrap());
        let files = files(&folder, &authority.issue(params, &key), &key, &authority);
        CertificateAdmission::open(files, peer(1)).unwrap();
    }
    let mail = purpose(ExtendedKeyUsagePurpose::EmailProtection);
    assert!(matches!(
        rejection_of(mail, &authority, &authority),
        CertificateRejection::Chain("a certificate is for another purpose")
    ));
}

#[test]
fn another_authority_another_name_and_an_expired_certificate_are_rejected() {
    let authority = Issuer::root();
    let rejection = rejection_of(for_name("lighterman"), &Issuer::root(), &authority);
    assert!(matches!(rejection, CertificateRejection::Chain(_)), "{rejection}");
    assert_eq!(rejection_of(for_name("web.shop.svc"), &authority, &authority), CertificateRejection::Name);
    let mut expired = for_name("lighterman");
    (expired.not_before, expired.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    assert_eq!(rejection_of(expired, &authority, &authority), CertificateRejection::Chain("a certificate has expired"));
}

#[test]
fn a_statement_is_rejected_after_an_hour_and_before_its_time() {
    let authority = Issuer::root();
    let (_folder, agent) = agent(&authority, 1);
    let signed = agent.signed_credential();
    let at = |seconds: i64| {
        let now = Duration::from_secs(signed.issued.as_secs().strict_add_signed(seconds));
        verify(signed.credential.expose(), peer(1), &signed.authority, now)
    };
    assert!(at(3660).is_ok() && at(-60).is_ok(), "clocks may differ by a minute");
    assert_eq!(at(3661), Err(CertificateRejection::Expired));
    assert_eq!(at(-62), Err(CertificateRejection::TooEarly));
    // A changed time invalidates the signature.
    let later = signed.issued.as_secs() + 3600;
    let text = signed.credential.expose().replacen(&signed.issued.as_secs().to_string(), &later.to_string(), 1);
    let later = Duration::from_secs(later);
    assert_eq!(verify(&text, peer(1), &signed.authority, later), Err(CertificateRejection::Signature));
}

#[test]
fn a_chain_is_bounded() {
    let (root, key) = (Issuer::root(), KeyPair::generate().unwrap());
    let mut issuers = vec![root.below()];
    for _ in 0..3 {
        issuers.push(issuers.last().unwrap().below());
    }
    let open = |intermediates: &[Issuer]| {
        let folder = tempfile::tempdir().unwrap();
        let leaf = intermediates.last().unwrap().issue(for_name("lighterman"), &key);
        let chain: String = intermediates.iter().rev().map(|issuer| issuer.certificate.pem()).collect();
        CertificateAdmission::open(files(&folder, &(leaf + &chain), &key, &root), peer(1))
    };
    open(&issuers[..3]).unwrap();
    assert!(matches!(open(&issuers), Err(CertificateFilesError::Rejected(CertificateRejection::TooLong))));
}

#[test]
fn a_malformed_credential_is_rejected() {
    let authority = Issuer::root();
    let (_folder, agent) = agent(&authority, 1);
    let good = agent.signed_credential().credential.expose().to_owned();
    let check = |text: &str| verify(text, peer(1), &agent.signed_credential().authority, unix_time());
    assert_eq!(check(""), Err(CertificateRejection::Absent));
    assert_eq!(check(&"a".repeat(MAX_BYTES + 1)), Err(CertificateRejection::TooLong));
    for garbage in [
        "x",
        "a.b.c",
        "certificate-1.0.0..",
        &good[..good.len() / 2],
        "é",
        &good.replace("certificate-1", "certificate-2"),
    ] {
        assert!(check(garbage).is_err(), "{garbage}");
    }
    let hello = crate::wire::Hello {
        credential: Credential::new("a".repeat(MAX_BYTES)),
        node: "n".repeat(253),
        gossip_port: 1,
        observed_address: [0xffff_u16; 8].into(),
    };
    crate::wire::encode(&hello).expect("the longest credential and the longest name have room in an introduction");
}

#[test]
fn a_key_that_others_can_read_is_not_used_and_the_error_names_a_bad_file() {
    let authority = Issuer::root();
    let (folder, agent) = agent(&authority, 1);
    let files = agent.files.clone();
    std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o640)).unwrap();
    let open = || CertificateAdmission::open(files.clone(), peer(1)).map(drop).unwrap_err();
    assert!(matches!(open(), CertificateFilesError::Exposed { mode: 0o640, .. }));
    write(&files.key, "no key");
    let message = open().to_string();
    assert!(message.contains("tls.key") && !message.contains("no key:"), "{message}");
    std::fs::remove_file(folder.path().join("ca.crt")).unwrap();
    assert!(matches!(open(), CertificateFilesError::Io { path, .. } if path == files.authority));
}

#[tokio::test]
async fn a_replaced_certificate_is_used_and_a_wrong_certificate_is_not() {
    let authority = Issuer::root();
    let (folder, agent) = agent(&authority, 1);
    let (first, changes) = (agent.credential().await.unwrap(), agent.credential_changes());
    agent.reload(unix_time()).unwrap();
    assert!(!changes.has_changed().unwrap(), "the files are unchanged");
    let key = KeyPair::generate().unwrap();
    write(&folder.path().join("tls.key"), &key.serialize_pem());
    assert!(
        matches!(agent.reload(unix_time()), Err(CertificateFilesError::Rejected(CertificateRejection::Signature))),
        "the key is new and the certificate old"
    );
    assert!(!changes.has_changed().unwrap() && agent.credential().await.unwrap() == first);
    write(&folder.path().join("tls.crt"), &authority.issue(for_name("lighterman"), &key));
    agent.reload(unix_time()).unwrap();
    assert!(changes.has_changed().unwrap() && agent.credential().await.unwrap() != first);
    let second = agent.credential().await.unwrap();
    agent.reload(unix_time() + RESIGN_AFTER).unwrap();
    assert_ne!(agent.credential().await.unwrap(), second, "the statement is renewed in time");
}
