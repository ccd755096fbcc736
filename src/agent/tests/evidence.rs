//! Evidence of a registry's outage, and the images that a pod may have while one lasts.

use std::collections::BTreeMap;

use super::needs::{pending, waiting};
use super::salvaging::{REFUSED, Watch, failing, reports};
use super::*;
use crate::ports::{KubeletEvent, RegistryError, ReportKind};

/// Messages of faults that are no registry's, and of a registry that sent wrong bytes.
const NO_OUTAGE: [&str; 4] = [
    "failed to pull and unpack image \"r.test/other:1\": failed to extract layer sha256:44: unexpected EOF",
    "rpc error: code = Unavailable desc = error reading from server: EOF",
    "failed to pull and unpack image \"r.test/other:1\": failed commit on ref \"layer-sha256:44\": unexpected commit digest sha256:45, \
     expected sha256:44: failed precondition",
    "pull QPS exceeded",
];

#[tokio::test(start_paused = true)]
async fn a_fault_of_this_node_is_no_outage_of_a_registry_and_decides_no_tag() {
    for message in NO_OUTAGE {
        let harbour = Harbour::new();
        harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
        let watch = Watch::start(&harbour);
        watch.sees(failing("one", "r.test/other:1", message)).await;
        watch.sees(failing("two", "r.test/other:2", message)).await;
        watch.sees(pending("early", IMAGE)).await;
        watch.rest().await;
        assert!(harbour.record_names().await.is_empty(), "{message}");
        assert!(watch.outages.borrow().is_empty(), "nothing is announced: {message}");
        watch.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_pull_through_containerd_ends_the_outage_and_a_recovery_does_not() {
    outage_ends_with(|mut records| {
        records.insert("r.test/pulled:1".to_owned(), Digest::of(b"pulled"));
        records
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_pull_that_moves_a_recovered_tag_ends_the_outage() {
    outage_ends_with(|mut records| {
        records.insert("r.test/other:1".to_owned(), Digest::of(b"moved"));
        records
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_tag_is_not_recovered_early_after_a_mirror_answered_a_pull() {
    let absent =
        "failed to pull and unpack image \"r.test/other:2\": failed to resolve image: r.test/other:2: not found";
    for (is_answered, is_early) in [(false, true), (true, false)] {
        let harbour = Harbour::new();
        harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
        let watch = Watch::start(&harbour);
        watch.names_in.send_replace(Some(Arc::default()));
        watch.sees(failing("one", "r.test/other:1", REFUSED)).await;
        watch.sees(failing("two", "r.test/other:2", REFUSED)).await;
        watch.rest().await;
        if is_answered {
            watch.sees(failing("two", "r.test/other:2", absent)).await;
            watch.rest().await;
        }
        watch.sees(pending("early", IMAGE)).await;
        watch.rest().await;
        assert_eq!(harbour.record_names().await.contains(&IMAGE.to_owned()), is_early);
        assert_eq!(watch.outages.borrow().len(), 1, "other hosts of the registry may still be down");
        watch.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_pull_is_as_old_as_the_status_even_when_the_api_server_answers_late() {
    for (delay, is_early) in [(1, true), (20, false)] {
        let harbour = Harbour::new();
        harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
        let watch = Watch::start(&harbour);
        watch.names_in.send_replace(Some(Arc::default()));
        harbour.cluster.delay_namespaces(std::time::Duration::from_secs(delay));
        watch.sees(failing("one", "r.test/other:1", REFUSED)).await;
        watch.sees(failing("two", "r.test/other:2", REFUSED)).await;
        tokio::time::sleep(std::time::Duration::from_secs(delay)).await;
        harbour.cluster.delay_namespaces(std::time::Duration::ZERO);
        watch.rest().await;
        watch.sees(pending("early", IMAGE)).await;
        watch.rest().await;
        assert_eq!(harbour.record_names().await.contains(&IMAGE.to_owned()), is_early, "{delay} s");
        watch.stop().await;
    }
}

/// Recovers an image in an outage, which does not end the outage; then containerd's records become what `pulled` makes of them.
async fn outage_ends_with(pulled: impl FnOnce(BTreeMap<String, Digest>) -> BTreeMap<String, Digest>) {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.peer_with(2, "r.test/other:1", Behaviour::Honest).await;
    let watch = Watch::start(&harbour);
    watch.rest().await;
    watch.names_in.send_replace(Some(Arc::default()));
    for (pod, image) in [("one", "r.test/other:1"), ("two", "r.test/other:2")] {
        watch.sees(failing(pod, image, REFUSED)).await;
    }
    watch.rest().await;
    let records = harbour.store.images().await.unwrap();
    let recovered: BTreeMap<_, _> = records.into_iter().map(|record| (record.name, record.target.digest)).collect();
    assert!(recovered.contains_key("r.test/other:1"));
    watch.names_in.send_replace(Some(Arc::new(recovered.clone())));
    watch.rest().await;
    assert_eq!(watch.outages.borrow().len(), 1, "the agent wrote these names itself");
    watch.names_in.send_replace(Some(Arc::new(pulled(recovered))));
    watch.rest().await;
    assert!(watch.outages.borrow().is_empty(), "a pull succeeded");
    watch.sees(pending("early", IMAGE)).await;
    watch.rest().await;
    assert!(!harbour.record_names().await.contains(&IMAGE.to_owned()), "the kubelet tries first");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_message_that_cannot_be_read_is_told_once_with_its_text() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let watch = Watch::start(&harbour);
    for reason in ["ErrImagePull", "ImagePullBackOff", "ErrImagePull"] {
        let mut pod = failing("p", IMAGE, "");
        pod.containers[0].waiting = waiting(reason, "the moon is in the wrong house");
        watch.sees(pod).await;
    }
    watch.rest().await;
    let reports = harbour.cluster.reports();
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert_eq!(reports[0].1.kind, ReportKind::NotUnderstood);
    assert!(reports[0].1.note.contains("the moon is in the wrong house"), "{}", reports[0].1.note);
    assert!(harbour.record_names().await.is_empty());
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_tags_event_says_what_it_was_taken_for_since_when_and_that_the_registry_was_not_asked() {
    let harbour = Harbour::new();
    let root = harbour.peer_with(1, IMAGE, Behaviour::Honest).await.root.digest;
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    assert_eq!(watch.nudged().await, "p");
    watch.rest().await;
    let note = harbour.cluster.reports()[0].1.note.clone();
    for said in [root.to_string().as_str(), "its registry was not asked", "has failed since "] {
        assert!(note.contains(said), "{said}: {note}");
    }
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_gets_only_what_its_namespaces_list_of_repositories_has() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.peer_with(2, "r.test/bank/vault:1", Behaviour::Honest).await;
    let listed = [("lighterman.dev/allow", "true"), ("lighterman.dev/repositories", "r.test/shop/*")];
    harbour.cluster.put_namespace("shop", &listed);
    let watch = Watch::start(&harbour);
    watch.sees(failing("thief", "r.test/bank/vault:1", REFUSED)).await;
    watch.sees(failing("honest", IMAGE, REFUSED)).await;
    watch.rest().await;
    let names = harbour.record_names().await;
    assert!(names.contains(&IMAGE.to_owned()) && !names.iter().any(|name| name.contains("vault")), "{names:?}");
    assert!(reports(&harbour).contains(&("thief".to_owned(), ReportKind::NotActionable)));
    watch.stop().await;
}

/// An Event of the kubelet about the only container.
fn said(message: String) -> KubeletEvent {
    KubeletEvent { reason: "Pulling".into(), container: Some("c".into()), message }
}

#[tokio::test(start_paused = true)]
async fn a_pull_that_does_not_end_brings_a_digest_and_is_told_once() {
    for (is_digest, expected) in [(true, true), (false, false)] {
        let harbour = Harbour::new();
        let root = harbour.peer_with(1, IMAGE, Behaviour::Honest).await.root.digest;
        let image = if is_digest { format!("r.test/shop/checkout@{root}") } else { IMAGE.to_owned() };
        let pod = pending("p", &image);
        harbour.cluster.put_kubelet_event(&pod.pod, said(format!("Pulling image \"{image}\"")));
        let watch = Watch::start(&harbour);
        watch.sees(pod).await;
        tokio::time::sleep(std::time::Duration::from_secs(110)).await;
        assert!(harbour.record_names().await.is_empty() && reports(&harbour).is_empty(), "a pull may take a while");
        tokio::time::sleep(std::time::Duration::from_secs(600)).await;
        assert_eq!(!harbour.record_names().await.is_empty(), expected, "{image}");
        let stalled = reports(&harbour).iter().filter(|(_, kind)| *kind == ReportKind::Stalled).count();
        assert_eq!(stalled, 1, "{image}: {:?}", reports(&harbour));
        watch.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_waits_for_something_else_is_not_told_of_a_stalled_pull() {
    let harbour = Harbour::new();
    let root = harbour.peer_with(1, IMAGE, Behaviour::Honest).await.root.digest;
    let image = format!("r.test/shop/checkout@{root}");
    let pod = pending("p", &image);
    harbour.cluster.put_kubelet_event(&pod.pod, said(format!("Pulling image \"{image}\"")));
    harbour.cluster.put_kubelet_event(&pod.pod, said(format!("Successfully pulled image \"{image}\" in 2s")));
    let watch = Watch::start(&harbour);
    watch.sees(pod).await;
    tokio::time::sleep(std::time::Duration::from_secs(600)).await;
    assert!(harbour.record_names().await.is_empty() && reports(&harbour).is_empty());
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_kubelet_that_verifies_credentials_is_told_of_once_and_not_nudged_for_ever() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let mut watch = Watch::start(&harbour);
    watch.sees(failing("p", IMAGE, REFUSED)).await;
    assert_eq!(watch.nudged().await, "p");
    // The image is here, and the kubelet goes on pulling.
    for reason in ["ImagePullBackOff", "ErrImagePull"].repeat(10) {
        tokio::time::sleep(std::time::Duration::from_secs(30)).await;
        let mut pod = failing("p", IMAGE, REFUSED);
        pod.containers[0].waiting = waiting(reason, REFUSED);
        watch.sees(pod).await;
    }
    let told: Vec<_> = reports(&harbour).into_iter().map(|(_, kind)| kind).collect();
    assert_eq!(told, [ReportKind::Salvaged, ReportKind::NotActionable]);
    let note = harbour.cluster.reports()[1].1.note.clone();
    assert!(note.contains("verifies the pod's credentials"), "{note}");
    assert!(watch.nudges.try_recv().is_err(), "another nudge would not help");
    watch.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_registry_of_images_that_are_here_is_asked_before_it_fails_so_that_its_silence_counts() {
    for has_images in [true, false] {
        let harbour = Harbour::new();
        harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
        harbour.registry.put_registry("r.test");
        let watch = Watch::start(&harbour);
        let names = if has_images { vec!["r.test/here:1".to_owned()] } else { Vec::new() };
        let records = names.into_iter().map(|name| (name, Digest::of(b"here"))).collect();
        watch.names_in.send_replace(Some(Arc::new(records)));
        watch.rest().await;
        let down = RegistryError::Down { registry: "r.test".into(), kind: crate::model::OutageKind::TimedOut };
        harbour.registry.set_failure("r.test", Some(down));
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;
        // The failed pull of a pod that did not opt in is evidence as well.
        let stranger = failing("stranger", "r.test/other:1", REFUSED);
        watch.sees(crate::model::PodView { annotations: Default::default(), ..stranger }).await;
        watch.sees(pending("early", IMAGE)).await;
        tokio::time::sleep(std::time::Duration::from_secs(15)).await;
        assert_eq!(harbour.record_names().await.contains(&IMAGE.to_owned()), has_images);
        watch.stop().await;
    }
}

const HOUR: std::time::Duration = std::time::Duration::from_secs(3600);

#[tokio::test(start_paused = true)]
async fn a_registry_that_has_never_answered_is_asked_again_every_ten_minutes() {
    let harbour = Harbour::new();
    harbour.registry.put_registry("r.test");
    let down = RegistryError::Down { registry: "r.test".into(), kind: crate::model::OutageKind::TimedOut };
    harbour.registry.set_failure("r.test", Some(down));
    let watch = Watch::start(&harbour);
    watch.names_in.send_replace(Some(Arc::new([(IMAGE.to_owned(), Digest::of(b"here"))].into())));
    tokio::time::sleep(HOUR - std::time::Duration::from_secs(10)).await;
    assert_eq!(harbour.registry.pings("r.test"), 6);
    assert!(watch.outages.borrow().is_empty(), "its silence says nothing");
    harbour.registry.set_failure("r.test", None);
    tokio::time::sleep(2 * HOUR).await;
    assert_eq!(harbour.registry.pings("r.test"), 7, "one answer is enough");
}
