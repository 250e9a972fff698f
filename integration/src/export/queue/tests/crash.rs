//! The agent dies between any two stores; its successor must answer every request once, and no request twice.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// The stores of one answer, and of one taking.
const ANSWER_STORES: u32 = 6;
const TAKE_STORES: u32 = 2;

fn tracked(size: u16) -> Driver {
    let mut driver = Driver::new(size, DiskConfig::new(1 << 20));
    driver.track_inflight();
    driver
}

/// True as long as stores are left.
fn lives(stores: u32) -> impl FnMut() -> bool {
    let mut left = stores;
    move || {
        let alive = left > 0;
        left = left.saturating_sub(1);
        alive
    }
}

/// Answers a request, dying after so many stores.
fn answer_until(queue: &mut Queue, request: Request, stores: u32) {
    request.data.write_status(0);
    queue.publish(request.head, 1, lives(stores));
}

fn heads(queue: &mut Queue) -> Vec<u16> {
    let mut heads = Vec::new();
    while let Some(request) = queue.pop().unwrap() {
        heads.push(request.head);
        queue.complete(request, Status::Ok);
    }
    heads
}

/// Three requests in flight, answered in each order, with death after each store of each answer.
#[test]
fn death_after_any_store_of_an_answer_loses_nothing_and_answers_nothing_twice() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    for order in orders {
        for dies_at in 0..3 {
            for stores in 0..=ANSWER_STORES {
                let mut driver = tracked(16);
                for head in [6, 0, 3] {
                    driver.request(head, VIRTIO_BLK_T_FLUSH, 0, 0);
                }
                let mut queue = driver.queue();
                let mut requests: Vec<_> = (0..3).map(|_| Some(popped(&mut queue))).collect();
                for (turn, which) in order.into_iter().enumerate().take(dies_at + 1) {
                    let request = requests[which].take().unwrap();
                    answer_until(&mut queue, request, if turn == dies_at { stores } else { ANSWER_STORES });
                }
                drop((queue, requests));
                // Made available while nobody was there.
                driver.request(9, VIRTIO_BLK_T_FLUSH, 0, 0);

                let mut queue = driver.queue();
                assert!(queue.resumed());
                let again = heads(&mut queue);
                let mut answered: Vec<u16> = driver.take_used().into_iter().map(|(head, _)| head).collect();
                let case = format!("order {order:?}, dies at {dies_at} after {stores}, again {again:?}");
                // Before the used index was stored the guest had not seen the answer.
                let unanswered = 3 - dies_at - usize::from(stores >= 4);
                assert_eq!(again.len(), unanswered + 1, "{case}");
                let order_of_taking: Vec<u16> = [6, 0, 3, 9].into_iter().filter(|head| again.contains(head)).collect();
                assert_eq!(again, order_of_taking, "{case}");
                answered.sort_unstable();
                assert_eq!(answered, [0, 3, 6, 9], "{case}");
            }
        }
    }
}

#[test]
fn death_after_any_store_of_a_taking_takes_the_request_once_more() {
    for stores in 0..=TAKE_STORES {
        let mut driver = tracked(16);
        for head in [0, 3, 6] {
            driver.request(head, VIRTIO_BLK_T_FLUSH, 0, 0);
        }
        let mut queue = driver.queue();
        let first = popped(&mut queue);
        queue.track(3, lives(stores));
        drop((first, queue));
        let mut queue = driver.queue();
        assert_eq!(heads(&mut queue), [0, 3, 6], "died after {stores}");
        assert_eq!(driver.take_used().len(), 3);
    }
}

#[test]
fn a_head_that_awaits_being_taken_again_cannot_be_made_available() {
    let mut driver = tracked(16);
    driver.request(0, VIRTIO_BLK_T_FLUSH, 0, 0);
    popped(&mut driver.queue());
    driver.make_available(0);
    let mut queue = driver.queue();
    assert_eq!(popped(&mut queue).head, 0);
    assert!(matches!(queue.pop(), Err(QueueError::HeadInFlight { head: 0 })));
}

#[test]
fn hostile_in_flight_areas_are_refused_or_bounded() {
    let start = |edit: fn(&InflightQueue)| {
        let mut driver = tracked(16);
        driver.request(0, VIRTIO_BLK_T_FLUSH, 0, 0);
        edit(driver.queue().inflight.as_ref().unwrap());
        driver.try_queue(0, Driver::addresses()).map(|mut queue| {
            // Whatever it claims, popping ends.
            for _ in 0..100 {
                match queue.pop() {
                    Ok(Some(request)) => queue.complete(request, Status::Ok),
                    Ok(None) | Err(_) => return,
                }
            }
            panic!("never ends");
        })
    };
    assert!(start(|area| area.set_last_batch_head(16)).is_ok(), "nothing to clear, nothing to look at");
    assert!(start(|area| area.set_used_idx(u16::MAX)).is_ok());
    let past_the_end = start(|area| {
        area.set_used_idx(u16::MAX);
        area.set_last_batch_head(16);
    });
    assert!(matches!(past_the_end, Err(QueueStartError::Inflight(InflightError::Head { head: 16, .. }))));
    let circle = start(|area| {
        area.set_used_idx(100);
        area.set_last_batch_head(3);
        area.link(3);
    });
    assert!(circle.is_ok());
    assert!(start(|area| (0..16).for_each(|head| area.set_inflight(head))).is_ok());
}

/// One step of a life with many deaths.
#[derive(Debug, Clone)]
enum Step {
    Offer,
    Take,
    Answer(usize),
    DieAnswering(usize, u32),
    DieTaking(u32),
    GuestLooks,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Offer),
        4 => Just(Step::Take),
        3 => any::<usize>().prop_map(Step::Answer),
        1 => (any::<usize>(), 0..=ANSWER_STORES).prop_map(|(which, stores)| Step::DieAnswering(which, stores)),
        1 => (0..=TAKE_STORES).prop_map(Step::DieTaking),
        3 => Just(Step::GuestLooks),
    ];
    prop::collection::vec(step, 1..120)
}

/// The guest's side: which requests are outstanding, by head.
struct Guest {
    driver: Driver,
    free: Vec<u16>,
    outstanding: BTreeMap<u16, u32>,
    offered: u32,
    answered: u32,
}

impl Guest {
    fn offer(&mut self) {
        if let Some(head) = self.free.pop() {
            self.driver.request(head, VIRTIO_BLK_T_FLUSH, 0, 0);
            self.outstanding.insert(head, self.offered);
            self.offered += 1;
        }
    }

    fn look(&mut self) {
        for (head, _) in self.driver.take_used() {
            assert!(self.outstanding.remove(&head).is_some(), "head {head} was answered twice");
            self.free.push(head);
            self.answered += 1;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_life_with_any_deaths_answers_each_request_once(steps in steps()) {
        let driver = tracked(16);
        let mut queue = driver.queue();
        let mut guest = Guest {
            driver,
            free: (0..5).map(|i| i * 3).collect(),
            outstanding: BTreeMap::new(),
            offered: 0,
            answered: 0,
        };
        let mut held: Vec<Request> = Vec::new();
        for step in steps {
            match step {
                Step::Offer => guest.offer(),
                Step::GuestLooks => guest.look(),
                Step::Take => held.extend(queue.pop().unwrap()),
                Step::Answer(which) => {
                    if !held.is_empty() {
                        let request = held.swap_remove(which % held.len());
                        queue.complete(request, Status::Ok);
                    }
                }
                Step::DieAnswering(which, stores) => {
                    if !held.is_empty() {
                        let request = held.swap_remove(which % held.len());
                        answer_until(&mut queue, request, stores);
                    }
                    held.clear();
                    queue = guest.driver.queue();
                }
                Step::DieTaking(stores) => {
                    let next = queue.ring.available_head(queue.next_available);
                    if queue.resubmit.is_empty() && queue.ring.available_index() != queue.next_available {
                        queue.track(next, lives(stores));
                    }
                    held.clear();
                    queue = guest.driver.queue();
                }
            }
        }
        for request in held {
            queue.complete(request, Status::Ok);
        }
        heads(&mut queue);
        guest.look();
        prop_assert!(guest.outstanding.is_empty(), "never answered: {:?}", guest.outstanding);
        prop_assert_eq!(guest.answered, guest.offered);
    }
}
