//! Questions to a history, warm and cold.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use prestage_agent::learner::history::program_name;
use prestage_agent::store::{HotHour, NEAR_LIMIT, RunsOf, Store};
use prestage_predictor::Phase;
use serde::Serialize;

use super::{PLACE_BYTES, PLACES, PROGRAMS, Stream, storage_name};
use crate::progress::Progress;

const BLOCK_BYTES: u64 = 65_536;
const WITHIN_US: u64 = 50_000;
/// Extents of each run that are asked for.
const EXTENTS: usize = 1000;
/// The longest an answer may take.
const TIME: Duration = Duration::from_millis(40);

/// Times of one kind of question.
#[derive(Debug, Serialize)]
pub(crate) struct Timed {
    pub(crate) question: &'static str,
    pub(crate) page_cache: &'static str,
    pub(crate) asked: usize,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
    /// Answers that are of all history.
    pub(crate) complete_percent: f64,
}

/// xorshift64*: the same questions in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % end.max(1)
    }

    fn stream<'a>(&mut self, streams: &[Stream<'a>]) -> Stream<'a> {
        streams[self.below(streams.len() as u64) as usize]
    }

    /// The block of a random access at one of the places, and one a few accesses later.
    fn pair(&mut self, stream: &Stream<'_>) -> (u64, u64) {
        let shift = self.below(PLACES) * PLACE_BYTES;
        let accesses = &stream.trace.accesses;
        let at = self.below(accesses.len() as u64) as usize;
        let later = (at + 1 + self.below(16) as usize).min(accesses.len() - 1);
        ((accesses[at].2 + shift) / BLOCK_BYTES, (accesses[later].2 + shift) / BLOCK_BYTES)
    }
}

/// Asks a question; returns whether the answer is of all history.
type Question<'a> = Box<dyn Fn(&Store, &mut Random) -> Result<bool> + 'a>;

/// The hours of each storage with their hottest blocks: what questions are made of is not looked for while they are timed.
type Hours = BTreeMap<u32, Vec<HotHour>>;

fn questions<'a>(streams: &'a [Stream<'a>], hours: &'a Hours) -> Vec<(&'static str, Question<'a>)> {
    let near = |store: &Store, stream: &Stream<'_>, pair: (u64, u64)| -> Result<bool> {
        if pair.0 == pair.1 {
            return Ok(true);
        }
        let answer =
            store.near(&storage_name(stream.storage), pair, WITHIN_US, NEAR_LIMIT.until(Instant::now() + TIME))?;
        Ok(answer.after_us == 0)
    };
    let hour = |stream: &Stream<'_>, random: &mut Random| {
        let hours = &hours[&stream.storage];
        &hours[random.below(hours.len() as u64) as usize]
    };
    vec![
        (
            "runs: 20 last of a program",
            Box::new(move |store, random| {
                let stream = random.stream(streams);
                let (storage, program) =
                    (storage_name(stream.storage), program_name(Phase::Program(random.below(PROGRAMS))));
                let of = RunsOf { storage: Some(&storage), vm: None, program: Some(&program) };
                let runs = store.runs(of, 20)?;
                ensure!(!runs.is_empty(), "no runs of {program} on {storage}");
                let mut complete = true;
                for run in &runs {
                    complete &= !store.run_reads(run, EXTENTS)?.more;
                }
                Ok(complete)
            }),
        ),
        (
            "hot: 24 hours, top 10",
            Box::new(move |store, random| {
                let stream = random.stream(streams);
                let storage = storage_name(stream.storage);
                let hour = hour(&stream, random).hour;
                let hours = store.hot(&storage, hour.saturating_sub(23), hour, 10)?;
                ensure!(!hours.is_empty(), "no reads on {storage}");
                Ok(true)
            }),
        ),
        (
            "near: blocks of close accesses",
            Box::new(move |store, random| {
                let stream = random.stream(streams);
                let pair = random.pair(&stream);
                near(store, &stream, pair)
            }),
        ),
        (
            "near: hottest blocks",
            Box::new(move |store, random| {
                let stream = random.stream(streams);
                let blocks = &hour(&stream, random).blocks;
                let mut pick = || blocks[random.below(blocks.len() as u64) as usize].block;
                let pair = (pick(), pick());
                near(store, &stream, pair)
            }),
        ),
    ]
}

/// Asks each kind of question `number` times of a warm page cache, and a fifth as often of a cold one.
pub(crate) fn all(
    path: &Path,
    mut store: Store,
    streams: &[Stream<'_>],
    number: usize,
    progress: &Progress,
) -> Result<Vec<Timed>> {
    let mut results = Vec::new();
    let mut hours = Hours::new();
    for storage in streams.iter().map(|stream| stream.storage) {
        if let Entry::Vacant(vacant) = hours.entry(storage) {
            vacant.insert(store.hot(&storage_name(storage), 0, u64::MAX, 8)?);
        }
    }
    for (name, question) in questions(streams, &hours) {
        for cold in [false, true] {
            let mut random = Random(0x9E37_79B9_7F4A_7C15);
            let (mut times, mut complete) = (Vec::new(), 0);
            for asked in 0..if cold { number.div_ceil(5) } else { number } {
                if cold {
                    // Neither SQLite's pages nor the system's are left.
                    ensure!(store.close(Duration::from_secs(60)), "the database could not be closed");
                    drop(store);
                    posix_fadvise(File::open(path)?, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
                    store = Store::open(path)?;
                }
                let began = Instant::now();
                complete += usize::from(question(&store, &mut random)?);
                times.push(began.elapsed().as_secs_f64() * 1e3);
                progress.now(&format!("{name}: {asked}"));
            }
            times.sort_by(f64::total_cmp);
            let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
            results.push(Timed {
                question: name,
                page_cache: if cold { "cold" } else { "warm" },
                asked: times.len(),
                p50_ms: at(0.5),
                p99_ms: at(0.99),
                max_ms: at(1.0),
                complete_percent: 100.0 * complete as f64 / times.len() as f64,
            });
        }
        progress.step(name);
    }
    Ok(results)
}
