//! quinn alone: a stream of bytes without verification, with the fastest of some settings.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use quinn::{Connection, Endpoint, ServerConfig, TokioRuntime, VarInt};
use tokio::runtime::{Builder, Runtime};

use crate::quinn_setting::{AGENT_SETTING, Congestion, QuinnSetting};
use crate::report::{BenchError, mb_s, note};
use crate::transfer_cost::TransferCost;

const SETTINGS: [QuinnSetting; 12] = [
    AGENT_SETTING,
    QuinnSetting { chunk: 1024, ..AGENT_SETTING },
    QuinnSetting { windows: [4, 20, 20], ..AGENT_SETTING },
    QuinnSetting { windows: [8, 32, 8], ..AGENT_SETTING },
    QuinnSetting { windows: [16, 64, 16], chunk: 1024, ..AGENT_SETTING },
    QuinnSetting { buffer: 16 << 10, windows: [16, 64, 16], ..AGENT_SETTING },
    QuinnSetting { buffer: 0, ..AGENT_SETTING },
    QuinnSetting { ack_every: 10, ..AGENT_SETTING },
    QuinnSetting { ack_every: 40, ..AGENT_SETTING },
    QuinnSetting { ack_every: 40, windows: [8, 32, 8], chunk: 1024, ..AGENT_SETTING },
    QuinnSetting { congestion: Congestion::Cubic, ..AGENT_SETTING },
    QuinnSetting { congestion: Congestion::Bbr, ..AGENT_SETTING },
];

/// Number of runs of each setting. The best run counts.
const TRIES: usize = 4;

/// Runs every setting, and keeps the fastest.
pub(crate) fn fastest(blob: &Bytes) -> Result<(QuinnSetting, BareQuinn), BenchError> {
    let mut best: Option<(f64, QuinnSetting)> = None;
    for setting in SETTINGS {
        let bare = BareQuinn::start(setting, blob)?;
        let mut seconds = f64::INFINITY;
        for _ in 0..TRIES {
            seconds = seconds.min(bare.run(blob)?.seconds);
        }
        note(&format!("bare stream: {:.0} MB/s with {setting}", mb_s(blob.len() as u64, seconds)));
        if best.is_none_or(|(fastest, _)| seconds < fastest) {
            best = Some((seconds, setting));
        }
    }
    let (_, setting) = best.ok_or("no setting was tried")?;
    Ok((setting, BareQuinn::start(setting, blob)?))
}

/// A connection on this thread to a sender on another thread.
pub(crate) struct BareQuinn {
    runtime: Runtime,
    endpoint: Endpoint,
    connection: Connection,
    sender: Option<JoinHandle<()>>,
}

impl BareQuinn {
    pub(crate) fn start(setting: QuinnSetting, blob: &Bytes) -> Result<Self, BenchError> {
        let (server, client) = setting.configs()?;
        let sending = Builder::new_current_thread().enable_all().build()?;
        let endpoint = {
            let _inside = sending.enter();
            bind(&setting, Some(server))?
        };
        let address = endpoint.local_addr()?;
        let blob = blob.clone();
        let sender = Some(thread::spawn(move || {
            // The task ends with the connection.
            let _ = sending.block_on(send(&endpoint, &blob, setting.chunk << 10));
        }));
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (endpoint, connection) = runtime.block_on(async {
            let endpoint = bind(&setting, None)?;
            let connection = endpoint.connect_with(client, address, "bench")?.await?;
            Ok::<_, BenchError>((endpoint, connection))
        })?;
        Ok(Self { runtime, endpoint, connection, sender })
    }

    /// Payload of the connection's packets, as discovered so far, in bytes.
    pub(crate) fn packets(&self) -> u16 {
        self.connection.stats().path.current_mtu
    }

    pub(crate) fn run(&self, blob: &Bytes) -> Result<TransferCost, BenchError> {
        TransferCost::of(|| {
            let received = self.runtime.block_on(receive(&self.connection))?;
            if received == blob.len() { Ok(()) } else { Err(format!("{received} bytes were received").into()) }
        })
    }
}

impl Drop for BareQuinn {
    fn drop(&mut self) {
        self.connection.close(VarInt::from_u32(0), b"done");
        self.runtime.block_on(self.endpoint.wait_idle());
        if let Some(sender) = self.sender.take() {
            // The panic message is already printed.
            let _ = sender.join();
        }
    }
}

async fn send(endpoint: &Endpoint, blob: &Bytes, chunk: usize) -> Result<(), BenchError> {
    let connection = endpoint.accept().await.ok_or("closed")?.await?;
    serve(&connection, blob, chunk).await
}

/// Sends the blob on every stream that the other side opens, one after the other, until the
/// connection is closed.
pub(crate) async fn serve(connection: &Connection, blob: &Bytes, chunk: usize) -> Result<(), BenchError> {
    loop {
        let (mut send, mut recv) = connection.accept_bi().await?;
        recv.read_to_end(1).await?;
        for start in (0..blob.len()).step_by(chunk) {
            send.write_chunk(blob.slice(start..blob.len().min(start + chunk))).await?;
        }
        send.finish()?;
    }
}

pub(crate) async fn receive(connection: &Connection) -> Result<usize, BenchError> {
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(b"!").await?;
    send.finish()?;
    let mut chunks = vec![Bytes::new(); 768];
    let mut received = 0;
    while let Some(read) = recv.read_chunks(&mut chunks).await? {
        received += chunks[..read].iter().map(Bytes::len).sum::<usize>();
        chunks[..read].fill(Bytes::new());
    }
    Ok(received)
}

pub(crate) fn bind(setting: &QuinnSetting, server: Option<ServerConfig>) -> Result<Endpoint, BenchError> {
    let socket = setting.socket(Ipv4Addr::LOCALHOST)?;
    Ok(Endpoint::new(QuinnSetting::endpoint()?, server, socket, Arc::new(TokioRuntime))?)
}
