//! The digest of a tag on which peers disagree.

use std::collections::BTreeMap;
use std::str::FromStr;

use crate::oci::Digest;

/// How a tag with several digests is resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TagPolicy {
    /// Not at all: the recovery fails and reports the disagreement.
    #[default]
    Unanimous,
    /// The digest that most nodes have.
    MostCommon,
    /// The digest with the latest build time, according to the image configs.
    Newest,
}

/// The result of a policy for the digests of a tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TagChoice {
    /// No peer has the tag.
    Unknown,
    /// The chosen digest.
    Digest(Digest),
    /// The policy chooses none of these digests.
    Disagreement,
    /// The policy compares the build times: [`newest`].
    NeedsBuildTimes,
}

/// Digests of one tag that are compared by build time. Each costs a peer three small reads; more
/// digests are a sign of another problem.
pub const MAX_COMPARED_BY_AGE: usize = 8;

impl TagPolicy {
    /// Every policy.
    pub const ALL: [Self; 3] = [Self::Unanimous, Self::MostCommon, Self::Newest];

    /// Name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unanimous => "unanimous",
            Self::MostCommon => "most-common",
            Self::Newest => "newest",
        }
    }

    /// `meanings` has each digest of the tag with its number of nodes.
    pub fn choose(self, counts: &BTreeMap<Digest, usize>) -> TagChoice {
        let Some(first) = counts.keys().next() else { return TagChoice::Unknown };
        if counts.len() == 1 {
            return TagChoice::Digest(*first);
        }
        match self {
            Self::Unanimous => TagChoice::Disagreement,
            Self::MostCommon => unique_maximum(counts).map_or(TagChoice::Disagreement, TagChoice::Digest),
            Self::Newest if counts.len() > MAX_COMPARED_BY_AGE => TagChoice::Disagreement,
            Self::Newest => TagChoice::NeedsBuildTimes,
        }
    }
}

impl FromStr for TagPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|policy| policy.name() == text);
        found.ok_or_else(|| format!("{text:?} is none of {names}"))
    }
}

/// The digest with the latest build time; `None` when an image has no build time, or the latest two
/// are equal (reproducible builds all have 1970).
pub fn newest<Age: Ord>(built: &BTreeMap<Digest, Option<Age>>) -> Option<Digest> {
    let aged: Option<BTreeMap<Digest, &Age>> =
        built.iter().map(|(digest, age)| Some((*digest, age.as_ref()?))).collect();
    unique_maximum(&aged?)
}

/// The digest with the largest value; `None` on a tie.
fn unique_maximum<Value: Ord>(values: &BTreeMap<Digest, Value>) -> Option<Digest> {
    let (digest, largest) = values.iter().max_by_key(|(_, value)| *value)?;
    (values.values().filter(|value| *value == largest).count() == 1).then_some(*digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest_counts(counts: &[usize]) -> BTreeMap<Digest, usize> {
        counts.iter().enumerate().map(|(number, count)| (digest(number), *count)).collect()
    }

    fn digest(number: usize) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    #[test]
    fn a_tag_without_disagreement_needs_no_policy() {
        for policy in TagPolicy::ALL {
            assert_eq!(policy.choose(&digest_counts(&[3])), TagChoice::Digest(digest(0)));
            assert_eq!(policy.choose(&digest_counts(&[])), TagChoice::Unknown);
            assert_eq!(policy.name().parse(), Ok(policy));
        }
        assert!("majority".parse::<TagPolicy>().unwrap_err().contains("most-common"));
    }

    #[test]
    fn a_disagreement_is_settled_only_by_a_policy_that_can() {
        let split = digest_counts(&[2, 5, 1]);
        assert_eq!(TagPolicy::Unanimous.choose(&split), TagChoice::Disagreement);
        assert_eq!(TagPolicy::MostCommon.choose(&split), TagChoice::Digest(digest(1)));
        assert_eq!(TagPolicy::MostCommon.choose(&digest_counts(&[5, 5, 1])), TagChoice::Disagreement, "a tie");
        assert_eq!(TagPolicy::Newest.choose(&split), TagChoice::NeedsBuildTimes);
        assert_eq!(TagPolicy::Newest.choose(&digest_counts(&[1; MAX_COMPARED_BY_AGE + 1])), TagChoice::Disagreement);
    }

    #[test]
    fn the_newest_content_is_found_only_where_every_image_has_a_build_time() {
        let built = |ages: &[Option<u64>]| ages.iter().enumerate().map(|(n, age)| (digest(n), *age)).collect();
        assert_eq!(newest::<u64>(&built(&[Some(1), Some(9), Some(4)])), Some(digest(1)));
        assert_eq!(newest::<u64>(&built(&[Some(1), None])), None);
        assert_eq!(newest::<u64>(&built(&[Some(0), Some(0)])), None);
    }
}
