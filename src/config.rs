//! Flags and environment, turned into one configuration for each adapter. Nobody else reads either.
//!
//! The chart's values, these flags and the README name the same things; `scripts/check-flags.sh` compares the first two.

mod flags;
pub mod rules_file;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use self::flags::{AdmissionKind, AgentArgs};
use crate::decide::opt_in::Policy;
use crate::decide::rules::{Budgets, Manner, ResolveSettings, Rules};
use crate::model::{NodeName, PeerId};
use crate::{cluster, containerd, mesh, registry, transfer, webhook};

/// Everything that an agent is told, by whom it concerns.
#[derive(Debug, Clone)]
pub struct Config {
    /// Blobs, and the door.
    pub transfer: transfer::Config,
    /// Gossip.
    pub mesh: mesh::Config,
    /// The content store.
    pub containerd: containerd::Config,
    /// The API server.
    pub cluster: cluster::Config,
    /// The registries that images come from.
    pub registry: registry::Config,
    /// Where to tell people outside the cluster, if anywhere.
    pub webhook: Option<webhook::Config>,
    /// `Some` for a list of PeerIds instead of tokens.
    pub admitted_peers: Option<Vec<PeerId>>,
    /// The agent itself.
    pub settings: Settings,
}

/// What the agent itself is told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This node.
    pub node: NodeName,
    /// The admin port.
    pub admin_listen: SocketAddr,
    /// Where first peers may be, as `host:port`.
    pub seeds: Vec<String>,
    /// Where the key is kept.
    pub key_file: PathBuf,
    /// Who is helped and what it may cost, unless the rules file says otherwise.
    pub rules: Rules,
    /// What may override that.
    pub rules_file: Option<PathBuf>,
    /// Where people on this node reach the agent.
    pub control_socket: PathBuf,
    /// How references are read.
    pub resolve: ResolveSettings,
    /// How recoveries are carried out.
    pub manner: Manner,
    /// Whether registries are asked if they are there.
    pub probe_registries: bool,
    /// Whether images are imported although containerd has verifiers.
    pub import_past_verifiers: bool,
    /// How long stopping may take.
    pub grace: Duration,
}

/// Two settings contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl AgentArgs {
    /// Gives each adapter what it needs.
    ///
    /// # Errors
    /// [`ConfigError`] when settings contradict each other; each alone was checked by its parser.
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
            admission,
            allow_peer,
            data_dir,
            containerd_socket,
            containerd_namespace,
            containerd_content_root,
            annotation_prefix,
            denied_namespaces,
            denied_namespace_selector,
            allowed_namespace_selector,
            salvage_on,
            tag_policy,
            ask_registry,
            pull_secret_namespaces,
            any_repository,
            probe_registries,
            insecure_registry,
            ca_file,
            webhook_url,
            webhook_secret_file,
            delete_pods,
            dry_run,
            import_past_verifiers,
            rules_file,
            max_download_rate,
            max_upload_rate,
            kill_switch,
            concurrent_recoveries,
            concurrent_blobs,
            max_serving,
            max_image_bytes,
            min_free_bytes,
            min_free_percent,
            grace_period,
        } = self;
        let admitted_peers = match (admission, allow_peer.is_empty()) {
            (AdmissionKind::Static, false) => Some(allow_peer),
            (AdmissionKind::Static, true) => return conflict("--admission static needs --allow-peer"),
            (AdmissionKind::Token, true) => None,
            (AdmissionKind::Token, false) => return conflict("--allow-peer needs --admission static"),
        };
        if admission == AdmissionKind::Token && pod_name.is_empty() {
            return conflict("--admission token needs --pod-name, which the token is bound to");
        }
        if annotation_prefix.iter().any(|prefix| prefix.is_empty() || prefix.contains('/')) {
            return conflict("--annotation-prefix is a list of DNS names without a slash");
        }
        Ok(Config {
            transfer: transfer::Config { listen, gossip_port: listen.port(), node: node_name.clone(), max_serving },
            mesh: mesh::Config { listen },
            containerd: containerd::Config {
                socket: containerd_socket,
                containerd_namespace,
                content_root: containerd_content_root,
            },
            cluster: cluster::Config {
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
            // The chart sets every variable: an empty one is none.
            webhook: webhook_url.filter(|url| !url.is_empty()).map(|url| webhook::Config {
                url,
                secret_file: webhook_secret_file,
                ca_file,
            }),
            admitted_peers,
            settings: Settings {
                node: node_name,
                admin_listen,
                seeds: join,
                key_file: data_dir.join("identity.key"),
                rules: Rules {
                    policy: Policy {
                        kill_switch,
                        annotation_prefixes: annotation_prefix,
                        denied_k8s_namespaces: denied_namespaces.into_iter().collect::<BTreeSet<_>>(),
                        denied_selector: denied_namespace_selector.0,
                        allowed_selector: allowed_namespace_selector.0,
                        salvage_on: salvage_on.into_iter().collect::<BTreeSet<_>>(),
                    },
                    budgets: Budgets {
                        concurrent_recoveries,
                        concurrent_blobs,
                        max_image_bytes,
                        min_free_bytes,
                        min_free_percent,
                        max_download_rate,
                        max_upload_rate,
                    },
                },
                rules_file,
                control_socket: data_dir.join("agent.sock"),
                resolve: ResolveSettings { tag_policy, ask_registry, any_repository, pull_secret_namespaces },
                manner: Manner { dry_run, delete_pods },
                probe_registries,
                import_past_verifiers,
                grace: Duration::from_secs(grace_period),
            },
        })
    }
}

fn conflict(text: &str) -> Result<Config, ConfigError> {
    Err(ConfigError(text.to_owned()))
}

/// An address on loopback with a free port, for agents that share a machine.
pub fn loopback() -> SocketAddr {
    SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 0)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        agent: AgentArgs,
    }

    fn config(flags: &[&str]) -> Result<Config, ConfigError> {
        let always = ["agent", "--node-name", "here", "--pod-name", "agent-1"];
        Command::parse_from(always.iter().chain(flags)).agent.into_config()
    }

    #[test]
    fn without_flags_the_usual_rules_are_in_force() {
        assert_eq!(config(&[]).unwrap().settings.rules, Rules::default());
    }

    #[test]
    fn lists_and_selectors_are_read() {
        let flags = ["--annotation-prefix", "lighterman.dev,tote.dev", "--allowed-namespace-selector", "component=cni"];
        let policy = config(&flags).unwrap().settings.rules.policy;
        assert_eq!(policy.annotation_prefixes, ["lighterman.dev", "tote.dev"]);
        assert_eq!(policy.allowed_selector, Some("component=cni".parse().unwrap()));
        assert!(config(&["--annotation-prefix", "lighterman.dev/allow"]).is_err());
    }
}
