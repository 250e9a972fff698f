//! What is learned of one machine's memory: its predictor, fed with faults and with what looks find, and the programs that
//! run there.
//!
//! A page is a guest frame, a touch is a read. A program's first touches are its set, as a boot's are of a disk. Where not
//! every fault is told, what is told only says where the guest is: it is learned from while a program runs, and not between.
//! Of several programs in one machine the latest one's set is recorded; the others' end there.
//!
//! A program that is known and that nobody announces is recognised by its first faults, and its set brought in; from such a run,
//! which is seen in part, nothing is learned. A set that was brought in vain that way is left alone for longer each time.

use super::attention::Attention;
use super::stage::{Stage, StageCounts};
use prestage_integration::memory::{Fault, Span};
use prestage_predictor::{
    Access, AccessConfig, AccessPredictor, Candidate, Expert, Op, PAGE_BYTES, Phase, ProfileError, ProfileSummary,
};

/// The predictor keeps machines apart; here each has a predictor of its own.
const SELF: u64 = 0;
/// Most memory that is planned for at once, and that one program's set may have.
const MOST_BYTES: u64 = 4 << 30;

/// See the module's head. Times are microseconds of the host's monotonic clock.
#[derive(Debug)]
pub(super) struct Mind {
    pub(super) predictor: AccessPredictor,
    pub(super) stage: Stage,
    pub(super) attention: Attention,
    /// The saved profile could not be read and must not be overwritten unasked.
    pub(super) refused: Option<ProfileError>,
    /// Something was learned since the last save.
    pub(super) dirty: bool,
    /// Programs that run, by execution, the latest last.
    running: Vec<(i64, u64)>,
    candidates: Vec<Candidate>,
    pages: u64,
    pub(super) faults: u64,
    pub(super) lost: u64,
    /// Sets that were cut short.
    pub(super) cut: u64,
    /// What is foreseen is brought in, as of the last turn.
    act: bool,
    recalled: Option<Recalled>,
    /// Times that a program was recognised.
    pub(super) recognised: u64,
    /// Programs that were recognised wrongly: not before when, and how long then.
    barred: Vec<(Phase, u64, u64)>,
}

/// A program that was recognised, while it is taken to run.
#[derive(Debug, Clone, Copy)]
struct Recalled {
    phase: Phase,
    /// Touches of its set were last seen then.
    seen_us: u64,
    before: StageCounts,
}

/// A recognised program has ended when none of its set was touched for so long; when nothing is left of it to be touched, after less.
const QUIET_US: u64 = 10_000_000;
const QUIET_DONE_US: u64 = 1_000_000;
/// A set that was brought in vain is left alone for so long, and for twice as long each time.
const BARRED_US: u64 = 60_000_000;
const BARRED_MOST_US: u64 = 6 * 3600 * 1_000_000;

/// Settings of a machine's predictor. `pages`: the guest's, `frames`: the highest frame and one.
fn config(pages: u64, frames: u64, threshold: f32) -> AccessConfig {
    let bytes = (pages * PAGE_BYTES).clamp(64 << 20, MOST_BYTES);
    AccessConfig {
        size_pages: frames,
        min_probability: threshold,
        phase_window_bytes: bytes,
        phase_bytes: bytes,
        // What is swapped in stays until memory is short: the machine's memory is the cache.
        cache_pages: pages,
        ..AccessConfig::default()
    }
}

impl Mind {
    /// Of a machine with so many pages of memory below frame `frames`; `saved`: its profile.
    pub(super) fn new(pages: u64, frames: u64, saved: Option<&[u8]>, threshold: f32, now_us: u64) -> Self {
        let config = config(pages, frames, threshold);
        let (predictor, refused) = match saved.map(|bytes| AccessPredictor::from_bytes(bytes, config.clone())) {
            None => (AccessPredictor::new(config), None),
            Some(Ok(predictor)) => (predictor, None),
            Some(Err(error)) => (AccessPredictor::new(config), Some(error)),
        };
        Self {
            predictor,
            stage: Stage::new(),
            attention: Attention::new(now_us),
            refused,
            dirty: false,
            running: Vec::new(),
            candidates: Vec::new(),
            pages,
            faults: 0,
            lost: 0,
            cut: 0,
            act: false,
            recalled: None,
            recognised: 0,
            barred: Vec::new(),
        }
    }

    /// Forgets what was learned.
    pub(super) fn forget(&mut self, frames: u64, threshold: f32) {
        self.predictor = AccessPredictor::new(config(self.pages, frames, threshold));
        (self.refused, self.dirty, self.recalled) = (None, false, None);
        self.barred.clear();
    }

    pub(super) fn summary(&self) -> ProfileSummary {
        self.predictor.summary()
    }

    /// Whether an announced program runs.
    pub(super) fn has_program(&self) -> bool {
        !self.running.is_empty()
    }

    /// A program begins.
    pub(super) fn start(&mut self, execution: i64, program: u64, now_us: u64) {
        self.end(execution, now_us);
        self.settle(now_us);
        self.recall_over(now_us);
        self.running.push((execution, program));
        // What lies in memory is asked for page by page; what the predictor believes to lie there may long be swapped.
        self.predictor.forget_resident();
        let known = self.predictor.summary().phases.iter().any(|phase| phase.phase == Phase::Program(program));
        self.predictor.phase_start(SELF, Phase::Program(program), now_us);
        self.stage.begin();
        if !known {
            self.attention.first_run();
        }
        self.dirty = true;
    }

    /// A program has ended. Of one that is not known nothing happens.
    pub(super) fn end(&mut self, execution: i64, now_us: u64) {
        let Some(at) = self.running.iter().position(|(running, _)| *running == execution) else { return };
        let latest = at + 1 == self.running.len();
        self.running.remove(at);
        if latest {
            self.stage.drop_planned();
            self.settle(now_us);
            self.predictor.phase_end(SELF, now_us);
            self.attention.run_ended();
        }
        self.dirty = true;
    }

    /// The machine has stopped, or is not watched any more: programs end, and nothing is on its way.
    pub(super) fn stop(&mut self, now_us: u64) {
        let latest = self.running.last().map(|(execution, _)| *execution);
        latest.into_iter().for_each(|execution| self.end(execution, now_us));
        self.running.clear();
        self.recall_over(now_us);
        self.stage.forget();
    }

    /// The machine has another size: pages, and the highest frame and one.
    pub(super) fn resize(&mut self, pages: u64, frames: u64, now_us: u64) {
        if pages == self.pages {
            return self.predictor.resize(frames);
        }
        self.recall_over(now_us);
        self.pages = pages;
        let config = config(pages, frames, 0.0);
        // Bytes that were just written are read.
        if let Ok(predictor) = AccessPredictor::from_bytes(&self.predictor.to_bytes(), config) {
            self.predictor = predictor;
        }
        if let Some((_, program)) = self.running.last() {
            self.predictor.phase_start(SELF, Phase::Program(*program), now_us);
        }
    }

    /// Takes faults in the order of time; `lost` of them are missing. Where they are not `ordered` they come from looks, which
    /// cost the guest nothing. Returns the period from now on if it changes.
    pub(super) fn faults(&mut self, faults: &[Fault], lost: u64, ordered: bool, now_us: u64) -> Option<u32> {
        let period = if ordered { self.attention.period() } else { 1 };
        self.faults += faults.len() as u64;
        self.lost += lost;
        let learn = period == 1 || self.has_program();
        let mut since_us = self.predictor.running_phase(SELF).map_or(0, |(_, since_us)| since_us);
        for fault in faults {
            let current = self.predictor.running_phase(SELF).map(|(phase, _)| phase);
            let named = self.predictor.names(|phase| Some(phase) == current, fault.frame, 1);
            let foreseen = self.stage.touched(fault.frame, period, named);
            if let Some(recalled) = &mut self.recalled {
                recalled.seen_us = if named { now_us } else { recalled.seen_us };
            } else if self.act && self.running.is_empty() && self.recognise(fault.frame, now_us) {
                since_us = fault.at_us;
            }
            // What was told late is of before the program.
            if learn && fault.at_us >= since_us {
                if !foreseen {
                    // It was swapped, whatever is believed.
                    self.predictor.evicted(fault.frame, 1);
                }
                self.read(Span { frame: fault.frame, pages: 1 }, fault.at_us);
            }
        }
        if ordered { self.attention.heard(faults.len() as u64, now_us) } else { None }
    }

    /// Whether the fault tells that a known program has begun, whose set is raised then.
    fn recognise(&mut self, frame: u64, now_us: u64) -> bool {
        let Some(phase) = self.predictor.recognise(frame, self.pages) else { return false };
        if self.barred.iter().any(|(barred, until_us, _)| *barred == phase && now_us < *until_us) {
            return false;
        }
        self.predictor.forget_resident();
        self.predictor.recall(SELF, phase, now_us);
        self.stage.begin();
        self.recognised += 1;
        self.recalled = Some(Recalled { phase, seen_us: now_us, before: self.stage.counts() });
        // Before what it touches is said to have passed what it has not touched.
        self.predictor.predict(now_us, &mut self.candidates);
        true
    }

    /// The recognised program, if there is one, is taken to have ended.
    fn recall_over(&mut self, now_us: u64) {
        let Some(Recalled { phase, before, .. }) = self.recalled.take() else { return };
        self.stage.drop_planned();
        self.predictor.phase_end(SELF, now_us);
        let counts = self.stage.counts();
        let (used, staged) = (counts.used - before.used, counts.staged - before.staged);
        let barred = self.barred.iter().position(|(barred, ..)| *barred == phase);
        let barred = barred.map(|at| self.barred.swap_remove(at));
        // Where nothing could be brought in nothing is known of it.
        if used * 2 <= staged && self.stage.hold().is_none() {
            let barred = barred.filter(|_| staged > 0);
            let pause_us = barred.map_or(BARRED_US, |(_, _, pause_us)| (pause_us * 2).min(BARRED_MOST_US));
            self.barred.push((phase, now_us.saturating_add(pause_us), pause_us));
        }
    }

    fn read(&mut self, span: Span, at_us: u64) {
        self.predictor.observe(&Access { at_us, vm: SELF, op: Op::Read, first: span.frame, pages: span.pages });
        self.dirty = true;
    }

    /// Whether the execution's program is the one whose set is recorded.
    pub(super) fn records(&self, execution: i64) -> bool {
        self.running.last().is_some_and(|(latest, _)| *latest == execution)
    }

    /// Hands on what staging has found out.
    fn settle(&mut self, now_us: u64) {
        for span in self.stage.take_touches() {
            self.read(span, now_us);
        }
        for span in self.stage.take_found() {
            self.predictor.found(SELF, span.frame, span.pages, now_us);
            self.dirty = true;
            if let Some(recalled) = &mut self.recalled {
                recalled.seen_us = now_us;
            }
        }
        for span in self.stage.take_in_place() {
            self.predictor.in_place(SELF, span.frame, span.pages);
        }
        let mut saved = 0;
        for outcome in self.stage.take_outcomes() {
            saved += if outcome.used && !outcome.late { u64::from(outcome.pages) } else { 0 };
            self.predictor.outcome(&outcome);
        }
        self.attention.saved(saved);
    }

    /// Whether a page of the span is on its way or staged, or of the set of a program that runs or is `due` (see [`name`]).
    pub(super) fn needs(&self, span: Span, due: &[u32]) -> bool {
        let current = self.predictor.running_phase(SELF).map(|(phase, _)| phase);
        let is_due = |phase| match phase {
            _ if Some(phase) == current => true,
            Phase::Boot => false,
            Phase::Program(id) => {
                due.contains(&((id >> 32) as u32)) || self.running.iter().any(|(_, running)| *running == id)
            }
        };
        self.stage.holds(span) || self.predictor.names(is_due, span.frame, span.pages)
    }

    /// Takes what is expected next. `act`: it is brought in.
    pub(super) fn think(&mut self, act: bool, now_us: u64) {
        self.act = act;
        let cut = self.stage.cut_short();
        self.cut += u64::from(cut);
        self.settle(now_us);
        if let Some(recalled) = self.recalled {
            let quiet_us = if self.stage.is_busy() { QUIET_US } else { QUIET_DONE_US };
            if cut || now_us.saturating_sub(recalled.seen_us) >= quiet_us {
                self.recall_over(now_us);
            }
        }
        self.predictor.predict(now_us, &mut self.candidates);
        if act {
            self.stage.offer(&self.candidates);
            self.candidates.clear();
            return;
        }
        // Nobody looks at what nobody brings, and not every fault is told: that a page is not seen touched says nothing.
        for candidate in self.candidates.iter().filter(|candidate| candidate.expert == Expert::Phase) {
            self.predictor.in_place(SELF, candidate.first, candidate.pages);
        }
        self.candidates.clear();
    }
}

/// A program as predictors know it: by its name and tags, whatever the order these were given in. The upper half is its [`name`]:
/// what is due is known by name alone.
pub(super) fn program(program: &str, tags: &[String]) -> u64 {
    let mut tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    tags.sort_unstable();
    tags.dedup();
    u64::from(name(program)) << 32 | u64::from(hash(tags.into_iter()))
}

/// A program's name.
pub(super) fn name(program: &str) -> u32 {
    hash(std::iter::once(program))
}

fn hash<'a>(words: impl Iterator<Item = &'a str>) -> u32 {
    // FNV-1a, 32 bits (Fowler, Noll, Vo): stable over versions, unlike the standard library's hash.
    let bytes = words.flat_map(|word| word.bytes().chain([0xff]));
    bytes.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use prestage_integration::memory::PageState;
    use std::collections::HashSet;

    const PAGES: u64 = 1 << 16;

    /// A guest whose memory is all in swap, and who brings in what is ordered.
    struct Guest {
        mind: Mind,
        present: HashSet<u64>,
        staged: HashSet<u64>,
        now_us: u64,
        majors: u64,
        ticket: u64,
    }

    impl Guest {
        fn new() -> Self {
            let mut mind = Mind::new(PAGES, PAGES, None, 0.125, 0);
            mind.stage.allow(Ok(u64::MAX));
            Self { mind, present: HashSet::new(), staged: HashSet::new(), now_us: 0, majors: 0, ticket: 0 }
        }

        fn touch(&mut self, frame: u64) {
            self.now_us += 5;
            if self.present.insert(frame) && !self.staged.remove(&frame) {
                self.majors += 1;
                self.mind.faults(&[Fault { at_us: self.now_us, frame }], 0, true, self.now_us);
            }
        }

        fn states(&self, spans: &[Span]) -> Vec<PageState> {
            let frames = spans.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages));
            let state = |frame| if self.present.contains(&frame) { PageState::Present } else { PageState::Swapped };
            frames.map(state).collect()
        }

        /// The agent has a turn: an order at most.
        fn turn(&mut self) {
            self.mind.think(true, self.now_us);
            if let Some(spans) = self.mind.stage.look(self.now_us) {
                let states = self.states(&spans);
                self.mind.stage.seen(Some(&states), self.now_us);
            }
            if let Some(asked) = self.mind.stage.ask(self.now_us) {
                let states = self.states(&asked);
                if let Some(spans) = self.mind.stage.answer(&states) {
                    self.ticket += 1;
                    self.mind.stage.sent(self.ticket);
                    let frames = spans.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages));
                    self.staged.extend(frames);
                    self.mind.stage.moved(self.ticket, Some(1), self.now_us);
                }
            }
        }

        fn run(&mut self, program: u64, frames: impl Iterator<Item = u64>) -> u64 {
            self.present.clear();
            self.staged.clear();
            self.now_us += 60_000_000;
            let before = self.majors;
            self.mind.start(program as i64, program, self.now_us);
            (0..8).for_each(|_| self.turn());
            for (at, frame) in frames.enumerate() {
                self.touch(frame);
                if at % 100 == 0 {
                    self.turn();
                }
            }
            self.now_us += 1_000_000;
            (0..30).for_each(|_| {
                self.now_us += 20_000;
                self.turn();
            });
            self.mind.end(program as i64, self.now_us);
            self.majors - before
        }
    }

    impl Guest {
        /// A program runs, and nobody says so.
        fn untold(&mut self, frames: impl Iterator<Item = u64>) -> u64 {
            self.present.clear();
            self.staged.clear();
            self.now_us += 60_000_000;
            let before = self.majors;
            self.turn();
            for (at, frame) in frames.enumerate() {
                self.touch(frame);
                if at % 100 == 0 {
                    self.turn();
                }
            }
            (0..200).for_each(|_| {
                self.now_us += 100_000;
                self.turn();
            });
            self.majors - before
        }
    }

    /// So many pages all over memory, in an order that is nobody's stride.
    fn scattered(pages: u64, step: u64) -> impl Iterator<Item = u64> {
        (0..pages).map(move |i| (i * step % 20_011) * 3 % PAGES)
    }

    #[test]
    fn a_program_that_was_seen_once_finds_its_pages_there() {
        let mut guest = Guest::new();
        let first = guest.run(7, scattered(8000, 7919));
        assert!(first > 7000, "next to nothing is known: {first}");
        for again in 0..4 {
            let majors = guest.run(7, scattered(8000, 7919));
            assert!(majors < 800, "run {again}: {majors}");
        }
        let counts = guest.mind.stage.counts();
        assert!(counts.wasted * 20 < counts.used, "{counts:?}");
    }

    #[test]
    fn another_order_is_foreseen_as_well() {
        let mut guest = Guest::new();
        guest.run(7, scattered(8000, 7919));
        let mut frames: Vec<u64> = scattered(8000, 7919).collect();
        frames.sort_unstable_by_key(|frame| frame.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let majors = guest.run(7, frames.into_iter());
        assert!(majors < 2400, "{majors}");
    }

    #[test]
    fn of_a_program_that_does_something_else_little_is_brought_in_vain() {
        let mut guest = Guest::new();
        guest.run(7, 0..20_000);
        let before = guest.mind.stage.counts();
        guest.run(7, 40_000..60_000);
        let counts = guest.mind.stage.counts();
        assert!(counts.staged - before.staged < 20_000 + 8000, "{counts:?}");
        assert!(guest.mind.cut > 0 || counts.used > before.used, "{counts:?}");
    }

    #[test]
    fn a_known_program_that_nobody_announces_is_recognised() {
        let mut guest = Guest::new();
        guest.run(7, scattered(8000, 7919));
        let mut frames: Vec<u64> = scattered(8000, 7919).collect();
        frames.sort_unstable_by_key(|frame| frame.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for run in 1..=3 {
            let majors = guest.untold(frames.iter().copied());
            assert!(majors < 3000, "{majors}");
            assert_eq!(guest.mind.recognised, run);
            assert_eq!(guest.mind.predictor.running_phase(SELF), None, "it has ended");
        }
        assert_eq!(guest.mind.summary().phases[0].runs, 1, "nothing is learned of what was seen in part");
    }

    #[test]
    fn a_program_that_was_recognised_wrongly_is_left_alone_for_longer_each_time() {
        let mut guest = Guest::new();
        guest.run(7, 0..8000);
        // the beginning of its set, and then another program's memory
        let touches = || (0..200).chain(20_000..30_000);
        guest.untold(touches());
        assert_eq!((guest.mind.recognised, guest.mind.barred.len()), (1, 1));
        let bars = |guest: &Guest| guest.mind.barred[0].2;
        guest.untold(touches());
        while guest.mind.recognised < 2 {
            guest.untold(touches());
        }
        assert_eq!(bars(&guest), 2 * BARRED_US);
        // One that is announced is not barred, once what was brought in vain is given up.
        (0..200).for_each(|_| {
            guest.now_us += 1_000_000;
            guest.turn();
        });
        assert!(guest.run(7, 0..8000) < 800);
    }

    #[test]
    fn without_a_program_a_random_guest_costs_next_to_nothing() {
        let mut guest = Guest::new();
        let mut frames: Vec<u64> = (0..PAGES).collect();
        frames.sort_unstable_by_key(|frame| frame.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for (at, frame) in frames.into_iter().enumerate() {
            guest.touch(frame);
            if at % 100 == 0 {
                guest.turn();
            }
        }
        let counts = guest.mind.stage.counts();
        assert!(counts.staged < PAGES / 50, "{counts:?}");
        assert!(guest.mind.attention.period() > 1);
    }

    #[test]
    fn what_was_learned_survives_and_a_damaged_profile_is_refused() {
        let mut guest = Guest::new();
        guest.run(7, scattered(5000, 7919));
        let bytes = guest.mind.predictor.to_bytes();
        let mut later = Guest::new();
        later.mind = Mind::new(PAGES, PAGES, Some(&bytes), 0.125, 0);
        later.mind.stage.allow(Ok(u64::MAX));
        assert!(later.run(7, scattered(5000, 7919)) < 500);
        let damaged = Mind::new(PAGES, PAGES, Some(&bytes[..bytes.len() - 1]), 0.125, 0);
        assert!(damaged.refused.is_some() && damaged.summary().phases.is_empty());
    }

    #[test]
    fn programs_are_told_apart_by_name_and_tags_in_any_order() {
        let tags = |tags: &[&str]| tags.iter().map(|tag| (*tag).to_owned()).collect::<Vec<_>>();
        let both = program("job", &tags(&["a", "b"]));
        assert_eq!(both, program("job", &tags(&["b", "a", "b"])));
        let others = [program("job", &[]), program("job", &tags(&["a"])), program("joba", &tags(&["b"]))];
        assert!(!others.contains(&both));
        let names = [both, others[0], others[1]].map(|id| (id >> 32) as u32);
        assert_eq!(names, [name("job"); 3], "and found by name alone");
        assert_ne!((others[2] >> 32) as u32, name("job"));
    }

    #[test]
    fn the_latest_program_holds_the_phase_and_an_unknown_end_is_none() {
        let mut mind = Mind::new(PAGES, PAGES, None, 0.125, 0);
        mind.start(1, 11, 0);
        mind.start(2, 12, 10);
        mind.end(99, 20);
        assert_eq!(mind.predictor.running_phase(SELF), Some((Phase::Program(12), 10)));
        mind.end(1, 30);
        assert_eq!(mind.predictor.running_phase(SELF), Some((Phase::Program(12), 10)));
        mind.end(2, 40);
        assert_eq!((mind.predictor.running_phase(SELF), mind.has_program()), (None, false));
    }
}
