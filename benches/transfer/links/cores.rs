//! One UDP socket or several: two connections at the same time, over one endpoint per side and over
//! two.

use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::sys::resource::UsageWho;
use quinn::{Connection, Endpoint, VarInt};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;

use crate::bare_quinn::{bind, receive, serve};
use crate::cpu;
use crate::quinn_setting::AGENT_SETTING;
use crate::report::{BenchError, figure, mb_s, median};

/// Bytes that each of the two connections transfers in a run.
const BYTES: usize = 128 << 20;

const CONNECTIONS: usize = 2;

/// The two connections, over this number of endpoints per side.
struct TwoConnections {
    /// Each side has a thread per core, as the agent's runtime has.
    runtimes: [Runtime; 2],
    connections: Vec<Connection>,
    endpoints: Vec<Endpoint>,
}

pub(super) fn run(rounds: usize) -> Result<(), BenchError> {
    let blob = Bytes::from(vec![0x5a; BYTES]);
    let tried = [(1, TwoConnections::start(1, &blob)?), (2, TwoConnections::start(2, &blob)?)];
    let mut runs = [const { Vec::new() }; 2];
    // The first round warms up.
    for round in 0..=rounds {
        for ((_, both), runs) in tried.iter().zip(&mut runs) {
            let run = both.run()?;
            if round > 0 {
                runs.push(run);
            }
        }
    }
    let cores = std::thread::available_parallelism()?;
    for ((endpoints, _), runs) in tried.iter().zip(&runs) {
        let bytes = CONNECTIONS * BYTES;
        let speed = median(runs.iter().map(|(seconds, _)| mb_s(bytes as u64, *seconds)));
        let cpu = median(runs.iter().map(|(_, cpu)| cpu.as_nanos() as f64 / bytes as f64));
        let context =
            format!("MB/s of two connections on loopback, {cores} cores for both sides; CPU {cpu:.2} ns per byte");
        figure(&format!("quinn_endpoints_{endpoints}"), speed, &context);
    }
    Ok(())
}

impl TwoConnections {
    fn start(endpoints: usize, blob: &Bytes) -> Result<Self, BenchError> {
        let (server, client) = AGENT_SETTING.configs()?;
        let runtime = || Builder::new_multi_thread().enable_all().build();
        let runtimes = [runtime()?, runtime()?];
        let mut both = Self { runtimes, connections: Vec::new(), endpoints: Vec::new() };
        let mut ends = Vec::new();
        for _ in 0..endpoints {
            let sender = {
                let _inside = both.runtimes[0].enter();
                bind(&AGENT_SETTING, Some(server.clone()))?
            };
            let _inside = both.runtimes[1].enter();
            ends.push((bind(&AGENT_SETTING, None)?, sender.local_addr()?));
            let blob = blob.clone();
            both.runtimes[0].spawn(async move {
                while let Some(incoming) = sender.accept().await {
                    let (Ok(connection), blob) = (incoming.await, blob.clone()) else { break };
                    // The task ends with the connection.
                    tokio::spawn(async move { serve(&connection, &blob, AGENT_SETTING.chunk << 10).await.is_ok() });
                }
            });
        }
        for number in 0..CONNECTIONS {
            let (endpoint, address) = &ends[number % endpoints];
            let connecting =
                async { Ok::<_, BenchError>(endpoint.connect_with(client.clone(), *address, "bench")?.await?) };
            both.connections.push(both.runtimes[1].block_on(connecting)?);
        }
        both.endpoints = ends.into_iter().map(|(endpoint, _)| endpoint).collect();
        Ok(both)
    }

    fn run(&self) -> Result<(f64, Duration), BenchError> {
        let before = cpu::spent(UsageWho::RUSAGE_SELF)?;
        let began = Instant::now();
        self.runtimes[1].block_on(async {
            let mut receiving = JoinSet::new();
            for connection in self.connections.clone() {
                receiving.spawn(async move { receive(&connection).await });
            }
            while let Some(received) = receiving.join_next().await {
                if received?? != BYTES {
                    return Err("a connection ended before its last byte".into());
                }
            }
            Ok::<_, BenchError>(())
        })?;
        Ok((began.elapsed().as_secs_f64(), cpu::spent(UsageWho::RUSAGE_SELF)? - before))
    }
}

impl Drop for TwoConnections {
    fn drop(&mut self) {
        self.connections.iter().for_each(|connection| connection.close(VarInt::from_u32(0), b"done"));
        for endpoint in &self.endpoints {
            self.runtimes[1].block_on(endpoint.wait_idle());
        }
    }
}
