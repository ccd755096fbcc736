//! Settings of a bare quinn stream, and the endpoints with these settings.

use std::fmt;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use lighterman::identity::Identity;
use lighterman::transfer::DelayBounded;
use nix::sys::socket::{setsockopt, sockopt};
use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, EndpointConfig, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};
use rustls::SignatureScheme;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::crypto::ring::cipher_suite;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};

use crate::report::BenchError;

/// The congestion controller, which limits the bytes in flight.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Congestion {
    /// The agent's controller.
    DelayBounded,
    Cubic,
    Bbr,
    NewReno,
}

/// The cipher of the packets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cipher {
    Aes128,
    ChaCha20,
}

/// Settings that may make a stream faster. The packet size is not among them: every setting uses
/// the path's MTU.
#[derive(Clone, Copy)]
pub(crate) struct QuinnSetting {
    /// Receive windows of a stream and of the connection, and the send window, in MiB.
    pub(crate) windows: [u32; 3],
    /// Size of the chunks that are passed to quinn, in KiB.
    pub(crate) chunk: usize,
    /// Size of the socket's buffers in KiB. 0 keeps the kernel's default.
    pub(crate) buffer: usize,
    /// Packets per acknowledgement. 0 disables the ACK frequency extension.
    pub(crate) ack_every: u32,
    pub(crate) congestion: Congestion,
    /// Initial window in KiB. 0 keeps the controller's default: 12 000 bytes for quinn's
    /// controllers, and ten packets of the path's MTU for the agent's.
    pub(crate) initial_window: u64,
    /// Round-trip time that a new connection assumes, in milliseconds.
    pub(crate) initial_rtt: u64,
    /// Whether a system call passes several packets to the kernel (GSO).
    pub(crate) segmentation: bool,
    pub(crate) cipher: Cipher,
}

/// Upper bound of the MTU discovery, as in the agent.
const MTU: u16 = 6500;

/// The agent's setting.
pub(crate) const AGENT_SETTING: QuinnSetting = QuinnSetting {
    windows: [2, 10, 10],
    chunk: 256,
    buffer: 4096,
    ack_every: 0,
    congestion: Congestion::DelayBounded,
    initial_window: 0,
    initial_rtt: 50,
    segmentation: true,
    cipher: Cipher::Aes128,
};

impl fmt::Display for Congestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DelayBounded => "CUBIC with bounded queueing delay",
            Self::Cubic => "CUBIC",
            Self::Bbr => "BBR",
            Self::NewReno => "NewReno",
        })
    }
}

impl fmt::Display for QuinnSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { windows: [stream, connection, send], chunk, buffer, ack_every, congestion, .. } = self;
        let Self { initial_window, initial_rtt, segmentation, cipher, .. } = self;
        write!(f, "windows {stream}/{connection}/{send} MiB, chunks {chunk} KiB, {congestion}")?;
        match buffer {
            0 => write!(f, ", default socket buffers")?,
            kib => write!(f, ", socket buffers {kib} KiB")?,
        }
        match ack_every {
            0 => write!(f, ", no ack frequency")?,
            packets => write!(f, ", an ack every {packets} packets")?,
        }
        if *initial_window > 0 {
            write!(f, ", initial window {initial_window} KiB")?;
        }
        if *initial_rtt != AGENT_SETTING.initial_rtt {
            write!(f, ", assumed round trip {initial_rtt} ms")?;
        }
        if !segmentation {
            write!(f, ", no GSO")?;
        }
        if *cipher == Cipher::ChaCha20 {
            write!(f, ", ChaCha20")?;
        }
        Ok(())
    }
}

impl QuinnSetting {
    /// A socket at a free port of this address.
    pub(crate) fn socket(&self, address: Ipv4Addr) -> Result<UdpSocket, BenchError> {
        let socket = UdpSocket::bind((address, 0))?;
        let buffer = self.buffer << 10;
        if buffer > 0 && setsockopt(&socket, sockopt::RcvBufForce, &buffer).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &buffer)?;
        }
        if buffer > 0 && setsockopt(&socket, sockopt::SndBufForce, &buffer).is_err() {
            setsockopt(&socket, sockopt::SndBuf, &buffer)?;
        }
        Ok(socket)
    }

    /// The configuration of an endpoint.
    pub(crate) fn endpoint() -> Result<EndpointConfig, BenchError> {
        let mut config = EndpointConfig::default();
        config.max_udp_payload_size(MTU)?;
        Ok(config)
    }

    /// The configurations of both sides, with TLS and this cipher. The client does not verify the
    /// server.
    pub(crate) fn configs(&self) -> Result<(ServerConfig, ClientConfig), BenchError> {
        let suite = match self.cipher {
            Cipher::Aes128 => cipher_suite::TLS13_AES_128_GCM_SHA256,
            Cipher::ChaCha20 => cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        };
        let provider = Arc::new(CryptoProvider { cipher_suites: vec![suite], ..default_provider() });
        let (certificate, key) = libp2p_tls::certificate::generate(&Identity::generate().keypair())?;
        let signer = provider.key_provider.load_private_key(key)?;
        let resolver = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], signer)));
        let server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(NoServerVerification))
            .with_no_client_auth();
        // Initial packets use this cipher regardless of the negotiated cipher (RFC 9001, 5.2).
        let initial_suite = cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().and_then(|suite| suite.quic_suite());
        let initial_suite = initial_suite.ok_or("no cipher for the first packets")?;
        let server = QuicServerConfig::with_initial(Arc::new(server), initial_suite)?;
        let client = QuicClientConfig::with_initial(Arc::new(client), initial_suite)?;
        let mut server = ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(self.transport());
        let mut client = ClientConfig::new(Arc::new(client));
        client.transport_config(self.transport());
        Ok((server, client))
    }

    fn transport(&self) -> Arc<TransportConfig> {
        let [stream, connection, send] = self.windows.map(|mib| mib << 20);
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(MTU);
        let mut transport = TransportConfig::default();
        transport
            .stream_receive_window(stream.into())
            .receive_window(connection.into())
            .send_window(send.into())
            .mtu_discovery_config(Some(mtu))
            .initial_rtt(Duration::from_millis(self.initial_rtt))
            .enable_segmentation_offload(self.segmentation)
            .congestion_controller_factory(self.controller());
        if self.ack_every > 0 {
            let mut frequency = AckFrequencyConfig::default();
            frequency.ack_eliciting_threshold(VarInt::from_u32(self.ack_every));
            transport.ack_frequency_config(Some(frequency));
        }
        Arc::new(transport)
    }

    fn controller(&self) -> Arc<dyn ControllerFactory + Send + Sync> {
        let (mut cubic, mut bbr, mut new_reno) =
            (CubicConfig::default(), BbrConfig::default(), NewRenoConfig::default());
        if self.initial_window > 0 {
            cubic.initial_window(self.initial_window << 10);
            bbr.initial_window(self.initial_window << 10);
            new_reno.initial_window(self.initial_window << 10);
        }
        match self.congestion {
            Congestion::DelayBounded => Arc::new(DelayBounded::new(cubic)),
            Congestion::Cubic => Arc::new(cubic),
            Congestion::Bbr => Arc::new(bbr),
            Congestion::NewReno => Arc::new(new_reno),
        }
    }
}

#[derive(Debug)]
struct NoServerVerification;

impl ServerCertVerifier for NoServerVerification {
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
