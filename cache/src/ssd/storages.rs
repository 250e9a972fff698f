//! Which storages the tier knows: their identity strings, their stamps, and who uses them now.

use super::format::{IDENTITY_BYTES, TABLE_ENTRIES, TableEntry};
use super::{SsdError, SsdStorage, Stamp};

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
}

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

#[derive(Debug, Default)]
pub(super) struct Storages {
    entries: Vec<Option<Storage>>,
    incarnations: u32,
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
            entry.slots = entry.slots.saturating_add_signed(by);
        }
    }

    /// Finds or makes the entry of an identity, without raising `users`.
    pub(super) fn register(
        &mut self,
        identity: &str,
        stamp: Option<Stamp>,
    ) -> Result<(SsdStorage, Registration), SsdError> {
        if identity.is_empty() || identity.len() > IDENTITY_BYTES {
            let start = identity.chars().take(40).collect();
            return Err(SsdError::IdentityLength { len: identity.len(), max: IDENTITY_BYTES, start });
        }
        let mut entries = self.entries.iter().enumerate().filter_map(|(index, e)| Some((index as u16, e.as_ref()?)));
        if let Some((index, entry)) = entries.find(|(_, e)| e.identity == identity) {
            let handle = SsdStorage { index, incarnation: entry.incarnation };
            // While it is in use its stamp moves with the guests' own writes.
            let changed = entry.users == 0 && entry.stamp != stamp;
            return Ok((handle, if changed { Registration::Changed } else { Registration::Known }));
        }
        let index = self.unused_index(identity)?;
        let handle = self.put(index, TableEntry { identity: identity.to_owned(), stamp });
        Ok((handle, Registration::New))
    }

    /// An index nobody owns, else that of the unused storage with the fewest slots.
    fn unused_index(&self, identity: &str) -> Result<u16, SsdError> {
        if let Some(free) = self.entries.iter().position(Option::is_none) {
            return Ok(free as u16);
        }
        if self.entries.len() < TABLE_ENTRIES {
            return Ok(self.entries.len() as u16);
        }
        let idle = self.entries.iter().enumerate().filter_map(|(index, e)| Some((index, e.as_ref()?)));
        let idle = idle.filter(|(_, e)| e.users == 0).min_by_key(|(_, e)| e.slots);
        let full = || SsdError::TooManyStorages { max: TABLE_ENTRIES, identity: identity.to_owned() };
        idle.map(|(index, _)| index as u16).ok_or_else(full)
    }

    /// Puts an entry at `index` (below the table's size), whoever was there.
    pub(super) fn put(&mut self, index: u16, entry: TableEntry) -> SsdStorage {
        if self.entries.len() <= usize::from(index) {
            self.entries.resize_with(usize::from(index) + 1, || None);
        }
        self.incarnations = self.incarnations.wrapping_add(1);
        let incarnation = self.incarnations;
        // Slots of the owner before are still counted; dropping them counts them off.
        let slots = self.slots(index);
        let TableEntry { identity, stamp } = entry;
        self.entries[usize::from(index)] = Some(Storage { identity, stamp, incarnation, users: 0, slots });
        SsdStorage { index, incarnation }
    }

    pub(super) fn knows(&self, identity: &str) -> bool {
        self.entries.iter().flatten().any(|e| e.identity == identity)
    }

    pub(super) fn add_user(&mut self, s: SsdStorage, stamp: Option<Stamp>) {
        if let Some(entry) = self.entry_mut(s.index).filter(|e| e.incarnation == s.incarnation) {
            if entry.users == 0 {
                entry.stamp = stamp;
            }
            entry.users = entry.users.saturating_add(1);
        }
    }

    pub(super) fn remove_user(&mut self, s: SsdStorage) {
        if let Some(entry) = self.entry_mut(s.index).filter(|e| e.incarnation == s.incarnation) {
            entry.users = entry.users.saturating_sub(1);
        }
    }

    pub(super) fn set_stamp(&mut self, s: SsdStorage, stamp: Option<Stamp>) {
        if let Some(entry) = self.entry_mut(s.index).filter(|e| e.incarnation == s.incarnation) {
            entry.stamp = stamp;
        }
    }

    /// Entries worth keeping on disk: those with slots.
    pub(super) fn kept(&self) -> impl Iterator<Item = (u16, TableEntry)> {
        self.entries.iter().enumerate().filter_map(|(index, entry)| {
            let entry = entry.as_ref().filter(|e| e.slots > 0)?;
            Some((index as u16, TableEntry { identity: entry.identity.clone(), stamp: entry.stamp }))
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
