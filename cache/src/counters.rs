//! Counters of a disk (what the guest sees) and of a storage (what the store sees). Relaxed atomics: each is written by
//! one shard and read by whoever wants to know.

use crate::backend::StoreError;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

macro_rules! counters {
    ($(#[$doc:meta])* $live:ident $(($extra:ident: $extra_type:ty))?, $(#[$sdoc:meta])* $snapshot:ident { $($(#[$fdoc:meta])* $field:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Default, Debug)]
        pub struct $live { $(pub(crate) $extra: $extra_type,)? $($(#[$fdoc])* pub $field: AtomicU64),+ }

        $(#[$sdoc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
        pub struct $snapshot { $($(#[$fdoc])* pub $field: u64),+ }

        impl $live {
            /// The values now.
            pub fn snapshot(&self) -> $snapshot {
                $snapshot { $($field: self.$field.load(Ordering::Relaxed)),+ }
            }
        }
    };
}

counters! {
    /// What one disk's guest asked for.
    DiskCounters,
    /// [`DiskCounters`] at one moment.
    DiskStats {
        reads,
        read_bytes,
        /// Reads whose every page was in the RAM tier when they came.
        served_ram,
        /// Reads that needed the SSD tier and not the store.
        served_ssd,
        /// Reads that waited for the store, be it for a prefetch still under way.
        served_store,
        read_errors,
        /// Time that reads not served from RAM took, summed, microseconds.
        read_wait_us,
        writes,
        write_bytes,
        write_errors,
        flushes,
        discards,
    }
}

counters! {
    /// What a storage asked of its store and of the SSD tier.
    StorageCounters (health: Health),
    /// [`StorageCounters`] at one moment.
    StorageStats {
        store_reads,
        store_read_bytes,
        store_read_errors,
        store_writes,
        store_write_bytes,
        store_write_errors,
        ssd_reads,
        ssd_read_bytes,
        ssd_read_errors,
        ssd_writes,
        ssd_write_bytes,
        ssd_write_errors,
        /// Writes that waited until the SSD tier had their region marked.
        ssd_marks,
        /// Reads that waited for a prefetch still under way.
        late_reads,
        /// Reads that went past the cache because no slot was free.
        bypassed,
    }
}

/// Whether the store's last request failed, and why.
#[derive(Default, Debug)]
pub(crate) struct Health {
    failing: AtomicBool,
    reason: Mutex<String>,
}

impl Health {
    pub(crate) fn note(&self, result: &Result<(), StoreError>) {
        match result {
            Ok(()) if self.failing.load(Ordering::Relaxed) => self.failing.store(false, Ordering::Relaxed),
            Ok(()) => {}
            Err(error) => {
                *self.reason.lock() = error.to_string();
                self.failing.store(true, Ordering::Relaxed);
            }
        }
    }
    pub(crate) fn trouble(&self) -> Option<String> {
        self.failing.load(Ordering::Relaxed).then(|| self.reason.lock().clone())
    }
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
