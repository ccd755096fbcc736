//! The names of first peers, and their addresses.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;

/// Longest wait for the resolver.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The kubelet writes three search domains and the node's own, below 2 KiB by Kubernetes' limit of
/// 2048 characters. A longer file is not read.
const MAX_RESOLV_CONF: u64 = 16 << 10;

/// `HOST:PORT` in the form that is resolved. The name of a Service ends with `.svc` where the chart
/// has no cluster domain. A resolver tries such a name below each search domain, twice for A and
/// AAAA. The kubelet writes a search domain `svc.DOMAIN` for every pod, which yields the full name:
/// a name with a final dot costs one look-up.
pub(super) fn qualified_name(bootstrap_name: &str, resolv_conf: &str) -> String {
    let qualified = bootstrap_name.rsplit_once(':').and_then(|(host, port)| {
        host.strip_suffix(".svc")?;
        let search_domains = resolv_conf.lines().filter_map(|line| line.strip_prefix("search")).next_back()?;
        let domain = search_domains.split_whitespace().find_map(|domain| domain.strip_prefix("svc."))?;
        Some(format!("{host}.{}.:{port}", domain.trim_end_matches('.')))
    });
    qualified.unwrap_or_else(|| bootstrap_name.to_owned())
}

/// Resolves the names of first peers.
#[async_trait]
pub trait DnsResolver: Send + Sync + 'static {
    /// The pod's resolver file; empty where there is none.
    fn resolv_conf(&self) -> String;

    /// The addresses of `HOST:PORT`; `None` where no server answered.
    async fn resolve(&self, name: &str) -> Option<Vec<SocketAddr>>;
}

/// The resolver of the system's C library.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemDnsResolver;

#[async_trait]
impl DnsResolver for SystemDnsResolver {
    fn resolv_conf(&self) -> String {
        let path = Path::new("/etc/resolv.conf");
        let is_short = std::fs::metadata(path).is_ok_and(|file| file.len() <= MAX_RESOLV_CONF);
        if is_short { std::fs::read_to_string(path).unwrap_or_default() } else { String::new() }
    }

    async fn resolve(&self, name: &str) -> Option<Vec<SocketAddr>> {
        match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(name)).await {
            Ok(Ok(addresses)) => Some(addresses.collect()),
            Ok(Err(error)) => {
                tracing::debug!(name, %error, "cannot resolve");
                None
            }
            Err(_) => {
                tracing::debug!(name, "the resolver does not answer");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD_RESOLV_CONF: &str =
        "search lighterman.svc.example.org svc.example.org example.org lan\nnameserver 10.96.0.10\noptions ndots:5\n";

    #[test]
    fn the_name_of_a_service_is_qualified_by_the_search_domain_of_the_pod() {
        for (bootstrap_name, expected) in [
            ("lighterman-peers.lighterman.svc:4701", "lighterman-peers.lighterman.svc.example.org.:4701"),
            ("lighterman-peers.lighterman.svc.example.org.:4701", "lighterman-peers.lighterman.svc.example.org.:4701"),
            ("10.0.0.1:4701", "10.0.0.1:4701"),
            ("[fd00::1]:4701", "[fd00::1]:4701"),
            ("peers.lan:4701", "peers.lan:4701"),
            ("svc:4701", "svc:4701"),
            ("peers.svc", "peers.svc"),
        ] {
            assert_eq!(qualified_name(bootstrap_name, POD_RESOLV_CONF), expected);
        }
    }

    #[test]
    fn a_name_stays_as_it_is_without_a_search_domain_of_services() {
        let bootstrap_name = "lighterman-peers.lighterman.svc:4701";
        for conf in ["", "nameserver 10.0.0.1\n", "search lan\n", "search svc.old\nsearch lan\n"] {
            assert_eq!(qualified_name(bootstrap_name, conf), bootstrap_name, "{conf:?}");
        }
    }

    #[test]
    fn a_last_dot_of_the_search_domain_is_not_doubled() {
        assert_eq!(qualified_name("a.b.svc:1", "search svc.cluster.local.\n"), "a.b.svc.cluster.local.:1");
    }
}
