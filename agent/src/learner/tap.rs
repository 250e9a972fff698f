//! Live recordings: readers that want a disk's accesses as they come.
//!
//! A tap gathers rows and hands them on in batches, without ever waiting: a reader that does not keep up loses the rows that
//! find its tap full, and learns how many and where. At most [`ROWS`] × ([`BATCHES`] + 1) rows of 40 bytes are held for a
//! reader (1 MiB), and there are at most [`READERS`].

use prestage_cache::access::Access;
use tokio::sync::mpsc;

/// Rows that one tap gathers while its reader is busy.
const ROWS: usize = 8192;
/// Batches on their way to a reader; one more place is kept for the last.
const BATCHES: usize = 2;
/// Most readers at once, of all disks.
const READERS: usize = 16;

/// Accesses of one disk, in order, and what is missing after them.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) accesses: Vec<Access>,
    /// Accesses of this disk that the reader was too slow for.
    pub(crate) missing: u64,
    /// Accesses of all disks that the learner was too slow for; some may be of this disk.
    pub(crate) lost: u64,
}

/// The reader's end. Gives `None` when the disk is gone or the daemon stops; dropping it ends the tap.
pub(crate) type Reader = mpsc::Receiver<Batch>;

struct Tap {
    disk: u32,
    sender: mpsc::Sender<Batch>,
    /// A place for the last batch, whatever the reader does.
    last: mpsc::OwnedPermit<Batch>,
    gathered: Batch,
}

impl Tap {
    fn push(&mut self, access: &Access) {
        if self.gathered.accesses.len() < ROWS {
            self.gathered.accesses.push(*access);
        } else {
            self.gathered.missing += 1;
        }
    }

    fn is_empty(&self) -> bool {
        self.gathered.accesses.is_empty() && self.gathered.lost == 0
    }

    /// Hands on what was gathered if the reader has room. False if the reader has gone.
    fn flush(&mut self) -> bool {
        if self.is_empty() {
            return !self.sender.is_closed();
        }
        match self.sender.try_reserve() {
            Ok(place) => {
                place.send(std::mem::take(&mut self.gathered));
                true
            }
            Err(mpsc::error::TrySendError::Full(())) => true,
            Err(mpsc::error::TrySendError::Closed(())) => false,
        }
    }

    fn end(self) {
        if !self.is_empty() {
            self.last.send(self.gathered);
        }
    }
}

/// All taps. Costs the learner one comparison an access while nobody reads.
#[derive(Default)]
pub(super) struct Taps {
    taps: Vec<Tap>,
    /// Accesses lost before the learner, as last seen.
    lost: u64,
}

impl Taps {
    /// Starts a tap; `None` if there are too many.
    pub(super) fn add(&mut self, disk: u32, lost: u64) -> Option<Reader> {
        self.taps.retain(|tap| !tap.sender.is_closed());
        if self.taps.is_empty() {
            self.lost = lost;
        }
        if self.taps.len() >= READERS {
            return None;
        }
        let (sender, reader) = mpsc::channel(BATCHES + 1);
        let last = sender.clone().try_reserve_owned().ok()?;
        self.taps.push(Tap { disk, sender, last, gathered: Batch::default() });
        Some(reader)
    }

    /// Whether nobody reads.
    pub(super) fn is_empty(&self) -> bool {
        self.taps.is_empty()
    }

    pub(super) fn push(&mut self, access: &Access) {
        for tap in self.taps.iter_mut().filter(|tap| tap.disk == access.disk) {
            tap.push(access);
        }
    }

    /// Hands on what was gathered. `lost` counts the accesses that the learner was too slow for, since the start.
    pub(super) fn flush(&mut self, lost: u64) {
        if self.taps.is_empty() {
            return;
        }
        let more = lost.saturating_sub(self.lost);
        self.lost = lost;
        self.taps.retain_mut(|tap| {
            tap.gathered.lost += more;
            tap.flush()
        });
    }

    /// Ends the taps of a disk.
    pub(super) fn end(&mut self, disk: u32) {
        self.taps.extract_if(.., |tap| tap.disk == disk).for_each(Tap::end);
    }

    /// Ends all taps.
    pub(super) fn end_all(&mut self) {
        self.taps.drain(..).for_each(Tap::end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prestage_cache::access::AccessOp;
    use prestage_cache::types::StorageId;
    use std::time::Duration;

    fn access(disk: u32, offset: u64) -> Access {
        let at = Duration::from_micros(offset);
        Access { at, disk, storage: StorageId(0), op: AccessOp::Read, offset, len: 512, waits: false }
    }

    fn drain(reader: &mut Reader) -> (Vec<u64>, u64, u64) {
        let (mut offsets, mut missing, mut lost) = (Vec::new(), 0, 0);
        while let Ok(batch) = reader.try_recv() {
            offsets.extend(batch.accesses.iter().map(|access| access.offset));
            missing += batch.missing;
            lost += batch.lost;
        }
        (offsets, missing, lost)
    }

    #[test]
    fn every_reader_gets_its_disks_accesses_in_order() {
        let mut taps = Taps::default();
        let (mut first, mut second, mut other) =
            (taps.add(1, 5).unwrap(), taps.add(1, 5).unwrap(), taps.add(2, 5).unwrap());
        for i in 0..100 {
            taps.push(&access(1 + (i % 2) as u32, i));
            taps.flush(5 + i / 50);
        }
        taps.end_all();
        let odd: Vec<u64> = (0..100).filter(|i| i % 2 == 1).collect();
        assert_eq!(drain(&mut other), (odd[..].to_vec(), 0, 1));
        let even: Vec<u64> = (0..100).filter(|i| i % 2 == 0).collect();
        assert_eq!(drain(&mut first), (even.clone(), 0, 1));
        assert_eq!(drain(&mut second), (even, 0, 1));
        assert!(first.try_recv().is_err());
    }

    /// What a reader gets and what it is told to miss are together everything, and what it gets is an order without holes up
    /// to the place of the gap.
    #[test]
    fn a_slow_reader_misses_rows_and_is_told_how_many_and_where() {
        let mut taps = Taps::default();
        let mut slow = taps.add(1, 0).unwrap();
        let total = (ROWS * (BATCHES + 3)) as u64;
        for i in 0..total {
            taps.push(&access(1, i));
            if i % 256 == 0 {
                taps.flush(0);
            }
        }
        let mut next = 0;
        let mut batches = 0;
        let mut take = |slow: &mut Reader| {
            while let Ok(batch) = slow.try_recv() {
                for access in &batch.accesses {
                    assert_eq!(access.offset, next);
                    next += 1;
                }
                next += batch.missing;
                batches += 1;
            }
            next
        };
        assert!(take(&mut slow) < total);
        taps.push(&access(1, total));
        taps.end(1);
        assert_eq!(take(&mut slow), total + 1);
        assert!(batches <= BATCHES + 1);
        assert!(matches!(slow.try_recv(), Err(mpsc::error::TryRecvError::Disconnected)));
    }

    #[test]
    fn a_reader_that_leaves_frees_its_place() {
        let mut taps = Taps::default();
        let mut readers: Vec<Reader> = (0..READERS).map(|_| taps.add(1, 0).unwrap()).collect();
        assert!(taps.add(1, 0).is_none());
        readers.pop();
        assert!(taps.add(1, 0).is_some());
        drop(readers);
        taps.flush(0);
        assert!(taps.taps.is_empty());
    }
}
