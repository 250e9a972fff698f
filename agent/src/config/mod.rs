//! Configuration: `/etc/prestage/prestaged.toml`, then `prestaged.toml.d/*.toml` in lexical order, then the command line; later wins.
//!
//! - `settings.rs`: every setting with default, limits and description
//! - `webhook.rs`: who is told
//! - `value.rs`: types of settings; `units.rs`: sizes and durations
//! - `reader.rs`: TOML with file and line of every key; `reference.rs`: the commented reference file
//!
//! A key nobody knows is an error, not a warning: a misspelt limit that silently stays at its default is found out in the worst hour.

mod reader;
mod reference;
mod settings;
#[cfg(test)]
mod tests;
pub mod units;
mod value;
mod webhook;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use prestage_cache::backend::StoreSpec;
use prestage_integration::api::types::validate_name;

use reader::{Entry, Problems, Section, Table, Value, closest, merge, parse, parse_override};
use settings::SECTIONS;
pub use settings::{
    Api, Cache, Daemon, Demand, ExportSettings, Learner, Libvirt, Memory, Model, Nbd, Prefetch, Sections, StoreSettings,
};
pub use value::{Bytes, Count, Engine, HugePages, Mode, RamSize, RateLimit, SandboxMode};
pub use webhook::Webhook;

/// Where the daemon looks unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/prestage/prestaged.toml";

/// A disk declared in the configuration (`[[disk]]`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticDisk {
    pub name: String,
    /// Path or NBD URI.
    pub store: String,
    pub read_only: bool,
    /// Socket of the export; default `<run_dir>/vm/<name>.sock`.
    pub socket: Option<PathBuf>,
    /// Also over NBD.
    pub nbd: bool,
    /// Name of the machine that uses it, when there is only one: its starts are then learned as boots.
    pub vm: Option<String>,
}

impl fmt::Display for StaticDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.store)?;
        if self.read_only {
            f.write_str(", read-only")?;
        }
        if let Some(socket) = &self.socket {
            write!(f, ", socket {}", socket.display())?;
        }
        if self.nbd {
            f.write_str(", NBD")?;
        }
        match &self.vm {
            Some(vm) => write!(f, ", machine {vm}"),
            None => Ok(()),
        }
    }
}

/// The whole configuration, checked.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Config {
    pub daemon: Daemon,
    pub cache: Cache,
    pub prefetch: Prefetch,
    pub store: StoreSettings,
    pub export: ExportSettings,
    pub nbd: Nbd,
    pub libvirt: Libvirt,
    pub demand: Demand,
    pub memory: Memory,
    pub learner: Learner,
    pub model: Model,
    pub api: Api,
    pub disks: Vec<StaticDisk>,
    pub webhooks: Vec<Webhook>,
}

/// One thing wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigProblem {
    /// File, or `--set …`.
    pub file: String,
    /// From 1.
    pub line: Option<usize>,
    /// `section.key`.
    pub key: Option<String>,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file)?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        match &self.key {
            Some(key) if !self.message.contains(key.as_str()) => write!(f, " `{key}`: {}", self.message),
            _ => write!(f, " {}", self.message),
        }
    }
}

/// Everything wrong with the configuration, one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    pub problems: Vec<ConfigProblem>,
}

impl ConfigError {
    fn one(problem: ConfigProblem) -> Self {
        Self { problems: vec![problem] }
    }

    fn file(path: &Path, message: String) -> Self {
        Self::one(ConfigProblem { file: path.display().to_string(), line: None, key: None, message })
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.problems.iter().enumerate() {
            if at > 0 {
                writeln!(f)?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// One setting that differs between two configurations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// `section.key`, `disk.NAME` or `webhook.NAME`.
    pub key: String,
    /// It takes effect only with a restart of the daemon; otherwise with a reload.
    pub needs_restart: bool,
    /// As TOML; `None` when unset.
    pub old: Option<String>,
    pub new: Option<String>,
}

impl Config {
    /// Reads `path`, then every `*.toml` in `<path>.d` in lexical order, then `overrides` (`section.key=value`).
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut document = read_file(path)?;
        for file in drop_ins(path)? {
            merge(&mut document, read_file(&file)?);
        }
        for text in overrides {
            merge(&mut document, parse_override(text)?);
        }
        Self::from_table(document)
    }

    /// Reads one document; `name` stands for the file in messages.
    pub fn from_toml(name: &Path, text: &str) -> Result<Self, ConfigError> {
        Self::from_table(parse(name, text)?)
    }

    /// Files that [`Config::load`] reads, in order.
    pub fn files(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
        let mut files = vec![path.to_owned()];
        files.extend(drop_ins(path)?);
        Ok(files)
    }

    /// The folder of further files beside a configuration file.
    #[must_use]
    pub fn drop_in_folder(path: &Path) -> PathBuf {
        let mut folder = path.as_os_str().to_owned();
        folder.push(".d");
        PathBuf::from(folder)
    }

    fn from_table(mut document: Table) -> Result<Self, ConfigError> {
        let mut problems = Problems::default();
        let disks = read_disks(&mut document, &mut problems);
        let webhooks = webhook::read(&mut document, &mut problems);
        nbd_needs_tls(&document, &mut problems);
        let sections = Sections::read(|name, problems| Section::take(&mut document, name, problems), &mut problems);
        for (name, entry) in document {
            let known: Vec<&str> = SECTIONS.iter().copied().chain(["disk", "webhook"]).collect();
            let hint = match closest(&name, &known) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known are {}", known.join(", ")),
            };
            let kind = if matches!(entry.value, Value::Table(_) | Value::Array(_)) { "section" } else { "key" };
            problems.add(&entry.place, name.as_str(), format!("unknown {kind} `{name}`; {hint}"));
        }
        if !problems.0.is_empty() {
            // In the order of the files, so that one pass through them mends all.
            problems.0.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
            return Err(ConfigError { problems: problems.0 });
        }
        let Sections { daemon, cache, prefetch, store, export, nbd, libvirt, demand, memory, learner, model, api } =
            sections;
        Ok(Self {
            daemon,
            cache,
            prefetch,
            store,
            export,
            nbd,
            libvirt,
            demand,
            memory,
            learner,
            model,
            api,
            disks,
            webhooks,
        })
    }

    /// Path of the control socket.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.api.socket.clone().unwrap_or_else(|| self.daemon.run_dir.join("prestaged.sock"))
    }

    /// Path of a disk's socket when none was given.
    #[must_use]
    pub fn disk_socket(&self, name: &str) -> PathBuf {
        self.daemon.run_dir.join("vm").join(format!("{name}.sock"))
    }

    /// Path of a disk's NBD socket.
    #[must_use]
    pub fn nbd_socket(&self, name: &str) -> PathBuf {
        self.daemon.run_dir.join("nbd").join(format!("{name}.sock"))
    }

    /// Path of the database.
    #[must_use]
    pub fn store_path(&self) -> PathBuf {
        self.daemon.state_dir.join("prestage.db")
    }

    /// Bytes of the RAM tier on this host.
    pub fn ram_bytes(&self) -> io::Result<u64> {
        match self.cache.ram_size {
            RamSize::Bytes(bytes) => Ok(bytes),
            share @ RamSize::Percent(_) => Ok(share.resolve(host_ram_bytes()?)),
        }
    }

    /// Event-loop threads on a host with that many CPUs.
    #[must_use]
    pub fn shard_count(&self, cpus: usize) -> u32 {
        self.cache.shards.unwrap_or_else(|| u32::try_from(cpus / 4).unwrap_or(8).clamp(1, 8))
    }

    /// The reference file: every key with its default, commented out.
    #[must_use]
    pub fn default_toml() -> String {
        let mut out = reference::Writer::default();
        out.comment(
            "Configuration of prestaged. Every key is shown with its default; take the leading # away to set it.",
        );
        out.comment("Files in prestaged.toml.d/*.toml are read after this one, in lexical order; later wins.");
        out.comment("Sizes: \"512MiB\", \"20GiB\". Durations: \"500ms\", \"5s\", \"10m\", \"2h\", \"7d\".");
        out.comment("Check with `prestaged --check`, which looks at secrets too; apply with `systemctl reload prestaged`, or a restart where it asks for one.");
        Config::default().sections().reference(&mut out);
        out.raw("\n");
        out.comment(
            "Disks to serve at start, any number of them. Disks added with `prestagectl disk add` or `vm attach` need no entry. The same name in a \
             later file replaces the entry.",
        );
        out.comment("name: 1 to 64 letters, digits, `.`, `_`, `-`");
        out.comment(
            "store: /path, qcow2:/path[?backing=store], nbd://host[:port]/export or nbd+unix:///export?socket=/path",
        );
        out.comment("read_only: default false");
        out.comment("socket: default <run_dir>/vm/<name>.sock");
        out.comment(
            "nbd: also over NBD, on <run_dir>/nbd/<name>.sock, and over TCP where [nbd] says so; default false",
        );
        out.comment("vm: the machine that uses it, when there is only one; default none");
        out.comment("");
        out.comment("[[disk]]");
        out.comment("name = \"web1\"");
        out.comment("store = \"/srv/images/web1.raw\"");
        out.raw("\n");
        out.comment("Who is told what is done about machines (docs/events.md), any number up to 16. The same name in a later file replaces the entry.");
        out.comment("url: https://…; http:// to this host alone, unless allow_http = true");
        out.comment("secret_file: a file with a line such as whsec_… that nobody else may read, or the name of a systemd credential");
        out.comment("events: kinds of events; default all");
        out.comment("name: 1 to 64 characters; default host and port of the url");
        out.comment("ca_file: certificates that vouch for the receiver, in PEM; default those that this host trusts");
        out.comment("");
        out.comment("[[webhook]]");
        out.comment("url = \"https://manager.example/hooks/prestage\"");
        out.comment("secret_file = \"/etc/prestage/webhook.secret\"");
        out.comment("events = [\"allocation.changed\", \"anomaly\"]");
        out.finish()
    }

    /// Every key that has a default, as `{"section": {"key": default}}`, in the words of the file: sizes and durations are text.
    #[must_use]
    pub fn default_json() -> serde_json::Value {
        let text = Self::default_toml();
        let set = text.lines().map(|line| match line.strip_prefix('#') {
            // A key; sentences begin with a blank.
            Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase()) => key,
            _ => line,
        });
        // A test reads the file with all its keys set.
        toml::from_str(&set.collect::<Vec<_>>().join("\n")).unwrap_or_default()
    }

    fn sections(&self) -> Sections {
        let Config {
            daemon,
            cache,
            prefetch,
            store,
            export,
            nbd,
            libvirt,
            demand,
            memory,
            learner,
            model,
            api,
            disks: _,
            webhooks: _,
        } = self.clone();
        Sections { daemon, cache, prefetch, store, export, nbd, libvirt, demand, memory, learner, model, api }
    }
}

/// The configuration that a daemon runs by once it has taken over what a reload changes: settings that need a restart stay as they
/// run, so that what is reported is what is.
#[must_use]
pub fn reloaded(running: &Config, new: &Config) -> Config {
    let Sections { daemon, cache, prefetch, store, export, nbd, libvirt, demand, memory, learner, model, api } =
        running.sections().reloaded(&new.sections());
    let (disks, webhooks) = (new.disks.clone(), new.webhooks.clone());
    Config {
        daemon,
        cache,
        prefetch,
        store,
        export,
        nbd,
        libvirt,
        demand,
        memory,
        learner,
        model,
        api,
        disks,
        webhooks,
    }
}

/// What differs, in the order of the reference file, then disks and webhooks by name.
#[must_use]
pub fn diff(old: &Config, new: &Config) -> Vec<Change> {
    let mut changes = Vec::new();
    old.sections().diff(&new.sections(), &mut changes);
    named(&mut changes, "disk", (&old.disks, &new.disks), |disk| &disk.name);
    named(&mut changes, "webhook", (&old.webhooks, &new.webhooks), |webhook| &webhook.name);
    changes
}

/// What differs between lists whose items have names, by name.
fn named<T: PartialEq + fmt::Display>(
    changes: &mut Vec<Change>,
    kind: &str,
    (old, new): (&[T], &[T]),
    name: impl Fn(&T) -> &str,
) {
    let mut names: Vec<&str> = old.iter().chain(new).map(&name).collect();
    names.sort_unstable();
    names.dedup();
    for each in names {
        let find = |list: &'_ [T]| list.iter().position(|item| name(item) == each);
        let (before, after) = (find(old).map(|at| &old[at]), find(new).map(|at| &new[at]));
        if before != after {
            changes.push(Change {
                key: format!("{kind}.{each}"),
                needs_restart: false,
                old: before.map(ToString::to_string),
                new: after.map(ToString::to_string),
            });
        }
    }
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    match prestage_integration::privilege::read_to_string(path) {
        Ok(text) => parse(path, &text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ConfigError::file(
            path,
            "there is no such file; `prestagectl config default` prints one to start from".to_owned(),
        )),
        Err(error) => Err(ConfigError::file(path, format!("cannot be read: {error}"))),
    }
}

fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let folder = Config::drop_in_folder(path);
    let cannot = |error: io::Error| ConfigError::file(&folder, format!("cannot be listed: {error}"));
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(cannot)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let file = entry.map_err(cannot)?.path();
        let hidden = file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if file.extension().is_some_and(|extension| extension == "toml") && !hidden {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// A store that can be named; whether it can be opened shows at the start.
fn store_spec(text: &String) -> Result<(), String> {
    match text.parse::<StoreSpec>() {
        // The parser takes a relative path as below the working folder, which for a daemon is no one's guess.
        Ok(StoreSpec::File(_)) if !text.trim_start_matches("file:").starts_with('/') => {
            Err(format!("`{text}` is not an absolute path; start it with `/`"))
        }
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whoever can reach a TCP port must prove who it is.
fn nbd_needs_tls(document: &Table, problems: &mut Problems) {
    let Some(Entry { value: Value::Table(nbd), .. }) = document.get("nbd") else { return };
    let Some(Entry { place, .. }) = nbd.get("listen") else { return };
    let missing: Vec<&str> =
        ["tls_cert", "tls_key", "tls_client_ca"].into_iter().filter(|key| !nbd.contains_key(*key)).collect();
    if !missing.is_empty() {
        let message = format!("TCP is for clients with certificates only: set nbd.{} as well", missing.join(", nbd."));
        problems.add(place, "nbd.listen", message);
    }
}

fn read_disks(document: &mut Table, problems: &mut Problems) -> Vec<StaticDisk> {
    let entries = match document.remove("disk") {
        None => return Vec::new(),
        Some(Entry { value: Value::Array(entries), .. }) => entries,
        Some(Entry { place, .. }) => {
            problems.add(&place, "disk", "expected `[[disk]]` with double brackets: there may be several");
            return Vec::new();
        }
    };
    let mut disks: Vec<(StaticDisk, reader::Place)> = Vec::new();
    for Entry { value, place } in entries {
        let Value::Table(table) = value else {
            problems.add(&place, "disk", "expected `[[disk]]` with name and store");
            continue;
        };
        let mut section = Section::new("disk", table);
        let before = problems.0.len();
        let name = section.optional("name", |name: &String| validate_name(name), problems);
        let store = section.optional("store", store_spec, problems);
        let read_only = section.get("read_only", false, |_| Ok(()), problems);
        let socket = section.get("socket", None, |_| Ok(()), problems);
        let nbd = section.get("nbd", false, |_| Ok(()), problems);
        let vm = section.get("vm", None, |_| Ok(()), problems);
        section.finish(problems, |_| None);
        match (name, store) {
            (Some(name), Some(store)) => {
                let disk = StaticDisk { name, store, read_only, socket, nbd, vm };
                match disks.iter_mut().find(|(other, _)| other.name == disk.name) {
                    None => disks.push((disk, place)),
                    Some((_, first)) if first.file == place.file => problems.add(
                        &place,
                        "disk.name",
                        format!("disk `{}` is declared twice; first at line {}", disk.name, first.line.unwrap_or(0)),
                    ),
                    Some(earlier) => *earlier = (disk, place),
                }
            }
            // A bad value has been noted already.
            (name, store) if problems.0.len() == before => {
                let missing = if name.is_none() { "name" } else { "store" };
                debug_assert!(name.is_none() || store.is_none());
                problems.add(&place, format!("disk.{missing}"), format!("a `[[disk]]` needs `{missing}`"));
            }
            _ => {}
        }
    }
    disks.into_iter().map(|(disk, _)| disk).collect()
}

/// Memory of this host (`MemTotal` of /proc/meminfo).
pub fn host_ram_bytes() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.and_then(|kib| kib.checked_mul(1024)).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo has no MemTotal; give `cache.ram_size` as a size")
    })
}
