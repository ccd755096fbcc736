//! Flags and environment, turned into one configuration for each adapter. No other module reads
//! flags or environment.
//!
//! The chart's values, these flags and `docs/operations.md` use the same names.
//! `scripts/check-flags.sh` compares the chart with the flags.

mod flags;
pub mod policy_file;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use self::flags::{AdmissionKind, AgentArgs};
use crate::addresses::is_address_for_peers;
use crate::decide::opt_in::OptInPolicy;
use crate::decide::policy::{Budgets, Policy, RecoveryOptions, ResolveOptions};
use crate::decide::retain::RetainOptions;
use crate::model::{NodeName, PeerId, Zone};
use crate::{admission, api_server, containerd, mesh, registry, transfer, webhook};

/// Every setting of an agent, grouped by the part that reads it.
#[derive(Debug, Clone)]
pub struct Config {
    /// Blobs over QUIC, and the handshake with peers.
    pub transfer: transfer::Config,
    /// Gossip.
    pub mesh: mesh::Config,
    /// The content store.
    pub containerd: containerd::Config,
    /// The API server.
    pub api_server: api_server::Config,
    /// The registries that images come from.
    pub registry: registry::Config,
    /// The receiver of messages outside the cluster, if one is set.
    pub webhook: Option<webhook::Config>,
    /// The credential that admits peers.
    pub admission: AdmissionMode,
    /// The agent itself.
    pub settings: Settings,
}

/// The credential that admits peers.
#[derive(Debug, Clone)]
pub enum AdmissionMode {
    /// ServiceAccount tokens.
    Token(admission::TokenAdmissionOptions),
    /// Certificates.
    Certificate(admission::CertificateFiles),
    /// The keys of these peers alone.
    Static(Vec<PeerId>),
}

/// The settings of [`crate::agent`].
#[derive(Debug, Clone)]
pub struct Settings {
    /// This node.
    pub node: NodeName,
    /// The admin port.
    pub admin_listen: SocketAddr,
    /// First addresses of other agents, as `host:port`.
    pub join_addresses: Vec<String>,
    /// This node's address for peers, if set.
    pub advertise: Option<IpAddr>,
    /// This node's zone, if set. The node's zone label does not count then.
    pub zone: Option<Zone>,
    /// The file of this node's key.
    pub key_file: PathBuf,
    /// The file of known peers.
    pub peers_file: PathBuf,
    /// Which pods are recovered, for which causes, within which budgets. The policy file overrides
    /// these values.
    pub policy: Policy,
    /// The policy file, if one is set.
    pub policy_file: Option<PathBuf>,
    /// The socket of `lighterman status` and `lighterman pull`.
    pub control_socket: PathBuf,
    /// How a reference becomes a digest and providers.
    pub resolve: ResolveOptions,
    /// Dry run, stalled pulls and deletion of pods.
    pub options: RecoveryOptions,
    /// Whether the agent probes registries, so that an outage is known before a pull fails.
    pub probe_registries: bool,
    /// The folder of containerd's image verifiers on the node.
    pub image_verifier_dir: PathBuf,
    /// Whether images are imported although containerd has verifiers.
    pub import_past_verifiers: bool,
    /// Whether layers are unpacked during the download.
    pub unpack_layers: bool,
    /// Whether the agent fetches and protects the images of its own DaemonSet.
    pub own_image: bool,
    /// Which layers are retained.
    pub retain: RetainOptions,
    /// Time to finish after SIGTERM.
    pub grace: Duration,
}

/// Settings that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl AgentArgs {
    /// Distributes the flags over the adapters.
    ///
    /// # Errors
    /// [`ConfigError`] when flags contradict each other. Each flag alone was checked by its parser.
    pub fn into_config(self) -> Result<Config, ConfigError> {
        let Self {
            node_name,
            pod_namespace,
            pod_name,
            pod_uid,
            service_account,
            kubeconfig,
            start_jitter,
            listen,
            admin_listen,
            join,
            advertise_address,
            zone,
            admission,
            allow_peer,
            admission_grace,
            tls_cert,
            tls_key,
            tls_ca,
            tls_name,
            data_dir,
            containerd_socket,
            containerd_namespace,
            containerd_content_root,
            host_root,
            annotation_prefix,
            denied_namespaces,
            denied_namespace_selector,
            allowed_namespace_selector,
            recover_on,
            require_repositories,
            tag_policy,
            ask_registry,
            pull_secret_namespaces,
            any_repository,
            probe_registries,
            insecure_registry,
            ca_file,
            webhook_url,
            webhook_secret_file,
            stalled_after,
            end_stalled_pulls,
            delete_pods,
            dry_run,
            image_verifier_dir,
            import_past_verifiers,
            unpack_layers,
            own_image,
            retain_layers,
            retain_bytes,
            retain_fetch,
            retain_fetch_rate,
            policy_file,
            max_download_rate,
            max_upload_rate,
            kill_switch,
            concurrent_recoveries,
            concurrent_blobs,
            concurrent_uploads,
            max_image_bytes,
            min_free_bytes,
            image_gc_percent,
            eviction_percent,
            grace_period,
        } = self;
        let admission_mode = match (admission, allow_peer.is_empty(), (tls_cert, tls_key, tls_ca)) {
            (AdmissionKind::Static, false, (None, None, None)) => AdmissionMode::Static(allow_peer),
            (AdmissionKind::Static, true, _) => return conflict("--admission static needs --allow-peer"),
            (_, false, _) => return conflict("--allow-peer needs --admission static"),
            (AdmissionKind::Token, _, (None, None, None)) => AdmissionMode::Token(admission::TokenAdmissionOptions {
                file: Some(data_dir.join("admission.json")),
                grace: Duration::from_secs(admission_grace),
            }),
            (AdmissionKind::Certificate, _, (Some(certificate), Some(key), Some(authority))) => {
                AdmissionMode::Certificate(admission::CertificateFiles { certificate, key, authority, name: tls_name })
            }
            (AdmissionKind::Certificate, ..) => {
                return conflict("--admission certificate needs --tls-cert, --tls-key and --tls-ca");
            }
            _ => return conflict("--tls-cert, --tls-key and --tls-ca need --admission certificate"),
        };
        if admission == AdmissionKind::Token && pod_name.is_empty() {
            return conflict("--admission token needs --pod-name: the token is bound to this pod");
        }
        if advertise_address.is_some_and(|address| !is_address_for_peers(address)) {
            return conflict(
                "--advertise-address needs an address that peers can dial, not a link-local or unspecified one",
            );
        }
        if end_stalled_pulls && stalled_after == 0 {
            return conflict("--end-stalled-pulls needs --stalled-after");
        }
        if annotation_prefix.iter().any(|prefix| prefix.is_empty() || prefix.contains('/')) {
            return conflict("--annotation-prefix needs DNS names without a slash, separated by commas");
        }
        Ok(Config {
            transfer: transfer::Config {
                listen,
                gossip_port: listen.port(),
                node: node_name.clone(),
                concurrent_uploads,
            },
            mesh: mesh::Config { listen },
            containerd: containerd::Config {
                socket: containerd_socket,
                containerd_namespace,
                content_root: containerd_content_root,
                host_root,
                staging: Some(data_dir.join("staging")),
            },
            api_server: api_server::Config {
                node: node_name.clone(),
                k8s_namespace: pod_namespace,
                pod_name,
                pod_uid,
                service_account,
                kubeconfig,
                start_jitter: Duration::from_secs(start_jitter),
            },
            registry: registry::Config {
                insecure: insecure_registry,
                ca_file: ca_file.clone(),
                ..registry::Config::default()
            },
            // A variable that is set and empty means no webhook.
            webhook: webhook_url.filter(|url| !url.is_empty()).map(|url| webhook::Config {
                url,
                secret_file: webhook_secret_file,
                ca_file,
            }),
            admission: admission_mode,
            settings: Settings {
                node: node_name,
                admin_listen,
                join_addresses: join,
                advertise: advertise_address,
                zone,
                key_file: data_dir.join("identity.key"),
                peers_file: data_dir.join("peers.json"),
                policy: Policy {
                    opt_in: OptInPolicy {
                        kill_switch,
                        annotation_prefixes: annotation_prefix,
                        denied_k8s_namespaces: denied_namespaces.into_iter().collect::<BTreeSet<_>>(),
                        denied_selector: denied_namespace_selector.0,
                        allowed_selector: allowed_namespace_selector.0,
                        recover_on: recover_on.into_iter().collect::<BTreeSet<_>>(),
                        require_repositories,
                    },
                    budgets: Budgets {
                        concurrent_recoveries,
                        concurrent_blobs,
                        max_image_bytes,
                        min_free_bytes,
                        image_gc_percent,
                        eviction_percent,
                        max_download_rate,
                        max_upload_rate,
                    },
                },
                policy_file,
                control_socket: data_dir.join("agent.sock"),
                resolve: ResolveOptions { tag_policy, ask_registry, any_repository, pull_secret_namespaces },
                options: RecoveryOptions {
                    dry_run,
                    delete_pods,
                    stalled_after: (stalled_after > 0).then(|| Duration::from_secs(stalled_after)),
                    end_stalled_pulls,
                },
                probe_registries,
                image_verifier_dir: image_verifier_dir.unwrap_or_else(|| containerd::IMAGE_VERIFIER_DIR.into()),
                import_past_verifiers,
                unpack_layers,
                own_image,
                retain: RetainOptions {
                    layers: retain_layers.into(),
                    bytes: retain_bytes,
                    fetch: retain_fetch.into(),
                    fetch_rate: retain_fetch_rate,
                },
                grace: Duration::from_secs(grace_period),
            },
        })
    }
}

fn conflict(text: &str) -> Result<Config, ConfigError> {
    Err(ConfigError(text.to_owned()))
}

/// Loopback with port 0, so that several agents on one machine get free ports.
pub fn loopback() -> SocketAddr {
    SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 0)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::decide::fill::FetchFrom;
    use crate::decide::retain::{RetainBytes, RetainLayers};

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        agent: AgentArgs,
    }

    fn config(flags: &[&str]) -> Result<Config, ConfigError> {
        let required = ["agent", "--node-name", "here", "--pod-name", "agent-1"];
        Command::parse_from(required.iter().chain(flags)).agent.into_config()
    }

    #[test]
    fn the_default_policy_applies_without_flags() {
        assert_eq!(config(&[]).unwrap().settings.policy, Policy::default());
    }

    #[test]
    fn each_kind_of_admission_has_its_own_flags_and_no_others() {
        let files = ["--tls-cert", "/c", "--tls-key", "/k", "--tls-ca", "/a"];
        let with = |kind: &str, more: &[&str]| config(&[&["--admission", kind], more].concat()).map(|it| it.admission);
        let peer = ["--allow-peer", "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"];
        assert!(matches!(with("certificate", &files), Ok(AdmissionMode::Certificate(it)) if it.name == "lighterman"));
        assert!(matches!(with("static", &peer), Ok(AdmissionMode::Static(it)) if it.len() == 1));
        assert!(matches!(with("token", &[]), Ok(AdmissionMode::Token(it)) if it.grace == Duration::from_secs(86_400)));
        for (kind, more) in
            [("certificate", &files[..4]), ("certificate", &peer), ("token", &files), ("token", &peer), ("static", &[])]
        {
            assert!(with(kind, more).is_err(), "{kind} {more:?}");
        }
    }

    #[test]
    fn retained_bytes_are_a_quantity_or_a_share_of_the_disk() {
        let retain = |flags: &[&str]| config(flags).unwrap().settings.retain;
        let expected = RetainOptions {
            layers: RetainLayers::OptedIn,
            bytes: RetainBytes::Percent(20),
            fetch: FetchFrom::Registry,
            fetch_rate: 8 << 20,
        };
        assert_eq!(retain(&[]), expected);
        let flags =
            ["--retain-layers", "all", "--retain-bytes", "20Gi", "--retain-fetch", "none", "--retain-fetch-rate", "0"];
        let all = RetainOptions {
            layers: RetainLayers::All,
            bytes: RetainBytes::Bytes(20 << 30),
            fetch: FetchFrom::None,
            fetch_rate: 0,
        };
        assert_eq!(retain(&flags), all);
        for (value, fetch) in [("true", FetchFrom::Peers), ("false", FetchFrom::None), ("peers", FetchFrom::Peers)] {
            assert_eq!(retain(&["--retain-fetch", value]).fetch, fetch, "{value}");
        }
        for invalid in ["91%", "%", "-1", "20 %", "much"] {
            let flags = ["agent", "--node-name", "here", "--pod-name", "a", "--retain-bytes", invalid];
            assert!(Command::try_parse_from(flags).is_err(), "{invalid}");
        }
    }

    #[test]
    fn stalled_pulls_are_ended_only_where_a_pull_can_stall() {
        assert!(!config(&[]).unwrap().settings.options.end_stalled_pulls);
        assert!(config(&["--end-stalled-pulls"]).unwrap().settings.options.end_stalled_pulls);
        assert!(config(&["--end-stalled-pulls", "--stalled-after", "0"]).is_err());
    }

    #[test]
    fn lists_and_selectors_are_parsed() {
        let flags = ["--annotation-prefix", "lighterman.dev,tote.dev", "--allowed-namespace-selector", "component=cni"];
        let policy = config(&flags).unwrap().settings.policy.opt_in;
        assert_eq!(policy.annotation_prefixes, ["lighterman.dev", "tote.dev"]);
        assert_eq!(policy.allowed_selector, Some("component=cni".parse().unwrap()));
        assert!(config(&["--annotation-prefix", "lighterman.dev/allow"]).is_err());
    }

    #[test]
    fn the_advertised_address_must_be_dialable() {
        let advertise = |address| config(&["--advertise-address", address]).map(|config| config.settings.advertise);
        assert_eq!(advertise("10.0.0.1").unwrap(), Some([10, 0, 0, 1].into()));
        assert!(advertise("0.0.0.0").is_err() && advertise("::").is_err() && advertise("fe80::1").is_err());
    }
}
