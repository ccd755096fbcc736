use std::fs;

use bytes::Bytes;
use tempfile::TempDir;

use super::*;
use crate::oci::{Descriptor, Repository};
use crate::ports::{Child, ChildKind, ContentStore, STAGED_BLOB_LIFE};
use crate::testing::contract::{StoreUnderTest, UnfinishedWrite, assert_contract};
use crate::testing::image::write_blob;

struct LayoutUnderTest {
    root: TempDir,
    store: LayoutStore,
}

impl LayoutUnderTest {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        Self { store: LayoutStore::open(root.path()).unwrap(), root }
    }

    fn json(&self, file: &str) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.root.path().join(file)).unwrap()).unwrap()
    }

    async fn write(&self, bytes: &[u8], pin: &Pin, metadata: &BlobMetadata) -> Descriptor {
        let digest = write_blob(&self.store, Bytes::copy_from_slice(bytes), metadata, pin).await.unwrap();
        Descriptor { media_type: "m".into(), digest, size: bytes.len() as u64, platform: None, attestation: false }
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&to).unwrap();
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[async_trait]
impl StoreUnderTest for LayoutUnderTest {
    fn store(&self) -> Arc<dyn ContentStore> {
        Arc::new(self.store.clone())
    }

    async fn collect(&self) {
        self.store.collect().await.unwrap();
    }

    /// A copy of the folder is the state after a kill, without any cleanup.
    async fn restart(&mut self, unfinished: UnfinishedWrite) {
        let copied = tempfile::tempdir().unwrap();
        copy(self.root.path(), copied.path());
        drop(unfinished);
        *self = Self { store: LayoutStore::open(copied.path()).unwrap(), root: copied };
    }
}

#[tokio::test]
async fn the_layout_store_passes_the_contract() {
    assert_contract("LayoutStore", async || LayoutUnderTest::new()).await;
}

#[tokio::test]
async fn an_image_record_is_listed_in_the_index_by_full_name() {
    let disk = LayoutUnderTest::new();
    let pin = disk.store.pin(Duration::from_secs(60)).await.unwrap();
    let target = disk.write(b"{}", &pin, &BlobMetadata::default()).await;
    let name = "docker.io/library/nginx:1.27";
    disk.store.put_image(&ImageRecord { name: name.into(), target: target.clone() }).await.unwrap();

    let index = disk.json("index.json");
    assert_eq!(index["schemaVersion"], 2);
    let entry = &index["manifests"][0];
    assert_eq!(entry["annotations"]["org.opencontainers.image.ref.name"], name);
    assert_eq!(entry["digest"], target.digest.to_string());
    assert_eq!(entry["size"], 2);
    assert_eq!(disk.json("oci-layout")["imageLayoutVersion"], "1.0.0");
    assert_eq!(fs::read(blob_path(disk.root.path(), target.digest)).unwrap(), b"{}");
}

#[tokio::test]
async fn content_of_other_tools_is_preserved() {
    let disk = LayoutUnderTest::new();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blob_path(disk.root.path(), digest), bytes).unwrap();
        serde_json::json!({ "mediaType": "m", "digest": digest.to_string(), "size": bytes.len() })
    };
    let document = |children: serde_json::Value| children.to_string().into_bytes();
    let manifest = put(&document(
        serde_json::json!({ "schemaVersion": 2, "config": put(b"{\"os\":\"linux\"}"), "layers": [put(b"layer")] }),
    ));
    let mut theirs = put(&document(serde_json::json!({ "schemaVersion": 2, "manifests": [manifest] })));
    theirs["annotations"] = serde_json::json!({ "made.by": "another tool" });
    put(b"named by nothing");
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [theirs], "annotations": { "their": "own" } });
    fs::write(disk.root.path().join("index.json"), index.to_string()).unwrap();

    let pin = disk.store.pin(Duration::from_secs(60)).await.unwrap();
    let target = disk.write(b"ours", &pin, &BlobMetadata::default()).await;
    disk.store.put_image(&ImageRecord { name: "example.org/ours:1".into(), target }).await.unwrap();
    disk.store.release(pin).await.unwrap();

    assert_eq!(disk.store.blobs().await.unwrap().len(), 5, "index, manifest, config, layer, and the new blob");
    assert_eq!(disk.json("index.json")["manifests"][0], theirs);
    assert_eq!(disk.json("index.json")["annotations"], index["annotations"]);
    let names: Vec<_> = disk.store.images().await.unwrap().into_iter().map(|record| record.name).collect();
    assert_eq!(names, ["example.org/ours:1"], "an image without a name has no record");
}

#[tokio::test]
async fn source_repositories_are_kept_until_the_blob_is_collected() {
    let disk = LayoutUnderTest::new();
    let pin = disk.store.pin(Duration::from_secs(60)).await.unwrap();
    let from = |path: &str| Some(Repository { registry: "example.org".into(), path: path.into() });
    let child = Child { digest: Digest::of(b"child"), kind: ChildKind::Layer };
    let blob = disk.write(b"blob", &pin, &BlobMetadata { source: from("one"), children: vec![child] }).await;
    disk.store.add_metadata(blob.digest, &BlobMetadata { source: from("two"), children: vec![] }).await.unwrap();

    let metadata_file = format!("remembered/{}.json", blob.digest.hex());
    let sources = disk.json(&metadata_file)["sources"].clone();
    assert_eq!(
        sources,
        serde_json::json!([{ "registry": "example.org", "path": "one" }, { "registry": "example.org", "path": "two" }])
    );
    disk.store.release(pin).await.unwrap();
    assert!(!disk.root.path().join(metadata_file).exists());
}

#[tokio::test]
async fn a_killed_writer_s_file_is_swept_when_the_folder_is_opened_again() {
    let LayoutUnderTest { root, store } = LayoutUnderTest::new();
    drop(store);
    // A process that is killed in `put` leaves this file.
    let file = root.path().join("ingest").join(Digest::of(b"whole").hex());
    fs::write(&file, "who").unwrap();
    let disk = LayoutUnderTest { store: LayoutStore::open(root.path()).unwrap(), root };
    assert!(!file.exists());
    assert_eq!(disk.store.blobs().await.unwrap(), []);
}

#[tokio::test]
async fn a_failed_put_removes_its_file() {
    let disk = LayoutUnderTest::new();
    let pin = disk.store.pin(Duration::from_secs(60)).await.unwrap();
    fs::remove_dir(disk.root.path().join("blobs/sha256")).unwrap();
    write_blob(&disk.store, Bytes::from_static(b"whole"), &BlobMetadata::default(), &pin).await.unwrap_err();
    assert_eq!(fs::read_dir(disk.root.path().join("ingest")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_staging_file_is_removed_after_the_lifetime() {
    let mut disk = LayoutUnderTest::new();
    let pin = disk.store.pin(Duration::from_secs(60)).await.unwrap();
    let staged = async |disk: &LayoutUnderTest, bytes: &'static [u8]| {
        let staged = disk.store.stage(Digest::of(bytes), bytes.len() as u64, &pin).await.unwrap();
        staged.write_at(0, &[Bytes::from_static(bytes)]).await.unwrap();
        staged
    };
    let age = |disk: &LayoutUnderTest, bytes: &[u8], by: Duration| {
        let path = disk.root.path().join("ingest").join(Digest::of(bytes).hex() + ".staged");
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(std::time::SystemTime::now() - by).unwrap();
    };
    let names = |disk: &LayoutUnderTest| {
        let entries = fs::read_dir(disk.root.path().join("ingest")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<HashSet<_>>()
    };
    let named = |all: &[&[u8]]| all.iter().map(|bytes| Digest::of(bytes).hex() + ".staged").collect::<HashSet<_>>();
    let (old, open_blob) = (STAGED_BLOB_LIFE + Duration::from_secs(60), staged(&disk, b"held").await);
    drop(staged(&disk, b"young").await);
    drop(staged(&disk, b"old").await);
    age(&disk, b"old", old);
    age(&disk, b"held", old);
    drop(staged(&disk, b"next").await);
    assert_eq!(names(&disk), named(&[b"held", b"young", b"next"]), "after another blob is staged");

    age(&disk, b"next", old);
    age(&disk, b"young", STAGED_BLOB_LIFE - Duration::from_secs(60));
    drop(open_blob);
    let LayoutUnderTest { root, store } = disk;
    drop(store);
    disk = LayoutUnderTest { store: LayoutStore::open(root.path()).unwrap(), root };
    assert_eq!(names(&disk), named(&[b"young"]), "after the folder is opened");
    assert_eq!(staged(&disk, b"young").await.resumed_ranges().first(), Some(&(0..5)));
}

#[test]
fn a_folder_has_one_owner() {
    let disk = LayoutUnderTest::new();
    let error = LayoutStore::open(disk.root.path()).map(|_| ()).expect_err("the folder has two owners");
    assert!(matches!(&error, LayoutError::InUse(root) if root == disk.root.path()), "{error}");
    assert!(error.to_string().contains(disk.root.path().to_str().unwrap()));
    let LayoutUnderTest { root, store } = disk;
    drop(store);
    LayoutStore::open(root.path()).unwrap();
}

#[test]
fn a_folder_with_other_content_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("thesis.tex"), "x").unwrap();
    assert!(matches!(LayoutStore::open(root.path()), Err(LayoutError::Foreign(_))));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_pin_s_name_is_never_a_path() {
    let disk = LayoutUnderTest::new();
    let staged = disk.store.stage(Digest::of(b"x"), 1, &Pin("../index.json".into())).await.map(|_| ());
    assert!(matches!(staged, Err(StoreError::Other(_))));
    disk.store.release(Pin("../index.json".into())).await.unwrap();
    assert!(disk.root.path().join("index.json").exists());
}
