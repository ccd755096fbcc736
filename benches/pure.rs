//! What the pure floors cost: the chain of a blob, the table of who holds what, the codec, what is asked and served next. README.md says how
//! each figure is made.
//!
//! criterion measures and prints its table; a line `figure NAME VALUE` with the median of its samples follows each. An argument chooses by
//! name, as criterion has it.

use std::collections::{HashMap, VecDeque};
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use lighterman::decide::inventory::Inventory;
use lighterman::decide::pieces::{Candidate, End, Neighbour, Pool};
use lighterman::decide::slots::Slots;
use lighterman::model::{
    Availability, Bits, ContentChange, Entry, Gossip, Head, Item, MAX_CHANGES, Peer, PeerId, Signature,
};
use lighterman::oci::{Chain, ChainBuilder, Cut, Digest, Hasher, Repository};
use lighterman::wire;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

/// Samples that count.
const SAMPLES: usize = 30;

fn main() {
    let mut criterion = Criterion::default().sample_size(SAMPLES).configure_from_args();
    chain(&mut criterion);
    inventory(&mut criterion);
    codec(&mut criterion);
    pool(&mut criterion);
    slots(&mut criterion);
    criterion.final_summary();
}

/// Lets criterion measure `work`, which does so many things at a time, and prints how long one of them takes, in nanoseconds.
fn measure(criterion: &mut Criterion, name: &str, things: usize, mut work: impl FnMut()) {
    measure_some(criterion, name, || {
        let began = Instant::now();
        work();
        (began.elapsed(), things)
    });
}

/// The same for work that says itself how long it took, and for how many things.
fn measure_some(criterion: &mut Criterion, name: &str, mut work: impl FnMut() -> (Duration, usize)) {
    let mut samples = Vec::new();
    criterion.bench_function(name, |bencher| {
        bencher.iter_custom(|times| {
            let (mut took, mut things) = (Duration::ZERO, 0);
            for _ in 0..times {
                let (longer, more) = work();
                (took, things) = (took + longer, things + more);
            }
            samples.push(took.as_nanos() as f64 / things as f64);
            took
        });
    });
    // The first ones warmed up.
    let mut counting = samples.split_off(samples.len().saturating_sub(SAMPLES));
    counting.sort_by(f64::total_cmp);
    // None when an argument chose others.
    if let Some(median) = counting.get(counting.len() / 2) {
        println!("figure {name} {median:.1} (ns, median of {} samples)", counting.len());
    }
}

/// Bytes of one figure about hashing: of the size of a common layer, and more than any cache of one core.
const BLOB: usize = 16 << 20;

/// What one packet brings, as a fetcher gets it.
const PORTION: usize = 1400;

/// A blob's chain as it is hashed, and its pieces checked alone, beside SHA-256 by itself.
fn chain(criterion: &mut Criterion) {
    let mut blob = vec![0; BLOB];
    SmallRng::seed_from_u64(1).fill_bytes(&mut blob);
    let cut = Cut::usual(BLOB as u64);
    let build = || {
        let mut builder = ChainBuilder::new(cut);
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
    let chain: Chain = build().expect("as long as the cut says");
    let pieces: Vec<_> = blob.chunks(usize::try_from(cut.length(0)).expect("fits in memory")).collect();
    measure(criterion, "chain_check_ns_per_kib", BLOB >> 10, || {
        for (number, piece) in pieces.iter().enumerate() {
            let mut hasher = chain.hasher(number);
            piece.chunks(PORTION).for_each(|portion| hasher.update(portion));
            assert!(hasher.fits(&chain));
        }
    });
}

/// Nodes of a large cluster, the images each holds, and the images there are: some 24 000 different blobs and names.
const PEERS: usize = 1000;
const HELD: usize = 300;
const IMAGES: usize = 1700;

/// Parts of an image: an index, a manifest, a config, nine layers, and a name with a tag and one without.
const PARTS: usize = 14;

/// The table of who holds what, of a thousand nodes with 300 images each.
fn inventory(criterion: &mut Criterion) {
    let mut rng = SmallRng::seed_from_u64(1);
    let images: Vec<_> = (0..IMAGES).map(image).collect();
    let peers: Vec<_> = (0..PEERS).map(peer).collect();
    let mut inventory = Inventory::default();
    for peer in &peers {
        inventory.up(peer.clone());
        let held = rand::seq::index::sample(&mut rng, IMAGES, HELD);
        inventory.replace(peer.id, held.into_iter().flat_map(|image| images[image].clone()));
    }
    println!("inventory: {} peers x {HELD} images, {} different items", peers.len(), inventory.items());
    // An image comes and goes again, at another node each time.
    let new = image(IMAGES);
    let added: Vec<_> = new.iter().cloned().map(ContentChange::Added).collect();
    let removed: Vec<_> = new.iter().cloned().map(ContentChange::Removed).collect();
    let mut turn = peers.iter().cycle();
    measure(criterion, "inventory_update_ns", 2 * PARTS, || {
        let Some(peer) = turn.next() else { return };
        inventory.change(peer.id, added.clone());
        inventory.change(peer.id, removed.clone());
    });
    let mut asked = images.iter().cycle();
    measure(criterion, "inventory_lookup_ns", 1, || {
        if let Some([.., Item::Blob(digest), _, _]) = asked.next().map(Vec::as_slice) {
            black_box(inventory.holders(*digest));
        }
    });
    let (repository, root) = (repository(7), blob(7, 0));
    measure(criterion, "inventory_providers_ns", 1, || {
        black_box(inventory.providers(&repository, root));
    });
    measure(criterion, "inventory_replace_ns", 1, || {
        inventory.replace(peers[0].id, images[..HELD].iter().flatten().cloned());
    });
}

fn blob(image: usize, part: usize) -> Digest {
    Digest::of(format!("image {image} blob {part}").as_bytes())
}

fn repository(image: usize) -> Repository {
    Repository { registry: "registry.example.com".into(), path: format!("team-{}/service-{image}", image % 37) }
}

/// The parts of an image, its last layer and its names last.
fn image(number: usize) -> Vec<Item> {
    let mut parts: Vec<_> = (0..PARTS - 2).map(|part| Item::Blob(blob(number, part))).collect();
    let root = blob(number, 0);
    parts.push(Item::Image(repository(number), Some(format!("v1.{number}.0")), root));
    parts.push(Item::Image(repository(number), None, root));
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

/// An entry of a log with as many changes as it may have, and what a peer has of a blob of 20 GiB.
fn codec(criterion: &mut Criterion) {
    let changes: Vec<_> = (0..).flat_map(image).map(ContentChange::Added).take(MAX_CHANGES).collect();
    let head = Head {
        publisher: peer(0).id,
        epoch: 1_700_000_000_000,
        sequence: 1000,
        changes: lighterman::model::changes_digest(&changes),
        state: Digest::of(b"state"),
        signature: Signature([1; 32], [2; 32]),
    };
    let entry = Gossip::Entry(Entry { head, changes });
    both_ways(criterion, "entry", &entry);
    let mut bits = Bits::none_of(2560);
    let mut rng = SmallRng::seed_from_u64(1);
    (0..2560).filter(|_| rng.random()).for_each(|piece| bits.set(piece));
    both_ways(criterion, "availability", &Availability::These(bits));
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

/// Pieces of an image of 10 GiB from forty peers, half of which have all of it and half every second piece.
fn pool(criterion: &mut Criterion) {
    measure_some(criterion, "pool_next_ns", || {
        let fetched = fetch();
        (fetched.deciding, fetched.decisions)
    });
    measure_some(criterion, "pool_piece_ns", || {
        let began = Instant::now();
        let fetched = fetch();
        (began.elapsed(), fetched.pieces)
    });
}

/// What is asked of the pool until everything is there.
#[derive(Default)]
struct Fetched {
    /// In [`Pool::next`].
    deciding: Duration,
    decisions: usize,
    pieces: usize,
}

/// Layers, in GiB.
const LAYERS: [u64; 4] = [4, 3, 2, 1];

fn fetch() -> Fetched {
    let mut now = Instant::now();
    let mut pool = Pool::new(None, 1);
    let holders: Vec<_> = (0..40)
        .map(|number| Candidate { peer: peer(number).id, zone: None, whole: number % 2 == 0, standing: 0 })
        .collect();
    for (number, gib) in LAYERS.into_iter().enumerate() {
        let (digest, cut) = (blob(0, number), Cut::usual(gib << 30));
        pool.add(digest, cut);
        pool.lists(digest);
        pool.candidates(digest, &holders);
    }
    for neighbour in pool.neighbours(now) {
        let Neighbour::Follow { peer, digest } = neighbour else { continue };
        let is_whole = holders.iter().any(|holder| holder.peer == peer && holder.whole);
        let mut half = Bits::none_of(512);
        (0..512).step_by(2).for_each(|piece| half.set(piece));
        pool.hears(peer, digest, &if is_whole { Availability::Whole } else { Availability::These(half) }, now);
    }
    let mut fetched = Fetched::default();
    let mut under_way = VecDeque::new();
    while !pool.is_done() {
        let began = Instant::now();
        let ask = pool.next(now);
        fetched.deciding += began.elapsed();
        fetched.decisions += 1;
        if let Some(ask) = ask {
            under_way.push_back(ask);
            continue;
        }
        // Nothing more to ask: the oldest is answered.
        let Some(ask) = under_way.pop_front() else { break };
        for piece in ask.order.choice.iter().take(ask.order.most.into()) {
            now += Duration::from_millis(1);
            pool.begins(ask.id, *piece, now);
            pool.brings(ask.id, ask.order.cut.length(*piece as usize), now);
            pool.has(ask.id, *piece, now);
            pool.fits(ask.order.peer, ask.order.digest);
            fetched.pieces += 1;
        }
        pool.ends(ask.id, End::Done, now);
        pool.cancels();
    }
    assert!(pool.is_done(), "{} pieces came", fetched.pieces);
    fetched
}

/// A turn at a node that a thousand requests of 250 peers wait for.
fn slots(criterion: &mut Criterion) {
    let mut slots = Slots::new(8, 16);
    let peers: Vec<_> = (0..250).map(|number| peer(number).id).collect();
    let mut asking = HashMap::new();
    for number in 0..1000 {
        let (peer, digest) = (peers[number % peers.len()], blob(number % 10, 0));
        asking.insert(slots.enqueue(peer, digest, 100).expect("there is room"), (peer, digest));
    }
    measure(criterion, "slots_turn_ns", 1, || {
        let Some(ticket) = slots.turn() else { return };
        slots.sent(ticket, 8 << 20);
        slots.done(ticket);
        if let Some((peer, digest)) = asking.remove(&ticket)
            && let Ok(ticket) = slots.enqueue(peer, digest, 100)
        {
            asking.insert(ticket, (peer, digest));
        }
    });
}
