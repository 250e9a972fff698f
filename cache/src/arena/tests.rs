//! Memory behind the range and taken away, claims of pages.

use super::*;

#[test]
fn a_vacated_arena_holds_no_memory() {
    let access = |arena: &Arena| {
        let at = arena.raw_parts().0 as usize;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let of = |line: &str| {
            let (range, rest) = line.split_once(' ')?;
            let (from, to) = range.split_once('-')?;
            let number = |text| usize::from_str_radix(text, 16).ok();
            (number(from)? <= at && at < number(to)?).then(|| rest[..4].to_owned())
        };
        maps.lines().find_map(of).unwrap()
    };
    let arena = Arena::new(64, HugePages::No).unwrap();
    arena.claim(3, 0, 16).unwrap().as_mut_slice().fill(1);
    assert_eq!(access(&arena), "rw-p");
    arena.vacate().unwrap();
    assert_eq!(access(&arena), "---p");
}

/// Whoever asks the kernel for memory meanwhile is given none of it.
#[test]
fn nobody_is_given_addresses_of_the_range_while_memory_is_put_behind_them() {
    const ROUNDS: usize = 2000;
    let range = Range::set_aside(8 * PIECE).unwrap();
    let (from, until) = (range.base.addr(), range.base.addr() + range.len + PIECE);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        let asking = threads.spawn(|| {
            let mut inside = 0;
            while !over.load(Ordering::Relaxed) {
                let (len, flags) = (PIECE + PAGE_BYTES, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                // SAFETY: a new mapping at addresses of the kernel's choice, never touched.
                let got = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
                assert_ne!(got, libc::MAP_FAILED);
                inside += usize::from((from..until).contains(&got.addr()));
                // SAFETY: the mapping just made. If it lies in the range, the range has a hole, which the test is about.
                unsafe { libc::munmap(got, len) };
            }
            inside
        });
        for _ in 0..ROUNDS {
            range.give(0, 4 * PIECE, HugePages::Try).unwrap();
            range.take(0, 4 * PIECE).unwrap();
        }
        over.store(true, Ordering::Relaxed);
        assert_eq!(asking.join().unwrap(), 0);
    });
}

#[test]
fn huge_pages_are_taken_where_the_host_has_some_and_given_back() {
    let free = || -> u64 {
        let told = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        told.ok().and_then(|told| told.trim().parse().ok()).unwrap_or(0)
    };
    let range = Range::set_aside(4 * PIECE).unwrap();
    let before = free();
    if before < 2 {
        println!("SKIPPED in part: the host has {before} free huge pages of 2 MiB (vm.nr_hugepages)");
        assert!(range.give(0, 2 * PIECE, HugePages::Require).is_err());
        assert_ne!(range.give(0, 2 * PIECE, HugePages::Try).unwrap(), PageKind::HugeTlb);
        return;
    }
    if let Err(error) = range.give(PIECE, 3 * PIECE, HugePages::Require) {
        println!("SKIPPED: somebody else has taken the huge pages: {error}");
        return;
    }
    let given = range.start().wrapping_add(PIECE);
    // SAFETY: within what was just given.
    unsafe { given.write_bytes(7, 2 * PIECE) };
    let mapped = std::fs::read_to_string("/proc/self/smaps").unwrap();
    assert!(
        mapped.lines().any(|line| line.starts_with("VmFlags:") && line.contains(" ht")),
        "no huge pages:\n{mapped}"
    );
    range.take(PIECE, 3 * PIECE).unwrap();
}

#[test]
fn a_page_is_claimed_once_at_a_time() {
    let arena = Arena::new(2, HugePages::No).unwrap();
    let mut first = arena.claim(1, 2, 4).unwrap();
    assert!(arena.claim(1, 5, 1).is_none());
    assert!(arena.claim(1, 5, 3).is_none());
    assert!(arena.claim(1, 6, 2).is_some(), "a refused claim must not keep what it could have had");
    assert!(arena.claim(0, 5, 1).is_some());
    assert!(arena.claim(2, 0, 1).is_none());
    assert!(arena.claim(1, 10, 7).is_none());
    first.as_mut_slice().fill(7);
    assert!(arena.busy(1));
    drop(first);
    assert!(!arena.busy(1));
    let pin = arena.pin(1).unwrap();
    assert_eq!(pin.bytes(2 * PAGE_BYTES, 4 * PAGE_BYTES), vec![7; 4 * PAGE_BYTES]);
    assert!(arena.busy(1));
}

/// Pages of the arena that are in memory.
fn resident_bytes(arena: &Arena) -> u64 {
    let at = arena.raw_parts().0 as usize;
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = maps.lines();
    let mut bytes = 0;
    let mut ours = false;
    for line in &mut lines {
        if let Some((from, _)) = line.split_once(' ').and_then(|(range, _)| range.split_once('-')) {
            let from = usize::from_str_radix(from, 16).unwrap();
            ours = (at..at + arena.range.len).contains(&from);
        } else if let Some(kib) = line.strip_prefix("Rss:").filter(|_| ours) {
            bytes += kib.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024;
        }
    }
    bytes
}

#[test]
fn an_arena_that_shrinks_gives_memory_back_and_keeps_what_stays() {
    let arena = Arena::with_room(128, 256, HugePages::No).unwrap();
    for slot in 0..128 {
        arena.claim(slot, 0, 16).unwrap().as_mut_slice().fill(slot as u8);
    }
    assert_eq!(resident_bytes(&arena), 128 << 16);
    let held = arena.pin(40).unwrap();
    assert_eq!(arena.shrink(32).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!((arena.slots(), resident_bytes(&arena)), (128, 128 << 16), "nothing has changed");
    drop(held);
    arena.shrink(32).unwrap();
    assert_eq!((arena.slots(), resident_bytes(&arena)), (32, 32 << 16));
    assert!(arena.pin(32).is_none() && arena.claim(32, 0, 1).is_none() && !arena.busy(32));
    assert_eq!(arena.pin(31).unwrap().bytes(0, BLOCK_BYTES), vec![31; BLOCK_BYTES]);
    arena.grow(256).unwrap();
    assert_eq!((arena.slots(), resident_bytes(&arena)), (256, 32 << 16), "memory comes when it is used");
    assert_eq!(arena.pin(31).unwrap().bytes(0, BLOCK_BYTES), vec![31; BLOCK_BYTES]);
    assert!(arena.claim(255, 0, 16).unwrap().as_slice().iter().all(|byte| *byte == 0));
    assert_eq!(arena.grow(257).unwrap_err().kind(), io::ErrorKind::OutOfMemory);
    assert!(arena.copy(31, 200, PageMask::run(3, 2)));
    assert_eq!(arena.pin(200).unwrap().bytes(0, 5 * PAGE_BYTES)[3 * PAGE_BYTES..], [31; 2 * PAGE_BYTES]);
    let _claim = arena.claim(201, 4, 1);
    assert!(!arena.copy(31, 201, PageMask::run(3, 2)), "somebody fills it");
    arena.shrink(0).unwrap_err();
    drop(_claim);
    arena.shrink(0).unwrap();
    assert_eq!((arena.slots(), resident_bytes(&arena)), (0, 0));
}
