//! The controller with a guest of our own.

use super::*;
use std::collections::HashSet;

const PAGES: u64 = 64 * 500;
const SECOND_US: u64 = 1_000_000;
const SETTINGS: IdleSettings = IdleSettings { floor: 0.4, pressure: 0.01, every_us: 6 * SECOND_US };

/// A guest that touches some of its pages all the time.
struct Guest {
    idle: Idle,
    out: HashSet<u64>,
    /// Hot ones among them.
    called: Vec<u64>,
    now_us: u64,
    hot: fn(u64) -> bool,
    pressure: Option<f64>,
    swap: (u64, u64),
    /// The kernel keeps what it is told to push.
    keeps: bool,
    /// One fault in so many is told.
    period: u64,
    needed: fn(Span) -> bool,
    ticket: u64,
    refaults: u64,
    /// Most pages that came back within a minute.
    worst: u64,
    minute: VecDeque<u64>,
}

impl Guest {
    fn new(hot: fn(u64) -> bool) -> Self {
        Self {
            idle: Idle::new(&[Region { frame: 0, pages: PAGES, host: 0x1000 }], SECOND_US * 100),
            out: HashSet::new(),
            called: Vec::new(),
            now_us: SECOND_US * 100,
            hot,
            pressure: Some(0.0),
            swap: (PAGES, PAGES),
            keeps: false,
            period: 1,
            needed: |_| false,
            ticket: 0,
            refaults: 0,
            worst: 0,
            minute: VecDeque::new(),
        }
    }

    fn present(&self) -> u64 {
        PAGES - self.out.len() as u64
    }

    fn hold(&self) -> String {
        self.idle.hold(self.now_us).map(|(hold, _)| hold.to_string()).unwrap_or_default()
    }

    fn states(&self, spans: &[Span]) -> Vec<PageState> {
        let state = |frame| if self.out.contains(&frame) { PageState::Swapped } else { PageState::Present };
        spans.iter().flat_map(|span| frames(*span)).map(state).collect()
    }

    /// Its hot pages come back.
    fn touch(&mut self) {
        let back = std::mem::take(&mut self.called);
        for frame in &back {
            self.out.remove(frame);
            self.refaults += 1;
            if self.refaults.is_multiple_of(self.period) {
                self.idle.came_in(*frame, self.period, self.now_us);
            }
        }
        self.minute.push_back(back.len() as u64);
        if self.minute.len() > 60 {
            self.minute.pop_front();
        }
        self.worst = self.worst.max(self.minute.iter().sum());
    }

    /// It begins to touch others.
    fn heat(&mut self, hot: fn(u64) -> bool) {
        self.hot = hot;
        self.called = self.out.iter().copied().filter(|frame| hot(*frame)).collect();
        self.called.sort_unstable();
    }

    fn orders(&mut self) {
        while let Some((how, spans)) = self.idle.next() {
            self.ticket += 1;
            self.idle.sent(self.ticket);
            assert!(self.idle.next().is_none(), "one at a time");
            let pages: Vec<u64> = spans.iter().flat_map(|span| frames(*span)).collect();
            assert!(pages.len() as u64 <= ORDER + CHUNK, "{}", pages.len());
            let eligible = pages.iter().filter(|frame| !self.out.contains(frame)).count() as u64;
            if how == Push::PageOut && !self.keeps {
                self.called.extend(pages.iter().copied().filter(|frame| (self.hot)(*frame)));
                self.out.extend(pages);
            }
            let moved = Moved { asked: eligible, eligible, cpu_us: eligible, wall_us: eligible };
            assert!(self.idle.moved(self.ticket, &Ok(moved), self.now_us));
            if let Some(spans) = self.idle.check() {
                let states = self.states(&spans);
                self.idle.checked(&states, self.now_us);
            }
        }
    }

    fn run(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now_us += SECOND_US;
            self.touch();
            if self.idle.wants_count(&SETTINGS, self.now_us) {
                let present = self.present();
                let residency = Residency { present, swapped: PAGES - present, ..Residency::default() };
                self.idle.counted(residency, self.now_us);
            }
            let Some(spans) = self.idle.look(self.now_us) else { continue };
            let limits = Limits { pressure: self.pressure, swap: self.swap };
            let states = self.states(&spans);
            self.idle.step(&states, limits, &SETTINGS, self.needed, self.now_us);
            self.orders();
        }
    }
}

#[test]
fn idle_memory_goes_in_small_steps_down_to_the_floor() {
    let mut guest = Guest::new(|_| false);
    guest.run(50);
    assert_eq!((guest.present(), guest.hold().as_str()), (PAGES, "it is watched for a minute first"));
    guest.run(240);
    let minutes = PAGES - guest.present();
    assert!((1..=PAGES / 5).contains(&minutes), "{minutes}");
    guest.run(7200);
    let floor = (PAGES as f64 * SETTINGS.floor) as u64;
    assert!((floor..floor + PAGES / 50).contains(&guest.present()), "{}", guest.present());
    assert_eq!(guest.idle.counts().pushed, PAGES - guest.present());
    assert!(guest.hold().starts_with("what is in memory is the machine's floor"), "{}", guest.hold());
    // What is used becomes less: half of what is left is no longer to stay.
    guest.idle.resize(&[Region { frame: 0, pages: PAGES / 2, host: 0x1000 }]);
    assert_eq!(guest.idle.counts().pushed, PAGES - guest.present(), "what was counted stays");
}

#[test]
fn pressure_and_full_swap_stop_it_and_where_nobody_tells_steps_are_smaller() {
    let mut guest = Guest::new(|_| false);
    guest.pressure = Some(SETTINGS.pressure);
    guest.run(600);
    assert_eq!((guest.present(), guest.hold().contains("wait for memory")), (PAGES, true));
    guest.pressure = Some(0.0);
    guest.swap = (PAGES / 11, PAGES);
    guest.run(600);
    assert_eq!((guest.present(), guest.hold().contains("swap")), (PAGES, true));
    guest.swap = (0, 0);
    guest.run(60);
    assert_eq!(guest.hold(), "this host has no swap");
    let (mut seeing, mut blind) = (Guest::new(|_| false), Guest::new(|_| false));
    blind.pressure = None;
    seeing.run(500);
    blind.run(500);
    let (seeing, blind) = (PAGES - seeing.present(), PAGES - blind.present());
    assert!(blind > 0 && blind * 2 < seeing, "{blind} {seeing}");
}

#[test]
fn what_is_in_use_stays_and_little_of_it_is_tried() {
    // A third is hot, in stretches.
    let hot = |frame: u64| (frame / 1000).is_multiple_of(3);
    // Where few faults are told, each stands for many, and it stops more often.
    for (period, left) in [(1, PAGES / 10), (16, PAGES / 4)] {
        let mut guest = Guest::new(hot);
        guest.period = period;
        guest.run(2 * 3600);
        let counts = guest.idle.counts();
        let idle_left = (0..PAGES).filter(|frame| !hot(*frame) && !guest.out.contains(frame)).count() as u64;
        let hot_out = (0..PAGES).filter(|frame| hot(*frame) && guest.out.contains(frame)).count();
        assert!(idle_left < left, "{period}: {idle_left} {counts:?}");
        assert_eq!(hot_out, 0, "each comes back at once");
        // The bound of a minute, and what one step can take wrongly before it is known.
        assert!(guest.worst <= PAGES / 500 + PAGES / 100, "{period}: {} {counts:?}", guest.worst);
        assert!(guest.refaults < PAGES / 50, "{period}: {} {counts:?}", guest.refaults);
    }
}

#[test]
fn a_guest_that_takes_its_memory_back_stops_it_at_once_and_for_longer_each_time() {
    let mut guest = Guest::new(|_| false);
    guest.run(1800);
    let out = guest.out.len();
    assert!(out > 2500, "{out}");
    guest.heat(|_| true);
    guest.touch();
    assert!(guest.idle.hold(guest.now_us).is_some_and(|(hold, left)| *hold == Hold::Refaults && left.is_some()));
    assert!(guest.idle.next().is_none());
    let before = guest.idle.counts();
    assert_eq!((before.backed_off, guest.present()), (1, PAGES));
    guest.run(55);
    assert_eq!(guest.idle.counts().pushed, before.pushed, "it rests for a minute");
    // All of it is in use now: what is still tried is within the bound.
    (guest.minute, guest.worst) = (VecDeque::new(), 0);
    guest.run(3600);
    assert!(guest.worst <= PAGES / 500 + 200, "{}", guest.worst);
    assert!(guest.present() > PAGES * 99 / 100, "{}", guest.present());
}

#[test]
fn after_a_restart_what_an_earlier_daemon_pushed_counts() {
    let mut guest = Guest::new(|_| false);
    guest.run(1800);
    let mut later = Guest::new(|_| true);
    (later.out, later.now_us) = (guest.out.clone(), guest.now_us);
    later.heat(|_| true);
    later.idle = Idle::new(&[Region { frame: 0, pages: PAGES, host: 0x1000 }], guest.now_us);
    later.run(10);
    assert_eq!((later.idle.counts().backed_off, later.present()), (1, PAGES));
}

#[test]
fn what_is_needed_and_what_is_no_memory_is_not_pushed() {
    let regions = [Region { frame: 0, pages: 100, host: 0x1000 }, Region { frame: 1 << 20, pages: 200, host: 1 << 30 }];
    let mut guest = Guest::new(|_| false);
    guest.idle = Idle::new(&regions, guest.now_us);
    guest.needed = |span| span.frame < 64;
    guest.run(24 * 3600);
    let known = |frame: &u64| (64..100).contains(frame) || (1 << 20..(1 << 20) + 200).contains(frame);
    assert!(guest.out.iter().all(known));
    assert_eq!(guest.out.len(), 36 + 200);
    let limits = Limits { pressure: None, swap: (1, 1) };
    let mut none = Idle::new(&[], 0);
    assert_eq!(none.look(MINUTE * SECOND_US * 60), Some(Vec::new()));
    none.step(&[], limits, &SETTINGS, |_| false, MINUTE * SECOND_US * 60);
    assert!(none.next().is_none());
}

#[test]
fn what_the_kernel_keeps_or_refuses_is_told_and_not_counted_as_pushed() {
    let mut guest = Guest::new(|_| false);
    // Its witnesses went, and are out; then swap is full for this machine alone.
    guest.run(200);
    assert!(guest.idle.counts().pushed < 600, "witnesses alone");
    let pushed = guest.idle.counts().pushed;
    guest.keeps = true;
    guest.run(60);
    let counts = guest.idle.counts();
    assert!(counts.failed >= 1 && counts.pushed == pushed, "{counts:?}");
    assert!(guest.hold().starts_with("the kernel keeps"), "{}", guest.hold());
    // An order that fails.
    let mut guest = Guest::new(|_| false);
    guest.run(60);
    loop {
        guest.run(1);
        guest.now_us += SECOND_US;
        guest.idle.counted(Residency { present: PAGES, ..Residency::default() }, guest.now_us);
        let Some(spans) = guest.idle.look(guest.now_us) else { continue };
        let states = guest.states(&spans);
        let limits = Limits { pressure: Some(0.0), swap: guest.swap };
        guest.idle.step(&states, limits, &SETTINGS, |_| false, guest.now_us);
        if guest.idle.next().is_some() {
            break;
        }
    }
    guest.idle.sent(900);
    let error = MemoryError::NotPermitted { what: "process_madvise".into(), remedy: "give it CAP_SYS_NICE".into() };
    assert!(!guest.idle.moved(901, &Err(error.clone()), guest.now_us), "another's");
    assert!(guest.idle.moved(900, &Err(error), guest.now_us));
    assert!(guest.hold().contains("CAP_SYS_NICE"), "{}", guest.hold());
    assert!(guest.idle.next().is_none() && guest.idle.look(guest.now_us + 7 * SECOND_US).is_none(), "it rests");
}

#[test]
fn what_is_being_tried_while_it_holds_is_not_lost() {
    let mut guest = Guest::new(|_| false);
    for _ in 0..40 {
        // trials begin, and are due while tasks wait for memory
        guest.pressure = Some(0.0);
        guest.run(30);
        guest.pressure = Some(SETTINGS.pressure);
        guest.run(200);
    }
    guest.pressure = Some(0.0);
    guest.run(4000);
    let floor = (PAGES as f64 * SETTINGS.floor) as u64;
    assert!((floor..floor + PAGES / 50).contains(&guest.present()), "{} of {PAGES}: {}", guest.present(), guest.hold());
}
