//! Counters of guest and store traffic: one list, from which the type, its arithmetic and its schema come.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Cumulative since the daemon started. Every guest read counts in exactly one of `served_ram`, `served_ssd`, `served_store`
        /// or `read_errors`; `served_store` means that at least one page had to wait for the store, also for a prefetch in flight.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
        #[serde(default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// What was counted since `earlier`, field by field; 0 where a counter began again.
            #[must_use]
            pub fn since(&self, earlier: &Counters) -> Counters {
                Counters { $($name: self.$name.saturating_sub(earlier.$name),)* }
            }

            /// Adds `other`, field by field.
            pub fn add(&mut self, other: &Counters) {
                $(self.$name = self.$name.saturating_add(other.$name);)*
            }

            /// Every counter with its name, in the order of the declaration.
            #[must_use]
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Guest read requests completed.
    reads,
    read_bytes,
    /// Read requests served from RAM alone.
    served_ram,
    /// Read requests for which the SSD tier was read and the store was not.
    served_ssd,
    /// Read requests that waited for the store.
    served_store,
    /// Read requests answered with an error.
    read_errors,
    /// Guest write requests completed.
    writes,
    write_bytes,
    flushes,
    /// Discard and write-zeroes requests.
    discards,
    /// Sum over all reads of the time from taking the request to answering it.
    read_wait_us,
    /// Reads sent to the store, demand and prefetch.
    store_reads,
    store_read_bytes,
    store_writes,
    store_write_bytes,
    /// Prefetch: sent to the store.
    prefetch_issued_bytes,
    /// Prefetch: arrived.
    prefetch_completed_bytes,
    /// Prefetch: read by the guest afterwards.
    prefetch_used_bytes,
    /// Guest reads that waited for a prefetch still in flight.
    prefetch_late,
    /// Prefetch: evicted without having been read.
    prefetch_evicted_unused_bytes,
    /// Prefetch: taken back before it was sent.
    prefetch_cancelled_bytes,
    ssd_read_bytes,
    ssd_write_bytes,
    /// Accesses the learner never saw because its queue was full.
    accesses_dropped,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_names_every_counter_and_never_wraps() {
        let earlier = Counters { reads: 3, writes: 10, ..Counters::default() };
        let later = Counters { reads: 5, writes: 4, accesses_dropped: 1, ..Counters::default() };
        let delta = later.since(&earlier);
        assert_eq!((delta.reads, delta.writes, delta.accesses_dropped), (2, 0, 1));
        let json = serde_json::to_value(delta).unwrap();
        assert_eq!(json.as_object().unwrap().len(), delta.fields().len());
        for (name, value) in delta.fields() {
            assert_eq!(json[name], value, "{name}");
        }
    }
}
