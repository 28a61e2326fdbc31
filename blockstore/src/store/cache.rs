//! Frames near at hand: a bounded map in RAM, and packs as sparse files on the local disk.
//!
//! The files hold whatever parts of a pack were written or fetched here, at their offsets. There is no index and no fsync: a part that is missing or
//! rotten does not have the hash its parent names, so the reader fetches it again. Evicted as whole packs, the one unused for longest first.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    hash::Hash,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use super::head::{PackId, Place};

/// Files kept open.
const OPEN_FILES_MAX: usize = 256;
/// An eviction frees down to this share, so that it is not needed at every write.
const KEEP_PERCENT: u64 = 90;

/// A bounded map that forgets what was used longest ago.
pub(super) struct Lru<K, V> {
    entries: HashMap<K, (V, u64)>,
    by_use: BTreeMap<u64, K>,
    clock: u64,
    max: usize,
}

impl<K: Clone + Eq + Hash, V: Clone> Lru<K, V> {
    pub(super) fn new(max: usize) -> Self {
        Self { entries: HashMap::new(), by_use: BTreeMap::new(), clock: 0, max }
    }

    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        let (value, used) = self.entries.get_mut(key)?;
        self.clock += 1;
        self.by_use.remove(used);
        self.by_use.insert(self.clock, key.clone());
        *used = self.clock;
        Some(value.clone())
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        self.clock += 1;
        if let Some((_, used)) = self.entries.insert(key.clone(), (value, self.clock)) {
            self.by_use.remove(&used);
        }
        self.by_use.insert(self.clock, key);
        while self.entries.len() > self.max {
            let Some((_, oldest)) = self.by_use.pop_first() else { return };
            self.entries.remove(&oldest);
        }
    }
}

pub(super) struct DiskCache {
    dir: PathBuf,
    bytes_max: u64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    packs: HashMap<PackId, Cached>,
    bytes: u64,
    clock: u64,
    open: usize,
}

struct Cached {
    file: Option<Arc<File>>,
    bytes: u64,
    used: u64,
}

impl DiskCache {
    /// Takes up what an earlier process left. Blocking, as everything here.
    pub(super) fn open(dir: &Path, bytes_max: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut inner = Inner::default();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let Some(id) = entry.file_name().to_str().and_then(PackId::from_file_name) else { continue };
            let bytes = entry.metadata()?.blocks() * 512;
            inner.bytes += bytes;
            inner.packs.insert(id, Cached { file: None, bytes, used: 0 });
        }
        let cache = Self { dir: dir.to_owned(), bytes_max, inner: Mutex::new(inner) };
        cache.evict();
        Ok(cache)
    }

    /// What the cache has at that place; the caller checks the hash.
    pub(super) fn read(&self, place: Place) -> Option<Vec<u8>> {
        let file = self.file(place.pack, false)?;
        let mut bytes = vec![0; place.len as usize];
        file.read_exact_at(&mut bytes, u64::from(place.offset)).ok()?;
        Some(bytes)
    }

    /// Keeps part of a pack. A cache that cannot be written is a slow one, no error.
    pub(super) fn write(&self, pack: PackId, offset: u64, bytes: &[u8]) {
        let Some(file) = self.file(pack, true) else { return };
        if let Err(error) = file.write_all_at(bytes, offset) {
            tracing::debug!(?pack, %error, "cannot write the cache");
            self.forget(pack);
            return;
        }
        {
            let mut inner = self.lock();
            let written = bytes.len() as u64;
            inner.bytes += written;
            if let Some(cached) = inner.packs.get_mut(&pack) {
                cached.bytes += written;
            }
        }
        self.evict();
    }

    fn file(&self, pack: PackId, create: bool) -> Option<Arc<File>> {
        let mut inner = self.lock();
        inner.clock += 1;
        let clock = inner.clock;
        if let Some(cached) = inner.packs.get_mut(&pack) {
            cached.used = clock;
            if let Some(file) = &cached.file {
                return Some(Arc::clone(file));
            }
        } else if !create {
            return None;
        }
        let path = self.dir.join(pack.file_name());
        let opened = File::options().read(true).write(true).create(create).truncate(false).open(path);
        let file = match opened {
            Ok(file) => Arc::new(file),
            Err(error) => {
                tracing::debug!(?pack, %error, "cannot open the cache");
                return None;
            }
        };
        let cached = inner.packs.entry(pack).or_insert(Cached { file: None, bytes: 0, used: clock });
        cached.file = Some(Arc::clone(&file));
        inner.open += 1;
        if inner.open > OPEN_FILES_MAX {
            inner.close_half();
        }
        Some(file)
    }

    pub(super) fn forget(&self, pack: PackId) {
        let removed = {
            let mut inner = self.lock();
            inner.remove(pack)
        };
        if removed {
            // A file that stays is found, and evicted again, by the next open.
            fs::remove_file(self.dir.join(pack.file_name())).ok();
        }
    }

    fn evict(&self) {
        if self.lock().bytes > self.bytes_max {
            self.shrink(self.bytes_max / 100 * KEEP_PERCENT);
        }
    }

    /// Gives half of its space back to a disk that is full.
    pub(super) fn make_room(&self) {
        let half = self.lock().bytes / 2;
        self.shrink(half);
    }

    fn shrink(&self, bytes: u64) {
        let doomed = {
            let mut inner = self.lock();
            let mut by_use: Vec<_> = inner.packs.iter().map(|(id, cached)| (cached.used, *id, cached.bytes)).collect();
            by_use.sort_unstable();
            let mut surplus = inner.bytes.saturating_sub(bytes);
            let mut doomed = Vec::new();
            for (_, id, bytes) in by_use {
                if surplus == 0 {
                    break;
                }
                surplus = surplus.saturating_sub(bytes);
                inner.remove(id);
                doomed.push(id);
            }
            doomed
        };
        for id in doomed {
            fs::remove_file(self.dir.join(id.file_name())).ok();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remove(&mut self, pack: PackId) -> bool {
        let Some(cached) = self.packs.remove(&pack) else { return false };
        self.bytes -= cached.bytes.min(self.bytes);
        self.open -= usize::from(cached.file.is_some()).min(self.open);
        true
    }

    fn close_half(&mut self) {
        let mut used: Vec<u64> = self.packs.values().filter(|cached| cached.file.is_some()).map(|c| c.used).collect();
        used.sort_unstable();
        let Some(&middle) = used.get(used.len() / 2) else { return };
        for cached in self.packs.values_mut().filter(|cached| cached.used < middle) {
            cached.file = None;
        }
        self.open = self.packs.values().filter(|cached| cached.file.is_some()).count();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::head::Origin;

    #[test]
    fn the_cache_is_bounded_and_taken_up_again() {
        let dir = tempfile::tempdir().unwrap();
        let pack = |seq| PackId { origin: Origin::Volume([1; 16]), epoch: 1, seq };
        let place = |seq| Place { pack: pack(seq), offset: 8192, len: 4096 };
        let cache = DiskCache::open(dir.path(), 10 * 4096).unwrap();
        for seq in 0..40 {
            cache.write(pack(seq), 8192, &[7; 4096]);
            cache.read(place(0));
        }
        let left = fs::read_dir(dir.path()).unwrap().count();
        assert!((5..=10).contains(&left), "{left} files");
        assert_eq!(cache.read(place(0)).unwrap(), [7; 4096], "what is used stays");
        assert!(cache.read(place(1)).is_none());
        drop(cache);
        let cache = DiskCache::open(dir.path(), 10 * 4096).unwrap();
        assert_eq!(cache.read(place(0)).unwrap(), [7; 4096]);
        cache.forget(pack(0));
        assert!(cache.read(place(0)).is_none());
    }

    #[test]
    fn the_oldest_goes_first() {
        let mut lru = Lru::new(2);
        lru.insert(1, "a");
        lru.insert(2, "b");
        assert_eq!(lru.get(&1), Some("a"));
        lru.insert(3, "c");
        assert_eq!((lru.get(&1), lru.get(&2), lru.get(&3)), (Some("a"), None, Some("c")));
    }
}
