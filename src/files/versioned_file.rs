//! JSON files with a version, for an agent that finds the files of another build after an upgrade
//! or a rollback.
//!
//! A build adds fields without a new version, and ignores unknown fields. A new version means that
//! known fields have another meaning.

use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::read_private;

/// The version, which every such file has.
#[derive(Deserialize)]
struct Stamp {
    version: u32,
}

/// Reads a private file of at most `most` bytes that has this version. A file of another version is
/// renamed to `NAME.version-N` and stays for the build that wrote it.
///
/// # Errors
/// As [`read_private`]; [`io::ErrorKind::InvalidData`] for another version or a missing version.
pub fn read_versioned(path: &Path, limit: u64, version: u32) -> io::Result<Vec<u8>> {
    let text = read_private(path, limit)?;
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    // Without the parser's message, which quotes the content: the file may contain a secret.
    let stamp: Stamp = serde_json::from_slice(&text).map_err(|_| invalid("the file is damaged".into()))?;
    if stamp.version == version {
        return Ok(text);
    }
    let aside = set_aside(path, stamp.version)?;
    Err(invalid(format!(
        "the file has version {}, not {version}: another release of the agent wrote it. The file is kept as {}",
        stamp.version,
        aside.display()
    )))
}

/// Keeps one file per version; a later file replaces an earlier one.
fn set_aside(path: &Path, version: u32) -> io::Result<PathBuf> {
    let mut name = path.file_name().ok_or_else(|| io::Error::other("the path has no file name"))?.to_owned();
    name.push(format!(".version-{version}"));
    let aside = path.with_file_name(name);
    std::fs::rename(path, &aside)?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::write_private;

    #[test]
    fn a_file_of_another_version_is_kept_under_another_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        let future = br#"{"version": 7, "peers": {"not": "a list"}}"#;
        write_private(&path, future).unwrap();
        let error = read_versioned(&path, 1024, 1).unwrap_err();
        assert!(error.to_string().contains("version 7, not 1"), "{error}");
        assert!(!path.exists());
        assert_eq!(std::fs::read(folder.path().join("state.json.version-7")).unwrap(), future);
        assert_eq!(read_versioned(&path, 1024, 1).unwrap_err().kind(), io::ErrorKind::NotFound);
        // The next rollback finds a later file of that version.
        write_private(&path, br#"{"version":7}"#).unwrap();
        read_versioned(&path, 1024, 1).unwrap_err();
        assert_eq!(std::fs::read(folder.path().join("state.json.version-7")).unwrap(), br#"{"version":7}"#);
    }

    #[test]
    fn a_file_without_a_version_is_not_moved() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        for text in ["", "{}", r#"{"version": "1"}"#, r#"{"version": -1}"#, r#"{"version": 1"#] {
            write_private(&path, text.as_bytes()).unwrap();
            assert_eq!(read_versioned(&path, 1024, 1).unwrap_err().kind(), io::ErrorKind::InvalidData, "{text}");
            assert!(path.exists(), "{text}");
        }
        let text = br#"{"version": 1, "unknown": [1, 2]}"#;
        write_private(&path, text).unwrap();
        assert_eq!(read_versioned(&path, 1024, 1).unwrap(), text);
    }
}
