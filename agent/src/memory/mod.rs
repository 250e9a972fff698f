//! Guest memory: what a guest touches of its swapped pages is learned, and brought in before it does.
//!
//! One thread, `memory`. It looks into no process itself: that is `prestage-memory`'s part, which it starts and asks
//! (`prestage_integration::memory::helper`).
//!
//! - [`MemoryHandle`]: messages to the thread, from anywhere
//! - `run.rs`: the thread's loop; `places.rs`: which machines run, and where their memory lies
//! - `keeper.rs`, `machine.rs`: the machines, and what is done about each in a turn; `report.rs`: that in words
//! - `mind.rs`: what is learned of one machine, and the programs that run there
//! - `stage.rs`: which pages are brought in when; `attention.rs`: how many faults are told; `idle`: which are
//!   pushed out; all without I/O
//! - `push.rs`: what `idle` wants, done
//! - `hands.rs`, `host.rs`: the helper and the host's figures, behind traits

mod attention;
mod hands;
mod host;
mod idle;
mod keeper;
#[cfg(test)]
mod keeper_tests;
mod machine;
mod mind;
pub(crate) mod places;
mod push;
mod report;
mod run;
mod stage;

use std::fmt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use prestage_integration::api::demand::{ExecutionStart, Mode};
use prestage_integration::api::types::{MemoryStatus, VmPages};
use prestage_integration::libvirt::Uuid;
use tokio::sync::{mpsc, oneshot};

use crate::config::{Config, RateLimit};
use crate::learner::HeldProfile;
use crate::store::Store;
pub(crate) use idle::IdleSettings;
pub(crate) use machine::Place;
pub(crate) use report::name_programs;

/// Settings that may change while the thread runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct MemorySettings {
    /// Bring pages in, of machines whose policy says nothing else.
    pub(crate) prestage: bool,
    /// Share of the host's memory that is left free.
    pub(crate) reserve: f64,
    /// Pages a second.
    pub(crate) zram_rate: f64,
    pub(crate) disk_rate: f64,
    /// Share of time that some task may wait for memory.
    pub(crate) max_pressure: f64,
    /// Least probability.
    pub(crate) threshold: f64,
    pub(crate) save_us: u64,
    /// Pushing idle pages out; `None`: switched off.
    pub(crate) push: Option<IdleSettings>,
}

impl MemorySettings {
    pub(crate) fn of(config: &Config) -> Self {
        let memory = &config.memory;
        let rate = |limit: RateLimit| match limit {
            RateLimit::Unlimited => f64::INFINITY,
            RateLimit::BytesPerSecond(bytes) => bytes as f64 / prestage_integration::memory::PAGE_BYTES as f64,
        };
        Self {
            prestage: memory.prestage,
            reserve: memory.reserve,
            zram_rate: rate(memory.zram_rate),
            disk_rate: rate(memory.disk_rate),
            max_pressure: memory.max_pressure,
            threshold: config.prefetch.threshold,
            save_us: u64::try_from(config.learner.save_interval.as_micros()).unwrap_or(u64::MAX),
            push: memory.push_out.then_some(IdleSettings {
                floor: memory.push_floor,
                pressure: memory.push_pressure,
                every_us: u64::try_from(memory.push_every.as_micros()).unwrap_or(u64::MAX),
            }),
        }
    }
}

/// Under what name a machine's profile is kept.
pub(crate) fn storage_of(vm: Uuid) -> String {
    format!("memory:{vm}")
}

enum Message {
    Runs(Uuid, String, Result<Place, String>),
    Stopped(Uuid),
    Program(Uuid, i64, u64),
    ProgramEnded(i64),
    Due(Uuid, Vec<u32>),
    Policy(Uuid, Option<Mode>, Option<f64>),
    Settings(MemorySettings),
    Report(Uuid, oneshot::Sender<VmPages>),
    Profiles(oneshot::Sender<Vec<HeldProfile>>),
    Forget(String, oneshot::Sender<()>),
    Save(oneshot::Sender<()>),
    Stop,
}

/// Reaches the thread.
#[derive(Clone)]
pub(crate) struct MemoryHandle(Arc<Handle>);

struct Handle {
    sender: Sender<Message>,
    bell: UnixDatagram,
    status: Arc<Mutex<MemoryStatus>>,
}

impl MemoryHandle {
    /// Starts the thread. `helper`: the program `prestage-memory`. What comes out are machines whose memory is to be looked for
    /// anew.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start(
        helper: PathBuf,
        store: Store,
        settings: MemorySettings,
    ) -> std::io::Result<(Self, JoinHandle<()>, mpsc::UnboundedReceiver<Uuid>)> {
        let (sender, messages) = channel();
        let (bell, rung) = UnixDatagram::pair()?;
        bell.set_nonblocking(true)?;
        rung.set_nonblocking(true)?;
        let (moved, moves) = mpsc::unbounded_channel();
        let start = Box::new(move || {
            let helper = prestage_integration::memory::helper::client::Helper::start(&helper, &[])?;
            Ok(Box::new(helper) as Box<dyn hands::Hands>)
        });
        let status = Arc::<Mutex<MemoryStatus>>::default();
        let told = Arc::clone(&status);
        let host = Box::<host::ThisHost>::default();
        let thread = std::thread::Builder::new().name("memory".into()).spawn(move || {
            let keeper = keeper::Keeper::new(start, host, store, settings);
            run::run(keeper, &messages, &rung, &moved, &told);
        })?;
        Ok((Self(Arc::new(Handle { sender, bell, status })), thread, moves))
    }

    fn send(&self, message: Message) {
        // A thread that has stopped wants to know nothing more; a bell that is full rings.
        let _ = self.0.sender.send(message);
        let _ = self.0.bell.send(&[0]);
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.send(message(reply));
        answer.await.ok()
    }

    /// A machine runs, with its memory there; or why that is not known. Of one that runs on: its memory may have changed.
    pub(crate) fn runs(&self, vm: Uuid, name: String, place: Result<Place, String>) {
        self.send(Message::Runs(vm, name, place));
    }
    pub(crate) fn stopped(&self, vm: Uuid) {
        self.send(Message::Stopped(vm));
    }
    /// A program begins in a machine.
    pub(crate) fn program(&self, vm: Uuid, execution: i64, start: &ExecutionStart) {
        self.send(Message::Program(vm, execution, mind::program(&start.program, &start.tags)));
    }
    pub(crate) fn program_ended(&self, execution: i64) {
        self.send(Message::ProgramEnded(execution));
    }
    /// Programs that are due in a machine, by name: what they need is not pushed out.
    pub(crate) fn due(&self, vm: Uuid, programs: &[String]) {
        self.send(Message::Due(vm, programs.iter().map(|program| mind::name(program)).collect()));
    }
    /// What is done for a machine, and the share of its memory that is never pushed out; `None`: what the configuration says.
    pub(crate) fn policy(&self, vm: Uuid, mode: Option<Mode>, floor: Option<f64>) {
        self.send(Message::Policy(vm, mode, floor));
    }
    pub(crate) fn settings(&self, settings: MemorySettings) {
        self.send(Message::Settings(settings));
    }
    /// How a machine's memory fares. `None`: the thread has stopped.
    pub(crate) async fn report(&self, vm: Uuid) -> Option<VmPages> {
        self.ask(|reply| Message::Report(vm, reply)).await
    }
    /// What is learned, by storage.
    pub(crate) async fn profiles(&self) -> Vec<HeldProfile> {
        self.ask(Message::Profiles).await.unwrap_or_default()
    }
    /// Forgets what was learned under a name.
    pub(crate) async fn forget(&self, storage: String) {
        self.ask(|reply| Message::Forget(storage, reply)).await;
    }
    /// As of the last turn.
    pub(crate) fn status(&self) -> MemoryStatus {
        self.0.status.lock().clone()
    }
    /// Saves what was learned; returns when the database has it.
    pub(crate) async fn save(&self) {
        self.ask(Message::Save).await;
    }
    /// Saves and ends the thread.
    pub(crate) fn stop(&self) {
        self.send(Message::Stop);
    }
}

impl fmt::Debug for MemoryHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemoryHandle")
    }
}
