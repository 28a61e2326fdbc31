//! Base images, memory images, destroy.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn two_volumes_share_a_base_and_not_their_writes() {
    let mut site = Site::new(small_limits()).await;
    let image = [noise(1, 200_000), vec![0; 300_000], noise(2, 50_000)].concat();
    let base = site.base(&image, "image").await;
    assert_eq!(base.size_bytes, image.len() as u64);
    let packs = site.bucket().list("v1/tmpl").await.unwrap().len();
    let create = async || site.store().create(SpriteId::generate(), &base, 1 << 30).await.unwrap();
    let (one, two) = (create().await, create().await);
    let len = image.len() as u64;
    assert!(read(&one, 0, len).await == image && read(&two, 0, len).await == image);
    assert_eq!(site.bucket().list("v1/vol").await.unwrap(), [], "creating copies nothing");
    write(&one, 1000, &[5; 10]).await;
    one.push().await.unwrap();
    assert!(read(&two, 0, len).await == image);
    let mut changed = image.clone();
    changed[1000..1010].fill(5);
    assert!(read(&one, 0, len).await == changed);
    let id = one.id();
    one.release().await.unwrap();
    site.wipe();
    site.open().await;
    // The image itself is not needed any more.
    fs::remove_file(site.dir.path().join("image")).unwrap();
    let again = site.store().ensure_base(&site.dir.path().join("image"), "image", |_, _| {}).await.unwrap();
    assert_eq!(again, base);
    assert_eq!(site.bucket().list("v1/tmpl").await.unwrap().len(), packs);
    let one = site.store().acquire(id).await.unwrap();
    assert!(read(&one, 0, len).await == changed);
    assert_eq!(read(&one, len, 4096).await, [0; 4096]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_killed_half_way_begins_again() {
    let site = Site::new(small_limits()).await;
    let image = site.dir.path().join("image");
    let content = noise(3, 20 << 20);
    fs::write(&image, &content).unwrap();
    let seen = std::sync::Mutex::new((0, 0));
    let half = tokio::sync::Notify::new();
    let progress = |done, total| {
        *seen.lock().unwrap() = (done, total);
        half.notify_one();
    };
    tokio::select! {
        _ = site.store().ensure_base(&image, "x", progress) => panic!("20 MiB take more than one step"),
        () = half.notified() => {}
    }
    let (done, total) = *seen.lock().unwrap();
    assert!(done > 0 && done < total && total == 20 << 20, "{done} of {total}");
    let base = site.store().ensure_base(&image, "x", |_, _| {}).await.unwrap();
    let volume = site.store().create(SpriteId::generate(), &base, 20 << 20).await.unwrap();
    assert!(read_all(&volume).await == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filled_base_keeps_the_image_and_costs_little() {
    let site = Site::new(small_limits()).await;
    let image = [noise(1, 65536), vec![0; 65536], noise(2, 65536)].concat();
    fs::write(site.dir.path().join("image"), &image).unwrap();
    fs::File::options().write(true).open(site.dir.path().join("image")).unwrap().set_len(8 << 30).unwrap();
    let (path, filled) = (site.dir.path().join("image"), [0..3 * 65536, 1 << 30..(5 << 30) + 100]);
    let base = site.store().ensure_filled_base(&path, "filled", &filled, |_, _| {}).await.unwrap();
    let volume = site.store().create(SpriteId::generate(), &base, 8 << 30).await.unwrap();
    let used = volume.status().used_bytes;
    assert_eq!(used, (4 << 30) + 3 * 65536);
    let first = read(&volume, 0, 3 * 65536).await;
    assert!(first[..65536] == image[..65536] && first[131_072..] == image[131_072..]);
    assert!(!super::super::frame::is_zero(&first[65536..131_072]), "filled");
    assert_eq!(read(&volume, (5 << 30) - 65536, 131_072).await[65536..], [0; 65536]);
    let there: u64 = site.bucket().list("v1/tmpl").await.unwrap().iter().map(|entry| entry.size_bytes).sum();
    assert!(there < 40 << 20, "{there} bytes for {used}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_sizes_and_images_are_refused() {
    let site = Site::new(small_limits()).await;
    let base = site.base(&[1; 65536], "small").await;
    for wrong in [4096, 65537, 1 << 50] {
        let refused = site.store().create(SpriteId::generate(), &base, wrong).await;
        assert!(matches!(refused, Err(StoreError::BadSize { .. })), "{wrong}");
    }
    let missing = site.store().ensure_base(Path::new("/nowhere"), "missing", |_, _| {}).await;
    assert!(matches!(missing, Err(BaseError::Image { .. })));
    let id = SpriteId::generate();
    site.store().create(id, &base, 1 << 20).await.unwrap();
    assert!(matches!(site.store().create(id, &base, 1 << 20).await, Err(StoreError::Exists { .. })));
    assert!(matches!(site.store().acquire(SpriteId::generate()).await, Err(StoreError::Unknown { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn destroy_leaves_a_tombstone_and_nothing_else() {
    let site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    write(&volume, 0, &noise(1, 65536)).await;
    volume.seal_checkpoint(meta("")).await.unwrap();
    volume.push().await.unwrap();
    drop(volume);
    site.store().destroy(id).await.unwrap();
    site.store().destroy(id).await.unwrap();
    assert!(site.store().volume(id).is_none());
    assert_eq!(site.bucket().list(&format!("v1/vol/{id}")).await.unwrap(), []);
    assert!(!site.store_dir().join("vol").join(id.to_string()).exists());
    assert!(matches!(site.store().acquire(id).await, Err(StoreError::Destroyed { .. })));
    let base = site.empty_base().await;
    assert!(matches!(site.store().create(id, &base, 1 << 20).await, Err(StoreError::Exists { .. })));
    site.store().destroy(SpriteId::generate()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_volume_lists_and_deletes_its_checkpoints() {
    let site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    for _ in 0..2 {
        write(&volume, 0, &[1; 512]).await;
        volume.seal_checkpoint(meta("x")).await.unwrap();
    }
    volume.release().await.unwrap();
    let listed = site.store().checkpoints(id).await.unwrap();
    assert!(listed.iter().all(|checkpoint| checkpoint.durable) && listed.len() == 2);
    let delete = async |checkpoint: &str| site.store().delete_checkpoint(id, checkpoint).await;
    assert!(matches!(delete("v2").await, Err(CheckpointError::CurrentBase { .. })));
    assert!(matches!(delete("v3").await, Err(CheckpointError::Unknown { .. })));
    delete("v1").await.unwrap();
    let volume = site.store().acquire(id).await.unwrap();
    assert_eq!(volume.checkpoints().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_published_with_its_disk_fetched_elsewhere_and_retired() {
    let mut site = Site::new(small_limits()).await;
    let volume = site.volume(1 << 20).await;
    let id = volume.id();
    let file = |name: &str| site.dir.path().join(name);
    let golden = [noise(1, 300_000), vec![0; 400_000], noise(2, 10_000)].concat();
    let mut memory = golden.clone();
    memory[100_000..250_000].fill(0);
    memory[500_000..500_010].fill(9);
    memory.extend(noise(3, 100_000));
    fs::write(file("golden"), &golden).unwrap();
    fs::write(file("memory"), &memory).unwrap();
    fs::write(file("state"), noise(4, 123_456)).unwrap();
    let source = MemorySource {
        memory_file: file("memory"),
        golden_file: file("golden"),
        state_file: file("state"),
        snapshot_key: "key".into(),
    };
    write(&volume, 0, &[1; 4096]).await;
    volume.publish_memory(source.clone()).await.unwrap();
    let info = volume.memory().unwrap();
    assert_eq!((info.lsn, info.memory_bytes), (Lsn(1), memory.len() as u64));
    volume.release().await.unwrap();
    let target =
        MemoryTarget { memory_file: file("memory.new"), golden_file: file("golden"), state_file: file("state.new") };
    let (expected_memory, state) = (memory, noise(4, 123_456));
    site.wipe();
    site.open().await;
    let volume = site.store().acquire(id).await.unwrap();
    assert_eq!(volume.fetch_memory(target.clone()).await.unwrap(), info);
    assert!(fs::read(&target.memory_file).unwrap() == expected_memory);
    assert!(fs::read(&target.state_file).unwrap() == state);
    volume.retire_memory().await.unwrap();
    assert!(matches!(volume.fetch_memory(target).await, Err(MemoryError::None)));
    assert!(!site.store().head(id).await.unwrap().unwrap().has_memory());
    // Any write makes an image worthless.
    volume.publish_memory(source.clone()).await.unwrap();
    write(&volume, 0, &[2; 512]).await;
    assert_eq!(volume.memory(), None);
    volume.push().await.unwrap();
    assert!(!site.store().head(id).await.unwrap().unwrap().has_memory());
    let missing = MemorySource { state_file: site.dir.path().join("none"), ..source };
    assert!(matches!(volume.publish_memory(missing).await, Err(MemoryError::File { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_makes_another_volume_equal() {
    let site = Site::new(small_limits()).await;
    let base = site.base(&noise(1, 400_000), "image").await;
    let create = async || site.store().create(SpriteId::generate(), &base, 4 << 20).await.unwrap();
    let (one, two) = (create().await, create().await);
    one.track_writes();
    write(&one, 1000, &noise(2, 100_000)).await;
    write(&one, 2 << 20, &noise(3, (1 << 20) + 77)).await;
    one.zero(50_000, 4096).await.unwrap();
    one.zero(200_000, 100_000).await.unwrap();
    one.push().await.unwrap();
    write(&one, 1500, &[9; 3]).await;
    let patch = Patch::decode(one.written().await.unwrap().encode()).unwrap();
    assert!(patch.data_bytes() >= (1 << 20) + 77 && patch.data_bytes() < 1_300_000, "{}", patch.data_bytes());
    two.apply(&patch).await.unwrap();
    assert!(read_all(&one).await == read_all(&two).await);
    assert_eq!(create().await.written().await.unwrap(), Patch::default(), "nobody watched it");
}
