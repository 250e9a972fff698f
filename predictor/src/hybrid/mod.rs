//! The hybrid: many experts propose, context mixing decides what their proposals are worth.
//!
//! On every read of a guest:
//! 1. predictions that named these pages have come true, those whose window has passed are settled ([`pending`]);
//! 2. the experts name pages that may follow ([`propose`]): interleaved runs ([`runs`]), the log of earlier reads ([`temporal`]), the
//!    chain of blocks ([`granules`]), and the neighbourhood of what was just read;
//! 3. what several of them name is one candidate with all their evidence; its probability comes from the counts of the
//!    contexts it appears in, mixed and calibrated ([`mixer`]);
//! 4. a candidate at or above the floor is handed out, as long as the [`governor`] lets it.
//!
//! Memory is bounded and allocated once, see [`Hybrid::memory_bytes`].

pub(crate) mod blocks;
mod flow;
mod governor;
pub(crate) mod granules;
pub(crate) mod mixer;
pub(crate) mod pending;
mod propose;
pub(crate) mod runs;
pub(crate) mod temporal;
mod view;

use crate::access::{BLOCK_PAGES, Candidate, Expert};
use crate::experts::ExpertSet;
use crate::ordinals::mind::{Mind, Word};
use crate::ordinals::{Found, Slate};
use crate::pageset::{block_masks, mask_runs};
use crate::predictor::CalibrationStats;
use crate::wire::{Reader, WireError};
use blocks::Blocks;
use flow::Flow;
use governor::Governor;
use granules::Granules;
use mixer::{Contexts, INPUTS, MAX_SCORE, MODEL, Mixer, OWN, Places, Reliability, SETS, SHARED};
use pending::{Lifetime, NO_PREDICTION, Pending, Prediction};
use propose::{CHAIN, Limits, NEAR, Proposal, Proposals, log2, near_group};
use runs::Runs;
use temporal::{Follower, Log};
use view::View;

/// Candidates weighed for one read.
const MAX_WEIGHED: usize = 64;
/// A pause longer than this says nothing about the pace of a guest at work.
const MAX_PACE_US: u64 = 1_000_000;

/// Whose contexts the mixer's inputs are (see [`view`]): by place in [`SPEAKERS`]; `None`: of whoever speaks first.
const SPEAKER_OF: [Option<usize>; INPUTS] =
    [Some(0), Some(1), Some(1), Some(1), Some(2), Some(3), None, Some(4), Some(3), Some(3), Some(3), Some(3), Some(3)];
/// Bit of each speaker in an evidence's set; the LSTM names nothing and has none.
const SET_BIT: [u8; 4] = [0, 1, 3, 2];
pub(crate) const SPEAKERS: [Expert; 5] =
    [Expert::Sequential, Expert::Log, Expert::Markov, Expert::Spatial, Expert::Lstm];

/// What the hybrid knows of a page: its probability, and by [`SPEAKERS`] the part of the score in nats.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Knowledge {
    pub(crate) cached: bool,
    pub(crate) issued: bool,
    pub(crate) seen_us: u64,
    pub(crate) said: Option<(f32, [f32; SPEAKERS.len()])>,
}

/// What is kept of one VM: its runs and its place in the log, and what the LSTM makes of it. About 4 KiB.
#[derive(Clone, Debug)]
pub(crate) struct Trail {
    pub(crate) slate: Slate,
    pub(crate) mind: Mind,
    runs: Runs,
    follower: Follower,
    flow: Flow,
    block: u64,
    at_us: u64,
    /// Smoothed time between reads, at most [`MAX_PACE_US`].
    pace_us: u64,
}

/// When a read came, and what holds for its candidates.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) at_us: u64,
    /// Nothing beyond is proposed.
    pub(crate) size_pages: u64,
    /// Candidates less likely are not handed out.
    pub(crate) floor: f32,
    /// Learn, and say nothing.
    pub(crate) silent: bool,
    /// Somebody wants the reads as tokens.
    pub(crate) tokens: bool,
}

/// Sizes and limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HybridConfig {
    pub(crate) blocks: usize,
    pub(crate) log_reads: usize,
    pub(crate) contexts: usize,
    pub(crate) predictions: usize,
    /// Reads within which a prediction must come true, at most; see [`Lifetime`].
    pub(crate) window: u32,
    pub(crate) max_window_pages: u64,
    pub(crate) experts: ExpertSet,
    pub(crate) cache_pages: u64,
    /// Whether what a guest writes is cached by that.
    pub(crate) writes_cached: bool,
    /// Only the LSTM's word counts; the others name pages and say nothing of them.
    pub(crate) model_alone: bool,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Hybrid {
    config: HybridConfig,
    blocks: Blocks,
    contexts: Contexts,
    mixer: Mixer,
    reliability: Reliability,
    pending: Pending,
    log: Log,
    granules: Granules,
    governor: Governor,
    lifetime: Lifetime,
    /// Pages that came into the cache, on demand or as asked for here.
    inserted: u32,
    /// Reads so far, and the time in tenths of a second.
    clock: u32,
    now_ds: u32,
    proposals: Proposals,
    /// Reads of the log that may follow.
    ahead: Vec<(u32, u64, u32)>,
}

impl Hybrid {
    pub(crate) fn new(config: HybridConfig) -> Self {
        Self {
            blocks: Blocks::new(config.blocks),
            contexts: view::expected(),
            mixer: Mixer::new(config.model_alone),
            reliability: Reliability::new(SETS),
            pending: Pending::new(config.predictions),
            log: Log::new(config.log_reads),
            granules: Granules::new(config.contexts),
            governor: Governor::new(config.cache_pages),
            lifetime: Lifetime::new(config.window, config.cache_pages),
            inserted: 0,
            clock: 0,
            now_ds: 0,
            proposals: Proposals::new(),
            ahead: Vec::with_capacity(32),
            config,
        }
    }

    /// A read: what was predicted of it has come true.
    fn label(&mut self, flow: &mut Flow, block: u64, mask: u16, floor: f32) {
        let (pending, contexts, clock) = (&mut self.pending, &mut self.contexts, self.clock);
        let (cached, issued) = self.blocks.find(block).map_or((0, 0), |entry| (entry.cached, entry.issued));
        self.governor.useful((mask & issued).count_ones(), floor);
        let missed = (mask & !issued & !cached).count_ones();
        self.governor.missed(missed);
        self.inserted = self.inserted.wrapping_add(missed);
        if let Some(entry) = self.blocks.find_mut(block)
            && entry.predicted & mask != 0
        {
            let mut at = entry.predictions;
            while let Some(prediction) = pending.get_mut(at) {
                let read = prediction.pages & mask & !prediction.read;
                if read != 0 {
                    prediction.read |= read;
                    flow.came(prediction.set, read.count_ones());
                    contexts.good(&prediction.places, read.count_ones(), prediction.pages.count_ones());
                }
                at = prediction.next();
            }
            entry.predicted &= !mask;
        }
        let lost = |lost: &blocks::Block| drop_chain(pending, lost.predictions);
        self.blocks.touch(block, mask, true, clock, self.now_ds, lost);
    }

    /// Settles what is due.
    fn settle(&mut self) {
        let mut settled = false;
        while let Some((index, prediction)) =
            self.pending.pop(|oldest| self.lifetime.is_over(oldest, self.clock, self.inserted))
        {
            settled |= prediction.is_live();
            self.settle_one(index, &prediction);
        }
        if settled {
            self.mixer.step();
        }
    }

    fn settle_one(&mut self, index: u16, prediction: &Prediction) {
        if !prediction.is_live() {
            return;
        }
        if let Some(entry) = self.blocks.find_mut(u64::from(prediction.block)) {
            self.pending.unchain(&mut entry.predictions, index);
            entry.predicted &= !(prediction.pages & !prediction.read);
        }
        let share = prediction.read.count_ones() as f32 / prediction.pages.count_ones().max(1) as f32;
        self.reliability.learn(prediction.set, prediction.score, prediction.probability, share);
        let inputs = prediction.inputs.iter().map(|input| f32::from(*input) / 16.0);
        self.mixer.learn(prediction.set, inputs, share - prediction.probability);
    }

    /// A VM that has read nothing yet.
    pub(crate) fn trail(&mut self) -> Trail {
        Trail {
            slate: Slate::default(),
            mind: Mind::new(),
            runs: Runs::default(),
            follower: self.log.follower(),
            flow: Flow::default(),
            block: u64::MAX,
            at_us: 0,
            pace_us: 0,
        }
    }

    /// Takes in a read and hands out what may follow.
    pub(crate) fn read(
        &mut self,
        trail: &mut Trail,
        first: u64,
        pages: u32,
        moment: &Moment,
        out: &mut Vec<Candidate>,
    ) {
        self.clock = self.clock.wrapping_add(1);
        self.now_ds = (moment.at_us / 100_000) as u32;
        self.settle();
        trail.flow.read();
        for (block, mask) in block_masks(first, pages) {
            self.label(&mut trail.flow, block, mask, moment.floor);
        }
        let run = trail.runs.observe(first, pages, moment.at_us);
        self.ahead.clear();
        let cursor = self.log.follow(&mut trail.follower, first, pages, &mut self.ahead);
        let block = first / BLOCK_PAGES;
        if trail.block != block {
            if trail.block != u64::MAX {
                self.granules.learn(trail.block, block);
            }
            trail.block = block;
        }
        if moment.tokens {
            let (at_us, ahead) = (moment.at_us, self.ahead.as_slice());
            let found = Found { block, first, pages, at_us, run, cursor, ahead };
            trail.mind.push(trail.slate.read(&found, &self.granules));
        }
        let pause = moment.at_us.saturating_sub(trail.at_us).min(MAX_PACE_US);
        trail.pace_us = (trail.pace_us * 7 + pause) / 8;
        trail.at_us = moment.at_us;
        if moment.silent {
            return;
        }
        self.proposals.clear();
        let (proposals, blocks, experts) = (&mut self.proposals, &self.blocks, self.config.experts);
        if let Some(run) = &run {
            let limits = Limits { window_pages: self.config.max_window_pages, experts };
            proposals.run(blocks, &limits, run, (first, pages));
        }
        if let Some(cursor) = &cursor
            && experts.contains(Expert::Log)
        {
            proposals.log(blocks, cursor, &self.ahead);
        }
        // Who follows the log word for word needs no guesses beside it.
        let sure = cursor.is_some_and(|cursor| experts.contains(Expert::Log) && cursor.is_sure());
        let asks = |expert: Expert, bit| !sure && experts.contains(expert) && trail.flow.pays(bit, self.clock);
        if asks(Expert::Markov, CHAIN) {
            let last = (first + u64::from(pages) - 1) / BLOCK_PAGES;
            self.granules.successors(last, |successor| proposals.chain(blocks, &successor));
        }
        if asks(Expert::Spatial, NEAR) {
            proposals.near(blocks, first, pages);
        }
        let context = Reading {
            request: (first, pages),
            follows: cursor.map_or(0, |cursor| 1 + log2(cursor.hits).min(7)),
            pace_us: trail.pace_us,
            gap_us: run.map_or(0, |run| run.gap_us),
        };
        self.weigh(&context, trail.mind.word(), &mut trail.flow, moment, out);
    }

    fn weigh(
        &mut self,
        reading: &Reading,
        word: Option<&Word>,
        flow: &mut Flow,
        moment: &Moment,
        out: &mut Vec<Candidate>,
    ) {
        for index in 0..self.proposals.len().min(MAX_WEIGHED) {
            let mut proposal = self.proposals.get(index);
            if proposal.evidence.temporal == 0 {
                proposal.evidence.unnamed = reading.follows;
            }
            if let Some(word) = word {
                let beyond = proposal.block as i64 - (reading.request.0 / BLOCK_PAGES) as i64;
                proposal.evidence.model = proposal.evidence.heard(word, beyond);
            }
            let floor = self.governor.floor(moment.floor).unwrap_or(f32::INFINITY);
            let (issue, probability) = self.weigh_block(reading.request, &proposal, flow, floor);
            if issue == 0 {
                continue;
            }
            let evidence = &proposal.evidence;
            let step = if evidence.run > 0 { reading.gap_us } else { reading.pace_us };
            let due_us = Some(moment.at_us.saturating_add(step.saturating_mul(u64::from(evidence.distance))));
            for (from, count) in mask_runs(issue) {
                let first = proposal.block * BLOCK_PAGES + u64::from(from);
                let left = u32::try_from(moment.size_pages.saturating_sub(first)).unwrap_or(u32::MAX);
                let pages = count.min(left);
                if pages > 0 {
                    out.push(Candidate { first, pages, probability, due_us, expert: evidence.expert() });
                }
            }
        }
    }

    /// Weighs the pages of one block; returns those to hand out and their mean probability.
    fn weigh_block(&mut self, request: (u64, u32), proposal: &Proposal, flow: &mut Flow, floor: f32) -> (u16, f32) {
        let Proposal { block, mut mask, evidence } = *proposal;
        // Said before, and nothing near speaks for it: not worth weighing again.
        let said = self.blocks.find(block).map_or(0, |entry| entry.predicted);
        let strong = evidence.set() & 3 != 0;
        if mask & !said == 0 && (!strong || evidence.distance > 4) {
            return (0, 0.0);
        }
        if !strong {
            mask &= !said;
        }
        let view = View::of(&self.blocks, block, self.clock);
        let size_class = u32::from(log2(request.1).min(5));
        let mut places = view.shared(&evidence, size_class, mask, flow.yields(evidence.set()));
        let mut inputs = [0f32; INPUTS];
        inputs[..SHARED].copy_from_slice(&self.contexts.inputs::<SHARED>(&places));
        if self.config.model_alone {
            inputs[..SHARED]
                .iter_mut()
                .enumerate()
                .filter(|(input, _)| *input != MODEL)
                .for_each(|(_, odds)| *odds = 0.0);
        }
        let shared = self.mixer.partial(evidence.set(), 0, &inputs[..SHARED]);
        let (mut issue, mut sum) = (0u16, 0f32);
        let mut left = mask;
        while left != 0 {
            let group = if evidence.near > 0 { near_group(block * BLOCK_PAGES, left, request) } else { left };
            left &= !group;
            let own = view.own(&evidence, block * BLOCK_PAGES, group, request, size_class);
            places[SHARED..].copy_from_slice(&own);
            if !self.config.model_alone {
                inputs[SHARED..].copy_from_slice(&self.contexts.inputs::<OWN>(&own));
            }
            let score = shared + self.mixer.partial(evidence.set(), SHARED, &inputs[SHARED..]);
            let said = Said { set: evidence.set(), score: score.clamp(-MAX_SCORE, MAX_SCORE), places, inputs };
            let (issued, probability) = self.say(block, group, &said, flow, floor);
            issue |= issued;
            sum += probability * issued.count_ones() as f32;
        }
        (issue, sum / issue.count_ones().max(1) as f32)
    }

    /// Makes a prediction of some pages of a block, unless as much was said before; returns the pages to hand out.
    fn say(&mut self, block: u64, mask: u16, said: &Said, flow: &mut Flow, floor: f32) -> (u16, f32) {
        let probability = self.reliability.probability(said.set, said.score);
        let issue = probability >= floor;
        if self.pending.is_full()
            && let Some((index, oldest)) = self.pending.pop(|_| true)
        {
            self.settle_one(index, &oldest);
        }
        let (pending, clock) = (&mut self.pending, self.clock);
        let entry = self.blocks.get(block, clock, |lost| drop_chain(pending, lost.predictions));
        let mut fresh = mask;
        if entry.predicted & mask != 0 {
            // Said before of some of these pages: only better evidence, or crossing the floor, is worth a new prediction.
            let mut at = entry.predictions;
            while let Some(prediction) = self.pending.get(at) {
                let (here, next) = (at, prediction.next());
                at = next;
                let open = prediction.pages & !prediction.read;
                if open & mask == 0 {
                    continue;
                }
                let better = said.set & !prediction.set != 0 || (issue && prediction.probability < floor);
                if better && prediction.read == 0 {
                    self.contexts.retract(&prediction.places);
                    entry.predicted &= !prediction.pages;
                    self.pending.kill(&mut entry.predictions, here);
                } else {
                    fresh &= !open;
                }
            }
        }
        if fresh == 0 {
            return (0, 0.0);
        }
        self.contexts.made(&said.places);
        entry.predicted |= fresh;
        flow.made(said.set, fresh.count_ones());
        let prediction = Prediction {
            block: block as u32,
            due: self.lifetime.due(self.inserted),
            at: self.clock as u16,
            pages: fresh,
            set: said.set,
            score: said.score,
            probability,
            places: said.places,
            inputs: said.inputs.map(|input| (input * 16.0).clamp(-127.0, 127.0) as i8),
            ..Prediction::blank()
        };
        self.pending.push(prediction, &mut entry.predictions);
        if !issue {
            return (0, 0.0);
        }
        entry.issued |= fresh;
        entry.seen_ds = self.now_ds;
        self.governor.spent(fresh.count_ones());
        self.inserted = self.inserted.wrapping_add(fresh.count_ones());
        (fresh, probability)
    }

    /// What was said of a page and is not settled, and what is known of its place.
    pub(crate) fn explain(&self, page: u64) -> Option<Knowledge> {
        let entry = self.blocks.find(page / BLOCK_PAGES)?;
        let bit = 1u16 << (page % BLOCK_PAGES);
        let said = self.pending.chain(entry.predictions).find(|(_, prediction)| prediction.pages & bit != 0);
        let said = said.map(|(_, prediction)| {
            let weights = self.mixer.weights(prediction.set);
            let mut parts = [0f32; SPEAKERS.len()];
            let first = SET_BIT.iter().position(|bit| prediction.set >> bit & 1 == 1).unwrap_or(3);
            for (input, value) in prediction.inputs.iter().enumerate() {
                parts[SPEAKER_OF[input].unwrap_or(first)] += weights[input] * f32::from(*value) / 16.0;
            }
            (prediction.probability, parts)
        });
        Some(Knowledge {
            cached: entry.cached & bit != 0,
            issued: entry.issued & bit != 0,
            seen_us: u64::from(entry.seen_ds) * 100_000,
            said,
        })
    }

    /// The cache lost pages: they may be proposed again.
    pub(crate) fn lost(&mut self, block: u64, mask: u16) {
        if let Some(entry) = self.blocks.find_mut(block) {
            entry.cached &= !mask;
            entry.issued &= !mask;
        }
    }

    /// A guest wrote pages: nothing is learned of predictions that named them.
    pub(crate) fn written(&mut self, block: u64, mask: u16) {
        let (pending, contexts, clock) = (&mut self.pending, &mut self.contexts, self.clock);
        if let Some(entry) = self.blocks.find_mut(block)
            && entry.predicted & mask != 0
        {
            let mut at = entry.predictions;
            while let Some(prediction) = pending.get(at) {
                let (here, next) = (at, prediction.next());
                at = next;
                if prediction.pages & mask != 0 && prediction.read == 0 {
                    contexts.retract(&prediction.places);
                    entry.predicted &= !prediction.pages;
                    pending.kill(&mut entry.predictions, here);
                }
            }
            entry.predicted &= !mask;
        }
        let lost = |lost: &blocks::Block| drop_chain(pending, lost.predictions);
        let cached = self.config.writes_cached;
        self.blocks.touch(block, mask, cached, clock, self.now_ds, lost);
    }

    /// Notes pages that others proposed; returns those that are not cached or on their way.
    /// What was issued more than `repeat_ds` ago may be issued again: the cache may have dropped it. Times are in tenths of
    /// a second.
    pub(crate) fn issue(&mut self, block: u64, mask: u16, repeat_ds: u32, at_us: u64) -> u16 {
        self.now_ds = (at_us / 100_000) as u32;
        let (pending, clock) = (&mut self.pending, self.clock);
        let lost = |lost: &blocks::Block| drop_chain(pending, lost.predictions);
        let entry = self.blocks.get(block, clock, lost);
        let old = self.now_ds.saturating_sub(entry.seen_ds) >= repeat_ds;
        let fresh = if old { mask } else { mask & !entry.cached & !entry.issued };
        if fresh != 0 {
            entry.issued |= fresh;
            entry.seen_ds = self.now_ds;
        }
        fresh
    }

    /// Serialises what was learned; pending predictions and what is cached belong to the moment.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        self.contexts.write(out);
        self.mixer.write(out);
        self.reliability.write(out);
        self.log.write(out);
        self.granules.write(out);
    }

    /// Takes over what [`Hybrid::write`] wrote.
    pub(crate) fn restore(&mut self, reader: &mut Reader<'_>) -> Result<(), WireError> {
        self.contexts = Contexts::read(reader)?;
        self.mixer = Mixer::read(reader)?;
        self.reliability = Reliability::read(reader, SETS)?;
        self.log.restore(reader)?;
        self.granules.restore(reader)
    }

    /// The cache is empty again: everything may be proposed anew.
    pub(crate) fn clear_cached(&mut self) {
        self.blocks.clear_cached();
    }

    /// How well the probabilities were kept.
    pub(crate) fn calibration(&self) -> CalibrationStats {
        let kept = &self.reliability;
        let (settled, error, brier) = (kept.settled(), kept.error(), kept.brier());
        CalibrationStats { settled, error, brier, bits: kept.bits(), surplus: kept.surplus() }
    }

    /// Reads in the log.
    pub(crate) fn log_reads(&self) -> usize {
        self.log.len()
    }

    /// Contexts of the chain of blocks in use.
    pub(crate) fn markov_contexts(&self) -> usize {
        self.granules.len()
    }

    /// Heap memory, in bytes: fixed by the configuration.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.blocks.memory_bytes()
            + self.contexts.memory_bytes()
            + self.reliability.memory_bytes()
            + self.pending.memory_bytes()
            + self.log.memory_bytes()
            + self.granules.memory_bytes()
            + SETS * (INPUTS + 1) * 12
            + self.proposals.memory_bytes()
            + self.ahead.capacity() * size_of::<(u32, u64, u32)>()
    }
}

/// A block is forgotten: nobody will know of what was predicted of it, which then stands as failed.
fn drop_chain(pending: &mut Pending, mut chain: u16) {
    while chain != NO_PREDICTION {
        let index = chain;
        pending.kill(&mut chain, index);
    }
}

/// What a read says about what follows it, beside the proposals.
struct Reading {
    request: (u64, u32),
    /// How long the cursor in the log has been right that speaks; 0: none does.
    follows: u8,
    pace_us: u64,
    /// Of the run that the read continues.
    gap_us: u64,
}

/// A prediction in the making.
struct Said {
    set: u8,
    score: f32,
    places: Places,
    inputs: [f32; INPUTS],
}
