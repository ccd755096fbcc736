//! Repositories that pods of a namespace may recover from: the namespace's annotation
//! `PREFIX/repositories`.
//!
//! Opt-in permits recoveries for pods of a namespace; this list restricts the images. A pod's
//! author may name any image, and the nodes have images of every tenant. Without a list, a pod
//! whose registry is down gets every image that its nodes have under the named repository.

use std::fmt;

use crate::oci::Repository;

/// Globs per namespace. The API server bounds all annotations of an object to 256 KiB; a namespace
/// uses a handful of repositories.
const MAX_GLOBS: usize = 64;

/// Longest glob: a registry's name (253 bytes and a port) and a repository's path (255 bytes).
const MAX_GLOB: usize = 520;

/// Longest list in bytes: every glob at its bound, with a comma and a space.
pub const MAX_LIST: usize = MAX_GLOBS * (MAX_GLOB + 2);

/// The repositories that pods of one namespace may recover from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum RepositoryList {
    /// The namespace has no list and needs none.
    #[default]
    Any,
    /// These and no others. Empty where a required list is absent or invalid.
    Only(Vec<Glob>),
}

/// A repository in full (`docker.io/library/nginx`), in which `*` stands for any characters but
/// `/`, and `**` for any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob(String);

/// An invalid list, which permits no repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryListError {
    /// The invalid part, truncated.
    pub part: String,
}

impl RepositoryList {
    /// Parses the annotation: globs separated by commas.
    ///
    /// # Errors
    /// [`RepositoryListError`] names the first invalid part, or the first part beyond 64. A list of
    /// more than [`MAX_LIST`] bytes is invalid as a whole.
    pub fn parse(text: &str) -> Result<Self, RepositoryListError> {
        if text.len() > MAX_LIST {
            return Err(RepositoryListError::new(text));
        }
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let globs: Vec<_> = parts.take(MAX_GLOBS + 1).map(Glob::parse).collect::<Result<_, _>>()?;
        match globs.get(MAX_GLOBS) {
            Some(Glob(beyond)) => Err(RepositoryListError::new(beyond)),
            None => Ok(Self::Only(globs)),
        }
    }

    /// The list that permits no repository.
    pub fn none() -> Self {
        Self::Only(Vec::new())
    }

    /// Whether an image of this repository may be recovered.
    pub fn allows(&self, repository: &Repository) -> bool {
        match self {
            Self::Any => true,
            Self::Only(globs) => {
                let name = repository.to_string();
                globs.iter().any(|Glob(glob)| matches(glob.as_bytes(), name.as_bytes()))
            }
        }
    }
}

impl Glob {
    fn parse(text: &str) -> Result<Self, RepositoryListError> {
        let is_known = |c: char| c.is_ascii_alphanumeric() || "*/.-_:[]".contains(c);
        // The registry is required, or `nginx` would seem to match Docker Hub's.
        let is_glob = text.len() <= MAX_GLOB && text.chars().all(is_known) && (text.contains('/') || text == "**");
        if is_glob { Ok(Self(text.to_owned())) } else { Err(RepositoryListError::new(text)) }
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl RepositoryListError {
    fn new(part: &str) -> Self {
        Self { part: part.chars().take(40).collect() }
    }
}

/// The position behind a star in the glob, and the end of the star's match in the text.
type StarPosition = Option<(usize, usize)>;

/// Whether the glob matches the whole text. The product of both lengths bounds the work (270 000
/// steps), because only the last single and the last double star are tried again.
fn matches(glob: &[u8], text: &[u8]) -> bool {
    let (mut g, mut t) = (0, 0);
    // Where a mismatch resumes: behind the star, which then takes one more byte.
    let (mut single, mut double): (StarPosition, StarPosition) = (None, None);
    while t < text.len() {
        if glob[g..].starts_with(b"**") {
            (g, double, single) = (g + 2, Some((g + 2, t)), None);
        } else if glob.get(g) == Some(&b'*') {
            (g, single) = (g + 1, Some((g + 1, t)));
        } else if glob.get(g) == Some(&text[t]) {
            (g, t) = (g + 1, t + 1);
        } else if let Some((after, taken)) = single.filter(|(_, taken)| text[*taken] != b'/') {
            (g, t, single) = (after, taken + 1, Some((after, taken + 1)));
        } else if let Some((after, taken)) = double {
            (g, t, double, single) = (after, taken + 1, Some((after, taken + 1)), None);
        } else {
            return false;
        }
    }
    glob[g..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Reference;

    fn allows(list: &str, image: &str) -> bool {
        let reference: Reference = image.parse().unwrap();
        RepositoryList::parse(list).unwrap().allows(reference.repository())
    }

    #[test]
    fn a_star_stays_within_a_path_component_and_a_double_star_does_not() {
        for (list, image, expected) in [
            ("r.test/shop/web", "r.test/shop/web:1", true),
            ("r.test/shop/web", "r.test/shop/web2:1", false),
            ("r.test/shop/*", "r.test/shop/web:1", true),
            ("r.test/shop/*", "r.test/shop/web/debug:1", false),
            ("r.test/shop/**", "r.test/shop/web/debug:1", true),
            ("r.test/shop/*", "r.test/bank/vault:1", false),
            ("r.test/*/web", "r.test/shop/web:1", true),
            ("r.test/*/web", "r.test/a/b/web:1", false),
            ("**/web", "r.test/a/b/web:1", true),
            ("**/a*/web", "r.test/ax/b/ay/web:1", true),
            ("r.test/a*b*c", "r.test/abbcbc:1", true),
            ("r.test/shop/*", "r.test:5000/shop/web:1", false),
            ("r.test:5000/shop/*", "r.test:5000/shop/web:1", true),
            ("docker.io/library/*", "nginx", true),
            ("r.test/x, docker.io/library/nginx", "nginx:1", true),
            ("**", "r.test/bank/vault:1", true),
            ("", "r.test/bank/vault:1", false),
        ] {
            assert_eq!(allows(list, image), expected, "{list} {image}");
        }
    }

    #[test]
    fn a_list_that_cannot_be_read_is_an_error_that_names_the_part() {
        for (list, part) in [("nginx", "nginx"), ("r.test/a,r.test/b c", "r.test/b c"), ("r.test/ü", "r.test/ü")] {
            assert_eq!(RepositoryList::parse(list), Err(RepositoryListError { part: part.into() }), "{list}");
        }
        let many: Vec<_> = (0..=MAX_GLOBS).map(|number| format!("r.test/{number}")).collect();
        assert!(RepositoryList::parse(&many.join(",")).is_err());
        assert!(RepositoryList::parse(&many[1..].join(",")).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn a_glob_matches_as_its_slow_definition(glob in "[ab/*]{0,8}", text in "[ab/]{0,8}") {
            fn slow(glob: &[u8], text: &[u8]) -> bool {
                match glob {
                    [] => text.is_empty(),
                    [b'*', b'*', rest @ ..] => (0..=text.len()).any(|taken| slow(rest, &text[taken..])),
                    [b'*', rest @ ..] => {
                        let part = text.iter().position(|byte| *byte == b'/').unwrap_or(text.len());
                        (0..=part).any(|taken| slow(rest, &text[taken..]))
                    }
                    [byte, rest @ ..] => text.first() == Some(byte) && slow(rest, &text[1..]),
                }
            }
            proptest::prop_assert_eq!(matches(glob.as_bytes(), text.as_bytes()), slow(glob.as_bytes(), text.as_bytes()));
        }
    }
}
