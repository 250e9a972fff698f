//! The predictor alone, without a cache's help: what it foresees of the misses of a 10 % LRU, how surely and how early.
//!
//! Definitions, the same for the predictor and for readahead:
//! - The stream is the trace's read requests that miss in an LRU cache of 10 % of its pages, whole requests, in order.
//! - A page is *predicted* when a candidate with p >= .75 names it; naming it again while it is open changes nothing. It is
//!   open until a request of the stream reads it, or for 4096 misses.
//! - A page of a request is *covered at lead L* if it was predicted at least L misses before, and at lead t if at least t of
//!   the trace's time before. Coverage is the share of the pages of all requests.
//! - *Precision* is the share of the predicted pages that were read while open.
//! - Readahead: 32 streams, the least recently used one replaced. A request continues a stream if it starts at most 8 pages
//!   before or 4 behind its end; then the pages up to four times the request's length ahead of it are predicted.

use std::collections::VecDeque;

use anyhow::Result;
use prestage_predictor::{Access, AccessConfig, AccessPredictor, Op, Outcome};
use rustc_hash::FxHashMap;
use serde::Serialize;

use super::pool;
use super::tables::{aligned, share};
use super::verdict::Claim;
use crate::peers::{Peer, simulate};
use crate::record::ratio;
use crate::trace::{Request, Trace};

const CACHE: f64 = 0.10;
const PROBABILITY: f32 = 0.75;
/// Misses for which a prediction stays open.
const WINDOW: u64 = 4096;
/// Leads in misses, and in µs.
const LEADS: [u64; 3] = [1, 4, 8];
const LEADS_US: [u64; 2] = [1000, 5000];
/// What is asked of the predictor.
const PRECISION: f64 = 0.80;

/// What one method foresaw on one trace.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Foresight {
    pub(crate) trace: String,
    pub(crate) method: &'static str,
    pub(crate) misses: u64,
    pub(crate) pages: u64,
    pub(crate) predicted_pages: u64,
    pub(crate) precision: Option<f64>,
    /// At leads of 1, 4 and 8 misses.
    pub(crate) coverage: Vec<f64>,
    /// At leads of 1 and 5 ms; none where the trace's times are row numbers.
    pub(crate) coverage_us: Option<Vec<f64>>,
}

/// Predictions under judgement.
#[derive(Debug, Default)]
struct Judge {
    /// Page → when it was predicted: miss, µs, and the predictor's own mark.
    open: FxHashMap<u64, (u64, u64, u8)>,
    /// Predicted pages by miss, to close them in order.
    order: VecDeque<(u64, u64)>,
    predicted: u64,
    right: u64,
    pages: u64,
    covered: [u64; 3],
    covered_us: [u64; 2],
}

impl Judge {
    fn predict(&mut self, page: u64, miss: u64, at_us: u64, tag: u8) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.open.entry(page) {
            entry.insert((miss, at_us, tag));
            self.order.push_back((miss, page));
            self.predicted += 1;
        }
    }

    /// A page of the stream is read; the mark of the prediction that foresaw it.
    fn read(&mut self, page: u64, miss: u64, at_us: u64) -> Option<u8> {
        self.pages += 1;
        let (since, since_us, tag) = self.open.remove(&page)?;
        self.right += 1;
        for (covered, lead) in self.covered.iter_mut().zip(LEADS) {
            *covered += u64::from(miss - since >= lead);
        }
        for (covered, lead) in self.covered_us.iter_mut().zip(LEADS_US) {
            *covered += u64::from(at_us.saturating_sub(since_us) >= lead);
        }
        Some(tag)
    }

    /// Closes what is open for too long; `lost` is told page and mark.
    fn expire(&mut self, miss: u64, mut lost: impl FnMut(u64, u8)) {
        while let Some((since, page)) = self.order.front().copied().filter(|(since, _)| since + WINDOW < miss) {
            self.order.pop_front();
            if let Some((_, _, tag)) = self.open.get(&page).copied().filter(|open| open.0 == since) {
                self.open.remove(&page);
                lost(page, tag);
            }
        }
    }

    fn foresight(&self, trace: &Trace, method: &'static str, misses: usize) -> Foresight {
        let share = |covered: &u64| ratio(*covered, self.pages).unwrap_or(0.0);
        Foresight {
            trace: trace.name.clone(),
            method,
            misses: misses as u64,
            pages: self.pages,
            predicted_pages: self.predicted,
            precision: ratio(self.right, self.predicted),
            coverage: self.covered.iter().map(share).collect(),
            coverage_us: (!trace.order_only()).then(|| self.covered_us.iter().map(share).collect()),
        }
    }
}

pub(super) fn run(traces: &[Trace]) -> Result<Vec<Foresight>> {
    let both = pool::each(traces, |trace| {
        let mut misses = Vec::new();
        simulate(trace, Peer::None, trace.capacity(CACHE), None, |request, hit| {
            if request.read && !hit {
                misses.push(*request);
            }
        });
        Ok([predictor(trace, &misses), readahead(trace, &misses)])
    })?;
    Ok(both.concat())
}

fn predictor(trace: &Trace, misses: &[Request]) -> Foresight {
    let mut predictor = AccessPredictor::new(AccessConfig {
        min_probability: PROBABILITY,
        size_pages: trace.last_page + 1,
        ..AccessConfig::default()
    });
    let (mut judge, mut candidates, mut latest_us) = (Judge::default(), Vec::new(), 0);
    for (miss, request) in (0..).zip(misses) {
        latest_us = request.at_us.max(latest_us);
        let told = |predictor: &mut AccessPredictor, page, tag: u8, used| {
            if let Some(&expert) = prestage_predictor::Expert::ALL.get(usize::from(tag)) {
                predictor.outcome(&Outcome { first: page, pages: 1, expert, used, late: false });
            }
        };
        judge.expire(miss, |page, tag| told(&mut predictor, page, tag, false));
        for page in request.first..=request.last {
            if let Some(tag) = judge.read(page, miss, latest_us) {
                told(&mut predictor, page, tag, true);
            }
        }
        predictor.observe(&Access {
            at_us: latest_us,
            vm: 1,
            op: Op::Read,
            first: request.first,
            pages: u32::try_from(request.pages()).unwrap_or(u32::MAX),
        });
        predictor.predict(latest_us, &mut candidates);
        for candidate in candidates.drain(..).filter(|candidate| candidate.probability >= PROBABILITY) {
            for page in candidate.first..candidate.first + u64::from(candidate.pages) {
                judge.predict(page, miss, latest_us, candidate.expert.index() as u8);
            }
        }
    }
    judge.foresight(trace, "prestage", misses.len())
}

/// A stream of the readahead: its end, and when it was last used.
#[derive(Debug, Clone, Copy)]
struct Stream {
    next: u64,
    used: u64,
}

fn readahead(trace: &Trace, misses: &[Request]) -> Foresight {
    const STREAMS: usize = 32;
    let (mut judge, mut streams) = (Judge::default(), Vec::<Stream>::new());
    for (miss, request) in (0..).zip(misses) {
        judge.expire(miss, |_, _| ());
        for page in request.first..=request.last {
            judge.read(page, miss, request.at_us);
        }
        let stream = Stream { next: request.last + 1, used: miss };
        let continues = |stream: &&mut Stream| request.first + 8 >= stream.next && request.first <= stream.next + 4;
        if let Some(known) = streams.iter_mut().find(continues) {
            *known = stream;
            let end = (request.last + 4 * request.pages()).min(trace.last_page);
            for page in request.last + 1..=end {
                judge.predict(page, miss, request.at_us, 0);
            }
        } else if streams.len() < STREAMS {
            streams.push(stream);
        } else if let Some(oldest) = streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = stream;
        }
    }
    judge.foresight(trace, "readahead", misses.len())
}

pub(super) fn table(foresights: &[Foresight]) -> String {
    let heads = ["", "", "misses", "predicted", "prec", "lead 1", "4", "8", "1 ms", "5 ms"].map(str::to_owned).to_vec();
    let mut rows = vec![heads];
    for one in foresights {
        let mut row = vec![one.trace.clone(), one.method.to_owned(), one.misses.to_string()];
        row.extend([one.predicted_pages.to_string(), share(one.precision)]);
        row.extend(one.coverage.iter().map(|coverage| share(Some(*coverage))));
        let timed = |index: usize| share(one.coverage_us.as_ref().and_then(|coverage| coverage.get(index).copied()));
        row.extend([timed(0), timed(1)]);
        rows.push(row);
    }
    format!("\nForeseen of the misses of a 10 % LRU at p >= .75: precision, coverage by lead\n{}", aligned(&rows))
}

pub(super) fn claims(foresights: &[Foresight]) -> Vec<Claim> {
    let ours = || foresights.iter().filter(|one| one.method == "prestage");
    let precise = ours().map(|one| {
        let fails = one.precision.is_none_or(|precision| precision < PRECISION);
        fails.then(|| format!("{}: {}", one.trace, share(one.precision)))
    });
    let covered = ours().filter_map(|one| {
        let peer = foresights.iter().find(|other| other.method == "readahead" && other.trace == one.trace)?;
        let (ours, theirs) = (*one.coverage.get(1)?, *peer.coverage.get(1)?);
        let (hit, peers) = (share(Some(ours)), share(Some(theirs)));
        Some((ours <= theirs).then(|| format!("{}: {hit}, readahead {peers}", one.trace)))
    });
    vec![
        Claim::new("Foreseen at p >= .75: precision >= .80", precise),
        Claim::new("Foreseen at p >= .75: coverage at lead 4 above readahead's", covered),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_covered_at_leads_up_to_its_age_and_no_longer_than_the_window() {
        let mut judge = Judge::default();
        judge.predict(7, 10, 0, 3);
        judge.predict(7, 12, 0, 4);
        judge.predict(8, 10, 0, 3);
        assert_eq!(judge.read(7, 14, 2000), Some(3));
        assert_eq!(judge.read(9, 14, 2000), None);
        assert_eq!((judge.covered, judge.covered_us), ([1, 1, 0], [1, 0]));
        let mut lost = Vec::new();
        judge.expire(10 + WINDOW, |page, _| lost.push(page));
        assert!(lost.is_empty());
        judge.expire(11 + WINDOW, |page, tag| lost.push(page + u64::from(tag)));
        assert_eq!(lost, [11]);
        assert_eq!((judge.read(8, 11 + WINDOW, 0), judge.predicted, judge.right), (None, 2, 1));
    }

    #[test]
    fn readahead_covers_a_sequential_stream_from_its_third_request() {
        let request = |at: u64| Request { at_us: at * 600, read: true, first: at * 2, last: at * 2 + 1 };
        let misses: Vec<Request> = (0..10).map(request).collect();
        let trace = Trace::new("stream", misses.clone());
        let seen = readahead(&trace, &misses);
        assert_eq!((seen.pages, seen.predicted_pages, seen.precision), (20, 16, Some(1.0)));
        // each page of the steady state is named four requests ahead
        assert_eq!(seen.coverage, [0.8, 0.5, 0.0]);
        assert_eq!(seen.coverage_us, Some(vec![0.7, 0.0]));
    }
}
