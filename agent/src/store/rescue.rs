//! A database that cannot be used is no reason to leave machines without their disks.
//!
//! A damaged one is set aside under another name, and a new one begun. Anything else (locked, on a file system that refuses writes,
//! full, of a newer version, another program's) is left as it is, and a *stand-in* that ends with the daemon takes its place. Either
//! way what machines and their managers rely on is carried over as far as it can be read (`carry.rs`). Events that are still to be told
//! are only taken from one that is set aside: in one that is left as it is they wait for the next start.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::carry::carry;
use super::{Store, StoreError, suspect};

/// A database that can be used.
#[derive(Debug)]
pub struct Rescued {
    pub store: Store,
    /// Why it is not the one of before, what was kept of that, and what to do.
    pub trouble: Option<String>,
    /// What is written is gone when the daemon ends.
    pub stand_in: bool,
}

/// Opens the database at `path`. Where that cannot be done, sets it aside or opens one at `stand_in`, whose file of before goes.
/// Blocks its thread. Errors: those of [`Store::open`] for what takes its place.
pub fn open_or_rescue(path: &Path, stand_in: &Path) -> Result<Rescued, StoreError> {
    let error = match Store::open(path) {
        Ok(store) => return Ok(Rescued { store, trouble: None, stand_in: false }),
        Err(error) => error,
    };
    if let StoreError::Damaged { detail, .. } = &error {
        match set_aside(path) {
            Ok(kept) => {
                let store = Store::open(path)?;
                let carried = carry(&kept, &store, true);
                let trouble = format!(
                    "database {} was damaged ({detail}); it is kept as {} and a new one begun: history, series, decisions and \
                     models begin anew; {carried}",
                    path.display(),
                    kept.display()
                );
                return Ok(Rescued { store, trouble: Some(trouble), stand_in: false });
            }
            Err(error) => tracing::error!(path = %path.display(), %error, "damaged database not set aside"),
        }
    }
    for file in files(stand_in) {
        // What cannot be removed fails when it is opened.
        let _ = std::fs::remove_file(file);
    }
    let store = Store::open(stand_in)?;
    let carried = carry(path, &store, false);
    let trouble = format!(
        "{error}; until that is mended and prestaged restarted nothing new is kept, {} stands in; {carried}",
        stand_in.display()
    );
    Ok(Rescued { store, trouble: Some(trouble), stand_in: true })
}

/// A database's file and those that SQLite keeps beside it.
fn files(path: &Path) -> [PathBuf; 3] {
    ["", "-wal", "-shm"].map(|suffix| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    })
}

/// Renames a database to a name with the time. Returns the new path.
fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let named = |number: u64| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".damaged-{number}"));
        PathBuf::from(name)
    };
    // Nothing that was kept before is overwritten, whatever the clock says.
    let mut number = now;
    while files(&named(number)).iter().any(|file| file.symlink_metadata().is_ok()) {
        number += 1;
    }
    let [database, log, index] = files(path);
    let [kept, kept_log, kept_index] = files(&named(number));
    // What it was suspected of is so.
    let _ = std::fs::remove_file(suspect(path));
    // The log first: without it the database is one of before, with it beside a new database it would be that one's.
    for (from, to) in [(log, kept_log), (index, kept_index), (database, kept.clone())] {
        match std::fs::rename(from, to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rusqlite::Connection;

    use super::super::DiskRow;
    use super::*;

    fn disk(name: &str) -> DiskRow {
        DiskRow { name: name.to_owned(), store: format!("/srv/{name}"), ..DiskRow::default() }
    }

    const LONG: Duration = Duration::from_secs(60);

    fn names(store: &Store) -> Vec<String> {
        store.disks().unwrap().into_iter().map(|disk| disk.name).collect()
    }

    /// A database with two disks and enough profiles for pages of its own.
    fn filled(path: &Path) {
        let store = Store::open(path).unwrap();
        store.add_disk(disk("a")).wait().unwrap();
        store.add_disk(disk("b")).wait().unwrap();
        for n in 0..50 {
            store.save_profile(&format!("s{n}"), vec![n; 3000], 1, 1).wait().unwrap();
        }
        assert!(store.close(LONG));
    }

    #[test]
    fn a_damaged_database_is_kept_and_its_disks_go_on() {
        let folder = tempfile::tempdir().unwrap();
        let (path, stand_in) = (folder.path().join("a b?c#%.db"), folder.path().join("stand-in.db"));
        filled(&path);
        let mut bytes = std::fs::read(&path).unwrap();
        let end = bytes.len();
        bytes[end - 100_000..].fill(0);
        std::fs::write(&path, &bytes).unwrap();
        let Rescued { store, trouble, stand_in: standing } = open_or_rescue(&path, &stand_in).unwrap();
        let trouble = trouble.unwrap();
        assert!(
            !standing && trouble.contains("was damaged") && trouble.contains("2 disks added at run time"),
            "{trouble}"
        );
        assert_eq!(names(&store), ["a", "b"]);
        // What lay on other pages than those is still known.
        let profiles = store.profiles().unwrap().len();
        assert!(
            (1..50).contains(&profiles) && trouble.contains(&format!("{profiles} profiles")),
            "{profiles}, {trouble}"
        );
        let kept = |entry: std::io::Result<std::fs::DirEntry>| {
            let path = entry.unwrap().path();
            path.to_str().unwrap().contains(".db.damaged-").then_some(path)
        };
        let kept: Vec<PathBuf> = std::fs::read_dir(folder.path()).unwrap().filter_map(kept).collect();
        // Opening it wrote to its first page.
        let same = |file: &PathBuf| std::fs::read(file).unwrap().get(4096..) == bytes.get(4096..);
        assert!(kept.iter().any(same), "{kept:?}");
        assert!(store.close(LONG));
        drop(store);

        // All of it garbage, twice within a second: both are kept.
        for _ in 0..2 {
            std::fs::write(&path, [b'x'; 8192]).unwrap();
            let Rescued { store, trouble, .. } = open_or_rescue(&path, &stand_in).unwrap();
            let trouble = trouble.unwrap();
            assert!(trouble.contains("must be added again"), "{trouble}");
            assert!(names(&store).is_empty() && store.close(LONG));
        }
        let garbage = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read(entry.unwrap().path()).unwrap();
        let copies = std::fs::read_dir(folder.path()).unwrap().map(garbage).filter(|bytes| *bytes == [b'x'; 8192]);
        assert_eq!(copies.count(), 2);
        assert_eq!(open_or_rescue(&path, &stand_in).unwrap().trouble, None);
        assert!(!stand_in.exists());
    }

    #[test]
    fn a_database_that_cannot_be_had_is_left_alone_and_stood_in_for() {
        let folder = tempfile::tempdir().unwrap();
        let (path, stand_in) = (folder.path().join("db"), folder.path().join("run/db"));
        filled(&path);
        let raw = Connection::open(&path).unwrap();
        raw.pragma_update(None, "user_version", 99).unwrap();
        drop(raw);
        for _ in 0..2 {
            let rescued = open_or_rescue(&path, &stand_in).unwrap();
            let trouble = rescued.trouble.unwrap();
            assert!(rescued.stand_in && trouble.contains("version 99") && trouble.contains("stands in"), "{trouble}");
            assert_eq!(names(&rescued.store), ["a", "b"]);
            rescued.store.add_disk(disk("c")).wait().unwrap();
            assert!(rescued.store.close(LONG));
        }
        let raw = Connection::open(&path).unwrap();
        raw.pragma_update(None, "user_version", super::super::schema::VERSION).unwrap();
        // Kept open by another process that lets nobody in.
        raw.pragma_update(None, "locking_mode", "EXCLUSIVE").unwrap();
        raw.execute_batch("BEGIN EXCLUSIVE").unwrap();
        let rescued = open_or_rescue(&path, &stand_in).unwrap();
        let trouble = rescued.trouble.unwrap();
        assert!(rescued.stand_in && trouble.contains("locked by another process"), "{trouble}");
        assert_eq!(names(&rescued.store), ["a", "b"]);
        assert!(rescued.store.close(LONG));
        drop(raw);
        let rescued = open_or_rescue(&path, &stand_in).unwrap();
        assert_eq!((rescued.trouble, names(&rescued.store)), (None, vec!["a".to_owned(), "b".to_owned()]));
    }
}
