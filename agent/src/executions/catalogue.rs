//! The profiles of all programs, and whose is used for what.

use std::collections::{BTreeMap, BTreeSet};

use super::{Execution, Key, Profile};

/// Most profiles kept; of those beyond, what ran longest ago goes. A profile takes one to five KiB.
const PROFILES_MAX: usize = 4096;
/// Executions of a profile before it is believed.
const KNOWN: u64 = 3;
/// Machines whose last program is remembered.
const MACHINES_MAX: usize = 4096;
/// A program comes after another if it starts within this.
const AFTER_S: u64 = 3600;

/// Which profile was found for a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Of this program, these tags and this size of input.
    Exact,
    /// Of this program, whatever the size of its input and its tags.
    Program,
    /// Of what has the same tags.
    Tags,
}

/// What is to be written to the database, or removed from it.
#[derive(Debug, Clone, PartialEq)]
pub enum Kept {
    Changed(Key),
    Gone(Key),
}

/// The profiles of a host's programs.
#[derive(Debug, Default)]
pub struct Catalogue {
    profiles: BTreeMap<Key, Profile>,
    /// By machine: the program that started last, and when (Unix s).
    last: BTreeMap<String, (String, u64)>,
    /// What has changed since it was asked for.
    changed: BTreeSet<Key>,
    gone: BTreeSet<Key>,
}

impl Catalogue {
    /// With the profiles of before.
    #[must_use]
    pub fn new(profiles: impl IntoIterator<Item = (Key, Profile)>) -> Self {
        let mut catalogue = Self { profiles: profiles.into_iter().collect(), ..Self::default() };
        catalogue.shrink();
        catalogue
    }

    /// Learns from an execution on a machine that has ended.
    pub fn learn(&mut self, vm: &str, execution: &Execution) {
        let Key { program, tags, .. } = &execution.key;
        let any_size = Key { program: program.clone(), tags: Vec::new(), size_class: None };
        let mut keys = vec![execution.key.clone(), any_size.clone()];
        if !tags.is_empty() {
            keys.push(Key { program: String::new(), tags: tags.clone(), size_class: None });
        }
        keys.dedup();
        for key in keys {
            let profile = self.profiles.entry(key.clone()).or_insert_with(|| Profile::new(execution.started_s));
            profile.add(execution);
            self.changed.insert(key);
        }
        self.follow(vm, execution, any_size);
        self.shrink();
    }

    /// Notes what came after what on a machine. Executions that overlap are told of in the order of their ends, hence the look at starts.
    fn follow(&mut self, vm: &str, execution: &Execution, key: Key) {
        let program = &execution.key.program;
        let before = self.last.get(vm).cloned();
        if let Some((before, at_s)) = &before
            && *at_s <= execution.started_s
            && execution.started_s - at_s <= AFTER_S
        {
            let key = Key { program: before.clone(), ..key };
            if let Some(profile) = self.profiles.get_mut(&key) {
                profile.followed_by(program);
                self.changed.insert(key);
            }
        }
        if before.is_none_or(|(_, at_s)| at_s <= execution.started_s) {
            self.last.insert(vm.to_owned(), (program.clone(), execution.started_s));
        }
        if self.last.len() > MACHINES_MAX {
            let oldest = self.last.iter().min_by_key(|(_, (_, at_s))| *at_s).map(|(vm, _)| vm.clone());
            oldest.and_then(|vm| self.last.remove(&vm));
        }
    }

    fn shrink(&mut self) {
        while self.profiles.len() > PROFILES_MAX {
            let oldest = self.profiles.iter().min_by_key(|(_, profile)| profile.last_s).map(|(key, _)| key.clone());
            let Some(key) = oldest else { return };
            self.profiles.remove(&key);
            self.changed.remove(&key);
            self.gone.insert(key);
        }
    }

    /// What is known of a program about to run: the narrowest profile with enough executions.
    #[must_use]
    pub fn find(&self, key: &Key) -> Option<(&Profile, Found)> {
        let any_size = Key { program: key.program.clone(), tags: Vec::new(), size_class: None };
        let tags = Key { program: String::new(), tags: key.tags.clone(), size_class: None };
        let known = |key: &Key| self.profiles.get(key).filter(|profile| profile.count >= KNOWN);
        let exact = known(key).map(|profile| (profile, Found::Exact));
        let program = || known(&any_size).map(|profile| (profile, Found::Program));
        let tagged = || known(&tags).filter(|_| !key.tags.is_empty()).map(|profile| (profile, Found::Tags));
        exact.or_else(program).or_else(tagged)
    }

    /// A profile by its own key, however little is in it.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<&Profile> {
        self.profiles.get(key)
    }

    /// All profiles by key.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Profile)> {
        self.profiles.iter()
    }

    /// What the database has to be told since this was last asked.
    pub fn changes(&mut self) -> Vec<Kept> {
        let mut changes: Vec<Kept> = std::mem::take(&mut self.changed).into_iter().map(Kept::Changed).collect();
        let gone = std::mem::take(&mut self.gone);
        changes.extend(gone.into_iter().filter(|key| !self.profiles.contains_key(key)).map(Kept::Gone));
        changes
    }
}
