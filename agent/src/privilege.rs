//! Who may what: the broker's rules and the daemon's confinement, both made from the configuration.
//!
//! - [`enter`]: the daemon starts its broker and gives up the rest
//! - [`foresee`]: what would hold here
//! - [`serve_broker`]: the broker's end, in a process of its own
//! - [`Sandbox`]: what holds, for whoever asks

use std::ffi::{CString, OsString};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::{env, fs, io};

use nix::unistd::{Gid, Uid, User, getgrouplist};
use prestage_cache::backend::{NbdAddress, StoreSpec};
use prestage_cache::opener::{self, NotAllowed, Opener};
use prestage_integration::api::types;
use prestage_integration::memory::helper::leave_to_helper;
use prestage_integration::privilege::confine::{self, Account, Layer, Plan, confine, meant, own, own_itself, seal};
use prestage_integration::privilege::protocol::{How, Refusal};
use prestage_integration::privilege::rules::Rules;
use prestage_integration::privilege::{self, Broker, ReadRules};
use tokio::sync::Notify;

use crate::config::{Config, ConfigError, SandboxMode};
use crate::daemon::{Invitation, door_path, qemu_folder};

/// What the daemon gave up, and what it could not.
#[derive(Debug)]
pub struct Sandbox {
    mode: SandboxMode,
    layers: Vec<Layer>,
    /// Where the daemon may write; `None`: anywhere.
    write: Option<Vec<PathBuf>>,
    /// The broker has ended: nothing that needs privilege can be done any more.
    pub lost: Arc<Notify>,
}

impl Sandbox {
    /// As the API words it.
    #[must_use]
    pub fn report(&self) -> types::Sandbox {
        let layer = |layer: &Layer| types::SandboxLayer {
            name: layer.name.to_owned(),
            holds: layer.holds,
            detail: layer.detail.clone(),
        };
        types::Sandbox {
            mode: match self.mode {
                SandboxMode::Full => "full",
                SandboxMode::Off => "off",
            }
            .to_owned(),
            layers: self.layers.iter().map(layer).collect(),
        }
    }

    /// Whether the daemon may write in a folder, as far as its confinement goes.
    #[must_use]
    pub fn may_write(&self, folder: &Path) -> bool {
        let inside = |folders: &Vec<PathBuf>| folders.iter().any(|own| folder.starts_with(own));
        self.write.as_ref().is_none_or(inside)
    }

    /// Gives up what only the start needs.
    pub fn seal(&self) {
        if self.mode == SandboxMode::Full
            && let Err(error) = seal()
        {
            tracing::error!(error, "new io_urings can still be made, of whose requests seccomp sees nothing");
        }
    }
}

/// Starts the broker and confines this process, as far as the configuration asks for it. `files`: `path` and `overrides` that it
/// was read from. `take_over`: from a prestaged that runs, whose user it becomes. To be called while there is one thread.
///
/// # Errors
/// In words: what keeps the daemon from being confined, and what to do.
pub fn enter(path: &Path, overrides: &[String], config: &Config, take_over: bool) -> Result<Sandbox, String> {
    let lost = Arc::new(Notify::new());
    if config.daemon.sandbox == SandboxMode::Off {
        if let Err(error) = leave_to_helper() {
            tracing::warn!(%error, "prestaged keeps a privilege that only prestage-memory needs");
        }
        tracing::warn!("the sandbox is off: what takes over prestaged has its rights (daemon.sandbox)");
        return Ok(Sandbox { mode: SandboxMode::Off, layers: Vec::new(), write: None, lost });
    }
    let without =
        |error: String| format!("{error}; to go without, which is for debugging alone, set daemon.sandbox = \"off\"");
    let (account, no_account) = match account(config, take_over) {
        Ok(account) => (Some(account), String::new()),
        Err(why) => (None, why),
    };
    // Whose user is gone goes on as root, without root's right to what was that user's.
    let root = Account { name: "root".to_owned(), user: 0, group: 0 };
    let owner = account.as_ref().or(nix::unistd::geteuid().is_root().then_some(&root));
    // The predecessor has what it needs, and lives: nothing is given away beside it.
    let write = make_folders(config, owner.filter(|_| !take_over));
    let started = Broker::start(command(path, overrides, account.as_ref()))
        .map_err(|error| format!("the broker does not start: {error}"));
    let broker = started.map_err(without)?;
    for note in broker.notes() {
        tracing::warn!("the broker lacks {note}");
    }
    let plan = Plan {
        account,
        no_account,
        read: readable(path, config),
        abstract_sockets: env::var_os("NOTIFY_SOCKET").is_some_and(|name| name.as_encoded_bytes().starts_with(b"@")),
        write: write.clone(),
        temporary: Some(config.daemon.state_dir.clone()),
    };
    let layers = confine(&plan).map_err(without)?;
    for Layer { name, holds, detail } in &layers {
        match holds {
            true => tracing::info!("confined: {name}: {detail}"),
            false => tracing::warn!("NOT confined: {name}: {detail}"),
        }
    }
    let pid = broker.pid();
    let told = Arc::clone(&lost);
    broker.install(move || told.notify_one()).map_err(|error| without(format!("the broker is not heard: {error}")))?;
    opener::set(Box::new(Brokered { own: qemu_folder(config) }));
    tracing::debug!(pid, "broker");
    Ok(Sandbox { mode: SandboxMode::Full, layers, write: Some(write), lost })
}

/// What would hold of a daemon that is started here, a line each. For `--check`.
#[must_use]
pub fn foresee(config: &Config) -> Vec<String> {
    if config.daemon.sandbox == SandboxMode::Off {
        return vec!["sandbox: OFF (daemon.sandbox)".to_owned()];
    }
    let layers = confine::foresee(&Account::named(&config.daemon.user));
    let line = |layer: Layer| match layer.holds {
        true => format!("sandbox: {}: {}", layer.name, layer.detail),
        false => format!("sandbox: NOT {}: {}", layer.name, layer.detail),
    };
    layers.into_iter().map(line).collect()
}

/// The user to become. That of the prestaged that runs, if it is to be succeeded: its files are that user's, it goes on with them
/// if nothing comes of it, and lets nobody else take over. Another user is for the next restart.
fn account(config: &Config, take_over: bool) -> Result<Account, String> {
    match take_over.then(|| told_user().or_else(|| door_user(config))).flatten() {
        Some(0) => {
            Err("the prestaged that ran before is root, too; it takes a restart to become another user".to_owned())
        }
        Some(user) => Account::numbered(user),
        None => Account::named(&config.daemon.user),
    }
}

/// What the predecessor's broker says, which started this process.
fn told_user() -> Option<u32> {
    env::var(privilege::USER).ok()?.parse().ok()
}

/// For who was started by hand: whose the door is. It lies in a folder of the predecessor's, which may have put there what it likes
/// of its own.
fn door_user(config: &Config) -> Option<u32> {
    let door = door_path(config).symlink_metadata().ok()?;
    door.file_type().is_socket().then(|| door.uid())
}

/// The same program: what is installed may be a newer one by now.
fn command(path: &Path, overrides: &[String], account: Option<&Account>) -> Command {
    let mut command = Command::new("/proc/self/exe");
    let user = account.map_or_else(|| nix::unistd::geteuid().as_raw(), |account| account.user);
    command.arg("--broker").arg(user.to_string()).arg("--config").arg(path);
    for text in overrides {
        command.arg("--set").arg(text);
    }
    command
}

/// Makes the folders that the daemon writes to, while it may, and gives them to its user. Returns them. What cannot be made is
/// left to whoever needs it, who says so.
fn make_folders(config: &Config, account: Option<&Account>) -> Vec<PathBuf> {
    let Config { daemon, cache, .. } = config;
    let mut write: Vec<PathBuf> = Vec::new();
    let foreign = |folder: &Path| account.is_some_and(|account| is_foreign(folder, config, account));
    let mut make = |folder: &Path, mode, foreign: bool| {
        if !foreign && let Err(error) = own(folder, mode, account) {
            tracing::warn!(folder = %folder.display(), %error, "cannot be made, or not be given to prestaged's user");
        }
        if !write.iter().any(|own| folder.starts_with(own)) {
            write.push(folder.to_owned());
        }
    };
    // QEMU goes through these to its sockets, and to the templates it maps.
    make(&daemon.state_dir, 0o751, foreign(&daemon.state_dir));
    let run_foreign = foreign(&daemon.run_dir);
    make(&daemon.run_dir, 0o755, run_foreign);
    make(&daemon.run_dir.join("vm"), 0o755, run_foreign);
    make(&daemon.run_dir.join("nbd"), 0o755, run_foreign);
    let sockets = config.disks.iter().filter_map(|disk| disk.socket.as_deref());
    let named = [config.api_socket()].into_iter().chain(sockets.map(Path::to_owned));
    let others = named.filter_map(|socket| Some(socket.parent()?.to_owned()));
    let others: Vec<_> = others.chain(config.export.socket_dirs.iter().chain(&daemon.template_dirs).cloned()).collect();
    if let Some(tier) = &cache.ssd_path {
        write.push(tier_place(tier, account));
    }
    for other in others {
        // One that is there is somebody else's: nothing is given away then.
        if !other.exists() {
            let _ = own(&other, 0o755, account);
        }
        if !write.iter().any(|folder| other.starts_with(folder)) {
            write.push(other);
        }
    }
    write
}

/// What is written to for the SSD tier: its folder, or the device alone.
fn tier_place(tier: &Path, account: Option<&Account>) -> PathBuf {
    let Some(folder) = tier.parent().filter(|_| !is_device(tier)) else { return tier.to_owned() };
    if !folder.exists() {
        let _ = own(folder, 0o750, account);
    }
    if let Some(account) = account
        && let Err(error) = give_tier(folder, tier, account)
    {
        tracing::warn!(path = %tier.display(), %error, "the SSD tier is not given to prestaged's user");
    }
    folder.to_owned()
}

/// Gives the tier to the daemon's user, which an earlier version made as root, and the folder that is for it alone. Never what else is
/// there: the path may name something of others by mistake.
fn give_tier(folder: &Path, tier: &Path, account: &Account) -> io::Result<()> {
    let file = match meant(tier, account) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        found => Some(found?),
    };
    if let Some(file) = &file {
        let meta = file.metadata()?;
        if meta.uid() != account.user && !is_tier(file, &meta)? {
            return Err(io::Error::other(
                "it is neither an SSD tier nor an empty file, and left alone; let cache.ssd_path name a file that is for it",
            ));
        }
        if !meta.is_file() {
            return Ok(());
        }
    }
    let alone = fs::read_dir(folder).is_ok_and(|entries| entries.flatten().all(|entry| entry.path() == tier));
    let folder = alone.then(|| meant(folder, account)).transpose()?;
    // To root the folder comes first, from root it goes last: nobody but root can put anything there meanwhile.
    let mut given = [folder, file];
    if account.user != 0 {
        given.reverse();
    }
    given.iter().flatten().try_for_each(|one| own_itself(one, account))
}

/// What a slab begins with, and how far in its second superblock lies. A test has the cache make one.
const TIER_MAGIC: &[u8; 16] = b"PRESTAGE-SSD\r\n\x1a\n";
const SECOND_COPY: u64 = 64 << 10;

fn is_tier(meant: &fs::File, meta: &fs::Metadata) -> io::Result<bool> {
    if !meta.is_file() || meta.len() == 0 {
        return Ok(meta.is_file());
    }
    // The very file that was looked at, whatever lies at its path by now.
    let file = fs::File::open(format!("/proc/self/fd/{}", meant.as_raw_fd()))?;
    let begins = |at| {
        let mut found = [0; TIER_MAGIC.len()];
        file.read_exact_at(&mut found, at).is_ok() && found == *TIER_MAGIC
    };
    Ok(begins(0) || begins(SECOND_COPY))
}

/// Whether a folder is somebody else's: there, with something in it, and nothing of that is prestaged's. Says so.
fn is_foreign(folder: &Path, config: &Config, account: &Account) -> bool {
    let Ok(meta) = folder.symlink_metadata() else { return false };
    if !meta.is_dir() || meta.uid() == account.user {
        return false;
    }
    let Ok(entries) = fs::read_dir(folder) else { return false };
    let (mut any, api) = (false, config.api_socket());
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let ours = OUR_NAMES.iter().any(|ours| name == *ours && entry.file_type().is_ok_and(|kind| !kind.is_dir()))
            || (name == "vm" || name == "nbd") && folder == config.daemon.run_dir
            || path == api
            || config.cache.ssd_path.as_ref() == Some(&path);
        if ours {
            return false;
        }
        // What a file system has from its making.
        any |= name != "lost+found";
    }
    if any {
        tracing::warn!(
            folder = %folder.display(),
            "it holds files and none of prestaged's: it is not given to prestaged's user; let daemon.state_dir and daemon.run_dir name \
             folders that are for prestaged alone, or give it to user {}",
            account.name
        );
    }
    any
}

/// Files and sockets that prestaged makes in its folders.
const OUR_NAMES: [&str; 10] = [
    "prestage.db",
    "lock",
    "ssd.last",
    "ssd.veto",
    "ssd.own",
    "tiers.drained",
    "demand.model",
    "prestaged.sock",
    "prestaged.sock.lock",
    "hand-over.sock",
];

fn is_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.file_type().is_block_device())
}

/// What is read beside the daemon's own folders.
fn readable(path: &Path, config: &Config) -> Vec<PathBuf> {
    let drop_ins = Config::drop_in_folder(path);
    let variables = ["SSL_CERT_FILE", "SSL_CERT_DIR", "CREDENTIALS_DIRECTORY"];
    let mut read: Vec<PathBuf> = [path.to_owned(), drop_ins].into_iter().collect();
    read.extend(variables.into_iter().filter_map(env::var_os).map(PathBuf::from));
    // libvirt's own driver for tests reads what machines there are.
    read.extend(config.libvirt.uri.strip_prefix("test://").map(PathBuf::from));
    if config.libvirt.uri.contains("+tls") {
        read.push("/etc/pki".into());
    }
    read
}

/// Has stores opened by the broker.
#[derive(Debug)]
struct Brokered {
    /// Where servers of our own are.
    own: PathBuf,
}

impl Brokered {
    fn broker() -> io::Result<&'static Arc<Broker>> {
        privilege::broker().ok_or_else(|| io::Error::other("there is no broker"))
    }

    /// A refusal keeps its reason.
    fn worded(error: io::Error) -> io::Error {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Refusal>()) {
            Some(refusal) => io::Error::new(io::ErrorKind::PermissionDenied, NotAllowed(refusal.reason.clone())),
            None => error,
        }
    }
}

impl Opener for Brokered {
    fn open(&self, path: &Path, how: opener::How) -> io::Result<(PathBuf, fs::File)> {
        let how = How { write: how.write, direct: how.direct, exclusive: how.exclusive };
        Self::broker()?.open(path, how).map_err(Self::worded)
    }

    fn connect(&self, path: &Path) -> io::Result<std::os::fd::OwnedFd> {
        if path.parent() == Some(&self.own) {
            return std::os::unix::net::UnixStream::connect(path).map(Into::into);
        }
        Self::broker()?.connect(path).map_err(Self::worded)
    }
}

/// Serves as the broker of the daemon that has started this process and becomes that user, until it ends.
///
/// # Errors
/// In words, for standard error.
pub fn serve_broker(path: PathBuf, overrides: Vec<String>, user: u32) -> Result<(), String> {
    // First: the file may be replaced, which is what an upgrade does.
    let invitation = Invitation::new(&path, &overrides);
    let successor = invitation.map_err(|error| format!("cannot find its own program: {error}"))?.words();
    privilege::serve(read_rules(path, overrides, user, successor))
}

/// What a file was when it was read: device, inode, bytes, and when contents and inode were changed, in seconds and nanoseconds. The
/// last of them is nobody's to set.
type Stamp = Option<(u64, u64, u64, (i64, i64), (i64, i64))>;

fn stamp(file: &Path) -> Stamp {
    let meta = file.metadata().ok()?;
    let (modified, changed) = ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
    Some((meta.dev(), meta.ino(), meta.len(), modified, changed))
}

/// Rules, and the files they were read from.
type Known = (Vec<(PathBuf, Stamp)>, Arc<Rules>);

/// Rules of the configuration as it is, read anew when its files have changed.
fn read_rules(path: PathBuf, overrides: Vec<String>, user: u32, successor: (PathBuf, Vec<OsString>)) -> ReadRules {
    let mut known: Option<Known> = None;
    let tier = Config::load(&path, &overrides).ok().and_then(|config| config.cache.ssd_path);
    let device = tier.filter(|tier| is_device(tier));
    Box::new(move || {
        let files = Config::files(&path).map_err(|error| error.to_string())?;
        let stamps: Vec<_> = files.iter().map(|file| (file.clone(), stamp(file))).collect();
        if let Some((old, rules)) = &known
            && *old == stamps
        {
            return Ok(Arc::clone(rules));
        }
        let config = Config::load(&path, &overrides).map_err(|error: ConfigError| error.to_string())?;
        let tier_is_device = device.is_some() && device == config.cache.ssd_path;
        let rules = Arc::new(Rules { successor: successor.clone(), ..rules(&config, files, user, tier_is_device) });
        known = Some((stamps, Arc::clone(&rules)));
        Ok(rules)
    })
}

/// What the configuration lets the daemon have.
fn rules(config: &Config, files: Vec<PathBuf>, user: u32, tier_is_device: bool) -> Rules {
    let mut rules = Rules { allowed: config.store.allowed.clone(), user, tier_is_device, ..Rules::default() };
    for disk in &config.disks {
        let Ok(spec) = disk.store.parse::<StoreSpec>() else { continue };
        for (i, image) in spec.chain().enumerate() {
            match image {
                // What an image stands on is only read.
                StoreSpec::File(path) | StoreSpec::Qcow2 { path, .. } => {
                    rules.named.push((path.clone(), i == 0 && !disk.read_only));
                }
                StoreSpec::Nbd { address: NbdAddress::Unix(path), .. } => rules.servers.push(path.clone()),
                StoreSpec::Nbd { .. } => {}
            }
        }
    }
    // An image's own word for what it stands on is followed to where that is.
    let folder = config.store.image_folder.iter();
    rules.backing = folder.flat_map(|folder| [Some(folder.clone()), folder.canonicalize().ok()]).flatten().collect();
    rules.keys.clone_from(&config.store.key_folder);
    rules.tier = config.cache.ssd_path.clone();
    let secrets = config.webhooks.iter().filter(|webhook| webhook.secret_file.contains('/'));
    let secrets = secrets.map(|webhook| PathBuf::from(&webhook.secret_file));
    let certificates = config.webhooks.iter().filter_map(|webhook| webhook.ca_file.clone());
    let nbd = [&config.nbd.tls_cert, &config.nbd.tls_key, &config.nbd.tls_client_ca].into_iter().flatten().cloned();
    rules.readable = files.into_iter().chain(secrets).chain(certificates).chain(nbd).collect();
    let folders = [&config.daemon.state_dir, &config.daemon.run_dir].into_iter().chain(&config.daemon.template_dirs);
    let sockets = config.disks.iter().filter_map(|disk| disk.socket.as_deref()?.parent());
    let api = config.api_socket();
    let sockets = sockets.chain(api.parent()).chain(config.export.socket_dirs.iter().map(PathBuf::as_path));
    let own: Vec<&Path> = folders.map(PathBuf::as_path).chain(sockets).collect();
    rules.groups = groups(user);
    // Without links: that is how the broker sees what it is to give away.
    rules.own = privilege::own_folders(&rules, &own);
    rules.helper = crate::daemon::helper(config);
    rules
}

/// Those of a user.
fn groups(user: u32) -> Vec<u32> {
    let found = User::from_uid(Uid::from_raw(user)).ok().flatten();
    let groups = found.and_then(|user| getgrouplist(&CString::new(user.name).ok()?, user.gid).ok());
    groups.unwrap_or_default().into_iter().map(Gid::as_raw).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_configuration_names_is_what_the_broker_opens() {
        let text = "[store]\nimage_folder = \"/base\"\nkey_folder = \"/keys\"\n\
            [nbd]\nlisten = \"127.0.0.1:10809\"\ntls_cert = \"/tls/cert\"\ntls_key = \"/tls/key\"\ntls_client_ca = \"/tls/ca\"\n\
            [[disk]]\nname = \"x\"\nstore = \"qcow2:/srv/top?backing=qcow2:/srv/base?backing=nbd+unix:///e?socket=/srv/s\"\n";
        let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
        fs::write(file.path(), text).unwrap();
        let config = Config::load(file.path(), &[]).unwrap();
        let rules = rules(&config, vec!["/etc/prestaged.toml".into()], 7, false);
        let named = |path: &str, writable| (PathBuf::from(path), writable);
        assert_eq!(rules.named, [named("/srv/top", true), named("/srv/base", false)]);
        assert_eq!(rules.servers, [PathBuf::from("/srv/s")]);
        assert_eq!((rules.backing, rules.keys), (vec!["/base".into()], Some("/keys".into())));
        let readable = ["/etc/prestaged.toml", "/tls/cert", "/tls/key", "/tls/ca"].map(PathBuf::from);
        assert_eq!(rules.readable, readable);
        assert_eq!(rules.user, 7);
    }

    fn owner(path: &Path) -> u32 {
        path.symlink_metadata().unwrap().uid()
    }

    /// The configuration names what is others' by mistake.
    #[test]
    fn of_the_tiers_place_only_a_tier_is_given_and_of_others_folders_nothing() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: not root, nothing can be given to another user");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let account = Account { name: "somebody".to_owned(), user: 65_534, group: 65_534 };
        let place = |path: PathBuf| tier_place(&path, Some(&account));
        // A folder, and a file of others that is alone in its own.
        for inner in ["disks/deep", "alone"] {
            fs::create_dir_all(at.join(inner)).unwrap();
            fs::write(at.join(inner).join("file"), "somebody's").unwrap();
        }
        place(at.join("disks"));
        place(at.join("disks/deep"));
        place(at.join("alone/file"));
        // As long as two superblocks, and none.
        fs::write(at.join("alone/file"), vec![7; 1 << 20]).unwrap();
        place(at.join("alone/file"));
        for path in ["disks", "disks/deep", "disks/deep/file", "alone", "alone/file"] {
            assert_eq!(owner(&at.join(path)), 0, "{path}");
        }
        // What is the tier's, with its folder if that is for it alone: none yet, an empty one, one of an earlier version.
        for (name, makes) in [("none", false), ("empty", true), ("slab", true)] {
            fs::create_dir(at.join(name)).unwrap();
            let tier = at.join(name).join("tier");
            if makes {
                fs::write(&tier, "").unwrap();
            }
            if name == "slab" {
                drop(prestage_cache::ssd::SsdTier::open(&tier, 64 << 20).unwrap());
                assert!(fs::read(&tier).unwrap().starts_with(TIER_MAGIC));
                assert!(fs::read(&tier).unwrap()[SECOND_COPY as usize..].starts_with(TIER_MAGIC));
            }
            place(tier.clone());
            assert_eq!(owner(&at.join(name)), account.user, "{name}");
            assert!(!makes || owner(&tier) == account.user, "{name}");
        }
        // Among others only the tier.
        fs::write(at.join("mixed"), TIER_MAGIC).unwrap();
        place(at.join("mixed"));
        assert_eq!((owner(at), owner(&at.join("mixed"))), (0, account.user));
    }

    #[test]
    fn a_folder_of_others_is_not_taken_for_the_state_or_the_sockets() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: not root, nothing can be given to another user");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let account = Account { name: "somebody".to_owned(), user: 65_534, group: 65_534 };
        let mut config = Config::default();
        let mut made = |state: &str, files: &[&str]| {
            (config.daemon.state_dir, config.daemon.run_dir) = (at.join(state), at.join(state).join("run"));
            fs::create_dir_all(config.daemon.run_dir.join("inner")).unwrap();
            files.iter().for_each(|file| fs::write(at.join(state).join(file), "").unwrap());
            make_folders(&config, Some(&account));
            ["", "run", "run/inner"].map(|path| owner(&at.join(state).join(path)))
        };
        assert_eq!(made("others", &["file", "prestage.db-wal"]), [0; 3]);
        assert!(!at.join("others/run/vm").exists());
        // An earlier version's, which ran as root; what lies below goes with it.
        assert_eq!(made("ours", &["file", "prestage.db"]), [account.user; 3]);
        // A new file system is as good as empty.
        (config.daemon.state_dir, config.daemon.run_dir) = (at.join("new"), at.join("new-run"));
        fs::create_dir_all(at.join("new/lost+found")).unwrap();
        make_folders(&config, Some(&account));
        assert_eq!(["new", "new-run", "new-run/vm"].map(|path| owner(&at.join(path))), [account.user; 3]);
    }

    #[test]
    fn a_changed_configuration_changes_the_rules_and_a_broken_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prestaged.toml");
        let write = |text: &str| fs::write(&file, text).unwrap();
        write("[store]\nallowed = [\"/a\"]\n[[disk]]\nname = \"x\"\nstore = \"/srv/x\"\nread_only = true\n");
        let mut read = read_rules(file.clone(), vec!["cache.ssd_path=\"/ssd/tier\"".to_owned()], 0, Default::default());
        let first = read().unwrap();
        assert_eq!(first.allowed, [PathBuf::from("/a")]);
        assert_eq!(first.named, [(PathBuf::from("/srv/x"), false)]);
        assert_eq!(first.tier, Some(PathBuf::from("/ssd/tier")));
        assert_eq!(first.readable, std::slice::from_ref(&file));
        assert!(Arc::ptr_eq(&first, &read().unwrap()), "read although nothing has changed");
        write("[store]\nallowed = [\"/a\", \"/b\"]\n");
        assert_eq!(read().unwrap().allowed.len(), 2);
        // As many bytes, of the same age: by a tool that keeps times, or a clock that was set back.
        let age = file.metadata().unwrap().modified().unwrap();
        let keep = |path: &Path| fs::File::options().write(true).open(path).unwrap().set_modified(age).unwrap();
        write("[store]\nallowed = [\"/d\", \"/b\"]\n");
        keep(&file);
        assert_eq!(read().unwrap().allowed, ["/d", "/b"].map(PathBuf::from));
        let other = folder.path().join("other");
        fs::write(&other, "[store]\nallowed = [\"/e\", \"/b\"]\n").unwrap();
        keep(&other);
        fs::rename(&other, &file).unwrap();
        assert_eq!(read().unwrap().allowed, ["/e", "/b"].map(PathBuf::from));
        // A list of a later file replaces that of an earlier one.
        fs::create_dir(folder.path().join("prestaged.toml.d")).unwrap();
        fs::write(folder.path().join("prestaged.toml.d/site.toml"), "[store]\nallowed = [\"/c\"]\n").unwrap();
        assert_eq!(read().unwrap().allowed, [PathBuf::from("/c")]);
        write("[store]\nallowed = 1\n");
        fs::remove_file(folder.path().join("prestaged.toml.d/site.toml")).unwrap();
        assert!(read().unwrap_err().contains("store.allowed"));
    }
}
