//! Which storages the tier knows: their identity strings, their stamps, and who uses them now.

use super::format::{self, IDENTITY_BYTES, TABLE_ENTRIES, TableEntry};
use super::intents::Regions;
use super::{SsdError, SsdStorage, Stamp};
use crate::types::PageRange;
use std::hash::{BuildHasher, RandomState};

#[derive(Debug)]
struct Storage {
    identity: String,
    stamp: Option<Stamp>,
    /// Tells handles of an earlier owner of this index from those of this one.
    incarnation: u32,
    /// Registrations not yet released.
    users: u32,
    /// Slots in the index and pending.
    slots: u32,
    /// As in its table entry, see [`super::format`].
    epoch: u64,
    first_bit: u64,
    /// Taken over from a run that was not ended, and not registered since.
    recovered: bool,
    /// Records of it may be on the disk.
    on_disk: bool,
    writes: Writes,
}

/// What is known of the writes to a store.
#[derive(Clone, Copy, Default, Debug)]
struct Writes {
    begun: u64,
    under_way: u32,
    /// Something may have been written that the store's loss of power would take back.
    unflushed: bool,
    /// The store was flushed for its end, and no write has come since: a checkpoint that asked it before, and had no answer,
    /// does not make it unflushed.
    durable: bool,
    /// Pages that were ever written to end here.
    end_page: u64,
}

/// A number that no other epoch has.
fn new_epoch() -> u64 {
    // Its keys come from the kernel's random numbers. Zero is what programs without epochs write.
    RandomState::new().hash_one(0u8).max(1)
}

/// Where an entry comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    Registered,
    /// The table of a slab that was closed.
    Closed,
    /// The table of a slab that was not.
    Recovered,
}

/// A storage whose writes are to be made durable by its store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Unflushed {
    pub(super) storage: SsdStorage,
    /// In use, so that it can be asked to flush.
    pub(super) open: bool,
    pub(super) regions: Regions,
}

/// Identities whose entries on the disk are to go, and when each lost its place.
pub(super) type Displaced = Vec<(String, u32)>;

/// What a registration found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Registration {
    /// Ready to use.
    Known,
    /// Known, but changed while nobody used it: its slots must go before `users` is raised.
    Changed,
    /// A new index; if it had an owner before, the old owner's slots must go.
    New,
}

#[derive(Debug)]
pub(super) struct Storages {
    entries: Vec<Option<Storage>>,
    incarnations: u32,
    /// The table differs from what is on the disk.
    changed: bool,
    /// Storages whose index was given to another while their entry was on the disk, and there it may still be.
    displaced: Displaced,
    /// Entries at most: what the table has room for; tests have fewer.
    pub(super) limit: usize,
}

impl Default for Storages {
    fn default() -> Storages {
        Storages { entries: Vec::new(), incarnations: 0, changed: false, displaced: Vec::new(), limit: TABLE_ENTRIES }
    }
}

impl Storages {
    fn entry(&self, index: u16) -> Option<&Storage> {
        self.entries.get(usize::from(index))?.as_ref()
    }

    fn entry_mut(&mut self, index: u16) -> Option<&mut Storage> {
        self.entries.get_mut(usize::from(index))?.as_mut()
    }

    /// Whether a handle still names the storage it was made for.
    pub(super) fn is_current(&self, s: SsdStorage) -> bool {
        self.entry(s.index).is_some_and(|e| e.incarnation == s.incarnation)
    }

    pub(super) fn slots(&self, index: u16) -> u32 {
        self.entry(index).map_or(0, |e| e.slots)
    }

    pub(super) fn count_slots(&mut self, index: u16, by: i32) {
        if let Some(entry) = self.entry_mut(index) {
            let before = entry.slots;
            entry.slots = before.saturating_add_signed(by);
            // Only storages with slots are on the disk.
            let changed = (before == 0) != (entry.slots == 0);
            self.changed |= changed;
        }
    }

    pub(super) fn epoch(&self, index: u16) -> u64 {
        self.entry(index).map_or(0, |e| e.epoch)
    }

    /// From now on no record on the disk is the storage's. Its slots must have gone.
    pub(super) fn renew_epoch(&mut self, index: u16) {
        self.changed = true;
        if let Some(entry) = self.entry_mut(index) {
            entry.epoch = new_epoch();
        }
    }

    /// The bits of the write-intent bitmap for pages of a storage.
    pub(super) fn regions(&self, index: u16, range: PageRange) -> Regions {
        Regions::of(self.entry(index).map_or(0, |e| e.first_bit), range)
    }

    /// Whether the table is to be written; it counts as written then.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    pub(super) fn touch(&mut self) {
        self.changed = true;
    }

    pub(super) fn has_changed(&self) -> bool {
        self.changed
    }

    pub(super) fn begin_write(&mut self, s: SsdStorage, range: PageRange) {
        if let Some(entry) = self.entry_mut(s.index).filter(|e| e.incarnation == s.incarnation) {
            entry.writes.begun += 1;
            entry.writes.under_way += 1;
            entry.writes.unflushed = true;
            entry.writes.durable = false;
            entry.writes.end_page = entry.writes.end_page.max(range.end());
        }
    }

    pub(super) fn end_write(&mut self, s: SsdStorage) {
        if let Some(entry) = self.entry_mut(s.index).filter(|e| e.incarnation == s.incarnation) {
            entry.writes.under_way = entry.writes.under_way.saturating_sub(1);
            // A flush that began before its end says nothing of it.
            entry.writes.unflushed = true;
            entry.writes.durable = false;
        }
    }

    /// Storages that may have written what a loss of power would take back. They count as flushed from here on;
    /// [`Storages::not_flushed`] takes that back.
    pub(super) fn take_unflushed(&mut self) -> Vec<Unflushed> {
        let all = self.entries.iter_mut().enumerate().filter_map(|(index, e)| Some((index as u16, e.as_mut()?)));
        all.filter(|(_, e)| e.writes.unflushed)
            .map(|(index, e)| {
                e.writes.unflushed = false;
                let range = PageRange { first: 0, count: e.writes.end_page };
                let storage = SsdStorage { index, incarnation: e.incarnation };
                Unflushed { storage, open: e.users > 0, regions: Regions::of(e.first_bit, range) }
            })
            .collect()
    }

    pub(super) fn not_flushed(&mut self, s: SsdStorage) {
        if let Some(entry) = self.entry_mut(s.index).filter(|e| e.incarnation == s.incarnation) {
            entry.writes.unflushed = !entry.writes.durable;
        }
    }

    /// The store is durable: for an orderly end, when no write can come any more.
    pub(super) fn flushed(&mut self, s: SsdStorage) {
        if let Some(entry) = self.entry_mut(s.index).filter(|e| e.incarnation == s.incarnation) {
            entry.writes.unflushed = entry.writes.under_way > 0;
            entry.writes.durable = entry.writes.under_way == 0;
        }
    }

    pub(super) fn any_unflushed(&self) -> bool {
        self.entries.iter().flatten().any(|e| e.writes.unflushed)
    }

    /// Writes begun so far, if none is under way: a stamp that is taken between two equal answers is the store's.
    pub(super) fn quiet_since(&self, s: SsdStorage) -> Option<u64> {
        let entry = self.entry(s.index).filter(|e| e.incarnation == s.incarnation)?;
        (entry.writes.under_way == 0).then_some(entry.writes.begun)
    }

    /// Finds or makes the entry of an identity, without raising `users`. `ours`, asked after a crash with index, epoch and
    /// old stamp: was it we who changed the store?
    pub(super) fn register(
        &mut self,
        identity: &str,
        stamp: Option<Stamp>,
        ours: impl FnOnce(u16, u64, Option<Stamp>) -> bool,
    ) -> Result<(SsdStorage, Registration), SsdError> {
        if identity.is_empty() || identity.len() > IDENTITY_BYTES {
            let start = identity.chars().take(40).collect();
            return Err(SsdError::IdentityLength { len: identity.len(), max: IDENTITY_BYTES, start });
        }
        let mut entries = self.entries.iter().enumerate().filter_map(|(index, e)| Some((index as u16, e.as_ref()?)));
        if let Some((index, entry)) = entries.find(|(_, e)| e.identity == identity) {
            let handle = SsdStorage { index, incarnation: entry.incarnation };
            // While it is in use its stamp moves with the guests' own writes.
            let changed =
                entry.users == 0 && entry.stamp != stamp && !(entry.recovered && ours(index, entry.epoch, entry.stamp));
            return Ok((handle, if changed { Registration::Changed } else { Registration::Known }));
        }
        let index = self.unused_index(identity)?;
        let handle = self.put(
            index,
            TableEntry { identity: identity.to_owned(), stamp, epoch: new_epoch() },
            Origin::Registered,
        );
        Ok((handle, Registration::New))
    }

    /// An index nobody owns, else that of the unused storage with the fewest slots.
    fn unused_index(&self, identity: &str) -> Result<u16, SsdError> {
        if let Some(free) = self.entries.iter().position(Option::is_none) {
            return Ok(free as u16);
        }
        if self.entries.len() < self.limit {
            return Ok(self.entries.len() as u16);
        }
        let idle = self.entries.iter().enumerate().filter_map(|(index, e)| Some((index, e.as_ref()?)));
        let idle = idle.filter(|(_, e)| e.users == 0).min_by_key(|(_, e)| e.slots);
        let full = || SsdError::TooManyStorages { max: self.limit, identity: identity.to_owned() };
        idle.map(|(index, _)| index as u16).ok_or_else(full)
    }

    /// Puts an entry at `index` (below the table's size), whoever was there.
    pub(super) fn put(&mut self, index: u16, entry: TableEntry, origin: Origin) -> SsdStorage {
        if self.entries.len() <= usize::from(index) {
            self.entries.resize_with(usize::from(index) + 1, || None);
        }
        self.incarnations = self.incarnations.wrapping_add(1);
        let incarnation = self.incarnations;
        // Slots of the owner before are still counted; dropping them counts them off.
        let slots = self.slots(index);
        let TableEntry { identity, stamp, epoch } = entry;
        let first_bit = format::first_region_bit(&identity);
        let writes = Writes::default();
        self.displace(index);
        let recovered = origin == Origin::Recovered;
        // Under its earlier index it may still have an entry there, and records.
        let on_disk = origin != Origin::Registered || self.displaced.iter().any(|(other, _)| *other == identity);
        self.changed |= origin == Origin::Registered;
        self.entries[usize::from(index)] = Some(Storage {
            identity,
            stamp,
            incarnation,
            users: 0,
            slots,
            epoch,
            first_bit,
            recovered,
            on_disk,
            writes,
        });
        SsdStorage { index, incarnation }
    }

    pub(super) fn knows(&self, identity: &str) -> bool {
        self.entries.iter().flatten().any(|e| e.identity == identity)
    }

    pub(super) fn add_user(&mut self, s: SsdStorage, stamp: Option<Stamp>) {
        if let Some(entry) = self.entry_mut(s.index).filter(|e| e.incarnation == s.incarnation) {
            let changed = entry.users == 0 && entry.stamp != stamp;
            if changed {
                entry.stamp = stamp;
            }
            entry.recovered = false;
            entry.users = entry.users.saturating_add(1);
            self.changed |= changed;
        }
    }

    pub(super) fn remove_user(&mut self, s: SsdStorage) {
        if let Some(entry) = self.entry_mut(s.index).filter(|e| e.incarnation == s.incarnation) {
            entry.users = entry.users.saturating_sub(1);
        }
    }

    pub(super) fn set_stamp(&mut self, s: SsdStorage, stamp: Option<Stamp>) {
        if let Some(entry) = self.entry_mut(s.index).filter(|e| e.incarnation == s.incarnation) {
            let changed = entry.stamp != stamp;
            entry.stamp = stamp;
            self.changed |= changed;
        }
    }

    pub(super) fn first_bit(&self, index: u16) -> u64 {
        self.entry(index).map_or(0, |e| e.first_bit)
    }

    fn displace(&mut self, index: u16) {
        let incarnation = self.incarnations;
        if let Some(old) = self.entry(index).filter(|e| e.on_disk) {
            let identity = old.identity.clone();
            self.displaced.push((identity, incarnation));
        }
    }

    /// Storages that are off the disk once the table is written and synced.
    pub(super) fn displaced(&self) -> Displaced {
        self.displaced.clone()
    }

    pub(super) fn forget_displaced(&mut self, gone: &Displaced) {
        self.displaced.retain(|displaced| !gone.contains(displaced));
    }

    /// Whether records of a storage may be on the disk.
    pub(super) fn is_on_disk(&self, index: u16) -> bool {
        self.entry(index).is_some_and(|e| e.on_disk)
    }

    /// From now on storages with slots count as being on the disk. Returns the end of those that do.
    pub(super) fn put_on_disk(&mut self) -> u32 {
        for entry in self.entries.iter_mut().flatten().filter(|e| e.slots > 0 && !e.on_disk) {
            entry.on_disk = true;
            self.changed = true;
        }
        self.on_disk_end()
    }

    /// The slab has a new identity: nothing of it counts.
    pub(super) fn none_on_disk(&mut self) {
        self.entries.iter_mut().flatten().for_each(|e| e.on_disk = false);
        self.displaced.clear();
        self.changed = true;
    }

    pub(super) fn on_disk_end(&self) -> u32 {
        let last = self.entries.iter().rposition(|e| e.as_ref().is_some_and(|e| e.on_disk));
        last.map_or(0, |last| last as u32 + 1)
    }

    /// Entries for the table of a slab in use: those with slots, or `all` that are there now.
    pub(super) fn kept_on_disk(&self, all: bool) -> impl Iterator<Item = (u16, TableEntry)> {
        self.entries_of(move |e| e.on_disk && (all || e.slots > 0))
    }

    /// Entries worth keeping on disk: those with slots.
    pub(super) fn kept(&self) -> impl Iterator<Item = (u16, TableEntry)> {
        self.entries_of(|e| e.slots > 0)
    }

    fn entries_of(&self, which: impl Fn(&Storage) -> bool) -> impl Iterator<Item = (u16, TableEntry)> {
        self.entries.iter().enumerate().filter_map(move |(index, entry)| {
            let entry = entry.as_ref().filter(|entry| which(entry))?;
            let entry = TableEntry { identity: entry.identity.clone(), stamp: entry.stamp, epoch: entry.epoch };
            Some((index as u16, entry))
        })
    }

    /// Slots by identity, of storages that have any, most first.
    pub(super) fn usage(&self) -> Vec<(String, u64)> {
        let used = self.entries.iter().flatten().filter(|e| e.slots > 0);
        let mut usage: Vec<_> = used.map(|e| (e.identity.clone(), u64::from(e.slots))).collect();
        usage.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        usage
    }

    pub(super) fn bytes(&self) -> u64 {
        let strings: usize = self.entries.iter().flatten().map(|e| e.identity.capacity()).sum();
        (strings + self.entries.capacity() * size_of::<Option<Storage>>()) as u64
    }
}
