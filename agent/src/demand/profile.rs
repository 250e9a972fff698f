//! What is known of a program, or of an event in a machine: how often and at what hours it runs, how long it takes, what it uses in its
//! course, and what follows it.
//!
//! Of all of it the latest counts: 16 executions, and of what is counted half goes as soon as it is [`COUNTED`].

use super::course::{Course, Run};
use crate::calendar::DAY_S;
use prestage_integration::api::demand::ExecutionStart;
use prestage_integration::libvirt::Uuid;
use serde::{Deserialize, Serialize};

/// Executions whose starts and durations are remembered.
const RUNS: usize = 16;
/// Programs remembered that came after one.
const FOLLOWERS: usize = 8;
/// Counts are halved from here on.
const COUNTED: u32 = 256;
/// Executions of a program before what follows it is foreseen.
pub(crate) const TRIALS: u32 = 2;
/// Separates the parts of a key, and tags: no control character is in a name.
const PART: char = '\u{1e}';
const TAG: char = '\u{1f}';
/// Begins the key of an event.
const EVENT: &str = "\u{1d}event";

/// What a profile is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Subject {
    /// `program` empty: whatever has these tags. `class`: binary logarithm of the input's size, `-` without input; `None`: any.
    Program {
        program: String,
        tags: Vec<String>,
        class: Option<String>,
    },
    Event {
        name: String,
        vm: String,
    },
}

/// Keys of an execution, narrow first: program, tags and class of input; program and tags; program; tags.
pub(crate) fn keys(start: &ExecutionStart) -> Vec<String> {
    let mut tags = start.tags.clone();
    tags.sort_unstable();
    tags.dedup();
    let (program, tags) = (&start.program, tags.join(&TAG.to_string()));
    let class =
        start.input_bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.checked_ilog2().unwrap_or(0).to_string());
    let mut keys =
        vec![format!("{program}{PART}{tags}{PART}{class}"), format!("{program}{PART}{tags}"), program.clone()];
    if !tags.is_empty() {
        keys.push(format!("{PART}{tags}"));
    }
    keys
}

/// Key of an event: what machines do about the same event differs.
pub(crate) fn event_key(name: &str, vm: Uuid) -> String {
    format!("{EVENT}{PART}{name}{PART}{vm}")
}

/// Whether a key is that of all executions of a program.
pub(crate) fn is_whole(key: &str) -> bool {
    !key.contains(PART)
}

/// What a key stands for.
pub(crate) fn subject(key: &str) -> Subject {
    let mut parts = key.split(PART).map(str::to_owned);
    let first = parts.next().unwrap_or_default();
    let second = parts.next().unwrap_or_default();
    let third = parts.next();
    if first == EVENT {
        return Subject::Event { name: second, vm: third.unwrap_or_default() };
    }
    let tags = second.split(TAG).filter(|tag| !tag.is_empty()).map(str::to_owned).collect();
    Subject::Program { program: first, tags, class: third }
}

/// How long after another a program began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lag {
    /// After the other's start where it still ran, else after its end.
    pub(crate) s: u32,
    pub(crate) beside: bool,
}

/// A program that came after another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Follower {
    pub(crate) program: String,
    pub(crate) count: u32,
    /// By how much `count` may be too high: it took the place of another (Metwally et al., "Space-Saving", ICDT 2005).
    pub(crate) excess: u32,
    /// The latest, oldest first.
    pub(crate) lags: Vec<Lag>,
}

impl Follower {
    /// How surely it comes: executions that it came after, of `trials`, by the estimate of Krichevsky and Trofimov (1981), which of few is
    /// never certain.
    pub(crate) fn probability(&self, trials: u32) -> f64 {
        let seen = self.count.saturating_sub(self.excess).min(trials);
        (f64::from(seen) + 0.5) / (f64::from(trials) + 1.0)
    }
}

/// All but what it uses.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Figures {
    pub(crate) starts: u64,
    /// Unix s.
    pub(crate) first_s: u64,
    /// Of the latest executions, oldest first: starts (Unix s), and durations (s) of those that ended.
    pub(crate) started_s: Vec<u64>,
    pub(crate) durations_s: Vec<u32>,
    /// Starts in each hour of the day, in UTC.
    pub(crate) by_hour: Vec<u32>,
    /// Executions after which was looked who follows.
    pub(crate) trials: u32,
    pub(crate) followers: Vec<Follower>,
}

/// See the module's head.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Profile {
    pub(crate) figures: Figures,
    pub(crate) courses: [Course; 4],
}

fn push<T>(list: &mut Vec<T>, value: T) {
    if list.len() >= RUNS {
        list.remove(0);
    }
    list.push(value);
}

impl Figures {
    /// What was written down; `None` of anything else.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let mut figures: Self = serde_json::from_str(text).ok()?;
        figures.by_hour.resize(24, 0);
        let bounded = figures.started_s.len() <= RUNS
            && figures.durations_s.len() <= RUNS
            && figures.followers.len() <= FOLLOWERS
            && figures.by_hour.iter().all(|count| *count <= COUNTED)
            && figures
                .followers
                .iter()
                .all(|follower| follower.lags.len() <= RUNS && follower.excess <= follower.count);
        bounded.then_some(figures)
    }

    fn started(&mut self, at_s: u64) {
        if self.starts == 0 {
            self.first_s = at_s;
        }
        self.starts = self.starts.saturating_add(1);
        push(&mut self.started_s, at_s);
        self.by_hour.resize(24, 0);
        if let Some(count) = self.by_hour.get_mut((at_s % DAY_S / 3600) as usize) {
            *count += 1;
        }
        if self.by_hour.iter().sum::<u32>() >= COUNTED {
            self.by_hour.iter_mut().for_each(|count| *count /= 2);
        }
    }

    /// From now on is looked who follows.
    pub(crate) fn tried(&mut self) {
        self.trials += 1;
        if self.trials >= COUNTED {
            self.trials /= 2;
            for follower in &mut self.followers {
                (follower.count, follower.excess) = (follower.count / 2, follower.excess / 2);
            }
            self.followers.retain(|follower| follower.count > 0);
        }
    }

    pub(crate) fn followed_by(&mut self, program: &str, lag: Lag) {
        let at = self.followers.iter().position(|follower| follower.program == program);
        let at = at.or_else(|| {
            let new = |count, excess| Follower { program: program.to_owned(), count, excess, lags: Vec::new() };
            if self.followers.len() < FOLLOWERS {
                self.followers.push(new(0, 0));
                return Some(self.followers.len() - 1);
            }
            let rarest = (0..self.followers.len()).min_by_key(|at| self.followers[*at].count)?;
            let count = self.followers[rarest].count;
            self.followers[rarest] = new(count, count);
            Some(rarest)
        });
        if let Some(follower) = at.and_then(|at| self.followers.get_mut(at)) {
            follower.count += 1;
            push(&mut follower.lags, lag);
        }
        self.followers.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.program.cmp(&b.program)));
    }

    /// Executions a day, by the time between the latest; `None` before it has been known for a day.
    pub(crate) fn runs_a_day(&self) -> Option<f64> {
        let (first, last) = (self.started_s.first()?, self.started_s.last()?);
        if last.saturating_sub(self.first_s) < DAY_S {
            return None;
        }
        let between = last.checked_sub(*first).filter(|between| *between > 0)?;
        Some((self.started_s.len() - 1) as f64 * DAY_S as f64 / between as f64)
    }

    /// Quantile of how long the latest executions took, seconds.
    pub(crate) fn duration_s(&self, q: f64) -> Option<u32> {
        let mut durations = self.durations_s.clone();
        durations.sort_unstable();
        durations.get(((q * durations.len() as f64).ceil() as usize).max(1) - 1).copied()
    }
}

impl Profile {
    pub(crate) fn last_s(&self) -> u64 {
        self.figures.started_s.last().copied().unwrap_or(0)
    }

    pub(crate) fn started(&mut self, at_s: u64) {
        self.figures.started(at_s);
    }

    pub(crate) fn ended(&mut self, duration_s: u32, runs: &[Run; 4]) {
        push(&mut self.figures.durations_s, duration_s);
        for (course, run) in self.courses.iter_mut().zip(runs) {
            course.learn(run.clone());
        }
    }

    /// Executions whose use is known.
    pub(crate) fn runs(&self) -> usize {
        self.courses.iter().map(Course::runs).max().unwrap_or(0)
    }

    /// Bytes of memory of its courses.
    pub(crate) fn size(&self) -> usize {
        self.courses.iter().map(Course::size).sum()
    }
}

/// Length and bytes of each course.
pub(crate) fn write(courses: &[Course; 4]) -> Vec<u8> {
    let mut out = Vec::new();
    for course in courses {
        let bytes = course.write();
        out.extend((bytes.len() as u32).to_le_bytes());
        out.extend(bytes);
    }
    out
}

/// What [`write`] wrote, or nothing at all; `None` of anything else.
pub(crate) fn read(mut bytes: &[u8]) -> Option<[Course; 4]> {
    let mut courses: [Course; 4] = Default::default();
    if bytes.is_empty() {
        return Some(courses);
    }
    for course in &mut courses {
        let (length, rest) = bytes.split_first_chunk()?;
        let length = u32::from_le_bytes(*length) as usize;
        *course = Course::read(rest.get(..length)?)?;
        bytes = &rest[length..];
    }
    bytes.is_empty().then_some(courses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(tags: &[&str], input_bytes: Option<u64>) -> ExecutionStart {
        let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        ExecutionStart { vm: "web".into(), program: "report".into(), tags, input_bytes }
    }

    #[test]
    fn tags_have_no_order_and_keys_say_what_they_stand_for() {
        assert_eq!(keys(&start(&["b", "a", "a"], None)), keys(&start(&["a", "b"], None)));
        assert_eq!(keys(&start(&[], None)).len(), 3);
        let subjects: Vec<Subject> = keys(&start(&["b", "a"], Some(5))).iter().map(|key| subject(key)).collect();
        let of = |program: &str, tags: &[&str], class: Option<&str>| Subject::Program {
            program: program.into(),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            class: class.map(str::to_owned),
        };
        let wanted = [
            of("report", &["a", "b"], Some("2")),
            of("report", &["a", "b"], None),
            of("report", &[], None),
            of("", &["a", "b"], None),
        ];
        assert_eq!(subjects, wanted);
        let vm = Uuid::from_u128(7);
        let event = Subject::Event { name: "month end".into(), vm: vm.to_string() };
        assert_eq!(subject(&event_key("month end", vm)), event);
    }

    #[test]
    fn hours_intervals_and_durations_are_those_of_the_latest() {
        let mut profile = Profile::default();
        assert_eq!((profile.figures.runs_a_day(), profile.figures.duration_s(0.5)), (None, None));
        for day in 0..40 {
            profile.started(day * DAY_S + 3 * 3600 + 60);
            assert_eq!(profile.figures.runs_a_day().is_some(), day > 0, "not from starts of one day");
            profile.ended(if day < 20 { 1000 } else { 60 + day as u32 }, &std::array::from_fn(|_| Run::new()));
        }
        let figures = &profile.figures;
        assert_eq!((figures.starts, figures.by_hour[3], figures.by_hour.iter().sum::<u32>()), (40, 40, 40));
        assert_eq!(
            (figures.runs_a_day(), figures.duration_s(0.5), figures.duration_s(1.0)),
            (Some(1.0), Some(91), Some(99))
        );
        assert_eq!(profile.runs(), 0, "nothing was measured");
        let text = serde_json::to_string(figures).unwrap();
        assert_eq!(Figures::read(&text).as_ref(), Some(figures));
        (0..10_000).for_each(|_| profile.started(0));
        assert!(profile.figures.by_hour.iter().sum::<u32>() < COUNTED && text.len() < 1000);
        assert_eq!(Figures::read("{}").map(|figures| figures.starts), Some(0), "courses of before have no figures");
        for bad in ["", "{\"trials\":-1}", &format!("{{\"durations_s\":{:?}}}", vec![1; 17])] {
            assert_eq!(Figures::read(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_usually_follows_stays_and_what_came_once_makes_room() {
        let mut figures = Figures::default();
        let lag = Lag { s: 60, beside: false };
        for n in 0..100 {
            figures.tried();
            figures.followed_by("load", lag);
            figures.followed_by(&format!("odd{n}"), lag);
        }
        assert_eq!((figures.followers.len(), figures.followers[0].program.as_str()), (FOLLOWERS, "load"));
        assert!((figures.followers[0].probability(figures.trials) - 100.5 / 101.0).abs() < 1e-9);
        assert!(figures.followers[1..].iter().all(|odd| odd.probability(figures.trials) < 0.02));
        (0..500).for_each(|_| figures.tried());
        assert!(figures.trials < COUNTED && figures.followers[0].probability(figures.trials) < 0.2, "habits change");
    }
}
