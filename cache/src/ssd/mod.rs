//! The SSD tier: blocks read from slow stores, kept in a slab on a fast local device, in slots of 64 KiB.
//!
//! - [`SsdTier`] (`tier`): the tier as the engine uses it; one mutex, short critical sections
//! - [`SlotRead`], [`SlotWrite`] (`guard`): reads and writes of slots under way
//! - [`SsdError`] (`error`)
//! - `format`: layout on disk, order of writes, what a crash leaves
//! - `index`, `slots`, `storages`: which block is where, and what is replaced; sans-I/O
//! - `health`: when a failing device is bypassed, and when it is tried again; sans-I/O
//! - `open`, `device`, `foreign`: opening, closing, and refusing to overwrite what is not ours; blocking I/O
//!
//! The tier does the I/O of its metadata, when it is opened and closed, and nothing else: slots are read and written
//! by the engine, through [`SsdTier::data_fd`], between `begin_…` and `end_read` or `finish_insert`. It survives a
//! clean stop; after any other it starts empty.
//!
//! It holds copies only, and promises never to serve one that is older than the store: a guest's write or discard calls
//! [`SsdTier::invalidate`] before it goes to the store; what was read from a store before a write must not be inserted
//! after it (the policy core knows the order); a store that changed while nobody watched is known by its [`Stamp`].

mod device;
mod error;
mod foreign;
mod format;
mod guard;
mod health;
mod index;
mod open;
mod slots;
mod storages;
#[cfg(test)]
mod tests;
mod tier;

pub use error::SsdError;
pub use guard::{SlotRead, SlotWrite};
pub use tier::SsdTier;

use std::fmt;
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
}

impl Default for SsdOptions {
    fn default() -> Self {
        let start = Instant::now();
        SsdOptions { preallocate: true, direct: true, clock: Arc::new(move || start.elapsed()) }
    }
}

impl fmt::Debug for SsdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SsdOptions { preallocate, direct, clock: _ } = self;
        f.debug_struct("SsdOptions").field("preallocate", preallocate).field("direct", direct).finish_non_exhaustive()
    }
}

/// What was found where the slab was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// Nothing: a slab was made.
    Created,
    /// A slab that was closed: what it held is kept, up to what the other fields of the report count.
    Clean,
    /// A slab that was not closed: all it held was dropped.
    Unclean,
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
    pub io_errors: u64,
    /// Slots dropped because their store had changed while nobody watched.
    pub dropped_changed_store: u64,
    /// Memory of the index.
    pub index_bytes: u64,
    pub state: SsdState,
}
