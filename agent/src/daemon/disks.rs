//! Disks on offer: a storage, its export, and what is known of both.
//!
//! A disk whose store cannot be opened stays on the list with the reason and is tried again: hosts boot before their
//! storage network does.

use super::Daemon;
use super::end::{Releasing, Step};
use super::places::lost_if_closed;
use super::qsd::{Qsd, QsdError};
use crate::config::Config;
use crate::learner::LearnerHandle;
use crate::nbd::{NbdDisk, NbdExport, NbdServer};
use crate::serve::DiskRunner;
use nix::unistd::Group;
use parking_lot::Mutex;
use prestage_cache::backend::{NbdOptions, SpecError, StoreError, StoreOptions, StoreSpec, follow};
use prestage_cache::counters::DiskCounters;
use prestage_cache::{Cache, Closing, OpenError, StorageHandle};
use prestage_integration::api::types::DiskOrigin;
use prestage_integration::api::{ApiError, Counters, ErrorCode};
use prestage_integration::export::{DiskConfig, Export, ExportError, ExportOptions, ExportState, SERIAL_MAX_BYTES};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Marks prefetches that an operator or a client asked for: no expert is to be praised or blamed for them.
pub(super) const TAG_ASKED: u8 = u8::MAX;
/// How long blocks on their way to the SSD tier may hold up the removal of a disk.
const DRAIN: Duration = Duration::from_secs(20);

/// What a disk is, as it is remembered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Definition {
    pub(super) name: String,
    pub(super) store: String,
    pub(super) read_only: bool,
    pub(super) socket: PathBuf,
    pub(super) origin: DiskOrigin,
    /// UUID or name of its machine, and the disk's target there.
    pub(super) vm: Option<String>,
    pub(super) target: Option<String>,
    pub(super) serial: Option<String>,
    /// Also over NBD.
    pub(super) nbd: bool,
}

/// A disk that is served.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) id: u32,
    pub(super) storage: StorageHandle,
    /// Stands between, where an image needs QEMU.
    pub(super) qemu: Option<Qsd>,
    pub(super) counters: Arc<DiskCounters>,
    pub(super) runner: Arc<DiskRunner>,
    pub(super) export: Mutex<Option<Export>>,
    pub(super) nbd: Option<Arc<NbdExport>>,
    /// Held by whoever looks at the store's size, and changes it.
    pub(super) sizing: Mutex<()>,
    /// What the guest was told.
    pub(super) capacity_bytes: AtomicU64,
    /// Why the store's size could not be had when it was last asked for; empty if it could.
    pub(super) size_trouble: Mutex<String>,
}

/// A disk and whether it works.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) definition: Definition,
    pub(super) state: Result<Arc<Served>, String>,
    /// Somebody is opening it.
    opening: bool,
    /// Changed in the configuration; the change waits for its machine to stop.
    deferred: bool,
    /// Attached to a machine that still has the store open itself: nothing is wrong.
    pub(super) waiting: bool,
}

impl Entry {
    /// A hypervisor is connected to its socket.
    pub(super) fn is_connected(&self) -> bool {
        let connected = |served: &Arc<Served>| served.export.lock().as_ref().is_some_and(Export::is_connected);
        self.state.as_ref().is_ok_and(connected)
    }

    /// Somebody is connected, in whatever way.
    pub(super) fn is_used(&self) -> bool {
        let clients = |served: &Arc<Served>| served.nbd.as_ref().is_some_and(|nbd| !nbd.clients().is_empty());
        self.is_connected() || self.state.as_ref().is_ok_and(clients)
    }

    /// What is lost if the disk is closed now, with how to save it.
    pub(super) fn lost_if_closed(&self) -> Option<String> {
        self.state.as_ref().ok().and_then(|served| lost_if_closed(served))
    }

    /// Keeps why the disk is not served; whether that is news.
    fn tell(&mut self, reason: &str) -> bool {
        match &mut self.state {
            Err(known) if known != reason => {
                *known = reason.to_owned();
                true
            }
            _ => false,
        }
    }
}

/// What opening and closing disks needs.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) config: Config,
    pub(super) cache: Cache,
    pub(super) learner: LearnerHandle,
    /// NBD over TCP.
    pub(super) nbd: Option<Arc<NbdServer>>,
}

/// Why a disk could not be offered.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiskError {
    #[error("there is a disk `{0}` already; choose another name or remove it first")]
    NameTaken(String),
    #[error("disk `{0}` is being added or removed at this moment; try again when that is done")]
    Busy(String),
    #[error("socket {} belongs to disk `{disk}`; choose another", socket.display())]
    SocketTaken { socket: PathBuf, disk: String },
    #[error(
        "{identity} is served by disk {disks} already, and one of the two is to write; two disks on one store would corrupt \
         it. Make both read-only, or remove {disks} first"
    )]
    StoreTaken { identity: String, disks: String },
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Qemu(#[from] QsdError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error("group `{0}` of the disks' sockets does not exist; create it or change `export.socket_group`")]
    NoGroup(String),
}

impl From<DiskError> for ApiError {
    fn from(error: DiskError) -> ApiError {
        let code = match &error {
            DiskError::NameTaken(_)
            | DiskError::SocketTaken { .. }
            | DiskError::StoreTaken { .. }
            | DiskError::Open(OpenError::InUse { .. }) => ErrorCode::AlreadyExists,
            DiskError::Busy(_) => ErrorCode::InUse,
            DiskError::Export(ExportError::InUse { .. }) => ErrorCode::AlreadyExists,
            DiskError::Spec(_) | DiskError::Export(ExportError::PathTooLong { .. }) => ErrorCode::InvalidRequest,
            DiskError::Open(_) | DiskError::Qemu(_) => ErrorCode::StoreFailed,
            DiskError::Export(_) | DiskError::NoGroup(_) => ErrorCode::NotPossible,
        };
        ApiError::new(code, error.to_string())
    }
}

/// All disks.
#[derive(Debug)]
pub(super) struct Disks {
    entries: Mutex<BTreeMap<String, Entry>>,
    /// Names under change.
    busy: Mutex<BTreeSet<String>>,
    next_id: AtomicU32,
    /// Counters of disks that are gone.
    retired: Mutex<Counters>,
    /// Exports of a predecessor, by disk, with their socket: to be gone on with.
    inherited: Mutex<HashMap<String, (PathBuf, ExportState<OwnedFd>)>>,
}

impl Disks {
    pub(super) fn new() -> Disks {
        Disks {
            entries: Mutex::default(),
            busy: Mutex::default(),
            next_id: AtomicU32::new(0),
            retired: Mutex::default(),
            inherited: Mutex::default(),
        }
    }

    pub(super) fn list(&self) -> Vec<Entry> {
        self.entries.lock().values().cloned().collect()
    }

    pub(super) fn get(&self, name: &str) -> Result<Entry, ApiError> {
        let entry = self.entries.lock().get(name).cloned();
        entry
            .ok_or_else(|| ApiError::not_found(format!("there is no disk `{name}`; `prestagectl disk list` shows all")))
    }

    pub(super) fn retired(&self) -> Counters {
        *self.retired.lock()
    }

    /// Names of the disks on a storage.
    pub(super) fn on_storage(&self, identity: &str) -> Vec<String> {
        let on = |served: &Arc<Served>| served.storage.chain().any(|storage| storage.identity() == identity);
        let of = |entry: &Entry| entry.state.as_ref().is_ok_and(on);
        self.entries.lock().values().filter(|entry| of(entry)).map(|entry| entry.definition.name.clone()).collect()
    }

    /// Opens and exports a disk. Blocks.
    pub(super) fn add(&self, host: &Host, definition: Definition) -> Result<(), DiskError> {
        let name = definition.name.clone();
        self.expect(definition)?;
        match self.open_expected(host, &name) {
            Some(Err(error)) => {
                self.entries.lock().remove(&name);
                Err(error)
            }
            Some(Ok(())) => Ok(()),
            None => Err(DiskError::Busy(name)),
        }
    }

    /// Marks a disk whose change waits; false if it was marked before.
    pub(super) fn defer(&self, name: &str) -> bool {
        self.entries.lock().get_mut(name).is_some_and(|entry| !std::mem::replace(&mut entry.deferred, true))
    }

    /// Takes a name for a change of its disk that consists of several steps.
    pub(super) fn reserve(&self, name: &str) -> Result<Reserved<'_>, DiskError> {
        if !self.busy.lock().insert(name.to_owned()) {
            return Err(DiskError::Busy(name.to_owned()));
        }
        Ok(Reserved { disks: self, name: name.to_owned() })
    }

    /// Puts a disk on the list that [`Disks::open_missing`] is to open.
    pub(super) fn expect(&self, definition: Definition) -> Result<(), DiskError> {
        let mut entries = self.entries.lock();
        if entries.contains_key(&definition.name) {
            return Err(DiskError::NameTaken(definition.name));
        }
        if let Some(other) = entries.values().find(|entry| entry.definition.socket == definition.socket) {
            let disk = other.definition.name.clone();
            return Err(DiskError::SocketTaken { socket: definition.socket, disk });
        }
        let entry = Entry {
            state: Err("being opened".to_owned()),
            opening: false,
            deferred: false,
            waiting: false,
            definition,
        };
        entries.insert(entry.definition.name.clone(), entry);
        Ok(())
    }

    /// Opens every disk that is on the list and not served, all at once: a store that hangs holds up its own disk only.
    /// Blocks until all have answered.
    pub(super) fn open_missing(&self, host: &Host) {
        let missing: Vec<String> =
            self.list().into_iter().filter(|e| e.state.is_err()).map(|e| e.definition.name).collect();
        std::thread::scope(|scope| {
            for name in &missing {
                scope.spawn(move || {
                    if let Some(Err(error)) = self.open_expected(host, name) {
                        // Every few seconds the same: loud once, then quiet.
                        let mut entries = self.entries.lock();
                        let Some(entry) = entries.get_mut(name) else { return };
                        let locked = matches!(&error, DiskError::Open(OpenError::Store(StoreError::Locked { .. })));
                        entry.waiting = locked && entry.definition.origin == DiskOrigin::Attach;
                        let news = entry.tell(&error.to_string());
                        if news && entry.waiting {
                            tracing::info!(
                                disk = name,
                                "waits until its machine stops, which has the store open itself"
                            );
                        } else if news {
                            tracing::warn!(disk = name, %error, "disk not served; it is tried again");
                        }
                    }
                });
            }
        });
    }

    /// `None` if there is no such disk, or somebody else is opening it.
    fn open_expected(&self, host: &Host, name: &str) -> Option<Result<(), DiskError>> {
        let definition = {
            let mut entries = self.entries.lock();
            let entry = entries.get_mut(name).filter(|entry| !entry.opening && entry.state.is_err())?;
            entry.opening = true;
            entry.definition.clone()
        };
        let opened = self.open(host, &definition);
        let mut entries = self.entries.lock();
        let entry = entries.get_mut(name);
        match (opened, entry) {
            (Ok(served), Some(entry)) => {
                tracing::info!(
                    disk = name,
                    store = definition.store,
                    socket = %definition.socket.display(),
                    "disk served"
                );
                entry.opening = false;
                entry.waiting = false;
                entry.state = Ok(served);
                Some(Ok(()))
            }
            (Ok(served), None) => {
                drop(entries);
                self.end(host, &served, Closing { drain: DRAIN, parted: true });
                None
            }
            (Err(error), Some(entry)) => {
                entry.opening = false;
                Some(Err(error))
            }
            (Err(_), None) => None,
        }
    }

    fn open(&self, host: &Host, definition: &Definition) -> Result<Arc<Served>, DiskError> {
        let options = export_options(&host.config)?;
        let spec: StoreSpec = definition.store.parse()?;
        let spec = follow(&spec, host.config.store.image_folder.as_deref()).map_err(OpenError::from)?;
        let wanted = store_options(&host.config, definition.read_only);
        let (opened, qemu) = match host.cache.open(&spec, wanted.clone()) {
            Err(OpenError::Store(StoreError::NeedsQemu { why, .. })) => {
                let qemu = Qsd::start(&host.config, &definition.name, &spec, definition.read_only, why)?;
                let nbd = NbdOptions { files: qemu.files().to_vec(), ..wanted.nbd.clone() };
                (host.cache.open(qemu.spec(), StoreOptions { nbd, ..wanted }), Some(qemu))
            }
            opened => (opened, None),
        };
        let storage = opened.map_err(|error| match error {
            OpenError::InUse { identity } => self.holder(identity),
            OpenError::Store(StoreError::Locked { store, writer }) => {
                self.holder_of_file(&store).unwrap_or(OpenError::Store(StoreError::Locked { store, writer }).into())
            }
            error => error.into(),
        })?;
        match self.export(host, definition, &storage, qemu, &options) {
            Ok(served) => Ok(served),
            Err(error) => {
                host.cache.close(&storage, Closing { drain: Duration::ZERO, parted: false });
                Err(error.into())
            }
        }
    }

    /// Names who has the store; without a name where nobody has it any more, or not yet.
    fn holder(&self, identity: String) -> DiskError {
        let disks: Vec<String> = self.on_storage(&identity).iter().map(|disk| format!("`{disk}`")).collect();
        match disks.is_empty() {
            true => OpenError::InUse { identity }.into(),
            false => DiskError::StoreTaken { identity, disks: disks.join(", ") },
        }
    }

    /// The same of a file that is locked: whether it is we who have it, as another format.
    fn holder_of_file(&self, store: &str) -> Option<DiskError> {
        let path = store.split_once(':')?.1;
        let held = ["file:", "qcow2:"].map(|scheme| format!("{scheme}{path}"));
        held.into_iter().find(|identity| !self.on_storage(identity).is_empty()).map(|identity| self.holder(identity))
    }

    fn export(
        &self,
        host: &Host,
        definition: &Definition,
        storage: &StorageHandle,
        qemu: Option<Qsd>,
        options: &ExportOptions,
    ) -> Result<Arc<Served>, ExportError> {
        let Host { config, learner, .. } = host;
        let info = storage.info();
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let counters = Arc::new(DiskCounters::default());
        let runner = Arc::new(DiskRunner::new(
            definition.name.clone(),
            id,
            storage.clone(),
            Arc::clone(&counters),
            learner.clone(),
        ));
        let disk = DiskConfig {
            read_only: definition.read_only || info.read_only,
            serial: definition.serial.clone().unwrap_or_else(|| serial(&definition.name)),
            queue_size: u16::try_from(config.export.queue_size).unwrap_or(u16::MAX),
            seg_max: (config.export.queue_size - 2).min(126),
            discard: info.can_discard,
            ..DiskConfig::new(info.size_bytes)
        };
        // Before the export: its first event must find the disk known.
        storage.chain().for_each(|storage| learner.add_storage(storage.clone()));
        learner.add_disk(
            id,
            storage.chain().map(StorageHandle::id).collect(),
            definition.vm.clone().unwrap_or_default(),
        );
        let read_only = disk.read_only;
        let started = match self.inherited(definition) {
            Some(state) => Export::adopt(&definition.socket, disk, Arc::clone(&runner) as _, state),
            None => Export::start(&definition.socket, disk, Arc::clone(&runner) as _, options),
        };
        let started = started.and_then(|export| {
            if !definition.nbd {
                return Ok((export, None));
            }
            let disk = NbdDisk {
                name: definition.name.clone(),
                id,
                storage: storage.clone(),
                counters: Arc::clone(&counters),
                read_only,
                cache: host.cache.clone(),
                tag: TAG_ASKED,
                max_clients: config.nbd.max_clients,
            };
            NbdExport::start(disk, &config.nbd_socket(&definition.name), options).map(|nbd| (export, Some(nbd)))
        });
        let (export, nbd) = started.inspect_err(|_| learner.remove_disk(id))?;
        if let (Some(server), Some(nbd)) = (&host.nbd, &nbd) {
            server.add(nbd);
        }
        let export = Mutex::new(Some(export));
        let capacity_bytes = AtomicU64::new(info.size_bytes);
        Ok(Arc::new(Served {
            id,
            storage: storage.clone(),
            qemu,
            counters,
            runner,
            export,
            nbd,
            sizing: Mutex::default(),
            capacity_bytes,
            size_trouble: Mutex::default(),
        }))
    }

    /// Ends a disk's export, waits for its requests and closes its storage if no other disk uses it. Blocks. With `parted`
    /// the store leaves our hands, as opposed to a restart. Returns what it was.
    pub(super) fn remove(&self, host: &Host, name: &str, parted: bool) -> Option<Definition> {
        let entry = self.entries.lock().remove(name)?;
        if let Ok(served) = &entry.state {
            // How it could have been saved was said while that was possible.
            if lost_if_closed(served).is_some() {
                tracing::error!(
                    disk = name,
                    store = entry.definition.store,
                    "the store was deleted or replaced while it was served: what nobody has saved of it is gone now"
                );
            }
            self.end(host, served, Closing { drain: DRAIN, parted });
        }
        tracing::info!(disk = name, "disk no longer served");
        Some(entry.definition)
    }

    fn end(&self, host: &Host, served: &Served, closing: Closing) {
        let export = served.export.lock().take();
        Self::end_nbd(host, served);
        if let Some(export) = export {
            export.stop();
        }
        self.close(host, served, closing);
    }

    fn end_nbd(host: &Host, served: &Served) {
        let Some(nbd) = &served.nbd else { return };
        if let Some(server) = &host.nbd {
            server.remove(nbd.name());
        }
        nbd.stop();
    }

    /// Closes the storage of a disk whose export has ended.
    fn close(&self, host: &Host, served: &Served, closing: Closing) {
        self.retired.lock().add(&super::report::counters(&host.cache, served));
        host.learner.remove_disk(served.id);
        for closed in host.cache.close_chain(&served.storage, closing) {
            host.learner.remove_storage_blocking(closed);
        }
        if let Some(qemu) = &served.qemu {
            qemu.stop();
        }
    }

    /// Takes note of what a predecessor has left.
    pub(super) fn inherit(&self, exports: HashMap<String, (PathBuf, ExportState<OwnedFd>)>) {
        *self.inherited.lock() = exports;
    }

    /// Lets go of what was inherited for disks that are not on the list (any more): their hypervisors see them end.
    pub(super) fn disinherit_strangers(&self) {
        let entries = self.entries.lock();
        self.inherited.lock().retain(|name, _| entries.contains_key(name));
    }

    fn inherited(&self, definition: &Definition) -> Option<ExportState<OwnedFd>> {
        let (socket, state) = self.inherited.lock().remove(&definition.name)?;
        (socket == definition.socket).then_some(state)
    }

    /// Ends all disks side by side, leaving their sockets and connections to a successor.
    pub(super) fn release_all(daemon: &Arc<Daemon>, drain: Duration) -> Releasing {
        let entries = std::mem::take(&mut *daemon.disks.entries.lock());
        let (tell, steps) = std::sync::mpsc::channel();
        let mut names = BTreeSet::new();
        for (name, entry) in entries {
            let Ok(served) = entry.state else { continue };
            names.insert(name.clone());
            let (daemon, tell) = (Arc::clone(daemon), tell.clone());
            std::thread::spawn(move || {
                let released = served.export.lock().take().map(Export::release);
                let _ = tell.send(Step::Released(name.clone(), entry.definition.socket, released));
                let host = daemon.host();
                // Its clients connect again.
                Self::end_nbd(&host, &served);
                daemon.disks.close(&host, &served, Closing { drain, parted: false });
                let _ = tell.send(Step::Closed(name));
            });
        }
        Releasing::new(names, steps)
    }

    /// Ends all disks side by side, waiting until `deadline`. What has not ended by then is left as a crash would leave it:
    /// the hypervisors have the requests that were not answered and give them to the next daemon. Returns how many.
    pub(super) fn remove_all(daemon: &Arc<Daemon>, deadline: Instant) -> usize {
        let names: Vec<_> = daemon.disks.entries.lock().keys().cloned().collect();
        let (done, ended) = std::sync::mpsc::channel();
        for name in &names {
            let (daemon, name, done) = (Arc::clone(daemon), name.clone(), done.clone());
            std::thread::spawn(move || {
                daemon.disks.remove(&daemon.host(), &name, false);
                let _ = done.send(());
            });
        }
        let waited = || ended.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok();
        names.len() - (0..names.len()).take_while(|_| waited()).count()
    }
}

/// A name taken for a change; given back when dropped.
#[derive(Debug)]
pub(super) struct Reserved<'a> {
    disks: &'a Disks,
    name: String,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.disks.busy.lock().remove(&self.name);
    }
}

impl Daemon {
    /// What opening and closing disks needs, with the configuration of this moment.
    pub(super) fn host(&self) -> Host {
        Host {
            config: self.config.lock().clone(),
            cache: self.cache.clone(),
            learner: self.learner.clone(),
            nbd: self.nbd.clone(),
        }
    }

    /// A definition with the defaults of this host.
    pub(super) fn define(&self, name: &str, store: &str, origin: DiskOrigin) -> Definition {
        Definition {
            name: name.to_owned(),
            store: store.to_owned(),
            read_only: false,
            socket: self.config.lock().disk_socket(name),
            origin,
            vm: None,
            target: None,
            serial: None,
            nbd: false,
        }
    }
}

/// What the guest reads with GET_ID unless its machine says otherwise: the name, as far as it fits.
fn serial(name: &str) -> String {
    name.chars().filter(char::is_ascii_graphic).take(SERIAL_MAX_BYTES).collect()
}

fn store_options(config: &Config, read_only: bool) -> StoreOptions {
    StoreOptions {
        read_only,
        nbd: NbdOptions {
            connections: config.store.nbd_connections as usize,
            retry_for: config.store.retry_for,
            request_timeout: config.store.request_timeout,
            ..NbdOptions::default()
        },
        ..StoreOptions::default()
    }
}

fn export_options(config: &Config) -> Result<ExportOptions, DiskError> {
    let group = match &config.export.socket_group {
        None => None,
        Some(name) => match Group::from_name(name) {
            Ok(Some(group)) => Some(group.gid.as_raw()),
            _ => return Err(DiskError::NoGroup(name.clone())),
        },
    };
    Ok(ExportOptions { mode: config.export.socket_mode.0, owner: None, group })
}
