//! quinn by itself: one stream of bytes that nobody looks at, as fast as a few settings make it.

use std::fmt;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use lighterman::identity::Identity;
use nix::sys::socket::{setsockopt, sockopt};
use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Connection, Endpoint, EndpointConfig, MtuDiscoveryConfig, ServerConfig,
    TokioRuntime, TransportConfig, VarInt,
};
use rustls::SignatureScheme;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio::runtime::{Builder, Runtime};

use crate::fetch::Run;
use crate::report::{Failure, mb_s, note};

/// What may make a stream faster. The frame size is not among it: it is the network's.
#[derive(Clone, Copy)]
pub(crate) struct Setting {
    /// Receive windows of a stream and of the connection, and the send window, in MiB.
    windows: [u32; 3],
    /// Bytes given to quinn at a time, in KiB.
    chunk: usize,
    /// The socket's buffers, in KiB; 0 leaves them as the kernel has them.
    buffer: usize,
    /// Packets acknowledged at a time; 0 is without the extension.
    ack_every: u32,
    bbr: bool,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { windows: [stream, connection, send], chunk, buffer, ack_every, bbr } = self;
        let congestion = if *bbr { "BBR" } else { "CUBIC" };
        write!(f, "windows {stream}/{connection}/{send} MiB, chunks {chunk} KiB, {congestion}")?;
        match buffer {
            0 => write!(f, ", socket buffers as they are")?,
            kib => write!(f, ", socket buffers {kib} KiB")?,
        }
        match ack_every {
            0 => write!(f, ", no ack frequency"),
            packets => write!(f, ", an ack every {packets} packets"),
        }
    }
}

/// As the agent has it.
const OURS: Setting = Setting { windows: [4, 20, 20], chunk: 256, buffer: 4096, ack_every: 0, bbr: false };

const TRIED: [Setting; 11] = [
    OURS,
    Setting { chunk: 1024, ..OURS },
    Setting { windows: [2, 8, 2], ..OURS },
    Setting { windows: [8, 32, 8], ..OURS },
    Setting { windows: [16, 64, 16], chunk: 1024, ..OURS },
    Setting { buffer: 16 << 10, windows: [16, 64, 16], ..OURS },
    Setting { buffer: 0, ..OURS },
    Setting { ack_every: 10, ..OURS },
    Setting { ack_every: 40, ..OURS },
    Setting { ack_every: 40, windows: [8, 32, 8], chunk: 1024, ..OURS },
    Setting { bbr: true, ..OURS },
];

/// Each setting's best of so many runs counts.
const TRIES: usize = 4;

/// Tries every setting, and keeps the fastest.
pub(crate) fn fastest(blob: &Bytes) -> Result<(Setting, Bare), Failure> {
    let mut best: Option<(f64, Setting)> = None;
    for setting in TRIED {
        let bare = Bare::start(setting, blob)?;
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
    Ok((setting, Bare::start(setting, blob)?))
}

/// A connection on this thread to a sender on a thread of its own.
pub(crate) struct Bare {
    runtime: Runtime,
    endpoint: Endpoint,
    connection: Connection,
    sender: Option<JoinHandle<()>>,
}

impl Bare {
    fn start(setting: Setting, blob: &Bytes) -> Result<Self, Failure> {
        let (server, client) = configs(setting)?;
        let sending = Builder::new_current_thread().enable_all().build()?;
        let endpoint = {
            let _inside = sending.enter();
            bind(setting, Some(server))?
        };
        let address = endpoint.local_addr()?;
        let blob = blob.clone();
        let sender = Some(thread::spawn(move || {
            // It ends when the connection does.
            let _ = sending.block_on(send(&endpoint, &blob, setting.chunk << 10));
        }));
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (endpoint, connection) = runtime.block_on(async {
            let endpoint = bind(setting, None)?;
            let connection = endpoint.connect_with(client, address, "bench")?.await?;
            Ok::<_, Failure>((endpoint, connection))
        })?;
        Ok(Self { runtime, endpoint, connection, sender })
    }

    pub(crate) fn run(&self, blob: &Bytes) -> Result<Run, Failure> {
        Run::of(|| {
            let received = self.runtime.block_on(receive(&self.connection))?;
            if received == blob.len() { Ok(()) } else { Err(format!("{received} bytes came").into()) }
        })
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.connection.close(VarInt::from_u32(0), b"done");
        self.runtime.block_on(self.endpoint.wait_idle());
        if let Some(sender) = self.sender.take() {
            // A panic was printed when it happened.
            let _ = sender.join();
        }
    }
}

async fn send(endpoint: &Endpoint, blob: &Bytes, chunk: usize) -> Result<(), Failure> {
    let connection = endpoint.accept().await.ok_or("closed")?.await?;
    loop {
        let (mut send, mut recv) = connection.accept_bi().await?;
        recv.read_to_end(1).await?;
        for start in (0..blob.len()).step_by(chunk) {
            send.write_chunk(blob.slice(start..blob.len().min(start + chunk))).await?;
        }
        send.finish()?;
    }
}

async fn receive(connection: &Connection) -> Result<usize, Failure> {
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

fn bind(setting: Setting, server: Option<ServerConfig>) -> Result<Endpoint, Failure> {
    let socket = UdpSocket::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let buffer = setting.buffer << 10;
    if buffer > 0 && setsockopt(&socket, sockopt::RcvBufForce, &buffer).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &buffer)?;
    }
    if buffer > 0 && setsockopt(&socket, sockopt::SndBufForce, &buffer).is_err() {
        setsockopt(&socket, sockopt::SndBuf, &buffer)?;
    }
    Ok(Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime))?)
}

fn transport(setting: Setting) -> Arc<TransportConfig> {
    let [stream, connection, send] = setting.windows.map(|mib| mib << 20);
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(1452);
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(stream.into())
        .receive_window(connection.into())
        .send_window(send.into())
        .mtu_discovery_config(Some(mtu));
    if setting.bbr {
        transport.congestion_controller_factory(Arc::new(BbrConfig::default()));
    } else {
        transport.congestion_controller_factory(Arc::new(CubicConfig::default()));
    }
    if setting.ack_every > 0 {
        let mut frequency = AckFrequencyConfig::default();
        frequency.ack_eliciting_threshold(VarInt::from_u32(setting.ack_every));
        transport.ack_frequency_config(Some(frequency));
    }
    Arc::new(transport)
}

/// TLS with the one cipher. Who answers is nobody's business here.
fn configs(setting: Setting) -> Result<(ServerConfig, ClientConfig), Failure> {
    let cipher_suites = vec![cipher_suite::TLS13_AES_128_GCM_SHA256];
    let provider = Arc::new(CryptoProvider { cipher_suites, ..default_provider() });
    let (certificate, key) = libp2p_tls::certificate::generate(&Identity::generate().keypair())?;
    let signer = provider.key_provider.load_private_key(key)?;
    let shown = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], signer)));
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(shown);
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    let mut server = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server)?));
    server.transport_config(transport(setting));
    let mut client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(client)?));
    client.transport_config(transport(setting));
    Ok((server, client))
}

#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}
