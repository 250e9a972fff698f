//! Ghost queue of S3-FIFO (Yang et al., SOSP '23): which blocks left the small queue lately.
//!
//! A table of fingerprints with insertion times instead of a linked queue, as in the paper's own implementation:
//! an entry counts as long as fewer than `capacity` blocks have become ghosts since. Two candidate places a key;
//! a collision costs one wrong promotion, never a wrong byte.

/// Fingerprints of blocks that were evicted without a second use.
#[derive(Debug)]
pub(crate) struct Ghost {
    table: Vec<(u32, u32)>,
    mask: usize,
    capacity: u32,
    clock: u32,
}

impl Ghost {
    pub(crate) fn new(capacity: u32) -> Ghost {
        let places = (capacity.max(16) as usize).next_power_of_two();
        Ghost { table: vec![(0, 0); places], mask: places - 1, capacity, clock: 1 }
    }
    fn places(&self, hash: u64) -> ([usize; 2], u32) {
        let fingerprint = (hash >> 32) as u32 | 1;
        let first = hash as usize & self.mask;
        ([first, (first ^ 1) & self.mask], fingerprint)
    }
    fn age(&self, at: u32) -> u32 {
        self.clock.wrapping_sub(at)
    }
    pub(crate) fn insert(&mut self, hash: u64) {
        let (places, fingerprint) = self.places(hash);
        let older = if self.age(self.table[places[0]].1) >= self.age(self.table[places[1]].1) { 0 } else { 1 };
        self.table[places[older]] = (fingerprint, self.clock);
        self.clock = self.clock.wrapping_add(1);
    }
    /// Whether the block is a ghost; it stops being one.
    pub(crate) fn take(&mut self, hash: u64) -> bool {
        let (places, fingerprint) = self.places(hash);
        for place in places {
            let (found, at) = self.table[place];
            if found == fingerprint && self.age(at) <= self.capacity {
                self.table[place] = (0, 0);
                return true;
            }
        }
        false
    }
    /// Whether the block is a ghost.
    pub(crate) fn holds(&self, hash: u64) -> bool {
        let (places, fingerprint) = self.places(hash);
        places.iter().any(|place| {
            let (found, at) = self.table[*place];
            found == fingerprint && self.age(at) <= self.capacity
        })
    }
    pub(crate) fn memory_bytes(&self) -> usize {
        self.table.len() * size_of::<(u32, u32)>()
    }
}
