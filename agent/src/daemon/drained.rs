//! What an operator took out of service, on record beside the database, so that a restart leaves it out.
//!
//! - [`Drained`]: the tiers that are out, since when
//!
//! `tiers.drained` in the state's folder, JSON. Written before a tier goes out and taken back after it came in: a daemon that dies in
//! between leaves out what was to go, and what was to come.

use crate::calendar::rfc3339;
use crate::config::Config;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const NAME: &str = "tiers.drained";

/// A record is two times and a path.
const MOST_BYTES: u64 = 64 << 10;

/// The end of the year 9999, the last that is written with four digits.
const LAST_UNIX_MS: u64 = 253_402_300_799_999;

/// Tiers that are out of service.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub(super) struct Drained {
    /// Since when, in Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ram: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ssd: Option<DrainedSsd>,
}

/// An SSD tier that is out of service.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub(super) struct DrainedSsd {
    pub(super) since_unix_ms: u64,
    /// As the configuration has it. One with another path means another tier, which nobody took out.
    pub(super) path: PathBuf,
    /// The mount point that its file lay on. None: it was a device, was not in use, or an earlier version wrote this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) mount: Option<PathBuf>,
    /// What was wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) was_failing: Option<String>,
}

impl DrainedSsd {
    /// What is said of it; `open`: why its file is not closed.
    pub(super) fn words(&self, open: Option<&str>) -> String {
        let open = open.map(|why| format!("; {why}")).unwrap_or_default();
        let failing = self.was_failing.as_ref().map(|why| format!("; was failing: {why}")).unwrap_or_default();
        Drained::words(self.since_unix_ms, "ssd") + &open + &failing
    }
}

impl Drained {
    /// What is on record and concerns the tiers of this configuration. A record that cannot be read leaves the SSD tier out: its disk may be
    /// about to be pulled, and what is missed is speed.
    pub(super) fn load(config: &Config) -> Drained {
        let path = Drained::path(&config.daemon.state_dir);
        let read = match Drained::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Drained::default(),
            other => other,
        };
        let mut drained = read.unwrap_or_else(|error| {
            tracing::error!(
                path = %path.display(), %error,
                "it cannot be read which tiers an operator took out of service; the SSD tier stays out until `prestagectl cache resume --ssd`"
            );
            let path = config.cache.ssd_path.clone().unwrap_or_default();
            Drained { ram: None, ssd: Some(DrainedSsd { path, ..DrainedSsd::default() }) }
        });
        drained.ssd = drained.ssd.filter(|ssd| Some(&ssd.path) == config.cache.ssd_path.as_ref());
        drained
    }

    /// The daemon's user may have put there what it likes: nothing waits for it, and nothing takes more than a little memory.
    fn read(path: &Path) -> io::Result<Drained> {
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        let mut bytes = Vec::new();
        file.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MOST_BYTES {
            return Err(io::Error::other(format!("it has more than {MOST_BYTES} bytes")));
        }
        // Of an array each field would be one that is missing.
        let object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&bytes)?;
        let mut drained: Drained = serde_json::from_value(object.into())?;
        // When is not worth more than that it is out.
        let times = drained.ram.iter_mut().chain(drained.ssd.as_mut().map(|ssd| &mut ssd.since_unix_ms));
        times.filter(|time| **time > LAST_UNIX_MS).for_each(|time| *time = 0);
        Ok(drained)
    }

    /// Puts it on record, durably, whole or not at all.
    ///
    /// # Errors
    /// What the kernel says; on record is what was there before.
    pub(super) fn save(&self, state_dir: &Path) -> io::Result<()> {
        let path = Drained::path(state_dir);
        if *self == Drained::default() {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => other?,
            }
        } else {
            let draft = path.with_added_extension("new");
            match std::fs::remove_file(&draft) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            // What lies there by now is nothing of ours.
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&draft)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.sync_all()?;
            std::fs::rename(&draft, &path)?;
        }
        File::open(state_dir)?.sync_all()
    }

    pub(super) fn path(state_dir: &Path) -> PathBuf {
        state_dir.join(NAME)
    }

    /// What is said of a tier that is out; `option` is the command's.
    pub(super) fn words(since_unix_ms: u64, option: &str) -> String {
        let when = if (1..=LAST_UNIX_MS).contains(&since_unix_ms) {
            format!(" at {}", minute(since_unix_ms))
        } else {
            String::new()
        };
        format!("drained by an operator{when}; `prestagectl cache resume --{option}` brings it back, empty")
    }
}

/// A point in time for people: `2026-11-22 15:40 UTC`.
pub(super) fn minute(unix_ms: u64) -> String {
    let when = rfc3339(unix_ms.saturating_mul(1000));
    format!("{} UTC", when.get(..16).unwrap_or(&when).replace('T', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path, ssd: Option<&str>) -> Config {
        let mut config = Config::default();
        config.daemon.state_dir = folder.to_owned();
        config.cache.ssd_path = ssd.map(PathBuf::from);
        config
    }

    #[test]
    fn what_is_out_is_read_back_and_what_cannot_be_read_leaves_the_ssd_out() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let here = config(at, Some("/cache/a"));
        assert_eq!(Drained::load(&here), Drained::default());
        let ssd = DrainedSsd {
            since_unix_ms: 1_795_362_000_000,
            path: "/cache/a".into(),
            mount: Some("/cache".into()),
            was_failing: Some("it fails".into()),
        };
        let both = Drained { ram: Some(7), ssd: Some(ssd) };
        both.save(at).unwrap();
        assert_eq!(Drained::load(&here), both);
        // Of another tier nobody said anything.
        let other = Drained { ram: Some(7), ssd: None };
        assert_eq!(Drained::load(&config(at, Some("/cache/b"))), other);
        assert_eq!(Drained::load(&config(at, None)), other);
        let whole = std::fs::read(at.join(NAME)).unwrap();
        // A good one, but for its length.
        let long = [whole.clone(), vec![b' '; MOST_BYTES as usize]].concat();
        for rotten in [&whole[..whole.len() - 1], b"", b"{\"ram\": -1}", &[0xff; 40], b"[]", b"[7]", b"null", &long] {
            std::fs::write(at.join(NAME), rotten).unwrap();
            let found = Drained::load(&here);
            assert!(found.ram.is_none() && found.ssd.is_some(), "{found:?} of {rotten:?}");
        }
        Drained::default().save(at).unwrap();
        assert!(!at.join(NAME).exists());
        Drained::default().save(at).unwrap();
        assert!(both.save(&at.join("missing")).is_err());
        // One that cannot be written leaves what was there.
        other.save(at).unwrap();
        std::fs::create_dir(at.join("tiers.drained.new")).unwrap();
        assert!(both.save(at).is_err());
        assert_eq!(Drained::load(&here), other);
    }

    #[test]
    fn what_is_no_file_is_neither_waited_for_nor_followed_nor_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let (here, path) = (config(at, Some("/cache/a")), at.join(NAME));
        let out = || Drained::load(&here).ssd.is_some();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(out(), "a pipe that nobody writes to");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(at.join("empty"), "{}").unwrap();
        std::os::unix::fs::symlink(at.join("empty"), &path).unwrap();
        assert!(out(), "a link");
        std::os::unix::fs::symlink(at.join("empty"), at.join("tiers.drained.new")).unwrap();
        Drained { ram: Some(7), ssd: None }.save(at).unwrap();
        assert_eq!(std::fs::read(at.join("empty")).unwrap(), b"{}");
        assert_eq!(Drained::load(&here), Drained { ram: Some(7), ssd: None });
    }

    #[test]
    fn a_time_beyond_the_calendar_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let here = config(folder.path(), Some("/cache/a"));
        for (since, found) in [(LAST_UNIX_MS, LAST_UNIX_MS), (LAST_UNIX_MS + 1, 0), (u64::MAX, 0)] {
            let ssd = DrainedSsd { since_unix_ms: since, path: "/cache/a".into(), ..DrainedSsd::default() };
            Drained { ram: Some(since), ssd: Some(ssd) }.save(folder.path()).unwrap();
            let drained = Drained::load(&here);
            assert_eq!((drained.ram, drained.ssd.unwrap().since_unix_ms), (Some(found), found));
        }
        assert!(Drained::words(LAST_UNIX_MS, "ram").contains("at 9999-12-31 23:59 UTC;"));
        assert!(Drained::words(u64::MAX, "ram").starts_with("drained by an operator;"));
    }

    #[test]
    fn a_record_of_an_earlier_version_counts() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(NAME), "{\"ssd\":{\"since_unix_ms\":7,\"path\":\"/cache/a\"}}").unwrap();
        let wanted = DrainedSsd { since_unix_ms: 7, path: "/cache/a".into(), ..DrainedSsd::default() };
        assert_eq!(Drained::load(&config(folder.path(), Some("/cache/a"))).ssd, Some(wanted));
    }

    #[test]
    fn it_is_said_since_when() {
        let said = Drained::words(1_795_362_000_000, "ssd");
        assert_eq!(
            said,
            "drained by an operator at 2026-11-22 15:40 UTC; `prestagectl cache resume --ssd` brings it back, empty"
        );
        assert!(Drained::words(0, "ssd").starts_with("drained by an operator;"));
        let failing = DrainedSsd { was_failing: Some("it fails".into()), ..DrainedSsd::default() };
        let said = failing.words(None);
        assert!(said.ends_with("brings it back, empty; was failing: it fails"), "{said}");
        let said = failing.words(Some("it is open"));
        assert!(said.ends_with("brings it back, empty; it is open; was failing: it fails"), "{said}");
    }
}
