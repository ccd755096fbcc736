//! The table of cases.

use super::ImageUse::OwnedBy;
use super::OwnerKind::{CronJob, DaemonSet, Deployment, Job, StatefulSet};
use super::{CASE, Case, Expectation, ImageUse, LocalContent, Nodes, OptInForm, ReferenceForm};
use crate::images::{LayerVariant, PLAIN, Packing, Recipe, TargetKind};
use crate::registries::{ScriptedRegistry, TlsFault};

const NO_PROVIDER: Expectation = Expectation::Event("ImageNoProvider", &[]);
const NO_PLATFORM: Expectation = Expectation::Event("ImageNotRecoverable", &["no manifest for linux/amd64"]);
const DENIED: Expectation = Expectation::Event("ImageNotRecoverable", &["denies"]);
const LAYER_ELSEWHERE: Expectation = Expectation::Event("ImageNotRecoverable", &["layer"]);
const ALWAYS: Expectation = Expectation::Event("ImageNotRecoverable", &["always"]);
const NEVER: Expectation = Expectation::Event("ImageNotRecoverable", &["recoveron", "never"]);
const NOT_LISTED: Expectation = Expectation::Event("ImageNotRecoverable", &["repositories"]);
const QUOTED_400: Expectation = Expectation::Event("ImagePullErrorUnknown", &["400 bad request"]);
const QUOTED_402: Expectation = Expectation::Event("ImagePullErrorUnknown", &["402 payment required"]);
const INDEX: Recipe = Recipe { target_kind: TargetKind::Index, ..PLAIN };
const TWO_PLATFORMS: Recipe = Recipe { target_kind: TargetKind::CompleteIndex, ..PLAIN };
const OTHER_PLATFORM: Recipe = Recipe { target_kind: TargetKind::OtherPlatform, ..PLAIN };
const NESTED: Recipe = Recipe { target_kind: TargetKind::Nested, ..PLAIN };
const UNNAMED: Recipe = Recipe { target_kind: TargetKind::Unnamed, ..PLAIN };
const DOCKER: Recipe = Recipe { docker: true, ..PLAIN };
const DOCKER_LIST: Recipe = Recipe { target_kind: TargetKind::Index, ..DOCKER };
const ZSTD: Recipe = Recipe { packing: Packing::Zstd, ..PLAIN };
const TAR: Recipe = Recipe { packing: Packing::Tar, ..PLAIN };
const TWICE: Recipe = Recipe { layer: LayerVariant::Twice, ..PLAIN };
const FOREIGN: Recipe = Recipe { layer: LayerVariant::Foreign, ..PLAIN };
const DISCARDED: Recipe = Recipe { layer: LayerVariant::Discarded, ..PLAIN };
/// Defaults of rows in which an owner opts in.
const BY_OWNER: Case = Case { opt_in: OptInForm::Owner, ..CASE };
/// Defaults of rows without a recovery and without an Event.
const NOT_RECOVERED: Case = Case { expectation: Expectation::NoEvent, ..CASE };
/// Defaults of rows whose fault is no outage of the registry.
const NO_OUTAGE: Case = Case { expectation: Expectation::RunsWithoutOutage, ..CASE };
/// Defaults of rows for behavior that differs between containerd's versions.
const EACH: Case = Case { nodes: Nodes::Each, ..CASE };

/// All cases, by subject.
pub(crate) const ROWS: &[Case] = &[
    // Place of the image in a pod.
    Case { name: "ordinary_container", ..EACH },
    Case { name: "init_container", image_use: ImageUse::InitContainer, ..EACH },
    Case { name: "sidecar", image_use: ImageUse::Sidecar, ..CASE },
    Case { name: "ephemeral_container", image_use: ImageUse::Ephemeral, ..EACH },
    Case { name: "static_pod", image_use: ImageUse::StaticPod, ..EACH },
    Case { name: "image_volume", image_use: ImageUse::Volume, nodes: Nodes::Only(&["n23", "n24"]), ..CASE },
    Case { name: "beside_a_container_without_a_provider", image_use: ImageUse::OneOfTwo, ..CASE },
    Case { name: "two_pods_of_one_image", image_use: ImageUse::TwoPods, ..CASE },
    Case { name: "pull_policy_never", policy: "Never", expectation: NEVER, ..CASE },
    Case { name: "pull_policy_always", policy: "Always", expectation: ALWAYS, ..CASE },
    // Shape of the image.
    Case { name: "oci_index", recipe: INDEX, ..EACH },
    Case { name: "oci_index_of_two_whole_platforms", recipe: TWO_PLATFORMS, ..CASE },
    Case { name: "index_in_an_index", recipe: NESTED, ..EACH },
    Case { name: "index_entry_without_a_platform", recipe: UNNAMED, ..EACH },
    Case { name: "docker_manifest_list", recipe: DOCKER_LIST, ..EACH },
    Case { name: "docker_schema_2", recipe: DOCKER, ..EACH },
    Case { name: "index_of_another_platform", recipe: OTHER_PLATFORM, expectation: NO_PLATFORM, ..CASE },
    Case { name: "zstd_layer", recipe: ZSTD, ..EACH },
    Case { name: "plain_layer", recipe: TAR, ..CASE },
    Case { name: "layer_named_twice", recipe: TWICE, ..CASE },
    Case { name: "foreign_layer", recipe: FOREIGN, expectation: LAYER_ELSEWHERE, ..CASE },
    Case { name: "provider_has_discarded_its_layers", recipe: DISCARDED, expectation: NO_PROVIDER, ..CASE },
    Case { name: "layer_missing_under_a_record", local_content: LocalContent::NoLayer, ..EACH },
    Case { name: "config_missing_under_a_record", local_content: LocalContent::NoConfig, ..EACH },
    // Form of the reference.
    Case { name: "by_digest", reference_form: ReferenceForm::Digest, ..EACH },
    Case { name: "index_by_digest", reference_form: ReferenceForm::Digest, recipe: INDEX, ..CASE },
    Case { name: "by_tag_and_digest", reference_form: ReferenceForm::TagAndDigest, ..CASE },
    Case { name: "latest_implied", reference_form: ReferenceForm::ImpliedLatest, ..CASE },
    Case { name: "short_name", reference_form: ReferenceForm::ShortName, ..CASE },
    Case { name: "host_name_without_a_port", reference_form: ReferenceForm::HostName, ..CASE },
    Case { name: "long_name", reference_form: ReferenceForm::LongName, ..CASE },
    Case {
        name: "digest_in_an_invented_registry",
        reference_form: ReferenceForm::OtherRegistry,
        expectation: NO_PROVIDER,
        ..CASE
    },
    Case {
        name: "digest_in_another_repository",
        reference_form: ReferenceForm::OtherRepository,
        expectation: NO_PROVIDER,
        ..CASE
    },
    // Responses of the registry.
    Case { name: "registry_answers_500", registry: ScriptedRegistry::Fails, ..CASE },
    Case { name: "registry_answers_429", registry: ScriptedRegistry::RateLimits, ..CASE },
    Case { name: "registry_answers_404", registry: ScriptedRegistry::NotFound, ..CASE },
    Case { name: "registry_answers_an_html_page", registry: ScriptedRegistry::Html, ..CASE },
    Case { name: "registry_answers_401", registry: ScriptedRegistry::Unauthorized, expectation: DENIED, ..CASE },
    Case { name: "registry_answers_403", registry: ScriptedRegistry::Forbids, expectation: DENIED, ..CASE },
    Case {
        name: "denied_but_the_namespace_recovers_denied_images",
        registry: ScriptedRegistry::Forbids,
        opt_in: OptInForm::EvenIfDenied,
        ..CASE
    },
    Case { name: "registry_answers_400", registry: ScriptedRegistry::Answers(400), expectation: QUOTED_400, ..CASE },
    Case { name: "registry_answers_402", registry: ScriptedRegistry::Answers(402), expectation: QUOTED_402, ..CASE },
    Case { name: "registry_answers_407", registry: ScriptedRegistry::Answers(407), ..NO_OUTAGE },
    Case { name: "registry_answers_408", registry: ScriptedRegistry::Answers(408), ..CASE },
    Case { name: "registry_answers_410", registry: ScriptedRegistry::Answers(410), ..NO_OUTAGE },
    Case { name: "registry_answers_451", registry: ScriptedRegistry::Answers(451), ..NO_OUTAGE },
    Case { name: "registry_answers_502", registry: ScriptedRegistry::Answers(502), ..CASE },
    Case { name: "registry_answers_503", registry: ScriptedRegistry::Answers(503), ..CASE },
    Case { name: "registry_answers_504", registry: ScriptedRegistry::Answers(504), ..CASE },
    Case { name: "registry_answers_507", registry: ScriptedRegistry::Answers(507), ..CASE },
    Case { name: "registry_answers_520", registry: ScriptedRegistry::Answers(520), ..CASE },
    Case { name: "registry_answers_522", registry: ScriptedRegistry::Answers(522), ..CASE },
    Case { name: "wrong_bytes", registry: ScriptedRegistry::WrongBytes, ..NO_OUTAGE },
    Case { name: "cut_in_mid_body", registry: ScriptedRegistry::CutsLayers, ..NO_OUTAGE },
    Case { name: "plain_http_on_a_tls_port", registry: ScriptedRegistry::PlainHttp, ..CASE },
    Case { name: "malformed_answer", registry: ScriptedRegistry::Malformed, ..CASE },
    Case { name: "token_server_answers_an_html_page", registry: ScriptedRegistry::TokenPage, ..NO_OUTAGE },
    Case { name: "token_server_answers_400", registry: ScriptedRegistry::TokenRefuses, ..NO_OUTAGE },
    Case { name: "token_server_answers_500", registry: ScriptedRegistry::TokenFails, ..NO_OUTAGE },
    Case { name: "storage_answers_403", registry: ScriptedRegistry::StorageForbids, ..NO_OUTAGE },
    // Faults between containerd and the registry.
    Case { name: "tls_authority_unknown", registry: ScriptedRegistry::Tls(TlsFault::SelfSigned), ..EACH },
    Case { name: "tls_certificate_expired", registry: ScriptedRegistry::Tls(TlsFault::Expired), ..CASE },
    Case { name: "tls_certificate_of_another_host", registry: ScriptedRegistry::Tls(TlsFault::OtherHost), ..CASE },
    Case { name: "tls_alert", registry: ScriptedRegistry::Tls(TlsFault::Alert), ..CASE },
    Case { name: "tls_on_a_plain_http_port", registry: ScriptedRegistry::TlsForPlain, ..CASE },
    Case { name: "proxy_answers_407", registry: ScriptedRegistry::ProxyDemands, nodes: Nodes::Each, ..NO_OUTAGE },
    Case { name: "proxy_answers_403", registry: ScriptedRegistry::ProxyForbids, nodes: Nodes::Each, ..NO_OUTAGE },
    Case { name: "proxy_is_down", registry: ScriptedRegistry::ProxyDown, ..NO_OUTAGE },
    // Opt-in by pods, owners and namespaces.
    Case { name: "namespace_lists_the_repository", opt_in: OptInForm::Listed, ..CASE },
    Case {
        name: "namespace_lists_other_repositories",
        opt_in: OptInForm::OthersListed,
        expectation: NOT_LISTED,
        ..CASE
    },
    Case { name: "opted_in_on_a_deployment", image_use: OwnedBy(Deployment), ..BY_OWNER },
    Case { name: "opted_in_on_a_stateful_set", image_use: OwnedBy(StatefulSet), ..BY_OWNER },
    Case { name: "opted_in_on_a_daemon_set", image_use: OwnedBy(DaemonSet), ..BY_OWNER },
    Case { name: "opted_in_on_a_job", image_use: OwnedBy(Job), ..BY_OWNER },
    Case { name: "opted_in_on_a_cron_job", image_use: OwnedBy(CronJob), ..BY_OWNER },
    Case { name: "opted_in_by_totes_annotations", opt_in: OptInForm::Tote, ..CASE },
    Case {
        name: "ignore_wins_over_the_owner",
        image_use: OwnedBy(Deployment),
        opt_in: OptInForm::OwnerButPodIgnores,
        ..NOT_RECOVERED
    },
    Case { name: "ignore_wins_on_the_pod", opt_in: OptInForm::PodButIgnores, ..NOT_RECOVERED },
    Case { name: "yes_is_not_true", opt_in: OptInForm::ValueYes, ..NOT_RECOVERED },
    Case { name: "not_opted_in", opt_in: OptInForm::None, ..NOT_RECOVERED },
    Case { name: "not_opted_in_and_never_pulled", opt_in: OptInForm::None, policy: "Never", ..NOT_RECOVERED },
    Case { name: "namespace_does_not_allow_recovery", opt_in: OptInForm::ClosedNamespace, ..NOT_RECOVERED },
    Case { name: "namespace_is_denied", opt_in: OptInForm::DeniedNamespace, ..NOT_RECOVERED },
];
