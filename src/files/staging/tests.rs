use std::os::unix::fs::symlink;

use super::*;

fn staging_file(path: &Path, size: u64) -> Arc<StagingFile> {
    Arc::new(StagingFile::open(path, size).unwrap())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn written_extents_are_found_again_and_holes_take_no_space() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blob");
    let file = staging_file(&path, 64 * MIB + 5);
    assert_eq!(file.resumed_ranges(), []);
    let (head, tail) = (Bytes::from(vec![1; 10_000]), Bytes::from(vec![2; 5]));
    file.write_at(64 * MIB, std::slice::from_ref(&tail)).await.unwrap();
    file.write_at(8 * MIB, &[Bytes::new(), head.slice(..1), Bytes::new(), head.slice(1..)]).await.unwrap();
    drop(file);

    let file = staging_file(&path, 64 * MIB + 5);
    let ranges = file.resumed_ranges();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    for written in [8 * MIB..8 * MIB + 10_000, 64 * MIB..64 * MIB + 5] {
        let around = ranges.iter().find(|part| part.start <= written.start && written.end <= part.end);
        let around = around.unwrap_or_else(|| panic!("{written:?} is not in {ranges:?}"));
        assert!(around.end - around.start < MIB, "{ranges:?}");
    }
    assert_eq!(file.read_at(8 * MIB, 10_000).await.unwrap(), head);
    assert_eq!(file.read_at(64 * MIB, 100).await.unwrap(), tail, "a read ends at the end of the file");
    assert_eq!(file.read_at(MIB, 3).await.unwrap(), [0; 3][..]);
    assert_eq!(file.read_at(65 * MIB, 3).await.unwrap(), Bytes::new());
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < MIB, "holes take room");
}

#[tokio::test]
async fn more_chunks_than_one_call_takes_are_written_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Bytes = (0..3000_u32).flat_map(u32::to_be_bytes).collect::<Vec<_>>().into();
    let chunks: Vec<_> = (0..3000).map(|n| bytes.slice(4 * n..4 * n + 4)).collect();
    let file = staging_file(&folder.path().join("blob"), 20_000);
    file.write_at(7, &chunks).await.unwrap();
    assert_eq!(file.read_at(7, 12_000).await.unwrap(), bytes);
}

#[tokio::test]
async fn writes_beyond_the_end_are_rejected() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blob");
    let file = staging_file(&path, 10);
    for offset in [6, 10, u64::MAX] {
        file.write_at(offset, &[Bytes::from_static(b"12345")]).await.unwrap_err();
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), 10);
    assert_eq!(file.read_at(0, 10).await.unwrap(), [0; 10][..]);
}

#[tokio::test]
async fn a_sealed_file_is_never_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blob");
    let file = staging_file(&path, 5);
    file.write_at(0, &[Bytes::from_static(b"right")]).await.unwrap();
    assert_eq!(mode(&path), 0o600);
    file.seal().unwrap();
    file.seal().unwrap();
    assert_eq!(mode(&path), 0o444);
    file.write_at(0, &[Bytes::from_static(b"wrong")]).await.unwrap_err();
    assert_eq!(file.read_at(0, 5).await.unwrap(), "right");
    drop(file);

    // After a kill between the seal and the link the file is resumed. After a later kill the linked
    // file is never written to.
    let file = staging_file(&path, 5);
    assert_eq!((file.resumed_ranges().first(), mode(&path)), (Some(&(0..5)), 0o600));
    file.seal().unwrap();
    drop(file);
    let linked = folder.path().join("linked");
    fs::hard_link(&path, &linked).unwrap();
    let file = staging_file(&path, 5);
    assert_eq!(file.resumed_ranges(), []);
    assert!(!file.is_linked_at(&linked).unwrap());
    file.write_at(0, &[Bytes::from_static(b"wrong")]).await.unwrap();
    assert_eq!(fs::read(&linked).unwrap(), b"right");
}

#[test]
fn an_unsuitable_leftover_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = folder.path().join("elsewhere");
    fs::write(&elsewhere, "precious").unwrap();
    let put = |name: &str, mode: u32| {
        let path = folder.path().join(name);
        fs::write(&path, "leftover").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    };
    let (shorter, others) = (put("shorter", 0o600), put("others", 0o644));
    let link = folder.path().join("link");
    symlink(&elsewhere, &link).unwrap();
    for (path, size) in [(&shorter, 9), (&others, 8), (&link, 8)] {
        let file = StagingFile::open(path, size).unwrap();
        assert_eq!((file.resumed_ranges(), mode(path)), (vec![], 0o600), "{}", path.display());
    }
    assert_eq!(fs::read(&elsewhere).unwrap(), b"precious");
}

#[test]
fn a_staging_file_has_one_owner_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blob");
    let first = StagingFile::open(&path, 5).unwrap();
    let second = StagingFile::open(&path, 5).map(|_| ()).unwrap_err();
    assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
    first.remove();
    assert!(!path.exists());
    let third = StagingFile::open(&path, 5).unwrap();
    first.remove();
    assert!(third.is_linked_at(&path).unwrap(), "only the file's own name is removed");
}

#[tokio::test]
async fn a_removed_staging_file_can_be_read_but_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = staging_file(&folder.path().join("blob"), 4);
    file.write_at(0, &[Bytes::from_static(b"read")]).await.unwrap();
    file.remove();
    assert_eq!(file.read_at(0, 4).await.unwrap(), "read");
    file.write_at(0, &[Bytes::from_static(b"more")]).await.unwrap_err();
    file.seal().unwrap_err();
}

#[tokio::test]
async fn a_slow_disk_is_written_from_a_blocking_thread() {
    let folder = tempfile::tempdir().unwrap();
    let file = staging_file(&folder.path().join("blob"), 4);
    file.slow_disk.record(std::time::Duration::from_secs(3600), Instant::now() + std::time::Duration::from_secs(3600));
    let writing = Arc::clone(&file);
    // This thread is the runtime's only worker, and `write_at` must not block it: the first poll
    // writes nothing.
    let mut write = Box::pin(async move { writing.write_at(0, &[Bytes::from_static(b"slow")]).await });
    assert!(futures::poll!(&mut write).is_pending());
    write.await.unwrap();
    assert_eq!(file.read_at(0, 4).await.unwrap(), "slow");
}
