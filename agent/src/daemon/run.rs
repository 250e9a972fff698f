//! From the configuration to a running daemon, and back down.
//!
//! Order of the way up: API socket (tells a second daemon apart), database (or what stands in for it), tiers, learner, disks, libvirt; ready. The
//! way down is the reverse: no more requests, guests' requests under way end, blocks on their way to the SSD tier are
//! written, profiles saved, the SSD tier marked clean.

use super::check::{self, Fits};
use super::disks::Definition;
use super::drained::Drained;
use super::end::{Threads, hand_over, shut_down};
use super::handover::{self, Gate, Invitation, Locks};
use super::places::Looking;
use super::questions::Questions;
use super::service::with_ways;
use super::tiers::{Tiers, ssd_words};
use super::upkeep::{keep_looking, keep_outcomes, keep_trying, open_missing};
use super::{Daemon, Disks, Shared, control, learner_settings, machines, models, reload};
use crate::config::{Config, ConfigError, Engine, HugePages, RateLimit};
use crate::demand::run::Demand;
use crate::learner::LearnerHandle;
use crate::learner::run::unix_ms;
use crate::memory::{MemoryHandle, MemorySettings};
use crate::nbd::NbdServer;
use crate::privilege::Sandbox;
use crate::store::rescue::{Rescued, open_or_rescue};
use crate::store::{Store, StoreError};
use nix::fcntl::{Flock, FlockArg};
use parking_lot::Mutex;
use prestage_cache::engine::EngineMode;
use prestage_cache::policy::{BudgetConfig, CoreConfig};
use prestage_cache::ssd::{self, SsdError, SsdOptions, SsdTier};
use prestage_cache::{Cache, CacheConfig, arena};
use prestage_integration::api::types::DiskOrigin;
use prestage_integration::api::{self, Limits, ServeError, SocketOptions};
use prestage_integration::handover::HandOverError;
use prestage_integration::libvirt::{Hypervisor, HypervisorConfig, HypervisorError, Uuid};
use sd_notify::NotifyState;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedReceiver;

/// How often users' activity that was not written down at once is.
const ACTIVITIES: Duration = Duration::from_secs(10);

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    pub config: PathBuf,
    /// `section.key=value`, stronger than the files.
    pub overrides: Vec<String>,
    /// From the prestaged that runs.
    pub take_over: bool,
    /// What was given up before.
    pub sandbox: Arc<Sandbox>,
}

/// Sets the log filter of the running process.
pub type SetLog = Box<dyn Fn(&str) + Send + Sync>;

/// Why the daemon cannot start.
#[derive(Debug, Error)]
pub enum RunError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("cannot make folder {}: {source}", path.display())]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("{} belongs to a running prestaged; stop it or set another daemon.state_dir", path.display())]
    StateInUse { path: PathBuf },
    #[error(transparent)]
    Api(#[from] ServeError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot reserve {bytes} bytes for the RAM tier: {source}; lower cache.ram_size")]
    Ram { bytes: u64, source: std::io::Error },
    #[error("{0}")]
    RamTooLarge(String),
    #[error("cannot find out how much memory this host has: {0}; set cache.ram_size to a size")]
    HostMemory(std::io::Error),
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error(transparent)]
    HandOver(#[from] HandOverError),
    #[error("nobody could take over; see the log")]
    NotHandedOver,
    #[error("the broker has ended, and with it all that needs privilege; prestaged stops, to be started anew")]
    BrokerLost,
    #[error("cannot start: {0}")]
    Io(#[from] std::io::Error),
}

fn make_folder(path: &Path, mode: u32) -> Result<(), RunError> {
    let folder = |source| RunError::Folder { path: path.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(folder)
}

/// Runs until SIGTERM or SIGINT, or until another prestaged has taken over.
///
/// # Errors
/// See [`RunError`]: everything that keeps the daemon from starting. A disk whose store is not there does not.
pub async fn run(options: Options, config: Config, set_log: SetLog) -> Result<(), RunError> {
    // First of all: a signal that comes while starting must lead to an orderly end.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut upgrade = signal(SignalKind::user_defined2())?;
    raise_limits();
    // QEMU goes through it to the templates it maps; the database has a mode of its own.
    if let Err(error) = make_folder(&config.daemon.state_dir, 0o751) {
        // The database says so again, and a stand-in takes its place.
        tracing::error!(%error, "no folder for the database");
    }
    // QEMU, another user, must reach its socket through these.
    make_folder(&config.daemon.run_dir, 0o755)?;
    make_folder(&config.daemon.run_dir.join("vm"), 0o755)?;
    make_folder(&config.daemon.run_dir.join("nbd"), 0o755)?;
    let invitation = Invitation::new(&options.config, &options.overrides)?;
    let mut inheritance = match options.take_over {
        true => tokio::task::block_in_place(|| handover::claim(&config))?,
        false => None,
    };
    let inherited = inheritance.as_mut().and_then(|from| from.api(&config.api_socket()));
    let listener = match inherited {
        Some((listener, lock)) => api::adopt(&config.api_socket(), listener, lock)?,
        None => api::bind(&SocketOptions {
            path: config.api_socket(),
            mode: config.api.mode.0,
            group: config.api.group.clone(),
        })?,
    };
    let heirloom = listener.heirloom()?;
    if inheritance.is_some() {
        // Until it is known that guests are served: whoever is asked next wants to find the name.
        heirloom.leave();
    }
    let inherited = inheritance.as_mut().and_then(|from| from.state(&config.daemon.state_dir));
    let state = lock_state(&config.daemon.state_dir, inherited)?;
    let (state_dir, api_socket) = (config.daemon.state_dir.clone(), config.api_socket());
    // The database may be locked, and waited for.
    let (daemon, threads) = tokio::task::block_in_place(|| start(config, Arc::clone(&options.sandbox)))?;
    if let Some(inheritance) = &mut inheritance {
        daemon.disks.inherit(inheritance.exports());
    }
    if let Err(error) = expect_disks(&daemon).await {
        tracing::error!(%error, "disks not restored");
    }
    daemon.disks.disinherit_strangers();
    if inheritance.is_some() {
        // Guests wait; those of a store that does not answer wait for that, and go on whenever it does.
        let shared = daemon.clone();
        let opening = tokio::spawn(async move { open_missing(&shared).await });
        if tokio::time::timeout(handover::OPENING, opening).await.is_err() {
            tracing::warn!("stores do not answer yet; their disks are taken over when they do");
        }
    }
    tokio::task::block_in_place(|| super::templates::clear(&daemon));
    let stop = Arc::new(Notify::new());
    let mut tasks = Vec::new();
    let closing = Arc::clone(&stop);
    let server =
        tokio::spawn(api::serve(listener, Arc::new(control::Handle(daemon.clone())), Limits::default(), async move {
            closing.notified().await
        }));
    // Ready means that guests can be served: whoever waits for this daemon waits for its disks.
    open_missing(&daemon).await;
    let taken_over = inheritance.is_some();
    heirloom.keep();
    if let Some(inheritance) = inheritance {
        let shared = daemon.clone();
        tasks.push(tokio::spawn(async move {
            let gone = tokio::task::spawn_blocking(move || inheritance.serving()).await;
            tracing::info!(well = gone.is_ok(), "the predecessor has ended");
            // The service manager listens to us from now on.
            let _ = sd_notify::notify(&[NotifyState::Ready]);
            // Disks that the predecessor could not let go of are free now.
            open_missing(&shared).await;
        }));
    }
    let mut gate = Gate::open(&daemon.config.lock());
    if let Some(hypervisor) = daemon.hypervisor.clone() {
        tasks.push(tokio::spawn(machines::watch(daemon.clone(), hypervisor)));
    }
    let moves = daemon.memory_moves.lock().take();
    if let (Some(hypervisor), Some(memory), Some(moves)) = (&daemon.hypervisor, &daemon.memory, moves) {
        tasks.push(tokio::spawn(crate::memory::places::follow(hypervisor.clone(), memory.clone(), moves)));
    }
    super::webhooks::tell(&daemon).await;
    if let Some(demand) = daemon.demand.clone() {
        let config = daemon.config.lock().clone();
        let training = demand.start_training(config.daemon.state_dir.join("demand.model"));
        let training = training.inspect_err(|error| tracing::error!(%error, "no demand model is trained")).ok();
        let (told, shared) = (Arc::clone(&demand.told), daemon.clone());
        tasks.push(tokio::spawn(async move {
            loop {
                told.notified().await;
                if let Some(couriers) = shared.couriers.lock().as_ref() {
                    couriers.wake();
                }
            }
        }));
        let activities = demand.clone();
        tasks.push(tokio::spawn(async move {
            loop {
                tokio::time::sleep(ACTIVITIES).await;
                activities.write_activities().await;
            }
        }));
        tasks.push(tokio::spawn(demand.run(config, training)));
    }
    tasks.push(tokio::spawn(keep_trying(daemon.clone())));
    tasks.push(tokio::spawn(keep_looking(daemon.clone())));
    tasks.push(tokio::spawn(keep_outcomes(daemon.clone())));
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        engine = ?daemon.cache.engine(),
        shards = daemon.cache.shards(),
        ram_bytes = u64::from(daemon.cache.arena().slots()) * 65536,
        "prestaged ready"
    );
    if !taken_over {
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }
    let mut ended = Ok(());
    let successor = loop {
        tokio::select! {
            _ = terminate.recv() => break None,
            _ = interrupt.recv() => break None,
            () = options.sandbox.lost.notified() => {
                ended = Err(RunError::BrokerLost);
                break None;
            }
            _ = hangup.recv() => {
                // A store or a device that does not answer keeps nobody from stopping.
                tokio::select! {
                    () = reload::reload(&daemon, &options, &set_log) => {}
                    _ = terminate.recv() => break None,
                    _ = interrupt.recv() => break None,
                }
            }
            _ = upgrade.recv() => {
                if let Err(error) = invitation.newest() {
                    tracing::warn!(%error, "no successor could be started; this prestaged goes on serving");
                }
            }
            successor = gate.admitted() => break Some(successor),
        }
    };
    match &successor {
        Some(successor) if successor.plain => {
            tracing::info!(pid = successor.pid(), "stopping for another prestaged");
            handover::tell_main_pid(successor);
        }
        Some(successor) => {
            tracing::info!(pid = successor.pid(), "handing over");
            heirloom.leave();
        }
        None => {
            tracing::info!("stopping");
            let _ = sd_notify::notify(&[NotifyState::Stopping]);
        }
    }
    stop.notify_one();
    // Answers without an end of their own would hold up the API's.
    daemon.learner.end_traces();
    for task in &tasks {
        task.abort();
    }
    if let Ok(Err(error)) = server.await {
        tracing::warn!(%error, "API ended with an error");
    }
    if let Some(demand) = &daemon.demand {
        demand.write_activities().await;
    }
    let couriers = daemon.couriers.lock().take();
    if let Some(couriers) = couriers {
        couriers.stop().await;
    }
    let successor = match successor {
        Some(successor) if !successor.plain => successor,
        other => {
            let down = tokio::task::spawn_blocking(move || shut_down(&daemon, threads)).await;
            if down.is_err() {
                tracing::error!(
                    "shutdown did not complete; the SSD tier will start with what its last checkpoint vouches for"
                );
            }
            // It waits for our end, which is that of the process.
            std::mem::forget(other);
            return ended;
        }
    };
    // What can be written down now need not be while guests wait.
    if let Err(error) = daemon.learner.save().await {
        tracing::warn!(%error, "profiles not saved ahead");
    }
    let given = tokio::task::spawn_blocking(move || {
        let copy = state.as_ref().and_then(|lock| lock.try_clone().ok()).map(|lock| (state_dir, lock.into()));
        // Dropped, it would be unlocked, for the successor too.
        std::mem::forget(state);
        let locks = Locks { api: Some((api_socket, heirloom.listener, heirloom.lock)), state: copy };
        let given = hand_over(&daemon, threads, gate, &successor, locks, &invitation);
        std::mem::forget(successor);
        given
    });
    match given.await {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(RunError::NotHandedOver),
    }
}

/// Two daemons on one database would undo each other's changes. `None`: nothing can be written there.
fn lock_state(folder: &Path, inherited: Option<OwnedFd>) -> Result<Option<Flock<std::fs::File>>, RunError> {
    let path = folder.join("lock");
    let file = match inherited {
        // Locked already, for whoever has it open.
        Some(file) => Ok(file.into()),
        None => std::fs::File::options().create(true).truncate(false).write(true).open(&path),
    };
    // A file system that takes no writes still knows locks.
    match file.or_else(|error| std::fs::File::open(&path).map_err(|_| error)) {
        Ok(file) => match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err(_) => Err(RunError::StateInUse { path: folder.to_owned() }),
        },
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "the state is not locked against a second prestaged");
            Ok(None)
        }
    }
}

/// Many disks need many descriptors; the soft limit of 1024 is for programs that use select(2).
fn raise_limits() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::debug!(%error, "descriptor limit not raised");
    }
}

pub(super) fn budget(config: &Config) -> BudgetConfig {
    BudgetConfig {
        max_bytes_in_flight: config.prefetch.max_bytes_in_flight.0,
        bytes_per_second: match config.prefetch.rate_per_store {
            RateLimit::Unlimited => None,
            RateLimit::BytesPerSecond(bytes) => Some(bytes),
        },
        ..BudgetConfig::default()
    }
}

fn engine(config: &Config) -> EngineMode {
    match config.cache.engine {
        Engine::Auto => EngineMode::Auto,
        Engine::IoUring => EngineMode::IoUring,
        Engine::ThreadPool => EngineMode::ThreadPool,
    }
}

/// Offers disks over TCP. That it cannot is no reason to leave machines without their disks.
fn start_nbd(config: &Config) -> (Option<Arc<NbdServer>>, Option<String>) {
    let nbd = &config.nbd;
    let (Some(listen), Some(certificate), Some(key), Some(authority)) =
        (nbd.listen, &nbd.tls_cert, &nbd.tls_key, &nbd.tls_client_ca)
    else {
        return (None, None);
    };
    match NbdServer::start(listen, certificate, key, authority, engine(config)) {
        Ok(server) => (Some(Arc::new(server)), None),
        Err(error) => {
            tracing::error!("{error}");
            (None, Some(error.to_string()))
        }
    }
}

fn start(config: Config, sandbox: Arc<Sandbox>) -> Result<(Shared, Threads), RunError> {
    let Rescued { store, trouble: store_trouble, stand_in } =
        open_or_rescue(&config.store_path(), &config.daemon.run_dir.join("stand-in.db"))?;
    if let Some(trouble) = &store_trouble {
        tracing::error!("{trouble}");
    }
    let drained = Drained::load(&config);
    let (ssd, ssd_trouble) = open_ssd(&config, &drained);
    let ram_bytes = config.ram_bytes().map_err(RunError::HostMemory)?;
    match check::ram(&config) {
        Fits::Yes => {}
        Fits::Hardly(why) => tracing::warn!("{why}"),
        // Once guests are on it, it would be the kernel that ends something.
        Fits::No(why) => return Err(RunError::RamTooLarge(why)),
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let cache = CacheConfig {
        ram_bytes,
        huge_pages: match config.cache.huge_pages {
            HugePages::Try => arena::HugePages::Try,
            HugePages::No => arena::HugePages::No,
            HugePages::Require => arena::HugePages::Require,
        },
        shards: config.shard_count(cpus) as usize,
        engine: engine(&config),
        // The slots follow from `ram_bytes`.
        policy: CoreConfig { budget: budget(&config), ..CoreConfig::with_slots(0) },
    };
    let cache = Cache::new(cache, ssd).map_err(|source| RunError::Ram { bytes: ram_bytes, source })?;
    if let Some(since) = drained.ram {
        tracing::warn!("RAM tier: {}", Drained::words(since, "ram"));
        if let Err(error) = cache.resize_ram(0) {
            tracing::error!(%error, "the RAM tier could not be left out");
        }
    }
    let (nbd, nbd_trouble) = start_nbd(&config);
    // Rings are there, and no more will be.
    sandbox.seal();
    let (models, models_thread) = models::start(&store, &config)?;
    let (learner, learner_thread) =
        LearnerHandle::start(cache.clone(), store.clone(), models.clone(), learner_settings(&config, stand_in))?;
    match store.thresholds() {
        Ok(thresholds) => learner.thresholds(thresholds.into_iter().collect()),
        // Guests need their disks more than an operator's fine tuning.
        Err(error) => tracing::warn!(%error, "thresholds not read; the configured one holds for all disks"),
    }
    let hypervisor = match config.libvirt.enabled {
        false => None,
        true => Some(Hypervisor::start(HypervisorConfig {
            uri: config.libvirt.uri.clone(),
            call_timeout: config.libvirt.timeout,
            ..HypervisorConfig::default()
        })?),
    };
    let (demand, demand_trouble) = match &hypervisor {
        Some(hypervisor) if config.demand.enabled => {
            let most = if stand_in { super::STAND_IN_BYTES } else { u64::MAX };
            match Demand::new(store.clone(), hypervisor.clone(), &config, &super::report::host_name(), most) {
                Ok(demand) => (Some(demand), None),
                Err(error) => {
                    // Guests need their disks more than anybody needs forecasts.
                    let trouble = format!("off, no machine is measured or changed: {error}");
                    tracing::error!("demand: {trouble}");
                    (None, Some(trouble))
                }
            }
        }
        _ => (None, None),
    };
    let memory = start_memory(&config, hypervisor.is_some(), &store, demand.as_ref());
    let (memory, memory_thread, moves) = match memory {
        Some((handle, thread, moves)) => (Some(handle), Some(thread), Some(moves)),
        None => (None, None, None),
    };
    let daemon = Daemon {
        config: Mutex::new(config),
        sandbox,
        cache,
        tiers: Tiers::new(drained),
        reloads: Mutex::default(),
        store,
        learner,
        models,
        disks: Disks::new(),
        looking: Looking::default(),
        questions: Questions::default(),
        hypervisor,
        templates: Default::default(),
        demand,
        demand_trouble,
        memory,
        memory_moves: Mutex::new(moves),
        nbd,
        nbd_trouble,
        couriers: Mutex::default(),
        untold: Mutex::default(),
        started: Instant::now(),
        started_unix_ms: unix_ms(),
        ssd_trouble: Mutex::new(ssd_trouble),
        store_trouble,
        stand_in,
        machine_names: Mutex::default(),
        outcomes: Mutex::default(),
    };
    Ok((Arc::new(daemon), Threads { learner: learner_thread, models: Some(models_thread), memory: memory_thread }))
}

/// The program `prestage-memory`.
pub(crate) fn helper(config: &Config) -> PathBuf {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.join("prestage-memory"));
    config.memory.helper.clone().or_else(beside).unwrap_or_else(|| "prestage-memory".into())
}

/// Starts to watch guests' memory. Without libvirt nobody says where that is.
fn start_memory(
    config: &Config,
    libvirt: bool,
    store: &Store,
    demand: Option<&Demand>,
) -> Option<(MemoryHandle, std::thread::JoinHandle<()>, UnboundedReceiver<Uuid>)> {
    if !config.memory.enabled || !libvirt {
        return None;
    }
    let started = MemoryHandle::start(helper(config), store.clone(), MemorySettings::of(config));
    let started = started.inspect_err(|error| tracing::error!(%error, "guests' memory is not watched")).ok()?;
    if let Some(demand) = demand {
        demand.tell_memory(&started.0);
    }
    Some(started)
}

/// Opens the SSD tier. Without it guests are served all the same, only slower: a sick cache disk is no reason to leave
/// machines without their disks.
fn open_ssd(config: &Config, drained: &Drained) -> (Option<SsdTier>, Option<String>) {
    let lineage = config.daemon.state_dir.join("ssd.last");
    let (tier, trouble) = match &drained.ssd {
        None => try_ssd(config),
        Some(ssd) => {
            tracing::warn!(path = %ssd.path.display(), "SSD tier: {}", ssd.words(None));
            (None, None)
        }
    };
    if tier.is_none()
        && let Err(error) = ssd::run_without(&lineage)
    {
        tracing::error!(
            path = %lineage.display(), %error,
            "it could not be noted that prestaged runs without an SSD tier; delete the tier's file before it is used again"
        );
    }
    (tier, trouble)
}

/// What opening the SSD tier needs to know beside where it is.
fn ssd_options(config: &Config) -> SsdOptions {
    SsdOptions {
        // In memory: it outlives a killed daemon, and that is what it is for.
        own_writes: Some(config.daemon.run_dir.join("ssd.own")),
        veto: Some(config.daemon.state_dir.join("ssd.veto")),
        lineage: Some(config.daemon.state_dir.join("ssd.last")),
        ..SsdOptions::default()
    }
}

/// Opens the SSD tier while guests are served: what is found there counts for nothing, since nobody marked their writes.
pub(super) fn open_empty_ssd(config: &Config, size_bytes: u64) -> Result<SsdTier, SsdError> {
    let path = config.cache.ssd_path.as_deref().unwrap_or(Path::new(""));
    let options = SsdOptions { empty: true, ..ssd_options(config) };
    SsdTier::open_with(path, size_bytes, options).map(|(tier, _)| tier)
}

fn try_ssd(config: &Config) -> (Option<SsdTier>, Option<String>) {
    let Some(path) = &config.cache.ssd_path else { return (None, None) };
    if let Some(why) = super::check::tier_is_store(config) {
        tracing::error!("no SSD tier: {why}");
        return (None, Some(with_ways(&why)));
    }
    if let Some(folder) = path.parent()
        && let Err(error) = make_folder(folder, 0o750)
    {
        tracing::error!(%error, "no SSD tier");
        return (None, Some(error.to_string()));
    }
    match SsdTier::open_at_once(path, config.cache.ssd_size.0, ssd_options(config)) {
        Ok(tier) => {
            super::records::read(path, &tier);
            (Some(tier), None)
        }
        Err(error) => {
            tracing::error!(%error, "no SSD tier: guests are served from RAM and store");
            (None, Some(with_ways(&ssd_words(&error))))
        }
    }
}

/// Lists the disks of the configuration and those added before the last stop.
async fn expect_disks(daemon: &Shared) -> Result<(), api::ApiError> {
    machines::follow_config(daemon).await?;
    let shared = daemon.clone();
    let rows = control::blocking(move || shared.store.disks()).await?.map_err(|error| control::store_error(&error))?;
    for row in rows {
        let attached = row.vm.is_some() && row.target.is_some();
        let definition = Definition {
            socket: row.socket.map_or_else(|| daemon.config.lock().disk_socket(&row.name), PathBuf::from),
            name: row.name,
            store: row.store,
            read_only: row.read_only,
            origin: if attached { DiskOrigin::Attach } else { DiskOrigin::Api },
            vm: row.vm,
            target: row.target,
            serial: row.serial,
            nbd: row.nbd,
        };
        if let Err(error) = daemon.disks.expect(definition) {
            tracing::error!(%error, "disk not served");
        }
    }
    Ok(())
}
