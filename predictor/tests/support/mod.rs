//! Traces and an ideal cache for replays: every candidate above a threshold is fetched, nothing is evicted.
//!
//! Beside what is foreseen, the replay estimates how long the guest waits on a store with [`LATENCY_US`] a request and
//! [`BYTES_PER_US`]: demand reads queue behind demand reads, prefetches behind both, and a page still under way is
//! waited for. The guest's requests come at the recorded times.

#![allow(unreachable_pub, dead_code, reason = "part of a test")]

use prestage_predictor::{Access, AccessPredictor, Candidate, Op};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

/// Time of a store's answer beside the transfer.
pub const LATENCY_US: u64 = 5000;
/// Bandwidth of the store, 200 MB/s.
pub const BYTES_PER_US: u64 = 200;

/// A request, or a mark that says what the guest did.
#[derive(Clone, Debug)]
pub enum Event {
    Access(Access),
    Mark(u64, String),
}

/// Reads an excerpt of `testdata` (`ms,op,page,pages` with differences of time) as the accesses of VM 1.
pub fn excerpt(text: &str) -> Vec<Event> {
    let mut at_us = 0;
    let mut events = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let mut fields = line.split(',');
        let mut field = || fields.next().expect("a row has four fields");
        at_us += field().parse::<u64>().expect("time") * 1000;
        let event = match field() {
            "#" => Event::Mark(at_us, field().to_owned()),
            op => {
                let op = if op == "R" { Op::Read } else { Op::Write };
                let (first, pages) = (field().parse().expect("page"), field().parse().expect("pages"));
                Event::Access(Access { at_us, vm: 1, op, first, pages })
            }
        };
        events.push(event);
    }
    events
}

/// What a replay found.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub reads: u64,
    /// Reads with every page proposed before, or read before.
    pub served: u64,
    /// Of these, reads with at least one page served by a proposal.
    pub predicted: u64,
    /// Reads of which a page had to come from the store: the store's round trips that the guest waits for.
    pub waited: u64,
    /// Pages of reads that were neither read nor written before.
    pub needed_pages: u64,
    pub proposed_pages: u64,
    pub used_pages: u64,
    /// Pages fetched on demand.
    pub demand_pages: u64,
    pub candidates: u64,
    /// Time that reads waited.
    pub wait_us: u64,
    /// Time that they would have waited without any prefetch.
    pub plain_wait_us: u64,
    /// Pages proposed and used, by expert.
    pub by_expert: [(u64, u64); 7],
    /// Pages proposed and used, and the sum of their probabilities, by tenth of probability.
    pub by_probability: [(u64, u64, f64); 10],
}

impl Figures {
    pub fn coverage(&self) -> f64 {
        self.served as f64 / self.reads.max(1) as f64
    }

    pub fn precision(&self) -> f64 {
        self.used_pages as f64 / self.proposed_pages.max(1) as f64
    }

    /// Pages read from the store for each page the guest needed.
    pub fn traffic(&self) -> f64 {
        (self.proposed_pages + self.demand_pages) as f64 / self.needed_pages.max(1) as f64
    }
}

impl std::ops::AddAssign<&Figures> for Figures {
    fn add_assign(&mut self, other: &Figures) {
        self.reads += other.reads;
        self.served += other.served;
        self.predicted += other.predicted;
        self.waited += other.waited;
        self.needed_pages += other.needed_pages;
        self.proposed_pages += other.proposed_pages;
        self.used_pages += other.used_pages;
        self.demand_pages += other.demand_pages;
        self.candidates += other.candidates;
        self.wait_us += other.wait_us;
        self.plain_wait_us += other.plain_wait_us;
        for (mine, others) in self.by_expert.iter_mut().zip(other.by_expert) {
            *mine = (mine.0 + others.0, mine.1 + others.1);
        }
        for (mine, others) in self.by_probability.iter_mut().zip(other.by_probability) {
            *mine = (mine.0 + others.0, mine.1 + others.1, mine.2 + others.2);
        }
    }
}

/// An ideal cache beside a predictor.
#[derive(Debug)]
pub struct Replay {
    pub threshold: f32,
    /// Page → when it is there.
    resident: HashMap<u64, u64>,
    /// When the store is done with demand reads, with prefetches, and with demand reads if there were no prefetch.
    demand_free_us: u64,
    prefetch_free_us: u64,
    plain_free_us: u64,
    plain: HashSet<u64>,
    /// Page → expert and tenth of probability.
    unused: HashMap<u64, (usize, usize)>,
    out: Vec<Candidate>,
}

impl Replay {
    pub fn new(threshold: f32) -> Self {
        Self {
            threshold,
            resident: HashMap::new(),
            demand_free_us: 0,
            prefetch_free_us: 0,
            plain_free_us: 0,
            plain: HashSet::new(),
            unused: HashMap::new(),
            out: Vec::new(),
        }
    }

    /// Drains the predictor into the cache.
    pub fn drain(&mut self, predictor: &mut AccessPredictor, at_us: u64, figures: &mut Figures) {
        predictor.predict(at_us, &mut self.out);
        for candidate in self.out.drain(..).filter(|candidate| candidate.probability >= self.threshold) {
            figures.candidates += 1;
            let pages = candidate.first..candidate.first + u64::from(candidate.pages);
            let missing = pages.clone().filter(|page| !self.resident.contains_key(page)).count() as u64;
            let begin_us = at_us.max(self.demand_free_us).max(self.prefetch_free_us);
            self.prefetch_free_us = begin_us + missing * 4096 / BYTES_PER_US;
            for page in pages {
                if let Entry::Vacant(vacant) = self.resident.entry(page) {
                    vacant.insert(self.prefetch_free_us + LATENCY_US);
                    figures.proposed_pages += 1;
                    let tenth = ((candidate.probability * 10.0) as usize).min(9);
                    self.unused.insert(page, (candidate.expert.index(), tenth));
                    figures.by_expert[candidate.expert.index()].0 += 1;
                    figures.by_probability[tenth].0 += 1;
                    figures.by_probability[tenth].2 += f64::from(candidate.probability);
                }
            }
        }
    }

    /// One request, then what it leads to.
    pub fn step(&mut self, predictor: &mut AccessPredictor, access: &Access, figures: &mut Figures) {
        let pages = access.first..access.first + u64::from(access.pages);
        if access.op == Op::Read {
            let missing = pages.clone().filter(|page| !self.resident.contains_key(page)).count() as u64;
            let mut used = 0;
            for (expert, tenth) in pages.clone().filter_map(|page| self.unused.remove(&page)) {
                used += 1;
                figures.by_expert[expert].1 += 1;
                figures.by_probability[tenth].1 += 1;
            }
            let ready_us = pages.clone().filter_map(|page| self.resident.get(&page)).copied().max().unwrap_or(0);
            let fetched_us = fetch(&mut self.demand_free_us, access.at_us, missing);
            figures.wait_us += ready_us.max(fetched_us).saturating_sub(access.at_us);
            let plain_missing = pages.clone().filter(|page| !self.plain.contains(page)).count() as u64;
            let plain_us = fetch(&mut self.plain_free_us, access.at_us, plain_missing);
            figures.plain_wait_us += plain_us.saturating_sub(access.at_us);
            figures.reads += 1;
            figures.served += u64::from(missing == 0);
            figures.predicted += u64::from(missing == 0 && used > 0);
            figures.waited += u64::from(missing > 0);
            figures.needed_pages += missing + used;
            figures.demand_pages += missing;
            figures.used_pages += used;
        }
        for page in pages {
            self.resident.entry(page).or_insert(access.at_us);
            self.plain.insert(page);
        }
        predictor.observe(access);
        self.drain(predictor, access.at_us, figures);
    }
}

/// When a demand read of `missing` pages is answered.
fn fetch(free_us: &mut u64, at_us: u64, missing: u64) -> u64 {
    if missing == 0 {
        return at_us;
    }
    *free_us = at_us.max(*free_us) + missing * 4096 / BYTES_PER_US;
    *free_us + LATENCY_US
}

/// The same events, `by_us` later.
pub fn later(events: &[Event], by_us: u64) -> Vec<Event> {
    let shift = |event: &Event| match event {
        Event::Access(access) => Event::Access(Access { at_us: access.at_us + by_us, ..*access }),
        Event::Mark(at_us, mark) => Event::Mark(at_us + by_us, mark.clone()),
    };
    events.iter().map(shift).collect()
}
