//! What the broker may do for the daemon. Sans-I/O: paths in, permits out; what a path means is found out in `broker::open`.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use super::protocol::Refusal;

/// Longest path, `PATH_MAX` of <linux/limits.h> with its final zero.
const PATH_MAX: usize = 4096;

/// What the operator's configuration lets the daemon have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Folders below which files and devices may be opened as stores, or single ones.
    pub allowed: Vec<PathBuf>,
    /// Stores by name, and whether they may be written to.
    pub named: Vec<(PathBuf, bool)>,
    /// The SSD tier's file or device.
    pub tier: Option<PathBuf>,
    /// It was a device at the start: the daemon writes to that, and not to the folder that its path names.
    pub tier_is_device: bool,
    /// Unix sockets of NBD servers by name.
    pub servers: Vec<PathBuf>,
    /// Folders below which the images may be read that images say they stand on.
    pub backing: Vec<PathBuf>,
    /// Where passphrases of images are.
    pub keys: Option<PathBuf>,
    /// Files that may be read: the configuration itself, secrets, certificates.
    pub readable: Vec<PathBuf>,
    /// The daemon's own folders: what is in them it may give to a group.
    pub own: Vec<PathBuf>,
    /// The user it runs as.
    pub user: u32,
    /// That user's groups.
    pub groups: Vec<u32>,
    /// The program `prestage-memory`.
    pub helper: PathBuf,
    /// The program prestaged that is installed, and the words that have it take over.
    pub successor: (PathBuf, Vec<OsString>),
}

/// How far a path may be followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit<'a> {
    /// The operator has named it: wherever its links lead that the daemon cannot have made.
    Named,
    /// Links may lead nowhere out of this folder.
    Below(&'a Path),
    /// Named, in a folder that may be the daemon's: no link of its making counts, nor a file with other names.
    Tier,
}

impl Rules {
    /// Whether a store may be opened, and how far its path may be followed.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn store(&self, path: &Path, write: bool) -> Result<Permit<'_>, Refusal> {
        plain(path)?;
        let named = self.named.iter().any(|(name, writable)| name == path && (*writable || !write));
        if self.tier.as_deref() == Some(path) && !path.starts_with("/dev") {
            return Ok(Permit::Tier);
        }
        if named || self.tier.as_deref() == Some(path) || self.allowed.iter().any(|name| name == path) {
            return Ok(Permit::Named);
        }
        let below = self.below(path).or_else(|| if write { None } else { narrowest(&self.backing, path) });
        below.ok_or_else(|| self.outside(path))
    }

    /// The same for the socket of an NBD server.
    ///
    /// # Errors
    /// As [`Rules::store`].
    pub fn server(&self, path: &Path) -> Result<Permit<'_>, Refusal> {
        plain(path)?;
        if self.servers.iter().chain(&self.allowed).any(|name| name == path) {
            return Ok(Permit::Named);
        }
        self.below(path).ok_or_else(|| self.outside(path))
    }

    /// # Errors
    /// The configuration does not name the file.
    pub fn read(&self, path: &Path) -> Result<(), Refusal> {
        plain(path)?;
        match self.readable.iter().any(|name| name == path) {
            true => Ok(()),
            false => Err(Refusal::rule(format!("{} is not named in the configuration", path.display()))),
        }
    }

    /// Whether a device may be opened that one of these names means.
    #[must_use]
    pub fn device(&self, names: &[PathBuf]) -> bool {
        names.iter().any(|name| plain(name).is_ok() && self.below(name).is_some())
    }

    /// Whether a path, which must be without links, is in one of the daemon's own folders.
    #[must_use]
    pub fn is_own(&self, path: &Path) -> bool {
        plain(path).is_ok() && self.own.iter().any(|folder| path.starts_with(folder))
    }

    /// Folders that the daemon writes to, without links: its own, and that of the SSD tier.
    #[must_use]
    pub fn written(&self) -> Vec<PathBuf> {
        let of_devices = |folder: &Path| folder.starts_with("/dev") && !folder.starts_with("/dev/shm");
        let tier = self.tier.as_deref().filter(|_| !self.tier_is_device).and_then(Path::parent);
        let tier = tier.filter(|folder| !of_devices(folder));
        self.own.iter().cloned().chain(tier.map(Path::to_owned)).collect()
    }

    /// Why a path is not a store, and what to do.
    #[must_use]
    pub fn outside(&self, path: &Path) -> Refusal {
        Refusal::rule(format!(
            "{} is in none of the folders of `store.allowed` ({}), and no `[[disk]]` of the configuration names it; add {} there and save the file: no restart is needed, and `systemctl reload prestaged` tells whether it is right",
            path.display(),
            self.allowed.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", "),
            // All of /dev would be too much.
            if path.starts_with("/dev") { path.display().to_string() } else { "its folder".to_owned() }
        ))
    }

    /// The narrowest folder that the path lies in.
    fn below(&self, path: &Path) -> Option<Permit<'_>> {
        narrowest(&self.allowed, path)
    }

    /// The file with the passphrase of a disk.
    ///
    /// # Errors
    /// There is no folder for them, or the disk's name is no file's.
    pub fn key(&self, disk: &str) -> Result<PathBuf, Refusal> {
        let folder = self.keys.as_ref().filter(|folder| plain(folder).is_ok());
        let folder = folder
            .ok_or_else(|| Refusal { errno: libc::ENOENT, reason: "`store.key_folder` is not set".to_owned() })?;
        let name = format!("{disk}.key");
        match Path::new(&name).file_name() == Some(name.as_ref())
            && !name.contains(['/', '\0'])
            && !name.starts_with('.')
        {
            true => Ok(folder.join(name)),
            false => Err(Refusal::rule(format!("`{}` is no disk's name", disk.escape_debug()))),
        }
    }
}

/// The narrowest of the folders that the path lies in.
fn narrowest<'a>(folders: &'a [PathBuf], path: &Path) -> Option<Permit<'a>> {
    let holds = |folder: &&PathBuf| plain(folder).is_ok() && path.starts_with(folder);
    let folder = folders.iter().filter(holds).max_by_key(|folder| folder.as_os_str().len())?;
    Some(Permit::Below(folder))
}

/// Absolute, without `..`, and of a length that the kernel takes: what it says is where it leads.
fn plain(path: &Path) -> Result<(), Refusal> {
    let bytes = path.as_os_str().as_encoded_bytes();
    let up = path.components().any(|part| matches!(part, Component::ParentDir | Component::Prefix(_)));
    match path.is_absolute() && !up && bytes.len() < PATH_MAX && !bytes.contains(&0) {
        true => Ok(()),
        false => Err(Refusal::rule(format!("`{}` is no absolute path without `..`", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            allowed: vec![
                "/dev/sdb".into(),
                "/var/lib/images".into(),
                "/var/lib/images/deep".into(),
                "/dev/mapper".into(),
            ],
            named: vec![("/srv/a".into(), true), ("/srv/golden".into(), false)],
            tier: Some("/var/cache/prestage/ssd".into()),
            backing: vec!["/srv/base".into()],
            keys: Some("/etc/prestage/keys".into()),
            servers: vec!["/run/nbd.sock".into()],
            readable: vec!["/etc/prestage/prestaged.toml".into()],
            own: vec!["/run/prestage".into()],
            user: 0,
            ..Rules::default()
        }
    }

    #[test]
    fn a_store_is_named_or_lies_below_an_allowed_folder() {
        let rules = rules();
        let store = |path: &str, write| rules.store(Path::new(path), write);
        assert_eq!(store("/srv/a", true), Ok(Permit::Named));
        assert_eq!(store("/srv/golden", false), Ok(Permit::Named));
        assert_eq!(store("/dev/sdb", true), Ok(Permit::Named));
        assert_eq!(store("/var/lib/images/x", true), Ok(Permit::Below(Path::new("/var/lib/images"))));
        assert_eq!(store("/var/lib/images/deep/x", true), Ok(Permit::Below(Path::new("/var/lib/images/deep"))));
        for (path, write) in [
            ("/srv/golden", true),
            ("/srv/b", false),
            ("/etc/shadow", false),
            ("/var/lib/images/../../../etc/shadow", false),
            ("/var/lib/imagesx/x", false),
            ("var/lib/images/x", false),
            ("/dev/sda", false),
            ("", false),
        ] {
            let said = store(path, write).unwrap_err();
            assert_eq!(said.errno, 0, "{path}");
        }
        assert!(store("/srv/b", false).unwrap_err().reason.contains("store.allowed"));
        for (path, what) in [("/srv/b", "add its folder there"), ("/dev/sda", "add /dev/sda there")] {
            let said = store(path, false).unwrap_err().reason;
            assert!(said.contains(what) && said.contains("systemctl reload prestaged"), "{said}");
        }
        assert!(rules.store(Path::new(&format!("/var/lib/images/{}", "x".repeat(PATH_MAX))), false).is_err());
    }

    #[test]
    fn an_allowed_folder_that_is_no_plain_path_allows_nothing() {
        let rules = Rules { allowed: vec!["".into(), "images".into(), "/a/..".into()], ..Rules::default() };
        for path in ["/etc/shadow", "images/x", "/a/../x"] {
            assert!(rules.store(Path::new(path), false).is_err(), "{path}");
        }
    }

    #[test]
    fn what_images_stand_on_is_read_and_not_written() {
        let rules = rules();
        assert_eq!(rules.store(Path::new("/srv/base/x"), false), Ok(Permit::Below(Path::new("/srv/base"))));
        assert!(rules.store(Path::new("/srv/base/x"), true).is_err());
        assert!(rules.store(Path::new("/srv/base/../x"), false).is_err());
        assert!(rules.server(Path::new("/srv/base/x")).is_err());
    }

    #[test]
    fn a_key_is_a_disks_and_lies_in_its_folder() {
        let rules = rules();
        assert_eq!(rules.key("web1").unwrap(), Path::new("/etc/prestage/keys/web1.key"));
        for disk in ["../x", "a/b", "/etc/x", "..", "a\0"] {
            assert_eq!(rules.key(disk).unwrap_err().errno, 0, "{disk:?}");
        }
        assert_eq!(Rules::default().key("web1").unwrap_err().errno, libc::ENOENT);
    }

    #[test]
    fn a_device_goes_by_any_of_its_names() {
        let rules = rules();
        assert!(rules.device(&["/dev/vg/root".into(), "/dev/dm-0".into(), "/dev/mapper/vg-root".into()]));
        assert!(!rules.device(&["/dev/disk/by-id/x".into(), "/dev/sda".into()]));
    }

    #[test]
    fn only_what_is_named_is_read_and_only_what_is_its_own_changes_group() {
        let rules = rules();
        assert!(rules.read(Path::new("/etc/prestage/prestaged.toml")).is_ok());
        assert!(rules.read(Path::new("/etc/shadow")).is_err());
        assert!(rules.is_own(Path::new("/run/prestage/vm/a.sock")));
        assert!(!rules.is_own(Path::new("/run/prestage/../x")) && !rules.is_own(Path::new("/run/prestagex")));
    }
}
