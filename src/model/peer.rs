//! Peers, their names and their credentials.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Zone;

/// An agent's identity: its ed25519 public key.
///
/// Printed in libp2p's form (`12D3KooW…`): base58 of an identity multihash around the
/// protobuf-encoded key (libp2p specification "Peer Ids and Keys", section "Ed25519"). Other key
/// types are rejected, so every PeerId contains its key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerId([u8; 32]);

/// Multihash `identity`, length 36, then protobuf: key type 1 (ed25519), 32 bytes of key.
const PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

/// The text is not the PeerId of an ed25519 key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the PeerId of an ed25519 key (such a PeerId begins with 12D3KooW)")]
pub struct PeerIdError;

impl PeerId {
    /// The peer with this ed25519 public key.
    pub const fn from_public_key(key: [u8; 32]) -> Self {
        Self(key)
    }

    /// Reads libp2p's binary form.
    ///
    /// # Errors
    /// [`PeerIdError`] unless the bytes are the identity multihash of an ed25519 key.
    pub fn from_multihash(bytes: &[u8]) -> Result<Self, PeerIdError> {
        let key = bytes.strip_prefix(&PREFIX).ok_or(PeerIdError)?;
        Ok(Self(key.try_into().map_err(|_| PeerIdError)?))
    }

    /// libp2p's binary form.
    pub fn to_multihash(self) -> [u8; 38] {
        let mut bytes = [0; 38];
        bytes[..6].copy_from_slice(&PREFIX);
        bytes[6..].copy_from_slice(&self.0);
        bytes
    }

    /// The ed25519 public key.
    pub const fn public_key(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(self.to_multihash()).into_string())
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PeerId {
    type Err = PeerIdError;

    fn from_str(text: &str) -> Result<Self, PeerIdError> {
        // No PeerId is longer. Base58 decoding costs the square of the length, so a longer text is
        // not decoded.
        if text.len() > 64 {
            return Err(PeerIdError);
        }
        let bytes = bs58::decode(text).into_vec().map_err(|_| PeerIdError)?;
        Self::from_multihash(&bytes)
    }
}

/// A Kubernetes node's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

/// The text cannot name a Kubernetes node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be a node's name (1 to 253 of a-z 0-9 - .)")]
pub struct NodeNameError(String);

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for NodeName {
    type Error = NodeNameError;

    /// Accepts the characters and the length of a DNS subdomain (RFC 1123, 253 bytes). The check
    /// bounds what a peer can write into our logs.
    fn try_from(name: String) -> Result<Self, NodeNameError> {
        let fits = (1..=253).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
        if fits { Ok(Self(name)) } else { Err(NodeNameError(name.chars().take(64).collect())) }
    }
}

impl FromStr for NodeName {
    type Err = NodeNameError;

    fn from_str(name: &str) -> Result<Self, NodeNameError> {
        name.to_owned().try_into()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An admitted peer and its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The key that the peer proved to have.
    pub id: PeerId,
    /// The peer's node: from the credential if the credential names one, else as the peer says.
    pub node: NodeName,
    /// Zone of the node, where the cluster has zones and the zone is known.
    pub zone: Option<Zone>,
    /// Address of the blob server (QUIC, UDP).
    pub transfer: SocketAddr,
    /// Address for gossip (libp2p, TCP).
    pub gossip: SocketAddr,
}

/// The proof that admits an agent: a ServiceAccount token, a certificate, or an empty text where a
/// list of PeerIds decides.
///
/// A token is useless to other agents, because its audience is the PeerId. Still the token is a
/// secret until a receiver has checked the audience, so `Debug` prints only the length.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Credential(String);

impl Credential {
    /// Wraps the text of a token or a certificate.
    pub fn new(token: String) -> Self {
        Self(token)
    }

    /// The text itself, to be verified.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credential({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_id_is_parsed_and_printed_in_libp2p_form() {
        // From the libp2p specification's example of an ed25519 identity.
        let text = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA";
        let id: PeerId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(PeerId::from_multihash(&id.to_multihash()), Ok(id));
    }

    #[test]
    fn texts_other_than_ed25519_peer_ids_are_rejected() {
        for text in ["", "12D3KooW", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "0OIl", &"1".repeat(4096)] {
            assert_eq!(text.parse::<PeerId>(), Err(PeerIdError), "{text:?}");
        }
    }

    #[test]
    fn a_credential_is_never_printed() {
        let secret = Credential::new("eyJhbGciOi".into());
        assert_eq!(format!("{secret:?}"), "Credential(10 bytes)");
    }

    #[test]
    fn a_node_name_is_a_dns_subdomain() {
        assert!("ip-10-0-0-1.eu-west-1.compute.internal".parse::<NodeName>().is_ok());
        for bad in ["", "Node", "a b", "a\nb", &"a".repeat(254)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
    }
}
