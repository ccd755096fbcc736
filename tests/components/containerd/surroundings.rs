//! What a containerd tells of itself.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use lighterman::containerd::{Config, ContainerdStore, Ingest, Snapshotter, Surroundings, Verifiers};
use lighterman::ports::{ContentStore, Remembered};

use super::daemon::Daemon;
use super::{HOUR, content, write};

pub(crate) async fn it_tells_what_it_is(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("k8s.io");
    let pin = store.pin(HOUR).await.unwrap();
    write(&store, &content("makes the folder", 10), &pin, &Remembered::default()).await;
    let verifiers = tempfile::tempdir().unwrap();
    let Surroundings {
        version: told,
        content_root,
        ingest,
        cri,
        discards_unpacked_layers,
        snapshotter,
        sandbox_image,
        verifiers: any,
    } = store.surroundings(verifiers.path()).await.unwrap();
    let is_2 = version != "containerd-1.7";
    let number = version.trim_start_matches("containerd-");
    assert!(told.trim_start_matches('v').starts_with(number), "{told}");
    assert!(content_root.unwrap().join("blobs/sha256").is_dir());
    assert_eq!(ingest, Some(Ingest::Linked));
    assert!(cri);
    assert_eq!(snapshotter, Snapshotter::Suited("overlayfs".into()));
    assert_eq!(discards_unpacked_layers, (!is_2).then_some(false));
    assert_eq!(sandbox_image.is_some_and(|image| image.starts_with("registry.k8s.io/pause:")), !is_2);
    assert_eq!(any, Verifiers::None);

    let program = verifiers.path().join("says-no");
    fs::write(&program, "#!/bin/false").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let found = store.surroundings(verifiers.path()).await.unwrap().verifiers;
    assert_eq!(found, if is_2 { Verifiers::Found } else { Verifiers::None }, "1.x has no verifiers");

    let blind = ContainerdStore::new(Config { host_root: None, ..daemon.config("k8s.io") }).unwrap();
    let unseen = blind.surroundings(Path::new("/nothing/is/here")).await.unwrap().verifiers;
    assert_eq!(unseen, if is_2 { Verifiers::Unseen } else { Verifiers::None });
}

/// A container as CRI makes it for a sandbox: the label and the image's name are what is looked at.
pub(crate) async fn the_image_of_sandboxes_is_seen_in_them(version: &str) {
    let daemon = Daemon::start(version).await;
    // No CRI plugin serves this namespace's containers, so that it leaves this one alone; its configuration is told all the same.
    let seen = async || {
        let surroundings = daemon.store("sandboxes").surroundings(Path::new("/nothing/is/here")).await.unwrap();
        surroundings.sandbox_image.unwrap_or_default()
    };
    let before = seen().await;
    for (id, image) in [("older", "example.org/pause:1"), ("newer", "example.org/pause:2")] {
        daemon.make_container("sandboxes", id, image).await;
    }
    match version {
        "containerd-1.7" => assert_eq!(seen().await, before, "the configuration tells"),
        _ => assert_eq!((before.as_str(), seen().await.as_str()), ("", "example.org/pause:2")),
    }
}
