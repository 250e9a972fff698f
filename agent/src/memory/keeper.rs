//! The machines whose memory is watched, and what is done about each in a turn. Time is told, the helper and the host are
//! behind traits.

use super::hands::{Hands, states};
use super::host::{Group, Host, Swap};
use super::idle::Idle;
use super::machine::{Machine, Place};
use super::mind::Mind;
use super::push::push_out;
use super::stage::{Hold, LOOK_PAGES};
use super::{IdleSettings, MemorySettings, storage_of};
use crate::store::{Pending, Store};
use prestage_integration::api::demand::Mode;
use prestage_integration::libvirt::Uuid;
use prestage_integration::memory::MemoryError;
use prestage_integration::memory::helper::client::Event;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// What a machine is taken to have until it is known.
const UNKNOWN_PAGES: u64 = 1 << 18;
/// Memory is short where less than this part of the host's is to spare.
const PLENTY: u64 = 16;
/// Pages below a control group's limit that are left to the guest itself, and to the kernel, which charges ahead on each processor.
const GROUP_SPARE: u64 = 1024;
/// Programs that wait for their machine to be known, at most.
const EARLY: usize = 256;
/// How often swap areas are looked at, and what is configured is looked at anew.
const LOOK_US: u64 = 1_000_000;
/// A word about free memory holds so long while pages are brought in: at 4 µs a page, 20 MiB.
const ROOM_US: u64 = 20_000;
/// A helper that has ended is started anew after so long, and after twice as long each time that it ends again soon.
const AGAIN_US: u64 = 1_000_000;
const AGAIN_MOST_US: u64 = 60_000_000;
/// Pauses: while orders are under way, while a guest is active, and at rest.
const BUSY: Duration = Duration::from_millis(2);
const ACTIVE: Duration = Duration::from_millis(20);
const REST: Duration = Duration::from_secs(1);
/// A guest is active so long after a fault.
const ACTIVE_US: u64 = 100_000;
/// Where faults do not come one by one, looks may take this share of a processor: while a program runs, and else. A look costs
/// some 5 ms a GiB.
const LOOK_SHARE: f64 = 0.05;
const LOOK_SHARE_IDLE: f64 = 0.005;
const LOOK_US_A_PAGE: f64 = 0.02;

/// Starts the helper.
pub(super) type Start = Box<dyn FnMut() -> Result<Box<dyn Hands>, MemoryError> + Send>;

pub(super) struct Keeper {
    start: Start,
    pub(super) hands: Option<Box<dyn Hands>>,
    pub(super) helper_trouble: Option<String>,
    again_us: u64,
    start_at_us: u64,
    started_us: u64,
    pub(super) host: Box<dyn Host>,
    pub(super) swap: Swap,
    looked_us: Option<u64>,
    store: Store,
    saved_us: u64,
    pub(super) settings: MemorySettings,
    pub(super) machines: BTreeMap<u32, Machine>,
    next: u32,
    modes: HashMap<Uuid, Mode>,
    floors: HashMap<Uuid, f64>,
    /// Names of programs that are due.
    due: HashMap<Uuid, Vec<u32>>,
    /// Machines whose memory is no longer where it was said to be.
    moved: Vec<Uuid>,
    /// Programs of machines that nobody has told of yet, as after a restart: machine, execution, program.
    early: Vec<(Uuid, i64, u64)>,
}

impl Keeper {
    pub(super) fn new(start: Start, host: Box<dyn Host>, store: Store, settings: MemorySettings) -> Self {
        Self {
            start,
            hands: None,
            helper_trouble: None,
            again_us: AGAIN_US,
            start_at_us: 0,
            started_us: 0,
            host,
            swap: Swap::None,
            looked_us: None,
            store,
            saved_us: 0,
            settings,
            machines: BTreeMap::new(),
            next: 0,
            modes: HashMap::new(),
            floors: HashMap::new(),
            due: HashMap::new(),
            moved: Vec::new(),
            early: Vec::new(),
        }
    }

    pub(super) fn find(&self, uuid: Uuid) -> Option<u32> {
        self.machines.iter().find(|(_, machine)| machine.uuid == uuid).map(|(id, _)| *id)
    }

    /// What is done for a machine.
    pub(super) fn mode(&self, uuid: Uuid) -> Mode {
        let usual = if self.settings.prestage { Mode::Act } else { Mode::Observe };
        self.modes.get(&uuid).copied().unwrap_or(usual)
    }

    pub(super) fn set_mode(&mut self, uuid: Uuid, mode: Option<Mode>) {
        match mode {
            Some(mode) => drop(self.modes.insert(uuid, mode)),
            None => drop(self.modes.remove(&uuid)),
        }
    }

    /// Share of the memory that a machine uses that is never pushed out.
    pub(super) fn set_floor(&mut self, uuid: Uuid, floor: Option<f64>) {
        match floor {
            Some(floor) => drop(self.floors.insert(uuid, floor)),
            None => drop(self.floors.remove(&uuid)),
        }
    }

    /// These programs are due in a machine, and no others.
    pub(super) fn due(&mut self, uuid: Uuid, programs: Vec<u32>) {
        match programs.is_empty() {
            true => drop(self.due.remove(&uuid)),
            false => drop(self.due.insert(uuid, programs)),
        }
    }

    /// A machine runs, with its memory there; or it is not known where.
    pub(super) fn runs(&mut self, uuid: Uuid, name: String, place: Result<Place, String>, now_us: u64) {
        let id = match self.find(uuid) {
            Some(id) => id,
            None => {
                self.next += 1;
                let storage = storage_of(uuid);
                let saved = self.store.profile(&storage).unwrap_or_else(|error| {
                    tracing::warn!(vm = name, %error, "saved profile of memory cannot be read; learning anew");
                    None
                });
                drop(self.store.add_storage(&storage));
                let (pages, frames) =
                    place.as_ref().map_or((UNKNOWN_PAGES, u64::MAX), |place| (place.pages(), place.frames()));
                let saved = saved.as_ref().map(|(_, bytes)| bytes.as_slice());
                let mind = Mind::new(pages, frames, saved, self.settings.threshold as f32, now_us);
                if let Some(error) = &mind.refused {
                    tracing::warn!(vm = name, %error, "saved profile of memory not used; nothing is saved until it is removed");
                }
                let mut machine = Machine {
                    uuid,
                    name: name.clone(),
                    place: None,
                    watching: None,
                    trouble: None,
                    mind,
                    idle: Idle::new(&[], now_us),
                    period: 0,
                    group: Group::default(),
                    active_us: 0,
                    room_us: 0,
                };
                let early = self.early.extract_if(.., |(vm, ..)| *vm == uuid);
                for (_, execution, program) in early {
                    machine.mind.start(execution, program, now_us);
                }
                self.machines.insert(self.next, machine);
                self.next
            }
        };
        let Some(machine) = self.machines.get_mut(&id) else { return };
        machine.name = name;
        match place {
            Err(trouble) => {
                // A program that was announced may begin before it is known where its memory is.
                if machine.place.take().is_some() {
                    machine.lose(trouble, now_us);
                } else {
                    machine.trouble = Some(trouble);
                }
                if let Some(hands) = &mut self.hands {
                    let _ = hands.forget(id);
                }
            }
            Ok(place) if machine.place.as_ref() == Some(&place) && machine.watching.is_some() => {}
            Ok(place) => {
                machine.mind.resize(place.pages(), place.frames(), now_us);
                machine.idle.resize(&place.regions);
                let moved = machine.watching.is_some()
                    && machine.place.as_ref().is_some_and(|before| before.process == place.process);
                let regions = place.regions.clone();
                if !moved {
                    if machine.place.is_some() {
                        machine.lose("not watched yet".to_owned(), now_us);
                    }
                    machine.group = self.host.group(place.process.pid);
                }
                machine.place = Some(place);
                if moved {
                    machine.mind.stage.forget();
                    let result = self.hands.as_mut().map_or(Ok(()), |hands| hands.layout(id, regions));
                    self.check(id, result, now_us);
                } else {
                    self.watch(id, now_us);
                }
            }
        }
    }

    /// A machine has stopped.
    pub(super) fn stopped(&mut self, uuid: Uuid) {
        // Told anew when it runs again.
        self.due.remove(&uuid);
        let Some(id) = self.find(uuid) else { return };
        if let Some(mut machine) = self.machines.remove(&id) {
            machine.mind.stop(u64::MAX);
            // It may start again in a moment, and is to find what it learned.
            if let Some((_, pending)) = machine.save(&self.store)
                && let Err(error) = pending.wait()
            {
                tracing::warn!(vm = machine.name, %error, "profile of a machine's memory not saved");
            }
        }
        if let Some(hands) = &mut self.hands {
            let _ = hands.forget(id);
        }
    }

    /// A program begins in a machine.
    pub(super) fn program(&mut self, uuid: Uuid, execution: i64, program: u64, now_us: u64) {
        let Some(id) = self.find(uuid) else {
            if self.early.len() < EARLY {
                self.early.push((uuid, execution, program));
            }
            return;
        };
        if let Some(machine) = self.machines.get_mut(&id) {
            machine.mind.start(execution, program, now_us);
            machine.active_us = now_us;
        }
        self.listen(id, now_us);
        self.tend(id, now_us);
    }

    /// A program has ended, wherever it ran.
    pub(super) fn program_ended(&mut self, execution: i64, now_us: u64) {
        self.early.retain(|(_, early, _)| *early != execution);
        let of = |(id, machine): (&u32, &Machine)| machine.mind.records(execution).then_some(*id);
        if let (Some(id), Some(hands)) = (self.machines.iter().find_map(of), &mut self.hands)
            && let Some(machine) = self.machines.get_mut(&id)
            && machine.watching.is_some()
        {
            // What of its set was touched is looked at once more, all of it.
            let stage = &mut machine.mind.stage;
            for _ in 0..stage.unread().div_ceil(LOOK_PAGES as u64) {
                stage.hurry();
                let Some(spans) = stage.look(now_us) else { break };
                let found = states(hands.as_mut(), id, &spans);
                stage.seen(found.as_deref().ok(), now_us);
            }
        }
        for machine in self.machines.values_mut() {
            machine.mind.end(execution, now_us);
        }
    }

    /// Forgets what was learned of a machine.
    pub(super) fn forget(&mut self, storage: &str) {
        let threshold = self.settings.threshold as f32;
        for machine in self.machines.values_mut().filter(|machine| storage_of(machine.uuid) == storage) {
            machine.mind.forget(machine.place.as_ref().map_or(u64::MAX, Place::frames), threshold);
        }
    }

    /// Takes what the helper says.
    pub(super) fn hear(&mut self, event: Event, now_us: u64) {
        match event {
            Event::Faults { vm, lost, faults } => {
                let Some(machine) = self.machines.get_mut(&vm) else { return };
                machine.active_us = now_us;
                let ordered = machine.is_ordered();
                let period = machine.period();
                machine.idle.heard(lost * period, now_us);
                faults.iter().for_each(|fault| machine.idle.came_in(fault.frame, period, now_us));
                let changed = machine.mind.faults(&faults, lost, ordered, now_us);
                if changed.is_some() {
                    self.listen(vm, now_us);
                }
            }
            Event::Watching { vm, watching } => {
                if let Some(machine) = self.machines.get_mut(&vm) {
                    tracing::info!(vm = machine.name, signal = %watching.signal, "guest memory is watched by another signal");
                    machine.watching = Some(watching);
                }
            }
            Event::Gone { vm } => {
                if let Some(machine) = self.machines.get_mut(&vm) {
                    machine.place = None;
                    machine.lose("QEMU is gone".to_owned(), now_us);
                }
            }
            Event::Moved { ticket, moved } => {
                let cpu_us = moved.as_ref().ok().map(|moved| moved.cpu_us);
                let mut machines = self.machines.iter_mut();
                let owner =
                    machines.find_map(|(id, machine)| machine.mind.stage.moved(ticket, cpu_us, now_us).then_some(*id));
                match (owner, moved) {
                    (Some(id), Err(error)) => self.check::<()>(id, Err(error), now_us),
                    (Some(_), Ok(_)) => {}
                    (None, moved) => self.pushed(ticket, &moved, now_us),
                }
            }
        }
    }

    /// The helper cannot be talked to any more.
    pub(super) fn lost(&mut self, error: &MemoryError, now_us: u64) {
        tracing::warn!(%error, "the helper that looks into guests' memory has ended");
        if now_us.saturating_sub(self.started_us) > AGAIN_MOST_US {
            self.again_us = AGAIN_US;
        }
        self.broken(error.to_string(), now_us);
    }

    fn broken(&mut self, trouble: String, now_us: u64) {
        self.hands = None;
        self.start_at_us = now_us.saturating_add(self.again_us);
        self.again_us = (self.again_us * 2).min(AGAIN_MOST_US);
        for machine in self.machines.values_mut() {
            if machine.place.is_some() {
                machine.lose(trouble.clone(), now_us);
            }
        }
        self.helper_trouble = Some(trouble);
    }

    /// Everything that is due. Returns when to come again at the latest.
    pub(super) fn turn(&mut self, now_us: u64) -> Duration {
        self.start_helper(now_us);
        if self.looked_us.is_none_or(|at| now_us.saturating_sub(at) >= LOOK_US) {
            self.looked_us = Some(now_us);
            self.swap = self.host.swap();
            for id in self.machines.keys().copied().collect::<Vec<_>>() {
                self.listen(id, now_us);
            }
        }
        for id in self.machines.keys().copied().collect::<Vec<_>>() {
            self.tend(id, now_us);
        }
        if now_us.saturating_sub(self.saved_us) >= self.settings.save_us {
            self.saved_us = now_us;
            // The store counts a failure and reports itself degraded.
            self.machines.values_mut().for_each(|machine| drop(machine.save(&self.store)));
        }
        let push = self.settings.push.map_or(REST, |push| Duration::from_micros(push.every_us));
        let pauses = self.machines.values().map(|machine| {
            let stage = &machine.mind.stage;
            let look = stage.look_at_us().map_or(REST, |at| Duration::from_micros(at.saturating_sub(now_us)));
            let pace = if machine.watching.is_none() {
                REST
            } else if stage.is_waiting() && stage.hold().is_none() {
                BUSY
            } else if stage.is_waiting() || now_us.saturating_sub(machine.active_us) < ACTIVE_US {
                ACTIVE
            } else if machine.mind.has_program() {
                ACTIVE * 5
            } else {
                REST
            };
            pace.min(look).min(push)
        });
        pauses.min().unwrap_or(REST).max(BUSY)
    }

    fn start_helper(&mut self, now_us: u64) {
        let wanted = self.machines.values().any(|machine| machine.place.is_some());
        if self.hands.is_some() || !wanted || now_us < self.start_at_us {
            return;
        }
        match (self.start)() {
            Ok(hands) => {
                for missing in hands.missing() {
                    tracing::warn!("guest memory: {missing}");
                }
                (self.hands, self.helper_trouble, self.started_us) = (Some(hands), None, now_us);
                for id in self.machines.keys().copied().collect::<Vec<_>>() {
                    self.watch(id, now_us);
                }
            }
            Err(error) => {
                if self.helper_trouble.is_none() {
                    tracing::warn!(%error, "guest memory is not watched: no helper");
                }
                self.broken(format!("the helper is not there: {error}"), now_us);
            }
        }
    }

    fn watch(&mut self, id: u32, now_us: u64) {
        let (Some(hands), Some(machine)) = (&mut self.hands, self.machines.get_mut(&id)) else { return };
        let Some(place) = &machine.place else { return };
        match hands.watch(id, place.process, place.regions.clone()) {
            Ok(watching) => {
                tracing::info!(vm = machine.name, signal = %watching.signal, "guest memory is watched");
                (machine.watching, machine.trouble) = (Some(watching), None);
                self.listen(id, now_us);
            }
            Err(error) => self.check::<()>(id, Err(error), now_us),
        }
    }

    /// Tells the helper how many faults of a machine are wanted, if that is news.
    fn listen(&mut self, id: u32, now_us: u64) {
        let swap = self.swap;
        let (Some(hands), Some(machine)) = (&mut self.hands, self.machines.get_mut(&id)) else { return };
        if machine.watching.is_none() {
            return;
        }
        let wanted = if swap == Swap::None {
            0
        } else if machine.is_ordered() {
            machine.mind.attention.period()
        } else {
            let share = if machine.mind.has_program() { LOOK_SHARE } else { LOOK_SHARE_IDLE };
            let pages = machine.place.as_ref().map_or(0, Place::pages) as f64;
            (pages * LOOK_US_A_PAGE / 1000.0 / share).clamp(20.0, 60_000.0) as u32
        };
        if wanted != machine.period {
            machine.period = wanted;
            let result = hands.listen(id, wanted);
            self.check(id, result, now_us);
        }
    }

    /// What became of a call for a machine.
    pub(super) fn check<T>(&mut self, id: u32, result: Result<T, MemoryError>, now_us: u64) {
        let Err(error) = result else { return };
        if matches!(error, MemoryError::HelperGone(_)) {
            return self.lost(&error, now_us);
        }
        let Some(machine) = self.machines.get_mut(&id) else { return };
        match error {
            MemoryError::Busy => {}
            MemoryError::NoSuchMemory { .. } => {
                self.moved.push(machine.uuid);
                machine.mind.stage.forget();
            }
            MemoryError::Gone { .. } | MemoryError::Reused { .. } => {
                machine.place = None;
                machine.lose(format!("QEMU is gone: {error}"), now_us);
            }
            error => {
                if machine.trouble.is_none() {
                    tracing::warn!(vm = machine.name, %error, "guest memory is not watched");
                }
                machine.lose(error.to_string(), now_us);
            }
        }
    }

    /// Machines whose memory is to be looked for anew, since the last call.
    pub(super) fn take_moved(&mut self) -> Vec<Uuid> {
        std::mem::take(&mut self.moved)
    }

    /// A machine's turn.
    fn tend(&mut self, id: u32, now_us: u64) {
        let Some(mode) = self.machines.get(&id).map(|machine| self.mode(machine.uuid)) else { return };
        let (settings, swap) = (self.settings, self.swap);
        let Self { hands, host, machines, due, floors, .. } = self;
        let (Some(hands), Some(machine)) = (hands, machines.get_mut(&id)) else { return };
        if machine.watching.is_none() {
            return;
        }
        let act = mode == Mode::Act && swap != Swap::None;
        machine.mind.predictor.set_min_probability(settings.threshold as f32);
        machine.mind.think(act, now_us);
        let stage = &mut machine.mind.stage;
        stage.set_rate(if swap == Swap::Disk { settings.disk_rate } else { settings.zram_rate });
        if (stage.is_waiting() || stage.hold().is_some()) && now_us.saturating_sub(machine.room_us) >= ROOM_US {
            machine.room_us = now_us;
            stage.allow(if act { room(host.as_mut(), &machine.group, &settings) } else { Err(Hold::Off) });
        }
        let mut failed = None;
        if let Some(spans) = stage.look(now_us) {
            let states = states(hands.as_mut(), id, &spans);
            stage.seen(states.as_deref().ok(), now_us);
            failed = states.err();
        }
        while failed.is_none()
            && let Some(asked) = stage.ask(now_us)
        {
            match states(hands.as_mut(), id, &asked) {
                Ok(states) => {
                    let Some(spans) = stage.answer(&states) else { continue };
                    match hands.bring_in(id, spans) {
                        Ok(ticket) => stage.sent(ticket),
                        Err(error) => {
                            stage.not_sent();
                            failed = Some(error);
                        }
                    }
                }
                Err(error) => {
                    stage.no_answer();
                    failed = Some(error);
                }
            }
        }
        // It saves a guest as much time on zram, but costs more processor time than the faults that staging saves there.
        while failed.is_none()
            && act
            && swap == Swap::Disk
            && let Some(spans) = stage.map()
        {
            match hands.map(id, spans) {
                Ok(ticket) => stage.sent(ticket),
                Err(error) => {
                    stage.not_sent();
                    failed = Some(error);
                }
            }
        }
        match &settings.push {
            Some(push) if act && failed.is_none() => {
                let due = due.get(&machine.uuid).map(Vec::as_slice).unwrap_or_default();
                let push = IdleSettings { floor: floors.get(&machine.uuid).copied().unwrap_or(push.floor), ..*push };
                failed = push_out(id, machine, due, hands.as_mut(), host.as_mut(), &push, now_us).err();
            }
            Some(_) if failed.is_some() => {}
            _ => machine.idle.interrupt(),
        }
        if let Some(error) = failed {
            self.check::<()>(id, Err(error), now_us);
        }
    }

    /// Saves what has changed.
    pub(super) fn save(&mut self) -> Vec<(u64, Pending)> {
        self.machines.values_mut().filter_map(|machine| machine.save(&self.store)).collect()
    }
}

/// Pages that may come in now: what the host and the machine's groups have to spare, unless tasks wait for memory that is short.
fn room(host: &mut dyn Host, group: &Group, settings: &MemorySettings) -> Result<u64, Hold> {
    let (free, all) = host.memory().ok_or(Hold::HostRoom)?;
    let of_host = free.saturating_sub((all as f64 * settings.reserve) as u64);
    let of_group = host.group_room(group).map_or(u64::MAX, |room| room.saturating_sub(GROUP_SPARE));
    match (of_host, of_group) {
        (0, _) => Err(Hold::HostRoom),
        (_, 0) => Err(Hold::GroupRoom),
        (of_host, of_group) => {
            // A guest that waits for its swapped pages raises pressure too, which bringing them in relieves: it counts where
            // memory is short.
            let short = of_host.min(of_group) < all / PLENTY;
            match short && host.pressure(group).is_some_and(|some| some > settings.max_pressure) {
                true => Err(Hold::Pressure),
                false => Ok(of_host.min(of_group)),
            }
        }
    }
}
