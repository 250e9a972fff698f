//! Which pages are pushed out, and how fast: a controller in the manner of senpai (Weiner et al., "TMO: Transparent Memory
//! Offloading in Datacenters", ASPLOS 2022), without I/O.
//!
//! Every few seconds a small step is taken while nobody waits for memory, the larger the less anybody does. When more comes
//! back in a minute than [`REFAULTS`] of what is in memory, pushing stops at once, and for longer each time. A machine keeps its
//! floor whatever is idle, and what a program needs that runs or is due.
//!
//! Nobody tells the host when a guest last touched a page that is in memory, so that is tried: of a chunk of 256 KiB two pages,
//! its *witnesses*, go first. If one comes back the chunk is in use, and left alone for twice as long each time. If both are still
//! out two minutes later the rest is made cold (the kernel takes it when it needs memory), and pushed out with a later step if
//! they still are. Trials are paid from half of what may come back: the more of them have failed, the fewer there are.
//!
//! Times are told in steps; with the step of six seconds ten of them are a minute.

mod chunk;
mod hold;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use prestage_integration::memory::helper::protocol::Moved;
use prestage_integration::memory::{MemoryError, PageState, Push, Region, Residency, Span};

use chunk::{CHUNK, Chunk, Stage, frames};
pub(super) use hold::Hold;

/// Largest step, as a share of what is in memory; and where the kernel does not tell of pressure.
const STEP: f64 = 0.01;
const BLIND_STEP: f64 = 0.0025;
/// Share of what is in memory that may come back in a minute, and of that what trials may cost.
const REFAULTS: f64 = 0.002;
const FOR_TRIALS: f64 = 0.5;
/// Trials fail at least this often, as far as the number of trials goes.
const LEAST_FAIL: f64 = 1.0 / 16.0;
/// Steps of a minute.
const MINUTE: u64 = 10;
/// Steps that witnesses must stay out, and that a chunk is cold before it is pushed.
const TRIAL: u64 = 20;
const COLD: u64 = 5;
/// Pushing stops for so many steps, doubled up to the other each time that it was wrong again.
const BACK_OFF: u64 = 10;
const BACK_OFF_MOST: u64 = 600;
/// Share of swap that is left to the kernel.
const SWAP_LEFT: f64 = 0.1;
/// So many orders in a row of whose pages most stay are not the guest's doing, which may take some back at once.
const KEPT: u32 = 3;
/// Pages of an order: bringing in waits for no more than one, a few milliseconds.
const ORDER: u64 = 512;
/// Pages of a look for what could be tried.
const LOOK_PAGES: u64 = 1 << 15;
/// All of a machine is counted so rarely that it takes this share of a processor, at this many microseconds a page.
const COUNT_SHARE: f64 = 0.005;
const COUNT_US_A_PAGE: f64 = 0.02;

/// What an operator allows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct IdleSettings {
    /// Share of the memory that a machine uses that stays in memory.
    pub(crate) floor: f64,
    /// Share of time that somebody may wait for memory.
    pub(crate) pressure: f64,
    /// Time between two steps.
    pub(crate) every_us: u64,
}

/// What else there is to a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Limits {
    /// Share of time that somebody waited for memory; `None`: this kernel does not tell.
    pub(super) pressure: Option<f64>,
    /// Pages that swap can take, and all of it.
    pub(super) swap: (u64, u64),
}

/// Pages since the machine was first seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct IdleCounts {
    pub(super) pushed: u64,
    pub(super) refaulted: u64,
    pub(super) backed_off: u64,
    /// Orders.
    pub(super) failed: u64,
    /// CPU time of the helper, in microseconds.
    pub(super) cpu_us: u64,
}

#[derive(Debug, Clone)]
struct Order {
    how: Push,
    spans: Vec<Span>,
    /// Chunks, not witnesses: what of them stays says that the kernel keeps it.
    whole: bool,
    ticket: Option<u64>,
    /// Pages that could go, once it is done.
    eligible: Option<u64>,
}

/// What a look is for, in the order of its spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// Two spans of a page: are they still out?
    Witnesses,
    /// The whole chunk: is there anything to push?
    Candidate,
}

/// See the module's head. Pages are guest frames, times microseconds of one clock.
#[derive(Debug)]
pub(super) struct Idle {
    /// By their first frame.
    chunks: Vec<Chunk>,
    /// Chunks by when their trial ends, and when they have been cold for long enough.
    trials: VecDeque<(u64, usize)>,
    cold: VecDeque<(u64, usize)>,
    looked: Vec<(Why, usize)>,
    /// Of the last step; the first of them may be sent.
    orders: VecDeque<Order>,
    residency: Residency,
    counted_us: Option<u64>,
    every_us: u64,
    born_us: u64,
    step_us: u64,
    /// Pages that may be pushed and tried, saved up.
    credit: f64,
    tries: f64,
    /// Share of trials that failed.
    fail: f64,
    /// Pages that came back within the last minute, by time.
    back: VecDeque<(u64, u64)>,
    stopped_us: u64,
    pause: u64,
    hand: usize,
    /// Orders in a row whose pages stayed.
    kept: u32,
    hold: Option<Hold>,
    counts: IdleCounts,
}

impl Idle {
    /// Of a machine with its memory there: nothing of it is known.
    pub(super) fn new(regions: &[Region], now_us: u64) -> Self {
        let mut idle = Self {
            chunks: Vec::new(),
            trials: VecDeque::new(),
            cold: VecDeque::new(),
            looked: Vec::new(),
            orders: VecDeque::new(),
            residency: Residency::default(),
            counted_us: None,
            every_us: 6_000_000,
            born_us: now_us,
            step_us: now_us,
            credit: 0.0,
            tries: 0.0,
            fail: 0.5,
            back: VecDeque::new(),
            stopped_us: 0,
            pause: BACK_OFF,
            hand: 0,
            kept: 0,
            hold: Some(Hold::Young),
            counts: IdleCounts::default(),
        };
        idle.resize(regions);
        idle
    }

    /// The machine's memory is there now: what is known of what stays is kept.
    pub(super) fn resize(&mut self, regions: &[Region]) {
        let before = std::mem::take(&mut self.chunks);
        for region in regions {
            let end = region.frame.saturating_add(region.pages);
            for cut in region.frame / CHUNK..end.div_ceil(CHUNK) {
                let (first, until) = ((cut * CHUNK).max(region.frame), ((cut + 1) * CHUNK).min(end));
                let span = Span { frame: first, pages: (until - first) as u32 };
                let known = before.binary_search_by_key(&first, |chunk| chunk.span.frame).ok();
                let known = known.and_then(|at| before.get(at)).filter(|known| known.span == span);
                self.chunks.push(known.map_or(Chunk::new(span), |known| Chunk { stage: Stage::Rest, ..*known }));
            }
        }
        self.chunks.sort_by_key(|chunk| chunk.span.frame);
        (self.counted_us, self.hand) = (None, 0);
        self.interrupt();
    }

    /// What was under way is given up: the helper has ended, the machine is not watched, or nothing is to be pushed.
    pub(super) fn interrupt(&mut self) {
        self.orders.clear();
        let looked = self.looked.drain(..).map(|(_, at)| at);
        for at in looked.chain(self.trials.drain(..).chain(self.cold.drain(..)).map(|(_, at)| at)) {
            if let Some(chunk) = self.chunks.get_mut(at) {
                chunk.stage = Stage::Rest;
            }
        }
    }

    pub(super) fn counts(&self) -> IdleCounts {
        self.counts
    }

    /// Why nothing was pushed with the last step, and for how long yet (µs) if that is known.
    pub(super) fn hold(&self, now_us: u64) -> Option<(&Hold, Option<u64>)> {
        let left = self.stopped_us.saturating_sub(now_us);
        self.hold.as_ref().map(|hold| (hold, (left > 0).then_some(left)))
    }

    /// The guest touched a page that was not in memory; told of one fault in `weight`.
    pub(super) fn came_in(&mut self, frame: u64, weight: u64, now_us: u64) {
        let every_us = self.every_us;
        let Some(at) = self.chunks.partition_point(|chunk| chunk.span.frame <= frame).checked_sub(1) else { return };
        let chunk = self.chunks.get_mut(at).filter(|chunk| frames(chunk.span).contains(&frame));
        let Some(chunk) = chunk else { return };
        chunk.at_us = now_us;
        // Some signals tell of first touches as well.
        if !chunk.out {
            return;
        }
        let (tried, pushed) = (chunk.stage != Stage::Rest, chunk.pushed);
        chunk.spare(now_us, every_us);
        if tried {
            self.judged(true);
        }
        self.counts.refaulted += if pushed { weight } else { 0 };
        self.heard(weight, now_us);
    }

    /// The result of a trial.
    fn judged(&mut self, failed: bool) {
        self.fail += (f64::from(u8::from(failed)) - self.fail) / 64.0;
    }

    /// Pages came back, or may have: faults that were lost count as well. Stops where it is too much.
    pub(super) fn heard(&mut self, pages: u64, now_us: u64) {
        match self.back.back_mut() {
            // in tenths of a minute: faults may come by the million
            Some((at_us, back)) if now_us.saturating_sub(*at_us) < self.every_us => *back += pages,
            _ => self.back.push_back((now_us, pages)),
        }
        self.weigh(now_us);
    }

    fn weigh(&mut self, now_us: u64) {
        let minute_us = MINUTE * self.every_us;
        while self.back.front().is_some_and(|(at_us, _)| now_us.saturating_sub(*at_us) > minute_us) {
            self.back.pop_front();
        }
        let minute: u64 = self.back.iter().map(|(_, back)| back).sum();
        let most = (self.residency.present + self.residency.cached) as f64 * REFAULTS;
        if self.counted_us.is_some() && minute as f64 > most && now_us >= self.stopped_us {
            self.counts.backed_off += 1;
            self.back_off(Hold::Refaults, now_us);
        }
    }

    fn back_off(&mut self, hold: Hold, now_us: u64) {
        if now_us.saturating_sub(self.stopped_us) > BACK_OFF_MOST * self.every_us {
            self.pause = BACK_OFF;
        }
        self.hold = Some(hold);
        self.stopped_us = now_us + self.pause * self.every_us;
        self.pause = (self.pause * 2).min(BACK_OFF_MOST);
        // what was sent cannot be taken back, and is a few milliseconds' work
        self.orders.truncate(usize::from(self.is_sent()));
        (self.credit, self.tries) = (0.0, 0.0);
    }

    fn is_sent(&self) -> bool {
        self.orders.front().is_some_and(|order| order.ticket.is_some())
    }

    /// Whether all of the machine's memory is to be counted before the step that is due; see [`Idle::counted`].
    pub(super) fn wants_count(&mut self, settings: &IdleSettings, now_us: u64) -> bool {
        self.every_us = settings.every_us;
        if !self.is_due(now_us) {
            return false;
        }
        let pages: u64 = self.chunks.iter().map(|chunk| u64::from(chunk.span.pages)).sum();
        let pace_us = (pages as f64 * COUNT_US_A_PAGE / COUNT_SHARE) as u64;
        self.counted_us.is_none_or(|at_us| now_us.saturating_sub(at_us) >= pace_us)
    }

    pub(super) fn counted(&mut self, residency: Residency, now_us: u64) {
        (self.residency, self.counted_us) = (residency, Some(now_us));
    }

    fn is_due(&self, now_us: u64) -> bool {
        now_us.saturating_sub(self.step_us) >= self.every_us && self.orders.is_empty()
    }

    /// Whether a step is due: what is to be looked at for it.
    pub(super) fn look(&mut self, now_us: u64) -> Option<Vec<Span>> {
        if !self.is_due(now_us) {
            return None;
        }
        self.step_us = now_us;
        self.weigh(now_us);
        if now_us.saturating_sub(self.born_us) < MINUTE * self.every_us || now_us < self.stopped_us {
            return None;
        }
        self.looked.clear();
        let mut spans = Vec::new();
        for (queue, stage) in [(&mut self.trials, Stage::Trial), (&mut self.cold, Stage::Cold)] {
            while let Some((_, at)) = queue.pop_front_if(|(due_us, _)| *due_us <= now_us) {
                let chunk = self.chunks.get(at).filter(|chunk| chunk.stage == stage);
                let Some(chunk) = chunk else { continue };
                spans.extend(chunk.witnesses());
                self.looked.push((Why::Witnesses, at));
            }
        }
        let mut pages = 0;
        for at in self.oldest(now_us) {
            let Some(chunk) = self.chunks.get(at).filter(|_| pages < LOOK_PAGES) else { break };
            pages += u64::from(chunk.span.pages);
            spans.push(chunk.span);
            self.looked.push((Why::Candidate, at));
        }
        Some(spans)
    }

    /// Chunks that stayed out and cannot go on now: they are asked again with the next step.
    fn again(&mut self, out: Vec<usize>, now_us: u64) {
        for at in out.into_iter().rev() {
            match self.chunks.get(at).map(|chunk| chunk.stage) {
                Some(Stage::Trial) => self.trials.push_front((now_us, at)),
                Some(Stage::Cold) => self.cold.push_front((now_us, at)),
                _ => {}
            }
        }
    }

    /// What could be tried, those first of which nothing has come in for longest; of a part of all chunks that moves on.
    fn oldest(&mut self, now_us: u64) -> Vec<usize> {
        const PART: usize = 1 << 12;
        let all = self.chunks.len();
        let (from, part) = (self.hand, PART.min(all));
        self.hand = (from + part).checked_rem(all).unwrap_or(0);
        let mut part: Vec<usize> = (0..part).map(|at| (from + at) % all).collect();
        let free = |chunk: &Chunk| chunk.stage == Stage::Rest && chunk.spared_us <= now_us;
        part.retain(|at| self.chunks.get(*at).is_some_and(free));
        part.sort_by_key(|at| self.chunks.get(*at).map_or(0, |chunk| chunk.at_us));
        part
    }

    /// Takes a step, with the states of what [`Idle::look`] named. `needed`: a span that must stay.
    pub(super) fn step(
        &mut self,
        states: &[PageState],
        limits: Limits,
        settings: &IdleSettings,
        needed: impl Fn(Span) -> bool,
        now_us: u64,
    ) {
        let looked = std::mem::take(&mut self.looked);
        let (out, candidates) = self.witnesses(&looked, states, now_us);
        if now_us < self.stopped_us {
            // too many witnesses were back
            return self.again(out, now_us);
        }
        let present = self.residency.present + self.residency.cached;
        let floor = (present + self.residency.swapped) as f64 * settings.floor;
        let above = present.saturating_sub(floor as u64);
        let share = match limits.pressure {
            None => BLIND_STEP,
            Some(pressure) => STEP * (1.0 - pressure / settings.pressure.max(1e-6)).clamp(0.0, 1.0),
        };
        let (free, all) = limits.swap;
        self.hold = match () {
            () if all == 0 => Some(Hold::NoSwap),
            () if (free as f64) < all as f64 * SWAP_LEFT => Some(Hold::SwapFull),
            () if above < CHUNK => Some(Hold::Floor),
            () if share <= 0.0 => Some(Hold::Pressure),
            () => None,
        };
        if self.hold.is_some() {
            return self.again(out, now_us);
        }
        let most = present as f64 * share;
        self.credit = (self.credit + most).min((2.0 * most).max(2.0 * CHUNK as f64)).min(above as f64);
        let pay = present as f64 * REFAULTS * FOR_TRIALS / MINUTE as f64 / self.fail.max(LEAST_FAIL);
        self.tries = (self.tries + pay).min((2.0 * most / CHUNK as f64).max(2.0));

        let (mut whole, mut cold, mut tried) = (Vec::new(), Vec::new(), Vec::new());
        for at in out {
            let Some(chunk) = self.chunks.get_mut(at) else { continue };
            let pages = f64::from(chunk.span.pages);
            match chunk.stage {
                _ if needed(chunk.span) => chunk.stage = Stage::Rest,
                Stage::Trial => {
                    chunk.stage = Stage::Cold;
                    self.cold.push_back((now_us + COLD * settings.every_us, at));
                    cold.push(chunk.span);
                }
                Stage::Cold if self.credit >= pages => {
                    self.credit -= pages;
                    (chunk.stage, chunk.wrong) = (Stage::Rest, 0);
                    (chunk.at_us, chunk.out, chunk.pushed) = (now_us, true, true);
                    whole.push(chunk.span);
                }
                Stage::Cold => self.cold.push_back((now_us, at)),
                Stage::Rest => {}
            }
        }
        let waiting = (self.trials.len() + self.cold.len()) as u64 * CHUNK;
        let mut room = above.saturating_sub(waiting) / CHUNK;
        for (at, states) in candidates {
            if self.tries < 2.0 || room == 0 {
                break;
            }
            let Some(chunk) = self.chunks.get_mut(at) else { continue };
            chunk.at_us = now_us;
            chunk.out = states.contains(&PageState::Swapped);
            chunk.pushed &= chunk.out;
            if needed(chunk.span) || !chunk.choose(states, now_us) {
                continue;
            }
            (chunk.stage, chunk.out, chunk.pushed) = (Stage::Trial, true, true);
            self.trials.push_back((now_us + TRIAL * settings.every_us, at));
            tried.extend(chunk.witnesses());
            self.tries -= 2.0;
            room -= 1;
        }
        if tried.is_empty() && self.trials.is_empty() && self.cold.is_empty() && whole.is_empty() {
            self.hold = Some(Hold::InUse);
        }
        for (how, spans, is_whole) in
            [(Push::PageOut, whole, true), (Push::PageOut, tried, false), (Push::Cold, cold, true)]
        {
            self.order(how, spans, is_whole);
        }
    }

    /// What has become of the witnesses that were looked at: chunks whose are out, and candidates with their states.
    fn witnesses<'a>(
        &mut self,
        looked: &[(Why, usize)],
        mut states: &'a [PageState],
        now_us: u64,
    ) -> (Vec<usize>, Vec<(usize, &'a [PageState])>) {
        let (mut out, mut candidates) = (Vec::new(), Vec::new());
        for (why, at) in looked {
            let Some(chunk) = self.chunks.get_mut(*at) else { continue };
            let pages = if *why == Why::Witnesses { chunk.witnesses.len() } else { chunk.span.pages as usize };
            let Some((of_chunk, rest)) = states.split_at_checked(pages) else { break };
            states = rest;
            if *why == Why::Candidate {
                candidates.push((*at, of_chunk));
                continue;
            }
            // Those whose faults were told are not looked at any more.
            let back = of_chunk.iter().filter(|state| **state == PageState::Present).count() as u64;
            let tried = chunk.stage == Stage::Trial;
            if back > 0 {
                chunk.spare(now_us, self.every_us);
                chunk.at_us = now_us;
            } else {
                out.push(*at);
            }
            if back > 0 || tried {
                self.judged(back > 0);
            }
            if back > 0 {
                self.counts.refaulted += back;
                self.heard(back, now_us);
            }
        }
        (out, candidates)
    }

    fn order(&mut self, how: Push, spans: Vec<Span>, whole: bool) {
        let (mut part, mut pages) = (Vec::new(), 0);
        let mut queue = |spans| self.orders.push_back(Order { how, spans, whole, ticket: None, eligible: None });
        for span in spans {
            part.push(span);
            pages += u64::from(span.pages);
            if pages >= ORDER {
                queue(std::mem::take(&mut part));
                pages = 0;
            }
        }
        if !part.is_empty() {
            queue(part);
        }
    }

    /// What is to be ordered next, one at a time.
    pub(super) fn next(&self) -> Option<(Push, Vec<Span>)> {
        let order = self.orders.front().filter(|order| order.ticket.is_none())?;
        Some((order.how, order.spans.clone()))
    }

    /// What [`Idle::next`] named was sent.
    pub(super) fn sent(&mut self, ticket: u64) {
        if let Some(order) = self.orders.front_mut() {
            order.ticket = Some(ticket);
        }
    }

    /// The helper has too much to do: what was left of the step is left out.
    pub(super) fn not_sent(&mut self) {
        self.orders.clear();
    }

    /// An order is done, or failed. False: it is none of this machine's.
    pub(super) fn moved(&mut self, ticket: u64, moved: &Result<Moved, MemoryError>, now_us: u64) -> bool {
        let Some(order) = self.orders.front_mut().filter(|order| order.ticket == Some(ticket)) else { return false };
        match moved {
            Ok(moved) => {
                self.counts.cpu_us += moved.cpu_us;
                order.eligible = Some(moved.eligible);
                if order.how == Push::Cold {
                    self.orders.pop_front();
                }
            }
            // Memory was unplugged: where it lies now is asked for.
            Err(MemoryError::NoSuchMemory { .. }) => self.orders.clear(),
            Err(error) => self.failed(error, now_us),
        }
        true
    }

    /// It cannot be done: tried again later.
    pub(super) fn failed(&mut self, error: &MemoryError, now_us: u64) {
        self.counts.failed += 1;
        self.orders.clear();
        self.back_off(Hold::Failed(error.clone()), now_us);
    }

    /// Whether an order is done whose pages are to be looked at: did they go?
    pub(super) fn check(&self) -> Option<Vec<Span>> {
        let order = self.orders.front().filter(|order| order.eligible.is_some())?;
        Some(order.spans.clone())
    }

    /// The states of what [`Idle::check`] named.
    pub(super) fn checked(&mut self, states: &[PageState], now_us: u64) {
        let Some(order) = self.orders.pop_front() else { return };
        let could = order.eligible.unwrap_or(0);
        let stayed = |state: &&PageState| matches!(state, PageState::Present | PageState::Cached);
        let gone = could.saturating_sub(states.iter().filter(stayed).count() as u64);
        let gone = gone.min(states.iter().filter(|state| **state == PageState::Swapped).count() as u64);
        self.counts.pushed += gone;
        self.residency.present = self.residency.present.saturating_sub(gone);
        self.residency.swapped += gone;
        if order.whole && could > 0 {
            self.kept = if gone * 2 < could { self.kept + 1 } else { 0 };
        }
        if self.kept >= KEPT {
            self.counts.failed += u64::from(std::mem::take(&mut self.kept));
            self.back_off(Hold::Kept, now_us);
        }
    }
}
