//! The challenge of a registry that requires a credential: the `WWW-Authenticate` header (RFC 9110,
//! section 11.6.1).

use hyper::header::{HeaderMap, WWW_AUTHENTICATE};

/// The authentication that a registry requires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A token (distribution project, "Token Authentication Specification").
    Bearer {
        /// The token server's URL.
        realm: String,
        /// The registry's name at the token server.
        service: Option<String>,
        /// The scope of the token.
        scope: Option<String>,
    },
    /// User name and password.
    Basic,
}

/// The challenge to answer: a token where the registry accepts tokens, else a password. Other
/// schemes (Negotiate, Digest) are not supported.
pub(super) fn preferred_challenge(headers: &HeaderMap) -> Option<Challenge> {
    let texts = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let known: Vec<_> =
        texts.flat_map(|text| Scanner { rest: text }.challenges()).filter_map(parse_challenge).collect();
    let token = known.iter().position(|challenge| matches!(challenge, Challenge::Bearer { .. }));
    known.into_iter().nth(token.unwrap_or(0))
}

/// A challenge as written in the header: a scheme and parameters.
#[derive(Debug, Default)]
struct RawChallenge {
    scheme: String,
    parameters: Vec<(String, String)>,
}

fn parse_challenge(raw: RawChallenge) -> Option<Challenge> {
    let RawChallenge { scheme, parameters } = raw;
    let get = |wanted: &str| {
        let found = parameters.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
        found.map(|(_, value)| value.clone()).filter(|value| !value.is_empty())
    };
    match scheme.to_ascii_lowercase().as_str() {
        "bearer" => Some(Challenge::Bearer { realm: get("realm")?, service: get("service"), scope: get("scope") }),
        "basic" => Some(Challenge::Basic),
        _ => None,
    }
}

/// Parses a header from the left, and skips characters that match no rule. The header's length
/// bounds the work.
struct Scanner<'a> {
    rest: &'a str,
}

impl Scanner<'_> {
    fn challenges(mut self) -> Vec<RawChallenge> {
        let mut found: Vec<RawChallenge> = Vec::new();
        loop {
            self.rest = self.rest.trim_start_matches([' ', '\t', ',']);
            if self.rest.is_empty() {
                return found;
            }
            let word = self.word();
            match (self.rest.strip_prefix('='), found.last_mut()) {
                (Some(rest), Some(challenge)) if !word.is_empty() => {
                    self.rest = rest;
                    let value = self.value();
                    challenge.parameters.push((word, value));
                }
                (None, _) if !word.is_empty() => found.push(RawChallenge { scheme: word, parameters: Vec::new() }),
                _ => self.skip(),
            }
        }
    }

    /// A `token` of the grammar; empty when there is none.
    fn word(&mut self) -> String {
        let part_of_word = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        let end = self.rest.find(|c| !part_of_word(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word.to_owned()
    }

    /// A quoted string without quotes and backslashes. Some servers write no quotes: then the text
    /// up to a comma or a space.
    fn value(&mut self) -> String {
        let Some(quoted) = self.rest.strip_prefix('"') else {
            let end = self.rest.find([',', ' ', '\t']).unwrap_or(self.rest.len());
            let (value, rest) = self.rest.split_at(end);
            self.rest = rest;
            return value.to_owned();
        };
        let (mut value, mut characters) = (String::new(), quoted.chars());
        while let Some(character) = characters.next() {
            match character {
                '"' => break,
                '\\' => value.extend(characters.next()),
                other => value.push(other),
            }
        }
        self.rest = characters.as_str();
        value
    }

    fn skip(&mut self) {
        let mut characters = self.rest.chars();
        characters.next();
        self.rest = characters.as_str();
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn of(texts: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for text in texts {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(text).unwrap());
        }
        preferred_challenge(&headers)
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        let (service, scope) = (service.map(str::to_owned), scope.map(str::to_owned));
        Some(Challenge::Bearer { realm: realm.to_owned(), service, scope })
    }

    #[test]
    fn a_bearer_challenge_is_preferred_to_a_basic_challenge() {
        let token = bearer("https://a/token", Some("reg"), Some("repository:x/y:pull,push"));
        let written = r#"Bearer realm="https://a/token",service="reg",scope="repository:x/y:pull,push""#;
        assert_eq!(of(&[written]), token);
        assert_eq!(of(&[r#"Basic realm="x""#, written]), token);
        assert_eq!(of(&[&format!(r#"Negotiate abc==, Basic realm="a, b=c", {written}"#)]), token);
        assert_eq!(of(&["bearer realm=https://a/token , service=reg"]), bearer("https://a/token", Some("reg"), None));
        assert_eq!(of(&["basic"]), Some(Challenge::Basic));
    }

    #[test]
    fn an_unsupported_challenge_is_ignored() {
        for text in
            ["", "Bearer", r#"Bearer service="reg""#, "Negotiate", r#"Digest realm="x""#, "=", "\"", "realm=\"x"]
        {
            assert_eq!(of(&[text]), None, "{text:?}");
        }
        assert_eq!(preferred_challenge(&HeaderMap::new()), None);
    }

    proptest! {
        #[test]
        fn any_quoted_parameter_is_read_back(realm in "[ -~]{1,40}", service in "[ -~]{1,40}") {
            let quote = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
            let written = format!("Bearer realm=\"{}\", service=\"{}\"", quote(&realm), quote(&service));
            prop_assert_eq!(of(&[&written]), bearer(&realm, Some(&service), None));
        }

        #[test]
        fn any_header_is_scanned_without_a_panic(text in "[ -~\t]{0,200}") {
            of(&[&text]);
        }
    }
}
