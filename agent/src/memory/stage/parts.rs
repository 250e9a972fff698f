//! What a stage is made of: pages and where they are, orders, batches, counts; and spans of pages.

use std::collections::VecDeque;
use std::fmt;

use prestage_integration::memory::Span;
use prestage_predictor::Expert;

/// Why nothing is brought in for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Hold {
    /// Tasks wait for memory.
    Pressure,
    /// What is free is the host's reserve.
    HostRoom,
    /// The machine's control group is at its limit.
    GroupRoom,
    /// Switched off for this machine.
    Off,
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pressure => "tasks wait for memory",
            Self::HostRoom => "the host has no memory to spare",
            Self::GroupRoom => "the machine's control group is at its memory limit",
            Self::Off => "switched off",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Place {
    Wanted,
    OnItsWay,
    Staged,
    /// Staged and mapped: rides on a witness.
    Mapped,
}

#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Page {
    pub(super) place: Place,
    pub(super) expert: Expert,
}

#[derive(Debug)]
pub(in super::super) struct Order {
    pub(super) ticket: Option<u64>,
    pub(super) spans: Vec<Span>,
}

/// Staged pages of one order.
#[derive(Debug)]
pub(in super::super) struct Batch {
    pub(super) at_us: u64,
    pub(super) spans: Vec<Span>,
    /// Witnesses alone are left of it.
    pub(super) mapped: bool,
}

/// Pages, since the machine was first seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in super::super) struct StageCounts {
    /// Of candidates, whatever became of them; what was wanted already counts once.
    pub(in super::super) wanted: u64,
    pub(in super::super) staged: u64,
    pub(in super::super) used: u64,
    /// Used, but the guest was there first or had to wait.
    pub(in super::super) late: u64,
    /// Staged and never touched.
    pub(in super::super) wasted: u64,
    /// Were in memory when they were to be brought.
    pub(in super::super) in_place: u64,
    /// No longer wanted before they were brought.
    pub(in super::super) dropped: u64,
    /// CPU time of the helper, in microseconds.
    pub(in super::super) cpu_us: u64,
}

pub(in super::super) fn frames(span: Span) -> std::ops::Range<u64> {
    span.frame..span.frame.saturating_add(u64::from(span.pages))
}

/// Adds a page, to the last span if it goes on there.
pub(in super::super) fn push(spans: &mut Vec<Span>, frame: u64) {
    match spans.last_mut() {
        Some(last) if last.frame + u64::from(last.pages) == frame && last.pages < u32::MAX => last.pages += 1,
        _ => spans.push(Span { frame, pages: 1 }),
    }
}

pub(in super::super) fn push_front(queue: &mut VecDeque<Span>, span: Span) {
    if span.pages > 0 {
        queue.push_front(span);
    }
}
