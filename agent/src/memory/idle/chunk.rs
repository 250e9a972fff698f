//! A chunk of a machine's memory: whether it is in use, as far as trials have told.

use prestage_integration::memory::{PageState, Span};

/// Pages of a chunk.
pub(super) const CHUNK: u64 = 64;
/// A chunk that came back is left alone for so many steps, doubled each time.
const SPARED: u64 = 300;
const MOST_WRONG: u8 = 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Rest,
    /// Its witnesses are out.
    Trial,
    /// They were long enough, and it was made cold.
    Cold,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    pub(super) span: Span,
    pub(super) stage: Stage,
    /// Pages of the span, the same twice if there is but one.
    pub(super) witnesses: [u8; 2],
    /// How often it came back.
    pub(super) wrong: u8,
    /// When something of it came in, or it was looked at.
    pub(super) at_us: u64,
    /// Something of it may be in swap: it was not looked at yet, or that was seen. And whether it was pushed there from here.
    pub(super) out: bool,
    pub(super) pushed: bool,
    /// Left alone until then.
    pub(super) spared_us: u64,
}

pub(super) fn frames(span: Span) -> std::ops::Range<u64> {
    span.frame..span.frame.saturating_add(u64::from(span.pages))
}

impl Chunk {
    pub(super) fn new(span: Span) -> Self {
        let (stage, witnesses) = (Stage::Rest, [0, 0]);
        Self { span, stage, witnesses, wrong: 0, at_us: 0, out: true, pushed: false, spared_us: 0 }
    }

    pub(super) fn spare(&mut self, now_us: u64, every_us: u64) {
        self.stage = Stage::Rest;
        if now_us >= self.spared_us {
            self.wrong = self.wrong.saturating_add(1).min(MOST_WRONG);
            self.spared_us = now_us + ((SPARED * every_us) << (self.wrong - 1));
        }
    }

    pub(super) fn witnesses(&self) -> impl Iterator<Item = Span> + use<> {
        let frame = self.span.frame;
        self.witnesses.into_iter().map(move |at| Span { frame: frame + u64::from(at), pages: 1 })
    }

    /// Takes two of the pages that are there as witnesses, others each time. False: none is.
    pub(super) fn choose(&mut self, states: &[PageState], now_us: u64) -> bool {
        let there = |(at, state): (usize, &PageState)| (*state == PageState::Present).then_some(at as u8);
        let present: Vec<u8> = states.iter().enumerate().filter_map(there).collect();
        // SplitMix64's last step (Steele, Lea, Flood 2014)
        let mixed = (self.span.frame ^ now_us).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) as usize;
        let half = present.len().div_ceil(2);
        let of = |part: &[u8], mixed: usize| mixed.checked_rem(part.len()).and_then(|at| part.get(at)).copied();
        let (low, high) = present.split_at(half);
        let Some(first) = of(low, mixed >> 8) else { return false };
        self.witnesses = [first, of(high, mixed >> 24).unwrap_or(first)];
        true
    }
}
