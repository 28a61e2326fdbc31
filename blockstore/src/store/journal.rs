//! The journal: every change of the disk in order, on the local disk before it is in the bucket.
//!
//! ```text
//!  segment:  header (4096)  record  record  …                     records at multiples of 64 bytes, none across two segments
//!  record:   magic  kind  salt  lsn  offset  len  payload length  payload crc  synced  header crc     64 bytes, then the payload
//! ```
//! LSNs have no gaps. Recovery reads segments by number and stops at the first record that is not the next one: an exact prefix. All segments
//! but the newest are synced before the next begins. `synced` repeats, in each record, how far an earlier `fdatasync` had got: a valid record *behind* a
//! broken one that says "already synced" proves that flushed data is gone, which is an error, never a silently shorter disk.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{BufMut, Bytes};

use super::segment::{HEADER_BYTES, Header, Segment, SegmentPool};

const RECORD_BYTES: usize = 64;
const ALIGN: u64 = 64;
const MAGIC: u32 = 0x4c4e_524a;
/// Largest payload of one record; larger writes are several.
pub(super) const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// A change to log.
#[derive(Clone, Debug)]
pub(super) enum Record {
    Write {
        offset: u64,
        bytes: Bytes,
    },
    /// The range reads as zeros; no payload.
    Hole {
        offset: u64,
        len: u64,
    },
    /// The state after the record before is kept; the payload says as what.
    Checkpoint {
        body: Bytes,
    },
}

/// Where a record went.
#[derive(Debug)]
pub(super) struct Appended {
    pub(super) lsn: u64,
    pub(super) segment: Arc<Segment>,
    /// Of the payload, in the segment's file.
    pub(super) offset: u64,
}

#[derive(Debug)]
pub(super) enum LogError {
    /// No new segment could be made. Nothing was written; it may work later.
    NoSegment(io::Error),
    /// The log itself failed: what is in it from here on is unknown.
    Failed(io::Error),
}

/// The writer's side. One user at a time.
#[derive(Debug)]
pub(super) struct Log {
    dir: PathBuf,
    pool: Arc<SegmentPool>,
    volume: [u8; 16],
    epoch: u64,
    current: Option<Current>,
    next_number: u64,
    /// Of the last record.
    lsn: u64,
    /// Oldest first, with the last LSN in each; the current one is the last.
    segments: Vec<(Arc<Segment>, u64)>,
    synced: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Current {
    segment: Arc<Segment>,
    tail: u64,
}

struct Head {
    kind: u8,
    salt: u64,
    lsn: u64,
    offset: u64,
    len: u64,
    payload_len: u32,
    payload_crc: u32,
    synced: u64,
}

impl Head {
    fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.put_u32_le(MAGIC);
        out.put_slice(&[self.kind, 0, 0, 0]);
        for number in [self.salt, self.lsn, self.offset, self.len] {
            out.put_u64_le(number);
        }
        out.put_u32_le(self.payload_len);
        out.put_u32_le(self.payload_crc);
        out.put_u64_le(self.synced);
        out.put_u32_le(0);
        let crc = crc32c::crc32c(&out[start..]);
        out.put_u32_le(crc);
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..RECORD_BYTES)?;
        let u32_at = |at: usize| bytes[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let u64_at = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        if u32_at(0)? != MAGIC || u32_at(60)? != crc32c::crc32c(&bytes[..60]) {
            return None;
        }
        Some(Self {
            kind: bytes[4],
            salt: u64_at(8)?,
            lsn: u64_at(16)?,
            offset: u64_at(24)?,
            len: u64_at(32)?,
            payload_len: u32_at(40)?,
            payload_crc: u32_at(44)?,
            synced: u64_at(48)?,
        })
    }
}

impl Record {
    fn parts(&self) -> (u8, u64, u64, &[u8]) {
        match self {
            Self::Write { offset, bytes } => (1, *offset, bytes.len() as u64, bytes),
            Self::Hole { offset, len } => (2, *offset, *len, &[]),
            Self::Checkpoint { body } => (3, 0, 0, body),
        }
    }

    fn log_bytes(&self) -> u64 {
        let (_, _, _, payload) = self.parts();
        (RECORD_BYTES as u64 + payload.len() as u64).next_multiple_of(ALIGN)
    }
}

impl Log {
    /// A log that goes on after `lsn`, behind what [`scan`] found.
    pub(super) fn new(
        dir: PathBuf,
        pool: Arc<SegmentPool>,
        volume: [u8; 16],
        epoch: u64,
        found: &Scan,
        lsn: u64,
    ) -> Self {
        let synced = Arc::new(AtomicU64::new(lsn));
        let segments = found.segments.clone();
        Self { dir, pool, volume, epoch, current: None, next_number: found.next_number, lsn, segments, synced }
    }

    /// Up to which record the log is known to be on the disk.
    pub(super) fn synced(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.synced)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.segments.len() as u64 * self.pool_bytes()
    }

    fn pool_bytes(&self) -> u64 {
        self.pool.segment_bytes()
    }

    /// Appends the first of `records`, and those after it that go into the same segment. In the page cache when it returns.
    pub(super) fn append(&mut self, records: &[Record]) -> Result<Vec<Appended>, LogError> {
        let Some(first) = records.first() else { return Ok(Vec::new()) };
        let room = self.current.as_ref().map_or(0, |current| self.pool_bytes() - current.tail);
        if room < first.log_bytes() {
            self.roll()?;
        }
        let Some(current) = &mut self.current else { return Ok(Vec::new()) };
        let synced = self.synced.load(Ordering::Acquire);
        let (mut out, mut appended) = (Vec::new(), Vec::new());
        for record in records {
            let (kind, offset, len, payload) = record.parts();
            if current.tail + out.len() as u64 + record.log_bytes() > self.pool.segment_bytes()
                || (!appended.is_empty() && out.len() + payload.len() > 2 * PAYLOAD_BYTES_MAX)
            {
                break;
            }
            let lsn = self.lsn + 1 + appended.len() as u64;
            let payload_len = u32::try_from(payload.len()).expect("payloads are at most 1 MiB");
            let (salt, payload_crc) = (current.segment.header.salt, crc32c::crc32c(payload));
            Head { kind, salt, lsn, offset, len, payload_len, payload_crc, synced }.encode(&mut out);
            let at = current.tail + out.len() as u64;
            out.put_slice(payload);
            out.resize(out.len().next_multiple_of(RECORD_BYTES), 0);
            appended.push(Appended { lsn, segment: Arc::clone(&current.segment), offset: at });
        }
        current.segment.file.write_all_at(&out, current.tail).map_err(LogError::Failed)?;
        current.tail += out.len() as u64;
        self.lsn += appended.len() as u64;
        if let Some((_, last)) = self.segments.last_mut() {
            *last = self.lsn;
        }
        Ok(appended)
    }

    /// Ends the current segment, synced, and begins another.
    fn roll(&mut self) -> Result<(), LogError> {
        if let Some(current) = &self.current {
            current.segment.file.sync_data().map_err(LogError::Failed)?;
            self.synced.fetch_max(self.lsn, Ordering::AcqRel);
        }
        let header = Header { volume: self.volume, epoch: self.epoch, number: self.next_number, salt: rand::random() };
        let segment = self.pool.take(&self.dir, header).map_err(LogError::NoSegment)?;
        self.next_number += 1;
        self.segments.push((Arc::clone(&segment), self.lsn));
        self.current = Some(Current { segment, tail: HEADER_BYTES });
        Ok(())
    }

    /// Frees segments whose records are all in the bucket.
    pub(super) fn reclaim(&mut self, pushed: u64) -> io::Result<()> {
        let current = self.current.as_ref().map(|current| current.segment.header.number);
        while let Some((segment, last)) = self.segments.first() {
            if *last > pushed || Some(segment.header.number) == current {
                break;
            }
            segment.retire(&self.dir)?;
            self.segments.remove(0);
        }
        Ok(())
    }

    /// Forgets all records: the head stands at `lsn` now, which is behind every one of them.
    pub(super) fn restart(&mut self, lsn: u64) -> io::Result<()> {
        self.current = None;
        self.lsn = self.lsn.max(lsn);
        self.synced.fetch_max(self.lsn, Ordering::AcqRel);
        for (segment, _) in std::mem::take(&mut self.segments) {
            segment.retire(&self.dir)?;
        }
        Ok(())
    }

    /// Loses what a power failure may lose: what was written since the last sync, except the first part of it, as large as `keep` says.
    #[cfg(test)]
    pub(super) fn tear(&self, keep: f64) {
        let Some(current) = &self.current else { return };
        let bytes = fs::read(current.segment.path(&self.dir)).unwrap();
        let mut at = usize::try_from(HEADER_BYTES).unwrap();
        let synced = self.synced.load(Ordering::Acquire);
        while let Some((head, payload_at)) = record_at(&bytes, at, current.segment.header.salt) {
            if head.lsn > synced {
                break;
            }
            at = (payload_at + head.payload_len as usize).next_multiple_of(RECORD_BYTES);
        }
        let tail = usize::try_from(current.tail).unwrap();
        let lost = tail.saturating_sub(at);
        let kept = std::time::Duration::from_secs(lost as u64).mul_f64(keep).as_secs();
        let from = at + usize::try_from(kept).unwrap();
        current.segment.file.write_all_at(&vec![0; tail.saturating_sub(from)], from as u64).unwrap();
    }
}

/// A record found by recovery.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) lsn: u64,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    Write { range: Range<u64>, segment: Arc<Segment>, offset: u64 },
    Hole { range: Range<u64> },
    Checkpoint { body: Vec<u8> },
}

/// What recovery found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// In order, from the first one the bucket does not have.
    pub(super) records: Vec<Found>,
    segments: Vec<(Arc<Segment>, u64)>,
    next_number: u64,
    pub(super) last_lsn: u64,
}

/// The journal cannot be trusted or read.
#[derive(Debug)]
pub(super) enum ScanError {
    Damaged(String),
    Io(io::Error),
}

impl From<io::Error> for ScanError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reads a volume's journal and syncs what it keeps. `pushed` is the LSN of the head.
pub(super) fn scan(dir: &Path, pool: &Arc<SegmentPool>, volume: [u8; 16], pushed: u64) -> Result<Scan, ScanError> {
    fs::create_dir_all(dir)?;
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u64>().ok());
        numbers.extend(number.map(|number| (number, path)));
    }
    numbers.sort_unstable();
    let mut scan =
        Scan { last_lsn: pushed, next_number: numbers.last().map_or(1, |(last, _)| last + 1), ..Scan::default() };
    let mut expected = None;
    for (number, path) in numbers {
        let bytes = fs::read(&path)?;
        let header = match Header::decode(&bytes) {
            Some(header) if header.volume == volume && header.number == number => header,
            None if bytes.iter().take(RECORD_BYTES).any(|byte| *byte != 0) => {
                return Err(ScanError::Damaged(format!("the header of file {number} is broken")));
            }
            // Taken from the pool, but the header did not reach the disk: it has no records of ours.
            Some(_) | None => {
                fs::remove_file(&path)?;
                continue;
            }
        };
        let file = File::options().read(true).write(true).open(&path)?;
        file.sync_data()?;
        let segment = Segment::found(pool, file, header);
        scan.segment(&segment, &bytes, pushed, &mut expected)?;
    }
    Ok(scan)
}

impl Scan {
    fn segment(
        &mut self,
        segment: &Arc<Segment>,
        bytes: &[u8],
        pushed: u64,
        expected: &mut Option<u64>,
    ) -> Result<(), ScanError> {
        let salt = segment.header.salt;
        let mut at = usize::try_from(HEADER_BYTES).unwrap_or(usize::MAX);
        let mut first = true;
        while let Some((head, payload_at)) = record_at(bytes, at, salt) {
            let next = expected.unwrap_or(head.lsn);
            if head.lsn != next {
                if !first {
                    break;
                }
                // Between two segments a gap is allowed only where the bucket has what is missing.
                if head.lsn > next.max(pushed + 1) || head.lsn < next {
                    return Err(ScanError::Damaged(format!(
                        "file {} begins with write {}, {next} is missing",
                        segment.header.number, head.lsn
                    )));
                }
            }
            if first && expected.is_none() && head.lsn > pushed + 1 {
                let number = segment.header.number;
                return Err(ScanError::Damaged(format!(
                    "file {number} begins with write {}, the bucket has {pushed}",
                    head.lsn
                )));
            }
            first = false;
            *expected = Some(head.lsn + 1);
            if head.lsn > pushed {
                self.found(&head, segment, &bytes[payload_at..payload_at + head.payload_len as usize], payload_at)?;
            }
            at = (payload_at + head.payload_len as usize).next_multiple_of(RECORD_BYTES);
        }
        let missing = expected.unwrap_or(pushed + 1).max(pushed + 1);
        if let Some(lsn) = synced_behind(bytes, at, salt, missing) {
            let number = segment.header.number;
            return Err(ScanError::Damaged(format!(
                "write {missing} in file {number} is broken, and was synced before write {lsn}"
            )));
        }
        self.segments.push((Arc::clone(segment), expected.unwrap_or(1) - 1));
        Ok(())
    }

    fn found(&mut self, head: &Head, segment: &Arc<Segment>, payload: &[u8], at: usize) -> Result<(), ScanError> {
        let range = head.offset..head.offset.saturating_add(head.len);
        let what = match head.kind {
            1 => What::Write { range, segment: Arc::clone(segment), offset: at as u64 },
            2 => What::Hole { range },
            3 => What::Checkpoint { body: payload.to_vec() },
            kind => return Err(ScanError::Damaged(format!("write {} is of kind {kind}; upgrade this host", head.lsn))),
        };
        self.last_lsn = head.lsn;
        self.records.push(Found { lsn: head.lsn, what });
        Ok(())
    }
}

/// A whole record of this use of the file, and where its payload begins.
fn record_at(bytes: &[u8], at: usize, salt: u64) -> Option<(Head, usize)> {
    let head = Head::decode(bytes.get(at..)?).filter(|head| head.salt == salt)?;
    let payload_at = at + RECORD_BYTES;
    let payload = bytes.get(payload_at..payload_at.checked_add(head.payload_len as usize)?)?;
    (crc32c::crc32c(payload) == head.payload_crc).then_some((head, payload_at))
}

/// A record behind the end of the readable log that proves that write `missing` had been synced.
fn synced_behind(bytes: &[u8], from: usize, salt: u64, missing: u64) -> Option<u64> {
    (from..bytes.len())
        .step_by(RECORD_BYTES)
        .filter_map(|at| Head::decode(&bytes[at..]))
        .find(|head| head.salt == salt && head.synced >= missing && head.lsn >= missing)
        .map(|head| head.lsn)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VOLUME: [u8; 16] = [3; 16];

    struct Site {
        dir: tempfile::TempDir,
        pool: Arc<SegmentPool>,
    }

    impl Site {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let pool = SegmentPool::open(&dir.path().join("spare"), 64 << 10, 4).unwrap();
            fs::create_dir_all(dir.path().join("journal")).unwrap();
            Self { dir, pool }
        }

        fn journal(&self) -> PathBuf {
            self.dir.path().join("journal")
        }

        fn log(&self, found: &Scan, lsn: u64) -> Log {
            Log::new(self.journal(), Arc::clone(&self.pool), VOLUME, 1, found, lsn)
        }

        fn scan(&self, pushed: u64) -> Result<Scan, ScanError> {
            scan(&self.journal(), &self.pool, VOLUME, pushed)
        }
    }

    fn append_all(log: &mut Log, records: &[Record]) {
        let mut left = records;
        while !left.is_empty() {
            let appended = log.append(left).unwrap().len();
            assert!(appended > 0);
            left = &left[appended..];
        }
    }

    fn record() -> impl Strategy<Value = Record> {
        prop_oneof![
            (any::<u32>(), 0..9000usize, any::<u8>())
                .prop_map(|(offset, len, fill)| Record::Write { offset: offset.into(), bytes: vec![fill; len].into() }),
            (any::<u32>(), any::<u32>()).prop_map(|(at, len)| Record::Hole { offset: at.into(), len: len.into() }),
            (0..200usize).prop_map(|len| Record::Checkpoint { body: vec![b'x'; len].into() }),
        ]
    }

    fn is_same(found: &Found, record: &Record) -> bool {
        match (&found.what, record) {
            (What::Write { range, segment, offset }, Record::Write { offset: at, bytes }) => {
                let mut read = vec![0; bytes.len()];
                segment.file.read_exact_at(&mut read, *offset).unwrap();
                *range == (*at..at + bytes.len() as u64) && read == *bytes
            }
            (What::Hole { range }, Record::Hole { offset, len }) => *range == (*offset..offset + len),
            (What::Checkpoint { body: found }, Record::Checkpoint { body }) => found == body,
            _ => false,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Two lives of a log, the second after a tear of the first.
        #[test]
        fn recovery_finds_a_prefix_and_goes_on_behind_it(
            first in proptest::collection::vec(record(), 1..40),
            second in proptest::collection::vec(record(), 0..20),
            keep in 0.0..1.0f64,
            pushed in 0..60u64,
        ) {
            let site = Site::new();
            let mut log = site.log(&Scan::default(), 0);
            append_all(&mut log, &first);
            let synced = log.synced.load(Ordering::Acquire);
            log.tear(keep);
            drop(log);
            let found = site.scan(0).map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
            let kept = usize::try_from(found.last_lsn).unwrap();
            prop_assert!(found.last_lsn >= synced && kept <= first.len());
            prop_assert!(found.records.iter().zip(&first).all(|(found, record)| is_same(found, record)));
            prop_assert_eq!(found.records.len(), kept);
            let mut log = site.log(&found, found.last_lsn);
            append_all(&mut log, &second);
            let all: Vec<_> = first[..kept].iter().chain(&second).collect();
            drop((log, found));
            let pushed = pushed.min(all.len() as u64);
            let found = site.scan(pushed).map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
            let expected = &all[usize::try_from(pushed).unwrap()..];
            prop_assert_eq!(found.records.len(), expected.len());
            prop_assert!(found.records.iter().zip(expected).all(|(found, record)| is_same(found, record)));
        }

        /// Whatever bit rots: an error, or a prefix with everything that a later record proves synced.
        #[test]
        fn a_flipped_bit_never_goes_unseen(
            records in proptest::collection::vec(record(), 2..30),
            at in any::<proptest::sample::Index>(),
            bit in 0..8u32,
        ) {
            let site = Site::new();
            let mut log = site.log(&Scan::default(), 0);
            let (last, before) = records.split_last().unwrap();
            append_all(&mut log, before);
            log.current.as_ref().unwrap().segment.file.sync_data().unwrap();
            log.synced.store(log.lsn, Ordering::Release);
            append_all(&mut log, std::slice::from_ref(last));
            let Current { segment, tail } = log.current.as_ref().unwrap();
            let at = HEADER_BYTES + at.index(usize::try_from(tail - HEADER_BYTES).unwrap()) as u64;
            let mut byte = [0];
            segment.file.read_exact_at(&mut byte, at).unwrap();
            segment.file.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
            drop(log);
            match site.scan(0) {
                Err(ScanError::Damaged(_)) => {}
                Err(ScanError::Io(error)) => return Err(TestCaseError::fail(error.to_string())),
                Ok(found) => {
                    prop_assert!(found.records.len() >= before.len(), "{} of {}", found.records.len(), records.len());
                    prop_assert!(found.records.iter().zip(&records).all(|(found, record)| is_same(found, record)));
                }
            }
        }
    }
}
