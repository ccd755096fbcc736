//! What is to be done about a container that waits for an image: bring it, leave it, or say why we cannot help.
//!
//! Who wants help stands in [`super::opt_in`], what the kubelet's words mean in [`super::cause`]. Not here: remembering what was said
//! already ([`super::ledger`]) and who runs when ([`super::queue`]).

use std::collections::BTreeSet;

use super::cause::Cause;
use super::opt_in::{NotHelped, Trigger};
use crate::model::PullPolicy;
use crate::oci::{Reference, ReferenceError};

/// The decision on one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Bring this image.
    Recover(Reference, Cause),
    /// Nothing to do, and nothing to say: not ours.
    Leave(Leave),
    /// Its owner wants our help, and we cannot give it. Worth an Event, once.
    Tell(NotActionable),
}

/// Why a waiting container is none of our business.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// Its pod is not helped.
    NotHelped(NotHelped),
    /// The rules do not act on this cause.
    CauseExcluded,
    /// The kubelet has not named the cause yet; its next attempt will.
    CauseUnknown,
}

/// Why we cannot help a pod that asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotActionable {
    /// 401 or 403 from the registry.
    Denied,
    /// `imagePullPolicy: Always`.
    PullsAlways,
    /// The image's name.
    Unreadable(ReferenceError),
}

/// Decides on one container whose pod is helped and which waits for `image`. `cause` is the one that counts of all that was said; a
/// denial among them wins ([`super::ledger::Ledger::learn`]).
pub fn decide(
    image: &str,
    pull_policy: PullPolicy,
    cause: Option<Cause>,
    on_denied: bool,
    salvage_on: &BTreeSet<Trigger>,
) -> Verdict {
    let reference = match image.parse::<Reference>() {
        Ok(reference) => reference,
        Err(error) => return Verdict::Tell(NotActionable::Unreadable(error)),
    };
    let Some(cause) = cause else { return Verdict::Leave(Leave::CauseUnknown) };
    if cause == Cause::Denied && !on_denied {
        return Verdict::Tell(NotActionable::Denied);
    }
    if trigger(cause).is_some_and(|trigger| !salvage_on.contains(&trigger)) {
        return Verdict::Leave(Leave::CauseExcluded);
    }
    // A pull succeeded, and what it left is broken: with the content here, the next one finds it, whatever the policy.
    if pull_policy == PullPolicy::Always && cause != Cause::MissingContent {
        return Verdict::Tell(NotActionable::PullsAlways);
    }
    Verdict::Recover(reference, cause)
}

/// What the rules call the cause; `None` where they have no say. A denial was decided on before, by who may allow it.
fn trigger(cause: Cause) -> Option<Trigger> {
    match cause {
        Cause::Unavailable(_) | Cause::KnownOutage => Some(Trigger::Unavailable),
        Cause::RateLimited => Some(Trigger::RateLimited),
        Cause::NotFound => Some(Trigger::NotFound),
        Cause::Denied | Cause::MissingContent | Cause::NeverPull => None,
    }
}

impl NotActionable {
    /// What to tell the pod's owner: what is wrong, and what would help.
    pub fn note(&self, image: &str) -> String {
        match self {
            Self::Denied => format!(
                "The registry denies {image} (401 or 403). Peers may hold it, but a denial is not bypassed: check the pull secret. Where \
                 a registry answers so for images that it lost, the namespace can say salvage-on-denied: \"true\"."
            ),
            Self::PullsAlways => format!(
                "{image} has imagePullPolicy Always (the default for :latest), so the kubelet asks the registry even when the image is \
                 here, and a recovery would not help. What helps: IfNotPresent, a digest in place of the tag, or a mirror in containerd's \
                 hosts.toml that answers when the registry does not."
            ),
            Self::Unreadable(error) => format!("Cannot look for {image}: {error}."),
        }
    }

    /// For the metric.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::PullsAlways => "pulls_always",
            Self::Unreadable(_) => "unreadable",
        }
    }
}

impl Leave {
    /// For the metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotHelped(reason) => reason.label(),
            Self::CauseExcluded => "cause_excluded",
            Self::CauseUnknown => "cause_unknown",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::OutageKind;

    const DEFAULT: [Trigger; 3] = [Trigger::Unavailable, Trigger::RateLimited, Trigger::NotFound];
    const DOWN: Cause = Cause::Unavailable(OutageKind::Refused);

    fn verdict(pull_policy: PullPolicy, cause: Option<Cause>, on_denied: bool) -> Verdict {
        decide("r.test/a", pull_policy, cause, on_denied, &DEFAULT.into())
    }

    #[test]
    fn an_image_that_a_registry_cannot_give_is_brought() {
        for cause in
            [DOWN, Cause::KnownOutage, Cause::RateLimited, Cause::NotFound, Cause::MissingContent, Cause::NeverPull]
        {
            let brought = Verdict::Recover("r.test/a".parse().unwrap(), cause);
            assert_eq!(verdict(PullPolicy::IfNotPresent, Some(cause), false), brought);
        }
        assert_eq!(verdict(PullPolicy::IfNotPresent, None, false), Verdict::Leave(Leave::CauseUnknown));
    }

    #[test]
    fn a_denial_is_told_unless_the_namespace_wants_it_ignored() {
        let denied = Some(Cause::Denied);
        assert_eq!(verdict(PullPolicy::IfNotPresent, denied, false), Verdict::Tell(NotActionable::Denied));
        assert!(matches!(verdict(PullPolicy::IfNotPresent, denied, true), Verdict::Recover(_, Cause::Denied)));
    }

    #[test]
    fn causes_can_be_left_to_people() {
        let decide = |cause| decide("a", PullPolicy::IfNotPresent, Some(cause), false, &[Trigger::Unavailable].into());
        assert_eq!(decide(Cause::NotFound), Verdict::Leave(Leave::CauseExcluded));
        assert_eq!(decide(Cause::RateLimited), Verdict::Leave(Leave::CauseExcluded));
        assert!(matches!(decide(DOWN), Verdict::Recover(..)));
        assert!(matches!(decide(Cause::MissingContent), Verdict::Recover(..)), "nobody's registry is to blame");
    }

    #[test]
    fn what_is_always_pulled_is_not_brought_unless_its_content_is_broken_here() {
        for cause in [DOWN, Cause::KnownOutage, Cause::NotFound] {
            assert_eq!(verdict(PullPolicy::Always, Some(cause), false), Verdict::Tell(NotActionable::PullsAlways));
        }
        assert!(matches!(verdict(PullPolicy::Always, Some(Cause::MissingContent), false), Verdict::Recover(..)));
    }

    #[test]
    fn an_unreadable_name_is_told_by_its_wrong_part() {
        let told = decide("r.test/A", PullPolicy::IfNotPresent, Some(DOWN), false, &DEFAULT.into());
        let Verdict::Tell(told) = told else { panic!("an unreadable name was accepted") };
        assert!(told.note("r.test/A").contains("the repository"), "{}", told.note("r.test/A"));
    }
}
