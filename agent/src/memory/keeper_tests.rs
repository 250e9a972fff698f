//! What is done about machines, with a guest of our own behind the helper's trait.

mod push;

use super::hands::Hands;
use super::host::{Group, Host, Swap};
use super::keeper::{Keeper, Start};
use super::machine::Place;
use super::mind::program;
use super::{MemorySettings, storage_of};
use crate::store::Store;
use parking_lot::Mutex;
use prestage_integration::api::demand::Mode;
use prestage_integration::api::types::Health;
use prestage_integration::libvirt::Uuid;
use prestage_integration::memory::helper::client::Event;
use prestage_integration::memory::helper::protocol::{MAX_SPANS, MAX_STATES, Moved, Watching};
use prestage_integration::memory::{Fault, MemoryError, PageState, ProcessId, Push, Region, Residency, Signal, Span};
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

const PAGES: u64 = 20_000;
const VM: Uuid = Uuid::from_u128(7);

/// What the helper sees and what it was asked.
struct Guest {
    states: Vec<PageState>,
    staged: Vec<bool>,
    events: VecDeque<Event>,
    period: u32,
    signal: Signal,
    watched: Vec<(u32, ProcessId)>,
    layouts: usize,
    ticket: u64,
    brought: u64,
    starts: usize,
    fails: Option<MemoryError>,
    gone: bool,
    now_us: u64,
    free: u64,
    pressure: Option<f64>,
    group_room: Option<u64>,
    swap: Swap,
    told: u64,
    pushed: u64,
    push_fails: Option<MemoryError>,
    /// No memory of the machine.
    hole: std::ops::Range<u64>,
}

type Shared = Arc<Mutex<Guest>>;

struct Fake(Shared);

impl Fake {
    fn fails(&self) -> Result<(), MemoryError> {
        let guest = self.0.lock();
        if guest.gone {
            return Err(MemoryError::HelperGone("killed".into()));
        }
        guest.fails.clone().map_or(Ok(()), Err)
    }
}

impl Hands for Fake {
    fn watch(&mut self, vm: u32, process: ProcessId, _: Vec<Region>) -> Result<Watching, MemoryError> {
        self.fails()?;
        let mut guest = self.0.lock();
        guest.watched.push((vm, process));
        Ok(Watching { signal: guest.signal, passed_over: vec![(Signal::KvmSpte, "no KVM".into())] })
    }
    fn layout(&mut self, _: u32, _: Vec<Region>) -> Result<(), MemoryError> {
        self.fails()?;
        self.0.lock().layouts += 1;
        Ok(())
    }
    fn listen(&mut self, _: u32, period: u32) -> Result<(), MemoryError> {
        self.fails()?;
        self.0.lock().period = period;
        Ok(())
    }
    fn forget(&mut self, _: u32) -> Result<(), MemoryError> {
        self.fails()
    }
    fn bring_in(&mut self, _: u32, spans: Vec<Span>) -> Result<u64, MemoryError> {
        self.fails()?;
        let mut guest = self.0.lock();
        let mut pages = 0;
        for frame in spans.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages)) {
            assert_eq!(guest.states[frame as usize], PageState::Swapped, "only what is swapped is brought");
            guest.staged[frame as usize] = true;
            pages += 1;
        }
        guest.brought += pages;
        guest.ticket += 1;
        let moved = Moved { asked: pages, eligible: pages, cpu_us: 4 * pages, wall_us: 4 * pages };
        let ticket = guest.ticket;
        guest.events.push_back(Event::Moved { ticket, moved: Ok(moved) });
        Ok(ticket)
    }
    fn map(&mut self, _: u32, spans: Vec<Span>) -> Result<u64, MemoryError> {
        self.fails()?;
        let mut guest = self.0.lock();
        for frame in spans.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages)) {
            assert!(guest.staged[frame as usize], "only what was brought is mapped");
            guest.states[frame as usize] = PageState::Present;
        }
        guest.ticket += 1;
        let ticket = guest.ticket;
        guest.events.push_back(Event::Moved { ticket, moved: Ok(Moved::default()) });
        Ok(ticket)
    }
    fn push_out(&mut self, _: u32, how: Push, spans: Vec<Span>) -> Result<u64, MemoryError> {
        self.fails()?;
        let mut guest = self.0.lock();
        let mut pages = 0;
        for frame in spans.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages)) {
            if guest.states[frame as usize] == PageState::Present {
                pages += 1;
                if how == Push::PageOut {
                    guest.states[frame as usize] = PageState::Swapped;
                    guest.staged[frame as usize] = false;
                    guest.pushed += 1;
                }
            }
        }
        guest.ticket += 1;
        let moved = guest
            .push_fails
            .clone()
            .map_or(Ok(Moved { asked: pages, eligible: pages, cpu_us: pages, wall_us: pages }), Err);
        let ticket = guest.ticket;
        guest.events.push_back(Event::Moved { ticket, moved });
        Ok(ticket)
    }
    fn states(&mut self, _: u32, spans: Vec<Span>) -> Result<Vec<PageState>, MemoryError> {
        self.fails()?;
        assert!(spans.len() <= MAX_SPANS && spans.is_sorted_by_key(|span| span.frame));
        assert!(spans.iter().map(|span| u64::from(span.pages)).sum::<u64>() <= MAX_STATES);
        let guest = self.0.lock();
        let beside =
            |span: &&Span| span.frame < guest.hole.end && guest.hole.start < span.frame + u64::from(span.pages);
        if let Some(Span { frame, pages }) = spans.iter().find(beside) {
            return Err(MemoryError::NoSuchMemory { frame: *frame, pages: *pages });
        }
        let frames = spans.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages));
        Ok(frames.map(|frame| guest.states[frame as usize]).collect())
    }
    fn residency(&mut self, _: u32) -> Result<Residency, MemoryError> {
        self.fails()?;
        let guest = self.0.lock();
        let count = |state| guest.states.iter().filter(|is| **is == state).count() as u64;
        Ok(Residency { present: count(PageState::Present), swapped: count(PageState::Swapped), ..Residency::default() })
    }
    fn next_event(&mut self, _: Duration) -> Result<Option<Event>, MemoryError> {
        let mut guest = self.0.lock();
        match guest.gone {
            true => Err(MemoryError::HelperGone("killed".into())),
            false => Ok(guest.events.pop_front()),
        }
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn missing(&self) -> &[String] {
        &[]
    }
}

struct FakeHost(Shared);

impl Host for FakeHost {
    fn memory(&mut self) -> Option<(u64, u64)> {
        Some((self.0.lock().free, 100_000))
    }
    fn swap(&mut self) -> Swap {
        self.0.lock().swap
    }
    fn pressure(&mut self, _: &Group) -> Option<f64> {
        self.0.lock().pressure
    }
    fn own_pressure(&mut self, _: &Group) -> Option<f64> {
        self.0.lock().pressure
    }
    fn swap_room(&mut self, _: &Group) -> (u64, u64) {
        if self.0.lock().swap == Swap::None { (0, 0) } else { (PAGES, PAGES) }
    }
    fn group(&mut self, _: u32) -> Group {
        Group::default()
    }
    fn group_room(&mut self, _: &Group) -> Option<u64> {
        self.0.lock().group_room
    }
}

struct Bench {
    keeper: Keeper,
    guest: Shared,
    store: Store,
    _folder: tempfile::TempDir,
}

fn place(pid: u32) -> Place {
    Place {
        process: ProcessId { pid, started: 5 },
        regions: vec![Region { frame: 0, pages: PAGES, host: 0x7000_0000_0000 }],
    }
}

fn bench() -> Bench {
    let guest = Guest {
        states: vec![PageState::Swapped; PAGES as usize],
        staged: vec![false; PAGES as usize],
        events: VecDeque::new(),
        period: 0,
        signal: Signal::PerfMajor,
        watched: Vec::new(),
        layouts: 0,
        ticket: 0,
        brought: 0,
        starts: 0,
        fails: None,
        gone: false,
        now_us: 1_000_000,
        free: 90_000,
        pressure: Some(0.0),
        group_room: None,
        swap: Swap::Zram,
        told: 0,
        pushed: 0,
        push_fails: None,
        hole: 0..0,
    };
    let guest = Arc::new(Mutex::new(guest));
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("db")).unwrap();
    let settings = MemorySettings {
        prestage: true,
        reserve: 0.1,
        zram_rate: f64::INFINITY,
        disk_rate: f64::INFINITY,
        max_pressure: 0.1,
        threshold: 0.125,
        save_us: u64::MAX,
        push: None,
    };
    let starts = Arc::clone(&guest);
    let start: Start = Box::new(move || {
        starts.lock().starts += 1;
        if starts.lock().gone {
            return Err(MemoryError::Os { what: "cannot start x".into(), error: "no such file".into() });
        }
        Ok(Box::new(Fake(Arc::clone(&starts))))
    });
    let keeper = Keeper::new(start, Box::new(FakeHost(Arc::clone(&guest))), store.clone(), settings);
    Bench { keeper, guest, store, _folder: folder }
}

impl Bench {
    fn watched() -> Self {
        let mut bench = bench();
        bench.keeper.runs(VM, "web".into(), Ok(place(40)), 0);
        bench.turns(2);
        bench
    }

    fn now(&self) -> u64 {
        self.guest.lock().now_us
    }

    fn turns(&mut self, turns: usize) {
        for _ in 0..turns {
            let now = {
                let mut guest = self.guest.lock();
                guest.now_us += 2000;
                guest.now_us
            };
            while let Some(hands) = &mut self.keeper.hands {
                match hands.next_event(Duration::ZERO) {
                    Ok(Some(event)) => self.keeper.hear(event, now),
                    Ok(None) => break,
                    Err(error) => self.keeper.lost(&error, now),
                }
            }
            self.keeper.turn(now);
        }
    }

    /// The guest touches pages, a few at a time: how many it had to wait for.
    fn touch(&mut self, frames: impl Iterator<Item = u64>) -> u64 {
        let mut waited = 0;
        for (at, frame) in frames.enumerate() {
            let mut guest = self.guest.lock();
            let state = std::mem::replace(&mut guest.states[frame as usize], PageState::Present);
            if state == PageState::Swapped && !std::mem::take(&mut guest.staged[frame as usize]) {
                waited += 1;
                guest.told += 1;
                let at_us = guest.now_us;
                if guest.period > 0 && guest.told.is_multiple_of(u64::from(guest.period)) {
                    guest.events.push_back(Event::Faults { vm: 1, lost: 0, faults: vec![Fault { at_us, frame }] });
                }
            }
            drop(guest);
            if at % 64 == 0 {
                self.turns(1);
            }
        }
        self.turns(1);
        waited
    }

    fn swap_all(&mut self) {
        let mut guest = self.guest.lock();
        guest.now_us += 60_000_000;
        guest.states.fill(PageState::Swapped);
        guest.staged.fill(false);
    }

    /// Runs the program over 8000 scattered pages, with a lead of some turns.
    fn run(&mut self, execution: i64) -> u64 {
        self.swap_all();
        self.keeper.program(VM, execution, program("job", &[]), self.now());
        self.turns(20);
        let waited = self.touch((0..8000).map(|i| i * 7919 % PAGES));
        self.turns(40);
        self.keeper.program_ended(execution, self.now());
        waited
    }
}

#[test]
fn a_program_that_ran_before_has_its_pages_there() {
    let mut bench = Bench::watched();
    let first = bench.run(1);
    assert!(first > 7000, "{first}");
    let second = bench.run(2);
    assert!(second < 400, "{second}");
    let third = bench.run(3);
    assert!(third < 400, "{third}");
    let report = bench.keeper.report(VM, bench.now());
    assert_eq!(
        (report.health, report.mode, report.signal.as_deref()),
        (Health::Ok, Mode::Act, Some("perf major faults"))
    );
    assert_eq!(report.sets[0].runs, 3);
    // What is in vain is of the first run, whose pages are guessed at from their neighbours.
    assert!(report.used_bytes > 14_000 * 4096 && report.wasted_bytes * 8 < report.used_bytes, "{report:?}");
    assert_eq!(report.passed_over[0].why, "no KVM");
    // Known to the next daemon too.
    for (_, pending) in bench.keeper.save() {
        pending.wait().unwrap();
    }
    assert!(bench.store.profile(&storage_of(VM)).unwrap().is_some());
    bench.keeper.stopped(VM);
    bench.keeper.runs(VM, "web".into(), Ok(place(41)), bench.now());
    bench.guest.lock().events.clear();
    bench.swap_all();
    bench.keeper.program(VM, 4, program("job", &[]), bench.now());
    bench.turns(10);
    assert!(bench.guest.lock().staged.iter().filter(|staged| **staged).count() > 5000);
}

#[test]
fn nothing_is_brought_in_where_it_is_switched_off_and_it_is_learned_all_the_same() {
    let mut bench = Bench::watched();
    bench.keeper.set_mode(VM, Some(Mode::Observe));
    bench.run(1);
    bench.run(2);
    assert_eq!(bench.guest.lock().brought, 0);
    let report = bench.keeper.report(VM, bench.now());
    assert_eq!((report.mode, report.sets[0].runs), (Mode::Observe, 2));
    bench.keeper.set_mode(VM, None);
    assert!(bench.run(3) < 400);
}

#[test]
fn room_pressure_and_missing_swap_hold_it_back() {
    let mut bench = Bench::watched();
    bench.run(1);
    let held = |bench: &mut Bench, words: &str| {
        bench.guest.lock().brought = 0;
        bench.swap_all();
        bench.keeper.program(VM, 2, program("job", &[]), bench.now());
        bench.turns(40);
        let report = bench.keeper.report(VM, bench.now());
        assert_eq!((report.held.as_deref(), bench.guest.lock().brought), (Some(words), 0));
        bench.keeper.program_ended(2, bench.now());
    };
    bench.guest.lock().free = 10_000;
    held(&mut bench, "the host has no memory to spare");
    bench.guest.lock().free = 90_000;
    bench.guest.lock().group_room = Some(0);
    held(&mut bench, "the machine's control group is at its memory limit");
    bench.guest.lock().group_room = None;
    // Of the 100,000 pages 10,000 are the reserve; 4000 are few, and tasks wait.
    bench.guest.lock().pressure = Some(0.2);
    bench.guest.lock().free = 14_000;
    held(&mut bench, "tasks wait for memory");
    // Where there is plenty the waiting is for swap, and is what this is to end.
    bench.guest.lock().free = 90_000;
    assert!(bench.run(4) < 400);
    bench.guest.lock().pressure = None;
    bench.guest.lock().brought = 0;
    // Room for some: as much comes and no more, though the figure is not updated for what comes.
    // 4 MiB of it are the guest's own
    bench.guest.lock().group_room = Some(1024 + 700);
    bench.swap_all();
    bench.keeper.program(VM, 3, program("job", &[]), bench.now());
    bench.turns(3);
    let brought = bench.guest.lock().brought;
    assert!((500..=700).contains(&brought), "{brought}");
    bench.keeper.program_ended(3, bench.now());
    bench.guest.lock().swap = Swap::None;
    bench.guest.lock().now_us += 2_000_000;
    bench.turns(1);
    assert_eq!(bench.guest.lock().period, 0, "nobody pays for what cannot be");
    let report = bench.keeper.report(VM, bench.now());
    assert!(report.health == Health::Off && report.state.contains("no swap"), "{}", report.state);
}

#[test]
fn every_way_it_can_fail_has_words_and_harms_nothing() {
    let mut bench = Bench::watched();
    bench.run(1);
    let state = |bench: &mut Bench| bench.keeper.report(VM, bench.now()).state;
    // The process ends.
    bench.guest.lock().events.push_back(Event::Gone { vm: 1 });
    bench.turns(1);
    assert_eq!(state(&mut bench), "QEMU is gone");
    bench.keeper.program(VM, 2, program("job", &[]), bench.now());
    bench.turns(5);
    // It comes again, as another process.
    bench.keeper.runs(VM, "web".into(), Ok(place(50)), bench.now());
    assert_eq!(bench.guest.lock().watched.last(), Some(&(1, place(50).process)));
    assert_eq!(state(&mut bench), "watched, and pages are brought in");
    // Its memory moves.
    let mut moved = place(50);
    moved.regions[0].host += 1 << 30;
    bench.keeper.runs(VM, "web".into(), Ok(moved), bench.now());
    let calls = |guest: &Guest| (guest.layouts, guest.watched.len());
    assert_eq!(calls(&bench.guest.lock()), (1, 2));
    // A span that is no memory any more: it is looked for anew.
    bench.swap_all();
    bench.guest.lock().fails = Some(MemoryError::NoSuchMemory { frame: 1, pages: 1 });
    bench.keeper.program(VM, 3, program("job", &[]), bench.now());
    assert_eq!(bench.keeper.take_moved(), [VM]);
    // Another process has its number.
    bench.guest.lock().fails = Some(MemoryError::Reused { pid: 50, meant: 5, found: 9 });
    bench.keeper.program(VM, 4, program("job", &[]), bench.now());
    bench.turns(20);
    assert!(state(&mut bench).starts_with("QEMU is gone"), "{}", state(&mut bench));
    // A permission is missing.
    bench.guest.lock().fails =
        Some(MemoryError::NotPermitted { what: "perf".into(), remedy: "give it CAP_PERFMON".into() });
    bench.keeper.runs(VM, "web".into(), Ok(place(51)), bench.now());
    assert_eq!(state(&mut bench), "not permitted: perf; give it CAP_PERFMON");
    // Nobody knows where it is.
    bench.keeper.runs(VM, "web".into(), Err("its QEMU process is not found".into()), bench.now());
    assert_eq!(state(&mut bench), "its QEMU process is not found");
    assert!(bench.keeper.report(Uuid::from_u128(9), 0).state.contains("does not run"));
}

#[test]
fn a_helper_that_ends_is_started_anew_and_ever_more_rarely() {
    let mut bench = Bench::watched();
    bench.run(1);
    bench.guest.lock().gone = true;
    bench.turns(1);
    assert!(bench.keeper.hands.is_none());
    assert!(bench.keeper.status().detail.unwrap().contains("the helper has ended"));
    let starts = bench.guest.lock().starts;
    bench.turns(30_000); // a minute
    let tried = bench.guest.lock().starts - starts;
    assert!((4..=7).contains(&tried), "{tried}");
    assert!(bench.keeper.report(VM, bench.now()).state.starts_with("the helper is not there"));
    bench.guest.lock().gone = false;
    bench.turns(31_000);
    assert_eq!(bench.keeper.status().detail, None);
    assert!(bench.run(2) < 400, "what was learned is still known");
}

#[test]
fn looks_find_faults_where_none_are_told_one_by_one() {
    let mut bench = bench();
    bench.guest.lock().signal = Signal::PagemapScan;
    bench.keeper.runs(VM, "web".into(), Ok(place(40)), 0);
    bench.turns(2);
    let idle = bench.guest.lock().period;
    bench.keeper.program(VM, 1, program("job", &[]), bench.now());
    let busy = bench.guest.lock().period;
    assert!(busy >= 20 && busy < idle, "{busy} {idle}");
}

#[test]
fn states_come_in_the_order_of_the_spans_that_were_asked_for() {
    let bench = bench();
    for frame in 0..PAGES {
        let state = [PageState::Present, PageState::Swapped, PageState::Absent][(frame * 7 % 11 % 3) as usize];
        bench.guest.lock().states[frame as usize] = state;
    }
    let mut hands = Fake(Arc::clone(&bench.guest));
    for pages in [1, 3, 40] {
        // More spans than a message may have, far from each other and from any order.
        let spans: Vec<Span> =
            (0..6000).map(|i| Span { frame: i * 7919 % (PAGES - pages), pages: pages as u32 }).collect();
        let frames = spans.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages));
        let expected: Vec<PageState> = frames.map(|frame| bench.guest.lock().states[frame as usize]).collect();
        assert_eq!(super::hands::states(&mut hands, 1, &spans).unwrap(), expected);
    }
    assert_eq!(super::hands::states(&mut hands, 1, &[]).unwrap(), []);
    // Between two spans lies what is no memory.
    bench.guest.lock().hole = 110..112;
    let spans = [Span { frame: 100, pages: 10 }, Span { frame: 112, pages: 3 }];
    assert_eq!(super::hands::states(&mut hands, 1, &spans).unwrap().len(), 13);
    let none = super::hands::states(&mut hands, 1, &[Span { frame: 111, pages: 1 }]);
    assert!(matches!(none, Err(MemoryError::NoSuchMemory { .. })));
}

#[test]
fn a_program_that_is_told_of_before_its_machine_is_not_lost() {
    let mut bench = Bench::watched();
    bench.run(1);
    bench.keeper.stopped(VM);
    bench.swap_all();
    let now = bench.now();
    bench.keeper.program(VM, 2, program("job", &[]), now);
    bench.keeper.program(VM, 3, program("other", &[]), now);
    bench.keeper.program_ended(3, now);
    bench.keeper.runs(VM, "web".into(), Err("this host has no swap".into()), now);
    bench.turns(3);
    bench.keeper.runs(VM, "web".into(), Ok(place(40)), bench.now());
    bench.turns(20);
    let staged = bench.guest.lock().staged.iter().filter(|staged| **staged).count();
    assert!(staged > 5000, "{staged}");
}
