//! Which pages are pushed out, and how fast: a controller in the manner of senpai (Weiner et al., "TMO: Transparent Memory
//! Offloading in Datacenters", ASPLOS 2022), without I/O.
//!
//! Every few seconds a small step is taken while nobody waits for memory, the larger the less anybody does. What comes back
//! soon after it went was wrongly pushed: when more of it comes back in a minute than [`REFAULTS`] of what is in memory, pushing
//! stops at once, and for longer each time. A machine keeps its floor whatever is idle.
//!
//! Nobody tells the host when a guest last touched a page that is in memory. What is known is when a page came in, so memory is
//! taken in chunks of 256 KiB, those first of which nothing has come in for longest; chunks that came back are left alone,
//! twice as long each time. A chunk is first made cold (the kernel takes it when it needs memory) and pushed out with a later step
//! if nothing of it has come in since.

use std::collections::VecDeque;

use prestage_integration::memory::{PageState, Push, Region, Residency, Span};

/// Pages of a chunk.
const CHUNK: u64 = 64;
/// Time between two steps.
const STEP_US: u64 = 6_000_000;
/// Largest step, as a share of what is in memory; and where the kernel does not tell of pressure.
const STEP: f64 = 0.01;
const BLIND_STEP: f64 = 0.0025;
/// Share of what is in memory that may come back in a minute.
const REFAULTS: f64 = 0.002;
const MINUTE_US: u64 = 60_000_000;
/// Pushed pages count as pushed wrongly if they come back this soon.
const WRONG_US: u64 = 600_000_000;
/// Pushing stops for so long, doubled up to the other each time that it was wrong again.
const BACK_OFF_US: u64 = 60_000_000;
const BACK_OFF_MOST_US: u64 = 3_600_000_000;
/// A chunk that came back is left alone for so long, doubled each time.
const SPARED_US: u64 = 1_800_000_000;
/// Spans of an order and pages of a look.
const SPANS: usize = 4096;
const LOOK_PAGES: u64 = 1 << 16;

/// What an operator allows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct IdleSettings {
    /// Share of a machine's memory that stays in memory.
    pub(crate) floor: f64,
    /// Share of time that somebody may wait for memory.
    pub(crate) pressure: f64,
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    span: Span,
    /// When something of it came in, or it was pushed.
    at_us: u64,
    /// It was made cold then.
    cold: bool,
    /// Left alone until then, and how often it came back.
    spared_us: u64,
    wrong: u8,
}

/// Pages since the machine was first seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct IdleCounts {
    pub(super) pushed: u64,
    pub(super) refaulted: u64,
    pub(super) backed_off: u64,
}

/// See the module's head. Pages are guest frames, times microseconds of one clock.
#[derive(Debug, Default)]
pub(super) struct Idle {
    /// By their first frame.
    chunks: Vec<Chunk>,
    /// Chunks pushed out within [`WRONG_US`], of which nothing has come back, oldest first.
    out: VecDeque<(u64, Span)>,
    looked: Vec<(u64, Span)>,
    step_us: u64,
    /// Pages that came back within the last minute.
    back: VecDeque<(u64, u64)>,
    stopped_us: u64,
    pause_us: u64,
    hand: usize,
    counts: IdleCounts,
}

impl Idle {
    /// Of a machine with its memory there: nothing of it is known.
    pub(super) fn new(regions: &[Region]) -> Self {
        let of = |region: &Region| {
            let end = region.frame.saturating_add(region.pages);
            let cuts = (region.frame / CHUNK..end.div_ceil(CHUNK)).map(|at| at * CHUNK);
            let from = region.frame;
            cuts.map(move |cut| {
                let (first, until) = (cut.max(from), (cut + CHUNK).min(end));
                let span = Span { frame: first, pages: (until - first) as u32 };
                Chunk { span, at_us: 0, cold: false, spared_us: 0, wrong: 0 }
            })
        };
        let mut chunks: Vec<Chunk> = regions.iter().flat_map(of).collect();
        chunks.sort_by_key(|chunk| chunk.span.frame);
        Self { chunks, pause_us: BACK_OFF_US, ..Self::default() }
    }

    fn chunk(&mut self, frame: u64) -> Option<&mut Chunk> {
        let at = self.chunks.partition_point(|chunk| chunk.span.frame <= frame).checked_sub(1)?;
        self.chunks.get_mut(at).filter(|chunk| frame - chunk.span.frame < u64::from(chunk.span.pages))
    }

    pub(super) fn counts(&self) -> IdleCounts {
        self.counts
    }

    /// Whether it has stopped because too much came back.
    pub(super) fn is_backing_off(&self, now_us: u64) -> bool {
        now_us < self.stopped_us
    }

    /// A page came in.
    pub(super) fn came_in(&mut self, frame: u64, now_us: u64) {
        if let Some(chunk) = self.chunk(frame) {
            (chunk.at_us, chunk.cold) = (now_us, false);
        }
    }

    /// Whether a step is due: first what was pushed is looked at.
    pub(super) fn look(&mut self, now_us: u64) -> Option<Vec<Span>> {
        if now_us.saturating_sub(self.step_us) < STEP_US {
            return None;
        }
        self.step_us = now_us;
        while self.out.front().is_some_and(|(at_us, _)| now_us.saturating_sub(*at_us) >= WRONG_US) {
            self.out.pop_front();
        }
        let mut pages = 0;
        self.looked.clear();
        // The latest are the likeliest to come back.
        while pages < LOOK_PAGES && self.looked.len() < SPANS {
            let Some((at_us, span)) = self.out.pop_back() else { break };
            pages += u64::from(span.pages);
            self.looked.push((at_us, span));
        }
        Some(self.looked.iter().map(|(_, span)| *span).collect())
    }

    /// The states of what [`Idle::look`] named. Counts what came back, and stops where it is too much.
    pub(super) fn seen(&mut self, states: &[PageState], present: u64, now_us: u64) {
        let mut states = states.iter();
        let (mut back, mut stay) = (0, Vec::new());
        for (at_us, span) in std::mem::take(&mut self.looked) {
            let of_span = states.by_ref().take(span.pages as usize);
            let returned = of_span.filter(|state| **state == PageState::Present).count() as u64;
            back += returned;
            if returned == 0 {
                stay.push((at_us, span));
            } else if let Some(chunk) = self.chunk(span.frame) {
                chunk.wrong = chunk.wrong.saturating_add(1).min(10);
                chunk.spared_us = now_us + (SPARED_US << (chunk.wrong - 1));
                (chunk.at_us, chunk.cold) = (now_us, false);
            }
        }
        self.out.extend(stay.into_iter().rev());
        self.counts.refaulted += back;
        self.back.push_back((now_us, back));
        while self.back.front().is_some_and(|(at_us, _)| now_us.saturating_sub(*at_us) >= MINUTE_US) {
            self.back.pop_front();
        }
        let minute: u64 = self.back.iter().map(|(_, back)| back).sum();
        if minute as f64 > present as f64 * REFAULTS && now_us >= self.stopped_us {
            self.counts.backed_off += 1;
            self.stopped_us = now_us + self.pause_us;
            self.pause_us = (self.pause_us * 2).min(BACK_OFF_MOST_US);
            self.back.clear();
        } else if now_us.saturating_sub(self.stopped_us) > BACK_OFF_MOST_US {
            self.pause_us = BACK_OFF_US;
        }
    }

    /// What is pushed with this step, after [`Idle::seen`]. `keep`: a page of a chunk that must stay. `pressure`: share of time that
    /// somebody waited for memory; `None`: this kernel does not tell.
    pub(super) fn step(
        &mut self,
        residency: Residency,
        pressure: Option<f64>,
        settings: &IdleSettings,
        keep: impl Fn(u64) -> bool,
        now_us: u64,
    ) -> Vec<(Push, Vec<Span>)> {
        if self.is_backing_off(now_us) {
            return Vec::new();
        }
        let share = match pressure {
            None => BLIND_STEP,
            Some(pressure) => STEP * (1.0 - pressure / settings.pressure.max(1e-6)).clamp(0.0, 1.0),
        };
        let all = residency.present + residency.swapped + residency.absent;
        let above = residency.present.saturating_sub((all as f64 * settings.floor) as u64);
        let pages = ((residency.present as f64 * share) as u64).min(above);
        let (mut cold, mut out) = (Vec::new(), Vec::new());
        let (mut cold_pages, mut out_pages) = (0, 0);
        for index in self.oldest(now_us) {
            if out_pages + CHUNK > pages && cold_pages + CHUNK > pages {
                break;
            }
            let Some(chunk) = self.chunks.get_mut(index) else { continue };
            let span = chunk.span;
            if (span.frame..span.frame + u64::from(span.pages)).any(&keep) {
                continue;
            }
            if !chunk.cold && cold_pages + CHUNK <= pages && cold.len() < SPANS {
                (chunk.cold, chunk.at_us) = (true, now_us);
                cold_pages += u64::from(span.pages);
                cold.push(span);
            } else if chunk.cold && out_pages + CHUNK <= pages && out.len() < SPANS {
                chunk.at_us = now_us;
                chunk.cold = false;
                chunk.spared_us = now_us + WRONG_US;
                out_pages += u64::from(span.pages);
                out.push(span);
                self.out.push_back((now_us, span));
            }
        }
        self.counts.pushed += out_pages;
        let steps = [(Push::PageOut, out), (Push::Cold, cold)];
        steps.into_iter().filter(|(_, spans)| !spans.is_empty()).collect()
    }

    /// Chunks by how long nothing of them came in, as far as a step can need: sorted within a part that moves on.
    fn oldest(&mut self, now_us: u64) -> Vec<usize> {
        const PART: usize = 1 << 14;
        let all = self.chunks.len();
        let part = PART.min(all);
        let from = self.hand;
        self.hand = (from + part).checked_rem(all).unwrap_or(0);
        let mut indices: Vec<usize> = (0..part).map(|at| (from + at) % all).collect();
        indices.retain(|index| self.chunks.get(*index).is_some_and(|chunk| chunk.spared_us <= now_us));
        indices.sort_by_key(|index| self.chunks.get(*index).map_or(0, |chunk| chunk.at_us));
        indices
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const PAGES: u64 = 64 * 1000;
    const SECOND_US: u64 = 1_000_000;
    const SETTINGS: IdleSettings = IdleSettings { floor: 0.4, pressure: 0.01 };

    /// A guest that touches its first `hot` pages all the time.
    struct Guest {
        idle: Idle,
        out: HashSet<u64>,
        now_us: u64,
        hot: u64,
        refaults: u64,
        pressure: Option<f64>,
    }

    impl Guest {
        fn new(hot: u64) -> Self {
            let idle = Idle::new(&[Region { frame: 0, pages: PAGES, host: 0x1000 }]);
            Self { idle, out: HashSet::new(), now_us: SECOND_US * 100, hot, refaults: 0, pressure: Some(0.0) }
        }

        fn present(&self) -> u64 {
            PAGES - self.out.len() as u64
        }

        /// Runs so long; its hot pages come back within a second.
        fn run(&mut self, seconds: u64) {
            for _ in 0..seconds {
                self.now_us += SECOND_US;
                let hot = self.hot;
                let back: Vec<u64> = self.out.iter().copied().filter(|frame| *frame < hot).collect();
                self.refaults += back.len() as u64;
                for frame in back {
                    self.out.remove(&frame);
                    self.idle.came_in(frame, self.now_us);
                }
                let Some(spans) = self.idle.look(self.now_us) else { continue };
                let frames = spans.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages));
                let state = |frame| if self.out.contains(&frame) { PageState::Swapped } else { PageState::Present };
                let states: Vec<PageState> = frames.map(state).collect();
                let present = self.present();
                self.idle.seen(&states, present, self.now_us);
                let residency = Residency { present, swapped: PAGES - present, ..Residency::default() };
                for (how, spans) in self.idle.step(residency, self.pressure, &SETTINGS, |_| false, self.now_us) {
                    let frames = spans.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages));
                    if how == Push::PageOut {
                        self.out.extend(frames);
                    }
                }
            }
        }
    }

    #[test]
    fn idle_memory_goes_in_small_steps_down_to_the_floor() {
        let mut guest = Guest::new(0);
        guest.run(60);
        let minute = PAGES - guest.present();
        assert!((1..=PAGES / 10).contains(&minute), "{minute}");
        guest.run(3600);
        assert!(guest.present() >= (PAGES as f64 * SETTINGS.floor) as u64, "{}", guest.present());
        assert!(guest.present() < (PAGES as f64 * 0.45) as u64, "{}", guest.present());
        assert_eq!(guest.idle.counts().pushed, PAGES - guest.present());
    }

    #[test]
    fn pressure_stops_it_and_where_nobody_tells_steps_are_smaller() {
        let mut guest = Guest::new(0);
        guest.pressure = Some(SETTINGS.pressure);
        guest.run(600);
        assert_eq!(guest.present(), PAGES);
        let (mut seeing, mut blind) = (Guest::new(0), Guest::new(0));
        blind.pressure = None;
        seeing.run(120);
        blind.run(120);
        let (seeing, blind) = (PAGES - seeing.present(), PAGES - blind.present());
        assert!(blind > 0 && blind * 2 < seeing, "{blind} {seeing}");
    }

    #[test]
    fn what_comes_back_stops_it_at_once_and_is_left_alone() {
        // Half of memory is hot, which nothing shows before it was pushed.
        let mut guest = Guest::new(PAGES / 2);
        guest.run(3600);
        let counts = guest.idle.counts();
        assert!(counts.backed_off > 0, "{counts:?}");
        // Within each stretch between two stops little comes back.
        assert!(guest.refaults < PAGES / 10, "{} {counts:?}", guest.refaults);
        let hour = guest.refaults;
        guest.run(3600);
        assert!(guest.refaults - hour <= hour * 2, "{} then {}", hour, guest.refaults - hour);
    }

    #[test]
    fn what_must_stay_and_what_is_no_memory_is_not_pushed() {
        let regions =
            [Region { frame: 0, pages: 100, host: 0x1000 }, Region { frame: 1 << 20, pages: 200, host: 1 << 30 }];
        let mut idle = Idle::new(&regions);
        let mut spans = Vec::new();
        for minute in 1..2000 {
            let now_us = minute * MINUTE_US;
            idle.look(now_us);
            idle.seen(&[], 300, now_us);
            let residency = Residency { present: 100_000, ..Residency::default() };
            let settings = IdleSettings { floor: 0.0, ..SETTINGS };
            spans.extend(
                idle.step(residency, Some(0.0), &settings, |frame| frame < 64, now_us)
                    .into_iter()
                    .flat_map(|(_, spans)| spans),
            );
            idle.out.clear();
        }
        let frames: HashSet<u64> =
            spans.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages)).collect();
        assert!(frames.iter().all(|frame| (64..100).contains(frame) || (1 << 20..(1 << 20) + 200).contains(frame)));
        assert_eq!(frames.len(), 36 + 200);
        assert!(Idle::new(&[]).step(Residency::default(), None, &SETTINGS, |_| false, MINUTE_US).is_empty());
    }
}
