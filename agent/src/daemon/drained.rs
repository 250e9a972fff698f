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
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const NAME: &str = "tiers.drained";

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
}

impl Drained {
    /// What is on record and concerns the tiers of this configuration. A record that cannot be read leaves the SSD tier out: its disk may be
    /// about to be pulled, and what is missed is speed.
    pub(super) fn load(config: &Config) -> Drained {
        let path = Drained::path(&config.daemon.state_dir);
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Drained::default(),
            other => other,
        };
        let read = text.and_then(|text| serde_json::from_str(&text).map_err(io::Error::from));
        let mut drained: Drained = read.unwrap_or_else(|error| {
            tracing::error!(
                path = %path.display(), %error,
                "it cannot be read which tiers an operator took out of service; the SSD tier stays out until `prestagectl cache resume --ssd`"
            );
            let path = config.cache.ssd_path.clone().unwrap_or_default();
            Drained { ram: None, ssd: Some(DrainedSsd { since_unix_ms: 0, path }) }
        });
        drained.ssd = drained.ssd.filter(|ssd| Some(&ssd.path) == config.cache.ssd_path.as_ref());
        drained
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
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
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
        let when = if since_unix_ms > 0 { format!(" at {}", minute(since_unix_ms)) } else { String::new() };
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
        let ssd = DrainedSsd { since_unix_ms: 1_795_362_000_000, path: "/cache/a".into() };
        let both = Drained { ram: Some(7), ssd: Some(ssd) };
        both.save(at).unwrap();
        assert_eq!(Drained::load(&here), both);
        // Of another tier nobody said anything.
        let other = Drained { ram: Some(7), ssd: None };
        assert_eq!(Drained::load(&config(at, Some("/cache/b"))), other);
        assert_eq!(Drained::load(&config(at, None)), other);
        let whole = std::fs::read(at.join(NAME)).unwrap();
        for rotten in [&whole[..whole.len() - 1], b"", b"{\"ram\": -1}", &[0xff; 40]] {
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
    fn it_is_said_since_when() {
        let said = Drained::words(1_795_362_000_000, "ssd");
        assert_eq!(
            said,
            "drained by an operator at 2026-11-22 15:40 UTC; `prestagectl cache resume --ssd` brings it back, empty"
        );
        assert!(Drained::words(0, "ssd").starts_with("drained by an operator;"));
    }
}
