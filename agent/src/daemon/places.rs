//! The regular look at stores: whether they are where they were opened, and how large they are.
//!
//! - [`look_at_stores`]: starts a round of looks
//! - [`Looking`]: what is being looked at; a file system that hangs holds up the looks at its own files, and nothing else
//! - [`astray`]: what is said of a disk whose store is not where it was opened; [`lost_if_closed`]: what its end would cost
//!
//! A file that was deleted or replaced under its guest serves on, and is gone when prestaged ends: nothing but this look tells of it.

use super::Shared;
use super::disks::{Entry, Served};
use parking_lot::Mutex;
use prestage_cache::backend::Astray;
use prestage_cache::{Looked, StorageHandle};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What hangs at once, if anything does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Ground {
    /// A file system by its number; 0: devices.
    FileSystem(u64),
    /// Images of a disk that a qemu-storage-daemon has open: on whatever file systems.
    Images(u32),
}

/// One look.
enum Look {
    File(StorageHandle),
    Images(Entry),
    Size(Entry),
}

/// Grounds that somebody looks at, until he has come back.
#[derive(Clone, Default, Debug)]
pub(super) struct Looking(Arc<Mutex<BTreeSet<Ground>>>);

struct Turn {
    looking: Looking,
    ground: Ground,
}

impl Looking {
    /// `None`: whoever looked last has not come back.
    fn begin(&self, ground: Ground) -> Option<Turn> {
        let free = self.0.lock().insert(ground);
        free.then(|| Turn { looking: self.clone(), ground })
    }

    /// Looks at each ground on a thread of its own.
    fn go<L: Send + 'static>(&self, rounds: BTreeMap<Ground, Vec<L>>, look: impl Fn(L) + Clone + Send + 'static) {
        for (ground, looks) in rounds {
            let (Some(turn), look) = (self.begin(ground), look.clone()) else { continue };
            let round = move || {
                let _turn = turn;
                looks.into_iter().for_each(look);
            };
            if let Err(error) = std::thread::Builder::new().name("look".to_owned()).spawn(round) {
                tracing::warn!(%error, "stores are not looked at");
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.looking.0.lock().remove(&self.ground);
    }
}

/// Has all stores looked at that are files or devices. Does not wait for it.
pub(super) fn look_at_stores(daemon: &Shared) {
    let mut rounds: BTreeMap<Ground, Vec<Look>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for entry in daemon.disks.list() {
        let Ok(served) = &entry.state else { continue };
        for storage in served.storage.chain().filter(|storage| seen.insert(storage.id())) {
            rounds.entry(ground(storage)).or_default().push(Look::File(storage.clone()));
        }
        if served.qemu.is_some() {
            rounds.entry(Ground::Images(served.id)).or_default().push(Look::Images(entry.clone()));
        }
        rounds.entry(ground(&served.storage)).or_default().push(Look::Size(entry));
    }
    let shared = daemon.clone();
    daemon.looking.go(rounds, move |look| match look {
        Look::File(storage) => look_for_file(&shared, &storage),
        Look::Images(entry) => look_for_images(&entry),
        Look::Size(entry) => shared.disks.refresh_size(&shared.host(), &entry, false),
    });
}

fn ground(storage: &StorageHandle) -> Ground {
    Ground::FileSystem(storage.info().version_stamp.map_or(0, |stamp| stamp.device))
}

fn look_for_file(daemon: &Shared, storage: &StorageHandle) {
    if let Some(looked) = storage.look_for_file() {
        let disks = daemon.disks.on_storage(storage.identity()).join(", ");
        tell(&disks, &looked, std::process::id());
    }
}

fn look_for_images(entry: &Entry) {
    let Ok(served) = &entry.state else { return };
    if let Some((looked, pid)) = served.qemu.as_ref().and_then(|qemu| qemu.look_for_files()) {
        tell(&entry.definition.name, &looked, pid);
    }
}

/// Loud when something changes, and in `status` for as long as it lasts.
fn tell(disks: &str, Looked { before, now }: &Looked, pid: u32) {
    match (before, now) {
        (before, Some(astray)) if before.as_ref() != Some(astray) => tracing::warn!(disks, "{}", words(astray, pid)),
        (Some(was), None) => {
            tracing::info!(disks, path = %was.path.display(), "the store is where it was opened again");
        }
        _ => {}
    }
}

/// What is said of a disk whose store, or images below it, are not where they were opened: of each of them.
pub(super) fn astray(served: &Served) -> Option<String> {
    let said: Vec<String> = all_astray(served).iter().map(|(astray, pid)| words(astray, *pid)).collect();
    (!said.is_empty()).then(|| said.join("; "))
}

/// What is lost, and how it is saved, if a disk is closed now; `None`: nothing, as far as the last look has found.
pub(super) fn lost_if_closed(served: &Served) -> Option<String> {
    let lost = |astray: &Astray| astray.now.is_none() && !astray.is_device;
    let said: Vec<String> =
        all_astray(served).iter().filter(|(astray, _)| lost(astray)).map(|(astray, pid)| words(astray, *pid)).collect();
    (!said.is_empty()).then(|| said.join("; "))
}

/// With the process that has it open.
fn all_astray(served: &Served) -> Vec<(Astray, u32)> {
    let own = served.storage.chain().filter_map(StorageHandle::astray).map(|astray| (astray, std::process::id()));
    own.chain(served.qemu.as_ref().and_then(|qemu| qemu.astray())).collect()
}

/// What has happened, what it costs, and how the data is saved. `pid`: who has the file open.
fn words(astray: &Astray, pid: u32) -> String {
    let path = astray.path.display();
    let now = astray.now.as_ref().map(|now| now.display().to_string());
    if astray.is_device {
        let now = now.map_or_else(String::new, |now| format!(", which is {now}"));
        return format!(
            "{path} leads to something else than the device that is served{now}, and the next start of prestaged takes that: stop the \
             machine, then take the disk out and add it by the name that is meant"
        );
    }
    if let Some(now) = now {
        let instead = if astray.replaced { "serves what is there now" } else { "does not find it" };
        return format!(
            "{path} was moved to {now} while it is served: prestaged goes on with it, but its next start {instead}; move it back, or take \
             the disk out and add it by its new name"
        );
    }
    let what = if astray.replaced { "replaced by another file" } else { "deleted" };
    let copied = match astray.descriptor {
        Some(descriptor) => {
            format!(
                "stop the machine and NBD clients, `cp -p --sparse=always /proc/{pid}/fd/{descriptor} {path}.saved` as root"
            )
        }
        None => format!(
            "stop the machine and NBD clients, find its number by `ls -l /proc/{pid}/fd`, `cp -p --sparse=always /proc/{pid}/fd/NUMBER {path}.saved` as root"
        ),
    };
    let meant = if astray.replaced {
        ". If what is there now is that copy, or meant to be served: restart prestaged"
    } else {
        ""
    };
    format!(
        "{path} was {what} while it is served: prestaged goes on with the file that was there, which is lost when prestaged ends or is \
         upgraded, or the disk is taken out. To save it: {copied}, put the copy in the place of {path}, and restart prestaged{meant}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::sync::mpsc::channel;

    #[test]
    fn a_file_system_that_hangs_holds_up_nobody_and_is_asked_once() {
        let looking = Looking::default();
        let (came, comes) = channel();
        let (release, hangs) = channel::<()>();
        let hangs = Arc::new(Mutex::new(hangs));
        let look = move |number: u32| {
            came.send(number).unwrap();
            if number == 1 {
                let _ = hangs.lock().recv();
            }
        };
        let rounds = |numbers: &[u32]| -> BTreeMap<Ground, Vec<u32>> {
            numbers.iter().map(|number| (Ground::FileSystem(u64::from(*number)), vec![*number])).collect()
        };
        looking.go(rounds(&[1]), look.clone());
        assert_eq!(comes.recv(), Ok(1));
        // The first has not come back: it is left out, and the second is looked at.
        looking.go(rounds(&[1, 2]), look.clone());
        assert_eq!(comes.recv(), Ok(2));
        release.send(()).unwrap();
        while looking.0.lock().contains(&Ground::FileSystem(1)) {
            std::thread::yield_now();
        }
        assert!(comes.try_recv().is_err(), "it was asked twice");
        looking.go(rounds(&[1]), look);
        assert_eq!(comes.recv(), Ok(1));
        drop(release);
    }

    #[test]
    fn words_say_what_happened_and_how_the_data_is_saved() {
        let astray = |replaced, now: Option<&str>, descriptor| Astray {
            path: "/srv/a.raw".into(),
            replaced,
            now: now.map(PathBuf::from),
            is_device: false,
            descriptor,
        };
        let deleted = words(&astray(false, None, Some(7)), 12);
        assert!(
            deleted.contains("/srv/a.raw was deleted while")
                && deleted.contains("`cp -p --sparse=always /proc/12/fd/7 /srv/a.raw.saved`"),
            "{deleted}"
        );
        assert!(words(&astray(true, None, None), 12).contains("replaced by another file"));
        assert!(words(&astray(true, None, None), 12).contains("`ls -l /proc/12/fd`"));
        let moved = words(&astray(true, Some("/srv/b.raw"), Some(7)), 12);
        assert!(moved.contains("moved to /srv/b.raw") && moved.contains("serves what is there now"), "{moved}");
        assert!(words(&astray(false, Some("/srv/b.raw"), Some(7)), 12).contains("does not find it"));
        let device = Astray { is_device: true, ..astray(true, Some("/dev/sdb"), Some(7)) };
        assert!(words(&device, 12).contains("the device that is served, which is /dev/sdb"));
    }
}
