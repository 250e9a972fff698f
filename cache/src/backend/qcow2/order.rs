//! In which order what is written to an image must become durable (sans-I/O).
//!
//! - [`Order`]: whether a write has to wait until earlier ones are on stable storage
//! - [`Kind`]: what a write is
//!
//! imago writes tables in the right order but lets nobody wait for the disk in between, so a power cut could keep the later
//! of two writes and lose the earlier. What must hold at every moment of a cut:
//!
//! 1. An L2 or L1 entry, or the header, points only to clusters that are counted, and whose content is there.
//! 2. A count goes down only when nothing points to the cluster any more.
//! 3. A cluster that was freed takes new data only when the old pointer to it is gone.
//!
//! Then a cut leaves at most clusters that are counted and not used: leaks. QEMU keeps the same rules with its caches'
//! dependencies (`block/qcow2-cache.c`).

use rustc_hash::FxHashSet;
use std::ops::Range;

/// What is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Guest data into a cluster that nothing durable points to yet.
    Data,
    /// A block of counts that is pointed to.
    Counts,
    /// An L2 table that is pointed to.
    Pointers,
    /// Any other metadata: tables that are made new, L1 and refcount table entries, the header.
    Other,
}

/// A table that points to tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Root {
    /// The L1 table, to L2 tables.
    Pointers,
    /// The refcount table, to blocks of counts.
    Counts,
}

/// What has been written since the last barrier.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Dirty {
    data: bool,
    counts: bool,
    pointers: bool,
    other: bool,
    freed: Freed,
}

/// Whether a cluster was given up to which a pointer may still be on disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
enum Freed {
    #[default]
    No,
    /// The table without the pointer has been written: the next barrier makes it so.
    Written,
    /// The table without the pointer has perhaps not been written yet.
    InMemory,
}

/// A barrier under way.
#[must_use]
#[derive(Debug)]
pub(super) struct Barrier {
    covers: Dirty,
    epoch: u64,
}

#[derive(Debug, Default)]
pub(super) struct Order {
    dirty: Dirty,
    /// Clusters are being given up: the tables may still change.
    freeing: usize,
    /// Counts changes of what is given up.
    epoch: u64,
    tables: Tables,
}

/// Where the tables lie. They stay where they are; imago moves only the refcount table, to make it larger.
#[derive(Debug, Default)]
pub(super) struct Tables {
    pub(super) cluster_bytes: u64,
    pub(super) counts: FxHashSet<u64>,
    pub(super) pointers: FxHashSet<u64>,
    /// L1 table and refcount table.
    pub(super) roots: [Range<u64>; 2],
}

impl Order {
    pub(super) fn new(tables: Tables) -> Order {
        Order { tables, ..Order::default() }
    }

    /// What a write of metadata at `offset` is.
    pub(super) fn kind(&self, offset: u64) -> Kind {
        let cluster = offset - offset % self.tables.cluster_bytes.max(1);
        if self.tables.counts.contains(&cluster) {
            Kind::Counts
        } else if self.tables.pointers.contains(&cluster) {
            Kind::Pointers
        } else {
            Kind::Other
        }
    }

    pub(super) fn cluster_bytes(&self) -> u64 {
        self.tables.cluster_bytes
    }

    /// The root table that lies at `offset`.
    pub(super) fn root(&self, offset: u64) -> Option<Root> {
        let [pointers, counts] = &self.tables.roots;
        match offset {
            at if pointers.contains(&at) => Some(Root::Pointers),
            at if counts.contains(&at) => Some(Root::Counts),
            _ => None,
        }
    }

    /// Takes note of the table to which the entry at `at` of a root table points. Its number in that table if it is new.
    pub(super) fn add_table(&mut self, root: Root, at: u64, table: u64) -> Option<usize> {
        let (range, known) = match root {
            Root::Pointers => (&self.tables.roots[0], &mut self.tables.pointers),
            Root::Counts => (&self.tables.roots[1], &mut self.tables.counts),
        };
        if table == 0 || !range.contains(&at) || !known.insert(table) {
            return None;
        }
        usize::try_from((at - range.start) / 8).ok()
    }

    pub(super) fn add_counts(&mut self, block: u64) {
        self.tables.counts.insert(block);
    }

    /// A root table lies elsewhere; false if it does not.
    pub(super) fn move_root(&mut self, root: Root, range: Range<u64>) -> bool {
        let known = match root {
            Root::Pointers => &mut self.tables.roots[0],
            Root::Counts => &mut self.tables.roots[1],
        };
        let moved = *known != range && !range.is_empty();
        if moved {
            *known = range;
        }
        moved
    }

    /// Whether guest data would overwrite the header, a root table or a block of counts: a pointer in the image is wrong.
    pub(super) fn is_metadata(&self, range: Range<u64>) -> bool {
        let cluster_bytes = self.tables.cluster_bytes.max(1);
        if range.start < cluster_bytes || range.end < range.start {
            return true;
        }
        let meets = |other: &Range<u64>| range.start < other.end && other.start < range.end;
        if self.tables.roots.iter().any(meets) {
            return true;
        }
        let first = range.start - range.start % cluster_bytes;
        (first..range.end).step_by(cluster_bytes as usize).any(|cluster| self.tables.counts.contains(&cluster))
    }

    /// Whether what was written before must be durable before this is written.
    pub(super) fn waits(&self, kind: Kind) -> bool {
        let Dirty { data, counts, pointers, other, freed } = self.dirty;
        match kind {
            // Counts go down only for what was freed.
            Kind::Counts | Kind::Data => freed != Freed::No && (pointers || other),
            Kind::Pointers => data || counts || other,
            Kind::Other => data || counts || pointers || other,
        }
    }

    pub(super) fn written(&mut self, kind: Kind) {
        let dirty = &mut self.dirty;
        match kind {
            Kind::Data => dirty.data = true,
            Kind::Counts => dirty.counts = true,
            Kind::Pointers => dirty.pointers = true,
            Kind::Other => dirty.other = true,
        }
    }

    /// Clusters are about to be given up. Until [`Order::end_freeing`] nothing that is written counts as written without the
    /// pointers to them: when the tables change in between is imago's affair.
    pub(super) fn begin_freeing(&mut self) {
        self.freeing += 1;
        self.freed();
    }

    pub(super) fn end_freeing(&mut self) {
        self.freeing = self.freeing.saturating_sub(1);
        self.freed();
    }

    /// A cluster was given up.
    pub(super) fn freed(&mut self) {
        self.dirty.freed = Freed::InMemory;
        self.epoch += 1;
    }

    /// Whether there may be pointers on disk to clusters that are free to be taken.
    pub(super) fn has_freed(&self) -> bool {
        self.dirty.freed != Freed::No
    }

    /// Whether such pointers may be in the file, let alone on the disk.
    pub(super) fn has_unwritten_frees(&self) -> bool {
        self.dirty.freed == Freed::InMemory
    }

    /// Names the present state of what was given up, for [`Order::tables_written`].
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Every table as it was at `epoch` has been written.
    pub(super) fn tables_written(&mut self, epoch: u64) {
        if self.freeing == 0 && self.dirty.freed == Freed::InMemory && self.epoch == epoch {
            self.dirty.freed = Freed::Written;
        }
    }

    /// A barrier begins: what is written from now on is not covered by it.
    pub(super) fn begin_barrier(&mut self) -> Barrier {
        let covers = self.dirty;
        // What was freed stays so until the barrier is through: data must not be ahead of it.
        self.dirty = Dirty { freed: covers.freed, ..Dirty::default() };
        Barrier { covers, epoch: self.epoch }
    }

    /// The barrier is through.
    pub(super) fn end_barrier(&mut self, barrier: Barrier) {
        if barrier.covers.freed == Freed::Written && barrier.epoch == self.epoch {
            self.dirty.freed = Freed::No;
        }
    }

    /// The barrier failed: nothing of it can be relied on.
    pub(super) fn barrier_failed(&mut self, barrier: Barrier) {
        let (dirty, before) = (&mut self.dirty, barrier.covers);
        dirty.data |= before.data;
        dirty.counts |= before.counts;
        dirty.pointers |= before.pointers;
        dirty.other |= before.other;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 65536;

    fn order() -> Order {
        Order::new(Tables {
            cluster_bytes: CLUSTER,
            counts: [2 * CLUSTER].into_iter().collect(),
            pointers: [4 * CLUSTER].into_iter().collect(),
            roots: [3 * CLUSTER..4 * CLUSTER, CLUSTER..2 * CLUSTER],
        })
    }

    fn barrier(order: &mut Order) {
        let barrier = order.begin_barrier();
        order.end_barrier(barrier);
    }

    #[test]
    fn an_allocation_takes_one_barrier() {
        let mut order = order();
        for kind in [Kind::Data, Kind::Counts] {
            assert!(!order.waits(kind), "{kind:?} depends on nothing");
            order.written(kind);
        }
        assert!(order.waits(Kind::Pointers), "the pointer waits for data and count");
        barrier(&mut order);
        assert!(!order.waits(Kind::Pointers));
        order.written(Kind::Pointers);
        assert!(!order.waits(Kind::Pointers), "tables of pointers do not depend on each other");
        assert!(!order.waits(Kind::Data), "more data may follow at once");
    }

    #[test]
    fn a_count_goes_down_after_the_pointer_is_gone() {
        let mut order = order();
        order.freed();
        let epoch = order.epoch();
        order.written(Kind::Counts);
        barrier(&mut order);
        order.written(Kind::Pointers);
        assert!(order.waits(Kind::Counts), "a count may go down");
        assert!(order.waits(Kind::Data), "the freed cluster may be taken");
        order.tables_written(epoch);
        assert!(order.waits(Kind::Data), "written is not durable");
        barrier(&mut order);
        order.written(Kind::Pointers);
        assert!(!order.waits(Kind::Data));
        order.freed();
        order.tables_written(epoch);
        barrier(&mut order);
        order.written(Kind::Pointers);
        assert!(order.waits(Kind::Data), "what was freed since is not written yet");
    }

    #[test]
    fn tables_that_are_written_while_a_cluster_is_given_up_may_still_point_to_it() {
        let mut order = order();
        order.begin_freeing();
        let epoch = order.epoch();
        order.tables_written(epoch);
        barrier(&mut order);
        assert!(order.has_unwritten_frees(), "the pointer may have gone only after that");
        order.end_freeing();
        order.tables_written(epoch);
        barrier(&mut order);
        assert!(order.has_unwritten_frees(), "or while it was written");
        let epoch = order.epoch();
        order.tables_written(epoch);
        assert!(!order.has_unwritten_frees() && order.has_freed(), "written is not durable");
        barrier(&mut order);
        assert!(!order.has_freed());
    }

    #[test]
    fn a_new_table_is_there_before_it_is_pointed_to() {
        let mut order = order();
        order.written(Kind::Other);
        assert!(order.waits(Kind::Other));
        let before = order.begin_barrier();
        assert!(!order.waits(Kind::Other));
        order.barrier_failed(before);
        assert!(order.waits(Kind::Other), "a failed barrier is none");
    }

    #[test]
    fn tables_are_told_from_data() {
        let order = order();
        assert_eq!(order.kind(2 * CLUSTER + 512), Kind::Counts);
        assert_eq!(order.kind(4 * CLUSTER), Kind::Pointers);
        assert_eq!(order.kind(0), Kind::Other);
        assert!(order.is_metadata(0..512));
        assert!(order.is_metadata(CLUSTER..CLUSTER + 512), "the refcount table");
        assert!(order.is_metadata(3 * CLUSTER + 4096..3 * CLUSTER + 8192), "the L1 table");
        assert!(order.is_metadata(4 * CLUSTER - 512..5 * CLUSTER), "its end in the L1 table");
        assert!(order.is_metadata(2 * CLUSTER..2 * CLUSTER + 512), "counts");
        assert!(!order.is_metadata(5 * CLUSTER..9 * CLUSTER));
    }

    #[test]
    fn new_tables_are_known_by_the_pointers_to_them() {
        let mut order = order();
        assert_eq!(order.root(3 * CLUSTER + 16), Some(Root::Pointers));
        assert_eq!(order.root(CLUSTER), Some(Root::Counts));
        assert_eq!(order.root(5 * CLUSTER), None);
        assert_eq!(order.add_table(Root::Pointers, 3 * CLUSTER + 16, 7 * CLUSTER), Some(2));
        assert_eq!(order.add_table(Root::Pointers, 3 * CLUSTER + 16, 7 * CLUSTER), None, "known by now");
        assert_eq!(order.add_table(Root::Pointers, 3 * CLUSTER + 24, 0), None);
        assert_eq!(order.kind(7 * CLUSTER), Kind::Pointers);
        assert!(order.move_root(Root::Counts, 8 * CLUSTER..9 * CLUSTER));
        assert!(!order.move_root(Root::Counts, 8 * CLUSTER..9 * CLUSTER));
        assert_eq!((order.root(CLUSTER), order.root(8 * CLUSTER)), (None, Some(Root::Counts)));
    }
}
