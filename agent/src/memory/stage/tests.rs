//! What staging promises, and what holds on any input.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn set(first: u64, pages: u32) -> Candidate {
    Candidate { first, pages, probability: 0.9, due_us: Some(0), expert: Expert::Phase }
}

fn next(first: u64, pages: u32) -> Candidate {
    Candidate { first, pages, probability: 0.9, due_us: None, expert: Expert::Sequential }
}

fn span(frame: u64, pages: u32) -> Span {
    Span { frame, pages }
}

fn total(spans: &[Span]) -> usize {
    spans.iter().map(|span| span.pages as usize).sum()
}

/// Asks, and answers that all is swapped: what is ordered, under this ticket.
fn order(stage: &mut Stage, ticket: u64, now_us: u64) -> Option<Vec<Span>> {
    let asked = stage.ask(now_us)?;
    let spans = stage.answer(&vec![PageState::Swapped; total(&asked)])?;
    stage.sent(ticket);
    Some(spans)
}

fn ready() -> Stage {
    let mut stage = Stage::new();
    stage.allow(Ok(u64::MAX));
    stage
}

#[test]
fn a_set_goes_out_by_address_in_few_orders_at_a_time() {
    let mut stage = ready();
    let candidates: Vec<Candidate> = (0..4).map(|i| set(10_000 - i * 2000, 500)).collect();
    stage.offer(&candidates);
    assert_eq!(order(&mut stage, 1, 0).unwrap(), [span(4000, 500), span(6000, 12)]);
    assert_eq!(order(&mut stage, 2, 0).unwrap(), [span(6012, 488), span(8000, 24)]);
    assert_eq!(order(&mut stage, 3, 0).unwrap(), [span(8024, 476), span(10_000, 36)]);
    assert_eq!(order(&mut stage, 4, 0), None, "three are under way");
    assert!(stage.moved(2, Some(9), 1) && !stage.moved(2, Some(9), 1) && !stage.moved(77, Some(9), 1));
    assert_eq!(order(&mut stage, 4, 1).unwrap(), [span(10_036, 464)]);
    assert_eq!(stage.counts().cpu_us, 9);
}

#[test]
fn what_the_guest_is_about_to_touch_comes_before_what_has_time() {
    let mut stage = ready();
    stage.offer(&[set(0, 4), next(100, 8)]);
    assert_eq!(order(&mut stage, 1, 0).unwrap(), [span(100, 8), span(0, 4)]);
}

#[test]
fn only_what_is_swapped_is_brought() {
    let mut stage = ready();
    stage.offer(&[set(0, 6)]);
    use PageState::{Absent, Present, Swapped};
    assert_eq!(stage.ask(0).unwrap(), [span(0, 6)]);
    assert_eq!(stage.ask(0), None, "one question at a time");
    let spans = stage.answer(&[Swapped, Present, Swapped, Swapped, Absent, Swapped]).unwrap();
    assert_eq!(spans, [span(0, 1), span(2, 2), span(5, 1)]);
    assert_eq!(stage.take_in_place(), [span(1, 1), span(4, 1)]);
    stage.offer(&[set(50, 2)]);
    stage.ask(0).unwrap();
    assert_eq!(stage.answer(&[Present, Present]), None);
    assert_eq!(stage.counts().in_place, 4);
}

#[test]
fn what_the_guest_touched_first_is_not_brought_any_more() {
    let mut stage = ready();
    stage.offer(&[set(0, 4)]);
    stage.touched(1, 1, false);
    assert_eq!(stage.ask(0).unwrap(), [span(0, 1), span(2, 2)]);
    stage.touched(2, 1, false);
    assert_eq!(stage.answer(&[PageState::Swapped; 3]).unwrap(), [span(0, 1), span(3, 1)]);
    stage.sent(1);
    stage.touched(3, 1, false);
    stage.moved(1, Some(0), 5);
    stage.touched(0, 1, false);
    let late = |first, late| Outcome { first, pages: 1, expert: Expert::Phase, used: true, late };
    assert_eq!(
        stage.take_outcomes(),
        [Outcome { pages: 3, ..late(1, true) }, late(0, false)],
        "neighbours in a row are told as one"
    );
    assert!(!stage.is_busy() || stage.look(u64::MAX / 2).is_none());
}

#[test]
fn looks_find_what_was_of_use_and_give_up_what_was_not() {
    let mut stage = ready();
    stage.offer(&[set(0, 4)]);
    order(&mut stage, 1, 0).unwrap();
    stage.moved(1, Some(0), 1000);
    assert_eq!(stage.look(2000), None, "a little time to be of use");
    assert_eq!(stage.look(50_000).unwrap(), [span(0, 4)]);
    use PageState::{Absent, Present, Swapped};
    stage.seen(Some(&[Present, Swapped, Absent, Swapped]), 50_000);
    assert_eq!(stage.take_found(), [span(0, 1)]);
    assert_eq!((stage.counts().used, stage.counts().wasted, stage.unread()), (1, 1, 2));
    // Nothing moves: the looks grow rare, but do not end before their time.
    let (mut at, mut looks) = (50_000, 0);
    while let Some(next) = stage.look_at_us() {
        at = next;
        let pages = total(&stage.look(at).unwrap());
        stage.seen((looks % 2 == 0).then_some(&vec![Swapped; pages][..]), at);
        looks += 1;
    }
    assert!((120..140).contains(&looks), "{looks}");
    assert!(at >= GIVEN_UP_US);
    assert_eq!((stage.counts().wasted, stage.is_busy()), (3, false));
}

#[test]
fn nothing_goes_beyond_the_room_or_while_held() {
    let mut stage = ready();
    stage.offer(&[set(0, 2000)]);
    stage.allow(Ok(700));
    assert_eq!(total(&order(&mut stage, 1, 0).unwrap()), 512);
    assert_eq!(order(&mut stage, 2, 0), None, "the rest of the room is not worth an order while one is under way");
    stage.moved(1, Some(0), 1);
    assert_eq!(total(&order(&mut stage, 2, 1).unwrap()), 188);
    stage.moved(2, Some(0), 1);
    assert_eq!(order(&mut stage, 3, 1), None);
    stage.allow(Err(Hold::Pressure));
    assert_eq!((order(&mut stage, 3, 2), stage.hold()), (None, Some(Hold::Pressure)));
    stage.allow(Ok(5));
    assert_eq!(total(&order(&mut stage, 3, 3).unwrap()), 5);
    // A new word about the room does not know of what is on its way.
    stage.allow(Ok(5));
    assert_eq!(order(&mut stage, 4, 3), None);
}

#[test]
fn the_rate_holds() {
    let mut stage = ready();
    stage.set_rate(10_000.0);
    stage.offer(&[set(0, 100_000)]);
    let mut pages = 0;
    for now_us in (0..1_000_000).step_by(1000) {
        while let Some(spans) = order(&mut stage, 1, now_us) {
            pages += total(&spans);
            stage.moved(1, Some(0), now_us);
        }
    }
    assert!((9000..=10_600).contains(&pages), "{pages}");
}

#[test]
fn a_set_whose_guest_went_elsewhere_is_cut_short() {
    let mut stage = ready();
    stage.offer(&[set(0, 5000), next(90_000, 8)]);
    // In an order of its own, but within the set: goes on.
    assert!((0..600).all(|i| stage.touched(i * 7 % 5000, 1, false)));
    assert!(!stage.cut_short());
    // Pages of the set that the guest was first at are none elsewhere.
    assert!((0..40).all(|i| !stage.touched(60_000 + i, 64, true)));
    assert!(!stage.cut_short());
    assert!((0..400).all(|i| !stage.touched(50_000 + i, 64, false)));
    assert!(stage.cut_short());
    assert_eq!(order(&mut stage, 1, 0).unwrap(), [span(90_000, 8)]);
    assert!(!stage.cut_short(), "nothing is planned");
}

#[test]
fn failed_orders_and_an_end_leave_nothing_behind() {
    let mut stage = ready();
    stage.offer(&[set(0, 1000)]);
    order(&mut stage, 1, 0).unwrap();
    stage.moved(1, None, 5);
    stage.ask(5).unwrap();
    stage.answer(&[PageState::Swapped; ORDER_PAGES]).unwrap();
    stage.not_sent();
    assert_eq!((stage.is_busy(), stage.counts().dropped), (false, 1000));
    assert!(stage.take_outcomes().iter().all(|outcome| !outcome.used), "they may be proposed again");
    stage.offer(&[set(0, 1000)]);
    stage.ask(9).unwrap();
    stage.no_answer();
    stage.drop_planned();
    assert!(!stage.is_busy() && stage.pages.is_empty());
}

#[derive(Debug, Clone)]
enum Step {
    Offer(u64, u32, bool),
    Touch(u64),
    Ask,
    Done(usize, bool),
    Look,
    Allow(Option<u64>),
    Cut,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0u64..3000, 1u32..200, any::<bool>()).prop_map(|(first, pages, set)| Step::Offer(first, pages, set)),
        4 => (0u64..3200).prop_map(Step::Touch),
        4 => Just(Step::Ask),
        3 => (0usize..3, prop::bool::weighted(0.9)).prop_map(|(at, well)| Step::Done(at, well)),
        2 => Just(Step::Look),
        1 => prop::option::of(0u64..2000).prop_map(Step::Allow),
        1 => Just(Step::Cut),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    /// Beside a guest whose pages are swapped, in the swap cache or present.
    #[test]
    fn every_page_has_one_fate_and_nothing_present_is_brought(steps in steps(), swapped in prop::collection::vec(any::<bool>(), 3200)) {
        let mut stage = Stage::new();
        let mut memory: Vec<PageState> =
            swapped.into_iter().map(|swapped| if swapped { PageState::Swapped } else { PageState::Present }).collect();
        let mut under_way: BTreeMap<u64, Vec<Span>> = BTreeMap::new();
        let (mut ticket, mut room, mut now_us) = (0, 0u64, 0);
        for step in steps {
            now_us += 7000;
            match step {
                Step::Offer(first, pages, true) => stage.offer(&[set(first, pages)]),
                Step::Offer(first, pages, false) => stage.offer(&[next(first, pages)]),
                Step::Touch(frame) => {
                    let before = std::mem::replace(&mut memory[frame as usize], PageState::Present);
                    // Present pages raise no faults.
                    if before == PageState::Swapped {
                        stage.touched(frame, 1, false);
                    }
                }
                Step::Ask => if let Some(asked) = stage.ask(now_us) {
                    let states: Vec<PageState> =
                        asked.iter().copied().flat_map(frames).map(|frame| memory[frame as usize]).collect();
                    if let Some(spans) = stage.answer(&states) {
                        prop_assert!(total(&spans) <= ORDER_PAGES);
                        prop_assert!(total(&spans) as u64 <= room);
                        room -= total(&spans) as u64;
                        for frame in spans.iter().copied().flat_map(frames) {
                            prop_assert_eq!(memory[frame as usize], PageState::Swapped);
                        }
                        ticket += 1;
                        stage.sent(ticket);
                        under_way.insert(ticket, spans);
                        prop_assert!(under_way.len() <= ORDERS);
                    }
                },
                Step::Done(at, well) => if let Some(done) = under_way.keys().copied().nth(at) {
                    under_way.remove(&done);
                    prop_assert!(stage.moved(done, well.then_some(1), now_us));
                },
                Step::Look => if let Some(spans) = stage.look(now_us) {
                    let states: Vec<PageState> =
                        spans.iter().copied().flat_map(frames).map(|frame| memory[frame as usize]).collect();
                    stage.seen(Some(&states), now_us);
                },
                Step::Allow(told) => {
                    stage.allow(told.ok_or(Hold::Pressure));
                    let busy: u64 = under_way.values().map(|spans| total(spans) as u64).sum();
                    room = told.unwrap_or(0).saturating_sub(busy);
                }
                Step::Cut => stage.drop_planned(),
            }
            let counts = stage.counts();
            let settled = counts.used + counts.late + counts.wasted + counts.in_place + counts.dropped;
            prop_assert_eq!(counts.wanted, settled + stage.pages.len() as u64);
            prop_assert!(counts.staged <= counts.wanted);
        }
    }
}

#[test]
fn while_the_guest_is_quiet_a_set_is_mapped_and_witnesses_speak_for_it() {
    let mut stage = ready();
    stage.offer(&[set(0, 40), next(1000, 3)]);
    order(&mut stage, 1, 0).unwrap();
    assert_eq!(stage.map(), None, "first what is to be brought");
    stage.moved(1, Some(0), 1000);
    assert_eq!(stage.map(), None, "nobody has looked yet whether the guest is there");
    let seen = |stage: &mut Stage, touched: &[u64], at: u64| {
        let looked = stage.look(at).unwrap();
        let state = |frame| if touched.contains(&frame) { PageState::Present } else { PageState::Swapped };
        let states: Vec<_> = looked.iter().copied().flat_map(frames).map(state).collect();
        stage.seen(Some(&states), at);
        total(&looked)
    };
    assert_eq!(seen(&mut stage, &[], 50_000), 43);
    let mapped = stage.map().unwrap();
    assert_eq!(mapped, [span(1, 15), span(17, 15), span(33, 7)], "of the set, and not what was merely next");
    stage.sent(2);
    assert_eq!(stage.map(), None);
    assert!(stage.moved(2, Some(5), 60_000));
    assert_eq!((stage.unread(), stage.counts().staged, stage.counts().cpu_us), (43, 43, 5));
    // what is mapped is asked for no more; a witness that was touched speaks for those that ride on it
    assert_eq!(seen(&mut stage, &[16], 500_000), 6);
    assert_eq!(stage.take_found(), [span(16, 16)]);
    assert_eq!((stage.counts().used, stage.unread()), (16, 27));
    assert_eq!(stage.map(), None, "the guest is not quiet");
    assert!(stage.touched(0, 1, false), "told by a fault as well");
    assert_eq!(stage.counts().used, 32);
    seen(&mut stage, &[], 1_000_000_000);
    assert_eq!((stage.counts().used, stage.counts().wasted, stage.unread()), (32, 11, 0));
    assert!(stage.pages.is_empty() && stage.riders.is_empty());
}

#[test]
fn behind_a_guest_that_is_faster_order_is_of_no_use() {
    let mut stage = ready();
    stage.window = ORDER_PAGES;
    // In an order of time in which neighbours are far apart.
    let sets: Vec<Candidate> = (0..20_000).map(|i| set(i * 7919 % 20_000, 1)).collect();
    stage.offer(&sets);
    let mut distance = Vec::new();
    for ticket in 0..12 {
        let spans = order(&mut stage, ticket, 0).unwrap();
        stage.moved(ticket, Some(1), 0);
        distance.push(spans.len());
        // What comes next is touched before it is there.
        let next: Vec<u64> = stage.planned.iter().copied().flat_map(frames).take(40).collect();
        next.into_iter().for_each(|frame| assert!(stage.touched(frame, 1, true)));
    }
    assert!(distance[0] > 450 && distance[11] < 300, "by address, from further ahead: {distance:?}");
    // One that touches what is there has the next pages in its order again.
    let staged: Vec<u64> = stage.staged.iter().flat_map(|batch| &batch.spans).copied().flat_map(frames).collect();
    staged.into_iter().take(3000).for_each(|frame| assert!(stage.touched(frame, 1, true)));
    stage.drop_planned();
    stage.offer(&sets.iter().map(|one| Candidate { first: one.first + 50_000, ..*one }).collect::<Vec<_>>());
    let spans = order(&mut stage, 99, 0).unwrap();
    assert!(spans.len() > 450, "{}", spans.len());
    // However little is known of the guest, what a window takes to come is bounded.
    stage.set_rate(10_000.0);
    stage.begin();
    stage.drop_planned();
    stage.offer(&sets.iter().map(|one| Candidate { first: one.first + 100_000, ..*one }).collect::<Vec<_>>());
    stage.moved(99, Some(1), 0);
    let spans = order(&mut stage, 100, 1_000_000).unwrap();
    assert!(spans.len() > 450, "{}", spans.len());
}
