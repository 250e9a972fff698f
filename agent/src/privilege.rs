//! Who may what: the broker's rules and the daemon's confinement, both made from the configuration.
//!
//! - [`enter`]: the daemon starts its broker and gives up the rest
//! - [`serve_broker`]: the broker's end, in a process of its own
//! - [`Sandbox`]: what holds, for whoever asks

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::SystemTime;
use std::{env, fs, io};

use prestage_cache::backend::{NbdAddress, StoreSpec};
use prestage_cache::opener::{self, NotAllowed, Opener};
use prestage_integration::api::types;
use prestage_integration::memory::helper::leave_to_helper;
use prestage_integration::privilege::confine::{Account, Layer, Plan, confine, own, own_tree, seal};
use prestage_integration::privilege::protocol::{How, Refusal};
use prestage_integration::privilege::rules::Rules;
use prestage_integration::privilege::{self, Broker, ReadRules};
use tokio::sync::Notify;

use crate::config::{Config, ConfigError, SandboxMode};

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
/// was read from. To be called while there is one thread.
///
/// # Errors
/// In words: what keeps the daemon from being confined, and what to do.
pub fn enter(path: &Path, overrides: &[String], config: &Config) -> Result<Sandbox, String> {
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
    let (account, no_account) = match Account::named(&config.daemon.user) {
        Ok(account) => (Some(account), String::new()),
        Err(why) => (None, why),
    };
    let write = make_folders(config, account.as_ref());
    let started =
        Broker::start(command(path, overrides)).map_err(|error| format!("the broker does not start: {error}"));
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
    opener::set(Box::new(Brokered));
    tracing::debug!(pid, "broker");
    Ok(Sandbox { mode: SandboxMode::Full, layers, write: Some(write), lost })
}

/// The same program: what is installed may be a newer one by now.
fn command(path: &Path, overrides: &[String]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("--broker").arg("--config").arg(path);
    for text in overrides {
        command.arg("--set").arg(text);
    }
    command
}

/// Makes the folders that the daemon writes to, while it may, and gives them to its user. Returns them. What cannot be made is
/// left to whoever needs it, who says so.
fn make_folders(config: &Config, account: Option<&Account>) -> Vec<PathBuf> {
    let mut write: Vec<PathBuf> = Vec::new();
    let mut make = |folder: &Path, mode| {
        if let Err(error) = own(folder, mode, account) {
            tracing::warn!(folder = %folder.display(), %error, "cannot be made, or not be given to prestaged's user");
        }
        if !write.iter().any(|own| folder.starts_with(own)) {
            write.push(folder.to_owned());
        }
    };
    let Config { daemon, cache, .. } = config;
    // QEMU goes through these to its sockets, and to the templates it maps.
    make(&daemon.state_dir, 0o751);
    make(&daemon.run_dir, 0o755);
    make(&daemon.run_dir.join("vm"), 0o755);
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
    // A folder for it alone goes to the daemon's user with it; of others' only the file, which an earlier version made as root.
    let alone = fs::read_dir(folder).is_ok_and(|entries| entries.flatten().all(|entry| entry.path() == tier));
    let mine = if alone { folder } else { tier };
    if let Some(account) = account
        && mine.exists()
        && let Err(error) = own_tree(mine, account)
    {
        tracing::warn!(path = %mine.display(), %error, "cannot be given to prestaged's user");
    }
    folder.to_owned()
}

fn is_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    path.metadata().is_ok_and(|meta| meta.file_type().is_block_device())
}

/// What is read beside the daemon's own folders.
fn readable(path: &Path, config: &Config) -> Vec<PathBuf> {
    let drop_ins = Config::drop_in_folder(path);
    let variables = ["SSL_CERT_FILE", "SSL_CERT_DIR", "CREDENTIALS_DIRECTORY"];
    let mut read: Vec<PathBuf> = [path.to_owned(), drop_ins].into_iter().collect();
    read.extend(variables.into_iter().filter_map(env::var_os).map(PathBuf::from));
    if config.libvirt.uri.contains("+tls") {
        read.push("/etc/pki".into());
    }
    read
}

/// Has stores opened by the broker.
#[derive(Debug)]
struct Brokered;

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
        Self::broker()?.connect(path).map_err(Self::worded)
    }
}

/// Serves as the broker of the daemon that has started this process, until that ends.
///
/// # Errors
/// In words, for standard error.
pub fn serve_broker(path: PathBuf, overrides: Vec<String>) -> Result<(), String> {
    privilege::serve(read_rules(path, overrides))
}

/// What a file was when it was read.
type Stamp = Option<(SystemTime, u64)>;

/// Rules of the configuration as it is, read anew when its files have changed.
fn read_rules(path: PathBuf, overrides: Vec<String>) -> ReadRules {
    let mut known: Option<(Vec<(PathBuf, Stamp)>, Arc<Rules>)> = None;
    let mut user = None;
    Box::new(move || {
        let stamp = |file: &Path| file.metadata().ok().and_then(|meta| Some((meta.modified().ok()?, meta.len())));
        let files = Config::files(&path).map_err(|error| error.to_string())?;
        let stamps: Vec<_> = files.iter().map(|file| (file.clone(), stamp(file))).collect();
        if let Some((old, rules)) = &known
            && *old == stamps
        {
            return Ok(Arc::clone(rules));
        }
        let config = Config::load(&path, &overrides).map_err(|error: ConfigError| error.to_string())?;
        // The user that the daemon has become, whatever is written there later.
        let own = || Account::named(&config.daemon.user).map_or_else(|_| nix::unistd::geteuid().as_raw(), |a| a.user);
        let user = *user.get_or_insert_with(own);
        let rules = Arc::new(rules(&config, files, user));
        known = Some((stamps, Arc::clone(&rules)));
        Ok(rules)
    })
}

/// What the configuration lets the daemon have.
fn rules(config: &Config, files: Vec<PathBuf>, user: u32) -> Rules {
    let mut rules = Rules { allowed: config.store.allowed.clone(), user, ..Rules::default() };
    for disk in &config.disks {
        match disk.store.parse() {
            Ok(StoreSpec::File(path)) => rules.named.push((path, !disk.read_only)),
            Ok(StoreSpec::Nbd { address: NbdAddress::Unix(path), .. }) => rules.servers.push(path),
            Ok(StoreSpec::Nbd { .. }) | Err(_) => {}
        }
    }
    rules.tier = config.cache.ssd_path.clone();
    let secrets = config.webhooks.iter().filter(|webhook| webhook.secret_file.contains('/'));
    let secrets = secrets.map(|webhook| PathBuf::from(&webhook.secret_file));
    let certificates = config.webhooks.iter().filter_map(|webhook| webhook.ca_file.clone());
    rules.readable = files.into_iter().chain(secrets).chain(certificates).collect();
    let folders = [&config.daemon.state_dir, &config.daemon.run_dir].into_iter().chain(&config.daemon.template_dirs);
    let sockets = config.disks.iter().filter_map(|disk| disk.socket.as_deref()?.parent());
    let api = config.api_socket();
    let sockets = sockets.chain(api.parent()).chain(config.export.socket_dirs.iter().map(PathBuf::as_path));
    // Without links: that is how the broker sees what it is to give away.
    let own = folders.map(PathBuf::as_path).chain(sockets).filter_map(|folder| folder.canonicalize().ok());
    rules.own = own.collect();
    rules.helper = crate::daemon::helper(config);
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_configuration_changes_the_rules_and_a_broken_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prestaged.toml");
        let write = |text: &str| fs::write(&file, text).unwrap();
        write("[store]\nallowed = [\"/a\"]\n[[disk]]\nname = \"x\"\nstore = \"/srv/x\"\nread_only = true\n");
        let mut read = read_rules(file.clone(), vec!["cache.ssd_path=\"/ssd/tier\"".to_owned()]);
        let first = read().unwrap();
        assert_eq!(first.allowed, [PathBuf::from("/a")]);
        assert_eq!(first.named, [(PathBuf::from("/srv/x"), false)]);
        assert_eq!(first.tier, Some(PathBuf::from("/ssd/tier")));
        assert_eq!(first.readable, [file.clone()]);
        assert!(Arc::ptr_eq(&first, &read().unwrap()), "read although nothing has changed");
        write("[store]\nallowed = [\"/a\", \"/b\"]\n");
        assert_eq!(read().unwrap().allowed.len(), 2);
        // A list of a later file replaces that of an earlier one.
        fs::create_dir(folder.path().join("prestaged.toml.d")).unwrap();
        fs::write(folder.path().join("prestaged.toml.d/site.toml"), "[store]\nallowed = [\"/c\"]\n").unwrap();
        assert_eq!(read().unwrap().allowed, [PathBuf::from("/c")]);
        write("[store]\nallowed = 1\n");
        fs::remove_file(folder.path().join("prestaged.toml.d/site.toml")).unwrap();
        assert!(read().unwrap_err().contains("store.allowed"));
    }
}
