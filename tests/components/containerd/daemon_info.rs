//! Version and settings that containerd reports.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use lighterman::containerd::{Config, ContainerdInfo, ContainerdStore, ImageVerifiers, IngestMode, Snapshotter};
use lighterman::ports::{BlobMetadata, Pins};

use super::daemon::Daemon;
use super::{HOUR, content, write};

pub(crate) async fn version_and_settings_of_containerd_are_read(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("k8s.io");
    let pin = store.pin(HOUR).await.unwrap();
    write(&store, &content("makes the folder", 10), &pin, &BlobMetadata::default()).await;
    let verifiers = tempfile::tempdir().unwrap();
    let ContainerdInfo {
        version: reported_version,
        content_root,
        ingest,
        cri,
        discards_unpacked_layers,
        snapshotter,
        sandbox_image,
        verifiers: initial_verifiers,
    } = store.inspect(verifiers.path()).await.unwrap();
    let is_2 = version != "containerd-1.7";
    let number = version.trim_start_matches("containerd-");
    assert!(reported_version.trim_start_matches('v').starts_with(number), "{reported_version}");
    assert!(content_root.unwrap().join("blobs/sha256").is_dir());
    assert_eq!(ingest, Some(IngestMode::Linked));
    assert!(cri);
    assert_eq!(snapshotter, Snapshotter::Supported("overlayfs".into()));
    assert_eq!(discards_unpacked_layers, (!is_2).then_some(false));
    assert_eq!(sandbox_image.is_some_and(|image| image.starts_with("registry.k8s.io/pause:")), !is_2);
    assert_eq!(initial_verifiers, ImageVerifiers::None);

    let program = verifiers.path().join("says-no");
    fs::write(&program, "#!/bin/false").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let found = store.inspect(verifiers.path()).await.unwrap().verifiers;
    assert_eq!(
        found,
        if is_2 { ImageVerifiers::Found } else { ImageVerifiers::None },
        "containerd 1.x has no verifiers"
    );

    let store_without_files = ContainerdStore::new(Config { host_root: None, ..daemon.config("k8s.io") }).unwrap();
    let verifiers_without_files = store_without_files.inspect(Path::new("/nothing/is/here")).await.unwrap().verifiers;
    assert_eq!(verifiers_without_files, if is_2 { ImageVerifiers::Unseen } else { ImageVerifiers::None });
}

/// The containers have what the store reads of a sandbox: CRI's label and the name of the image.
pub(crate) async fn the_sandbox_image_is_read_from_containers(version: &str) {
    let daemon = Daemon::start(version).await;
    // The CRI plugin serves no containers of this namespace and leaves the test's containers alone.
    // The plugin's configuration is reported all the same.
    let read_sandbox_image = async || {
        let info = daemon.store("sandboxes").inspect(Path::new("/nothing/is/here")).await.unwrap();
        info.sandbox_image.unwrap_or_default()
    };
    let before = read_sandbox_image().await;
    for (id, image) in [("older", "example.org/pause:1"), ("newer", "example.org/pause:2")] {
        daemon.make_container("sandboxes", id, image).await;
    }
    match version {
        "containerd-1.7" => assert_eq!(read_sandbox_image().await, before, "1.7 reports the configured image"),
        _ => assert_eq!((before.as_str(), read_sandbox_image().await.as_str()), ("", "example.org/pause:2")),
    }
}
