//! The platform of an image.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `platform` of a descriptor (OCI image specification, "Image Index"), and the same fields of a
/// configuration. An omitted field is empty, as in Go: an empty system means linux, an empty
/// architecture matches no machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `amd64`, `arm64`, … as Go spells them.
    #[serde(default)]
    pub architecture: String,
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `v8`, `v7`, … where the architecture has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// The platform of this binary, which is the node's.
    pub fn of_this_node() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "powerpc64" => ("ppc64le", None),
            other => (other, None),
        };
        Self { architecture: architecture.into(), os: "linux".into(), variant: variant.map(Into::into) }
    }

    /// The rank of an image for `offered` on this platform: `None` when the image does not run,
    /// else the higher the better.
    ///
    /// As containerd's `platforms.Only`, by which its CRI plugin chooses on linux. Versions and
    /// features of the operating system do not count there.
    pub fn preference(&self, offered: &Platform) -> Option<u8> {
        let offered = offered.normalized();
        let index = self.normalized().compatible_platforms().position(|platform| platform == offered)?;
        Some(u8::MAX.saturating_sub(index.try_into().unwrap_or(u8::MAX)))
    }

    /// The platforms that run on this one, the best first (containerd: `platformVector`). `self` is
    /// normalized.
    fn compatible_platforms(&self) -> impl Iterator<Item = Platform> {
        let number = |variant: &str| variant.strip_prefix('v').and_then(|number| number.parse::<u8>().ok());
        let variant = self.variant.as_deref().unwrap_or_default();
        let lower: Vec<(&str, u8)> = match self.architecture.as_str() {
            // v2 and up need instructions that a node may lack; a platform without a variant runs
            // none of them.
            "amd64" => (1..number(variant).unwrap_or(1)).rev().map(|version| ("amd64", version)).collect(),
            "arm" => (5..number(variant).unwrap_or(5)).rev().map(|version| ("arm", version)).collect(),
            "arm64" => (5..=8).rev().map(|version| ("arm", version)).collect(),
            _ => Vec::new(),
        };
        let platform_of = |architecture: &str, variant: Option<String>| {
            Self { architecture: architecture.into(), os: self.os.clone(), variant }.normalized()
        };
        let mut platforms = vec![self.clone()];
        platforms.extend(
            lower.into_iter().map(|(architecture, version)| platform_of(architecture, Some(format!("v{version}")))),
        );
        platforms.extend((self.architecture == "amd64").then(|| platform_of("386", None)));
        platforms.into_iter()
    }

    /// One spelling for each platform (containerd: `platforms.Normalize`).
    fn normalized(&self) -> Self {
        let os = match self.os.to_ascii_lowercase() {
            os if os.is_empty() => "linux".to_owned(),
            os => os,
        };
        let (architecture, variant) =
            (self.architecture.to_ascii_lowercase(), self.variant.as_deref().unwrap_or_default().to_ascii_lowercase());
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("i386", _) => ("386", ""),
            ("x86_64" | "x86-64" | "amd64", "v1" | "") => ("amd64", ""),
            ("x86_64" | "x86-64", variant) => ("amd64", variant),
            ("aarch64" | "arm64", "8" | "v8" | "") => ("arm64", ""),
            ("aarch64", variant) => ("arm64", variant),
            ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
            ("armel", _) | ("arm", "6") => ("arm", "v6"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "8") => ("arm", "v8"),
            (architecture, variant) => (architecture, variant),
        };
        let variant = (!variant.is_empty()).then(|| variant.to_owned());
        Self { architecture: architecture.to_owned(), os, variant }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        Platform { os: parts.next().unwrap(), architecture: parts.next().unwrap(), variant: parts.next() }
    }

    #[test]
    fn an_image_runs_where_its_platform_says() {
        for (node, offered, runs) in [
            ("linux/amd64", "linux/amd64", true),
            ("linux/amd64", "linux/amd64/v1", true),
            ("linux/amd64", "linux/amd64/v2", false),
            ("linux/amd64", "linux/amd64/v3", false),
            ("linux/amd64", "linux/x86_64", true),
            ("linux/amd64", "Linux/AMD64", true),
            ("linux/amd64", "linux/386", true),
            ("linux/amd64/v3", "linux/amd64/v2", true),
            ("linux/amd64/v3", "linux/amd64", true),
            ("linux/386", "linux/amd64", false),
            ("linux/amd64", "linux/arm64", false),
            ("linux/amd64", "windows/amd64", false),
            ("linux/arm64/v8", "linux/arm64", true),
            ("linux/arm64/v8", "linux/arm64/v8", true),
            ("linux/arm64/v8", "linux/aarch64", true),
            ("linux/arm64/v8", "linux/arm/v7", true),
            ("linux/arm64/v8", "linux/arm64/v9", false),
            ("linux/arm/v7", "linux/arm64", false),
            ("linux/arm/v7", "linux/arm", true),
            ("linux/arm/v7", "linux/arm/v5", true),
            ("linux/arm/v7", "linux/arm/v8", false),
            ("linux/arm/v5", "linux/arm/v5", true),
            ("linux/arm/v7", "linux/arm/v6", true),
            ("linux/arm/v6", "linux/arm/v7", false),
            ("linux/amd64", "unknown/unknown", false),
        ] {
            assert_eq!(platform(node).preference(&platform(offered)).is_some(), runs, "{offered} on {node}");
        }
    }

    #[test]
    fn the_closest_variant_is_preferred() {
        for (node, best_first) in [
            ("linux/arm/v7", &["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"][..]),
            ("linux/arm64/v8", &["linux/arm64", "linux/arm/v8", "linux/arm/v7", "linux/arm/v5"]),
            ("linux/amd64", &["linux/amd64/v1", "linux/386"]),
        ] {
            let preferences: Vec<_> =
                best_first.iter().map(|offered| platform(node).preference(&platform(offered))).collect();
            assert!(preferences.is_sorted_by(|better, worse| better > worse), "on {node}: {preferences:?}");
        }
    }

    #[test]
    fn a_configuration_without_a_platform_matches_no_node() {
        let parse = |json: &str| serde_json::from_str::<Platform>(json).unwrap();
        assert_eq!(parse(r#"{"architecture":"amd64","os":"linux","rootfs":{}}"#), platform("linux/amd64"));
        assert!(platform("linux/amd64").preference(&parse(r#"{"architecture":"amd64"}"#)).is_some());
        assert_eq!(platform("linux/amd64").preference(&parse("{}")), None);
    }

    #[test]
    fn os_version_and_os_features_are_ignored() {
        let json = r#"{"architecture":"amd64","os":"linux","os.version":"9","os.features":["x"]}"#;
        let offered: Platform = serde_json::from_str(json).unwrap();
        assert_eq!(offered, platform("linux/amd64"));
    }
}
