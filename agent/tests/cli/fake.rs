//! A daemon that answers with fixtures, served by the real API on a real socket.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::StreamExt;
use parking_lot::Mutex;
use prestage_integration::api::history::*;
use prestage_integration::api::templates::*;
use prestage_integration::api::tiers::*;
use prestage_integration::api::types::*;
use prestage_integration::api::{
    ApiError, Control, Counters, ErrorCode, Limits, Reply, Rows, SocketOptions, bind, serve,
};

const HISTORY: &str = "ts_us,op,offset,len\n1000000,R,0,4096\n61000000,R,8192,4096\n# end: so far the history\n";

#[derive(Debug, Default)]
pub(crate) struct Fake {
    /// What was asked to be changed, in words.
    pub(crate) asked: Mutex<Vec<String>>,
    readings: AtomicU64,
    /// Reports another start from this reading on.
    pub(crate) restart_at: AtomicU64,
}

fn counters() -> Counters {
    Counters {
        reads: 2000,
        read_bytes: 64 << 20,
        served_ram: 1900,
        served_ssd: 40,
        served_store: 60,
        writes: 10,
        write_bytes: 40960,
        flushes: 3,
        discards: 1,
        read_wait_us: 1_000_000,
        store_reads: 300,
        store_read_bytes: 70 << 20,
        store_writes: 10,
        store_write_bytes: 40960,
        prefetch_issued_bytes: 60 << 20,
        prefetch_completed_bytes: 60 << 20,
        prefetch_used_bytes: 57 << 20,
        prefetch_late: 12,
        prefetch_evicted_unused_bytes: 1 << 20,
        ssd_read_bytes: 2 << 20,
        ssd_write_bytes: 70 << 20,
        ..Counters::default()
    }
}

fn disk(name: &str) -> Disk {
    let state = DiskState {
        connected: true,
        queues: 4,
        capacity_bytes: 20 << 30,
        store: "nbd://store:10809/web1".into(),
        store_state: StoreState::Ok,
        store_reason: None,
    };
    Disk {
        name: name.into(),
        store: "nbd://store:10809/web1".into(),
        storage: "nbd:tcp:store:10809:web1".into(),
        origin: DiskOrigin::Attach,
        read_only: false,
        socket: format!("/run/prestage/vm/{name}.sock"),
        vm: Some("web1".into()),
        target: Some("vda".into()),
        state,
        counters: counters(),
        ..Disk::default()
    }
}

fn layer(name: &str, holds: bool, detail: &str) -> SandboxLayer {
    SandboxLayer { name: name.into(), holds, detail: detail.into() }
}

fn broken() -> Disk {
    let state = DiskState {
        capacity_bytes: 1 << 30,
        store: "/srv/old.raw".into(),
        store_state: StoreState::Degraded,
        store_reason: Some("shrunk from 2 GiB to 1 GiB; restore its size".into()),
        ..DiskState::default()
    };
    Disk {
        name: "old".into(),
        store: "/srv/old.raw".into(),
        read_only: true,
        socket: "/s".into(),
        state,
        ..Disk::default()
    }
}

fn profile() -> Profile {
    Profile {
        id: "1".into(),
        storage: "nbd:tcp:store:10809:web1".into(),
        disks: vec!["web1-vda".into()],
        runs: 3,
        size_bytes: 120 << 10,
        memory_bytes: 2 << 20,
        contexts: 5000,
        phases: vec![ProfilePhase { kind: "boot".into(), extents: 812, size_bytes: 150 << 20, runs: 3 }],
        ..Profile::default()
    }
}

impl Fake {
    pub(crate) fn note(&self, text: String) {
        self.asked.lock().push(text);
    }
}

pub(crate) fn done<'a, T: Send + 'a>(result: Result<T, ApiError>) -> Reply<'a, T> {
    Box::pin(async move { result })
}

impl TemplateControl for Fake {
    fn template_save(&self, vm: String, request: TemplateSave) -> Reply<'_, TemplateSaved> {
        self.note(format!("save {vm} {request:?}"));
        done(Ok(TemplateSaved {
            template: "/var/lib/prestage/templates/web1".into(),
            memory_bytes: 512 << 20,
            used_bytes: 180 << 20,
            stood_ms: 240,
            vm,
        }))
    }

    fn templates(&self) -> Reply<'_, TemplateList> {
        let web = Template {
            name: "web".into(),
            path: "/var/lib/prestage/templates/web".into(),
            machine: Some("web1".into()),
            created_unix_ms: Some(1_700_000_000_000),
            memory_bytes: 512 << 20,
            needed_bytes: 60 << 20,
            learned: true,
            clones: Some(vec!["web-2".into(), "web-3".into()]),
            ..Template::default()
        };
        let broken = Template {
            name: "/srv/t/old".into(),
            path: "/srv/t/old".into(),
            health: Health::Degraded,
            detail: Some("template /srv/t/old is damaged".into()),
            ..Template::default()
        };
        done(Ok(TemplateList { templates: vec![broken, web] }))
    }

    fn template_remove(&self, template: String) -> Reply<'_, ()> {
        self.note(format!("remove template {template}"));
        done(Ok(()))
    }

    fn clone_start(&self, request: CloneStart) -> Reply<'_, CloneStarted> {
        self.note(format!("start {request:?}"));
        done(Ok(CloneStarted {
            vm: request.name,
            template: request.template,
            resumed_ms: 512,
            progress: CloneProgress {
                needed_bytes: 61 << 20,
                needed_done_bytes: 61 << 20,
                rest_bytes: 120 << 20,
                phase: ClonePhase::Behind,
                ..CloneProgress::default()
            },
            notes: vec!["its network interfaces are unplugged".into()],
            ..CloneStarted::default()
        }))
    }
}

impl TierControl for Fake {
    fn cache_resize(&self, request: ResizeRequest) -> Reply<'_, Resized> {
        self.note(format!("resize {request:?}"));
        let change = |tier, asked: Option<u64>, to_keep: Option<&str>| {
            let to_keep = to_keep.map(str::to_owned);
            asked.map(|after_bytes| TierResized { tier, before_bytes: 1 << 30, after_bytes, to_keep })
        };
        let ram = change(TierName::Ram, request.ram_bytes, Some("cache.ram_size = \"2GiB\""));
        let ssd = change(TierName::Ssd, request.ssd_bytes, None);
        done(Ok(Resized { tiers: ram.into_iter().chain(ssd).collect() }))
    }

    fn cache_drain(&self, request: ServiceRequest) -> Reply<'_, Service> {
        self.note(format!("drain {request:?}"));
        let ram = TierService { size_bytes: 1 << 30, ..TierService::default() };
        let path = Some("/dev/nvme0n1".to_owned());
        let ssd = TierService {
            tier: TierName::Ssd,
            path,
            closed: Some(request.ram),
            hangs: !request.ram,
            ..TierService::default()
        };
        done(Ok(Service { tiers: if request.ram { vec![ram, ssd] } else { vec![ssd] } }))
    }

    fn cache_resume(&self, request: ServiceRequest) -> Reply<'_, Service> {
        self.note(format!("resume {request:?}"));
        let tier = TierService { in_service: true, size_bytes: 1 << 30, ..TierService::default() };
        done(Ok(Service { tiers: vec![tier] }))
    }
}

impl Control for Fake {
    fn status(&self) -> Reply<'_, Status> {
        done(Ok(Status {
            version: "9.9.9".into(),
            host: "hv1".into(),
            pid: 4711,
            started_unix_ms: 1_700_000_000_000,
            uptime_ms: 3_725_000,
            health: Health::Degraded,
            troubles: vec![Trouble {
                subject: "disk old".into(),
                detail: "store shrunk;\u{1b}[31m restore its size".into(),
            }],
            notices: vec![Trouble { subject: "ram tier".into(), detail: "drained by an operator".into() }],
            sandbox: Sandbox {
                mode: "full".into(),
                layers: vec![
                    layer("user", true, "prestage"),
                    layer("capabilities", true, "none"),
                    layer("files", false, "not confined: this kernel has no Landlock (Linux 5.13)"),
                    layer("system calls", true, "150 are allowed"),
                ],
            },
            engine: EngineStatus { mode: "io_uring".into(), shards: 1 },
            cache: CacheUse {
                ram_capacity_bytes: 2 << 30,
                ram_used_bytes: 1 << 30,
                ssd_capacity_bytes: 16 << 30,
                ssd_used_bytes: 3 << 30,
                served_ram: 650,
                served_ssd: 100,
                served_store: 250,
                ssd_recovery: Some(Recovery {
                    found: SlabFound::Recovered,
                    kept_blocks: 49_152,
                    dropped_written: 1024,
                    dropped_unvouched: 0,
                    dropped_overtaken: 3,
                    ..Recovery::default()
                }),
            },
            disks: DiskCounts { total: 2, connected: 1, degraded: 1 },
            libvirt: LibvirtStatus {
                health: Health::Degraded,
                uri: "qemu:///system".into(),
                connected: false,
                reconnects: 0,
                error: Some("libvirtd does not answer; see `systemctl status libvirtd`".into()),
            },
            learner: LearnerStatus {
                accesses: 12345,
                profiles: 1,
                memory_bytes: 2 << 20,
                prefetch: true,
                ..LearnerStatus::default()
            },
            memory: MemoryStatus {
                watched: 1,
                machines: 2,
                staged_bytes: 256 << 20,
                used_bytes: 200 << 20,
                ..MemoryStatus::default()
            },
            store: StoreStatus {
                path: "/var/lib/prestage/prestage.db".into(),
                size_bytes: 3 << 20,
                ..StoreStatus::default()
            },
        }))
    }

    fn disks(&self) -> Reply<'_, DiskList> {
        done(Ok(DiskList { disks: vec![broken(), disk("web1-vda")] }))
    }

    fn disk(&self, name: String) -> Reply<'_, Disk> {
        done(match name.as_str() {
            "web1-vda" => Ok(disk("web1-vda")),
            _ => Err(ApiError::not_found(format!("there is no disk `{name}`; see `prestagectl disk list`"))),
        })
    }

    fn disk_add(&self, request: DiskAdd) -> Reply<'_, Disk> {
        self.note(format!("add {request:?}"));
        done(match request.name.as_str() {
            "taken" => Err(ApiError::new(ErrorCode::AlreadyExists, "disk `taken` exists already; choose another name")),
            name => Ok(Disk { store: request.store.clone(), ..disk(name) }),
        })
    }

    fn disk_resize(&self, name: String, request: DiskResize) -> Reply<'_, DiskResized> {
        self.note(format!("resize {name} {request:?}"));
        let (after_bytes, told) = request.size_bytes.map_or((20 << 30, false), |bytes| (bytes, bytes > 20 << 30));
        let notes = if told { vec!["NBD clients see the size when they connect anew".into()] } else { vec![] };
        done(Ok(DiskResized { disk: name, before_bytes: 20 << 30, after_bytes, told, notes }))
    }

    fn disk_remove(&self, name: String, force: bool) -> Reply<'_, ()> {
        self.note(format!("remove {name} {force}"));
        done(if force {
            Ok(())
        } else {
            Err(ApiError::new(ErrorCode::InUse, format!("disk `{name}` is connected; use --force")))
        })
    }

    fn disk_trace(&self, name: String) -> Reply<'_, Rows> {
        let rows = match name.as_str() {
            "broken" => {
                let first = futures_util::stream::iter([Ok("ts_us,op,offset,len\n1,R,0,512\n2,R".into())]);
                return done(Ok(Rows::new(first.chain(futures_util::stream::once(async {
                    // The server sends what it has while it waits.
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    Err(std::io::Error::other("cut"))
                })))));
            }
            // Chunks end anywhere, also within a line.
            _ => vec![
                Ok("ts_us,op,offset,len\n1000,R,512,10".into()),
                Ok("24\n# missing 17: the reader was too slow\n2000,W,0,".into()),
                Ok("4096\n# end: the disk is no longer served\n".into()),
            ],
        };
        done(Ok(Rows::new(futures_util::stream::iter(rows))))
    }

    /// Two rows since any time; from the beginning a long history, a loop over scattered blocks with a gap in it.
    fn disk_history(&self, _: String, since_us: u64) -> Reply<'_, Rows> {
        let mut text = HISTORY.to_owned();
        if since_us == 0 {
            let rows = (0..10_000u64).map(|i| format!("{},R,{},16384\n", i * 20_000, i % 60 * 7919 % 60 * 196_608));
            text = format!("ts_us,op,offset,len\n{}# missing 5: damaged\n# end: x\n", rows.collect::<String>());
        }
        done(Ok(Rows::new(futures_util::stream::iter([Ok(text.into())]))))
    }

    fn disk_explain(&self, disk: String, offset_bytes: u64) -> Reply<'_, Explained> {
        let attempt =
            |ago_us, probability, fate| Attempt { ago_us, expert: "markov".into(), probability, threshold: 0.5, fate };
        done(Ok(Explained {
            disk,
            offset_bytes: offset_bytes / 4096 * 4096,
            place: Place { ssd: true, ..Place::default() },
            prefetch: true,
            threshold: 0.5,
            floor: 0.25,
            votes: vec![
                Vote { expert: "phase".into(), raw: 0.9, calibrated: 0.81, weight: None, due_us: Some(1_250_000) },
                Vote { expert: "markov".into(), raw: 0.7, calibrated: 0.31, weight: None, due_us: None },
            ],
            touched: None,
            attempts: vec![attempt(3_210_000, 0.81, Fate::Late), attempt(95_000_000, 0.31, Fate::BelowThreshold)],
            record_us: 7_200_000_000,
            miss_us: Some(5200.0),
            vain_cost: Some(1.0),
            governor: Governor { floor: Some(0.62), budget_bytes: 6 << 20, most_bytes: 16 << 20, withholds: false },
            budget: BudgetUse { window_bytes: 2 << 20, in_flight_bytes: 1 << 20, queued_bytes: 65536 },
        }))
    }

    fn vms(&self) -> Reply<'_, VmList> {
        let vda = VmDisk {
            target: "vda".into(),
            bus: "virtio".into(),
            kind: "vhostuser".into(),
            source: Some("nbd://store:10809/web1".into()),
            format: "raw".into(),
            read_only: false,
            attached: Some("web1-vda".into()),
        };
        let cd = VmDisk {
            target: "sda".into(),
            bus: "sata".into(),
            kind: "file".into(),
            format: "raw".into(),
            ..VmDisk::default()
        };
        let web = Vm {
            name: "web1".into(),
            state: "running".into(),
            shared_memory: true,
            disks: vec![vda, cd],
            ..Vm::default()
        };
        let bare = Vm { name: "bare".into(), state: "shut off".into(), ..Vm::default() };
        done(Ok(VmList { vms: vec![bare, web] }))
    }

    fn vm(&self, vm: String) -> Reply<'_, Vm> {
        done(Err(ApiError::not_found(format!("there is no machine `{vm}`"))))
    }

    fn vm_attach(&self, vm: String, target: String, request: AttachRequest) -> Reply<'_, Attached> {
        self.note(format!("attach {vm} {target} {request:?}"));
        done(if request.enable_shared_memory {
            Ok(Attached {
                disk: format!("{vm}-{target}"),
                vm,
                target,
                store: "/srv/web1.raw".into(),
                socket: "/run/prestage/vm/x.sock".into(),
                takes_effect: TakesEffect::NextStart,
                notes: vec!["shared memory backing was added to the domain".into()],
            })
        } else {
            Err(ApiError::new(
                ErrorCode::NotPossible,
                format!("machine `{vm}` lacks shared memory backing; use --enable-shared-memory"),
            ))
        })
    }

    fn vm_detach(&self, vm: String, target: String) -> Reply<'_, Detached> {
        done(Ok(Detached {
            disk: format!("{vm}-{target}"),
            vm,
            target,
            store: "/srv/web1.raw".into(),
            takes_effect: TakesEffect::Now,
            notes: vec![],
        }))
    }

    fn cache_tiers(&self) -> Reply<'_, CacheTiers> {
        let ram = Tier {
            tier: TierName::Ram,
            capacity_bytes: 512 << 20,
            size_note: Some("512 MiB by `cache resize`, 1.0 GiB configured".into()),
            used_bytes: 128 << 20,
            blocks: 2048,
            valid_bytes: 120 << 20,
            prefetched_unused_bytes: 1 << 20,
            hits: 1900,
            evictions: 7,
            storages: vec![StorageUse {
                storage: "nbd:tcp:store:10809:web1".into(),
                disks: vec!["web1-vda".into()],
                used_bytes: 128 << 20,
            }],
            ..Tier::default()
        };
        let ssd = Tier {
            tier: TierName::Ssd,
            health: Health::Degraded,
            detail: Some("no space left on /var/cache; free 4 GiB".into()),
            capacity_bytes: 16 << 30,
            ..Tier::default()
        };
        done(Ok(CacheTiers { block_bytes: 65536, tiers: vec![ram, ssd] }))
    }

    fn cache_stat(&self) -> Reply<'_, CacheStat> {
        let reading = self.readings.fetch_add(1, Ordering::Relaxed);
        let restart = self.restart_at.load(Ordering::Relaxed);
        let restarted = restart > 0 && reading >= restart;
        let mut total = Counters::default();
        for _ in 0..if restarted { 1 } else { reading + 1 } {
            total.add(&counters());
        }
        let disks =
            BTreeMap::from([("web1-vda".to_owned(), DiskStat { counters: total, state: disk("web1-vda").state })]);
        done(Ok(CacheStat {
            started_unix_ms: if restarted { 2 } else { 1 },
            at_us: if restarted { 1_000_000 } else { (reading + 1) * 1_000_000 },
            total,
            disks,
        }))
    }

    fn cache_warm(&self, request: WarmRequest) -> Reply<'_, Warmed> {
        self.note(format!("warm {request:?}"));
        done(Ok(Warmed { queued_bytes: 3 << 20, already_cached_bytes: 1 << 20, refused_bytes: 4096 }))
    }

    fn cache_drop(&self, request: DropRequest) -> Reply<'_, Dropped> {
        self.note(format!("drop {request:?}"));
        done(Ok(Dropped { ram_bytes: 128 << 20, ssd_bytes: 0 }))
    }

    fn profiles(&self) -> Reply<'_, ProfileList> {
        let other = Profile {
            id: "2".into(),
            storage: "file:/srv/old.raw".into(),
            health: Health::Degraded,
            detail: Some(
                "is of version 9, this prestaged reads 1; remove it with `prestagectl profile remove 2`".into(),
            ),
            ..Profile::default()
        };
        done(Ok(ProfileList { profiles: vec![profile(), other] }))
    }

    fn profile(&self, id: String) -> Reply<'_, Profile> {
        done(if id == "1" { Ok(profile()) } else { Err(ApiError::not_found(format!("there is no profile `{id}`"))) })
    }

    fn profile_remove(&self, id: String) -> Reply<'_, ()> {
        self.note(format!("forget {id}"));
        done(Ok(()))
    }

    fn history(&self) -> Reply<'_, HistoryStatus> {
        done(Ok(HistoryStatus {
            enabled: true,
            accesses: 1_000_000,
            segments: 20,
            runs: 3,
            hours: 48,
            data_bytes: 3_000_000,
            index_bytes: 200_000,
            hours_bytes: 10_000,
            size_bytes: 3_210_000,
            limit_bytes: 1 << 30,
            limit_days: 30,
            oldest_unix_ms: Some(1),
            newest_unix_ms: Some(2),
            last_hour_accesses: 7200,
            last_hour_bytes: 21_600,
            unindexed: 1,
        }))
    }

    fn history_runs(&self, query: RunsQuery) -> Reply<'_, RunList> {
        self.note(format!("{query:?}"));
        let extent = RunExtent { at_us: 1500, offset_bytes: 1 << 30, length_bytes: 8192, reads: 2 };
        let run = Run {
            storage: "file:/srv/web1.raw".into(),
            vm: "web1".into(),
            program: "boot".into(),
            started_unix_ms: 1_700_000_000_000,
            ended_unix_ms: Some(1_700_000_034_000),
            extents: vec![extent],
            more: true,
        };
        done(Ok(RunList {
            runs: vec![run.clone(), Run { ended_unix_ms: None, extents: Vec::new(), more: false, ..run }],
        }))
    }

    fn history_hot(&self, disk: String, query: HotQuery) -> Reply<'_, HotList> {
        self.note(format!("{query:?}"));
        let blocks = vec![HotBlock { offset_bytes: 65536, reads: 50 }, HotBlock { offset_bytes: 1 << 40, reads: 5 }];
        let exact = HotHour { hour_unix_ms: 1_700_002_800_000, reads: 100, error: 0, blocks };
        let other = HotHour { hour_unix_ms: 1_699_999_200_000, error: 3, ..exact.clone() };
        done(Ok(HotList { disk, storage: "file:/srv/web1.raw".into(), block_bytes: 65536, hours: vec![exact, other] }))
    }

    fn history_near(&self, disk: String, query: NearQuery) -> Reply<'_, Near> {
        self.note(format!("{query:?}"));
        let near = Near {
            disk,
            storage: "file:/srv/web1.raw".into(),
            b_offset_bytes: 1 << 20,
            within_us: query.within_us,
            reads_a: 40,
            reads_b: 1,
            near: 10,
            then: 5,
            complete: true,
            ..Near::default()
        };
        done(Ok(if query.a == 0 { near } else { Near { complete: false, after_unix_ms: Some(1), ..near } }))
    }

    fn profiles_save(&self) -> Reply<'_, Saved> {
        done(Ok(Saved { profiles: 1, size_bytes: 120 << 10 }))
    }
}

/// The fake, served until dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) control: Arc<Fake>,
    pub(crate) socket: PathBuf,
    folder: tempfile::TempDir,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("prestaged.sock");
        let listener = bind(&SocketOptions { path: socket.clone(), mode: 0o600, group: None }).unwrap();
        let control = Arc::new(Fake::default());
        let served: Arc<dyn Control> = control.clone();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let shutdown = async { drop(stopped.await) };
            runtime.block_on(serve(listener, served, Limits::default(), shutdown)).unwrap();
        });
        Self { control, socket, folder, stop: Some(stop), thread: Some(thread) }
    }

    pub(crate) fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    pub(crate) fn stop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}
