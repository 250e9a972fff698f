//! The SSD tier: blocks read from slow stores, kept in a slab on a fast local device, in slots of 64 KiB.
//!
//! - [`SsdTier`] (`tier`): the tier as the engine uses it; one mutex, short critical sections
//! - [`SlotRead`], [`SlotWrite`] (`guard`): reads and writes of slots under way
//! - [`GuestWrite`] (`writes`): a guest's write, and what it has to wait for
//! - [`SsdError`] (`error`)
//! - `format`: layout on disk, order of writes, what a crash leaves
//! - `index`, `slots`, `storages`: which block is where, and what is replaced; sans-I/O
//! - `intents`: which regions are written to, in memory and on disk; sans-I/O
//! - `checkpoint`: what changed goes to the slab while it is in use
//! - `closing`: the end of its use in order
//! - [`Resize`] (`resize`): another size while it is in use
//! - [`Abandoned`], [`SsdWatch`] (`abandon`): the end of its use while guests are served
//! - `own`, `veto`, `lineage`: what is known of an earlier run outside of the slab
//! - `health`: when a failing device is bypassed, and when it is tried again; sans-I/O
//! - `open`, `device`, `foreign`: opening, recovering, closing, and refusing to overwrite what is not ours; blocking I/O
//! - `load`, `missed`: the records of a slab are read while guests are served, and what must not be believed of them then
//!
//! The tier does the I/O of its metadata: slots are read and written by the engine, through [`SsdTier::data_fd`], between
//! `begin_…` and `end_read` or `finish_insert`. Somebody must lend it threads for [`SsdTier::write_intents`] and
//! [`SsdTier::begin_checkpoint`] ([`crate::Cache`] does).
//!
//! It holds copies only, and promises never to serve one that is older than the store: a guest's write or discard calls
//! [`SsdTier::begin_write`] and waits for it before it goes to the store; what was read from a store before a write must
//! not be inserted after it (the policy core knows the order); a store that changed while nobody watched is known by its
//! [`Stamp`]. After a crash or a loss of power the same holds for what is found on the disk, see `format`. What nobody
//! could tell, and so is not promised: that a store was changed by others while we served it, or with its old times, or
//! (a store without a [`Stamp`]: NBD, block devices) at all; that a device keeps what it said it had synced.

mod abandon;
mod checkpoint;
mod closing;
mod device;
mod error;
mod foreign;
mod format;
mod guard;
mod health;
mod index;
mod intents;
mod lineage;
mod load;
mod missed;
mod open;
mod own;
mod resize;
mod slots;
mod storages;
#[cfg(test)]
mod tests;
mod tier;
mod veto;
mod writes;

pub use abandon::{Abandoned, SsdWatch};
pub use checkpoint::{Checkpoint, Step};
pub use error::SsdError;
pub use guard::{SlotRead, SlotWrite};
pub use lineage::run_without;
pub use resize::{Resize, ResizeStep};
pub use tier::SsdTier;
pub use writes::{GuestWrite, StoreFlush};

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What tells whether a store changed while nobody watched it: two stamps that differ mean it did. Zero stands for
/// what a kind of store does not know.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stamp {
    pub size_bytes: u64,
    /// Nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Nanoseconds since 1970.
    pub ctime_ns: i64,
    pub inode: u64,
    pub device: u64,
}

/// Whose clock a store's times are of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StoreClock {
    /// This host's: a change that is later than our last write isn't ours.
    Ours,
    /// A server's, or nobody knows.
    Another,
}

/// A storage registered with the tier, see [`SsdTier::storage`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SsdStorage {
    index: u16,
    /// A handle whose storage was released and whose index went to another finds nothing.
    incarnation: u32,
}

/// Monotonic time since any fixed point.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// How to open the tier.
#[derive(Clone)]
pub struct SsdOptions {
    /// Allocate the slab's blocks at once, so that the file system cannot run full later. On by default; where the file
    /// system cannot, the slab is sparse. Block devices need none.
    pub preallocate: bool,
    /// Bypass the page cache (`O_DIRECT`). On by default; where the file system cannot, the page cache is used.
    pub direct: bool,
    /// Used for the back-off of a failing device and to space its log lines.
    pub clock: Clock,
    /// File in memory that outlives the process (below `/run`): tells our writes to a store from those of others after a
    /// crash. Without it a store that was written to loses what the tier has of it.
    pub own_writes: Option<PathBuf>,
    /// File on another device that says so when the slab must not be believed, see [`SsdTier::distrust`].
    pub veto: Option<PathBuf>,
    /// File that says which slab the last run had. If it was not this one, what this one has of stores without a [`Stamp`]
    /// is dropped. A run without a tier says so by [`run_without`]. `None`: whoever opens the slab vouches for that.
    pub lineage: Option<PathBuf>,
    /// Nothing that is found counts: for a slab that is opened while stores are being written to.
    pub empty: bool,
}

impl Default for SsdOptions {
    fn default() -> Self {
        let start = Instant::now();
        let clock = Arc::new(move || start.elapsed());
        SsdOptions { preallocate: true, direct: true, clock, own_writes: None, veto: None, lineage: None, empty: false }
    }
}

impl fmt::Debug for SsdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SsdOptions { preallocate, direct, clock: _, own_writes, veto, lineage, empty } = self;
        let mut f = f.debug_struct("SsdOptions");
        f.field("preallocate", preallocate).field("direct", direct).field("own_writes", own_writes).field("veto", veto);
        f.field("lineage", lineage).field("empty", empty);
        f.finish_non_exhaustive()
    }
}

/// What was found where the slab was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// Nothing: a slab was made.
    Created,
    /// A slab that was closed: what it held is kept, up to what the other fields of the report count.
    Clean,
    /// A slab that was not closed, whose records and bitmap were kept: what they vouch for is kept.
    Recovered,
    /// A slab that says that nothing in it counts: it was taken out of service, written to after it was closed, or not closed by a
    /// program that keeps no records while it runs.
    Unclean,
    /// A slab whose device failed when it mattered: all it held was dropped.
    Vetoed,
    /// A slab with both superblocks damaged: a new one was made in its place.
    Damaged,
}

/// What opening did, for the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenReport {
    pub found: Found,
    pub slots: u64,
    pub kept_slots: u64,
    pub kept_pages: u64,
    /// Slot records and storage table entries that were damaged, or named a storage whose entry was; dropped.
    pub damaged_records: u64,
    /// After a crash: slots in regions that were being written to, dropped.
    pub marked_slots: u64,
    /// After a crash: slots whose storage's entry is not the one they were written for, dropped.
    pub orphaned_slots: u64,
    /// Slots of stores that show no changes, dropped because the last run did not have this slab.
    pub unvouched_slots: u64,
    /// After a crash: second copies of a block, dropped.
    pub duplicate_slots: u64,
    /// After a crash: parts of the bitmap that were damaged; all of their regions count as written to.
    pub damaged_chunks: u64,
    /// Slots, in use or not, that lay beyond the end of a slab that was cut short or configured smaller; dropped.
    pub slots_beyond_end: u64,
    /// The slab had this many slots before. Slots that fit the new size were kept.
    pub resized_from_slots: Option<u64>,
    pub block_device: bool,
    /// Buffers for data I/O must be aligned to 4096 bytes in memory.
    pub direct: bool,
    /// This opening made the file longer and allocated all of its blocks.
    pub preallocated: bool,
}

impl OpenReport {
    fn new(device: &device::Device, slots: u64) -> OpenReport {
        OpenReport {
            found: Found::Created,
            slots,
            kept_slots: 0,
            kept_pages: 0,
            damaged_records: 0,
            marked_slots: 0,
            orphaned_slots: 0,
            unvouched_slots: 0,
            duplicate_slots: 0,
            damaged_chunks: 0,
            slots_beyond_end: 0,
            resized_from_slots: None,
            block_device: device.is_block_device,
            direct: device.is_direct,
            preallocated: false,
        }
    }

    /// Slots that were on record and are not kept.
    pub fn dropped_slots(&self) -> u64 {
        self.damaged_records
            + self.marked_slots
            + self.orphaned_slots
            + self.unvouched_slots
            + self.duplicate_slots
            + self.slots_beyond_end
    }
}

/// How a read of a slot ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Good,
    /// The data did not match its checksum: the slot is dropped.
    BadChecksum,
    /// The slot is dropped and its place not used again until the slab is opened the next time.
    IoError,
}

/// Whether the tier is in use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SsdState {
    Ok,
    /// The device fails: lookups find nothing and nothing is inserted until `retry_at`. Times are of the tier's clock.
    Degraded {
        reason: String,
        since: Duration,
        retry_at: Duration,
    },
    /// In use again after a back-off; the first success ends the outage, the first failure prolongs it.
    Retrying {
        since: Duration,
    },
    Closed,
}

/// Counters since the tier was opened, and gauges.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SsdStats {
    pub slots: u64,
    /// Slots in the index.
    pub used_slots: u64,
    /// Slots being written.
    pub pending_slots: u64,
    /// Slots not used again before the next opening because an I/O on them failed.
    pub retired_slots: u64,
    pub valid_pages: u64,
    pub reads: u64,
    pub inserts: u64,
    /// Inserts that came to nothing: invalidated meanwhile, cancelled or failed.
    pub aborted_inserts: u64,
    pub evictions: u64,
    pub bad_checksums: u64,
    /// Slots of an earlier run that a crash kept it from recording as overwritten; found by their checksum.
    pub dropped_overtaken: u64,
    pub io_errors: u64,
    /// Slots dropped because their store had changed while nobody watched.
    pub dropped_changed_store: u64,
    /// Memory of the index.
    pub index_bytes: u64,
    /// Regions of 64 MiB that would be dropped if the power failed now.
    pub marked_regions: u64,
    pub checkpoints: u64,
    /// Slots whose records are still to be read, see [`SsdTier::load`].
    pub unread_slots: u64,
    /// What opening found.
    pub opened: OpenReport,
    pub state: SsdState,
}
