//! What quinn's settings are worth: on links that are slow, far, lossy, shared or badly queued, and on loopback, where only the processor
//! counts.
//!
//! Bare quinn, without anything of ours: `tuning.rs` of the transfer says which settings the agent has, and refers to these figures.

mod beside;
mod cores;
mod crossing;
mod far;
mod wire;

use bytes::Bytes;
use quinn::ConnectionStats;

use crate::bare::Bare;
use crate::report::{Failure, figure, mb_s, median, note};
use crate::setting::{Cipher, Congestion, OURS, Setting};
use crossing::{Case, Crossed, Taking, cross};

/// Each setting is tried so often, in turn with the others.
const ROUNDS: usize = 3;

/// Two nodes of a zone, the link of a small cloud machine or a gigabit, with a router's queue.
const LAN: Case = Case {
    name: "lan",
    mbit_s: 1000,
    queue_ms: 50,
    round_trip_ms: 0,
    lost: 0,
    connections: 1,
    streams: 1,
    taking: Taking::Stream,
    tcp: false,
    seconds: 1.0,
};
/// Two nodes of two regions.
const REGION: Case = Case { name: "region", round_trip_ms: 20, seconds: 1.5, ..LAN };

const CASES: [Case; 13] = [
    Case { name: "slow", mbit_s: 200, ..LAN },
    LAN,
    // A switch has 2 ms of queue and less.
    Case { name: "shallow", queue_ms: 2, ..LAN },
    Case { name: "lossy", lost: 1000, ..LAN },
    REGION,
    Case { name: "region_lossy", lost: 1000, ..REGION },
    Case { name: "region_very_lossy", lost: 10_000, ..REGION },
    // All four blobs of a peer at once, into a queue that holds a whole second.
    Case { name: "deep", mbit_s: 200, queue_ms: 1000, streams: 4, seconds: 2.0, ..LAN },
    Case { name: "pieces", taking: Taking::Pieces, ..LAN },
    Case { name: "region_pieces", taking: Taking::Pieces, ..REGION },
    Case { name: "beside_tcp", mbit_s: 200, tcp: true, seconds: 2.0, ..LAN },
    Case { name: "shallow_beside_tcp", queue_ms: 2, tcp: true, seconds: 2.0, ..LAN },
    Case { name: "four", mbit_s: 200, connections: 4, seconds: 2.0, ..LAN },
];

const CONTROLLERS: [(&str, Setting); 4] = [
    ("ours", OURS),
    ("bbr", Setting { congestion: Congestion::Bbr, ..OURS }),
    ("cubic", Setting { congestion: Congestion::Cubic, ..OURS }),
    ("newreno", Setting { congestion: Congestion::NewReno, ..OURS }),
];

/// What else may matter when the other end is far.
const FAR: [(&str, Setting); 6] = [
    ("ours", OURS),
    ("window_4", Setting { windows: [4, 20, 20], ..OURS }),
    ("window_8", Setting { windows: [8, 40, 40], ..OURS }),
    ("ack_10", Setting { ack_every: 10, ..OURS }),
    ("first_1_mib", Setting { initial_window: 1024, ..OURS }),
    ("rtt_333", Setting { initial_rtt: 333, ..OURS }),
];

/// What may matter when only the processor does.
const NEAR: [(&str, Setting); 9] = [
    ("ours", OURS),
    ("bbr", Setting { congestion: Congestion::Bbr, ..OURS }),
    ("window_4", Setting { windows: [4, 20, 20], ..OURS }),
    ("window_8", Setting { windows: [8, 40, 40], ..OURS }),
    ("ack_10", Setting { ack_every: 10, ..OURS }),
    ("ack_40", Setting { ack_every: 40, ..OURS }),
    ("buffers_default", Setting { buffer: 0, ..OURS }),
    ("no_gso", Setting { segmentation: false, ..OURS }),
    ("chacha20", Setting { cipher: Cipher::ChaCha20, ..OURS }),
];

/// Moved over loopback at a time.
const NEAR_BYTES: usize = 128 << 20;

/// On loopback.
pub(crate) fn loopback() -> Result<(), Failure> {
    near()?;
    cores::run(ROUNDS)
}

/// Who decides how much is under way.
pub(crate) fn controllers() -> Result<(), Failure> {
    CASES.iter().try_for_each(|case| compare(case, &CONTROLLERS))
}

/// Everything else, where the other end is far.
pub(crate) fn far() -> Result<(), Failure> {
    compare(&Case { name: "far", ..REGION }, &FAR)
}

/// A link with each setting.
fn compare(case: &Case, settings: &[(&str, Setting)]) -> Result<(), Failure> {
    let mut crossed: Vec<Vec<Crossed>> = settings.iter().map(|_| Vec::new()).collect();
    for round in 0..ROUNDS {
        for ((name, setting), crossed) in settings.iter().zip(&mut crossed) {
            let once = cross(case, setting, round as u64 * 100)?;
            note(&format!("{} with {name}: {:.3} of the link", case.name, used(case, &once)));
            crossed.push(once);
        }
    }
    for ((name, _), crossed) in settings.iter().zip(&crossed) {
        let of = |measure: fn(&Crossed) -> f64| median(crossed.iter().map(measure));
        let name = format!("quinn_{}_{name}", case.name);
        let on = format!(
            "{}; {:.1} % sent in vain; an echo took {:.0} ms, {:.0} ms at worst, {:.0} % lost; a piece after {:.0} ms; CPU {:.1} ns a byte",
            link(case),
            of(in_vain),
            of(|crossed| echo(crossed, 0.5)),
            of(|crossed| echo(crossed, 1.0)),
            of(|crossed| 100.0 * (1.0 - crossed.echoes.took.len() as f64 / crossed.echoes.asked as f64)),
            of(piece),
            of(|crossed| crossed.cpu.as_nanos() as f64 / total(crossed)),
        );
        figure(&name, median(crossed.iter().map(|crossed| used(case, crossed))), &on);
        if case.taking == Taking::Pieces {
            figure(&format!("{name}_ms"), of(piece), "4 MiB, a tenth of a second after the one before");
        }
        if case.tcp {
            figure(&format!("{name}_left"), of(left), "what TCP got, of what both got");
        }
        if case.connections > 1 {
            figure(&format!("{name}_fair"), of(fairness), "the slowest connection's bytes / the fastest's");
        }
    }
    Ok(())
}

fn link(case: &Case) -> String {
    let Case { mbit_s, queue_ms, round_trip_ms, lost, connections, streams, .. } = case;
    let lost = f64::from(*lost) / 1e4;
    format!(
        "content / link's rate; {mbit_s} Mbit/s, {round_trip_ms} ms there and back, queue {queue_ms} ms, {lost} % lost, {connections} x {streams} streams"
    )
}

fn total(crossed: &Crossed) -> f64 {
    crossed.received.iter().sum::<u64>() as f64
}

/// The part of the link's rate that is content: 0.95 at most, as headers take the rest.
fn used(case: &Case, crossed: &Crossed) -> f64 {
    total(crossed) * 8.0 / case.seconds / (f64::from(case.mbit_s) * 1e6)
}

/// Milliseconds.
fn piece(crossed: &Crossed) -> f64 {
    crossed.piece.map_or(f64::INFINITY, |piece| piece.as_secs_f64() * 1e3)
}

/// The part of the link that TCP got beside.
fn left(crossed: &Crossed) -> f64 {
    crossed.tcp as f64 / (crossed.tcp as f64 + total(crossed))
}

fn fairness(crossed: &Crossed) -> f64 {
    let bytes = || crossed.received.iter().map(|bytes| *bytes as f64);
    bytes().fold(f64::INFINITY, f64::min) / bytes().fold(1.0, f64::max)
}

/// Percent of the packets that the sender had to send again.
fn in_vain(crossed: &Crossed) -> f64 {
    let of = |count: fn(&ConnectionStats) -> u64| crossed.sent.iter().map(count).sum::<u64>() as f64;
    100.0 * of(|sent| sent.path.lost_packets) / of(|sent| sent.path.sent_packets)
}

/// Milliseconds that this part of the echoes took at most.
fn echo(crossed: &Crossed, part: f64) -> f64 {
    let mut took: Vec<_> = crossed.echoes.took.iter().map(|took| took.as_secs_f64() * 1e3).collect();
    took.sort_by(f64::total_cmp);
    let last = took.len().saturating_sub(1) as f64;
    took.get((last * part) as usize).copied().unwrap_or(f64::INFINITY)
}

/// Loopback with each setting.
fn near() -> Result<(), Failure> {
    let blob = Bytes::from(vec![0x5a; NEAR_BYTES]);
    let mut bare = Vec::new();
    for (_, setting) in NEAR {
        bare.push((Bare::start(setting, &blob)?, Vec::new()));
    }
    // The first round warms up.
    for round in 0..=ROUNDS {
        for (bare, runs) in &mut bare {
            let run = bare.run(&blob)?;
            if round > 0 {
                runs.push(run);
            }
        }
    }
    for ((name, _), (_, runs)) in NEAR.iter().zip(&bare) {
        let speed = median(runs.iter().map(|run| mb_s(NEAR_BYTES as u64, run.seconds)));
        let both = median(runs.iter().map(|run| run.both.as_nanos() as f64 / NEAR_BYTES as f64));
        let receiver = median(runs.iter().map(|run| run.receiver.as_nanos() as f64 / NEAR_BYTES as f64));
        let on =
            format!("MB/s on loopback, {ROUNDS} runs; CPU {both:.2} ns a byte, {receiver:.2} of it the receiver's");
        figure(&format!("quinn_loopback_{name}"), speed, &on);
    }
    Ok(())
}
