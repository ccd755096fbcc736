use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

fn image(name: &str) -> IncompleteImage {
    IncompleteImage {
        manifest: Digest::of(name.as_bytes()),
        registry: "r.test".into(),
        secrets: BTreeSet::new(),
        has_providers: false,
        nodes: 1,
        is_healthy: true,
        fits: true,
    }
}

fn secrets(names: &[&str]) -> BTreeSet<SecretName> {
    names.iter().map(|name| ("shop".to_owned(), (*name).to_owned())).collect()
}

fn scheduler(now: Instant) -> FillScheduler {
    FillScheduler::new(FetchFrom::Registry, now, 1.0)
}

/// The fetch that begins for one node without members, with the longest pauses.
fn start_fill(scheduler: &mut FillScheduler, image: &IncompleteImage, now: Instant) -> Option<FillSource> {
    scheduler.start_next(std::slice::from_ref(image), 1, now, || 1.0).map(|(_, source)| source)
}

/// The first fetch that begins within `seconds`, with the second of its begin.
fn first(
    scheduler: &mut FillScheduler,
    image: &IncompleteImage,
    from: Instant,
    seconds: u64,
) -> Option<(u64, FillSource)> {
    (0..seconds).find_map(|second| Some((second, start_fill(scheduler, image, from + SECOND * second as u32)?)))
}

#[test]
fn peers_have_precedence_over_a_healthy_registry() {
    let start = Instant::now();
    let provided = IncompleteImage { has_providers: true, ..image("a") };
    assert_eq!(first(&mut scheduler(start), &provided, start, 600), Some((2, FillSource::Peers)));
    assert_eq!(first(&mut scheduler(start), &image("a"), start, 600), Some((20, FillSource::Registry)));
}

#[test]
fn a_registry_is_used_only_while_healthy_with_room_and_by_the_setting() {
    let start = Instant::now();
    let fetched = |from, image: &IncompleteImage| first(&mut FillScheduler::new(from, start, 0.0), image, start, 7200);
    let (lone, provided) = (image("a"), IncompleteImage { has_providers: true, ..image("a") });
    for never in
        [IncompleteImage { is_healthy: false, ..image("a") }, IncompleteImage { fits: false, ..provided.clone() }]
    {
        assert_eq!(fetched(FetchFrom::Registry, &never), None, "{never:?}");
    }
    assert_eq!(fetched(FetchFrom::Peers, &lone), None);
    assert_eq!(fetched(FetchFrom::Peers, &provided), Some((0, FillSource::Peers)));
    assert_eq!((fetched(FetchFrom::None, &lone), fetched(FetchFrom::None, &provided)), (None, None));
}

#[test]
fn only_a_single_image_is_fetched_at_a_time() {
    let start = Instant::now();
    let (mut scheduler, later) = (scheduler(start), start + HOUR);
    assert_eq!(
        start_fill(&mut scheduler, &IncompleteImage { has_providers: true, ..image("a") }, later),
        Some(FillSource::Peers)
    );
    assert_eq!(start_fill(&mut scheduler, &IncompleteImage { has_providers: true, ..image("b") }, later + HOUR), None);
    assert_eq!(scheduler.unfilled_reason(&image("a")), UnfilledReason::Fetching);
    scheduler.record_end(&image("a"), Ok(FillSource::Peers), later, 0.0);
    assert_eq!(
        start_fill(&mut scheduler, &IncompleteImage { has_providers: true, ..image("b") }, later),
        Some(FillSource::Peers)
    );
}

#[test]
fn the_registry_follows_where_peers_failed_and_nothing_where_the_disk_failed() {
    let start = Instant::now();
    let provided = IncompleteImage { has_providers: true, ..image("a") };
    for (failure, next) in [(FillFailure::Peers, Some(FillSource::Registry)), (FillFailure::Local, None)] {
        let mut scheduler = scheduler(start);
        let now = start + HOUR;
        assert_eq!(start_fill(&mut scheduler, &provided, now), Some(FillSource::Peers));
        scheduler.record_end(&provided, Err(failure), now, 0.0);
        assert_eq!(first(&mut scheduler, &provided, now, 600).map(|(_, source)| source), next, "{failure:?}");
        if next.is_none() {
            assert_eq!(start_fill(&mut scheduler, &provided, now + PEER_RETRY_DELAY), Some(FillSource::Peers));
        }
    }
}

#[test]
fn a_denied_image_is_counted_and_requested_again_with_a_new_secret_or_after_half_a_day() {
    let start = Instant::now();
    let denied = |unread, image: &IncompleteImage| {
        let mut scheduler = scheduler(start);
        assert_eq!(first(&mut scheduler, image, start, 60), Some((20, FillSource::Registry)));
        scheduler.record_end(image, Err(FillFailure::Denied { unread }), start, 0.0);
        scheduler
    };
    let with_secret = IncompleteImage { secrets: secrets(&["old"]), ..image("a") };
    let mut scheduler = denied(false, &with_secret);
    assert_eq!(scheduler.unfilled_reason(&with_secret), UnfilledReason::KubeletCredentials);
    assert_eq!(
        scheduler.unfilled_reason(&IncompleteImage { has_providers: true, ..with_secret.clone() }),
        UnfilledReason::Pending
    );
    assert_eq!(
        scheduler.unfilled_reason(&image("a")),
        UnfilledReason::KubeletCredentials,
        "a pod that ended brings no new secret"
    );
    let minutes = (30..700_u32).map(|minute| start + 60 * SECOND * minute);
    assert_eq!(minutes.clone().find_map(|at| start_fill(&mut scheduler, &with_secret, at)), None);
    let renewed = IncompleteImage { secrets: secrets(&["old", "new"]), ..image("a") };
    assert_eq!(first(&mut scheduler, &renewed, start + HOUR, 60), Some((10, FillSource::Registry)));

    let mut scheduler = denied(true, &with_secret);
    assert_eq!(scheduler.unfilled_reason(&with_secret), UnfilledReason::UnreadableSecret);
    assert_eq!(first(&mut scheduler, &with_secret, start + HOUR, 60), Some((10, FillSource::Registry)));
    scheduler.record_end(&with_secret, Err(FillFailure::Denied { unread: false }), start + HOUR, 0.0);
    assert_eq!(first(&mut scheduler, &with_secret, start + 12 * HOUR, 60), None);
    assert_eq!(first(&mut scheduler, &with_secret, start + 13 * HOUR, 60), Some((10, FillSource::Registry)));
}

#[test]
fn the_back_off_of_a_failing_registry_grows_and_covers_all_its_images() {
    let start = Instant::now();
    let (mut scheduler, mut now) = (scheduler(start), start + HOUR);
    let other = IncompleteImage { registry: "other.test".into(), ..image("c") };
    let mut pauses = Vec::new();
    for _ in 0..7 {
        let (waited, source) = first(&mut scheduler, &image("b"), now, 7200).unwrap();
        now += SECOND * waited as u32;
        pauses.push(waited);
        scheduler.record_end(&image("b"), Err(FillFailure::Down), now, 0.0);
        assert_eq!(source, FillSource::Registry);
    }
    // Ten seconds of each are the pause before any fetch.
    assert_eq!(pauses, [10, 130, 250, 490, 970, 1930, 3610]);
    assert_eq!(first(&mut scheduler, &other, now, 60), Some((10, FillSource::Registry)));
    scheduler.record_end(&other, Ok(FillSource::Registry), now, 0.0);
    assert_eq!(first(&mut scheduler, &image("a"), now, 3000), None);
    let (waited, _) = first(&mut scheduler, &image("a"), now, 7200).unwrap();
    scheduler.record_end(&image("a"), Ok(FillSource::Registry), now, 0.0);
    scheduler.record_end(&image("a"), Err(FillFailure::Down), now + SECOND * waited as u32, 0.0);
    let after = first(&mut scheduler, &image("a"), now + SECOND * waited as u32, 600).unwrap().0;
    assert_eq!(after, 130, "a success resets the back-off");
}

#[test]
fn a_retry_after_of_a_registry_is_respected_up_to_a_bound() {
    let start = Instant::now();
    for (retry_after, pause) in [(None, 130), (Some(1), 130), (Some(1000), 1010), (Some(u64::MAX), 6 * 3600 + 10)] {
        let mut scheduler = scheduler(start);
        let now = start + HOUR;
        let retry_after = retry_after.map(Duration::from_secs);
        scheduler.record_end(&image("a"), Err(FillFailure::RateLimited(retry_after)), now, 0.0);
        assert_eq!(first(&mut scheduler, &image("a"), now, 8 * 3600), Some((pause, FillSource::Registry)));
    }
}

#[test]
fn every_reason_has_a_label_of_its_own() {
    let labels: BTreeSet<_> = UnfilledReason::ALL.iter().map(|reason| reason.label()).collect();
    let texts: BTreeSet<_> = UnfilledReason::ALL.iter().map(ToString::to_string).collect();
    assert_eq!((labels.len(), texts.len()), (UnfilledReason::ALL.len(), UnfilledReason::ALL.len()));
}

/// A cluster in steps of ten seconds, the interval of the agent's checks.
struct Cluster {
    random: SmallRng,
    nodes: Vec<Node>,
    now: Instant,
    /// Begun fetches from the registry.
    registry_fetches: usize,
}

struct Node {
    scheduler: FillScheduler,
    lacking: Vec<IncompleteImage>,
    /// The fetch in flight, and its end.
    running: Option<(IncompleteImage, FillSource, Instant)>,
}

const STEP: Duration = Duration::from_secs(10);

/// Download of 200 MB at the default rate.
const DOWNLOAD: Duration = Duration::from_secs(25);

impl Cluster {
    /// Every node lacks the images that `images` yields for its number.
    fn new(nodes: usize, images: impl Fn(usize) -> Vec<IncompleteImage>) -> Self {
        let (mut random, now) = (SmallRng::seed_from_u64(7), Instant::now());
        let node = |number| Node {
            scheduler: FillScheduler::new(FetchFrom::Registry, now, random.random()),
            lacking: images(number),
            running: None,
        };
        Self { nodes: (0..nodes).map(node).collect(), random, now, registry_fetches: 0 }
    }

    fn step(&mut self) {
        self.now += STEP;
        let (now, members, random) = (self.now, self.nodes.len(), &mut self.random);
        let mut fetched = BTreeSet::new();
        for node in &mut self.nodes {
            if let Some((image, source, _)) = node.running.take_if(|(_, _, ends)| *ends <= now) {
                node.scheduler.record_end(&image, Ok(source), now, random.random());
                node.lacking.retain(|other| other.manifest != image.manifest);
                fetched.insert(image.manifest);
            }
        }
        for node in &mut self.nodes {
            node.lacking.iter_mut().for_each(|image| image.has_providers |= fetched.contains(&image.manifest));
            let Some((manifest, source)) = node.scheduler.start_next(&node.lacking, members, now, || random.random())
            else {
                continue;
            };
            let image = node.lacking.iter().find(|image| image.manifest == manifest).unwrap().clone();
            let duration = if source == FillSource::Registry { DOWNLOAD } else { STEP };
            self.registry_fetches += usize::from(source == FillSource::Registry);
            node.running = Some((image, source, now + duration));
        }
    }

    fn is_done(&self) -> bool {
        self.nodes.iter().all(|node| node.lacking.is_empty())
    }
}

#[test]
fn three_nodes_have_the_layers_of_five_images_within_three_minutes() {
    let names = ["a", "b", "c", "d", "e"];
    let mut cluster = Cluster::new(3, |_| names.map(|name| IncompleteImage { nodes: 3, ..image(name) }).to_vec());
    let steps = (1..=100).find(|_| {
        cluster.step();
        cluster.is_done()
    });
    assert!(steps.unwrap() <= 18, "{steps:?} steps of ten seconds");
    assert!(cluster.registry_fetches <= 10, "{} fetches from the registry", cluster.registry_fetches);
}

#[test]
fn a_registry_sends_an_image_a_few_times_to_a_cluster_of_five_thousand() {
    let mut cluster = Cluster::new(5000, |_| vec![IncompleteImage { nodes: 5000, ..image("a") }]);
    let steps = (1..=200).find(|_| {
        cluster.step();
        cluster.is_done()
    });
    println!("figure registry_fetches_of_one_image_5000_nodes {}", cluster.registry_fetches);
    assert!(cluster.registry_fetches <= 12, "{} fetches from the registry", cluster.registry_fetches);
    assert!(steps.is_some(), "not all nodes have the image");
}

#[test]
fn five_thousand_nodes_with_images_of_their_own_begin_one_fetch_per_second() {
    let of_its_own = |number: usize| (0..3).map(|one| image(&format!("{number} {one}"))).collect();
    let mut cluster = Cluster::new(5000, of_its_own);
    let steps = 100;
    (0..steps).for_each(|_| cluster.step());
    let seconds = steps as usize * STEP.as_secs() as usize;
    println!("figure registry_fetches_per_1000_s_5000_nodes {}", cluster.registry_fetches);
    assert!(cluster.registry_fetches <= seconds * 11 / 10, "{} fetches in {seconds} s", cluster.registry_fetches);
    assert!(cluster.registry_fetches >= seconds / 4, "{} fetches in {seconds} s", cluster.registry_fetches);
}

proptest! {
    /// After any history a registry gets a request for an image only where each condition holds.
    #[test]
    fn no_history_leads_to_a_forbidden_request(
        from in prop::sample::select(vec![FetchFrom::None, FetchFrom::Peers, FetchFrom::Registry]),
        steps in prop::collection::vec((0_u64..40_000, 0_usize..16, 0_usize..10, 0.0..1.0_f64), 1..60),
    ) {
        let mut now = Instant::now();
        let mut scheduler = FillScheduler::new(from, now, 0.5);
        let failures = [
            FillFailure::Peers, FillFailure::Local, FillFailure::NeededByRecovery, FillFailure::Denied { unread: false }, FillFailure::Denied { unread: true },
            FillFailure::Gone, FillFailure::WrongBytes, FillFailure::RateLimited(None), FillFailure::Down,
        ];
        let mut denied: Option<Instant> = None;
        for (seconds, bits, end, random) in steps {
            now += Duration::from_secs(seconds);
            let one = IncompleteImage {
                has_providers: bits & 1 > 0,
                is_healthy: bits & 2 > 0,
                fits: bits & 4 > 0,
                ..image("one")
            };
            let other = IncompleteImage { has_providers: bits & 8 > 0, ..image("other") };
            let images = [one, other];
            let Some((manifest, source)) = scheduler.start_next(&images, 1 + bits, now, || random) else { continue };
            let chosen = images.iter().find(|image| image.manifest == manifest).unwrap();
            prop_assert!(chosen.fits && from != FetchFrom::None);
            match source {
                FillSource::Peers => prop_assert!(chosen.has_providers),
                FillSource::Registry => {
                    prop_assert!(chosen.is_healthy && from == FetchFrom::Registry);
                    if chosen.manifest == image("one").manifest {
                        prop_assert!(denied.is_none_or(|at| now - at >= REJECTION_RETRY_DELAY));
                    }
                }
            }
            prop_assert_eq!(scheduler.start_next(&images, 1, now + HOUR, || random), None);
            // Peers never deny a layer.
            let possible = if source == FillSource::Peers { &failures[..2] } else { &failures[1..] };
            let result = possible.get(end).map_or(Ok(source), |failure| Err(*failure));
            if matches!(result, Err(FillFailure::Denied { unread: false })) && chosen.manifest == image("one").manifest {
                denied = Some(now);
            }
            scheduler.record_end(chosen, result, now, random);
        }
    }
}
