//! Whether a start would find what it needs: the configuration's own words, files that it names, and what the host has.
//!
//! - [`check_file`]: all of it, for `prestaged --check` and `prestagectl config check`
//! - `ram`, `tier_is_store`: parts that a start and a reload look at too

use super::tiers::MOST_OF_HOST;
use super::{run, webhooks};
use crate::config::units::human_sizes;
use crate::config::{Config, ConfigError, ConfigProblem, host_ram_bytes};
use crate::privilege::foresee;
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, Group, access};
use prestage_cache::backend::{NbdAddress, StoreSpec};
use prestage_integration::export::SOCKET_PATH_BYTES;
use prestage_integration::export::nbd::TlsServer;
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A configuration with which prestaged can be started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checked {
    /// That it consists of, in the order in which they are read.
    pub files: Vec<PathBuf>,
    /// What could not be looked at, what may come to be there, and what is unwise, a sentence each.
    pub notes: Vec<String>,
    /// What prestaged can be confined with on this host, a line each.
    pub sandbox: Vec<String>,
}

/// Reads a configuration with its drop-ins and `overrides` (`section.key=value`), and looks at what it names beside itself: secrets and
/// certificates, the helper program, groups, sizes, folders, stores. As whoever runs this may read them. Changes nothing.
///
/// # Errors
/// Everything that is wrong: of the files, or if they are right of what they name.
pub fn check_file(path: &Path, overrides: &[String]) -> Result<Checked, ConfigError> {
    let config = Config::load(path, overrides)?;
    let files = Config::files(path)?;
    let problem = |message| ConfigProblem { file: path.display().to_string(), line: None, key: None, message };
    match look(&config) {
        Ok(notes) => Ok(Checked { files, notes, sandbox: foresee(&config) }),
        Err(wrong) => Err(ConfigError { problems: wrong.into_iter().map(problem).collect() }),
    }
}

/// Whether what a configuration names beside itself can be used. Returns what could not be looked at, and what may come to be there.
fn look(config: &Config) -> Result<Vec<String>, Vec<String>> {
    let (mut unseen, mut wrong) = (Vec::new(), Vec::new());
    webhooks::check(config, &mut unseen, &mut wrong);
    certificates(config, &mut wrong);
    helper(config, &mut wrong);
    match ram(config) {
        Fits::Yes => {}
        Fits::Hardly(why) => unseen.push(why),
        Fits::No(why) => wrong.push(why),
    }
    ssd(config, &mut unseen, &mut wrong);
    groups(config, &mut wrong);
    folders(config, &mut unseen);
    places(config, &mut wrong);
    stores(config, &mut unseen);
    if wrong.is_empty() { Ok(unseen) } else { Err(wrong) }
}

fn certificates(config: &Config, wrong: &mut Vec<String>) {
    let nbd = &config.nbd;
    let (Some(_), Some(certificate), Some(key), Some(authority)) =
        (nbd.listen, &nbd.tls_cert, &nbd.tls_key, &nbd.tls_client_ca)
    else {
        return;
    };
    if let Err(error) = TlsServer::load(certificate, key, authority) {
        wrong.push(format!("nbd: {error}"));
    }
}

fn helper(config: &Config, wrong: &mut Vec<String>) {
    let helper = run::helper(config);
    // A bare name is looked for in the PATH of the service, which is another.
    let there = helper.components().count() < 2 || access(&helper, AccessFlags::X_OK).is_ok();
    if config.memory.enabled && !there {
        wrong.push(format!(
            "memory.helper: {} is no program that can be run; install it there, name another, or set memory.enabled = false",
            helper.display()
        ));
    }
}

/// Whether something fits, and what is said if not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Fits {
    Yes,
    Hardly(String),
    No(String),
}

/// Whether the host has the memory of the RAM tier.
pub(super) fn ram(config: &Config) -> Fits {
    match (config.ram_bytes(), host_ram_bytes()) {
        (Ok(asked), Ok(host)) => ram_of(asked, host),
        // A share of what is not known is said by the start.
        _ => Fits::Yes,
    }
}

fn ram_of(asked: u64, host: u64) -> Fits {
    let [tier, all] = human_sizes([asked, host]);
    if asked > host {
        return Fits::No(format!("cache.ram_size: {tier} are more than the {all} that this host has; set less"));
    }
    match asked > host / 100 * MOST_OF_HOST {
        true => Fits::Hardly(format!(
            "cache.ram_size: {tier} are more than {MOST_OF_HOST} % of the {all} that this host has; the host and its machines have to do with the rest"
        )),
        false => Fits::Yes,
    }
}

fn ssd(config: &Config, unseen: &mut Vec<String>, wrong: &mut Vec<String>) {
    let (Some(path), size) = (&config.cache.ssd_path, config.cache.ssd_size.0) else { return };
    if let Some(why) = tier_is_store(config) {
        wrong.push(format!("cache.ssd_path: {why}"));
        return;
    }
    let shown = path.display();
    let found = path.metadata();
    if found.as_ref().is_ok_and(std::fs::Metadata::is_dir) {
        wrong.push(format!("cache.ssd_path: {shown} is a folder; name a file in it, which the start makes"));
        return;
    }
    if let Ok(meta) = &found
        && meta.file_type().is_block_device()
    {
        match std::fs::File::open(path).and_then(|mut device| device.seek(SeekFrom::End(0))) {
            Ok(has) if has < size => {
                let [size, has] = human_sizes([size, has]);
                wrong.push(format!("cache.ssd_size: {size} are more than the {has} that {shown} has; set less"));
            }
            Ok(_) => {}
            Err(error) => unseen.push(format!("cache.ssd_path: {shown} cannot be looked at: {error}")),
        }
        return;
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    if !folder.exists() {
        unseen.push(format!(
            "cache.ssd_path: the folder of {shown} is not there; the start makes it, on whatever is mounted then"
        ));
    }
    let Some(space) = folder.ancestors().find_map(|folder| statvfs(folder).ok()) else { return };
    let whole = space.blocks().saturating_mul(space.fragment_size());
    let free = space.blocks_available().saturating_mul(space.fragment_size());
    let (length, taken) = found.map_or((0, 0), |meta| (meta.len(), meta.blocks().saturating_mul(512)));
    if length >= size && size > whole {
        let [size, whole] = human_sizes([size, whole]);
        unseen.push(format!(
            "cache.ssd_size: {shown} is a sparse file of {size} on a file system of {whole}; it is bypassed once that is full"
        ));
    } else if length < size && size.saturating_sub(taken) > free {
        let [needed, free] = human_sizes([size.saturating_sub(taken), free]);
        wrong.push(format!(
            "cache.ssd_size: {shown} needs {needed} and only {free} are free there; set less, or free space"
        ));
    }
}

/// Why the SSD tier's path cannot be used if a disk of the configuration has its data there: by that name or another one.
pub(super) fn tier_is_store(config: &Config) -> Option<String> {
    let tier = config.cache.ssd_path.as_deref()?;
    for disk in &config.disks {
        let Ok(spec) = disk.store.parse::<StoreSpec>() else { continue };
        for image in spec.chain() {
            let (StoreSpec::File(path) | StoreSpec::Qcow2 { path, .. }) = image else { continue };
            if path == tier || is_same(path, tier) {
                return Some(format!(
                    "{} is the store of disk `{}` ({}), which the tier would write over; let it name a file or a device that is for it alone",
                    tier.display(),
                    disk.name,
                    path.display()
                ));
            }
        }
    }
    None
}

/// One file by two names, or one device by two nodes.
fn is_same(one: &Path, other: &Path) -> bool {
    let (Ok(one), Ok(other)) = (one.metadata(), other.metadata()) else { return false };
    let devices = [&one, &other].iter().all(|meta| meta.file_type().is_block_device());
    (one.dev(), one.ino()) == (other.dev(), other.ino()) || (devices && one.rdev() == other.rdev())
}

fn groups(config: &Config, wrong: &mut Vec<String>) {
    for (key, group) in [("export.socket_group", &config.export.socket_group), ("api.group", &config.api.group)] {
        let Some(name) = group else { continue };
        if !matches!(Group::from_name(name), Ok(Some(_))) {
            wrong.push(format!("{key}: there is no group `{name}`; create it, or name another"));
        }
    }
}

fn folders(config: &Config, unseen: &mut Vec<String>) {
    let named = [("store.image_folder", &config.store.image_folder), ("store.key_folder", &config.store.key_folder)];
    for (key, folder) in named {
        if let Some(folder) = folder.as_ref().filter(|folder| !folder.is_dir()) {
            unseen.push(format!("{key}: there is no folder {}", folder.display()));
        }
    }
}

/// Folders that the start makes if they are missing, and paths of sockets.
fn places(config: &Config, wrong: &mut Vec<String>) {
    for (key, folder) in [("daemon.state_dir", &config.daemon.state_dir), ("daemon.run_dir", &config.daemon.run_dir)] {
        let there = folder.ancestors().find_map(|folder| Some((folder, folder.metadata().ok()?)));
        if let Some((folder, _)) = there.filter(|(_, meta)| !meta.is_dir()) {
            wrong.push(format!("{key}: {} is no folder; name another, or move it away", folder.display()));
        }
    }
    let mut short = |what: &str, path: &Path, shorter: &str| {
        let bytes = path.as_os_str().len();
        if bytes > SOCKET_PATH_BYTES {
            let path = path.display();
            wrong.push(format!(
                "{what}: the path of a socket has {SOCKET_PATH_BYTES} bytes at most, and {path} has {bytes}; {shorter}"
            ));
        }
    };
    let shorter = "use a shorter `daemon.run_dir`";
    match &config.api.socket {
        Some(path) => short("api.socket", path, "use a shorter one"),
        None => short("daemon.run_dir", &config.api_socket(), "use a shorter one"),
    }
    for disk in &config.disks {
        let what = format!("disk `{}`", disk.name);
        match &disk.socket {
            Some(path) => short(&what, path, "use a shorter `socket`"),
            None => short(&what, &config.disk_socket(&disk.name), shorter),
        }
        if disk.nbd {
            short(&what, &config.nbd_socket(&disk.name), shorter);
        }
    }
}

/// Stores may come later than prestaged; their disks are offered when they are there.
fn stores(config: &Config, unseen: &mut Vec<String>) {
    for disk in &config.disks {
        let Ok(spec) = disk.store.parse::<StoreSpec>() else { continue };
        for part in spec.chain() {
            let (StoreSpec::File(path)
            | StoreSpec::Qcow2 { path, .. }
            | StoreSpec::Nbd { address: NbdAddress::Unix(path), .. }) = part
            else {
                continue;
            };
            if path.metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
                unseen.push(format!(
                    "disk `{}`: {} is not there; the disk is offered when it is",
                    disk.name,
                    path.display()
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ram_tier_leaves_something_to_the_host() {
        const GIB: u64 = 1 << 30;
        assert_eq!(ram_of(90 * GIB, 100 * GIB), Fits::Yes);
        assert!(
            matches!(ram_of(91 * GIB, 100 * GIB), Fits::Hardly(why) if why.contains("91 GiB are more than 90 % of the 100 GiB"))
        );
        assert!(
            matches!(ram_of(101 * GIB, 100 * GIB), Fits::No(why) if why.contains("101 GiB are more than the 100 GiB"))
        );
    }

    #[test]
    fn a_tier_is_no_disks_store_by_whatever_name() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["top", "base"] {
            std::fs::write(at(name), "").unwrap();
        }
        std::os::unix::fs::symlink(at("base"), at("link")).unwrap();
        std::fs::hard_link(at("base"), at("second")).unwrap();
        std::fs::write(at("own"), "").unwrap();
        let text = format!(
            "[[disk]]\nname = \"a\"\nstore = \"nbd://host/x\"\n[[disk]]\nname = \"b\"\nstore = \"qcow2:{0}/top?backing={0}/base\"\n\
             [[disk]]\nname = \"c\"\nstore = \"/nonexistent/store\"\n",
            folder.path().display()
        );
        let mut config = Config::from_toml(Path::new("t.toml"), &text).unwrap();
        let mut said = |tier: &Path| {
            config.cache.ssd_path = Some(tier.to_owned());
            let (mut unseen, mut wrong) = (Vec::new(), Vec::new());
            ssd(&config, &mut unseen, &mut wrong);
            let why = tier_is_store(&config);
            let refused = why.as_ref().map(|why| format!("cache.ssd_path: {why}"));
            assert!(refused.is_none() || wrong == [refused.unwrap()], "{wrong:?}");
            why.unwrap_or_default()
        };
        for name in ["top", "base", "link", "second"] {
            let why = said(&at(name));
            assert!(why.contains("is the store of disk `b` (") && !why.contains("rm "), "{name}: {why}");
        }
        // Not there yet: it would be made, and be no store then.
        assert!(said(Path::new("/nonexistent/store")).contains("disk `c`"));
        assert_eq!((said(&at("own")), said(&at("missing"))), (String::new(), String::new()));
    }
}
