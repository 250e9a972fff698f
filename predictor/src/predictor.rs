//! The access predictor of one storage: feeds every expert, weighs them, and hands out candidates.
//!
//! Who is believed: a first-touch set that proved right in this run knows what follows a read it foresaw, so the other
//! experts keep silent after such a read. Everywhere else all experts propose, each with a probability calibrated by
//! its own observed record; of several proposals for a page the best one is handed out.
//!
//! Memory is bounded (see [`AccessConfig`]): the tables by their size, a VM by its recording (at most about 40 bytes a
//! page at worst, 2 typically).

mod explain;
mod vm;

use crate::access::{Access, Candidate, Expert, MAX_PAGES, Op, Outcome, Phase};
use crate::burst::{BurstLimits, BurstSets};
use crate::experts::ExpertSet;
use crate::ledger::Ledger;
use crate::markov::MarkovTable;
use crate::odds::{Calibration, Class};
use crate::pageset::{RunJoiner, block_masks};
use crate::phase::PhaseSet;
use crate::record::Recording;
use crate::replay::Window;
use crate::streams::Proposal;
use rustc_hash::FxHashMap;
use std::collections::BTreeMap;
use std::time::Duration;
use vm::{Vm, close_phase};

/// Pages of one read that are looked at (16 MiB); what a longer one touches beyond is not learned.
const MAX_READ_PAGES: u32 = 4096;
/// Pages of one write or discard that are noted (256 MiB): a guest may discard a whole disk in one request.
const MAX_WRITE_PAGES: u32 = 65_536;
/// Pages of a candidate, at most (512 KiB).
const MAX_CANDIDATE_PAGES: u32 = 128;
/// A phase's start proposes its set anew, except what was handled this recently (another VM's start, a moment ago).
const PHASE_REPEAT_S: u32 = 30;
/// Streams at least this long are left to the stream expert: no Markov context is spent on them.
const STREAM_RUN: u32 = 3;
/// Neighbouring proposals of one expert become one candidate if their probabilities differ by no more than this.
const JOIN_PROBABILITY: f32 = 0.1;

/// Settings of an [`AccessPredictor`]; the defaults suit a storage of any size.
#[derive(Clone, Debug)]
pub struct AccessConfig {
    /// Size of the storage in pages; nothing beyond is proposed. Default: unbounded.
    pub size_pages: u64,
    /// Candidates less likely than this are not handed out. Default 0.25.
    pub min_probability: f32,
    /// Largest stream window. Default 512 KiB.
    pub max_window_bytes: u64,
    /// Bytes of a phase's set that are proposed ahead of the guest. Default 256 MiB.
    pub phase_window_bytes: u64,
    /// How far ahead in time a phase's set is proposed. Default 2 min.
    pub phase_horizon: Duration,
    /// A phase is closed and learned after this long, if not ended before. Default 15 min.
    pub phase_duration: Duration,
    /// Bytes of first touches recorded in one phase. Default 512 MiB.
    pub phase_bytes: u64,
    /// Phase sets kept; the one unused for longest leaves. Default 64.
    pub phase_sets: usize,
    /// Quiet time that separates bursts outside phases. Default 2 s.
    pub burst_gap: Duration,
    /// Bytes of first touches recorded in one burst. Default 256 MiB.
    pub burst_bytes: u64,
    /// Bursts kept. Default 64.
    pub bursts: usize,
    /// Markov contexts of 64 bytes. Default 16384 (1 MiB).
    pub markov_contexts: usize,
    /// 64 KiB blocks whose recent touches and proposals are remembered, 48 bytes each. Default 16384 (768 KiB).
    pub recent_blocks: usize,
    /// Experts that may propose; the others learn and keep silent. Default all.
    pub experts: ExpertSet,
}

impl Default for AccessConfig {
    fn default() -> Self {
        Self {
            size_pages: MAX_PAGES,
            min_probability: 0.25,
            max_window_bytes: 512 << 10,
            phase_window_bytes: 256 << 20,
            phase_horizon: Duration::from_secs(120),
            phase_duration: Duration::from_secs(15 * 60),
            phase_bytes: 512 << 20,
            phase_sets: 64,
            burst_gap: Duration::from_secs(2),
            burst_bytes: 256 << 20,
            bursts: 64,
            markov_contexts: 16_384,
            recent_blocks: 16_384,
            experts: ExpertSet::ALL,
        }
    }
}

impl AccessConfig {
    fn phase_window(&self) -> Window {
        Window {
            pages: self.phase_window_bytes / crate::PAGE_BYTES,
            horizon_ms: u32::try_from(self.phase_horizon.as_millis()).unwrap_or(u32::MAX),
            slow_start: false,
        }
    }

    fn phase_limit_pages(&self) -> u64 {
        (self.phase_bytes / crate::PAGE_BYTES).max(1)
    }

    fn duration_us(&self) -> u64 {
        u64::try_from(self.phase_duration.as_micros()).unwrap_or(u64::MAX)
    }

    pub(crate) fn burst_limits(&self) -> BurstLimits {
        BurstLimits {
            bursts: self.bursts.max(1),
            pages: (self.burst_bytes / crate::PAGE_BYTES).max(1),
            extents: crate::phase::MAX_EXTENTS,
            gap_us: u64::try_from(self.burst_gap.as_micros()).unwrap_or(u64::MAX),
            // A burst is recognised, not announced: look less far ahead than in a phase.
            window: Window {
                pages: self.phase_window().pages / 4,
                horizon_ms: self.phase_window().horizon_ms / 2,
                slow_start: true,
            },
        }
    }
}

/// Counters since the predictor was made. Pages are 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AccessStats {
    pub reads: u64,
    pub writes: u64,
    pub candidates: u64,
    /// By [`Expert::index`].
    pub proposed_pages: [u64; 8],
    /// By [`Expert::index`], from outcomes: read by a guest.
    pub used_pages: [u64; 8],
    /// Part of `used_pages`: the guest had to wait.
    pub late_pages: [u64; 8],
    /// By [`Expert::index`], from outcomes: lost before any read.
    pub unused_pages: [u64; 8],
}

/// A learned set and when it was last needed.
#[derive(Clone, Debug)]
pub(crate) struct StoredSet {
    pub(crate) phase: Phase,
    pub(crate) set: PhaseSet,
    pub(crate) used: u64,
}

/// Predicts the reads of all VMs on one storage. See the module's head.
#[derive(Debug)]
pub struct AccessPredictor {
    pub(crate) config: AccessConfig,
    pub(crate) phases: Vec<StoredSet>,
    pub(crate) uses: u64,
    pub(crate) bursts: BurstSets,
    pub(crate) markov: MarkovTable,
    pub(crate) calibration: Calibration,
    ledger: Ledger,
    vms: BTreeMap<u64, Box<Vm>>,
    pending: Vec<Candidate>,
    proposals: Vec<Proposal>,
    stats: AccessStats,
}

impl AccessPredictor {
    /// A predictor that knows nothing yet.
    #[must_use]
    pub fn new(config: AccessConfig) -> Self {
        let config = AccessConfig { size_pages: config.size_pages.min(MAX_PAGES), ..config };
        Self {
            bursts: BurstSets::new(config.burst_limits()),
            markov: MarkovTable::new(config.markov_contexts),
            calibration: Calibration::new(),
            ledger: Ledger::new(config.recent_blocks),
            phases: Vec::new(),
            uses: 0,
            vms: BTreeMap::new(),
            pending: Vec::new(),
            proposals: Vec::new(),
            stats: AccessStats::default(),
            config,
        }
    }

    /// Hands out candidates from this probability on, see [`AccessConfig::min_probability`].
    pub fn set_min_probability(&mut self, probability: f32) {
        self.config.min_probability = probability;
    }

    /// The storage has another size now.
    pub fn resize(&mut self, size_pages: u64) {
        self.config.size_pages = size_pages.min(MAX_PAGES);
    }

    /// A phase of a VM begins; the one that ran ends and is learned. What is known of the phase is raised by the next
    /// [`AccessPredictor::predict`].
    pub fn phase_start(&mut self, vm: u64, phase: Phase, at_us: u64) {
        self.phase_end(vm, at_us);
        let vm = self.vms.entry(vm).or_default();
        self.bursts.end(&mut vm.burst);
        if phase == Phase::Boot {
            // A new guest: its streams and place have nothing to do with the one before.
            **vm = Vm::default();
        }
        self.uses += 1;
        let plan = self.phases.iter_mut().find(|stored| stored.phase == phase).map(|stored| {
            stored.used = self.uses;
            std::sync::Arc::clone(stored.set.plan())
        });
        let recording = Recording::new(at_us, self.config.phase_limit_pages());
        vm.start_phase(phase, recording, plan, self.config.phase_window(), at_us);
    }

    /// The phase of a VM ends, if one runs, and is learned.
    pub fn phase_end(&mut self, vm: u64, at_us: u64) {
        if let Some(vm) = self.vms.get_mut(&vm) {
            close_phase(vm, &mut self.phases, &mut self.uses, self.config.phase_sets, at_us);
        }
    }

    /// The phase that a VM is in, and since when.
    #[must_use]
    pub fn running_phase(&self, vm: u64) -> Option<(Phase, u64)> {
        self.vms.get(&vm)?.running_phase()
    }

    /// A VM is gone: its phase or burst is learned, its state dropped.
    pub fn vm_forget(&mut self, vm: u64) {
        self.phase_end(vm, 0);
        if let Some(mut vm) = self.vms.remove(&vm) {
            self.bursts.end(&mut vm.burst);
        }
    }

    /// The cache lost what it held (dropped, or emptied): everything may be proposed again.
    pub fn forget_resident(&mut self) {
        self.ledger.clear(&mut self.calibration);
    }

    /// Takes in one request. Pages beyond the storage's size are ignored.
    pub fn observe(&mut self, access: &Access) {
        let most = if access.op == Op::Read { MAX_READ_PAGES } else { MAX_WRITE_PAGES };
        let left = self.config.size_pages.saturating_sub(access.first);
        let pages = u32::try_from(left).unwrap_or(u32::MAX).min(access.pages).min(most);
        if pages == 0 {
            return;
        }
        self.ledger.advance(access.at_us, &mut self.calibration);
        let vm = self.vms.entry(access.vm).or_default();
        if vm.phase_is_over(access.at_us, self.config.duration_us()) {
            close_phase(vm, &mut self.phases, &mut self.uses, self.config.phase_sets, access.at_us);
        }
        match access.op {
            Op::Read => self.read(access.vm, access.first, pages, access.at_us),
            Op::Write | Op::Discard => self.write(access.vm, access.first, pages, access.at_us),
        }
    }

    fn write(&mut self, vm: u64, first: u64, pages: u32, at_us: u64) {
        self.stats.writes += 1;
        if let Some(vm) = self.vms.get_mut(&vm) {
            match &mut vm.phase {
                Some(active) => active.recording.write(first, pages, at_us),
                None => self.bursts.write(&mut vm.burst, first, pages, at_us),
            }
        }
        // A large discard would wash everything else out of the ledger.
        for (block, mask) in block_masks(first, pages.min(MAX_READ_PAGES)) {
            self.ledger.written(block, mask, &mut self.calibration);
        }
    }

    fn read(&mut self, vm: u64, first: u64, pages: u32, at_us: u64) {
        self.stats.reads += 1;
        let Some(vm) = self.vms.get_mut(&vm) else { return };
        let known = match &mut vm.phase {
            Some(active) => {
                active.recording.read(first, pages, at_us);
                active.replay.as_mut().is_some_and(|replay| replay.read(first, pages, at_us) && replay.is_trusted())
            }
            None => self.bursts.read(&mut vm.burst, first, pages, at_us) && vm.burst.is_trusted(),
        };
        let set = if vm.phase.is_some() { Expert::Phase } else { Expert::Burst };
        let known = known && self.config.experts.contains(set);

        let mut proposals = std::mem::take(&mut self.proposals);
        proposals.clear();
        let max_window = (self.config.max_window_bytes / crate::PAGE_BYTES).max(1);
        let continued = vm.streams.observe(first, pages, at_us, max_window, &mut proposals);
        self.markov.observe(&mut vm.markov, first, pages, continued.run < STREAM_RUN);
        if !known {
            self.markov.predict(&vm.markov, &mut proposals);
        }
        let mut touched_anew = false;
        for (block, mask) in block_masks(first, pages) {
            touched_anew |= self.ledger.read(block, mask, &mut self.calibration);
        }
        if !known {
            for proposal in &proposals {
                self.raise(proposal);
            }
            // Last, because the spatial expert adds to what the others expect. Only the ends of a request leave blocks
            // in part.
            let ends = [first / crate::BLOCK_PAGES, (first + u64::from(pages) - 1) / crate::BLOCK_PAGES];
            for block in if !touched_anew {
                &[][..]
            } else if ends[0] == ends[1] {
                &ends[..1]
            } else {
                &ends[..]
            } {
                self.raise_rest_of_block(*block, pages);
            }
        }
        self.proposals = proposals;
    }

    fn raise_rest_of_block(&mut self, block: u64, request_pages: u32) {
        if !self.config.experts.contains(Expert::Spatial) {
            return;
        }
        if let Some(rest) = self.ledger.rest_of_block(block, request_pages, &mut self.calibration)
            && rest.probability >= self.config.min_probability
        {
            self.raise_mask(block, rest.mask, rest.probability, Expert::Spatial, Class::NONE, None);
        }
    }

    /// Raises a proposal. It is noted for calibration however unlikely, and handed out if likely enough.
    fn raise(&mut self, proposal: &Proposal) {
        if !self.config.experts.contains(proposal.expert) {
            return;
        }
        let probability = self.calibration.probability(proposal.class, proposal.prior);
        let Some(pages) = self.clip(proposal.first, proposal.pages) else { return };
        for (block, mask) in block_masks(proposal.first, pages) {
            self.raise_mask(block, mask, probability, proposal.expert, proposal.class, proposal.due_us);
        }
    }

    /// Pages of a range that lie on the storage.
    fn clip(&self, first: u64, pages: u32) -> Option<u32> {
        let left = self.config.size_pages.checked_sub(first)?;
        Some(u32::try_from(left).unwrap_or(u32::MAX).min(pages)).filter(|pages| *pages > 0)
    }

    fn raise_mask(&mut self, block: u64, mask: u16, probability: f32, expert: Expert, class: Class, due: Option<u64>) {
        let fresh = self.ledger.propose(block, mask, probability, (expert, class), &mut self.calibration);
        if fresh == 0 || probability < self.config.min_probability {
            return;
        }
        let (pending, size_pages) = (&mut self.pending, self.config.size_pages);
        let mut joiner = RunJoiner::default();
        let mut add = |first: u64, pages: u32| {
            let pages = u32::try_from(size_pages.saturating_sub(first)).unwrap_or(u32::MAX).min(pages);
            push_joined(pending, Candidate { first, pages, probability, due_us: due, expert });
        };
        joiner.push(block, fresh, &mut add);
        joiner.flush(&mut add);
    }

    /// Adds the candidates raised since the last call to `out`, in the order they were raised (a set's in order of
    /// expected use), each page at most once. Call it after every batch of observed accesses and after `phase_start`;
    /// calling it now and then without accesses lets a running phase go on with the clock.
    pub fn predict(&mut self, at_us: u64, out: &mut Vec<Candidate>) {
        self.ledger.advance(at_us, &mut self.calibration);
        self.propose_from_sets(at_us);
        let from = out.len();
        if self.pending.len() > 1 {
            keep_best(&mut self.pending, out);
        } else {
            out.append(&mut self.pending);
        }
        self.stats.candidates += (out.len() - from) as u64;
        for candidate in &out[from..] {
            self.stats.proposed_pages[candidate.expert.index()] += u64::from(candidate.pages);
        }
        self.pending.clear();
    }

    fn propose_from_sets(&mut self, at_us: u64) {
        let (ledger, calibration, pending) = (&mut self.ledger, &mut self.calibration, &mut self.pending);
        let (floor, size_pages) = (self.config.min_probability, self.config.size_pages);
        let experts = self.config.experts;
        for vm in self.vms.values_mut() {
            let (expert, repeat_s, phase) = match &mut vm.phase {
                Some(active) => (Expert::Phase, PHASE_REPEAT_S, active.replay.as_mut()),
                None => (Expert::Burst, u32::MAX, None),
            };
            if !experts.contains(expert) {
                continue;
            }
            for replay in phase.into_iter().chain(vm.burst.replays()) {
                replay.propose(at_us, floor, |extent, probability, due_us| {
                    let Some(left) = size_pages.checked_sub(extent.first) else { return };
                    let pages = u32::try_from(left).unwrap_or(u32::MAX).min(extent.pages);
                    let mut joiner = RunJoiner::default();
                    let mut add = |first, pages| {
                        push_joined(pending, Candidate { first, pages, probability, due_us: Some(due_us), expert });
                    };
                    for (block, mask) in block_masks(extent.first, pages) {
                        let fresh = if repeat_s == u32::MAX {
                            ledger.propose(block, mask, probability, (expert, Class::NONE), calibration)
                        } else {
                            let new = mask & !ledger.renew(block, mask, probability, repeat_s);
                            ledger.propose(block, new, probability, (expert, Class::NONE), calibration);
                            new
                        };
                        joiner.push(block, fresh, &mut add);
                    }
                    joiner.flush(&mut add);
                });
            }
        }
    }

    /// Takes in what became of a prefetch.
    pub fn outcome(&mut self, outcome: &Outcome) {
        let Some(pages) = self.clip(outcome.first, outcome.pages.min(MAX_READ_PAGES)) else { return };
        let (index, count) = (outcome.expert.index(), u64::from(pages));
        if outcome.used {
            self.stats.used_pages[index] += count;
            if outcome.late {
                self.stats.late_pages[index] += count;
            }
            return;
        }
        self.stats.unused_pages[index] += count;
        for (block, mask) in block_masks(outcome.first, pages) {
            self.ledger.forget(block, mask, &mut self.calibration);
        }
        for vm in self.vms.values_mut() {
            let phase = vm.phase.as_mut().and_then(|active| active.replay.as_mut());
            for replay in phase.into_iter().chain(vm.burst.replays()) {
                replay.lost(outcome.first, pages);
            }
        }
    }

    #[must_use]
    pub fn stats(&self) -> AccessStats {
        self.stats
    }

    /// Heap memory held, in bytes: the tables (`64 × markov_contexts + 48 × recent_blocks`), the sets (28 bytes an
    /// extent), and each VM's recording and replay.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let sets: usize = self.phases.iter().map(|stored| stored.set.memory_bytes()).sum();
        let vms: usize = self.vms.values().map(|vm| vm.memory_bytes()).sum();
        sets + vms
            + self.bursts.memory_bytes()
            + self.markov.memory_bytes()
            + self.ledger.memory_bytes()
            + self.pending.capacity() * size_of::<Candidate>()
            + self.proposals.capacity() * size_of::<Proposal>()
    }

    /// Phase sets and bursts as they would be if all running phases and bursts ended now.
    pub(crate) fn learned(&self) -> (Vec<StoredSet>, BurstSets) {
        let (mut phases, mut uses, mut bursts) = (self.phases.clone(), self.uses, self.bursts.clone());
        for vm in self.vms.values() {
            if let Some(active) = &vm.phase {
                vm::learn_phase(active, &mut phases, &mut uses, self.config.phase_sets);
            }
            bursts.learn_open(&vm.burst);
        }
        (phases, bursts)
    }
}

/// Adds a candidate, as part of the last one if it continues it.
fn push_joined(pending: &mut Vec<Candidate>, candidate: Candidate) {
    if candidate.pages == 0 {
        return;
    }
    if let Some(last) = pending.last_mut()
        && last.first + u64::from(last.pages) == candidate.first
        && last.expert == candidate.expert
        && last.pages + candidate.pages <= MAX_CANDIDATE_PAGES
        && (last.probability - candidate.probability).abs() <= JOIN_PROBABILITY
        && last.due_us.is_some() == candidate.due_us.is_some()
    {
        // The joined candidate is as likely as its parts on average.
        let (a, b) = (last.pages as f32, candidate.pages as f32);
        last.probability = (last.probability * a + candidate.probability * b) / (a + b);
        last.pages += candidate.pages;
        return;
    }
    pending.push(candidate);
}

/// Moves `pending` to `out`; a page in several candidates stays in the likeliest.
fn keep_best(pending: &mut [Candidate], out: &mut Vec<Candidate>) {
    let mut order: Vec<u32> = (0..pending.len() as u32).collect();
    order.sort_by(|&a, &b| pending[b as usize].probability.total_cmp(&pending[a as usize].probability));
    let mut taken: FxHashMap<u64, u16> = FxHashMap::default();
    let mut kept: Vec<(u32, Candidate)> = Vec::with_capacity(pending.len());
    for index in order {
        let candidate = pending[index as usize];
        let mut joiner = RunJoiner::default();
        let mut add = |first, pages| kept.push((index, Candidate { first, pages, ..candidate }));
        for (block, mask) in block_masks(candidate.first, candidate.pages) {
            let held = taken.entry(block).or_insert(0);
            joiner.push(block, mask & !*held, &mut add);
            *held |= mask;
        }
        joiner.flush(&mut add);
    }
    kept.sort_by_key(|(index, candidate)| (*index, candidate.first));
    out.extend(kept.into_iter().map(|(_, candidate)| candidate));
}
