//! The index: which block is in which slot, which slot comes next. Sans-I/O.
//!
//! - 24 bytes a slot up to the highest one ever used ([`super::slots`]) plus a hash table of slot numbers (5 bytes a
//!   bucket, at most 11.4 a block): the key is stored once, in the slot. The table is in 256 parts, so that one
//!   insert never rehashes more than a 256th.
//! - Replacement is the clock algorithm (F. J. Corbató, "A paging experiment with the Multics system", 1968): FIFO by
//!   slot number with one second chance for slots read since the hand passed. Going round by slot number has the
//!   device overwritten in address order, which keeps its write amplification low.
//! - A block has at most one live slot and at most one pending one. A slot's data never changes while it is live: a new
//!   copy goes to a pending slot, and the live one leaves when the pending one has been written.

use super::format::{MAX_BLOCK, RECORD_BYTES, SECTOR_BYTES, SlotRecord};
use super::slots::{ABORTED, Beyond, FAILED, NO_SLOT, RECOVERED, REFERENCED, Slot, SlotState, Slots};
use super::storages::Storages;
use crate::types::{BlockIndex, PageMask};
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use std::hash::{BuildHasher, RandomState};

const PARTS: usize = 256;
/// Records are written by whole sectors.
pub(super) const RECORDS_A_SECTOR: u32 = (SECTOR_BYTES / RECORD_BYTES) as u32;
/// So many slots the hand looks at before it takes a slot that was read since it passed: bounds the time under the
/// lock.
const LONGEST_SWEEP: u32 = 1024;

/// Storage index in the upper 16 bits, block in the lower 48.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Key(pub(super) u64);

impl Key {
    pub(super) fn new(storage: u16, block: BlockIndex) -> Option<Key> {
        (block.0 <= MAX_BLOCK).then_some(Key(u64::from(storage) << 48 | block.0))
    }
    pub(super) fn storage(self) -> u16 {
        (self.0 >> 48) as u16
    }
    pub(super) fn block(self) -> u64 {
        self.0 & MAX_BLOCK
    }
}

/// What a read needs to know.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadTicket {
    pub(super) slot: u32,
    pub(super) generation: u32,
    pub(super) key: Key,
    pub(super) valid: PageMask,
    pub(super) written: PageMask,
    pub(super) checksum: u32,
}

#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Counters {
    pub(super) used_slots: u64,
    pub(super) pending_slots: u64,
    pub(super) retired_slots: u64,
    pub(super) valid_pages: u64,
    pub(super) reads: u64,
    pub(super) inserts: u64,
    pub(super) aborted_inserts: u64,
    pub(super) evictions: u64,
}

#[derive(Debug)]
pub(super) struct Index {
    slots: Slots,
    parts: Vec<HashTable<u32>>,
    pending: HashTable<u32>,
    free: u32,
    /// Free slots that stay, while those that are to go are sorted out of `free`; see `resize`.
    sifted: u32,
    hand: u32,
    seed: u64,
    /// Sectors of 64 records that differ from what is on the disk, a bit each.
    changed: Vec<u64>,
    pub(super) storages: Storages,
    pub(super) counters: Counters,
}

/// Murmur3's 64-bit finalizer (A. Appleby, public domain) over the key and a random seed: a guest chooses the blocks,
/// and must not be able to choose collisions.
fn mix(seed: u64, key: Key) -> u64 {
    let mut x = key.0 ^ seed;
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// The table takes its bucket from the lowest bits and its tag from the highest: the part comes from between.
fn part_of(hash: u64) -> usize {
    (hash >> 40) as usize % PARTS
}

fn find(table: &HashTable<u32>, slots: &Slots, hash: u64, key: Key) -> Option<u32> {
    table.find(hash, |slot| slots.get(*slot).key == key.0).copied()
}

fn remove(table: &mut HashTable<u32>, hash: u64, slot: u32) {
    if let Ok(entry) = table.find_entry(hash, |other| *other == slot) {
        entry.remove();
    }
}

impl Index {
    /// An empty index of `limit` slots.
    pub(super) fn new(limit: u32) -> Index {
        Index {
            slots: Slots::new(limit),
            parts: (0..PARTS).map(|_| HashTable::new()).collect(),
            pending: HashTable::new(),
            free: NO_SLOT,
            sifted: NO_SLOT,
            hand: 0,
            seed: RandomState::new().hash_one(0u64),
            changed: Vec::new(),
            storages: Storages::default(),
            counters: Counters::default(),
        }
    }

    pub(super) fn limit(&self) -> u32 {
        self.slots.limit()
    }

    /// Slots ever used.
    pub(super) fn len(&self) -> u32 {
        self.slots.len()
    }

    pub(super) fn hand(&self) -> u32 {
        self.hand
    }

    pub(super) fn bytes(&self) -> u64 {
        let tables: usize = self.parts.iter().chain([&self.pending]).map(HashTable::allocation_size).sum();
        self.slots.bytes()
            + self.changed.capacity() as u64 * 8
            + self.storages.bytes()
            + (tables + PARTS * size_of::<HashTable<u32>>()) as u64
    }

    fn live(&self, key: Key) -> Option<u32> {
        let hash = mix(self.seed, key);
        find(&self.parts[part_of(hash)], &self.slots, hash, key)
    }

    fn add_live(&mut self, slot: u32) {
        let (slots, seed) = (&self.slots, self.seed);
        let hash_of = |slot: &u32| mix(seed, Key(slots.get(*slot).key));
        let hash = hash_of(&slot);
        self.parts[part_of(hash)].insert_unique(hash, slot, hash_of);
    }

    /// Pages of a block that may be read.
    pub(super) fn lookup(&self, key: Key) -> PageMask {
        self.live(key).map_or(PageMask::NONE, |slot| self.slots.get(slot).valid)
    }

    pub(super) fn begin_read(&mut self, key: Key) -> Option<ReadTicket> {
        let number = self.live(key)?;
        let slot = self.slots.get_mut(number);
        slot.readers = slot.readers.checked_add(1)?;
        slot.flags |= REFERENCED;
        self.counters.reads += 1;
        Some(ReadTicket {
            slot: number,
            generation: slot.generation,
            key,
            valid: slot.valid,
            written: slot.written,
            checksum: slot.checksum,
        })
    }

    /// Whether what a slot holds is known from a record that a crash may have made older than its data.
    pub(super) fn is_unproven(&self, ticket: &ReadTicket) -> bool {
        self.slots.get(ticket.slot).has(RECOVERED)
    }

    /// It was read, and is what was written.
    pub(super) fn prove(&mut self, ticket: &ReadTicket) {
        self.slots.get_mut(ticket.slot).flags &= !RECOVERED;
    }

    /// Ends a read. `bad`: the slot must not be read again; `failed`: nor its place be written again. Returns the pages
    /// that are still valid.
    pub(super) fn end_read(&mut self, ticket: &ReadTicket, bad: bool, failed: bool) -> PageMask {
        let slot = self.slots.get_mut(ticket.slot);
        slot.readers = slot.readers.saturating_sub(1);
        if failed {
            slot.flags |= FAILED;
        }
        let valid = slot.valid;
        match slot.state {
            SlotState::Live if bad => {
                self.drop_live(ticket.slot);
                PageMask::NONE
            }
            SlotState::Live => valid,
            SlotState::Leaving if slot.readers == 0 => {
                self.release(ticket.slot);
                PageMask::NONE
            }
            _ => PageMask::NONE,
        }
    }

    /// Reserves a slot for pages of a block: a free one, else a new one, else that of a victim. `None`: the block has
    /// all these pages, or is being written already, or every slot looked at is in use.
    pub(super) fn begin_insert(&mut self, key: Key, mask: PageMask) -> Option<(u32, u32)> {
        let hash = mix(self.seed, key);
        if mask.is_empty() || self.lookup(key).contains(mask) || find(&self.pending, &self.slots, hash, key).is_some() {
            return None;
        }
        let number = match self.take_free() {
            Some(slot) => slot,
            None => match self.slots.push(Slot::free()) {
                Some(slot) => slot,
                None => {
                    let victim = self.victim()?;
                    self.counters.evictions += 1;
                    self.drop_live(victim);
                    self.take_free()?
                }
            },
        };
        let slot = self.slots.get_mut(number);
        slot.key = key.0;
        slot.generation = slot.generation.wrapping_add(1);
        slot.written = mask;
        slot.valid = mask;
        slot.state = SlotState::Pending;
        slot.flags = 0;
        let generation = slot.generation;
        let (slots, seed) = (&self.slots, self.seed);
        self.pending.insert_unique(hash, number, |slot| mix(seed, Key(slots.get(*slot).key)));
        self.storages.count_slots(key.storage(), 1);
        self.counters.pending_slots += 1;
        Some((number, generation))
    }

    /// Ends an insert; with a checksum it becomes visible, unless it was aborted. Returns whether it did.
    pub(super) fn finish_insert(&mut self, number: u32, checksum: Option<u32>, failed: bool) -> bool {
        let slot = self.slots.get_mut(number);
        if slot.state != SlotState::Pending {
            return false;
        }
        let key = Key(slot.key);
        let aborted = slot.has(ABORTED);
        if failed {
            slot.flags |= FAILED;
        }
        remove(&mut self.pending, mix(self.seed, key), number);
        self.counters.pending_slots -= 1;
        let Some(checksum) = checksum.filter(|_| !aborted && !failed) else {
            self.counters.aborted_inserts += 1;
            self.storages.count_slots(key.storage(), -1);
            self.release(number);
            return false;
        };
        if let Some(old) = self.live(key) {
            self.drop_live(old);
        }
        let slot = self.slots.get_mut(number);
        slot.checksum = checksum;
        slot.state = SlotState::Live;
        self.counters.valid_pages += slot.valid.count();
        self.counters.used_slots += 1;
        self.counters.inserts += 1;
        self.add_live(number);
        self.touch(number);
        true
    }

    /// Takes pages of one block out of its live slot, and aborts a pending one that has any of them.
    pub(super) fn invalidate(&mut self, key: Key, mask: PageMask) {
        if self.storages.slots(key.storage()) == 0 {
            return;
        }
        if let Some(slot) = self.live(key) {
            self.invalidate_slot(slot, mask);
        }
        let pending = find(&self.pending, &self.slots, mix(self.seed, key), key);
        if let Some(slot) = pending {
            self.invalidate_slot(slot, mask);
        }
    }

    fn invalidate_slot(&mut self, number: u32, mask: PageMask) {
        let slot = self.slots.get_mut(number);
        let hit = slot.valid & mask;
        if hit.is_empty() {
            return;
        }
        match slot.state {
            SlotState::Pending => slot.flags |= ABORTED,
            SlotState::Live => {
                if slot.valid == hit {
                    self.drop_live(number);
                } else {
                    slot.valid = slot.valid.minus(hit);
                    self.counters.valid_pages -= hit.count();
                    self.touch(number);
                }
            }
            SlotState::Free | SlotState::Leaving | SlotState::Retired | SlotState::Gone => {}
        }
    }

    /// Looks at up to `count` slots from `from` on and invalidates the pages `which` names for their keys. Returns
    /// where to go on, if not at the end, and how many live slots went.
    pub(super) fn sweep(
        &mut self,
        from: u32,
        count: u32,
        mut which: impl FnMut(Key) -> PageMask,
    ) -> (Option<u32>, u64) {
        let end = from.saturating_add(count).min(self.slots.len());
        let used = self.counters.used_slots;
        for number in from..end {
            let slot = self.slots.get(number);
            if matches!(slot.state, SlotState::Live | SlotState::Pending) {
                let mask = which(Key(slot.key));
                self.invalidate_slot(number, mask);
            }
        }
        ((end < self.slots.len()).then_some(end), used - self.counters.used_slots)
    }

    /// Shows up to `count` slots from `from` on that can be served: their keys and valid pages. Returns where to go on, if
    /// not at the end.
    pub(super) fn look(&self, from: u32, count: u32, mut see: impl FnMut(Key, PageMask)) -> Option<u32> {
        let end = from.saturating_add(count).min(self.slots.len());
        for slot in (from..end).map(|number| self.slots.get(number)).filter(|slot| slot.state == SlotState::Live) {
            see(Key(slot.key), slot.valid);
        }
        (end < self.slots.len()).then_some(end)
    }

    /// Takes a live slot out of the index.
    fn drop_live(&mut self, number: u32) {
        let slot = self.slots.get_mut(number);
        let key = Key(slot.key);
        self.counters.used_slots -= 1;
        self.counters.valid_pages -= slot.valid.count();
        slot.valid = PageMask::NONE;
        slot.state = SlotState::Leaving;
        let readers = slot.readers;
        self.storages.count_slots(key.storage(), -1);
        self.touch(number);
        let hash = mix(self.seed, key);
        remove(&mut self.parts[part_of(hash)], hash, number);
        if readers == 0 {
            self.release(number);
        }
    }

    /// Makes a slot that nobody reads or writes any more free again, or retires it if it failed.
    fn release(&mut self, number: u32) {
        let (goes, free) = (number >= self.slots.limit(), self.free);
        let slot = self.slots.get_mut(number);
        slot.valid = PageMask::NONE;
        slot.written = PageMask::NONE;
        if slot.has(FAILED) {
            slot.state = SlotState::Retired;
            self.counters.retired_slots += 1;
            return;
        }
        slot.state = SlotState::Free;
        slot.flags = 0;
        if goes {
            slot.state = SlotState::Gone;
            return;
        }
        slot.key = u64::from(free);
        self.free = number;
    }

    fn take_free(&mut self) -> Option<u32> {
        while self.free != NO_SLOT {
            let number = self.free;
            self.free = self.slots.get(number).key as u32;
            if number < self.slots.limit() {
                return Some(number);
            }
            self.slots.get_mut(number).state = SlotState::Gone;
        }
        if self.sifted == NO_SLOT {
            return None;
        }
        let number = self.sifted;
        self.sifted = self.slots.get(number).key as u32;
        Some(number)
    }

    fn victim(&mut self) -> Option<u32> {
        let len = self.slots.len().min(self.slots.limit());
        let mut referenced = None;
        for _ in 0..len.saturating_mul(2).min(LONGEST_SWEEP) {
            let number = self.hand % len;
            self.hand = (number + 1) % len;
            let slot = self.slots.get_mut(number);
            if slot.state != SlotState::Live || slot.readers > 0 {
                continue;
            }
            if !slot.has(REFERENCED) {
                return Some(number);
            }
            slot.flags &= !REFERENCED;
            referenced.get_or_insert(number);
        }
        referenced
    }

    /// From now on there are so many slots. If these are fewer, no slot beyond is given out; [`Index::drop_beyond`] and
    /// [`Index::sift`] see to those that are in use or free, [`Index::end_shrink`] forgets them. With more again those that
    /// went come back by [`Index::take_back`].
    pub(super) fn set_limit(&mut self, limit: u32) {
        self.slots.set_limit(limit);
    }

    /// Drops what slots beyond the limit hold, of `count` slots from `from` on. Returns where to go on, if not at the end.
    pub(super) fn drop_beyond(&mut self, from: u32, count: u32) -> Option<u32> {
        let from = from.max(self.slots.limit());
        self.sweep(from, count, |_| PageMask::ALL).0
    }

    /// Sorts the slots that are to go out of so many free ones. Returns whether all free ones have been looked at.
    pub(super) fn sift(&mut self, count: u32) -> bool {
        for _ in 0..count {
            if self.free == NO_SLOT {
                self.free = std::mem::replace(&mut self.sifted, NO_SLOT);
                return true;
            }
            let (number, limit, sifted) = (self.free, self.slots.limit(), self.sifted);
            let slot = self.slots.get_mut(number);
            self.free = slot.key as u32;
            if number < limit {
                slot.key = u64::from(sifted);
                self.sifted = number;
            } else {
                slot.state = SlotState::Gone;
            }
        }
        false
    }

    /// Adds to `seen` what has become of slots beyond the limit, of `count` from `from` on. Returns where to go on, if not at the
    /// end. One that is idle stays so: it is given out no more.
    pub(super) fn look_beyond(&self, from: u32, count: u32, seen: &mut Beyond) -> Option<u32> {
        let end = from.saturating_add(count).min(self.slots.len());
        for number in from.max(self.slots.limit())..end {
            let slot = self.slots.get(number);
            match slot.state {
                SlotState::Gone if slot.readers == 0 => {}
                SlotState::Retired if slot.readers == 0 => seen.retired += 1,
                _ => seen.held += 1,
            }
        }
        (end < self.slots.len()).then_some(end)
    }

    /// Forgets the slots beyond the limit, none of which is held and so many of which are retired.
    pub(super) fn end_shrink(&mut self, retired: u32) {
        let (limit, len) = (self.slots.limit(), self.slots.len());
        self.counters.retired_slots -= u64::from(retired);
        self.slots.truncate();
        if len > limit {
            // Their records are beyond the end of what is ever read.
            let sectors = limit.div_ceil(RECORDS_A_SECTOR) as usize;
            self.changed.truncate(sectors.div_ceil(64));
            if let Some(last) = self.changed.last_mut().filter(|_| !sectors.is_multiple_of(64)) {
                *last &= (1 << (sectors % 64)) - 1;
            }
        }
        self.hand = if self.hand < self.slots.len() { self.hand } else { 0 };
    }

    /// Makes slots free again that went in a shrink that came to nothing, of `count` from `from` on. Returns where to go on, if
    /// not at the end.
    pub(super) fn take_back(&mut self, from: u32, count: u32) -> Option<u32> {
        let end = from.saturating_add(count).min(self.slots.len());
        for number in from..end {
            let free = self.free;
            let slot = self.slots.get_mut(number);
            if slot.state == SlotState::Gone {
                slot.state = SlotState::Free;
                slot.key = u64::from(free);
                self.free = number;
            }
        }
        (end < self.slots.len()).then_some(end)
    }

    /// The record of a slot is not what the disk has.
    pub(super) fn touch(&mut self, number: u32) {
        self.touch_sector(number / RECORDS_A_SECTOR);
    }

    pub(super) fn touch_sector(&mut self, sector: u32) {
        let word = sector as usize / 64;
        if self.changed.len() <= word {
            self.changed.resize(word + 1, 0);
        }
        self.changed[word] |= 1 << (sector % 64);
    }

    pub(super) fn touch_all(&mut self) {
        (0..self.slots.len().div_ceil(RECORDS_A_SECTOR)).for_each(|sector| self.touch_sector(sector));
    }

    /// The first changed sector of records at or after `from`.
    pub(super) fn next_changed(&self, from: u32) -> Option<u32> {
        let mut word = from as usize / 64;
        let mut bits = self.changed.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.changed.get(word)?;
        }
        Some(word as u32 * 64 + bits.trailing_zeros())
    }

    /// Where a run of changed sectors ends that begins with `first`, of at most `most`.
    pub(super) fn changed_run(&self, first: u32, most: u32) -> u32 {
        (first + 1..first + most).find(|next| self.next_changed(*next) != Some(*next)).unwrap_or(first + most)
    }

    /// Takes a sector of records: what is to be written, all zero where nothing is live. It counts as written.
    pub(super) fn take_sector(
        &mut self,
        sector: u32,
        sequence: u64,
        checkpoint: u64,
        mut encode: impl FnMut(u32, &SlotRecord),
    ) {
        if let Some(word) = self.changed.get_mut(sector as usize / 64) {
            *word &= !(1 << (sector % 64));
        }
        let first = sector.saturating_mul(RECORDS_A_SECTOR);
        for number in first..first.saturating_add(RECORDS_A_SECTOR).min(self.slots.len()) {
            if let Some(record) = self.record(number, sequence, checkpoint) {
                encode(number, &record);
            }
        }
    }

    /// Makes room for so many blocks in one part of the table: growing step by step would hash every block again and again, each
    /// time with a look at its slot, which is a third of the time of a start. Returns the next part.
    pub(super) fn reserve(&mut self, part: usize, blocks: u64) -> Option<usize> {
        // Blocks spread over the parts by chance: four standard deviations more than the mean.
        let mean = blocks / PARTS as u64;
        let each = (mean + 4 * mean.isqrt()) as usize;
        let (slots, seed) = (&self.slots, self.seed);
        self.parts[part].reserve(each, |slot| mix(seed, Key(slots.get(*slot).key)));
        Some(part + 1).filter(|next| *next < PARTS)
    }

    /// Gives back what [`Index::reserve`] took of a part and is of no use: the slab holds far fewer blocks than it once did.
    /// Returns the next part.
    pub(super) fn fit(&mut self, part: usize, reserved: u64) -> Option<usize> {
        if self.counters.used_slots >= reserved / 2 {
            return None;
        }
        let (slots, seed) = (&self.slots, self.seed);
        self.parts[part].shrink_to_fit(|slot| mix(seed, Key(slots.get(*slot).key)));
        Some(part + 1).filter(|next| *next < PARTS)
    }

    /// Restores the next slot in order from disk. `false`: its block is in an earlier slot already; with `recovering` it
    /// stays there, since any two records of one block are true after a crash, else it is now in neither.
    pub(super) fn restore(&mut self, record: Option<&SlotRecord>, recovering: bool) -> bool {
        let Some(number) = self.slots.push(Slot::free()) else {
            return false;
        };
        let key = record.and_then(|r| Key::new(r.storage, BlockIndex(r.block)));
        let (Some(record), Some(key)) = (record, key) else {
            self.release(number);
            return true;
        };
        let (slots, seed) = (&self.slots, self.seed);
        let hash = mix(seed, key);
        let hash_of = |slot: &u32| mix(seed, Key(slots.get(*slot).key));
        // One look at the table for both questions: of a large one each is a miss of the processor's caches.
        match self.parts[part_of(hash)].entry(hash, |slot| slots.get(*slot).key == key.0, hash_of) {
            Entry::Vacant(place) => drop(place.insert(number)),
            Entry::Occupied(_) if recovering => {
                self.release(number);
                return false;
            }
            Entry::Occupied(other) => {
                // Only one of them can be right, and nothing says which.
                let other = *other.get();
                self.drop_live(other);
                self.release(number);
                return false;
            }
        }
        let slot = self.slots.get_mut(number);
        slot.key = key.0;
        slot.checksum = record.checksum;
        slot.generation = record.sequence as u32;
        slot.written = record.written;
        slot.valid = record.valid;
        slot.state = SlotState::Live;
        slot.flags = if record.referenced { REFERENCED } else { 0 } | if recovering { RECOVERED } else { 0 };
        self.counters.used_slots += 1;
        self.counters.valid_pages += record.valid.count();
        self.storages.count_slots(record.storage, 1);
        true
    }

    pub(super) fn restore_hand(&mut self, hand: u64) {
        self.hand = if hand < u64::from(self.slots.len()) { hand as u32 } else { 0 };
    }

    /// One past the highest live slot.
    pub(super) fn used_end(&self) -> u32 {
        let live = |slot: &u32| self.slots.get(*slot).state == SlotState::Live;
        (0..self.slots.len()).rev().find(live).map_or(0, |slot| slot + 1)
    }

    /// What a checkpoint says of a slot below [`Index::used_end`].
    pub(super) fn record(&self, number: u32, sequence: u64, checkpoint: u64) -> Option<SlotRecord> {
        let slot = self.slots.get(number);
        (slot.state == SlotState::Live).then(|| SlotRecord {
            storage: Key(slot.key).storage(),
            block: Key(slot.key).block(),
            written: slot.written,
            valid: slot.valid,
            referenced: slot.has(REFERENCED),
            checksum: slot.checksum,
            sequence,
            checkpoint,
            epoch: self.storages.epoch(Key(slot.key).storage()),
        })
    }
}
