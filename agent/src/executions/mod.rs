//! Execution profiles: what a program used when it ran before, and what ran after it.
//!
//! - `sketch.rs`: quantiles that fade
//! - `catalogue.rs`: the profiles of all programs, and whose is used for what
//!
//! A profile is that of a program (a hash of what is run), its tags and the size of its input, which counts by powers of two. Where there is
//! none, that of all sizes of the program is used, else that of its tags, else none: [`Found`] says which it was. Sans-I/O: times are
//! arguments; rows of the database are `store/executions.rs`.

mod catalogue;
mod sketch;
#[cfg(test)]
mod tests;

pub use catalogue::{Catalogue, Found, Kept};
pub use sketch::{ERROR, Sketch};

use crate::store::segment::{get, put};
use sketch::Fading;

/// What is run.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Hash of the program, in hexadecimal digits or whatever names it; empty: any with these tags.
    pub program: String,
    /// In order, each once; see [`Key::new`].
    pub tags: Vec<String>,
    /// [`size_class`] of the input; `None`: any.
    pub size_class: Option<u8>,
}

impl Key {
    #[must_use]
    pub fn new(program: &str, tags: &[String], input_bytes: Option<u64>) -> Self {
        let mut tags = tags.to_vec();
        tags.sort_unstable();
        tags.dedup();
        Self { program: program.to_owned(), tags, size_class: input_bytes.map(size_class) }
    }
}

/// Class of an input's size: the number of its binary digits. 0 is empty, 1 one byte, 11 from 1 KiB to below 2 KiB.
#[must_use]
pub fn size_class(bytes: u64) -> u8 {
    (u64::BITS - bytes.leading_zeros()) as u8
}

/// One execution that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Execution {
    pub key: Key,
    /// Unix s.
    pub started_s: u64,
    pub duration_s: f64,
    /// Most and mean cores in use.
    pub cpu_peak: f64,
    pub cpu_mean: f64,
    /// Most bytes of memory.
    pub memory_peak: f64,
    /// Most bytes a second.
    pub disk_peak: f64,
    pub network_peak: f64,
}

/// One moment of an execution.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Moment {
    /// Unix µs.
    pub at_us: u64,
    /// Cores in use.
    pub cpu: f64,
    /// Bytes.
    pub memory: u64,
    /// Bytes a second.
    pub disk: f64,
    pub network: f64,
}

impl Execution {
    /// Sums up what was sampled from the beginning of an execution to its end; moments in any order. `None` without any.
    #[must_use]
    pub fn of(key: Key, moments: &[Moment]) -> Option<Self> {
        let (first, last) = (moments.iter().map(|m| m.at_us).min()?, moments.iter().map(|m| m.at_us).max()?);
        let most =
            |of: fn(&Moment) -> f64| moments.iter().map(of).filter(|value| value.is_finite()).fold(0.0, f64::max);
        let known = moments.iter().filter(|moment| moment.cpu.is_finite());
        let (sum, number) = known.fold((0.0, 0u32), |(sum, number), moment| (sum + moment.cpu, number + 1));
        Some(Self {
            key,
            started_s: first / 1_000_000,
            duration_s: (last - first) as f64 / 1e6,
            cpu_peak: most(|moment| moment.cpu),
            cpu_mean: sum / f64::from(number.max(1)),
            memory_peak: most(|moment| moment.memory as f64),
            disk_peak: most(|moment| moment.disk),
            network_peak: most(|moment| moment.network),
        })
    }
}

/// Programs remembered that came after one.
const FOLLOWERS: usize = 8;
/// Time after which an execution counts half: what a program needs changes with its versions and its data.
const HALF_LIFE_S: u64 = 14 * 86_400;
const VERSION: u8 = 1;

/// What is known of a program's executions.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Executions, all of them the same.
    pub count: u64,
    /// Start of the first and of the latest, Unix s.
    pub first_s: u64,
    pub last_s: u64,
    /// Between two starts, in seconds.
    pub interval_s: Sketch,
    /// In seconds.
    pub duration_s: Sketch,
    /// Cores.
    pub cpu_peak: Sketch,
    pub cpu_mean: Sketch,
    /// Bytes.
    pub memory_peak: Sketch,
    /// Bytes a second.
    pub disk_peak: Sketch,
    pub network_peak: Sketch,
    /// Which program came next how often: the most frequent eight (Metwally et al., "Space-Saving", ICDT 2005; the second number is by
    /// how much the first may be too high).
    pub followers: Vec<(String, u64, u64)>,
    fading: Fading,
}

impl Profile {
    fn new(at_s: u64) -> Self {
        let sketch = Sketch::default;
        Self {
            count: 0,
            first_s: at_s,
            last_s: at_s,
            interval_s: sketch(),
            duration_s: sketch(),
            cpu_peak: sketch(),
            cpu_mean: sketch(),
            memory_peak: sketch(),
            disk_peak: sketch(),
            network_peak: sketch(),
            followers: Vec::new(),
            fading: Fading { half_life_s: HALF_LIFE_S, since_s: at_s },
        }
    }

    fn sketches(&mut self) -> [&mut Sketch; 7] {
        let Self { interval_s, duration_s, cpu_peak, cpu_mean, memory_peak, disk_peak, network_peak, .. } = self;
        [interval_s, duration_s, cpu_peak, cpu_mean, memory_peak, disk_peak, network_peak]
    }

    fn add(&mut self, execution: &Execution) {
        let (weight, factor) = self.fading.weight(execution.started_s);
        if factor < 1.0 {
            self.sketches().into_iter().for_each(|sketch| sketch.scale(factor));
        }
        if self.count > 0 && execution.started_s > self.last_s {
            self.interval_s.add((execution.started_s - self.last_s) as f64, weight);
        }
        self.count += 1;
        self.first_s = self.first_s.min(execution.started_s);
        self.last_s = self.last_s.max(execution.started_s);
        self.duration_s.add(execution.duration_s, weight);
        self.cpu_peak.add(execution.cpu_peak, weight);
        self.cpu_mean.add(execution.cpu_mean, weight);
        self.memory_peak.add(execution.memory_peak, weight);
        self.disk_peak.add(execution.disk_peak, weight);
        self.network_peak.add(execution.network_peak, weight);
    }

    /// How often it ran a day, by the time between its latest starts; `None` before its second.
    #[must_use]
    pub fn runs_a_day(&self) -> Option<f64> {
        self.interval_s.quantile(0.5).filter(|interval| *interval > 0.0).map(|interval| 86_400.0 / interval)
    }

    fn followed_by(&mut self, program: &str) {
        if let Some((_, count, _)) = self.followers.iter_mut().find(|(name, ..)| name == program) {
            *count += 1;
        } else if self.followers.len() < FOLLOWERS {
            self.followers.push((program.to_owned(), 1, 0));
        } else if let Some(rarest) = self.followers.iter_mut().min_by_key(|(_, count, _)| *count) {
            *rarest = (program.to_owned(), rarest.1 + 1, rarest.1);
        }
        self.followers.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    }

    /// For a row of the database: version, numbers and sketches as LEB128, checksum.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        let Self { count, first_s, last_s, followers, fading, .. } = self;
        [*count, *first_s, *last_s, fading.half_life_s, fading.since_s]
            .into_iter()
            .for_each(|value| put(&mut out, value));
        self.clone().sketches().into_iter().for_each(|sketch| sketch.write(&mut out));
        put(&mut out, followers.len() as u64);
        for (name, count, excess) in followers {
            put(&mut out, name.len() as u64);
            out.extend_from_slice(name.as_bytes());
            put(&mut out, *count);
            put(&mut out, *excess);
        }
        let sum = crc32c::crc32c(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// `None`: damaged, or of another version; it is learned anew.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.split_last_chunk::<4>()?;
        if crc32c::crc32c(body).to_le_bytes() != *sum || *body.first()? != VERSION {
            return None;
        }
        let mut at = 1;
        let mut number = || get(body, &mut at).ok();
        let (count, first_s, last_s) = (number()?, number()?, number()?);
        let fading = Fading { half_life_s: number()?, since_s: number()? };
        let mut profile = Self { count, first_s, last_s, fading, ..Self::new(first_s) };
        for sketch in profile.sketches() {
            *sketch = Sketch::read(body, &mut at)?;
        }
        for _ in 0..get(body, &mut at).ok().filter(|number| *number <= FOLLOWERS as u64)? {
            let length = usize::try_from(get(body, &mut at).ok()?).ok()?;
            let name = body.get(at..at.checked_add(length)?)?;
            at += length;
            let name = String::from_utf8(name.to_vec()).ok()?;
            profile.followers.push((name, get(body, &mut at).ok()?, get(body, &mut at).ok()?));
        }
        Some(profile)
    }
}
