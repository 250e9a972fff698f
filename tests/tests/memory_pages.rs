//! The memory helper on a real guest: where its memory lies, what it faults on, and bringing that back from real swap.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

use std::collections::HashSet;
use std::time::Duration;

use prestage_integration::libvirt::{Hypervisor, HypervisorConfig};
use prestage_integration::memory::helper::client::{Event, Helper};
use prestage_integration::memory::process::identify;
use prestage_integration::memory::{MemoryError, PageState, Region, Signal, Span};
use prestage_tests::pages::{Memory, Usage};
use prestage_tests::paths::program;
use prestage_tests::swap::Swap;
use prestage_tests::toucher::{Backing, MemoryRig};

const MEMORY_MIB: u64 = 256;
const FILLED_MIB: u64 = 64;
const FILLED_PAGES: u64 = FILLED_MIB << 8;
const VM: u32 = 1;

fn spans(regions: &[Region]) -> Vec<Span> {
    regions.iter().map(|region| Span { frame: region.frame, pages: u32::try_from(region.pages).unwrap() }).collect()
}

/// Waits for the answer to an order; hears faults meanwhile.
fn moved(
    helper: &mut Helper,
    ticket: u64,
) -> Result<prestage_integration::memory::helper::protocol::Moved, MemoryError> {
    loop {
        match helper.next_event(Duration::from_secs(30)).unwrap() {
            Some(Event::Moved { ticket: of, moved }) if of == ticket => return moved,
            Some(_) => {}
            None => panic!("no answer to an order"),
        }
    }
}

/// Faults until none come for half a second.
fn faults(helper: &mut Helper) -> (Vec<u64>, u64) {
    let (mut frames, mut all_lost) = (Vec::new(), 0);
    while let Some(event) = helper.next_event(Duration::from_millis(500)).unwrap() {
        if let Event::Faults { lost, faults, .. } = event {
            frames.extend(faults.iter().map(|fault| fault.frame));
            all_lost += lost;
        }
    }
    (frames, all_lost)
}

fn of_guest(backing: Backing) {
    if let Err(why) = Swap::zram_available() {
        println!("SKIPPED: {why}");
        return;
    }
    let rig = MemoryRig::new().unwrap();
    let guest = rig.guest("prestage-pages", MEMORY_MIB, backing).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_alive().unwrap();
    run.fill(FILLED_MIB).unwrap();

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = HypervisorConfig { uri: rig.libvirt.uri().to_owned(), ..HypervisorConfig::default() };
    let hypervisor = Hypervisor::start(config).unwrap();
    let regions = runtime.block_on(async {
        let mut state = hypervisor.state();
        state.wait_for(|state| state.connected).await.unwrap();
        hypervisor.memory_layout("prestage-pages").await.unwrap().unwrap()
    });
    let pages: u64 = regions.iter().map(|region| region.pages).sum();
    let most = MEMORY_MIB << 8;
    assert!((most - 128..=most).contains(&pages), "all of it but the holes of a PC: {pages} of {most}: {regions:?}");

    let mut helper = Helper::start(&program("prestage-memory").unwrap(), &[]).unwrap();
    let process = identify(guest.pid().unwrap().try_into().unwrap()).unwrap();
    let watching = helper.watch(VM, process, regions.clone()).unwrap();
    println!("watched by {}; not by {:?}", watching.signal, watching.passed_over);
    let before = helper.residency(VM).unwrap();
    assert!(before.present + before.cached >= FILLED_PAGES, "{before:?}");
    assert_eq!(before.present + before.cached + before.swapped + before.absent, pages);

    let mut swap = Swap::zram(2 * (MEMORY_MIB << 20)).unwrap();
    swap.set_page_cluster(0).unwrap();
    let memory = Memory::of(guest.pid().unwrap(), MEMORY_MIB << 20).unwrap();
    // a guest that has only just come up takes some of it back at first
    let mut tries = 0;
    let out = loop {
        memory.push_out().unwrap();
        let out = helper.residency(VM).unwrap();
        tries += 1;
        if out.present < 2048 || tries == 40 {
            break out;
        }
        println!("{} pages are back at once", out.present);
        std::thread::sleep(std::time::Duration::from_millis(250));
    };
    assert!(out.swapped >= FILLED_PAGES && out.present < 2048, "{out:?}");

    // faults are heard, each once, and nothing else
    run.order_pages(7).unwrap();
    helper.listen(VM, 1).unwrap();
    let usage = Usage::of(guest.pid().unwrap()).unwrap();
    let alone = run.touch(Duration::ZERO).unwrap();
    let (heard, lost) = faults(&mut helper);
    helper.listen(VM, 0).unwrap();
    let majors = Usage::of(guest.pid().unwrap()).unwrap().since(&usage).major_faults;
    let distinct: HashSet<u64> = heard.iter().copied().collect();
    println!("{majors} major faults, {} heard, {} pages, {lost} lost", heard.len(), distinct.len());
    assert!(majors >= FILLED_PAGES * 9 / 10, "{majors}");
    if watching.signal == Signal::PerfMajor {
        assert_eq!(lost, 0);
        assert!(distinct.len() as u64 >= FILLED_PAGES * 9 / 10, "{}", distinct.len());
        // a fault that had to be tried again is one to the process and two to the counter
        assert!(heard.len() as u64 <= majors + majors / 100, "{} of {majors} heard", heard.len());
    } else {
        println!("SKIPPED: the order of faults, which {} does not tell", watching.signal);
    }

    // brought in, in the order they came: no more than a few major faults are left
    memory.push_out().unwrap();
    run.order_pages(7).unwrap();
    let wanted: Vec<Span> = heard.iter().map(|frame| Span { frame: *frame, pages: 1 }).collect();
    for part in wanted.chunks(1024) {
        let ticket = helper.bring_in(VM, part.to_vec()).unwrap();
        let moved = moved(&mut helper, ticket).unwrap();
        assert_eq!(moved.asked, part.len() as u64);
    }
    let usage = Usage::of(guest.pid().unwrap()).unwrap();
    let staged = run.touch(Duration::ZERO).unwrap();
    let left = Usage::of(guest.pid().unwrap()).unwrap().since(&usage).major_faults;
    println!("{left} major faults left of {majors}; {:?} instead of {:?}", staged.time, alone.time);
    assert_eq!(staged.sum, alone.sum, "the guest reads what it wrote");
    assert!(left * 10 <= majors, "{left} of {majors}");
    let states = helper.states(VM, wanted[..1000].to_vec()).unwrap();
    let present = states.iter().filter(|state| **state == PageState::Present).count();
    assert!(present >= 900, "what was touched is present: {present} of 1000");

    // QEMU is killed in the middle of it
    memory.push_out().unwrap();
    let all = spans(&regions);
    let tickets: Vec<u64> = (0..8).map(|_| helper.bring_in(VM, all.clone()).unwrap()).collect();
    rig.libvirt.virsh(&["destroy", "prestage-pages"]).unwrap();
    let (mut answers, mut gone) = (0, false);
    while answers < tickets.len() || !gone {
        match helper.next_event(Duration::from_secs(30)).unwrap() {
            Some(Event::Moved { moved: Ok(_) | Err(MemoryError::Gone { .. }), .. }) => answers += 1,
            Some(Event::Gone { vm: VM }) => gone = true,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(helper.residency(VM), Err(MemoryError::Unknown(VM)));
}

#[test]
fn a_swapped_out_guest_is_watched_and_brought_back() {
    of_guest(Backing::Anonymous);
}

#[test]
fn so_is_one_with_shared_memory() {
    of_guest(Backing::Shared);
}
