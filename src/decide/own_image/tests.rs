use super::*;

const DIGEST: &str = "@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn image(text: &str) -> Reference {
    format!("r.test/lighterman{text}").parse().unwrap()
}

fn images(texts: &[&str]) -> BTreeSet<Reference> {
    texts.iter().map(|text| image(text)).collect()
}

fn own(current: &[&str], template: Option<&[&str]>) -> OwnImages {
    OwnImages { current: images(current), template: template.map(images), pull_secrets: Vec::new() }
}

/// Protected by this program.
fn ours(texts: &[&str]) -> Protection {
    Protection { ours: images(texts), others: BTreeSet::new() }
}

const GOOD: OwnImageSituation =
    OwnImageSituation { is_switched_off: false, may_import: true, has_provider: true, is_backing_off: false };

#[test]
fn a_digest_is_fetched_from_peers_and_a_tag_is_resolved_at_its_registry() {
    assert_eq!(own_image_step(&image(DIGEST), GOOD), OwnImageStep::Fetch);
    assert_eq!(own_image_step(&image(":v2"), GOOD), OwnImageStep::AskRegistry);
    assert_eq!(own_image_step(&image(&format!(":v2{DIGEST}")), GOOD), OwnImageStep::Fetch, "the digest decides");
}

#[test]
fn no_situation_lets_a_tag_be_fetched_without_its_registry() {
    for bits in 0..16_u8 {
        let is = |bit: u8| bits & (1 << bit) != 0;
        let situation =
            OwnImageSituation { is_switched_off: is(0), may_import: is(1), has_provider: is(2), is_backing_off: is(3) };
        assert_ne!(own_image_step(&image(":v2"), situation), OwnImageStep::Fetch, "{situation:?}");
    }
}

#[test]
fn a_limit_or_a_lack_of_providers_makes_the_image_wait() {
    for (situation, cause) in [
        (OwnImageSituation { is_switched_off: true, ..GOOD }, OwnImageWait::SwitchedOff),
        (OwnImageSituation { may_import: false, ..GOOD }, OwnImageWait::NoImports),
        (OwnImageSituation { has_provider: false, ..GOOD }, OwnImageWait::NoProvider),
        (OwnImageSituation { is_backing_off: true, ..GOOD }, OwnImageWait::BackingOff),
        // The operator's switch comes first: no other change would help.
        (
            OwnImageSituation { is_switched_off: true, may_import: false, has_provider: false, is_backing_off: true },
            OwnImageWait::SwitchedOff,
        ),
    ] {
        for name in [DIGEST, ":v2"] {
            assert_eq!(own_image_step(&image(name), situation), OwnImageStep::Wait(cause), "{name} {situation:?}");
        }
    }
}

#[test]
fn images_of_the_template_without_a_record_are_missing() {
    let own = own(&[":v1"], Some(&[":v2", ":init"]));
    assert_eq!(own.missing(&images(&[":v1"])), images(&[":v2", ":init"]));
    assert_eq!(own.missing(&images(&[":v1", ":v2", ":other"])), images(&[":init"]));
}

#[test]
fn no_image_is_missing_while_the_template_is_not_known() {
    assert_eq!(own(&[":v1"], None).missing(&BTreeSet::new()), BTreeSet::new());
}

#[test]
fn the_current_and_the_next_image_are_protected_once_recorded() {
    let own = own(&[":v1"], Some(&[":v2"]));
    assert_eq!(protection_changes(&own, &images(&[":v1"]), &ours(&[])), [ProtectionChange::Protect(image(":v1"))]);
    let both = images(&[":v1", ":v2", ":v0"]);
    assert_eq!(protection_changes(&own, &both, &ours(&[":v1"])), [ProtectionChange::Protect(image(":v2"))]);
    assert_eq!(protection_changes(&own, &both, &ours(&[":v1", ":v2"])), []);
}

#[test]
fn an_image_that_neither_pod_nor_template_names_is_released() {
    let (recorded, protected) = (images(&[":v1", ":v2"]), ours(&[":v1", ":v2"]));
    assert_eq!(
        protection_changes(&own(&[":v2"], Some(&[":v2"])), &recorded, &protected),
        [ProtectionChange::Release(image(":v1"))]
    );
    // After a rollback the template names the first image again, and the pod still runs the second.
    assert_eq!(protection_changes(&own(&[":v2"], Some(&[":v1"])), &recorded, &protected), []);
}

#[test]
fn nothing_is_released_before_pod_and_template_are_known() {
    let (recorded, protected) = (images(&[":v1", ":v2"]), ours(&[":v1", ":v2"]));
    assert_eq!(protection_changes(&own(&[":v1"], None), &recorded, &protected), [], "the API server is down");
    assert_eq!(protection_changes(&own(&[], Some(&[":v3"])), &recorded, &protected), [], "the pod was not seen yet");
    assert_eq!(protection_changes(&own(&[], None), &recorded, &protected), []);
}

#[test]
fn a_large_cluster_reads_the_daemonset_at_the_rate_of_a_small_one() {
    for (agents, seconds) in [(0, 30), (3, 30), (600, 30), (1000, 50), (5000, 250)] {
        assert_eq!(read_interval(agents), Duration::from_secs(seconds), "{agents}");
    }
    assert!(read_interval(usize::MAX) > Duration::from_secs(3600), "no overflow");
}

#[test]
fn a_protection_by_another_program_is_neither_marked_nor_ended() {
    let protection = Protection { ours: BTreeSet::new(), others: images(&[":v1", ":v2"]) };
    assert_eq!(protection_changes(&own(&[":v2"], Some(&[":v2"])), &images(&[":v1", ":v2"]), &protection), []);
}
