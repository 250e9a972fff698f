//! Which delivery of an endpoint is tried when. Sans-I/O: time is an argument, chance comes from a seed.
//!
//! The events of one subject are a *lane*: its first event is tried until it arrives or is given up, and only then its second. Between two
//! tries passes a time that doubles with each, within which chance decides (half of it is certain), so that the lanes of a receiver that
//! comes back do not all come at once. What concerns the receiver as a whole (it cannot be reached, asks for patience) holds up all its
//! lanes, and then one at a time finds out whether it is back; what concerns one message (it is refused) holds up its own lane.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::store::demand::Head;

/// Deliveries of an endpoint under way at once.
const TOGETHER: usize = 4;
/// An event is not given up before so many tries, however old it is: the daemon may have been off.
const TRIES_MIN: u32 = 8;
/// A wait longer than any that is given here is from a clock that was wrong.
const WAIT_MAX_MS: u64 = 2 * 24 * 3600 * 1000;

/// How long one keeps trying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Between the first try and the second; doubled with each.
    pub first: Duration,
    /// Longest wait.
    pub most: Duration,
    /// Age of an event that is given up.
    pub give_up: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self { first: Duration::from_secs(5), most: Duration::from_secs(3600), give_up: 3 * day }
    }
}

/// Why a try failed, as far as it matters for the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setback {
    /// The message was refused.
    Message,
    /// The receiver is not there, or asks to be left alone for a while.
    Receiver { retry_after: Option<Duration> },
}

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    Try(Head),
    /// Nothing before that time, Unix ms.
    At(u64),
    /// Nothing waits, or all that does is under way.
    Idle,
}

/// When a delivery that failed is tried next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed {
    pub next_unix_ms: u64,
    /// Never.
    pub dead: bool,
}

/// The lanes of one endpoint.
#[derive(Debug)]
pub struct Lanes {
    patience: Patience,
    seed: u64,
    /// Subjects with a delivery under way.
    under_way: BTreeSet<String>,
    /// Tries in a row that failed because of the receiver, and until when it is left alone, Unix ms.
    setbacks: u32,
    held_unix_ms: u64,
}

impl Lanes {
    #[must_use]
    pub fn new(patience: Patience, seed: u64) -> Self {
        Self { patience, seed, under_way: BTreeSet::new(), setbacks: 0, held_unix_ms: 0 }
    }

    /// What to do, given what is first in each lane, oldest first.
    #[must_use]
    pub fn next(&self, heads: &[Head], now_unix_ms: u64) -> Next {
        let together = if self.setbacks > 0 { 1 } else { TOGETHER };
        if self.under_way.len() >= together {
            return Next::Idle;
        }
        let mut soonest: Option<u64> = None;
        for head in heads.iter().filter(|head| !self.under_way.contains(&head.subject)) {
            let at = effective(head.next_unix_ms, now_unix_ms).max(effective(self.held_unix_ms, now_unix_ms));
            if at <= now_unix_ms {
                return Next::Try(head.clone());
            }
            soonest = Some(soonest.map_or(at, |soonest| soonest.min(at)));
        }
        soonest.map_or(Next::Idle, Next::At)
    }

    /// A delivery is being tried.
    pub fn begin(&mut self, subject: &str) {
        self.under_way.insert(subject.to_owned());
    }

    /// It arrived. Returns whether the receiver had been away.
    pub fn arrived(&mut self, subject: &str) -> bool {
        self.under_way.remove(subject);
        self.held_unix_ms = 0;
        std::mem::take(&mut self.setbacks) > 0
    }

    /// It did not arrive.
    pub fn failed(&mut self, head: &Head, setback: Setback, now_unix_ms: u64) -> Failed {
        self.under_way.remove(&head.subject);
        let wait = self.wait(head.seq, head.tries);
        let mut next_unix_ms = now_unix_ms.saturating_add(wait);
        match setback {
            // The receiver is there.
            Setback::Message => self.setbacks = 0,
            Setback::Receiver { retry_after } => {
                let asked = retry_after.map_or(0, |wait| u64::try_from(wait.as_millis()).unwrap_or(WAIT_MAX_MS));
                let held = self.wait(0, self.setbacks).max(asked);
                self.setbacks = self.setbacks.saturating_add(1);
                self.held_unix_ms = now_unix_ms.saturating_add(held);
                next_unix_ms = next_unix_ms.max(now_unix_ms.saturating_add(asked));
            }
        }
        let age_ms = now_unix_ms.saturating_sub(head.since_unix_ms);
        let old = u128::from(age_ms) >= self.patience.give_up.as_millis();
        Failed { next_unix_ms, dead: old && head.tries + 1 >= TRIES_MIN }
    }

    /// The try could not be made, or its outcome not be noted: all lanes wait a while.
    pub fn stalled(&mut self, subject: &str, now_unix_ms: u64) {
        self.under_way.remove(subject);
        self.held_unix_ms = now_unix_ms.saturating_add(self.wait(0, 0).max(1));
    }

    /// Milliseconds after so many failures: half of it certain, half by chance.
    fn wait(&self, seq: u64, failures: u32) -> u64 {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(WAIT_MAX_MS).min(WAIT_MAX_MS);
        let (first, most) = (ms(self.patience.first).max(1), ms(self.patience.most).max(1));
        let whole = first.saturating_mul(1 << failures.min(40)).min(most);
        let chance = mixed(self.seed ^ mixed(seq ^ u64::from(failures) << 48));
        whole / 2 + chance % (whole - whole / 2 + 1)
    }
}

/// A time to wait for, unless no wait is that long.
fn effective(at_unix_ms: u64, now_unix_ms: u64) -> u64 {
    if at_unix_ms > now_unix_ms.saturating_add(WAIT_MAX_MS) { now_unix_ms } else { at_unix_ms }
}

/// SplitMix64 (Steele, Lea and Flood 2014).
fn mixed(seed: u64) -> u64 {
    let mut value = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000_000;

    fn head(subject: &str, seq: u64, tries: u32, next_unix_ms: u64) -> Head {
        Head { subject: subject.to_owned(), seq, tries, next_unix_ms, since_unix_ms: NOW }
    }

    fn lanes() -> Lanes {
        Lanes::new(Patience::default(), 7)
    }

    #[test]
    fn waits_double_up_to_the_longest_and_chance_spreads_them() {
        let waits =
            |seed, seq| -> Vec<u64> { (0..14).map(|n| Lanes::new(Patience::default(), seed).wait(seq, n)).collect() };
        for (n, wait) in waits(7, 1).into_iter().enumerate() {
            let whole = (5000u64 << n).min(3_600_000);
            assert!((whole / 2..=whole).contains(&wait), "{n}: {wait}");
        }
        assert_eq!(waits(7, 1), waits(7, 1), "the same seed, the same waits");
        assert_ne!(waits(7, 1), waits(8, 1));
        assert_ne!(waits(7, 1), waits(7, 2));
        let none = Patience { first: Duration::ZERO, most: Duration::ZERO, give_up: Duration::ZERO };
        assert!(Lanes::new(none, 1).wait(1, 60) <= 1);
    }

    #[test]
    fn a_lane_waits_for_its_own_and_not_for_others() {
        let mut lanes = lanes();
        let heads = [head("a", 1, 0, 0), head("b", 2, 0, 0), head("c", 5, 3, NOW + 50)];
        assert_eq!(lanes.next(&heads, NOW), Next::Try(heads[0].clone()));
        lanes.begin("a");
        assert_eq!(lanes.next(&heads, NOW), Next::Try(heads[1].clone()));
        lanes.begin("b");
        assert_eq!(lanes.next(&heads, NOW), Next::At(NOW + 50));
        // Refused: only that lane waits.
        let failed = lanes.failed(&heads[0], Setback::Message, NOW);
        assert!(!failed.dead && (NOW + 2500..=NOW + 5000).contains(&failed.next_unix_ms));
        assert!(!lanes.arrived("b"));
        let later = [head("a", 1, 1, failed.next_unix_ms), head("b", 3, 0, 0)];
        assert_eq!(lanes.next(&later, NOW), Next::Try(later[1].clone()));
        assert_eq!(lanes.next(&[], NOW), Next::Idle);
    }

    #[test]
    fn a_receiver_that_is_away_is_left_alone_and_then_asked_by_one() {
        let mut lanes = lanes();
        let heads = [head("a", 1, 0, 0), head("b", 2, 0, 0)];
        lanes.begin("a");
        let asked = Some(Duration::from_secs(60));
        let failed = lanes.failed(&heads[0], Setback::Receiver { retry_after: asked }, NOW);
        assert!(failed.next_unix_ms >= NOW + 60_000);
        assert_eq!(lanes.next(&heads, NOW), Next::At(NOW + 60_000));
        assert_eq!(lanes.next(&heads[1..], NOW + 60_000), Next::Try(heads[1].clone()));
        lanes.begin("b");
        assert_eq!(lanes.next(&heads, NOW + 60_000), Next::Idle, "one finds out");
        assert!(lanes.arrived("b"), "it is back");
        assert_eq!(lanes.next(&heads, NOW + 60_000), Next::Try(heads[0].clone()));
    }

    #[test]
    fn only_so_many_are_under_way_at_once() {
        let mut lanes = lanes();
        let heads: Vec<Head> = (0..10).map(|n| head(&n.to_string(), n, 0, 0)).collect();
        for at in 0..TOGETHER {
            assert_eq!(lanes.next(&heads, NOW), Next::Try(heads[at].clone()));
            lanes.begin(&heads[at].subject);
        }
        assert_eq!(lanes.next(&heads, NOW), Next::Idle);
        lanes.stalled("0", NOW);
        assert!(matches!(lanes.next(&heads, NOW), Next::At(at) if at > NOW));
    }

    #[test]
    fn an_event_is_given_up_when_old_and_tried_often_enough() {
        let give_up = Patience::default().give_up.as_millis() as u64;
        let outcome = |tries, age| lanes().failed(&head("a", 1, tries, 0), Setback::Message, NOW + age).dead;
        assert!(outcome(TRIES_MIN - 1, give_up) && outcome(60, give_up * 2));
        assert!(!outcome(TRIES_MIN - 2, give_up * 2), "the daemon was off");
        assert!(!outcome(60, give_up - 1));
    }

    #[test]
    fn a_clock_that_was_wrong_holds_up_nothing_for_years() {
        let heads = [head("a", 1, 0, NOW * 2)];
        assert_eq!(lanes().next(&heads, NOW), Next::Try(heads[0].clone()));
    }
}
