//! Pushing out, and what keeps it from that.

use super::super::IdleSettings;
use super::super::host::Swap;
use super::super::mind::{name, program};
use super::{Bench, PAGES, VM, place};
use prestage_integration::api::demand::Mode;
use prestage_integration::api::types::Health;
use prestage_integration::memory::helper::client::Event;
use prestage_integration::memory::{Fault, MemoryError, PageState};

const PUSH: IdleSettings = IdleSettings { floor: 0.2, pressure: 0.01, every_us: 6_000_000 };

impl Bench {
    /// Ten steps a minute: pages pushed.
    fn minutes(&mut self, minutes: usize) -> u64 {
        self.guest.lock().pushed = 0;
        for _ in 0..minutes * 10 {
            self.guest.lock().now_us += 6_000_000;
            self.turns(4);
        }
        self.guest.lock().pushed
    }

    fn push_state(&mut self) -> String {
        self.keeper.report(VM, self.now()).push_state.unwrap_or_default()
    }
}

#[test]
fn idle_pages_are_pushed_out_only_where_that_is_switched_on_and_never_those_of_a_program_that_runs_or_is_due() {
    let mut bench = Bench::watched();
    bench.run(1);
    bench.run(2);
    bench.guest.lock().states.fill(PageState::Present);
    assert_eq!((bench.minutes(5), bench.push_state().as_str()), (0, ""), "it is off");
    bench.keeper.settings.push = Some(PUSH);
    bench.keeper.program(VM, 3, program("job", &[]), bench.now());
    assert_eq!(bench.minutes(5), 0, "its pages are all over memory");
    assert_eq!(bench.push_state(), "not now: nothing that could be pushed looks idle");
    bench.keeper.program_ended(3, bench.now());
    bench.keeper.due(VM, vec![name("other"), name("job")]);
    assert_eq!(bench.minutes(5), 0, "it is due");
    bench.keeper.due(VM, vec![name("other")]);
    bench.keeper.set_mode(VM, Some(Mode::Observe));
    assert_eq!(bench.minutes(5), 0, "its policy is against it");
    assert!(bench.push_state().contains("vm policy"), "{}", bench.push_state());
    bench.keeper.set_mode(VM, None);
    // What has just come in is left alone for half an hour.
    assert_eq!(bench.minutes(5), 0);
    let present =
        |bench: &Bench| bench.guest.lock().states.iter().filter(|state| **state == PageState::Present).count() as u64;
    bench.keeper.set_floor(VM, Some(0.5));
    bench.minutes(60);
    assert!((PAGES / 2..PAGES * 6 / 10).contains(&present(&bench)), "its own floor: {}", present(&bench));
    bench.keeper.set_floor(VM, None);
    bench.minutes(60);
    assert!((PAGES / 5..PAGES / 4).contains(&present(&bench)), "{}", present(&bench));
    let report = bench.keeper.report(VM, bench.now());
    assert!(report.pushed_bytes > PAGES * 4096 / 2 && report.push_cpu_us > 0, "{report:?}");
    assert!(bench.push_state().contains("floor"), "{}", bench.push_state());
    // What it needs is there again before it touches it, pushed out or not.
    assert!(bench.run(4) < 400);
}

#[test]
fn what_keeps_pushing_from_working_is_told_and_the_guest_is_watched_on() {
    let mut bench = Bench::watched();
    bench.keeper.settings.push = Some(PUSH);
    bench.guest.lock().states.fill(PageState::Present);
    let error = MemoryError::NotPermitted { what: "process_madvise".into(), remedy: "give it CAP_SYS_NICE".into() };
    bench.guest.lock().push_fails = Some(error);
    bench.minutes(3);
    assert!(bench.push_state().contains("CAP_SYS_NICE"), "{}", bench.push_state());
    let report = bench.keeper.report(VM, bench.now());
    assert!(report.push_failed > 0 && report.health == Health::Ok, "{report:?}");
    bench.guest.lock().push_fails = None;
    assert!(bench.minutes(8) > 0);
    // The helper ends in the middle, and what was tried is tried anew.
    bench.guest.lock().gone = true;
    bench.turns(2);
    assert!(bench.push_state().contains("not watched"), "{}", bench.push_state());
    bench.guest.lock().gone = false;
    assert!(bench.minutes(8) > 0);
    // Swap is switched off.
    bench.guest.lock().swap = Swap::None;
    bench.minutes(1);
    assert_eq!(bench.push_state(), "not now: this host has no swap");
}

#[test]
fn a_guest_that_takes_pages_back_stops_the_pushing_before_the_next_order() {
    let mut bench = Bench::watched();
    bench.keeper.settings.push = Some(PUSH);
    bench.guest.lock().states.fill(PageState::Present);
    bench.minutes(8);
    assert_eq!(bench.push_state(), "in small steps");
    let out: Vec<u64> = {
        let guest = bench.guest.lock();
        (0..PAGES).filter(|frame| guest.states[*frame as usize] == PageState::Swapped).collect()
    };
    assert!(out.len() as u64 > PAGES / 10);
    let before = bench.guest.lock().pushed;
    bench.touch(out.into_iter().take(200));
    assert!(bench.push_state().contains("too much of it came back; again in"), "{}", bench.push_state());
    assert_eq!(bench.guest.lock().pushed, before);
    // The same after a restart: what came back then was pushed by the daemon before it.
    bench.minutes(20);
    bench.keeper.stopped(VM);
    bench.keeper.runs(VM, "web".into(), Ok(place(40)), bench.now());
    bench.turns(2);
    let out: Vec<u64> = {
        let guest = bench.guest.lock();
        (0..PAGES).filter(|frame| guest.states[*frame as usize] == PageState::Swapped).collect()
    };
    bench.minutes(1);
    let id = bench.keeper.find(VM).unwrap();
    let at_us = bench.now();
    let faults = out.into_iter().take(200).map(|frame| Fault { at_us, frame }).collect();
    bench.keeper.hear(Event::Faults { vm: id, lost: 0, faults }, at_us);
    assert!(bench.push_state().contains("too much of it came back"), "{}", bench.push_state());
}
