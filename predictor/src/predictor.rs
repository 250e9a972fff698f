//! The access predictor of one storage: feeds every expert, weighs them, and hands out candidates.
//!
//! Who is believed: a first-touch set that proved right in this run knows what follows a read it foresaw, so the other
//! experts keep silent after such a read. Everywhere else the hybrid weighs what its experts name; of several proposals
//! for a page the best one is handed out.
//!
//! Memory is bounded (see [`AccessConfig`]): the tables by their size, a VM by its recording (at most about 40 bytes a
//! page at worst, 2 typically).

mod explain;
mod recognise;
mod vm;

use crate::access::{Access, Candidate, Expert, MAX_PAGES, MAX_READ_PAGES, Op, Outcome, Phase};
use crate::experts::ExpertSet;
use crate::hybrid::{Hybrid, HybridConfig, Moment};
use crate::lstm::{Token, Weights};
use crate::pageset::{RunJoiner, block_masks};
use crate::phase::PhaseSet;
use crate::record::Recording;
use crate::replay::{Replay, Window};
use recognise::Suspicion;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use vm::{ActivePhase, Vm, close_phase};

/// Probability from which on a prefetch is worth it by default: a store that takes milliseconds for a read is asked seven
/// times in vain for less than one miss costs.
pub const DEFAULT_THRESHOLD: f32 = 0.125;
/// Pages of one write or discard that are noted (256 MiB): a guest may discard a whole disk in one request.
const MAX_WRITE_PAGES: u32 = 65_536;
/// Pages of a candidate, at most (512 KiB).
const MAX_CANDIDATE_PAGES: u32 = 128;
/// A phase's start proposes its set anew, except what was handled this recently (another VM's start, a moment
/// ago), in tenths of a second.
const PHASE_REPEAT_DS: u32 = 300;
/// Room for what one read raises, so that nothing is allocated for it: 64 proposals are weighed, each of a block, whose 16
/// pages make 8 runs at most.
const PENDING_ROOM: usize = 512;
/// Neighbouring proposals of one expert become one candidate if their probabilities differ by no more than this.
const JOIN_PROBABILITY: f32 = 0.1;

/// Settings of an [`AccessPredictor`]; the defaults suit a storage of any size.
#[derive(Clone, Debug)]
pub struct AccessConfig {
    /// Size of the storage in pages; nothing beyond is proposed. Default: unbounded.
    pub size_pages: u64,
    /// Candidates less likely than this are not handed out. Default 0.125.
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
    /// Reads remembered in order, 12 bytes each. Default 65536 (768 KiB).
    pub log_reads: usize,
    /// Markov contexts over 64 KiB blocks, 28 bytes each. Default 4096 (112 KiB).
    pub markov_contexts: usize,
    /// 64 KiB blocks of which touches and proposals are remembered, 28 bytes each. Default 8192 (224 KiB).
    pub recent_blocks: usize,
    /// Predictions that wait for their label, 64 bytes each, at most 65,534. Default 11264 (704 KiB).
    pub predictions: usize,
    /// Pages of cache that the storage can expect to have: a prediction must come true before three fifths as many came
    /// in, and within a fifth as many
    /// reads (64 to 2048), and no stream window is larger than a sixteenth. Default 1 GiB.
    pub cache_pages: u64,
    /// Whether the cache takes in what a guest writes and it did not hold. Default no, as the daemon's.
    pub writes_cached: bool,
    /// Experts that may propose; the others learn and keep silent. Default all.
    pub experts: ExpertSet,
    /// Only the LSTM's word counts: the other experts name pages and say nothing of how likely they are. To measure what it
    /// is worth by itself. Default no.
    pub model_alone: bool,
}

impl Default for AccessConfig {
    fn default() -> Self {
        Self {
            size_pages: MAX_PAGES,
            min_probability: DEFAULT_THRESHOLD,
            max_window_bytes: 512 << 10,
            phase_window_bytes: 256 << 20,
            phase_horizon: Duration::from_secs(120),
            phase_duration: Duration::from_secs(15 * 60),
            phase_bytes: 512 << 20,
            phase_sets: 64,
            log_reads: 65_536,
            markov_contexts: 4096,
            recent_blocks: 8192,
            predictions: 11_264,
            cache_pages: 1 << 18,
            writes_cached: false,
            experts: ExpertSet::ALL,
            model_alone: false,
        }
    }
}

impl AccessConfig {
    fn phase_window(&self) -> Window {
        Window {
            pages: self.phase_window_bytes / crate::PAGE_BYTES,
            horizon_ms: u32::try_from(self.phase_horizon.as_millis()).unwrap_or(u32::MAX),
        }
    }

    fn phase_limit_pages(&self) -> u64 {
        (self.phase_bytes / crate::PAGE_BYTES).max(1)
    }

    fn duration_us(&self) -> u64 {
        u64::try_from(self.phase_duration.as_micros()).unwrap_or(u64::MAX)
    }

    pub(crate) fn hybrid(&self) -> HybridConfig {
        HybridConfig {
            blocks: self.recent_blocks,
            log_reads: self.log_reads,
            contexts: self.markov_contexts,
            predictions: self.predictions,
            window: (self.cache_pages / 5).clamp(64, 2048) as u32,
            max_window_pages: (self.max_window_bytes / crate::PAGE_BYTES).min(self.cache_pages / 16).max(1),
            experts: self.experts,
            cache_pages: self.cache_pages,
            writes_cached: self.writes_cached,
            model_alone: self.model_alone,
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
    pub proposed_pages: [u64; Expert::ALL.len()],
    /// By [`Expert::index`], from outcomes: read by a guest.
    pub used_pages: [u64; Expert::ALL.len()],
    /// Part of `used_pages`: the guest had to wait.
    pub late_pages: [u64; Expert::ALL.len()],
    /// By [`Expert::index`], from outcomes: lost before any read.
    pub unused_pages: [u64; Expert::ALL.len()],
}

/// How well probabilities were kept: settled predictions against what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CalibrationStats {
    pub settled: f64,
    /// Expected calibration error (Naeini et al., AAAI 2015), 20 bins of equal width.
    pub error: f64,
    /// Mean squared error.
    pub brier: f64,
    /// Mean code length of the outcomes, bits a prediction.
    pub bits: f64,
    /// Sum of what happened less what was said: 0 on average while the probabilities hold.
    pub surplus: f64,
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
    pub(crate) hybrid: Hybrid,
    vms: BTreeMap<u64, Box<Vm>>,
    model: Option<Arc<Weights>>,
    listening: bool,
    pending: Vec<Candidate>,
    suspicions: Vec<Suspicion>,
    stats: AccessStats,
}

impl AccessPredictor {
    /// A predictor that knows nothing yet.
    #[must_use]
    pub fn new(config: AccessConfig) -> Self {
        let config = AccessConfig { size_pages: config.size_pages.min(MAX_PAGES), ..config };
        Self {
            hybrid: Hybrid::new(config.hybrid()),
            phases: Vec::new(),
            uses: 0,
            vms: BTreeMap::new(),
            model: None,
            listening: false,
            pending: Vec::with_capacity(PENDING_ROOM),
            suspicions: Vec::new(),
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
        self.begin(vm, phase, at_us, true);
    }

    /// As [`AccessPredictor::phase_start`], of a phase that was recognised while it ran, or that is not seen in full: its set is
    /// raised, and nothing is learned of it when it ends.
    pub fn recall(&mut self, vm: u64, phase: Phase, at_us: u64) {
        self.begin(vm, phase, at_us, false);
    }

    fn begin(&mut self, vm: u64, phase: Phase, at_us: u64, learned: bool) {
        self.phase_end(vm, at_us);
        let hybrid = &mut self.hybrid;
        let vm = self.vms.entry(vm).or_insert_with(|| Box::new(Vm::new(hybrid.trail())));
        if phase == Phase::Boot {
            // A new guest: its streams and place have nothing to do with the one before.
            **vm = Vm::new(hybrid.trail());
        }
        self.uses += 1;
        let plan = self.phases.iter_mut().find(|stored| stored.phase == phase).map(|stored| {
            stored.used = self.uses;
            std::sync::Arc::clone(stored.set.plan())
        });
        let recording = Recording::new(at_us, self.config.phase_limit_pages());
        let replay = plan.map(|plan| Replay::new(plan, self.config.phase_window(), at_us));
        vm.phase = Some(ActivePhase { phase, recording, replay, learned });
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

    /// A VM is gone: its phase is learned, its state dropped.
    pub fn vm_forget(&mut self, vm: u64) {
        self.phase_end(vm, 0);
        self.vms.remove(&vm);
    }

    /// The cache lost what it held (dropped, or emptied): everything may be proposed again.
    pub fn forget_resident(&mut self) {
        self.hybrid.clear_cached();
    }

    /// Takes in one request. Pages beyond the storage's size are ignored.
    pub fn observe(&mut self, access: &Access) {
        let most = if access.op == Op::Read { MAX_READ_PAGES } else { MAX_WRITE_PAGES };
        let left = self.config.size_pages.saturating_sub(access.first);
        let pages = u32::try_from(left).unwrap_or(u32::MAX).min(access.pages).min(most);
        if pages == 0 {
            return;
        }
        let hybrid = &mut self.hybrid;
        let vm = self.vms.entry(access.vm).or_insert_with(|| Box::new(Vm::new(hybrid.trail())));
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
        if let Some(active) = self.vms.get_mut(&vm).and_then(|vm| vm.phase.as_mut()) {
            active.recording.write(first, pages, at_us);
        }
        // A large discard would wash everything else out of the table of blocks.
        for (block, mask) in block_masks(first, pages.min(MAX_READ_PAGES)) {
            self.hybrid.written(block, mask);
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
            None => false,
        };
        let known = known && self.config.experts.contains(Expert::Phase);
        let moment = Moment {
            at_us,
            size_pages: self.config.size_pages,
            floor: self.config.min_probability,
            silent: known,
            tokens: self.model.is_some() || self.listening,
        };
        self.hybrid.read(&mut vm.trail, first, pages, &moment, &mut self.pending);
    }

    /// Pages that a set named were found read, nobody knows when: they count for the set of the phase that runs, and say nothing
    /// of what follows what.
    pub fn found(&mut self, vm: u64, first: u64, pages: u32, at_us: u64) {
        let Some(pages) = self.clip(first, pages.min(MAX_READ_PAGES)) else { return };
        if let Some(active) = self.vms.get_mut(&vm).and_then(|vm| vm.phase.as_mut()) {
            active.recording.read(first, pages, at_us);
            if let Some(replay) = &mut active.replay {
                replay.read(first, pages, at_us);
            }
        }
    }

    /// Pages of a range that lie on the storage.
    fn clip(&self, first: u64, pages: u32) -> Option<u32> {
        let left = self.config.size_pages.checked_sub(first)?;
        Some(u32::try_from(left).unwrap_or(u32::MAX).min(pages)).filter(|pages| *pages > 0)
    }

    /// Adds the candidates raised since the last call to `out`, in the order they were raised (a set's in order of
    /// expected use), each page at most once. Call it after every batch of observed accesses and after `phase_start`;
    /// calling it now and then without accesses lets a running phase go on with the clock.
    pub fn predict(&mut self, at_us: u64, out: &mut Vec<Candidate>) {
        self.propose_from_sets(at_us);
        let from = out.len();
        // No page is in two of them: what was handed out counts as on its way.
        out.append(&mut self.pending);
        self.stats.candidates += (out.len() - from) as u64;
        for candidate in &out[from..] {
            self.stats.proposed_pages[candidate.expert.index()] += u64::from(candidate.pages);
        }
    }

    fn propose_from_sets(&mut self, at_us: u64) {
        if !self.config.experts.contains(Expert::Phase) {
            return;
        }
        let (hybrid, pending) = (&mut self.hybrid, &mut self.pending);
        let (floor, size_pages) = (self.config.min_probability, self.config.size_pages);
        let expert = Expert::Phase;
        for vm in self.vms.values_mut() {
            if let Some(replay) = vm.phase.as_mut().and_then(|active| active.replay.as_mut()) {
                replay.propose(at_us, floor, |extent, probability, due_us| {
                    let Some(left) = size_pages.checked_sub(extent.first) else { return };
                    let pages = u32::try_from(left).unwrap_or(u32::MAX).min(extent.pages);
                    let mut joiner = RunJoiner::default();
                    let mut add = |first, pages| {
                        push_joined(pending, Candidate { first, pages, probability, due_us: Some(due_us), expert });
                    };
                    for (block, mask) in block_masks(extent.first, pages) {
                        let fresh = hybrid.issue(block, mask, PHASE_REPEAT_DS, at_us);
                        joiner.push(block, fresh, &mut add);
                    }
                    joiner.flush(&mut add);
                });
            }
        }
    }

    /// The LSTM that speaks in the mixer from now on; `None`: none does. It starts from an empty state.
    pub fn set_model(&mut self, model: Option<Arc<Weights>>) {
        self.model = model;
        self.vms.values_mut().for_each(|vm| vm.trail.mind.forget());
    }

    /// Whether [`AccessPredictor::foretell`] is to tell tokens without a model too. Otherwise none are made then: they
    /// cost an access some 600 instructions. Who begins to listen hears from the next read on.
    pub fn listen(&mut self, listening: bool) {
        self.listening = listening;
    }

    /// Lets the LSTM read the tokens of the reads since the last call, all VMs in one batch, and say what it expects. Not
    /// part of the hot path: call it when there is time; what it says counts for the eight reads that follow, and the less
    /// the later. Of more than 256 reads between two calls the model misses the oldest. `told` is given each VM's tokens, also
    /// without a model where somebody [listens](AccessPredictor::listen).
    pub fn foretell(&mut self, mut told: impl FnMut(u64, Token)) {
        let Some(model) = &self.model else {
            for (id, vm) in &mut self.vms {
                std::iter::from_fn(|| vm.trail.mind.pop()).for_each(|token| told(*id, token));
            }
            return;
        };
        let mut spoken = false;
        loop {
            let next = self.vms.iter_mut().filter_map(|(id, vm)| {
                let token = vm.trail.mind.pop()?;
                told(*id, token);
                Some((vm.trail.mind.heed(), token))
            });
            let mut batch: Vec<_> = next.collect();
            match batch.as_mut_slice() {
                [] => break,
                [(state, token)] => model.step(state, *token),
                batch => model.step_batch(batch),
            }
            spoken = true;
        }
        if spoken {
            self.vms.values_mut().for_each(|vm| vm.trail.mind.speak(model));
        }
    }

    /// Takes in what became of a prefetch.
    pub fn outcome(&mut self, outcome: &Outcome) {
        let Some(pages) = self.clip(outcome.first, outcome.pages.min(MAX_READ_PAGES)) else { return };
        let (index, count) = (outcome.expert.index(), u64::from(pages));
        if outcome.expert == Expert::Phase {
            for vm in self.vms.values_mut() {
                if let Some(replay) = vm.phase.as_mut().and_then(|active| active.replay.as_mut()) {
                    replay.ended(outcome.first, pages, outcome.used);
                }
            }
        }
        if outcome.used {
            self.stats.used_pages[index] += count;
            if outcome.late {
                self.stats.late_pages[index] += count;
            }
            return;
        }
        self.stats.unused_pages[index] += count;
        for (block, mask) in block_masks(outcome.first, pages) {
            self.hybrid.lost(block, mask);
        }
        for vm in self.vms.values_mut() {
            if let Some(replay) = vm.phase.as_mut().and_then(|active| active.replay.as_mut()) {
                replay.lost(outcome.first, pages);
            }
        }
    }

    /// Pages that were proposed for a VM need not be brought: they are in place already, and their use will not be seen. It
    /// counts neither for nor against those who named them, and what is learned of them stays as it is.
    pub fn in_place(&mut self, vm: u64, first: u64, pages: u32) {
        let Some(pages) = self.clip(first, pages.min(MAX_READ_PAGES)) else { return };
        for (block, mask) in block_masks(first, pages) {
            self.hybrid.written(block, mask);
        }
        if let Some(active) = self.vms.get_mut(&vm).and_then(|vm| vm.phase.as_mut()) {
            active.recording.in_place(first, pages);
            if let Some(replay) = &mut active.replay {
                replay.in_place(first, pages);
            }
        }
    }

    /// Whether what is known of such phases, running or not, names any of the pages with a probability that counts.
    #[must_use]
    pub fn names(&self, of: impl Fn(Phase) -> bool, first: u64, pages: u32) -> bool {
        self.phases.iter().filter(|stored| of(stored.phase)).any(|stored| {
            let plan = stored.set.plan();
            let likely =
                |at: usize| plan.extents().get(at).is_some_and(|e| plan.probability(e) >= self.config.min_probability);
            plan.overlaps(first, pages).any(|(at, ..)| likely(at))
        })
    }

    /// Pages left the cache after they had been used: they may be proposed again.
    pub fn evicted(&mut self, first: u64, pages: u32) {
        let Some(pages) = self.clip(first, pages.min(MAX_READ_PAGES)) else { return };
        for (block, mask) in block_masks(first, pages) {
            self.hybrid.lost(block, mask);
        }
    }

    /// How well the probabilities were kept so far.
    #[must_use]
    pub fn calibration(&self) -> CalibrationStats {
        self.hybrid.calibration()
    }

    #[must_use]
    pub fn stats(&self) -> AccessStats {
        self.stats
    }

    /// Heap memory held, in bytes: the tables (fixed, see [`AccessConfig`]), the sets (28 bytes an extent), and each VM's
    /// runs, recording and replay.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let sets: usize = self.phases.iter().map(|stored| stored.set.memory_bytes()).sum();
        let vms: usize = self.vms.values().map(|vm| vm.memory_bytes()).sum();
        sets + vms + self.hybrid.memory_bytes() + self.pending.capacity() * size_of::<Candidate>()
    }

    /// Phase sets as they would be if all running phases ended now.
    pub(crate) fn learned(&self) -> Vec<StoredSet> {
        let (mut phases, mut uses) = (self.phases.clone(), self.uses);
        for vm in self.vms.values() {
            if let Some(active) = &vm.phase {
                vm::learn_phase(active, &mut phases, &mut uses, self.config.phase_sets);
            }
        }
        phases
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
