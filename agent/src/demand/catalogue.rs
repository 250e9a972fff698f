//! The profiles of all programs and events, whose is used for what, and what follows what. Sans-I/O.
//!
//! Each execution teaches all of its keys ([`profile::keys`]); the narrowest that is known counts. A program *follows* another if it
//! begins in the same machine while that runs, or within an hour after its end.

use super::course::{Course, JITTER_S, PACE, Run};
use super::profile::{self, Figures, Follower, Lag, Profile, TRIALS};
use crate::store::executions::{EXECUTIONS_MAX, Learned, PROGRAMS_MAX, ProgramRow};
use prestage_integration::api::demand::ExecutionStart;
use prestage_integration::libvirt::Uuid;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Most profiles, and most bytes of their courses; beyond, what ran longest ago goes.
const MOST: usize = PROGRAMS_MAX as usize;
const BYTES: usize = 64 << 20;
/// A program follows another if it begins so long after its end.
pub(crate) const AFTER_S: u64 = 3600;
/// Nothing follows what began longer ago.
const RECENT_S: u64 = 7 * 86_400;
/// Executions that others may follow.
const RECENT: usize = EXECUTIONS_MAX as usize;
/// Followers of one execution that are counted.
const FOLLOWED: usize = 16;
/// A follower is foreseen from this probability on: below, not even the .9 quantile would know of it.
pub(super) const LIKELY: f64 = 0.1;
/// Occurrences of an event before its course is foreseen.
const OCCURRENCES: usize = 2;

/// An execution that another may follow.
#[derive(Debug)]
struct Recent {
    id: i64,
    vm: Uuid,
    program: String,
    started_s: u64,
    ended_s: Option<u64>,
    /// Programs that did.
    followed: Vec<String>,
}

/// A program that is to follow.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Successor {
    pub(crate) program: String,
    pub(crate) probability: f64,
    pub(crate) lags: Vec<Lag>,
    pub(crate) courses: [Course; 4],
}

/// What is known of a program that begins.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    pub(crate) courses: [Course; 4],
    pub(crate) runs: usize,
    /// How long it usually takes, seconds.
    pub(crate) takes_s: Option<u32>,
    pub(crate) successors: Vec<Successor>,
}

/// See the module's head.
#[derive(Debug, Default)]
pub(crate) struct Catalogue {
    profiles: BTreeMap<String, Profile>,
    /// Of all courses, bytes.
    size: usize,
    /// By start.
    recent: VecDeque<Recent>,
}

impl Catalogue {
    /// Takes back what was written down; `false`: it is damaged.
    pub(crate) fn restore(&mut self, row: ProgramRow) -> bool {
        let (Some(figures), Some(courses)) = (Figures::read(&row.figures), profile::read(&row.courses)) else {
            return false;
        };
        let profile = Profile { figures, courses };
        self.size += profile.size();
        if let Some(before) = self.profiles.insert(row.key, profile) {
            self.size -= before.size();
        }
        true
    }

    /// An execution of before that another may follow; the order is that of their starts.
    pub(crate) fn remember(&mut self, vm: Uuid, id: i64, program: &str, started_s: u64, ended_s: Option<u64>) {
        for recent in &mut self.recent {
            // What is counted already is not counted again.
            if recent.lag(vm, program, started_s).is_some() {
                recent.followed.push(program.to_owned());
            }
        }
        let (program, followed) = (program.to_owned(), Vec::new());
        self.keep_recent(Recent { id, vm, program, started_s, ended_s, followed });
    }

    fn keep_recent(&mut self, recent: Recent) {
        if self.recent.len() >= RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(recent);
    }

    /// What is known of a program, by the narrowest profile there is.
    pub(crate) fn known(&self, start: &ExecutionStart, now_s: u64) -> Known {
        let profiles: Vec<&Profile> = profile::keys(start).iter().filter_map(|key| self.profiles.get(key)).collect();
        let used = profiles.iter().find(|profile| profile.runs() > 0);
        Known {
            courses: used.map(|profile| profile.courses.clone()).unwrap_or_default(),
            runs: used.map_or(0, |profile| profile.runs()),
            takes_s: profiles.iter().find_map(|profile| profile.figures.duration_s(0.5)),
            successors: self.successors(&start.program, now_s),
        }
    }

    fn successors(&self, program: &str, now_s: u64) -> Vec<Successor> {
        let Some(figures) = self.profiles.get(program).map(|profile| &profile.figures) else { return Vec::new() };
        let likely = figures.followers.iter().filter_map(|follower| {
            let trials = self.trials(program, figures, follower, now_s);
            let probability = follower.probability(trials);
            let courses = self.profiles.get(&follower.program).filter(|profile| profile.runs() > 0)?.courses.clone();
            let (program, lags) = (follower.program.clone(), follower.lags.clone());
            (trials >= TRIALS && probability >= LIKELY).then_some(Successor { program, probability, lags, courses })
        });
        likely.collect()
    }

    /// Executions of a program of which is known whether the other followed: it did, or would have by now.
    fn trials(&self, program: &str, figures: &Figures, follower: &Follower, now_s: u64) -> u32 {
        let longest = |beside| follower.lags.iter().filter(|lag| lag.beside == beside).map(|lag| lag.s).max();
        let (beside, after) = (longest(true), longest(false));
        let within = |since_s: u64, longest: Option<u32>| {
            longest.is_some_and(|longest| now_s.saturating_sub(since_s) as f64 <= f64::from(longest) * PACE + JITTER_S)
        };
        let open = |recent: &&Recent| {
            let comes_after = match recent.ended_s {
                None => after.is_some(),
                Some(ended_s) => within(ended_s, after),
            };
            recent.program == program
                && !recent.followed.contains(&follower.program)
                && (comes_after || recent.ended_s.is_none() && within(recent.started_s, beside))
        };
        let open = self.recent.iter().filter(open).count();
        figures.trials.saturating_sub(u32::try_from(open).unwrap_or(u32::MAX))
    }

    /// A program begins: what is to be written down.
    pub(crate) fn started(&mut self, vm: Uuid, id: i64, start: &ExecutionStart, at_s: u64) -> Vec<Learned> {
        self.recent.retain(|recent| recent.may_be_followed(at_s));
        let mut changed = Vec::new();
        for recent in &mut self.recent {
            let Some(lag) = recent.lag(vm, &start.program, at_s) else { continue };
            recent.followed.push(start.program.clone());
            if let Some(profile) = self.profiles.get_mut(&recent.program) {
                profile.figures.followed_by(&start.program, lag);
                changed.push(recent.program.clone());
            }
        }
        for key in profile::keys(start) {
            let profile = self.profiles.entry(key.clone()).or_default();
            profile.started(at_s);
            if key == start.program {
                profile.figures.tried();
            }
            changed.push(key);
        }
        let (program, followed) = (start.program.clone(), Vec::new());
        self.keep_recent(Recent { id, vm, program, started_s: at_s, ended_s: None, followed });
        changed.sort_unstable();
        changed.dedup();
        self.written(changed, false)
    }

    /// It has ended; `runs`: what it used in its course, `None` where nobody looked all the time. What is to be written down.
    pub(crate) fn ended(
        &mut self,
        id: i64,
        start: &ExecutionStart,
        at_s: u64,
        duration_s: u32,
        runs: Option<&[Run; 4]>,
    ) -> Vec<Learned> {
        if let Some(recent) = self.recent.iter_mut().find(|recent| recent.id == id) {
            recent.ended_s = Some(at_s);
        }
        match runs {
            Some(runs) => self.learn(profile::keys(start), duration_s, runs),
            None => Vec::new(),
        }
    }

    /// An event was, in a machine.
    pub(crate) fn happened(&mut self, key: String, began_s: u64, duration_s: u32, runs: &[Run; 4]) -> Vec<Learned> {
        if runs.iter().all(Run::is_empty) {
            return Vec::new();
        }
        self.profiles.entry(key.clone()).or_default().started(began_s);
        self.learn(vec![key], duration_s, runs)
    }

    /// What an event did before, if that was often enough.
    pub(crate) fn event(&self, key: &str) -> Option<&[Course; 4]> {
        self.profiles.get(key).filter(|profile| profile.runs() >= OCCURRENCES).map(|profile| &profile.courses)
    }

    fn learn(&mut self, keys: Vec<String>, duration_s: u32, runs: &[Run; 4]) -> Vec<Learned> {
        for key in &keys {
            // One that made room for others while it ran is begun anew.
            let profile = self.profiles.entry(key.clone()).or_default();
            self.size -= profile.size();
            profile.ended(duration_s, runs);
            self.size += profile.size();
        }
        self.written(keys, true)
    }

    fn written(&mut self, keys: Vec<String>, courses: bool) -> Vec<Learned> {
        let mut learned = self.shrink();
        for key in keys {
            let Some(profile) = self.profiles.get(&key) else { continue };
            let Ok(figures) = serde_json::to_string(&profile.figures) else { continue };
            let courses = courses.then(|| profile::write(&profile.courses));
            learned.push(Learned::Changed { key, last_s: profile.last_s(), figures, courses });
        }
        learned
    }

    fn shrink(&mut self) -> Vec<Learned> {
        let mut gone = Vec::new();
        while self.profiles.len() > MOST || self.size > BYTES {
            let oldest = self.profiles.iter().min_by_key(|(_, profile)| profile.last_s()).map(|(key, _)| key.clone());
            let Some(key) = oldest else { break };
            self.size -= self.profiles.remove(&key).map_or(0, |profile| profile.size());
            gone.push(Learned::Gone { key });
        }
        gone
    }

    /// All programs with the tags they were announced with, each once.
    pub(crate) fn programs(&self) -> BTreeSet<(String, Vec<String>)> {
        let named = self.profiles.keys().filter_map(|key| match profile::subject(key) {
            profile::Subject::Program { program, tags, .. } if !program.is_empty() => Some((program, tags)),
            _ => None,
        });
        named.collect()
    }

    /// Profiles of a program, or all, in the order of their keys after one; at most so many, and whether there are more.
    pub(crate) fn list(
        &self,
        program: Option<&str>,
        after: Option<&str>,
        limit: usize,
    ) -> (Vec<(&str, &Profile)>, bool) {
        let is = |key: &str| {
            program.is_none_or(|wanted| match profile::subject(key) {
                profile::Subject::Program { program, .. } => program == wanted,
                profile::Subject::Event { name, .. } => name == wanted,
            })
        };
        let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let all = self.profiles.range::<str, _>((from, std::ops::Bound::Unbounded)).filter(|(key, _)| is(key));
        let mut found: Vec<(&str, &Profile)> =
            all.take(limit.saturating_add(1)).map(|(key, profile)| (key.as_str(), profile)).collect();
        let more = found.len() > limit;
        found.truncate(limit);
        (found, more)
    }

    /// Executions of a program that a follower may have come after, for people: came after, of so many, and how surely.
    pub(crate) fn followers(&self, key: &str, now_s: u64) -> Vec<(Follower, u32, f64)> {
        let Some(figures) = self.profiles.get(key).map(|profile| &profile.figures) else { return Vec::new() };
        let of = |follower: &Follower| {
            let trials = self.trials(key, figures, follower, now_s);
            (follower.clone(), trials, follower.probability(trials))
        };
        figures.followers.iter().map(of).collect()
    }
}

impl Recent {
    fn may_be_followed(&self, at_s: u64) -> bool {
        let since_s = self.ended_s.map_or(0, |ended_s| at_s.saturating_sub(ended_s));
        since_s <= AFTER_S && at_s.saturating_sub(self.started_s) <= RECENT_S
    }

    /// How long after it a program begins, if it follows and has not before.
    fn lag(&self, vm: Uuid, program: &str, at_s: u64) -> Option<Lag> {
        let new = self.vm == vm
            && self.program != program
            && self.followed.len() < FOLLOWED
            && !self.followed.iter().any(|name| name == program);
        if !new || at_s < self.started_s || !self.may_be_followed(at_s) {
            return None;
        }
        let seconds = |since_s: u64| u32::try_from(at_s.saturating_sub(since_s)).unwrap_or(u32::MAX);
        let ended_s = self.ended_s.filter(|ended_s| *ended_s <= at_s);
        Some(match ended_s {
            Some(ended_s) => Lag { s: seconds(ended_s), beside: false },
            None => Lag { s: seconds(self.started_s), beside: true },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: Uuid = Uuid::from_u128(1);

    fn start(program: &str, tags: &[&str], input_bytes: Option<u64>) -> ExecutionStart {
        let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        ExecutionStart { vm: "web".into(), program: program.into(), tags, input_bytes }
    }

    fn runs(above: f64) -> [Run; 4] {
        std::array::from_fn(|_| {
            let mut run = Run::new();
            (0..10).for_each(|at| run.observe(at, above));
            run
        })
    }

    fn ran(catalogue: &mut Catalogue, start: &ExecutionStart, from_s: u64, to_s: u64, above: f64) -> Vec<Learned> {
        let id = from_s as i64;
        let mut learned = catalogue.started(VM, id, start, from_s);
        learned.extend(catalogue.ended(id, start, to_s, (to_s - from_s) as u32, Some(&runs(above))));
        learned
    }

    #[test]
    fn the_narrowest_that_is_known_counts() {
        let mut catalogue = Catalogue::default();
        let of = |tags: &[&str], input| start("report", tags, input);
        assert_eq!(catalogue.known(&of(&[], None), 0).runs, 0);
        ran(&mut catalogue, &of(&["night"], Some(1 << 20)), 0, 10, 1.0);
        ran(&mut catalogue, &of(&["day"], Some(1 << 30)), 20, 30, 9.0);
        let most = |start: &ExecutionStart| catalogue.known(start, 0).courses[1].expect(0, 1).map(|rise| rise[3]);
        assert_eq!(most(&of(&["night"], Some(1 << 20))), Some(1.0));
        assert_eq!(most(&of(&["night"], Some((1 << 20) + 5))), Some(1.0), "inputs of like size");
        assert_eq!(most(&of(&["night"], Some(1 << 40))), Some(1.0), "by tags");
        assert_eq!(most(&of(&["other"], None)), Some(9.0), "by program, the greatest");
        assert_eq!(most(&start("built anew", &["night"], None)), Some(1.0), "another program with these tags");
        assert_eq!(most(&start("else", &[], None)), None);
    }

    #[test]
    fn one_that_runs_for_the_first_time_hides_no_wider_profile() {
        let mut catalogue = Catalogue::default();
        ran(&mut catalogue, &start("report", &[], None), 0, 10, 3.0);
        catalogue.started(VM, 20, &start("report", &["new"], None), 20);
        assert_eq!(catalogue.known(&start("report", &["new"], None), 20).runs, 1);
    }

    #[test]
    fn what_usually_follows_is_expected_as_surely_as_it_came() {
        let mut catalogue = Catalogue::default();
        let (extract, load) = (start("extract", &[], None), start("load", &[], None));
        for n in 0..4u64 {
            let at_s = n * 10_000;
            ran(&mut catalogue, &extract, at_s, at_s + 100, 1.0);
            if n != 2 {
                ran(&mut catalogue, &load, at_s + 160, at_s + 200, 5.0);
            }
            // In another machine, and too late: nothing follows.
            catalogue.started(Uuid::from_u128(2), (at_s + 170) as i64, &start("lonely", &[], None), at_s + 170);
            ran(&mut catalogue, &start("late", &[], None), at_s + 5000, at_s + 5001, 1.0);
        }
        let expected = catalogue.known(&extract, 99_000).successors;
        let [load] = expected.as_slice() else { panic!("{expected:?}") };
        assert_eq!(
            (load.program.as_str(), load.lags.as_slice()),
            ("load", [Lag { s: 60, beside: false }; 3].as_slice())
        );
        assert!((load.probability - 3.5 / 5.0).abs() < 1e-9, "3 of 4: {}", load.probability);
        assert_eq!(load.courses[0].runs(), 3);
        // One that runs now does not count against it, nor one that has just ended; later it does.
        let probability = |catalogue: &Catalogue, now_s| catalogue.known(&extract, now_s).successors[0].probability;
        catalogue.started(VM, 99_000, &extract, 99_000);
        assert!((probability(&catalogue, 99_000) - 3.5 / 5.0).abs() < 1e-9);
        catalogue.ended(99_000, &extract, 99_100, 100, None);
        assert!((probability(&catalogue, 99_170) - 3.5 / 5.0).abs() < 1e-9);
        assert!((probability(&catalogue, 99_200) - 3.5 / 6.0).abs() < 1e-9);
    }

    #[test]
    fn after_a_restart_it_is_as_before_and_nothing_is_counted_twice() {
        let mut catalogue = Catalogue::default();
        let (a, b) = (start("a", &["t"], Some(7)), start("b", &[], None));
        let mut rows: BTreeMap<String, ProgramRow> = BTreeMap::new();
        let mut learned = Vec::new();
        for n in 0..3u64 {
            learned.extend(ran(&mut catalogue, &a, n * 10_000, n * 10_000 + 50, 2.0));
            learned.extend(ran(&mut catalogue, &b, n * 10_000 + 60, n * 10_000 + 70, 2.0));
        }
        for each in learned {
            let Learned::Changed { key, last_s, figures, courses } = each else { panic!("nothing goes") };
            let row =
                rows.entry(key.clone()).or_insert(ProgramRow { key, last_s, figures: String::new(), courses: vec![] });
            (row.last_s, row.figures) = (last_s, figures);
            row.courses = courses.unwrap_or(std::mem::take(&mut row.courses));
        }
        let mut back = Catalogue::default();
        for row in rows.values() {
            assert!(back.restore(row.clone()));
            let half = ProgramRow { courses: row.courses[..row.courses.len() - 1].to_vec(), ..row.clone() };
            assert!(!Catalogue::default().restore(half));
        }
        assert_eq!((&back.profiles, back.size), (&catalogue.profiles, catalogue.size));
        back.remember(VM, 1, "a", 20_000, Some(20_050));
        back.remember(VM, 2, "b", 20_060, Some(20_070));
        back.started(VM, 3, &b, 20_080);
        assert_eq!(back.followers("a", 20_100)[0].0.count, 3, "b had followed that one already");
        back.started(VM, 4, &a, 20_090);
        back.started(VM, 5, &b, 20_100);
        assert_eq!(back.followers("a", 20_100)[0].0.count, 4);
    }

    #[test]
    fn any_number_of_names_stays_bounded_and_the_database_is_told() {
        let mut catalogue = Catalogue::default();
        let mut gone = 0;
        let names = MOST as u64 + 1000;
        for n in 0..names {
            let learned = catalogue.started(VM, n as i64, &start(&format!("p{n}"), &["t"], Some(n)), n);
            gone += learned.iter().filter(|each| matches!(each, Learned::Gone { .. })).count();
        }
        assert_eq!(catalogue.profiles.len(), MOST);
        assert!(gone > MOST && catalogue.recent.len() <= RECENT, "{gone}");
        assert!(catalogue.profiles.contains_key(&format!("p{}", names - 1)), "the latest stay");
        let (page, more) = catalogue.list(None, None, 10);
        assert!(page.len() == 10 && more);
        let (next, _) = catalogue.list(None, page.last().map(|(key, _)| *key), 10);
        assert!(next[0].0 > page[9].0);
        let wide = std::array::from_fn(|_| {
            let mut run = Run::new();
            (0..128).for_each(|at| run.observe(at, 1.0));
            run
        });
        for n in 0..9000u64 {
            let key = profile::event_key(&format!("e{}", n % 3000), VM);
            catalogue.happened(key, 1_000_000 + n, 1, &wide);
        }
        assert!(
            catalogue.size <= BYTES && catalogue.size == catalogue.profiles.values().map(Profile::size).sum::<usize>()
        );
    }

    #[test]
    fn an_event_is_known_from_the_second_time_on() {
        let mut catalogue = Catalogue::default();
        let key = profile::event_key("month end", VM);
        assert!(
            catalogue.happened(key.clone(), 0, 60, &std::array::from_fn(|_| Run::new())).is_empty(),
            "not measured"
        );
        catalogue.happened(key.clone(), 1000, 60, &runs(3.0));
        assert!(catalogue.event(&key).is_none());
        assert_eq!(catalogue.happened(key.clone(), 2000, 60, &runs(3.0)).len(), 1);
        assert!(catalogue.event(&key).is_some_and(|courses| courses[2].expect(0, 5) == Some([3.0; 4])));
    }
}
