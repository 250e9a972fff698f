//! Which pages of a machine are brought in when: candidates in, orders out, without I/O.
//!
//! A page is *wanted* (queued), *on its way* (part of an order), *staged* (brought in, not touched since) or none of these.
//! The guest's touches overtake all of it: what it touched is not brought any more, and what it touched of the staged was
//! of use. Touches come as faults, as far as these are told, and from looks at the staged pages: the kernel calls a page that
//! was brought in swapped until somebody touches it.
//!
//! While the guest is quiet and nothing is left to bring, what a set has staged is *mapped* too, so that its touch is no fault at
//! all. A touch of a mapped page cannot be seen: of sixteen one is left as a witness, and what is seen of it goes for those that
//! ride on it.
//!
//! Nothing goes out beyond what there is room for ([`Stage::allow`]), faster than the rate, or while it is held.

mod parts;

use std::collections::VecDeque;

use parts::{Batch, Order, Page, Place, frames, push_front};
pub(super) use parts::{Hold, StageCounts, push};
use prestage_integration::memory::{PageState, Span};
use prestage_predictor::{Candidate, Expert, Outcome};
use rustc_hash::FxHashMap;

/// Pages of an order, at most: on zram 2 ms of work, so that what the guest does meanwhile counts soon.
pub(super) const ORDER_PAGES: usize = 512;
/// Pages of a set that are brought by address instead of by time, at most: by address costs half. Whoever is about to touch them
/// all has them in some 60 ms, or in as long as the rate allows.
const MOST_WINDOW: usize = 1 << 14;
const WINDOW_S: f64 = 0.06;
/// A guest follows what is brought in when so many times more of its touches find it there than do not.
const FOLLOWS: u64 = 4;
/// Orders under way: the helper has the next one when it is done with one.
pub(super) const ORDERS: usize = 3;
/// Pages that are wanted, on their way or staged, at most (4 GiB): some 24 bytes each.
const PAGES: usize = 1 << 20;
/// Candidates without a time of their own that wait, at most: they are about what comes next, and soon stale.
const URGENT: usize = 2048;
/// Pages of one look.
pub(super) const LOOK_PAGES: usize = 1 << 14;
/// Time between two looks while the guest touches what was staged, and at most.
const LOOK_US: u64 = 40_000;
const LOOK_REST_US: u64 = 1_000_000;
/// Staged pages that nobody has touched for so long are given up.
const GIVEN_UP_US: u64 = 120_000_000;
/// Touches that are weighed before a set is cut short, and how many touches elsewhere make up for one in the set.
const WEIGHED: f64 = 512.0;
const ELSEWHERE: f64 = 5.0;
/// Pages that one witness stands for, itself included.
const WITNESSED: usize = 16;
/// Unused rate is saved up for so long.
const BURST_US: u64 = 50_000;

/// See the module's head. Pages are guest frames, times microseconds of one clock.
#[derive(Debug)]
pub(super) struct Stage {
    pages: FxHashMap<u64, Page>,
    /// What comes next, newest last, and what has its time.
    urgent: VecDeque<Span>,
    planned: VecDeque<Span>,
    /// Pages at the front of what is planned that are in order of address, and how many are to be the next time.
    arranged: usize,
    window: usize,
    /// Touches since then of what was staged, and of what was still to come.
    ahead: u64,
    behind: u64,
    /// Spans whose states were asked for.
    asked: Vec<Span>,
    orders: Vec<Order>,
    staged: VecDeque<Batch>,
    looked: Vec<Batch>,
    /// By witness.
    riders: FxHashMap<u64, Vec<u64>>,
    /// Looks since the guest last touched anything that is known of.
    quiet: u32,
    look_us: u64,
    pause_us: u64,
    /// Pages a second; infinite: no limit.
    rate: f64,
    credit: f64,
    credited_us: u64,
    /// Pages that there is room for, as of the last word about it.
    room: u64,
    hold: Option<Hold>,
    /// Weight of touches in and beside what was foreseen.
    inside: f64,
    beside: f64,
    counts: StageCounts,
    outcomes: Vec<Outcome>,
    in_place: Vec<Span>,
    touches: Vec<Span>,
    found: Vec<Span>,
}

impl Stage {
    pub(super) fn new() -> Self {
        Self {
            pages: FxHashMap::default(),
            urgent: VecDeque::new(),
            planned: VecDeque::new(),
            arranged: 0,
            window: MOST_WINDOW,
            ahead: 0,
            behind: 0,
            asked: Vec::new(),
            orders: Vec::new(),
            staged: VecDeque::new(),
            looked: Vec::new(),
            riders: FxHashMap::default(),
            quiet: 0,
            look_us: 0,
            pause_us: LOOK_US,
            rate: f64::INFINITY,
            credit: 0.0,
            credited_us: 0,
            room: 0,
            hold: None,
            inside: 0.0,
            beside: 0.0,
            counts: StageCounts::default(),
            outcomes: Vec::new(),
            in_place: Vec::new(),
            touches: Vec::new(),
            found: Vec::new(),
        }
    }

    pub(super) fn counts(&self) -> StageCounts {
        self.counts
    }

    /// Pages brought in and not touched yet.
    pub(super) fn unread(&self) -> u64 {
        let staged = self.staged.iter().chain(&self.looked).flat_map(|batch| &batch.spans);
        let riders: usize = self.riders.values().map(Vec::len).sum();
        staged.map(|span| u64::from(span.pages)).sum::<u64>() + riders as u64
    }

    pub(super) fn hold(&self) -> Option<Hold> {
        self.hold
    }

    /// Pages a second, from now on.
    pub(super) fn set_rate(&mut self, pages_per_second: f64) {
        self.rate = pages_per_second;
    }

    /// There is room for so many pages beside those that are on their way, or a reason why nothing may come.
    pub(super) fn allow(&mut self, room: Result<u64, Hold>) {
        match room {
            Ok(room) => {
                (self.hold, self.room) = (None, room.saturating_sub(self.on_their_way()));
            }
            Err(hold) => (self.hold, self.room) = (Some(hold), 0),
        }
    }

    fn on_their_way(&self) -> u64 {
        self.orders.iter().flat_map(|order| &order.spans).map(|span| u64::from(span.pages)).sum()
    }

    /// Takes candidates, those that a set foresees in the order of expected use.
    pub(super) fn offer(&mut self, candidates: &[Candidate]) {
        for candidate in candidates {
            let set = candidate.expert == Expert::Phase;
            let mut fresh = Vec::new();
            for frame in candidate.first..candidate.first.saturating_add(u64::from(candidate.pages)) {
                if self.pages.contains_key(&frame) {
                    continue;
                }
                self.counts.wanted += 1;
                if self.pages.len() < PAGES {
                    self.pages.insert(frame, Page { place: Place::Wanted, expert: candidate.expert });
                    push(&mut fresh, frame);
                } else {
                    self.counts.dropped += 1;
                }
            }
            if set { &mut self.planned } else { &mut self.urgent }.extend(fresh);
        }
        while self.urgent.len() > URGENT {
            if let Some(span) = self.urgent.pop_front() {
                self.drop_wanted(span);
            }
        }
    }

    /// Whether there is something to bring in.
    pub(super) fn is_waiting(&self) -> bool {
        !self.urgent.is_empty() || !self.planned.is_empty()
    }

    /// Whether a page of the span is wanted, on its way or staged.
    pub(super) fn holds(&self, span: Span) -> bool {
        !self.pages.is_empty() && frames(span).any(|frame| self.pages.contains_key(&frame))
    }

    /// Whether anything is on its way or unread.
    pub(super) fn is_busy(&self) -> bool {
        self.is_waiting() || !self.orders.is_empty() || !self.staged.is_empty()
    }

    /// What is to be brought next, whose states are to be asked for; they come back with [`Stage::answer`].
    pub(super) fn ask(&mut self, now_us: u64) -> Option<Vec<Span>> {
        let refill = now_us.saturating_sub(std::mem::replace(&mut self.credited_us, now_us)) as f64 / 1e6;
        let most = (self.rate * BURST_US as f64 / 1e6).max(ORDER_PAGES as f64);
        self.credit = (self.credit + self.rate * refill).min(most);
        if self.rate.is_infinite() {
            self.credit = f64::INFINITY;
        }
        if self.hold.is_some() || self.orders.len() >= ORDERS || !self.asked.is_empty() {
            return None;
        }
        let most = (ORDER_PAGES as u64).min(self.room).min(self.credit.max(0.0) as u64);
        // Many small orders cost more than they gain: rather a little later.
        if most < ORDER_PAGES as u64 && !self.orders.is_empty() {
            return None;
        }
        let mut left = most;
        while left > 0 {
            let Some(span) = self.urgent.pop_back().or_else(|| self.next_planned()) else { break };
            for frame in frames(span) {
                if left == 0 {
                    let rest = Span { frame, pages: (span.frame + u64::from(span.pages) - frame) as u32 };
                    self.arranged += rest.pages as usize;
                    push_front(&mut self.planned, rest);
                    break;
                }
                if self.pages.get(&frame).is_some_and(|page| page.place == Place::Wanted) {
                    push(&mut self.asked, frame);
                    left -= 1;
                }
            }
        }
        (!self.asked.is_empty()).then(|| self.asked.clone())
    }

    fn next_planned(&mut self) -> Option<Span> {
        if self.arranged == 0 {
            self.arrange();
        }
        let span = self.planned.pop_front()?;
        self.arranged = self.arranged.saturating_sub(span.pages as usize);
        Some(span)
    }

    /// Puts what is planned next in order of address: much of it while the guest is quiet or ahead, little while it follows. Behind
    /// a guest that touches faster than pages can be brought, order is of no use: it would be met at the same pages for ever.
    fn arrange(&mut self) {
        let follows = self.ahead > self.behind * FOLLOWS;
        self.window = if follows { ORDER_PAGES } else { self.window };
        (self.ahead, self.behind) = (0, 0);
        let most = ((self.rate * WINDOW_S) as usize).clamp(ORDER_PAGES, MOST_WINDOW);
        self.window = self.window.min(most);
        let mut next = Vec::with_capacity(self.window);
        while next.len() < self.window {
            let Some(span) = self.planned.pop_front() else { break };
            let taken = (span.pages as usize).min(self.window - next.len()) as u32;
            next.extend(span.frame..span.frame + u64::from(taken));
            push_front(&mut self.planned, Span { frame: span.frame + u64::from(taken), pages: span.pages - taken });
        }
        next.sort_unstable();
        next.dedup();
        self.arranged = next.len();
        let mut spans = Vec::new();
        next.into_iter().for_each(|frame| push(&mut spans, frame));
        spans.into_iter().rev().for_each(|span| push_front(&mut self.planned, span));
        self.window = (self.window * 2).min(MOST_WINDOW);
    }

    /// The states of what [`Stage::ask`] named: what is to be ordered of it, if anything.
    pub(super) fn answer(&mut self, states: &[PageState]) -> Option<Vec<Span>> {
        let mut spans = Vec::new();
        let asked = std::mem::take(&mut self.asked);
        let mut pages = 0;
        for (frame, state) in asked.into_iter().flat_map(frames).zip(states) {
            let Some(page) = self.pages.get_mut(&frame).filter(|page| page.place == Place::Wanted) else { continue };
            if *state == PageState::Swapped {
                page.place = Place::OnItsWay;
                push(&mut spans, frame);
                pages += 1;
            } else {
                self.pages.remove(&frame);
                self.counts.in_place += 1;
                push(&mut self.in_place, frame);
            }
        }
        if spans.is_empty() {
            return None;
        }
        self.room = self.room.saturating_sub(pages);
        self.credit -= pages as f64;
        self.orders.push(Order { ticket: None, spans: spans.clone() });
        Some(spans)
    }

    /// Their states could not be had: they are wanted no more.
    pub(super) fn no_answer(&mut self) {
        for span in std::mem::take(&mut self.asked) {
            self.drop_wanted(span);
        }
    }

    /// The order that [`Stage::answer`] made was sent.
    pub(super) fn sent(&mut self, ticket: u64) {
        if let Some(order) = self.orders.iter_mut().find(|order| order.ticket.is_none()) {
            order.ticket = Some(ticket);
        }
    }

    /// It could not be sent.
    pub(super) fn not_sent(&mut self) {
        if let Some(at) = self.orders.iter().position(|order| order.ticket.is_none()) {
            let order = self.orders.swap_remove(at);
            self.lose(&order.spans);
        }
    }

    /// An order is done, or failed. False: it is none of this machine's.
    pub(super) fn moved(&mut self, ticket: u64, cpu_us: Option<u64>, now_us: u64) -> bool {
        let Some(at) = self.orders.iter().position(|order| order.ticket == Some(ticket)) else { return false };
        let order = self.orders.swap_remove(at);
        let Some(cpu_us) = cpu_us else {
            self.lose(&order.spans);
            return true;
        };
        self.counts.cpu_us += cpu_us;
        let mut spans = Vec::new();
        for frame in order.spans.into_iter().flat_map(frames) {
            // What the guest touched meanwhile is settled.
            if let Some(page) = self.pages.get_mut(&frame).filter(|page| page.place == Place::OnItsWay) {
                page.place = Place::Staged;
                self.counts.staged += 1;
                push(&mut spans, frame);
            }
        }
        if !spans.is_empty() {
            // a look at all of it costs a twentieth of what bringing it did: not with every order
            if self.staged.is_empty() {
                (self.look_us, self.pause_us) = (now_us + LOOK_US, LOOK_US);
            }
            self.staged.push_back(Batch { at_us: now_us, spans, mapped: false });
        }
        true
    }

    /// The guest touched a page, which the running set names or not; told of one fault in `weight`. Whether it was foreseen and is
    /// not settled yet.
    pub(super) fn touched(&mut self, frame: u64, weight: u32, named: bool) -> bool {
        let Some(page) = self.pages.remove(&frame) else {
            // A guest that is ahead of what is brought in is where its set is all the same.
            *if named { &mut self.inside } else { &mut self.beside } += f64::from(weight);
            return false;
        };
        self.inside += f64::from(weight);
        self.quiet = 0;
        match page.place {
            Place::Wanted | Place::OnItsWay => self.behind += u64::from(weight),
            Place::Staged | Place::Mapped => self.ahead += 1,
        }
        self.settle(frame, page, true);
        true
    }

    /// What is to be looked at now: see [`Stage::seen`].
    pub(super) fn look(&mut self, now_us: u64) -> Option<Vec<Span>> {
        if now_us < self.look_us || !self.looked.is_empty() {
            return None;
        }
        let mut pages = 0;
        while pages < LOOK_PAGES {
            let Some(batch) = self.staged.pop_front() else { break };
            // Faults have told of some: those are not asked for again.
            let mut spans = Vec::new();
            for frame in batch.spans.iter().copied().flat_map(frames) {
                if self.pages.get(&frame).is_some_and(|page| page.place == Place::Staged) {
                    push(&mut spans, frame);
                    pages += 1;
                }
            }
            if !spans.is_empty() {
                self.looked.push(Batch { spans, ..batch });
            }
        }
        let spans: Vec<Span> = self.looked.iter().flat_map(|batch| batch.spans.iter().copied()).collect();
        (!spans.is_empty()).then_some(spans)
    }

    /// The states of what [`Stage::look`] named; `None`: they could not be had.
    pub(super) fn seen(&mut self, states: Option<&[PageState]>, now_us: u64) {
        let mut states = states.map(|states| states.iter().copied());
        let mut moved = false;
        for batch in std::mem::take(&mut self.looked) {
            let over = now_us.saturating_sub(batch.at_us) >= GIVEN_UP_US;
            let mut left = Vec::new();
            for frame in batch.spans.into_iter().flat_map(frames) {
                let state = states.as_mut().and_then(Iterator::next).unwrap_or(PageState::Swapped);
                let Some(page) = self.pages.get(&frame).copied().filter(|page| page.place == Place::Staged) else {
                    continue;
                };
                match state {
                    PageState::Present => {
                        self.pages.remove(&frame);
                        self.inside += 1.0;
                        self.ahead += 1;
                        moved = true;
                        let of_set = page.expert == Expert::Phase;
                        push(if of_set { &mut self.found } else { &mut self.touches }, frame);
                        self.settle(frame, page, true);
                    }
                    // There or not, nobody has touched it since.
                    state if state != PageState::Absent && !over => push(&mut left, frame),
                    _ => {
                        self.pages.remove(&frame);
                        self.settle(frame, page, false);
                    }
                }
            }
            if !left.is_empty() {
                self.staged.push_back(Batch { at_us: batch.at_us, spans: left, mapped: batch.mapped });
            }
        }
        self.quiet = if moved { 0 } else { self.quiet.saturating_add(1) };
        self.pause_us = if moved { LOOK_US } else { (self.pause_us * 2).min(LOOK_REST_US) };
        self.look_us = now_us + self.pause_us;
    }

    /// What is to be mapped now, if anything: as an order, see [`Stage::sent`].
    pub(super) fn map(&mut self) -> Option<Vec<Span>> {
        if self.quiet == 0 || self.hold.is_some() || self.is_waiting() || self.orders.len() >= ORDERS {
            return None;
        }
        let batch = self.staged.iter_mut().find(|batch| !batch.mapped)?;
        batch.mapped = true;
        let (mut witnesses, mut order, mut group) = (Vec::new(), Vec::new(), Vec::new());
        for frame in std::mem::take(&mut batch.spans).into_iter().flat_map(frames) {
            let Some(page) = self.pages.get_mut(&frame).filter(|page| page.place == Place::Staged) else { continue };
            if page.expert != Expert::Phase {
                push(&mut witnesses, frame);
                continue;
            }
            group.push(frame);
            if group.len() == 1 {
                push(&mut witnesses, frame);
                continue;
            }
            page.place = Place::Mapped;
            push(&mut order, frame);
            if group.len() == WITNESSED {
                self.riders.insert(group[0], group.split_off(1));
                group.clear();
            }
        }
        if group.len() > 1 {
            self.riders.insert(group[0], group.split_off(1));
        }
        batch.spans = witnesses;
        if order.is_empty() {
            return None;
        }
        self.orders.push(Order { ticket: None, spans: order.clone() });
        Some(order)
    }

    /// The next looks are due at once: one that has ended is to be known in full.
    pub(super) fn hurry(&mut self) {
        self.look_us = 0;
    }

    /// When to look next; `None`: there is nothing to look at.
    pub(super) fn look_at_us(&self) -> Option<u64> {
        (!self.staged.is_empty()).then_some(self.look_us)
    }

    /// Whether the guest has clearly gone where nothing was foreseen. Then what is planned is dropped.
    pub(super) fn cut_short(&mut self) -> bool {
        if self.inside + self.beside < WEIGHED {
            return false;
        }
        let elsewhere = self.beside > self.inside * ELSEWHERE;
        (self.inside, self.beside) = (self.inside / 2.0, self.beside / 2.0);
        let cut = elsewhere && !self.planned.is_empty();
        if cut {
            self.drop_planned();
        }
        cut
    }

    /// A set begins: what was weighed before is of something else.
    pub(super) fn begin(&mut self) {
        (self.inside, self.beside) = (0.0, 0.0);
        (self.window, self.ahead, self.behind) = (MOST_WINDOW, 0, 0);
    }

    /// What is planned is not wanted any more: its program has ended.
    pub(super) fn drop_planned(&mut self) {
        self.arranged = 0;
        for span in std::mem::take(&mut self.planned) {
            self.drop_wanted(span);
        }
    }

    /// Everything is forgotten: the machine's memory is another, or the helper has ended.
    pub(super) fn forget(&mut self) {
        let counts = self.counts;
        *self = Self { rate: self.rate, hold: self.hold, counts, ..Self::new() };
    }

    /// What became of what was proposed, since the last call.
    pub(super) fn take_outcomes(&mut self) -> Vec<Outcome> {
        std::mem::take(&mut self.outcomes)
    }

    /// What was in place already, or was dropped before it was brought, since the last call.
    pub(super) fn take_in_place(&mut self) -> Vec<Span> {
        std::mem::take(&mut self.in_place)
    }

    /// Touches that looks have found, since the last call, in order of staging: of pages that came after what the guest touched
    /// before them.
    pub(super) fn take_touches(&mut self) -> Vec<Span> {
        std::mem::take(&mut self.touches)
    }

    /// The same, of pages that a set named: they come in any order.
    pub(super) fn take_found(&mut self) -> Vec<Span> {
        std::mem::take(&mut self.found)
    }

    fn settle(&mut self, frame: u64, page: Page, used: bool) {
        self.settle_one(frame, page, used);
        for rider in self.riders.remove(&frame).unwrap_or_default() {
            let Some(page) = self.pages.get(&rider).copied().filter(|page| page.place == Place::Mapped) else {
                continue;
            };
            self.pages.remove(&rider);
            if used {
                // only what a set named is mapped
                push(&mut self.found, rider);
            }
            self.settle_one(rider, Page { place: Place::Staged, ..page }, used);
        }
    }

    fn settle_one(&mut self, first: u64, page: Page, used: bool) {
        let late = used && page.place != Place::Staged;
        self.counts.used += u64::from(used && !late);
        self.counts.late += u64::from(late);
        self.counts.wasted += u64::from(!used && page.place == Place::Staged);
        let (pages, expert) = (1, page.expert);
        match self.outcomes.last_mut() {
            Some(last)
                if last.first + u64::from(last.pages) == first
                    && (last.expert, last.used, last.late) == (expert, used, late) =>
            {
                last.pages += 1;
            }
            _ => self.outcomes.push(Outcome { first, pages, expert, used, late }),
        }
    }

    fn lose(&mut self, spans: &[Span]) {
        for frame in spans.iter().copied().flat_map(frames) {
            if let Some(page) = self.pages.remove(&frame) {
                self.counts.dropped += 1;
                // Nobody will look whether it is touched.
                push(&mut self.in_place, frame);
                self.settle(frame, Page { place: Place::Wanted, ..page }, false);
            }
        }
    }

    fn drop_wanted(&mut self, span: Span) {
        for frame in frames(span) {
            if self.pages.get(&frame).is_some_and(|page| page.place == Place::Wanted) {
                self.lose(&[Span { frame, pages: 1 }]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
