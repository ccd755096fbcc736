//! Effects of quinn's settings: on links that are slow, far, lossy, shared or badly queued, and on
//! loopback, where only the processor counts.
//!
//! Only bare quinn runs here. `src/transfer/tuning.rs` has the agent's settings, and refers to
//! these figures.

mod background_traffic;
mod cores;
mod delayed_socket;
mod link_run;
mod shaped_link;

use bytes::Bytes;
use quinn::ConnectionStats;

use crate::bare_quinn::BareQuinn;
use crate::quinn_setting::{AGENT_SETTING, Cipher, Congestion, QuinnSetting};
use crate::report::{BenchError, figure, mb_s, median, note};
use link_run::{LinkCase, LinkRun, ReadPattern, run_case};

/// Runs of each setting, in turn with the other settings.
const ROUNDS: usize = 3;

/// Two nodes of a zone, with the link of a small cloud machine or a gigabit link, and a router's
/// queue.
const LAN: LinkCase = LinkCase {
    name: "lan",
    mbit_s: 1000,
    queue_ms: 50,
    round_trip_ms: 0,
    lost: 0,
    connections: 1,
    streams: 1,
    read_pattern: ReadPattern::Stream,
    tcp: false,
    seconds: 1.0,
};
/// Two nodes in two regions.
const REGION: LinkCase = LinkCase { name: "region", round_trip_ms: 20, seconds: 1.5, ..LAN };

const CASES: [LinkCase; 13] = [
    LinkCase { name: "slow", mbit_s: 200, ..LAN },
    LAN,
    // A switch has a queue of 2 ms or less.
    LinkCase { name: "shallow", queue_ms: 2, ..LAN },
    LinkCase { name: "lossy", lost: 1000, ..LAN },
    REGION,
    LinkCase { name: "region_lossy", lost: 1000, ..REGION },
    LinkCase { name: "region_very_lossy", lost: 10_000, ..REGION },
    // Four blobs of a peer at once, into a queue that holds a whole second.
    LinkCase { name: "deep", mbit_s: 200, queue_ms: 1000, streams: 4, seconds: 2.0, ..LAN },
    LinkCase { name: "pieces", read_pattern: ReadPattern::Pieces, ..LAN },
    LinkCase { name: "region_pieces", read_pattern: ReadPattern::Pieces, ..REGION },
    LinkCase { name: "beside_tcp", mbit_s: 200, tcp: true, seconds: 2.0, ..LAN },
    LinkCase { name: "shallow_beside_tcp", queue_ms: 2, tcp: true, seconds: 2.0, ..LAN },
    LinkCase { name: "four", mbit_s: 200, connections: 4, seconds: 2.0, ..LAN },
];

const CONTROLLERS: [(&str, QuinnSetting); 4] = [
    ("ours", AGENT_SETTING),
    ("bbr", QuinnSetting { congestion: Congestion::Bbr, ..AGENT_SETTING }),
    ("cubic", QuinnSetting { congestion: Congestion::Cubic, ..AGENT_SETTING }),
    ("newreno", QuinnSetting { congestion: Congestion::NewReno, ..AGENT_SETTING }),
];

/// Other settings that may matter for a far peer.
const REGION_SETTINGS: [(&str, QuinnSetting); 6] = [
    ("ours", AGENT_SETTING),
    ("window_4", QuinnSetting { windows: [4, 20, 20], ..AGENT_SETTING }),
    ("window_8", QuinnSetting { windows: [8, 40, 40], ..AGENT_SETTING }),
    ("ack_10", QuinnSetting { ack_every: 10, ..AGENT_SETTING }),
    ("first_1_mib", QuinnSetting { initial_window: 1024, ..AGENT_SETTING }),
    ("rtt_333", QuinnSetting { initial_rtt: 333, ..AGENT_SETTING }),
];

/// Settings that may matter when only the processor counts.
const LOOPBACK_SETTINGS: [(&str, QuinnSetting); 9] = [
    ("ours", AGENT_SETTING),
    ("bbr", QuinnSetting { congestion: Congestion::Bbr, ..AGENT_SETTING }),
    ("window_4", QuinnSetting { windows: [4, 20, 20], ..AGENT_SETTING }),
    ("window_8", QuinnSetting { windows: [8, 40, 40], ..AGENT_SETTING }),
    ("ack_10", QuinnSetting { ack_every: 10, ..AGENT_SETTING }),
    ("ack_40", QuinnSetting { ack_every: 40, ..AGENT_SETTING }),
    ("buffers_default", QuinnSetting { buffer: 0, ..AGENT_SETTING }),
    ("no_gso", QuinnSetting { segmentation: false, ..AGENT_SETTING }),
    ("chacha20", QuinnSetting { cipher: Cipher::ChaCha20, ..AGENT_SETTING }),
];

/// Bytes of a run over loopback.
const LOOPBACK_BYTES: usize = 128 << 20;

/// Measures settings on loopback.
pub(crate) fn loopback() -> Result<(), BenchError> {
    compare_on_loopback()?;
    cores::run(ROUNDS)
}

/// Compares congestion controllers.
pub(crate) fn controllers() -> Result<(), BenchError> {
    CASES.iter().try_for_each(|case| compare(case, &CONTROLLERS))
}

/// Compares other settings over a far link.
pub(crate) fn far() -> Result<(), BenchError> {
    compare(&LinkCase { name: "far", ..REGION }, &REGION_SETTINGS)
}

/// Measures a link with each setting.
fn compare(case: &LinkCase, settings: &[(&str, QuinnSetting)]) -> Result<(), BenchError> {
    let mut runs: Vec<Vec<LinkRun>> = settings.iter().map(|_| Vec::new()).collect();
    for round in 0..ROUNDS {
        for ((name, setting), runs) in settings.iter().zip(&mut runs) {
            let run = run_case(case, setting, round as u64 * 100)?;
            note(&format!("{} with {name}: {:.3} of the link", case.name, link_utilisation(case, &run)));
            runs.push(run);
        }
    }
    for ((name, _), runs) in settings.iter().zip(&runs) {
        let of = |measure: fn(&LinkRun) -> f64| median(runs.iter().map(measure));
        let name = format!("quinn_{}_{name}", case.name);
        let context = format!(
            "{}; {:.1} % of packets lost; an echo took {:.0} ms, {:.0} ms at worst, {:.0} % lost; a piece after {:.0} ms; CPU {:.1} ns per byte",
            link(case),
            of(percent_resent),
            of(|run| echo(run, 0.5)),
            of(|run| echo(run, 1.0)),
            of(|run| 100.0 * (1.0 - run.echoes.round_trips.len() as f64 / run.echoes.sent as f64)),
            of(piece),
            of(|run| run.cpu.as_nanos() as f64 / total(run)),
        );
        figure(&name, median(runs.iter().map(|crossed| link_utilisation(case, crossed))), &context);
        if case.read_pattern == ReadPattern::Pieces {
            figure(&format!("{name}_ms"), of(piece), "4 MiB, a tenth of a second after the earlier piece");
        }
        if case.tcp {
            figure(&format!("{name}_left"), of(tcp_share), "TCP's share of all received bytes");
        }
        if case.connections > 1 {
            figure(&format!("{name}_fair"), of(fairness), "the slowest connection's bytes / the fastest's");
        }
    }
    Ok(())
}

fn link(case: &LinkCase) -> String {
    let LinkCase { mbit_s, queue_ms, round_trip_ms, lost, connections, streams, .. } = case;
    let lost = f64::from(*lost) / 1e4;
    format!(
        "content / link's rate; {mbit_s} Mbit/s, {round_trip_ms} ms round trip, queue {queue_ms} ms, {lost} % lost, {connections} x {streams} streams"
    )
}

fn total(run: &LinkRun) -> f64 {
    run.received.iter().sum::<u64>() as f64
}

/// The share of the link's rate that is content: 0.95 at most, because headers take the rest.
fn link_utilisation(case: &LinkCase, run: &LinkRun) -> f64 {
    total(run) * 8.0 / case.seconds / (f64::from(case.mbit_s) * 1e6)
}

/// Time of a piece in milliseconds.
fn piece(run: &LinkRun) -> f64 {
    run.piece.map_or(f64::INFINITY, |piece| piece.as_secs_f64() * 1e3)
}

/// TCP's share of the received bytes.
fn tcp_share(run: &LinkRun) -> f64 {
    run.tcp as f64 / (run.tcp as f64 + total(run))
}

fn fairness(run: &LinkRun) -> f64 {
    let bytes = || run.received.iter().map(|bytes| *bytes as f64);
    bytes().fold(f64::INFINITY, f64::min) / bytes().fold(1.0, f64::max)
}

/// Percentage of sent packets that quinn counts as lost, and whose content it sends again.
fn percent_resent(run: &LinkRun) -> f64 {
    let of = |count: fn(&ConnectionStats) -> u64| run.sent.iter().map(count).sum::<u64>() as f64;
    100.0 * of(|sent| sent.path.lost_packets) / of(|sent| sent.path.sent_packets)
}

/// The time in milliseconds within which this share of the echoes returned.
fn echo(run: &LinkRun, part: f64) -> f64 {
    let mut took: Vec<_> = run.echoes.round_trips.iter().map(|took| took.as_secs_f64() * 1e3).collect();
    took.sort_by(f64::total_cmp);
    let last = took.len().saturating_sub(1) as f64;
    took.get((last * part) as usize).copied().unwrap_or(f64::INFINITY)
}

/// Measures loopback with each setting.
fn compare_on_loopback() -> Result<(), BenchError> {
    let blob = Bytes::from(vec![0x5a; LOOPBACK_BYTES]);
    let mut bare = Vec::new();
    for (_, setting) in LOOPBACK_SETTINGS {
        bare.push((BareQuinn::start(setting, &blob)?, Vec::new()));
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
    for ((name, _), (_, runs)) in LOOPBACK_SETTINGS.iter().zip(&bare) {
        let speed = median(runs.iter().map(|run| mb_s(LOOPBACK_BYTES as u64, run.seconds)));
        let both = median(runs.iter().map(|run| run.both.as_nanos() as f64 / LOOPBACK_BYTES as f64));
        let receiver = median(runs.iter().map(|run| run.receiver.as_nanos() as f64 / LOOPBACK_BYTES as f64));
        let context =
            format!("MB/s on loopback, {ROUNDS} runs; CPU {both:.2} ns per byte, {receiver:.2} of the receiver");
        figure(&format!("quinn_loopback_{name}"), speed, &context);
    }
    Ok(())
}
