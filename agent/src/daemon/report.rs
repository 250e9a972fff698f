//! State as the API words it.

use super::Daemon;
use super::disks::{Entry, Served};
use super::drained::Drained;
use super::places;
use super::qsd::Qsd;
use super::service::Open;
use crate::config::Config;
use crate::learner::HeldProfile;
use crate::nbd::NbdExport;
use crate::store::ProfileRow;
use prestage_cache::engine::EngineKind;
use prestage_cache::ssd::{Found, SsdState, SsdStats};
use prestage_cache::types::{BLOCK_BYTES, PAGE_BYTES};
use prestage_cache::{Cache, StorageHandle};
use prestage_integration::api::Counters;
use prestage_integration::api::types::{
    CacheStat, CacheTiers, CacheUse, Disk, DiskCounts, DiskNbd, DiskStat, DiskState, EngineStatus, Health,
    LearnerStatus, LibvirtStatus, MemoryStatus, NbdClient, Profile, ProfilePhase, Recovery, SlabFound, Status,
    StorageUse, StoreState, StoreStatus, Tier, TierName, Trouble,
};
use prestage_predictor::Phase;
use std::sync::atomic::Ordering;

/// A disk's counters: what its guest did, and what its storages did for all disks on them.
pub(super) fn counters(cache: &Cache, served: &Served) -> Counters {
    let mut counters = guest_counters(served);
    for storage in served.storage.chain() {
        counters.add(&storage_counters(cache, storage));
    }
    counters
}

fn guest_counters(served: &Served) -> Counters {
    let guest = served.counters.snapshot();
    Counters {
        reads: guest.reads,
        read_bytes: guest.read_bytes,
        served_ram: guest.served_ram,
        served_ssd: guest.served_ssd,
        served_store: guest.served_store,
        read_errors: guest.read_errors,
        writes: guest.writes,
        write_bytes: guest.write_bytes,
        flushes: guest.flushes,
        discards: guest.discards,
        read_wait_us: guest.read_wait_us,
        ..Counters::default()
    }
}

fn storage_counters(cache: &Cache, storage: &StorageHandle) -> Counters {
    let (store, prefetch) = (storage.stats(), cache.prefetch_counters(storage.id()));
    let page = PAGE_BYTES as u64;
    Counters {
        store_reads: store.store_reads,
        store_read_bytes: store.store_read_bytes,
        store_writes: store.store_writes,
        store_write_bytes: store.store_write_bytes,
        prefetch_issued_bytes: prefetch.issued * page,
        prefetch_completed_bytes: prefetch.completed * page,
        prefetch_used_bytes: prefetch.used * page,
        prefetch_late: store.late_reads,
        prefetch_evicted_unused_bytes: prefetch.evicted_unused * page,
        prefetch_cancelled_bytes: prefetch.cancelled * page,
        ssd_read_bytes: store.ssd_read_bytes,
        ssd_write_bytes: store.ssd_write_bytes,
        ..Counters::default()
    }
}

/// Of the host; empty if it has none.
pub(super) fn host_name() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn recovery(stats: &SsdStats) -> Recovery {
    let opened = &stats.opened;
    Recovery {
        found: match opened.found {
            Found::Created => SlabFound::Created,
            Found::Clean => SlabFound::Clean,
            Found::Recovered => SlabFound::Recovered,
            Found::Unclean => SlabFound::Unclean,
            Found::Vetoed => SlabFound::Vetoed,
            Found::Damaged => SlabFound::Damaged,
        },
        kept_blocks: opened.kept_slots,
        dropped_written: opened.marked_slots,
        dropped_changed_store: stats.dropped_changed_store,
        dropped_overtaken: stats.dropped_overtaken,
        dropped_unvouched: opened.unvouched_slots,
        dropped_damaged: opened.dropped_slots() - opened.marked_slots - opened.unvouched_slots,
        bad_checksums: stats.bad_checksums,
        marked_regions: stats.marked_regions,
        unread_blocks: stats.unread_slots,
    }
}

fn disk_state(entry: &Entry) -> DiskState {
    let store = entry.definition.store.clone();
    match &entry.state {
        Ok(served) => {
            let size = Some(served.size_trouble.lock().clone()).filter(|trouble| !trouble.is_empty());
            let qemu = served.qemu.as_ref().and_then(Qsd::trouble);
            // A store that is about to be lost comes first.
            let trouble = places::astray(served).or(qemu);
            let trouble = trouble.or_else(|| served.storage.chain().find_map(StorageHandle::trouble)).or(size);
            DiskState {
                connected: entry.is_connected(),
                queues: served.runner.rings(),
                capacity_bytes: served.storage.info().size_bytes,
                store,
                store_state: if trouble.is_some() { StoreState::Degraded } else { StoreState::Ok },
                store_reason: trouble,
            }
        }
        Err(_) if entry.waiting => {
            DiskState { store, store_reason: Some("waits until its machine stops".to_owned()), ..DiskState::default() }
        }
        Err(reason) => DiskState {
            store,
            store_state: StoreState::Degraded,
            store_reason: Some(reason.clone()),
            ..DiskState::default()
        },
    }
}

/// What the images of a disk stand on, from the top down; empty where there is but one store.
fn images(served: &Served) -> Vec<String> {
    let names: Vec<_> = served.storage.chain().map(|storage| storage.identity().to_owned()).collect();
    if names.len() > 1 { names } else { Vec::new() }
}

impl Daemon {
    pub(super) fn disk_report(&self, entry: &Entry) -> Disk {
        let served = entry.state.as_ref().ok();
        Disk {
            name: entry.definition.name.clone(),
            store: entry.definition.store.clone(),
            storage: served.map(|served| served.storage.identity().to_owned()).unwrap_or_default(),
            origin: entry.definition.origin,
            read_only: entry.definition.read_only,
            socket: entry.definition.socket.display().to_string(),
            vm: entry.definition.vm.as_ref().map(|vm| self.machine_names.lock().get(vm).unwrap_or(vm).clone()),
            target: entry.definition.target.clone(),
            images: served.map(|served| images(served)).unwrap_or_default(),
            through_qemu: served.and_then(|served| served.qemu.as_ref()).map(Qsd::describe),
            nbd: served.and_then(|served| Some(self.nbd_report(served.nbd.as_ref()?))),
            state: disk_state(entry),
            counters: served.map(|served| counters(&self.cache, served)).unwrap_or_default(),
        }
    }

    fn nbd_report(&self, export: &NbdExport) -> DiskNbd {
        let clients = export.clients().into_iter().map(|client| NbdClient {
            peer: client.peer,
            since_unix_ms: client.since_unix_ms,
            requests: client.requests,
            in_flight: client.in_flight,
        });
        let socket = export.path().display().to_string();
        DiskNbd {
            uri: format!("nbd+unix:///{}?socket={socket}", export.name()),
            socket,
            tcp: self.nbd.as_ref().map(|server| format!("nbds://{}/{}", server.address(), export.name())),
            clients: clients.collect(),
        }
    }

    pub(super) fn stat_report(&self) -> CacheStat {
        let mut total = self.disks.retired();
        let mut disks = std::collections::BTreeMap::new();
        for entry in self.disks.list() {
            let counters = entry.state.as_ref().map(|served| counters(&self.cache, served)).unwrap_or_default();
            total.add(&counters);
            disks.insert(entry.definition.name.clone(), DiskStat { counters, state: disk_state(&entry) });
        }
        total.accesses_dropped = self.cache.accesses().dropped();
        CacheStat {
            started_unix_ms: self.started_unix_ms,
            at_us: u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX),
            total,
            disks,
        }
    }

    pub(super) fn status_report(&self) -> Status {
        let config = self.config.lock().clone();
        let entries = self.disks.list();
        let mut troubles = Vec::new();
        let mut trouble = |subject: &str, detail: &str| {
            troubles.push(Trouble { subject: subject.to_owned(), detail: detail.to_owned() });
        };
        let mut disks = DiskCounts { total: entries.len() as u32, ..DiskCounts::default() };
        for entry in &entries {
            let state = disk_state(entry);
            disks.connected += u32::from(state.connected);
            if let (StoreState::Degraded, Some(reason)) = (state.store_state, &state.store_reason) {
                disks.degraded += 1;
                trouble(&format!("disk {}", entry.definition.name), reason);
            }
        }
        if let Some(reason) = self.reloads.lock().refused() {
            trouble("configuration", &reason);
        }
        let drained = self.tiers.now().drained;
        if let Some(reason) = self.ssd_reason().filter(|_| drained.ssd.is_none()) {
            trouble("ssd tier", &reason);
        }
        if let Some(reason) = &self.nbd_trouble {
            trouble("nbd", reason);
        }
        let libvirt = self.libvirt_report(&config.libvirt.uri);
        if let (Health::Degraded, Some(error)) = (libvirt.health, &libvirt.error) {
            let detail = format!(
                "{error}; is libvirtd (or virtqemud) running? Disks are served without it; on a host that has none, set \
                 libvirt.enabled = false"
            );
            trouble("libvirt", &detail);
        }
        let mut condition = self.store.condition();
        condition.degraded = condition.degraded.or_else(|| self.store_trouble.clone());
        if let Some(reason) = &condition.degraded {
            trouble("database", reason);
        }
        let learned = self.learner.counters();
        let refused = learned.refused.load(Ordering::Relaxed);
        if refused > 0 {
            let detail =
                format!("{refused} saved profiles cannot be read; `prestagectl profile list` shows which and why");
            trouble("profiles", &detail);
        }
        if let Some(detail) = self.demand_trouble.clone().or_else(|| self.demand.as_ref()?.trouble()) {
            trouble("demand", &detail);
        }
        let memory = match &self.memory {
            Some(memory) => memory.status(),
            None => MemoryStatus { health: Health::Off, ..MemoryStatus::default() },
        };
        if memory.health == Health::Degraded
            && let Some(detail) = &memory.detail
        {
            trouble("memory", detail);
        }
        for (name, why) in self.untold.lock().iter() {
            trouble(
                &format!("webhook {name}"),
                &format!("nobody is told, events wait: {why}; reload once it is mended"),
            );
        }
        for (template, errors) in self.templates.troubles() {
            let detail = format!("{errors} MiB of its memory can't be read: check its disk, and save it anew");
            trouble(&format!("template {}", template.display()), &detail);
        }
        for detail in self.models.troubles() {
            trouble("model", &detail);
        }
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: host_name(),
            pid: std::process::id(),
            started_unix_ms: self.started_unix_ms,
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            health: if troubles.is_empty() { Health::Ok } else { Health::Degraded },
            troubles,
            notices: self.notices(&config),
            sandbox: self.sandbox.report(),
            engine: EngineStatus {
                mode: match self.cache.engine() {
                    EngineKind::IoUring => "io_uring",
                    EngineKind::ThreadPool => "thread_pool",
                }
                .to_owned(),
                shards: self.cache.shards() as u32,
            },
            cache: self.cache_use(),
            disks,
            libvirt,
            learner: LearnerStatus {
                health: Health::Ok,
                accesses: self.learner.accesses(),
                accesses_dropped: self.cache.accesses().dropped(),
                predictions: learned.predictions.load(Ordering::Relaxed),
                profiles: learned.profiles.load(Ordering::Relaxed) as u32,
                memory_bytes: learned.memory_bytes.load(Ordering::Relaxed),
                prefetch: config.prefetch.enabled,
                detail: None,
            },
            memory,
            store: StoreStatus {
                health: if condition.degraded.is_some() { Health::Degraded } else { Health::Ok },
                path: condition.path.display().to_string(),
                size_bytes: condition.size_bytes,
                queued: condition.queued,
                writes_dropped: condition.writes_dropped,
                detail: condition.degraded,
            },
        }
    }

    fn cache_use(&self) -> CacheUse {
        let (block, stat, ram) = (BLOCK_BYTES as u64, self.stat_report().total, self.cache.occupancy());
        let (ssd_slots, ssd_used) = self.cache.ssd_stats().map_or((0, 0), |ssd| (ssd.slots, ssd.used_slots));
        CacheUse {
            ram_capacity_bytes: u64::from(ram.slots) * block,
            ram_used_bytes: u64::from(ram.used_slots) * block,
            ssd_capacity_bytes: ssd_slots * block,
            ssd_used_bytes: ssd_used * block,
            served_ram: stat.served_ram,
            served_ssd: stat.served_ssd,
            served_store: stat.served_store,
            ssd_recovery: self.cache.ssd_stats().as_ref().map(recovery),
        }
    }

    fn libvirt_report(&self, uri: &str) -> LibvirtStatus {
        let Some(hypervisor) = &self.hypervisor else {
            return LibvirtStatus { health: Health::Off, uri: uri.to_owned(), ..LibvirtStatus::default() };
        };
        let state = hypervisor.state();
        let state = state.borrow();
        LibvirtStatus {
            health: if state.connected { Health::Ok } else { Health::Degraded },
            uri: state.uri.clone(),
            connected: state.connected,
            reconnects: state.reconnects,
            error: if state.connected {
                None
            } else {
                state.last_error.clone().or(Some("not connected yet".to_owned()))
            },
        }
    }

    /// Why the SSD tier does not work although it is configured and nobody took it out of service.
    pub(super) fn ssd_reason(&self) -> Option<String> {
        if let Some(reason) = &*self.ssd_trouble.lock() {
            return Some(reason.clone());
        }
        match self.cache.ssd_stats()?.state {
            SsdState::Degraded { reason, .. } => Some(reason.strip_prefix("SSD tier: ").unwrap_or(&reason).to_owned()),
            _ => self.tiers.now().gone(),
        }
    }

    /// What is said of a tier that an operator took out of service.
    fn drained(&self, tier: TierName) -> Option<String> {
        let now = self.tiers.now();
        match tier {
            TierName::Ram => Some(Drained::words(now.drained.ram?, "ram")),
            TierName::Ssd => Some(now.drained.ssd.as_ref()?.words(now.still_open().map(Open::words))),
        }
    }

    /// What is as an operator wanted it, for the time being, and is not to be forgotten. Nothing of it is out of order.
    fn notices(&self, config: &Config) -> Vec<Trouble> {
        let now = self.tiers.now();
        let tiers = [(TierName::Ram, "ram tier"), (TierName::Ssd, "ssd tier")];
        let said = |tier| self.drained(tier).into_iter().chain(now.size_note(tier, config));
        let of_tiers =
            tiers.into_iter().flat_map(|(tier, name)| said(tier).map(move |detail| (name.to_owned(), detail)));
        let all = of_tiers.chain(self.reloads.lock().notices());
        all.map(|(subject, detail)| Trouble { subject, detail }).collect()
    }

    pub(super) fn tiers_report(&self) -> CacheTiers {
        let config = self.config.lock().clone();
        let (page, block) = (PAGE_BYTES as u64, BLOCK_BYTES as u64);
        let stat = self.stat_report().total;
        let occupancy = self.cache.occupancy();
        let entries = self.disks.list();
        let mut storages = Vec::new();
        let mut unused = 0;
        let mut seen = std::collections::BTreeSet::new();
        let usage = self.cache.usage();
        let served = entries.iter().filter_map(|entry| entry.state.as_ref().ok());
        for storage in served.flat_map(|served| served.storage.chain()) {
            let id = storage.id();
            if !seen.insert(id) {
                continue;
            }
            let prefetch = self.cache.prefetch_counters(id);
            unused += prefetch.issued.saturating_sub(prefetch.used + prefetch.evicted_unused);
            let used = usage.iter().find(|(storage, _)| *storage == id).map_or(0, |(_, slots)| *slots);
            storages.push(StorageUse {
                storage: storage.identity().to_owned(),
                disks: self.disks.on_storage(storage.identity()),
                used_bytes: used * block,
            });
        }
        storages.sort_by_key(|storage| std::cmp::Reverse(storage.used_bytes));
        let now = self.tiers.now();
        let drained = self.drained(TierName::Ram);
        let ram = Tier {
            tier: TierName::Ram,
            health: if drained.is_some() { Health::Off } else { Health::Ok },
            size_note: now.size_note(TierName::Ram, &config),
            detail: drained.or_else(|| Some(format!("{:?} pages", self.cache.arena().page_kind()).to_lowercase())),
            path: None,
            capacity_bytes: u64::from(occupancy.slots) * block,
            used_bytes: u64::from(occupancy.used_slots) * block,
            blocks: u64::from(occupancy.used_slots),
            valid_bytes: occupancy.valid_pages * page,
            prefetched_unused_bytes: unused * page,
            hits: stat.served_ram,
            insertions: occupancy.insertions,
            evictions: occupancy.evictions,
            recovery: None,
            storages,
        };
        let (drained, reason) = (self.drained(TierName::Ssd), self.ssd_reason());
        let size_note = now.size_note(TierName::Ssd, &config);
        let ssd = match self.cache.ssd_stats() {
            Some(stats) => Tier {
                tier: TierName::Ssd,
                health: if reason.is_some() { Health::Degraded } else { Health::Ok },
                detail: reason,
                size_note,
                path: config.cache.ssd_path.map(|path| path.display().to_string()),
                capacity_bytes: stats.slots * block,
                used_bytes: stats.used_slots * block,
                blocks: stats.used_slots,
                valid_bytes: stats.valid_pages * page,
                prefetched_unused_bytes: 0,
                hits: stat.served_ssd,
                insertions: stats.inserts,
                evictions: stats.evictions,
                recovery: Some(recovery(&stats)),
                storages: self.on_ssd(),
            },
            None => Tier {
                tier: TierName::Ssd,
                health: if reason.is_some() && drained.is_none() { Health::Degraded } else { Health::Off },
                detail: drained.or(reason),
                size_note,
                path: config.cache.ssd_path.map(|path| path.display().to_string()),
                ..Tier::default()
            },
        };
        CacheTiers { block_bytes: block, tiers: vec![ram, ssd] }
    }

    /// What of the SSD tier is whose, also of storages no disk is on now.
    fn on_ssd(&self) -> Vec<StorageUse> {
        let usage = self.cache.ssd().map(|tier| tier.usage()).unwrap_or_default();
        let used = |(storage, slots): (String, u64)| StorageUse {
            disks: self.disks.on_storage(&storage),
            storage,
            used_bytes: slots * BLOCK_BYTES as u64,
        };
        usage.into_iter().map(used).collect()
    }

    /// Profiles held and saved, as one list by storage.
    pub(super) fn profile_reports(&self, saved: Vec<ProfileRow>, held: Vec<HeldProfile>) -> Vec<Profile> {
        let mut rows: Vec<Profile> = saved
            .into_iter()
            .map(|row| Profile {
                id: row.id.to_string(),
                disks: self.disks.on_storage(&row.storage),
                storage: row.storage,
                saved_unix_ms: Some(row.saved_unix_ms),
                runs: row.runs,
                size_bytes: row.size_bytes,
                ..Profile::default()
            })
            .collect();
        for profile in held {
            let at = match rows.iter().position(|row| row.storage == profile.storage) {
                Some(at) => at,
                None => {
                    let id = self.store.storage_id(&profile.storage).ok().flatten();
                    rows.push(Profile {
                        id: id.map(|id| id.to_string()).unwrap_or_default(),
                        disks: self.disks.on_storage(&profile.storage),
                        storage: profile.storage.clone(),
                        ..Profile::default()
                    });
                    rows.len() - 1
                }
            };
            let row = &mut rows[at];
            if let Some(refused) = &profile.refused {
                row.health = Health::Degraded;
                row.detail = Some(refused.to_string());
                continue;
            }
            row.runs = profile.summary.phases.iter().map(|phase| u64::from(phase.runs)).sum();
            row.memory_bytes = profile.summary.memory_bytes as u64;
            row.contexts = profile.summary.markov_contexts as u64;
            row.phases = profile
                .summary
                .phases
                .iter()
                .map(|phase| ProfilePhase {
                    kind: match phase.phase {
                        Phase::Boot => "boot".to_owned(),
                        Phase::Program(id) => format!("program {id:016x}"),
                    },
                    extents: phase.extents as u64,
                    size_bytes: phase.bytes,
                    runs: u64::from(phase.runs),
                })
                .collect();
        }
        rows.sort_by(|a, b| a.storage.cmp(&b.storage));
        rows
    }
}
