//! The verdict on a container that waits for an image: recover the image, ignore the failure, or
//! report why a recovery is impossible.
//!
//! [`super::opt_in`] decides which pods are recovered, and [`super::cause`] reads the kubelet's
//! messages. Not here: the Events already written ([`super::container_records`]), and the order of
//! recoveries ([`super::recovery_queue`]).

mod not_recoverable;

use std::collections::BTreeSet;
use std::time::Duration;

use super::allowed_repositories::RepositoryList;
use super::cause::Cause;
use super::opt_in::{OptOutReason, Trigger};
use crate::model::PullPolicy;
use crate::oci::Reference;

pub use self::not_recoverable::{NotRecoverable, STALLED};

/// An image that a pod lacks.
#[derive(Debug, Clone, Copy)]
pub struct FailedPull<'a> {
    /// The image as the pod's spec names the image.
    pub image: &'a str,
    /// When the kubelet pulls the image.
    pub pull_policy: PullPolicy,
    /// The cause that counts among all messages
    /// ([`super::container_records::ContainerRecords::record_cause`]).
    pub cause: Option<Cause>,
    /// The kubelet's latest message, to be quoted in Events.
    pub message: &'a str,
    /// The evidence of an outage is strong enough to recover this reference before its own pull has
    /// failed with that cause.
    pub may_be_early: bool,
}

/// The permissions of a pod's namespace and of the policy.
#[derive(Debug, Clone, Copy)]
pub struct Consent<'a> {
    /// Causes that start a recovery.
    pub recover_on: &'a BTreeSet<Trigger>,
    /// Also when the registry denies the image.
    pub on_denied: bool,
    /// Repositories that pods of the namespace may recover from.
    pub repositories: &'a RepositoryList,
}

/// The verdict on one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullVerdict {
    /// Recover this image.
    Recover(Reference, Cause),
    /// Do nothing, and report nothing.
    Ignore(IgnoreReason),
    /// The pod opted in, and a recovery is impossible. Reported once, by an Event.
    Report(NotRecoverable),
}

/// Why a waiting container is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IgnoreReason {
    /// The pod is not recovered.
    OptedOut(OptOutReason),
    /// The policy excludes this cause.
    CauseExcluded,
    /// The kubelet has not named the cause yet; its next attempt will.
    CauseUnknown,
    /// The kubelet's own rate limit of pulls; the kubelet retries within seconds.
    KubeletLimit,
}

/// Whether the kubelet refuses an image that is on its node. The image arrived so long ago that a
/// kubelet which only checks for the image would have started the container, and pulls of the image
/// still fail.
///
/// A nudged kubelet checks within a second, and a busy one needs some more to start the container.
/// Where the API server denies nudges, the kubelet checks at its own sync: within 90 s.
pub fn is_verifying_credentials(pull_policy: PullPolicy, since_arrival: Duration, nudges_denied: bool) -> bool {
    let sync_delay = Duration::from_secs(if nudges_denied { 90 } else { 0 });
    pull_policy == PullPolicy::IfNotPresent && since_arrival >= sync_delay + Duration::from_secs(30)
}

/// Decides on one image that a pod lacks and whose recovery the pod's owners permit.
pub fn decide(failure: FailedPull<'_>, consent: Consent<'_>) -> PullVerdict {
    let FailedPull { image, pull_policy, cause, message, may_be_early } = failure;
    let Consent { recover_on, on_denied, repositories } = consent;
    let reference = match image.parse::<Reference>() {
        Ok(reference) => reference,
        Err(error) => return PullVerdict::Report(NotRecoverable::Unreadable(error)),
    };
    let cause = match cause {
        None => return PullVerdict::Ignore(IgnoreReason::CauseUnknown),
        // The message has nothing about the registry, so the known outage decides.
        Some(Cause::NotUnderstood | Cause::KubeletLimit) if may_be_early => Cause::KnownOutage,
        Some(Cause::KubeletLimit) => return PullVerdict::Ignore(IgnoreReason::KubeletLimit),
        Some(Cause::NotUnderstood) => return PullVerdict::Report(NotRecoverable::NotUnderstood(quote(message))),
        Some(Cause::Local) => return PullVerdict::Report(NotRecoverable::Local(quote(message))),
        Some(Cause::Denied) if !on_denied => return PullVerdict::Report(NotRecoverable::Denied),
        Some(Cause::Stalled) if !may_be_early && matches!(reference, Reference::Tag(..)) => {
            return PullVerdict::Report(NotRecoverable::Stalled);
        }
        Some(Cause::NeverPull) if !recover_on.contains(&Trigger::Never) => {
            return PullVerdict::Report(NotRecoverable::PullsNever);
        }
        Some(cause) => cause,
    };
    if trigger(cause).is_some_and(|trigger| !recover_on.contains(&trigger)) {
        return PullVerdict::Ignore(IgnoreReason::CauseExcluded);
    }
    // A pull succeeded, and its content is broken. With the content here, the next pull finds the
    // content under any policy.
    if pull_policy == PullPolicy::Always && cause != Cause::MissingContent {
        return PullVerdict::Report(NotRecoverable::PullsAlways);
    }
    if !repositories.allows(reference.repository()) {
        return PullVerdict::Report(NotRecoverable::RepositoryNotListed);
    }
    PullVerdict::Recover(reference, cause)
}

/// The trigger of a cause; `None` where the policy does not decide, or decided before.
fn trigger(cause: Cause) -> Option<Trigger> {
    match cause {
        Cause::Unavailable(_) | Cause::TokenServer | Cause::KnownOutage | Cause::Stalled => Some(Trigger::Unavailable),
        Cause::RateLimited => Some(Trigger::RateLimited),
        Cause::NotFound => Some(Trigger::NotFound),
        Cause::BadBytes => Some(Trigger::BadBytes),
        Cause::StorageDenied => Some(Trigger::StorageDenied),
        Cause::Proxy => Some(Trigger::Proxy),
        Cause::Denied
        | Cause::MissingContent
        | Cause::NeverPull
        | Cause::KubeletLimit
        | Cause::Local
        | Cause::NotUnderstood => None,
    }
}

/// Characters of the kubelet's message in an Event. The Event's note has room for 1024 bytes, with
/// the text around the message.
const MAX_QUOTED: usize = 400;

/// The end of a message, because Go's errors have the cause there.
fn quote(message: &str) -> String {
    let message = message.trim();
    let skipped = message.chars().count().saturating_sub(MAX_QUOTED);
    let end: String = message.chars().skip(skipped).collect();
    if skipped > 0 { format!("...{end}") } else { end }
}

impl IgnoreReason {
    /// The metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::OptedOut(reason) => reason.label(),
            Self::CauseExcluded => "cause_excluded",
            Self::CauseUnknown => "cause_unknown",
            Self::KubeletLimit => "kubelet_limit",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::OutageKind;

    const DOWN: Cause = Cause::Unavailable(OutageKind::Refused);

    fn failure(cause: Option<Cause>) -> FailedPull<'static> {
        let (image, pull_policy) = ("r.test/a", PullPolicy::IfNotPresent);
        FailedPull { image, pull_policy, cause, message: "the kubelet's message", may_be_early: false }
    }

    #[test]
    fn a_kubelet_that_was_not_nudged_has_until_its_own_sync_to_look() {
        let verifies =
            |seconds, denied| is_verifying_credentials(PullPolicy::IfNotPresent, Duration::from_secs(seconds), denied);
        assert!(!verifies(29, false) && verifies(30, false));
        assert!(!verifies(119, true) && verifies(120, true));
        assert!(!is_verifying_credentials(PullPolicy::Always, Duration::from_secs(600), false));
    }

    /// The verdict under the default causes.
    fn verdict(pull_policy: PullPolicy, cause: Option<Cause>, on_denied: bool) -> PullVerdict {
        let consent =
            Consent { recover_on: &Trigger::DEFAULT.into(), on_denied, repositories: &RepositoryList::default() };
        decide(FailedPull { pull_policy, ..failure(cause) }, consent)
    }

    fn verdict_on(failure: FailedPull<'_>, recover_on: &[Trigger]) -> PullVerdict {
        let recover_on = recover_on.iter().copied().collect();
        decide(failure, Consent { recover_on: &recover_on, on_denied: false, repositories: &RepositoryList::Any })
    }

    #[test]
    fn an_image_that_its_registry_cannot_serve_is_recovered() {
        for cause in [
            DOWN,
            Cause::KnownOutage,
            Cause::TokenServer,
            Cause::Proxy,
            Cause::RateLimited,
            Cause::NotFound,
            Cause::StorageDenied,
            Cause::BadBytes,
            Cause::MissingContent,
        ] {
            let recovered = PullVerdict::Recover("r.test/a".parse().unwrap(), cause);
            assert_eq!(verdict(PullPolicy::IfNotPresent, Some(cause), false), recovered);
        }
        assert_eq!(verdict(PullPolicy::IfNotPresent, None, false), PullVerdict::Ignore(IgnoreReason::CauseUnknown));
    }

    #[test]
    fn a_denial_is_reported_unless_the_namespace_ignores_denials() {
        let denied = Some(Cause::Denied);
        assert_eq!(verdict(PullPolicy::IfNotPresent, denied, false), PullVerdict::Report(NotRecoverable::Denied));
        assert!(matches!(verdict(PullPolicy::IfNotPresent, denied, true), PullVerdict::Recover(_, Cause::Denied)));
    }

    #[test]
    fn excluded_causes_are_ignored() {
        let decide = |cause| verdict_on(failure(Some(cause)), &[Trigger::Unavailable]);
        assert_eq!(decide(Cause::NotFound), PullVerdict::Ignore(IgnoreReason::CauseExcluded));
        assert_eq!(decide(Cause::RateLimited), PullVerdict::Ignore(IgnoreReason::CauseExcluded));
        assert!(matches!(decide(DOWN), PullVerdict::Recover(..)));
        assert!(matches!(decide(Cause::MissingContent), PullVerdict::Recover(..)), "no registry is at fault");
    }

    #[test]
    fn an_image_with_policy_always_is_recovered_only_when_its_local_content_is_broken() {
        for cause in [DOWN, Cause::KnownOutage, Cause::NotFound] {
            assert_eq!(
                verdict(PullPolicy::Always, Some(cause), false),
                PullVerdict::Report(NotRecoverable::PullsAlways)
            );
        }
        assert!(matches!(verdict(PullPolicy::Always, Some(Cause::MissingContent), false), PullVerdict::Recover(..)));
    }

    #[test]
    fn an_unreadable_name_is_reported_with_its_wrong_part() {
        let reported = verdict_on(FailedPull { image: "r.test/A", ..failure(Some(DOWN)) }, &Trigger::DEFAULT);
        let PullVerdict::Report(report) = reported else { panic!("an unreadable name was accepted") };
        assert!(report.event_text("r.test/A").contains("the repository"), "{}", report.event_text("r.test/A"));
    }

    #[test]
    fn an_image_with_policy_never_is_recovered_only_where_the_trigger_is_set() {
        let never = FailedPull { pull_policy: PullPolicy::Never, ..failure(Some(Cause::NeverPull)) };
        assert_eq!(verdict_on(never, &Trigger::DEFAULT), PullVerdict::Report(NotRecoverable::PullsNever));
        assert!(matches!(verdict_on(never, &[Trigger::Never]), PullVerdict::Recover(_, Cause::NeverPull)));
    }

    #[test]
    fn an_image_of_an_unlisted_repository_is_reported_and_not_recovered() {
        let repositories = RepositoryList::parse("r.test/shop/*").unwrap();
        let consent = Consent { recover_on: &Trigger::DEFAULT.into(), on_denied: false, repositories: &repositories };
        for (image, is_listed) in [("r.test/shop/web:1", true), ("r.test/bank/vault:1", false)] {
            for cause in [DOWN, Cause::KnownOutage, Cause::MissingContent] {
                let verdict = decide(FailedPull { image, ..failure(Some(cause)) }, consent);
                assert_eq!(matches!(verdict, PullVerdict::Recover(..)), is_listed, "{image} {cause:?}");
                assert_eq!(verdict == PullVerdict::Report(NotRecoverable::RepositoryNotListed), !is_listed, "{image}");
            }
        }
    }

    #[test]
    fn a_local_fault_is_reported_with_the_message_of_the_kubelet_and_recovers_nothing() {
        for may_be_early in [false, true] {
            let verdict = verdict_on(FailedPull { may_be_early, ..failure(Some(Cause::Local)) }, &Trigger::ALL);
            assert_eq!(verdict, PullVerdict::Report(NotRecoverable::Local("the kubelet's message".into())));
        }
    }

    #[test]
    fn a_stalled_pull_recovers_a_digest_and_leaves_a_tag_to_its_registry_until_a_pull_has_failed() {
        let digest = format!("r.test/a@{}", crate::oci::Digest::of(b"a"));
        let stalled = |image, may_be_early| {
            let failure = FailedPull { image, may_be_early, ..failure(Some(Cause::Stalled)) };
            verdict_on(failure, &Trigger::DEFAULT)
        };
        assert!(matches!(stalled(&digest, false), PullVerdict::Recover(_, Cause::Stalled)));
        assert_eq!(stalled("r.test/a:1", false), PullVerdict::Report(NotRecoverable::Stalled));
        assert!(matches!(stalled("r.test/a:1", true), PullVerdict::Recover(_, Cause::Stalled)));
    }

    #[test]
    fn an_unreadable_message_is_quoted_unless_the_registry_is_known_to_be_down() {
        let unreadable = failure(Some(Cause::NotUnderstood));
        let reported = PullVerdict::Report(NotRecoverable::NotUnderstood("the kubelet's message".into()));
        assert_eq!(verdict_on(unreadable, &Trigger::DEFAULT), reported);
        let limited = failure(Some(Cause::KubeletLimit));
        assert_eq!(verdict_on(limited, &Trigger::DEFAULT), PullVerdict::Ignore(IgnoreReason::KubeletLimit));
        for failure in [unreadable, limited] {
            let verdict = verdict_on(FailedPull { may_be_early: true, ..failure }, &Trigger::DEFAULT);
            assert!(matches!(verdict, PullVerdict::Recover(_, Cause::KnownOutage)), "{verdict:?}");
        }
    }

    #[test]
    fn a_long_message_is_quoted_by_its_end() {
        let message = format!("{}: the cause", "frame ".repeat(500));
        let quoted = quote(&message);
        assert!(quoted.starts_with("...") && quoted.ends_with(": the cause"), "{quoted}");
        assert_eq!(quoted.chars().count(), MAX_QUOTED + 3);
        assert_eq!(quote("  short "), "short");
    }
}
