//! What the predictor costs where it cannot help: random and adversarial traces, against no prefetch.

use std::rc::Rc;

use anyhow::Result;
use prestage_replay::prefetcher::Outcome;
use prestage_replay::{Mark, Prefetcher, Report, Request, Wish};
use serde::Serialize;

use super::ours::{Policy, Setup, requests};
use super::pool;
use super::tables::{aligned, share};
use super::verdict::Claim;
use crate::adversary::{END_PAGE, Opponent, Pattern, Wished};
use crate::peers::{Peer, simulate};
use crate::trace::{self, Trace};

const SEEDS: [u64; 2] = [1, 2];
/// Cache, as a share of the trace's pages.
const CACHE: f64 = 0.05;
/// What may be lost.
const HIT_LOSS: f64 = 0.005;
const EXTRA_TRAFFIC: f64 = 0.03;

/// One trace: with the predictor and without.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Loss {
    pub(crate) pattern: String,
    pub(crate) seed: u64,
    pub(crate) reads: u64,
    pub(crate) read_hit_ratio: f64,
    /// Of the same policy core without prefetch.
    pub(crate) none_read_hit_ratio: f64,
    /// Of plain LRU.
    pub(crate) lru_read_hit_ratio: f64,
    pub(crate) prefetched_pages: u64,
    pub(crate) useful_pages: u64,
    /// Pages from the store beyond those without prefetch, as a share of those.
    pub(crate) extra_traffic: f64,
}

/// Tells the opponent what its policy wishes for.
struct Watched {
    inner: Box<dyn Prefetcher>,
    wished: Wished,
}

impl Watched {
    fn note(&self, out: &[Wish]) {
        let pages = out.iter().flat_map(|wish| wish.first..wish.first + wish.pages);
        self.wished.borrow_mut().extend(pages);
    }
}

impl Prefetcher for Watched {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn observe(
        &mut self,
        request: &Request,
        hit: bool,
        at_us: u64,
        resident: &dyn Fn(u64) -> bool,
        out: &mut Vec<Wish>,
    ) {
        self.inner.observe(request, hit, at_us, resident, out);
        self.note(out);
    }

    fn outcome(&mut self, outcome: &Outcome) {
        self.inner.outcome(outcome);
    }

    fn left(&mut self, first: u64, pages: u64) {
        self.inner.left(first, pages);
    }

    fn mark(&mut self, mark: &Mark, now_us: u64, out: &mut Vec<Wish>) {
        self.inner.mark(mark, now_us, out);
        self.note(out);
    }

    fn idle(&mut self, now_us: u64, out: &mut Vec<Wish>) {
        self.inner.idle(now_us, out);
        self.note(out);
    }
}

pub(super) fn run() -> Result<Vec<Loss>> {
    let patterns = Pattern::ALL.into_iter().map(Some).chain([None]);
    let jobs: Vec<(Option<Pattern>, u64)> = patterns.flat_map(|pattern| SEEDS.map(|seed| (pattern, seed))).collect();
    pool::each(&jobs, |&(pattern, seed)| one(pattern, seed))
}

/// A fixed pattern, or the opponent. The opponent's reads depend on the policy, so they are recorded and then replayed
/// without it.
fn one(pattern: Option<Pattern>, seed: u64) -> Result<Loss> {
    let (name, fixed) = match pattern {
        Some(pattern) => (pattern.name(), pattern.trace(seed)),
        None => ("opponent".to_owned(), Opponent::new(seed, Wished::default()).collect()),
    };
    let fixed = Trace::new(&name, fixed);
    let capacity = fixed.capacity(CACHE);
    let setup = Setup::new(Policy::Prestage, capacity);
    let mut prefetcher = setup.prefetcher()?;
    let (ours, trace) = if pattern.is_some() {
        (setup.run(requests(fixed.requests.iter().copied()), END_PAGE, &[], prefetcher.as_mut())?, fixed)
    } else {
        let wished = Wished::default();
        let mut watched = Watched { inner: prefetcher, wished: Rc::clone(&wished) };
        let mut read: Vec<trace::Request> = Vec::new();
        let stream = Opponent::new(seed, wished).inspect(|request| read.push(*request));
        let report = setup.run(requests(stream), END_PAGE, &[], &mut watched)?;
        (report, Trace::new(&name, read))
    };
    let none = Setup::new(Policy::None, capacity);
    let without = none.run(requests(trace.requests.iter().copied()), END_PAGE, &[], none.prefetcher()?.as_mut())?;
    let (lru, _) = simulate(&trace, Peer::None, capacity, None, |_, _| ());
    #[allow(clippy::cast_precision_loss)] // counts far below 2^53
    let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
    let store = |report: &Report| report.cost.store_pages;
    Ok(Loss {
        pattern: name,
        seed,
        reads: ours.reads,
        read_hit_ratio: ours.read_hit_ratio,
        none_read_hit_ratio: without.read_hit_ratio,
        lru_read_hit_ratio: share(lru.read_hits, lru.reads),
        prefetched_pages: ours.prefetched_pages,
        useful_pages: ours.useful_pages,
        extra_traffic: share(store(&ours), store(&without)) - 1.0,
    })
}

pub(super) fn table(losses: &[Loss]) -> String {
    let heads = ["", "seed", "hit", "none", "LRU", "prefetched", "used", "extra"].map(str::to_owned).to_vec();
    let mut rows = vec![heads];
    for loss in losses {
        rows.push(vec![
            loss.pattern.clone(),
            loss.seed.to_string(),
            format!("{:.4}", loss.read_hit_ratio),
            format!("{:.4}", loss.none_read_hit_ratio),
            format!("{:.4}", loss.lru_read_hit_ratio),
            loss.prefetched_pages.to_string(),
            loss.useful_pages.to_string(),
            format!("{:+.2} %", loss.extra_traffic * 100.0),
        ]);
    }
    let size = CACHE * 100.0;
    format!("\nWhere nothing helps: cache of {size} %, store traffic beyond that without prefetch\n{}", aligned(&rows))
}

pub(super) fn claims(losses: &[Loss]) -> Vec<Claim> {
    let check = |check: fn(&Loss) -> Option<String>| {
        losses.iter().map(move |loss| check(loss).map(|told| format!("{}, seed {}: {told}", loss.pattern, loss.seed)))
    };
    let hits = |loss: &Loss| {
        let none = loss.none_read_hit_ratio.max(loss.lru_read_hit_ratio);
        let (hit, best) = (share(Some(loss.read_hit_ratio)), share(Some(none)));
        (loss.read_hit_ratio < none - HIT_LOSS).then(|| format!("hit {hit}, without prefetch {best}"))
    };
    let traffic = |loss: &Loss| {
        (loss.extra_traffic > EXTRA_TRAFFIC).then(|| format!("{:+.1} % from the store", loss.extra_traffic * 100.0))
    };
    vec![
        Claim::new("Bounded loss: hit ratio at least that without prefetch - .005", check(hits)),
        Claim::new("Bounded loss: extra store traffic at most 3 %", check(traffic)),
    ]
}
