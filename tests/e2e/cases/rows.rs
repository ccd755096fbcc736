//! The table.

use super::Owner::{CronJob, DaemonSet, Deployment, Job, StatefulSet};
use super::Wants::OwnedBy;
use super::{Asks, CASE, Case, Here, Nodes, Opted, Then, Wants};
use crate::images::{Own, PLAIN, Packing, Recipe, Root};
use crate::registries::{Fault, World};

const NO_PROVIDER: Then = Then::Told("ImageNoProvider", &[]);
const NO_PLATFORM: Then = Then::Told("ImageNotActionable", &["no manifest for linux/amd64"]);
const DENIED: Then = Then::Told("ImageNotActionable", &["denies"]);
const LAYER_ELSEWHERE: Then = Then::Told("ImageNotActionable", &["layer"]);
const ALWAYS: Then = Then::Told("ImageNotActionable", &["always"]);
const NEVER: Then = Then::Told("ImageNotActionable", &["salvageon", "never"]);
const NOT_LISTED: Then = Then::Told("ImageNotActionable", &["repositories"]);
const QUOTED_400: Then = Then::Told("ImageFailureNotUnderstood", &["400 bad request"]);
const QUOTED_402: Then = Then::Told("ImageFailureNotUnderstood", &["402 payment required"]);
const INDEX: Recipe = Recipe { root: Root::Index, ..PLAIN };
const TWO_PLATFORMS: Recipe = Recipe { root: Root::WholeIndex, ..PLAIN };
const OTHER_PLATFORM: Recipe = Recipe { root: Root::OtherPlatform, ..PLAIN };
const NESTED: Recipe = Recipe { root: Root::Nested, ..PLAIN };
const UNNAMED: Recipe = Recipe { root: Root::Unnamed, ..PLAIN };
const DOCKER: Recipe = Recipe { docker: true, ..PLAIN };
const DOCKER_LIST: Recipe = Recipe { root: Root::Index, ..DOCKER };
const ZSTD: Recipe = Recipe { packing: Packing::Zstd, ..PLAIN };
const TAR: Recipe = Recipe { packing: Packing::Tar, ..PLAIN };
const TWICE: Recipe = Recipe { own: Own::Twice, ..PLAIN };
const FOREIGN: Recipe = Recipe { own: Own::Foreign, ..PLAIN };
const DISCARDED: Recipe = Recipe { own: Own::Discarded, ..PLAIN };
/// As most rows of what owners say.
const BY_OWNER: Case = Case { opted: Opted::Owner, ..CASE };
/// Nobody is helped, and nobody is told.
const LEFT: Case = Case { then: Then::Untouched, ..CASE };
/// The fault is no outage of the registry.
const NO_OUTAGE: Case = Case { then: Then::RunsWithoutOutage, ..CASE };
/// Where containerd's versions differ.
const EACH: Case = Case { nodes: Nodes::Each, ..CASE };

/// All cases, by what they are about.
pub(crate) const ROWS: &[Case] = &[
    // Where in a pod.
    Case { name: "ordinary_container", ..EACH },
    Case { name: "init_container", wants: Wants::InitContainer, ..EACH },
    Case { name: "sidecar", wants: Wants::Sidecar, ..CASE },
    Case { name: "ephemeral_container", wants: Wants::Ephemeral, ..EACH },
    Case { name: "static_pod", wants: Wants::StaticPod, ..EACH },
    Case { name: "image_volume", wants: Wants::Volume, nodes: Nodes::Only(&["n23", "n24"]), ..CASE },
    Case { name: "beside_a_container_that_nobody_can_help", wants: Wants::OneOfTwo, ..CASE },
    Case { name: "two_pods_of_one_image", wants: Wants::TwoPods, ..CASE },
    Case { name: "pull_policy_never", policy: "Never", then: NEVER, ..CASE },
    Case { name: "pull_policy_always", policy: "Always", then: ALWAYS, ..CASE },
    // What the image is like.
    Case { name: "oci_index", recipe: INDEX, ..EACH },
    Case { name: "oci_index_of_two_whole_platforms", recipe: TWO_PLATFORMS, ..CASE },
    Case { name: "index_in_an_index", recipe: NESTED, ..EACH },
    Case { name: "index_entry_without_a_platform", recipe: UNNAMED, ..EACH },
    Case { name: "docker_manifest_list", recipe: DOCKER_LIST, ..EACH },
    Case { name: "docker_schema_2", recipe: DOCKER, ..EACH },
    Case { name: "index_of_another_platform", recipe: OTHER_PLATFORM, then: NO_PLATFORM, ..CASE },
    Case { name: "zstd_layer", recipe: ZSTD, ..EACH },
    Case { name: "plain_layer", recipe: TAR, ..CASE },
    Case { name: "layer_named_twice", recipe: TWICE, ..CASE },
    Case { name: "foreign_layer", recipe: FOREIGN, then: LAYER_ELSEWHERE, ..CASE },
    Case { name: "provider_has_discarded_its_layers", recipe: DISCARDED, then: NO_PROVIDER, ..CASE },
    Case { name: "layer_missing_under_a_record", here: Here::NoLayer, ..EACH },
    Case { name: "config_missing_under_a_record", here: Here::NoConfig, ..EACH },
    // How it is named.
    Case { name: "by_digest", asks: Asks::Digest, ..EACH },
    Case { name: "index_by_digest", asks: Asks::Digest, recipe: INDEX, ..CASE },
    Case { name: "by_tag_and_digest", asks: Asks::TagAndDigest, ..CASE },
    Case { name: "latest_implied", asks: Asks::ImpliedLatest, ..CASE },
    Case { name: "short_name", asks: Asks::ShortName, ..CASE },
    Case { name: "host_name_without_a_port", asks: Asks::HostName, ..CASE },
    Case { name: "long_name", asks: Asks::LongName, ..CASE },
    Case { name: "digest_in_an_invented_registry", asks: Asks::OtherRegistry, then: NO_PROVIDER, ..CASE },
    Case { name: "digest_in_another_repository", asks: Asks::OtherRepository, then: NO_PROVIDER, ..CASE },
    // What the registry does.
    Case { name: "registry_answers_500", world: World::Fails, ..CASE },
    Case { name: "registry_answers_429", world: World::Limits, ..CASE },
    Case { name: "registry_answers_404", world: World::Lost, ..CASE },
    Case { name: "registry_answers_a_page_for_people", world: World::Html, ..CASE },
    Case { name: "registry_answers_401", world: World::Unauthorized, then: DENIED, ..CASE },
    Case { name: "registry_answers_403", world: World::Forbids, then: DENIED, ..CASE },
    Case { name: "denied_but_the_namespace_wants_it", world: World::Forbids, opted: Opted::EvenIfDenied, ..CASE },
    Case { name: "registry_answers_400", world: World::Answers(400), then: QUOTED_400, ..CASE },
    Case { name: "registry_answers_402", world: World::Answers(402), then: QUOTED_402, ..CASE },
    Case { name: "registry_answers_407", world: World::Answers(407), ..NO_OUTAGE },
    Case { name: "registry_answers_408", world: World::Answers(408), ..CASE },
    Case { name: "registry_answers_410", world: World::Answers(410), ..NO_OUTAGE },
    Case { name: "registry_answers_451", world: World::Answers(451), ..NO_OUTAGE },
    Case { name: "registry_answers_502", world: World::Answers(502), ..CASE },
    Case { name: "registry_answers_503", world: World::Answers(503), ..CASE },
    Case { name: "registry_answers_504", world: World::Answers(504), ..CASE },
    Case { name: "registry_answers_507", world: World::Answers(507), ..CASE },
    Case { name: "registry_answers_520", world: World::Answers(520), ..CASE },
    Case { name: "registry_answers_522", world: World::Answers(522), ..CASE },
    Case { name: "wrong_bytes", world: World::WrongBytes, ..NO_OUTAGE },
    Case { name: "cut_in_mid_body", world: World::CutsLayers, ..NO_OUTAGE },
    Case { name: "plain_http_on_a_tls_port", world: World::PlainHttp, ..CASE },
    Case { name: "malformed_answer", world: World::Malformed, ..CASE },
    Case { name: "token_server_sends_a_page", world: World::TokenPage, ..NO_OUTAGE },
    Case { name: "token_server_answers_400", world: World::TokenRefuses, ..NO_OUTAGE },
    Case { name: "token_server_answers_500", world: World::TokenFails, ..NO_OUTAGE },
    Case { name: "storage_answers_403", world: World::StorageForbids, ..NO_OUTAGE },
    // What stands between containerd and the registry.
    Case { name: "tls_authority_unknown", world: World::Tls(Fault::SelfSigned), ..EACH },
    Case { name: "tls_certificate_expired", world: World::Tls(Fault::Expired), ..CASE },
    Case { name: "tls_certificate_of_another_host", world: World::Tls(Fault::OtherHost), ..CASE },
    Case { name: "tls_alert", world: World::Tls(Fault::Alert), ..CASE },
    Case { name: "tls_on_a_plain_http_port", world: World::TlsForPlain, ..CASE },
    Case { name: "proxy_answers_407", world: World::ProxyDemands, nodes: Nodes::Each, ..NO_OUTAGE },
    Case { name: "proxy_answers_403", world: World::ProxyForbids, nodes: Nodes::Each, ..NO_OUTAGE },
    Case { name: "proxy_is_down", world: World::ProxyDown, ..NO_OUTAGE },
    // Who opted in.
    Case { name: "namespace_lists_the_repository", opted: Opted::Listed, ..CASE },
    Case { name: "namespace_lists_other_repositories", opted: Opted::ListsOthers, then: NOT_LISTED, ..CASE },
    Case { name: "opted_in_on_a_deployment", wants: OwnedBy(Deployment), ..BY_OWNER },
    Case { name: "opted_in_on_a_stateful_set", wants: OwnedBy(StatefulSet), ..BY_OWNER },
    Case { name: "opted_in_on_a_daemon_set", wants: OwnedBy(DaemonSet), ..BY_OWNER },
    Case { name: "opted_in_on_a_job", wants: OwnedBy(Job), ..BY_OWNER },
    Case { name: "opted_in_on_a_cron_job", wants: OwnedBy(CronJob), ..BY_OWNER },
    Case { name: "opted_in_by_totes_names", opted: Opted::Tote, ..CASE },
    Case { name: "ignore_wins_over_the_owner", wants: OwnedBy(Deployment), opted: Opted::OwnerButPodIgnores, ..LEFT },
    Case { name: "ignore_wins_on_the_pod", opted: Opted::PodButIgnores, ..LEFT },
    Case { name: "yes_is_not_true", opted: Opted::SaysYes, ..LEFT },
    Case { name: "not_opted_in", opted: Opted::Nobody, ..LEFT },
    Case { name: "not_opted_in_and_never_pulled", opted: Opted::Nobody, policy: "Never", ..LEFT },
    Case { name: "namespace_does_not_allow_it", opted: Opted::ClosedNamespace, ..LEFT },
    Case { name: "namespace_is_denied", opted: Opted::DeniedNamespace, ..LEFT },
];
