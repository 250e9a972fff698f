//! What runs in a machine or is going to, and what it is known to use: programs that were announced, those that usually follow
//! them, and events. Sans-I/O.
//!
//! A running program is certain: what is known of several is added. One that usually follows is as sure as it came: its course is part of
//! a mixture with *nothing comes*, so that it counts in the quantile `q` only from a probability of `1 − q` on, and in the median from one
//! half. An event's course is what the whole machine did then, programs that it brought along included: it is not added to them.

use super::catalogue::{Known, LIKELY, Successor};
use super::course::{Course, JITTER_S, PACE, Rise, Run, quantiles};
use prestage_integration::api::demand::Resource;

/// Events that are recorded at once in one machine.
const EVENTS: usize = 16;
/// Programs that are expected in one machine.
const EXPECTED: usize = 16;

/// Use before, by resource; `None` where nothing was measured.
pub(crate) type Base = [Option<f64>; 4];

#[derive(Debug, Clone, PartialEq)]
enum What {
    Execution { id: i64, program: String },
    Event { key: String, until_s: u64 },
}

/// What runs.
#[derive(Debug)]
struct Running {
    what: What,
    started_s: u64,
    /// By resource: use before, what it used so far, and what earlier executions did.
    base: Base,
    runs: [Run; 4],
    courses: [Course; 4],
}

/// What usually follows an execution.
#[derive(Debug)]
struct Expected {
    /// Id, start and end of that; of one that runs, when it usually ends.
    after: i64,
    started_s: u64,
    ends_s: u64,
    ended: bool,
    is: Successor,
}

/// An event that is to come: when, and what it did before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Upcoming<'a> {
    pub(crate) begins_s: u64,
    pub(crate) courses: &'a [Course; 4],
}

/// What an event did in a machine.
#[derive(Debug)]
pub(crate) struct Happened {
    pub(crate) key: String,
    pub(crate) began_s: u64,
    pub(crate) duration_s: u32,
    pub(crate) runs: [Run; 4],
}

/// A time that is looked at: from `from_s` on, seen from `now_s`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    pub(crate) now_s: u64,
    pub(crate) from_s: u64,
    pub(crate) length_s: u32,
}

/// See the module's head.
#[derive(Debug, Default)]
pub(crate) struct Foreseen {
    running: Vec<Running>,
    expected: Vec<Expected>,
}

fn since(at_s: u64, then_s: u64) -> i64 {
    i64::try_from(at_s).unwrap_or(i64::MAX).saturating_sub(i64::try_from(then_s).unwrap_or(i64::MAX))
}

impl Foreseen {
    /// A program begins, or began at `started_s` and still runs.
    pub(crate) fn start(&mut self, id: i64, program: &str, started_s: u64, base: Base, known: Known) {
        // It is there: it need not be expected.
        self.expected.retain(|expected| expected.is.program != program);
        let ends_s = started_s.saturating_add(known.takes_s.unwrap_or(0).into());
        for is in known.successors {
            let runs =
                |running: &Running| matches!(&running.what, What::Execution { program, .. } if *program == is.program);
            if self.expected.len() < EXPECTED && !self.running.iter().any(runs) {
                self.expected.push(Expected { after: id, started_s, ends_s, ended: false, is });
            }
        }
        let what = What::Execution { id, program: program.to_owned() };
        self.push(what, started_s, base, known.courses);
    }

    fn push(&mut self, what: What, started_s: u64, base: Base, courses: [Course; 4]) {
        let runs = std::array::from_fn(|_| Run::new());
        self.running.push(Running { what, started_s, base, runs, courses });
    }

    /// A program has ended: what it used in its course.
    pub(crate) fn end(&mut self, id: i64, now_s: u64) -> Option<[Run; 4]> {
        for expected in self.expected.iter_mut().filter(|expected| expected.after == id) {
            (expected.ended, expected.ends_s) = (true, now_s);
        }
        let is = |running: &Running| matches!(&running.what, What::Execution { id: of, .. } if *of == id);
        let at = self.running.iter().position(is)?;
        Some(self.running.remove(at).runs)
    }

    /// An event begins.
    pub(crate) fn begin(&mut self, key: String, began_s: u64, until_s: u64, base: Base, courses: Option<[Course; 4]>) {
        let events = self.running.iter().filter(|running| matches!(running.what, What::Event { .. })).count();
        if events < EVENTS {
            self.push(What::Event { key, until_s }, began_s, base, courses.unwrap_or_default());
        }
    }

    /// Events that are over, and what they did.
    pub(crate) fn over(&mut self, now_s: u64) -> Vec<Happened> {
        let is = |running: &mut Running| matches!(running.what, What::Event { until_s, .. } if until_s <= now_s);
        let over = self.running.extract_if(.., is);
        let happened = over.filter_map(|running| match running.what {
            What::Event { key, until_s } => {
                let duration_s = u32::try_from(until_s.saturating_sub(running.started_s)).unwrap_or(u32::MAX);
                Some(Happened { key, began_s: running.started_s, duration_s, runs: running.runs })
            }
            What::Execution { .. } => None,
        });
        happened.collect()
    }

    /// The machine was started anew: what ran is gone.
    pub(crate) fn clear(&mut self) {
        self.running.clear();
        self.expected.clear();
    }

    /// So much of a resource was used: `used` of itself, `wanted` with what it lacked.
    pub(crate) fn observe(&mut self, resource: Resource, at_s: u64, used: f64, wanted: f64) {
        let at = super::machine::index(resource);
        for running in &mut self.running {
            running.observe(at, at_s, used, wanted);
        }
        self.expected.retain(|expected| !expected.is_over(at_s));
    }

    /// The same of an execution alone, of a time before.
    pub(crate) fn recall(&mut self, id: i64, resource: Resource, at_s: u64, used: f64) {
        let is = |running: &&mut Running| matches!(&running.what, What::Execution { id: of, .. } if *of == id);
        if let Some(running) = self.running.iter_mut().find(is) {
            running.observe(super::machine::index(resource), at_s, used, used);
        }
    }

    /// Quantiles of the most that is to be used within a window by what runs, what usually follows and what is to come; 0 where
    /// nothing is known. `used`: what the machine uses now. `None`: nothing is known at all.
    pub(crate) fn rise(
        &self,
        resource: Resource,
        window: Window,
        used: Option<f64>,
        upcoming: &[Upcoming<'_>],
    ) -> Option<Rise> {
        let at = super::machine::index(resource);
        let (running, mut rise) = self.running(at, window);
        let (base, running) = running.map_or((used.unwrap_or(0.0), None), |(base, sum)| (base, Some(sum)));
        // Those that come after what runs take its place; those that come beside it are added.
        let (mut after, mut beside): (Rise, Rise) = ([0.0; 4], [0.0; 4]);
        for each in &self.expected {
            let (is_beside, expected) = each.rise(at, window);
            match is_beside {
                true => beside = std::array::from_fn(|q| beside[q] + expected[q]),
                false => after = std::array::from_fn(|q| after[q].max(expected[q])),
            }
        }
        for q in 0..rise.len() {
            if running.is_some() || after[q] + beside[q] > 0.0 {
                let running = running.map_or(0.0, |running| running[q]);
                rise[q] = rise[q].max(base + running.max(after[q]) + beside[q]);
            }
        }
        for each in upcoming {
            let elapsed_s = since(window.from_s, each.begins_s);
            let Some(expected) = each.courses[at].expect(elapsed_s, window.length_s) else { continue };
            for (rise, expected) in rise.iter_mut().zip(expected).filter(|(_, expected)| *expected > 0.0) {
                *rise = rise.max(used.unwrap_or(0.0) + expected);
            }
        }
        (running.is_some() || rise.iter().any(|value| *value > 0.0)).then_some(rise)
    }

    /// The same of what runs alone, to its end, however far ahead. `None`: nothing that is known runs, or all of it should have ended.
    pub(crate) fn rest(&self, resource: Resource, now_s: u64) -> Option<Rise> {
        let window = Window { now_s, from_s: now_s, length_s: u32::MAX };
        let (running, rise) = self.running(super::machine::index(resource), window);
        let rest = running.map_or(rise, |(base, sum)| std::array::from_fn(|q| rise[q].max(base + sum[q])));
        rest.iter().any(|value| *value > 0.0).then_some(rest)
    }

    /// What runs: use before the first program and the sum of what all add to it, and the most of the events.
    fn running(&self, at: usize, window: Window) -> (Option<(f64, Rise)>, Rise) {
        let (mut programs, mut events): (Option<(f64, Rise)>, Rise) = (None, [0.0; 4]);
        for each in &self.running {
            let elapsed_s = since(window.from_s, each.started_s);
            let Some(expected) = each.courses[at].expect(elapsed_s, window.length_s) else { continue };
            let before = each.base[at].unwrap_or(0.0);
            match each.what {
                What::Execution { .. } => {
                    let (base, sum) = programs.unwrap_or((before, [0.0; 4]));
                    programs = Some((base, std::array::from_fn(|q| sum[q] + expected[q])));
                }
                What::Event { .. } => events = std::array::from_fn(|q| events[q].max(before + expected[q])),
            }
        }
        (programs, events)
    }

    /// Programs that are to follow within so many seconds, with the least probability of [`super::catalogue`] or more.
    pub(crate) fn due(&self, now_s: u64, within_s: u64) -> impl Iterator<Item = &str> {
        let soon = move |expected: &&Expected| {
            let (probability, left) = expected.still(now_s);
            probability >= LIKELY && left.iter().any(|(earliest_s, _)| *earliest_s <= now_s.saturating_add(within_s))
        };
        self.expected.iter().filter(soon).map(|expected| expected.is.program.as_str())
    }

    /// What is known to run and to follow, in words.
    pub(crate) fn words(&self, now_s: u64) -> Vec<String> {
        let runs = self.running.iter().filter_map(|running| match &running.what {
            What::Execution { program, .. } if running.courses.iter().any(|course| course.runs() > 0) => {
                Some(format!("`{program}` runs"))
            }
            _ => None,
        });
        let follows = self.expected.iter().filter(|expected| !expected.is_over(now_s));
        let follows = follows.map(|expected| {
            format!("`{}` follows with probability {:.2}", expected.is.program, expected.still(now_s).0)
        });
        runs.chain(follows).collect()
    }
}

impl Running {
    fn observe(&mut self, at: usize, at_s: u64, used: f64, wanted: f64) {
        let elapsed = u32::try_from(at_s.saturating_sub(self.started_s)).unwrap_or(u32::MAX);
        // Where nothing was measured before, the first that is has to stand for it.
        let base = *self.base[at].get_or_insert(used);
        self.runs[at].observe(elapsed, (wanted - base).max(0.0));
    }
}

impl Expected {
    /// Earliest and latest start by one that was seen; `None`: it should have begun by now.
    fn begins(&self, lag: super::profile::Lag, now_s: u64) -> Option<(u64, u64)> {
        let after_s = if lag.beside { self.started_s } else { self.ends_s };
        let seconds = f64::from(lag.s);
        let earliest = after_s.saturating_add((seconds / PACE) as u64).max(now_s);
        let latest = after_s.saturating_add((seconds * PACE + JITTER_S) as u64);
        // It comes after the end of what takes longer than usual.
        let waits = !lag.beside && !self.ended;
        (waits || latest >= now_s).then_some((earliest, latest.max(earliest)))
    }

    fn is_over(&self, now_s: u64) -> bool {
        self.is.lags.iter().all(|lag| self.begins(*lag, now_s).is_none())
    }

    /// Probability that it still comes (those that would have begun by now are ruled out), and the starts that are left.
    fn still(&self, now_s: u64) -> (f64, Vec<(u64, u64)>) {
        let left: Vec<(u64, u64)> = self.is.lags.iter().filter_map(|lag| self.begins(*lag, now_s)).collect();
        let comes = self.is.probability * left.len() as f64 / self.is.lags.len().max(1) as f64;
        (comes / (comes + 1.0 - self.is.probability).max(f64::MIN_POSITIVE), left)
    }

    /// Whether it usually comes while the other runs, and quantiles of its rise.
    fn rise(&self, at: usize, window: Window) -> (bool, Rise) {
        let (probability, left) = self.still(window.now_s);
        let mut weighted = vec![(0.0, 1.0 - probability)];
        for (earliest, latest) in &left {
            let share = probability / left.len() as f64;
            let length_s = window.length_s.saturating_add(u32::try_from(latest - earliest).unwrap_or(u32::MAX));
            let Some(most) = self.is.courses[at].most(since(window.from_s, *latest), length_s) else {
                weighted.push((0.0, share));
                continue;
            };
            let each = share / most.len().max(1) as f64;
            weighted.extend(most.into_iter().map(|value| (value, each)));
        }
        let beside = self.is.lags.iter().filter(|lag| lag.beside).count();
        (2 * beside > self.is.lags.len(), quantiles(&mut weighted))
    }
}

#[cfg(test)]
mod tests {
    use super::super::profile::Lag;
    use super::*;

    const CPU: Resource = Resource::Cpu;

    fn course(above: f64, seconds: u32) -> [Course; 4] {
        let mut run = Run::new();
        (0..seconds).for_each(|at| run.observe(at, above));
        std::array::from_fn(|_| {
            let mut course = Course::default();
            course.learn(run.clone());
            course
        })
    }

    fn successor(probability: f64, lags: &[Lag], above: f64) -> Successor {
        Successor { program: "load".into(), probability, lags: lags.to_vec(), courses: course(above, 100) }
    }

    fn known(successors: Vec<Successor>) -> Known {
        Known { courses: course(2.0, 60), runs: 1, takes_s: Some(60), successors }
    }

    fn at(now_s: u64, length_s: u32) -> Window {
        Window { now_s, from_s: now_s, length_s }
    }

    const AFTER: Lag = Lag { s: 30, beside: false };

    #[test]
    fn the_rest_of_a_course_is_known_to_its_end_and_no_further() {
        let mut run = Run::new();
        (0..600).for_each(|at| run.observe(at, if (300..330).contains(&at) { 7.0 } else { 0.0 }));
        let mut course = Course::default();
        course.learn(run);
        let courses = std::array::from_fn(|_| course.clone());
        let known = Known { courses, runs: 1, takes_s: Some(600), successors: vec![successor(1.0, &[AFTER], 50.0)] };
        let mut foreseen = Foreseen::default();
        assert_eq!(foreseen.rest(CPU, 1000), None);
        foreseen.start(1, "report", 1000, [Some(1.0); 4], known);
        assert_eq!(foreseen.rise(CPU, at(1000, 40), Some(1.0), &[]), Some([1.0; 4]), "nothing within the horizon");
        assert_eq!(foreseen.rest(CPU, 1000), Some([8.0; 4]));
        assert_eq!(foreseen.rest(CPU, 1450), Some([1.0; 4]), "the peak is over, and what follows is not what runs");
        assert_eq!(foreseen.rest(CPU, 3000), None);
    }

    #[test]
    fn what_follows_counts_in_the_quantiles_that_its_probability_reaches() {
        for (probability, wanted) in [
            (0.04, [2.0, 2.0, 2.0, 2.0]),
            (0.08, [2.0, 2.0, 2.0, 5.0]),
            (0.3, [2.0, 2.0, 5.0, 5.0]),
            (0.6, [2.0, 5.0, 5.0, 5.0]),
            (0.97, [5.0; 4]),
        ] {
            let mut foreseen = Foreseen::default();
            foreseen.start(1, "extract", 1000, [Some(1.0); 4], known(vec![successor(probability, &[AFTER], 5.0)]));
            let rise = foreseen.rise(CPU, at(1000, 200), Some(1.0), &[]).unwrap();
            assert_eq!(rise, wanted.map(|above| 1.0 + above), "{probability}");
        }
    }

    #[test]
    fn what_comes_after_takes_the_place_and_what_comes_beside_is_added() {
        let of = |lag| {
            let mut foreseen = Foreseen::default();
            foreseen.start(1, "extract", 1000, [Some(1.0); 4], known(vec![successor(0.97, &[lag], 5.0)]));
            foreseen.rise(CPU, at(1000, 200), Some(1.0), &[]).unwrap()[3]
        };
        assert_eq!((of(AFTER), of(Lag { s: 30, beside: true })), (6.0, 8.0));
    }

    #[test]
    fn it_is_not_foreseen_long_before_nor_long_after_and_comes_late_where_the_other_takes_longer() {
        let mut foreseen = Foreseen::default();
        foreseen.start(1, "extract", 1000, [Some(1.0); 4], known(vec![successor(0.9, &[AFTER], 5.0)]));
        let high = |foreseen: &Foreseen, now_s| foreseen.rise(CPU, at(now_s, 20), Some(1.0), &[]).map(|rise| rise[3]);
        assert_eq!(high(&foreseen, 1010), Some(3.0), "what runs, alone");
        let due = |now_s, within_s| foreseen.due(now_s, within_s).collect::<Vec<_>>();
        assert_eq!((due(1010, 20), due(1010, 600)), (vec![], vec!["load"]));
        assert_eq!(high(&foreseen, 1070), Some(6.0), "it ends at 1060, and 30 s later the other comes");
        assert_eq!(high(&foreseen, 1900), Some(6.0), "it still runs: the other is still to come");
        assert!(foreseen.end(1, 1900).is_some());
        assert_eq!(high(&foreseen, 1901), None, "not before some 22 s later");
        assert_eq!(high(&foreseen, 1910), Some(6.0), "nothing runs: above what is used now");
        foreseen.observe(CPU, 1945, 1.0, 1.0);
        assert_eq!((high(&foreseen, 1945), foreseen.expected.len()), (None, 0), "it did not come");
        assert_eq!(foreseen.rise(CPU, at(1945, 20), Some(1.0), &[]), None);
    }

    #[test]
    fn one_that_has_come_is_expected_no_more_and_starts_that_are_over_are_ruled_out() {
        let mut foreseen = Foreseen::default();
        let early = Lag { s: 10, beside: true };
        let lags = [early, early, early, Lag { s: 500, beside: true }];
        foreseen.start(1, "extract", 1000, [Some(1.0); 4], known(vec![successor(0.8, &lags, 5.0)]));
        assert!((foreseen.expected[0].still(1000).0 - 0.8).abs() < 1e-9);
        // .2 that it comes late, .2 that it does not come: one half.
        assert!((foreseen.expected[0].still(1100).0 - 0.5).abs() < 1e-9);
        assert!(foreseen.words(1100)[1].contains("`load` follows with probability 0.50"), "{:?}", foreseen.words(1100));
        foreseen.start(2, "load", 1100, [None; 4], Known::default());
        assert!(foreseen.expected.is_empty());
        for id in 3..100 {
            foreseen.start(id, "again", 1100, [None; 4], known(vec![successor(0.8, &lags, 5.0)]));
        }
        assert!(foreseen.expected.len() <= EXPECTED);
    }

    #[test]
    fn an_event_is_foreseen_recorded_and_not_added_to_programs() {
        let mut foreseen = Foreseen::default();
        let courses = course(4.0, 60);
        let upcoming = |begins_s| [Upcoming { begins_s, courses: &courses }];
        assert_eq!(foreseen.rise(CPU, at(1000, 20), Some(1.0), &upcoming(1030)), None);
        assert_eq!(foreseen.rise(CPU, at(1015, 20), Some(1.0), &upcoming(1030)), Some([5.0; 4]));
        foreseen.begin("e".into(), 1030, 1090, [Some(1.0); 4], Some(courses.clone()));
        foreseen.start(1, "extract", 1030, [Some(1.0); 4], known(vec![]));
        (1030..1090).for_each(|now_s| foreseen.observe(CPU, now_s, 5.0, 5.0));
        assert_eq!(foreseen.rise(CPU, at(1040, 20), Some(5.0), &[]), Some([5.0; 4]), "the greater of both");
        assert!(foreseen.over(1089).is_empty());
        let over = foreseen.over(1090);
        let [happened] = over.as_slice() else { panic!("{over:?}") };
        assert_eq!((happened.began_s, happened.duration_s), (1030, 60));
        let mut learned = Course::default();
        learned.learn(happened.runs[0].clone());
        assert_eq!(learned.expect(0, 60), Some([4.0; 4]));
        (0..100).for_each(|n| foreseen.begin(format!("e{n}"), 1100, 1200, [None; 4], None));
        assert_eq!(foreseen.over(1200).len(), EVENTS);
    }
}
