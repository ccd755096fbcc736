//! Costs of the pure modules: hash chain, inventory, codec, piece picker and upload slots.
//! README.md describes how each figure is made.
//!
//! criterion measures and prints its table. A line `figure NAME VALUE` with the median of the
//! samples follows each benchmark. An argument selects benchmarks by name, as with any criterion
//! benchmark.

use std::collections::{HashMap, VecDeque};
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use lighterman::decide::inventory::Inventory;
use lighterman::decide::piece_picker::{FollowChange, PiecePicker, Provider, RequestEnd};
use lighterman::decide::upload_slots::UploadSlots;
use lighterman::model::{
    Bits, Gossip, InventoryChange, InventoryItem, LogEntry, LogHead, MAX_CHANGES, Peer, PeerId, PieceMapUpdate,
    Signature,
};
use lighterman::oci::{Digest, HashChain, HashChainBuilder, Hasher, PieceLayout, Repository};
use lighterman::wire;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

/// Number of samples that count.
const SAMPLES: usize = 30;

fn main() {
    let mut criterion = Criterion::default().sample_size(SAMPLES).configure_from_args();
    hash_chain(&mut criterion);
    inventory(&mut criterion);
    codec(&mut criterion);
    piece_picker(&mut criterion);
    serving_slots(&mut criterion);
    criterion.final_summary();
}

/// Lets criterion measure `work`, which handles this number of things per call. Prints the time per
/// thing in nanoseconds.
fn measure(criterion: &mut Criterion, name: &str, operations: usize, mut work: impl FnMut()) {
    measure_some(criterion, name, || {
        let began = Instant::now();
        work();
        (began.elapsed(), operations)
    });
}

/// As `measure`, for work that returns the measured time and the number of things.
fn measure_some(criterion: &mut Criterion, name: &str, mut work: impl FnMut() -> (Duration, usize)) {
    let mut samples = Vec::new();
    criterion.bench_function(name, |bencher| {
        bencher.iter_custom(|times| {
            let (mut took, mut operations) = (Duration::ZERO, 0);
            for _ in 0..times {
                let (elapsed, count) = work();
                (took, operations) = (took + elapsed, operations + count);
            }
            samples.push(took.as_nanos() as f64 / operations as f64);
            took
        });
    });
    // The first samples warm up.
    let mut last_samples = samples.split_off(samples.len().saturating_sub(SAMPLES));
    last_samples.sort_by(f64::total_cmp);
    // `None` if an argument selected other benchmarks.
    if let Some(median) = last_samples.get(last_samples.len() / 2) {
        println!("figure {name} {median:.1} (ns, median of {} samples)", last_samples.len());
    }
}

/// Bytes of the hashing benchmarks: the size of a common layer, and more than the caches of a core.
const BLOB: usize = 16 << 20;

/// Payload of a packet, as the fetcher receives it.
const PORTION: usize = 1400;

/// Building a blob's hash chain and verifying single pieces, next to SHA-256 alone.
fn hash_chain(criterion: &mut Criterion) {
    let mut blob = vec![0; BLOB];
    SmallRng::seed_from_u64(1).fill_bytes(&mut blob);
    let layout = PieceLayout::for_size(BLOB as u64);
    let build = || {
        let mut builder = HashChainBuilder::new(layout);
        blob.chunks(PORTION).for_each(|portion| builder.update(portion));
        builder.finish()
    };
    measure(criterion, "sha256_ns_per_kib", BLOB >> 10, || {
        let mut hasher = Hasher::default();
        blob.chunks(PORTION).for_each(|portion| hasher.update(portion));
        black_box(hasher.digest());
    });
    measure(criterion, "chain_build_ns_per_kib", BLOB >> 10, || {
        black_box(build());
    });
    let chain: HashChain = build().expect("the blob has the layout's size");
    let pieces: Vec<_> = blob.chunks(usize::try_from(layout.piece_length(0)).expect("fits in memory")).collect();
    measure(criterion, "chain_check_ns_per_kib", BLOB >> 10, || {
        for (number, piece) in pieces.iter().enumerate() {
            let mut hasher = chain.hasher(number);
            piece.chunks(PORTION).for_each(|portion| hasher.update(portion));
            assert!(hasher.is_valid_for(&chain));
        }
    });
}

/// Nodes of a large cluster, images on each node, and images in total: some 24 000 different blobs
/// and names.
const PEERS: usize = 1000;
const IMAGES_PER_PEER: usize = 300;
const IMAGES: usize = 1700;

/// Items of an image: an index, a manifest, a config, nine layers, a name with a tag and a name
/// without.
const ITEMS_PER_IMAGE: usize = 14;

/// The inventory of a thousand nodes with 300 images each.
fn inventory(criterion: &mut Criterion) {
    let mut rng = SmallRng::seed_from_u64(1);
    let images: Vec<_> = (0..IMAGES).map(image).collect();
    let peers: Vec<_> = (0..PEERS).map(peer).collect();
    let mut inventory = Inventory::default();
    for peer in &peers {
        inventory.up(peer.clone());
        let sampled = rand::seq::index::sample(&mut rng, IMAGES, IMAGES_PER_PEER);
        inventory.replace(peer.id, sampled.into_iter().flat_map(|image| images[image].clone()));
    }
    println!("inventory: {} peers x {IMAGES_PER_PEER} images, {} different items", peers.len(), inventory.items());
    // An image is added to and removed from a node, at another node each time.
    let new = image(IMAGES);
    let added: Vec<_> = new.iter().cloned().map(InventoryChange::Added).collect();
    let removed: Vec<_> = new.iter().cloned().map(InventoryChange::Removed).collect();
    let mut next_peers = peers.iter().cycle();
    measure(criterion, "inventory_update_ns", 2 * ITEMS_PER_IMAGE, || {
        let Some(peer) = next_peers.next() else { return };
        inventory.change(peer.id, added.clone());
        inventory.change(peer.id, removed.clone());
    });
    let mut next_images = images.iter().cycle();
    measure(criterion, "inventory_lookup_ns", 1, || {
        if let Some([.., InventoryItem::Blob(digest), _, _]) = next_images.next().map(Vec::as_slice) {
            black_box(inventory.blob_providers(*digest));
        }
    });
    let (repository, digest) = (repository(7), blob(7, 0));
    measure(criterion, "inventory_providers_ns", 1, || {
        black_box(inventory.image_providers(&repository, digest));
    });
    measure(criterion, "inventory_replace_ns", 1, || {
        inventory.replace(peers[0].id, images[..IMAGES_PER_PEER].iter().flatten().cloned());
    });
}

fn blob(image: usize, part: usize) -> Digest {
    Digest::of(format!("image {image} blob {part}").as_bytes())
}

fn repository(image: usize) -> Repository {
    Repository { registry: "registry.example.com".into(), path: format!("team-{}/service-{image}", image % 37) }
}

/// The items of an image, with the last layer and the names at the end.
fn image(number: usize) -> Vec<InventoryItem> {
    let mut parts: Vec<_> = (0..ITEMS_PER_IMAGE - 2).map(|part| InventoryItem::Blob(blob(number, part))).collect();
    let digest = blob(number, 0);
    parts.push(InventoryItem::Image(repository(number), Some(format!("v1.{number}.0")), digest));
    parts.push(InventoryItem::Image(repository(number), None, digest));
    parts
}

fn peer(number: usize) -> Peer {
    Peer {
        id: PeerId::from_public_key(*Digest::of(format!("peer {number}").as_bytes()).as_bytes()),
        node: format!("node-{number}").parse().expect("a node's name"),
        zone: None,
        transfer: ([10, 0, 0, 1], 4701).into(),
        gossip: ([10, 0, 0, 1], 4701).into(),
    }
}

/// A log entry with the largest number of changes, and the piece map of a blob of 20 GiB.
fn codec(criterion: &mut Criterion) {
    let changes: Vec<_> = (0..).flat_map(image).map(InventoryChange::Added).take(MAX_CHANGES).collect();
    let head = LogHead {
        publisher: peer(0).id,
        epoch: 1_700_000_000_000,
        sequence: 1000,
        changes: lighterman::model::changes_digest(&changes),
        state: Digest::of(b"state"),
        signature: Signature([1; 32], [2; 32]),
    };
    let entry = Gossip::Entry(LogEntry { head, changes });
    both_ways(criterion, "entry", &entry);
    let mut bits = Bits::none_of(2560);
    let mut rng = SmallRng::seed_from_u64(1);
    (0..2560).filter(|_| rng.random()).for_each(|piece| bits.set(piece));
    both_ways(criterion, "availability", &PieceMapUpdate::Map(bits));
}

fn both_ways<M: wire::Message>(criterion: &mut Criterion, name: &str, message: &M) {
    let frame = wire::encode(message).expect("within its limit");
    println!("codec: {name} takes {} bytes", frame.len());
    measure(criterion, &format!("codec_{name}_encode_ns"), 1, || {
        black_box(wire::encode(black_box(message)).is_ok());
    });
    measure(criterion, &format!("codec_{name}_decode_ns"), 1, || {
        black_box(wire::decode::<M>(black_box(&frame)).is_ok());
    });
}

/// The pieces of an image of 10 GiB from forty peers. Half of the peers have the whole image, the
/// others every second piece.
fn piece_picker(criterion: &mut Criterion) {
    measure_some(criterion, "pool_next_ns", || {
        let fetched = pick_all_pieces();
        (fetched.deciding, fetched.decisions)
    });
    measure_some(criterion, "pool_piece_ns", || {
        let began = Instant::now();
        let fetched = pick_all_pieces();
        (began.elapsed(), fetched.pieces)
    });
}

/// Cost of all decisions until the image is complete.
#[derive(Default)]
struct FetchCost {
    /// Time in [`PiecePicker::next_request`].
    deciding: Duration,
    decisions: usize,
    pieces: usize,
}

/// Sizes of the layers in GiB.
const LAYERS: [u64; 4] = [4, 3, 2, 1];

fn pick_all_pieces() -> FetchCost {
    let mut now = Instant::now();
    let mut picker = PiecePicker::new(None, 1);
    let providers: Vec<_> = (0..40)
        .map(|number| Provider { peer: peer(number).id, zone: None, is_whole: number % 2 == 0, standing: 0 })
        .collect();
    for (number, gib) in LAYERS.into_iter().enumerate() {
        let (digest, layout) = (blob(0, number), PieceLayout::for_size(gib << 30));
        picker.add_blob(digest, layout);
        picker.mark_hash_chain_ready(digest);
        picker.set_providers(digest, &providers);
    }
    for change in picker.take_follow_changes(now) {
        let FollowChange::Follow { peer, digest } = change else { continue };
        let is_whole = providers.iter().any(|provider| provider.peer == peer && provider.is_whole);
        let mut half = Bits::none_of(512);
        (0..512).step_by(2).for_each(|piece| half.set(piece));
        picker.record_piece_map(
            peer,
            digest,
            &if is_whole { PieceMapUpdate::HaveAll } else { PieceMapUpdate::Map(half) },
            now,
        );
    }
    let mut fetched = FetchCost::default();
    let mut in_flight = VecDeque::new();
    while !picker.is_complete() {
        let began = Instant::now();
        let request = picker.next_request(now);
        fetched.deciding += began.elapsed();
        fetched.decisions += 1;
        if let Some(request) = request {
            in_flight.push_back(request);
            continue;
        }
        // No piece can be requested: the oldest request is answered.
        let Some(request) = in_flight.pop_front() else { break };
        for piece in request.request.pieces.iter().take(request.request.limit.into()) {
            now += Duration::from_millis(1);
            picker.begin_piece(request.id, *piece, now);
            picker.record_bytes(request.id, request.request.layout.piece_length(*piece as usize), now);
            picker.complete_piece(request.id, *piece, now);
            picker.record_verified_piece(request.request.peer, request.request.digest);
            fetched.pieces += 1;
        }
        picker.end_request(request.id, RequestEnd::Done, now);
        picker.take_cancellations();
    }
    assert!(picker.is_complete(), "all pieces are fetched, not only {}", fetched.pieces);
    fetched
}

/// A turn at a node with a thousand queued requests of 250 peers.
fn serving_slots(criterion: &mut Criterion) {
    let mut slots = UploadSlots::new(8, 16);
    let peers: Vec<_> = (0..250).map(|number| peer(number).id).collect();
    let mut queued = HashMap::new();
    for number in 0..1000 {
        let (peer, digest) = (peers[number % peers.len()], blob(number % 10, 0));
        queued.insert(slots.enqueue(peer, digest, 100).expect("there is room"), (peer, digest));
    }
    measure(criterion, "slots_turn_ns", 1, || {
        let Some(ticket) = slots.start_next() else { return };
        slots.record_sent(ticket, 8 << 20);
        slots.remove(ticket);
        if let Some((peer, digest)) = queued.remove(&ticket)
            && let Ok(ticket) = slots.enqueue(peer, digest, 100)
        {
            queued.insert(ticket, (peer, digest));
        }
    });
}
