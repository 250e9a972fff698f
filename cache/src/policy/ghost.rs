//! Ghost queue of S3-FIFO (Yang et al., SOSP '23): which blocks left the small queue lately.
//!
//! A table of fingerprints with insertion times instead of a linked queue, as in the paper's own implementation:
//! an entry counts as long as fewer than `capacity` blocks have become ghosts since. Two candidate places a key;
//! a collision costs one wrong promotion, never a wrong byte. Four bytes an entry: times are in steps of an 8192nd of the
//! capacity, so that 16 bits reach over eight capacities, after which an entry has hardly ever its place still.

/// Steps of time in which as many blocks become ghosts as the queue holds.
const STEPS: u32 = 8192;

/// Fingerprint and time; a fingerprint is never 0.
type Place = (u16, u16);

/// Fingerprints of blocks that were evicted without a second use.
#[derive(Debug)]
pub(crate) struct Ghost {
    table: Vec<Place>,
    capacity: u32,
    /// Ghosts a step of time.
    step: u32,
    clock: u32,
}

impl Ghost {
    pub(crate) fn new(capacity: u32) -> Ghost {
        // Pairs of places.
        let places = (capacity.max(16) as usize).next_multiple_of(2);
        Ghost { table: vec![(0, 0); places], capacity, step: (capacity / STEPS).max(1), clock: 1 }
    }
    fn places(&self, hash: u64) -> ([usize; 2], u16) {
        let fingerprint = (hash >> 48) as u16 | 1;
        let first = (hash % self.table.len() as u64) as usize;
        ([first, first ^ 1], fingerprint)
    }
    fn now(&self) -> u16 {
        (self.clock / self.step) as u16
    }
    fn age(&self, at: u16) -> u16 {
        self.now().wrapping_sub(at)
    }
    fn is_live(&self, (found, at): Place, fingerprint: u16) -> bool {
        found == fingerprint && u32::from(self.age(at)) <= self.capacity / self.step
    }
    pub(crate) fn insert(&mut self, hash: u64) {
        let (places, fingerprint) = self.places(hash);
        let older = if self.age(self.table[places[0]].1) >= self.age(self.table[places[1]].1) { 0 } else { 1 };
        self.table[places[older]] = (fingerprint, self.now());
        self.clock = self.clock.wrapping_add(1);
    }
    /// Whether the block is a ghost; it stops being one.
    pub(crate) fn take(&mut self, hash: u64) -> bool {
        let (places, fingerprint) = self.places(hash);
        for place in places {
            if self.is_live(self.table[place], fingerprint) {
                self.table[place] = (0, 0);
                return true;
            }
        }
        false
    }
    /// Whether the block is a ghost.
    pub(crate) fn holds(&self, hash: u64) -> bool {
        let (places, fingerprint) = self.places(hash);
        places.iter().any(|place| self.is_live(self.table[*place], fingerprint))
    }
    pub(crate) fn memory_bytes(&self) -> usize {
        self.table.len() * size_of::<Place>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(block: u64) -> u64 {
        // Murmur3's finalizer: places and fingerprints as of any good hash.
        let x = (block ^ (block >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        let x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        x ^ (x >> 33)
    }

    #[test]
    fn a_ghost_is_known_for_as_many_evictions_as_there_are_slots() {
        for capacity in [100, 9600, 100_000] {
            let mut ghost = Ghost::new(capacity);
            let last = 5 * u64::from(capacity);
            (0..last).for_each(|block| ghost.insert(hash(block)));
            let known = |blocks: std::ops::Range<u64>| {
                let count = blocks.end - blocks.start;
                blocks.filter(|block| ghost.holds(hash(*block))).count() as f64 / count as f64
            };
            // Two places for a key in a table as large as the queue: what is young is nearly always there.
            let young = known(last - u64::from(capacity) / 4..last);
            let old = known(0..last - u64::from(capacity) - u64::from(capacity / STEPS));
            let strange = known(last..2 * last);
            assert!(young > 0.9 && old < 0.01 && strange < 0.01, "{capacity}: {young} {old} {strange}");
            assert!(ghost.take(hash(last - 1)) && !ghost.take(hash(last - 1)));
        }
    }
}
