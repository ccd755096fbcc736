//! Which machine an image is for.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `platform` of a descriptor (OCI image specification, "Image Index").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `amd64`, `arm64`, … as Go spells them.
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// `v8`, `v7`, … where the architecture has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// The platform that this binary was built for, which is the node's.
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

    /// How well an image for `offered` runs here: `None` not at all, else the higher the better.
    ///
    /// As containerd's `platforms.Only`: arm64 without a variant is v8; on arm a lower variant runs on a higher one.
    pub fn preference(&self, offered: &Platform) -> Option<u8> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        let rank = |platform: &Platform| -> Option<u8> {
            match (platform.architecture.as_str(), platform.variant.as_deref()) {
                ("arm64", None) => Some(8),
                ("arm", None) => Some(7),
                ("arm" | "arm64", Some(variant)) => {
                    variant.strip_prefix('v').and_then(|v| v.split('.').next()).and_then(|v| v.parse().ok())
                }
                (_, None | Some("v1")) => Some(1),
                // amd64/v2 and v3 ask for instructions that this node may lack; containerd's default matcher skips them too.
                (_, Some(_)) => None,
            }
        };
        let (here, there) = (rank(self)?, rank(offered)?);
        (there <= here).then_some(there)
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
        for (here, offered, runs) in [
            ("linux/amd64", "linux/amd64", true),
            ("linux/amd64", "linux/amd64/v1", true),
            ("linux/amd64", "linux/amd64/v3", false),
            ("linux/amd64", "linux/arm64", false),
            ("linux/amd64", "windows/amd64", false),
            ("linux/arm64/v8", "linux/arm64", true),
            ("linux/arm/v7", "linux/arm/v6", true),
            ("linux/arm/v6", "linux/arm/v7", false),
            ("linux/amd64", "unknown/unknown", false),
        ] {
            assert_eq!(platform(here).preference(&platform(offered)).is_some(), runs, "{offered} on {here}");
        }
    }

    #[test]
    fn the_closest_variant_is_preferred() {
        let here = platform("linux/arm/v7");
        assert!(here.preference(&platform("linux/arm/v7")) > here.preference(&platform("linux/arm/v6")));
    }
}
