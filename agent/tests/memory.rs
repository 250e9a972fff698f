//! `prestage-memory` as the daemon starts it, with a plain process that stands in for QEMU.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use memmap2::{MmapMut, MmapOptions};
use prestage_integration::memory::helper::client::{Event, Helper};
use prestage_integration::memory::process::identify;
use prestage_integration::memory::{MemoryError, PageState, ProcessId, Push, Region, Signal, Span};

const PAGES: usize = 2000;
/// Where the stand-in's memory begins in the guest it pretends to be.
const FRAME: u64 = 0x100;

/// The child of the tests below: maps a file, or memory of its own, and touches the pages it is told to.
#[test]
#[ignore = "a child process of the tests here"]
fn stand_in() {
    let mut map: Option<MmapMut> = None;
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        match words.next().unwrap() {
            "map" => {
                let file = File::open(words.next().unwrap()).unwrap();
                // SAFETY: nobody shortens the file while the test runs.
                let made = unsafe { MmapOptions::new().len(PAGES * 4096).map_copy(&file) }.unwrap();
                made.advise(memmap2::Advice::Random).unwrap();
                println!("> {}", made.as_ptr() as u64);
                map = Some(made);
            }
            "anon" => {
                let mut made = MmapMut::map_anon(PAGES * 4096).unwrap();
                let _ = made.advise(memmap2::Advice::NoHugePage);
                made.fill(1);
                println!("> {}", made.as_ptr() as u64);
                map = Some(made);
            }
            "touch" => {
                let map = map.as_mut().unwrap();
                let sum: u64 = words.map(|page| u64::from(map[4096 * page.parse::<usize>().unwrap()])).sum();
                println!("> {sum}");
            }
            // in a thread of its own, which has ended then
            "thread" => {
                let map = map.as_ref().unwrap();
                let touch = || words.map(|page| u64::from(map[4096 * page.parse::<usize>().unwrap()])).sum::<u64>();
                println!("> {}", std::thread::scope(|scope| scope.spawn(touch).join().unwrap()));
            }
            // as a hypervisor that has its machine open
            "hold" => {
                let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
                std::mem::forget(vm);
                println!("> 0");
            }
            "run" => {
                let pages: Vec<usize> = words.map(|page| page.parse().unwrap()).collect();
                run_under_kvm(map.as_mut().unwrap(), &pages);
                println!("> 0");
            }
            "unmap" => {
                map = None;
                println!("> 0");
            }
            other => panic!("{other}"),
        }
        std::io::stdout().flush().unwrap();
    }
}

/// A guest in protected mode, without an operating system, that reads a byte of each page in this order and halts. Its code is
/// on page 1, the addresses it reads from page 2 on.
fn run_under_kvm(memory: &mut MmapMut, pages: &[usize]) {
    use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
    use kvm_ioctls::{Kvm, VcpuExit};
    const CODE: [u8; 12] = [
        0x8b, 0x06, // again: mov eax, [esi]
        0x8a, 0x18, // mov bl, [eax]
        0x83, 0xc6, 0x04, // add esi, 4
        0x39, 0xfe, // cmp esi, edi
        0x72, 0xf5, // jb again
        0xf4, // hlt
    ];
    memory[4096..4096 + CODE.len()].copy_from_slice(&CODE);
    for (at, page) in pages.iter().enumerate() {
        memory[8192 + 4 * at..][..4].copy_from_slice(&u32::try_from(page * 4096).unwrap().to_le_bytes());
    }
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        // as the regions below have it
        guest_phys_addr: FRAME * 4096,
        memory_size: memory.len() as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: the memory outlives the guest, which ends with this function.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut special = vcpu.get_sregs().unwrap();
    let base = FRAME * 4096;
    let code = kvm_segment {
        base,
        limit: u32::MAX,
        selector: 8,
        type_: 11,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: 16, type_: 3, ..code };
    special.cs = code;
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.cr0 |= 1;
    vcpu.set_sregs(&special).unwrap();
    let mut registers = vcpu.get_regs().unwrap();
    (registers.rip, registers.rflags) = (4096, 2);
    (registers.rsi, registers.rdi) = (8192, 8192 + 4 * pages.len() as u64);
    vcpu.set_regs(&registers).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::Hlt => {}
        exit => panic!("{exit:?}"),
    }
}

struct StandIn {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl StandIn {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["stand_in", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, orders, answers }
    }

    fn tell(&mut self, order: &str) -> u64 {
        writeln!(self.orders, "{order}").unwrap();
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "the stand-in has ended");
            // the test runner's own words may stand before it
            if let Some((_, answer)) = line.split_once("> ") {
                return answer.trim().parse().unwrap();
            }
        }
    }

    fn touch(&mut self, pages: &[usize]) {
        self.touch_by("touch", pages);
    }

    fn touch_by(&mut self, order: &str, pages: &[usize]) {
        let pages: Vec<String> = pages.iter().map(usize::to_string).collect();
        self.tell(&format!("{order} {}", pages.join(" ")));
    }

    fn id(&self) -> ProcessId {
        identify(self.child.id()).unwrap()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn helper() -> Helper {
    let exe = fs::canonicalize(std::env::current_exe().unwrap()).unwrap();
    Helper::start(Path::new(env!("CARGO_BIN_EXE_prestage-memory")), &[&exe]).unwrap()
}

/// One region below a hole and one above it, so that frames and addresses differ.
fn regions(host: u64) -> Vec<Region> {
    let low = Region { frame: FRAME, pages: 1000, host };
    vec![low, Region { frame: FRAME + 2000, pages: PAGES as u64 - 1000, host: host + 1000 * 4096 }]
}

fn frame(page: usize) -> u64 {
    FRAME + page as u64 + if page < 1000 { 0 } else { 1000 }
}

/// A file whose pages are not in memory.
fn cold_file(folder: &Path) -> PathBuf {
    let path = folder.join("memory");
    let mut file = File::create(&path).unwrap();
    file.write_all(&vec![3; PAGES * 4096]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    cool(&path);
    path
}

fn cool(path: &Path) {
    let file = File::open(path).unwrap();
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Pages in no order that adding a step could guess.
fn shuffled(count: usize) -> Vec<usize> {
    let mut pages: Vec<usize> = (0..PAGES).step_by(PAGES / count).collect();
    let mut state = 1_u64;
    for at in (1..pages.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        pages.swap(at, (state >> 33) as usize % (at + 1));
    }
    pages
}

/// Hears faults until `count` have come or nothing more does.
fn hear(helper: &mut Helper, vm: u32, count: usize) -> (Vec<u64>, u64) {
    let (mut frames, mut lost) = (Vec::new(), 0);
    while frames.len() < count {
        match helper.next_event(Duration::from_secs(5)).unwrap() {
            Some(Event::Faults { vm: of, lost: more, faults }) => {
                assert_eq!(of, vm);
                assert!(faults.is_sorted_by_key(|fault| fault.at_us));
                frames.extend(faults.iter().map(|fault| fault.frame));
                lost += more;
            }
            Some(event) => panic!("{event:?}"),
            None => break,
        }
    }
    (frames, lost)
}

#[test]
fn major_faults_are_told_in_order_with_their_frames() {
    // not tmpfs, whose pages cannot be dropped
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = cold_file(folder.path());
    let (mut helper, mut guest) = (helper(), StandIn::start());
    let host = guest.tell(&format!("map {}", path.display()));
    let watching = helper.watch(7, guest.id(), regions(host)).unwrap();
    for (signal, why) in &watching.passed_over {
        println!("not {signal}: {why}");
    }
    if watching.signal != Signal::PerfMajor {
        println!("skipped: the order of faults, which {} does not tell", watching.signal);
        return;
    }
    let pages = shuffled(500);
    guest.touch(&pages[..10]);
    helper.listen(7, 1).unwrap();
    guest.touch(&pages[10..]);
    let expected: Vec<u64> = pages[10..].iter().map(|page| frame(*page)).collect();
    assert_eq!(hear(&mut helper, 7, expected.len()), (expected, 0), "and none of before it listened");
    helper.listen(7, 0).unwrap();
    guest.touch(&pages);
    cool(&path);
    helper.listen(7, 10).unwrap();
    let rest: Vec<usize> = (0..PAGES).filter(|page| !pages.contains(page)).take(500).collect();
    guest.touch(&rest);
    let (heard, lost) = hear(&mut helper, 7, 50);
    assert_eq!((heard.len(), lost), (50, 0), "each tenth");
    assert!(heard.iter().all(|heard| rest.iter().any(|page| frame(*page) == *heard)));
}

/// A helper that finds the kernel's tracepoints where systemd mounts them, also on a host that has not.
#[test]
fn a_signal_is_not_given_up_for_faults_of_threads_that_come_and_go() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = cold_file(folder.path());
    let (mut helper, mut guest) = (helper(), StandIn::start());
    let host = guest.tell(&format!("map {}", path.display()));
    let watching = helper.watch(7, guest.id(), regions(host)).unwrap();
    if watching.signal != Signal::PerfMajor {
        println!("SKIPPED: faults that perf does not hear: {}", watching.signal);
        return;
    }
    helper.listen(7, 1).unwrap();
    let pages = shuffled(1000);
    // as QEMU's thread does that reads a machine's memory to save it
    guest.touch_by("thread", &pages[..500]);
    // the signal is judged once a second
    let until = std::time::Instant::now() + Duration::from_secs(3);
    while std::time::Instant::now() < until {
        match helper.next_event(Duration::from_millis(100)).unwrap() {
            // it may have been noticed while it ran
            None | Some(Event::Faults { .. }) => {}
            Some(event) => panic!("{event:?}"),
        }
    }
    guest.touch(&pages[500..]);
    let expected: Vec<u64> = pages[500..].iter().map(|page| frame(*page)).collect();
    assert_eq!(hear(&mut helper, 7, expected.len()), (expected, 0));
}

fn helper_with_tracepoints(folder: &Path) -> Helper {
    use std::os::unix::fs::PermissionsExt;
    let script = folder.join("prestage-memory");
    let text = format!(
        "#!/bin/sh\nexec unshare --mount sh -c 'mount -t tracefs tracefs /sys/kernel/tracing; exec \"$0\" \"$@\"' {} \"$@\"\n",
        env!("CARGO_BIN_EXE_prestage-memory")
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let exe = fs::canonicalize(std::env::current_exe().unwrap()).unwrap();
    Helper::start(&script, &[&exe]).unwrap()
}

#[test]
fn what_a_guest_touches_under_kvm_is_told_by_the_kernels_tracepoint() {
    if !nix::unistd::geteuid().is_root() || File::options().read(true).write(true).open("/dev/kvm").is_err() {
        println!("SKIPPED: KVM's faults, for want of /dev/kvm or root");
        return;
    }
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = cold_file(folder.path());
    let (mut helper, mut guest) = (helper_with_tracepoints(folder.path()), StandIn::start());
    let host = guest.tell(&format!("map {}", path.display()));
    guest.tell("hold");
    let region = vec![Region { frame: FRAME, pages: PAGES as u64, host }];
    let watching = helper.watch(7, guest.id(), region).unwrap();
    assert_eq!((watching.signal, watching.passed_over.as_slice()), (Signal::KvmSpte, &[][..]));
    helper.listen(7, 1).unwrap();
    let pages: Vec<usize> = shuffled(500).into_iter().filter(|page| *page > 8).collect();
    let list = pages.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    guest.tell(&format!("run {list}"));
    let mut heard = Vec::new();
    loop {
        match helper.next_event(Duration::from_secs(5)).unwrap() {
            Some(Event::Faults { lost, faults, .. }) => {
                assert_eq!(lost, 0);
                // its code and the addresses it reads come before and between
                heard.extend(faults.iter().map(|fault| fault.frame).filter(|frame| *frame > FRAME + 8));
            }
            Some(Event::Watching { watching, .. }) => {
                // there are hosts whose KVM has tracepoints that never fire: found out, not waited for
                println!("SKIPPED: KVM's tracepoints do not fire here: {:?}", watching.passed_over);
                assert!(watching.signal > Signal::KvmSpte);
                assert!(watching.passed_over[0].1.contains("told nothing"), "{:?}", watching.passed_over);
                return;
            }
            Some(event) => panic!("{event:?}"),
            None => break,
        }
    }
    let expected: Vec<u64> = pages.iter().map(|page| FRAME + *page as u64).collect();
    assert_eq!(heard, expected);
}

#[test]
fn states_of_pages_are_told_by_frame() {
    let (mut helper, mut guest) = (helper(), StandIn::start());
    let host = guest.tell("anon");
    helper.watch(1, guest.id(), regions(host)).unwrap();
    let states = helper.states(1, vec![Span { frame: frame(990), pages: 10 }, Span { frame: frame(1000), pages: 7 }]);
    assert_eq!(states.unwrap(), vec![PageState::Present; 17]);
    assert_eq!(helper.residency(1).unwrap().present, PAGES as u64);
    for span in [Span { frame: frame(999), pages: 2 }, Span { frame: 0, pages: 1 }, Span { frame: u64::MAX, pages: 9 }]
    {
        let error = MemoryError::NoSuchMemory { frame: span.frame, pages: span.pages };
        assert_eq!(helper.states(1, vec![span]), Err(error));
    }
    assert_eq!(helper.states(2, Vec::new()), Err(MemoryError::Unknown(2)));
    // nothing of it is in swap, so there is nothing to map
    let ticket = helper.map(1, vec![Span { frame: frame(0), pages: 500 }]).unwrap();
    let Some(Event::Moved { ticket: of, moved }) = helper.next_event(Duration::from_secs(10)).unwrap() else {
        panic!()
    };
    let moved = moved.unwrap();
    assert_eq!((of, moved.asked, moved.eligible), (ticket, 500, 0));
}

#[test]
fn what_a_clone_touches_is_recorded_by_what_is_heard_and_by_what_is_found() {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    use prestage_integration::memory::template::record::{self, Place};
    use std::os::unix::fs::FileExt;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = cold_file(folder.path());
    // every other page it will touch lies in the page cache, alone: no major fault tells of it
    let pages = shuffled(400);
    let cached: Vec<usize> = pages.iter().copied().skip(1).step_by(2).collect();
    let cold: Vec<u64> = pages.iter().step_by(2).map(|page| *page as u64).collect();
    let file = File::open(&path).unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
    for page in &cached {
        file.read_exact_at(&mut [0], 4096 * *page as u64).unwrap();
    }
    let mut guest = StandIn::start();
    let host = guest.tell(&format!("map {}", path.display()));
    let exe = fs::canonicalize(std::env::current_exe().unwrap()).unwrap();
    let (program, limit) = (PathBuf::from(env!("CARGO_BIN_EXE_prestage-memory")), Duration::from_secs(60));
    let (starter, recording) = record::start(program.clone(), vec![exe.clone()], limit, || false).unwrap();
    let elsewhere = Region { frame: 0, pages: 10, host: host - (1 << 30) };
    let place = |id| {
        let all = regions(host).into_iter().chain([elsewhere]).collect();
        Ok(Place::new(id, all, host, PAGES as u64 * 4096))
    };
    starter.watch(place(guest.id()));
    guest.touch(&pages);
    let recorded = recording.finish().unwrap();
    let order: Vec<u64> = recorded.set.extents.iter().flat_map(|e| e.first..e.first + e.pages).collect();
    for page in &pages {
        assert!(order.contains(&(*page as u64)), "page {page}");
    }
    assert_eq!(order.len() as u64, recorded.set.pages());
    // the kernel maps neighbours along that lie in the page cache by then
    assert!(order.len() <= PAGES && recorded.lost == 0, "{recorded:?}");
    if recorded.signal == Signal::PerfMajor {
        let heard: Vec<u64> = order.into_iter().filter(|page| cold.contains(page)).collect();
        assert!(recorded.heard_pages >= cold.len() as u64 * 9 / 10, "{} of {}", recorded.heard_pages, cold.len());
        // a cold page that was mapped along with one of its neighbours was never heard: it stands where a look found it
        let at = |page: &u64| cold.iter().position(|of| of == page).unwrap();
        let falls = heard.windows(2).filter(|pair| at(&pair[0]) > at(&pair[1])).count();
        assert!(falls <= cold.len() / 10, "{falls} of {} out of order", heard.len());
    } else {
        println!("SKIPPED: the order of faults, which {} does not tell", recorded.signal);
    }

    // A clone that was never started, one that is not there, and one that is told to be none: an error, and no wait.
    let start = || record::start(program.clone(), Vec::new(), limit, || false).unwrap();
    let (starter, recording) = start();
    drop(starter);
    assert!(recording.finish().unwrap_err().to_string().contains("not started"));
    let (starter, recording) = start();
    starter.watch(place(guest.id()));
    assert!(matches!(recording.finish(), Err(MemoryError::Foreign { .. })));
    let (starter, recording) = start();
    starter.watch(Err(MemoryError::Layout("no memory".into())));
    assert_eq!(recording.finish(), Err(MemoryError::Layout("no memory".into())));
    // Of one that ends while it is recorded nothing is learned: what it touched by then is not what the next one needs.
    let (starter, recording) = record::start(program, vec![exe], limit, || false).unwrap();
    starter.watch(place(guest.id()));
    drop(guest);
    recording.finish().unwrap_err();
}

#[test]
fn a_process_that_ends_is_told_and_forgotten() {
    let (mut helper, mut guest) = (helper(), StandIn::start());
    let host = guest.tell("anon");
    let id = guest.id();
    helper.watch(1, id, regions(host)).unwrap();
    drop(guest);
    assert_eq!(helper.next_event(Duration::from_secs(10)).unwrap(), Some(Event::Gone { vm: 1 }));
    assert_eq!(helper.residency(1), Err(MemoryError::Unknown(1)));
    assert!(matches!(helper.watch(1, id, regions(host)), Err(MemoryError::Gone { .. } | MemoryError::Reused { .. })));
}

#[test]
fn memory_that_is_gone_is_absent_and_moves_nothing() {
    let (mut helper, mut guest) = (helper(), StandIn::start());
    let host = guest.tell("anon");
    helper.watch(1, guest.id(), regions(host)).unwrap();
    guest.tell("unmap");
    assert_eq!(helper.states(1, vec![Span { frame: FRAME, pages: 3 }]).unwrap(), vec![PageState::Absent; 3]);
    let ticket = helper.push_out(1, Push::Cold, vec![Span { frame: FRAME, pages: 1000 }]).unwrap();
    let Some(Event::Moved { ticket: of, moved: Ok(moved) }) = helper.next_event(Duration::from_secs(10)).unwrap()
    else {
        panic!()
    };
    assert_eq!((of, moved.asked, moved.eligible), (ticket, 1000, 0));
}

#[test]
fn memory_that_was_unplugged_is_refused_and_nothing_of_it_is_looked_at() {
    let (mut helper, mut guest) = (helper(), StandIn::start());
    let host = guest.tell("anon");
    helper.watch(1, guest.id(), regions(host)).unwrap();
    helper.layout(1, regions(host)[..1].to_vec()).unwrap();
    let residency = helper.residency(1).unwrap();
    assert_eq!(residency.present + residency.swapped + residency.cached + residency.absent, 1000);
    // An order may have been under way when it was unplugged; what it names beside stays as it is.
    let gone = Span { frame: frame(1500), pages: 10 };
    let error = MemoryError::NoSuchMemory { frame: gone.frame, pages: gone.pages };
    let orders = [
        helper.bring_in(1, vec![gone]).unwrap(),
        helper.map(1, vec![gone]).unwrap(),
        helper.push_out(1, Push::PageOut, vec![Span { frame: FRAME, pages: 1 }, gone]).unwrap(),
    ];
    for order in orders {
        match helper.next_event(Duration::from_secs(10)).unwrap() {
            Some(Event::Moved { ticket, moved: Err(refused) }) => assert_eq!((ticket, refused), (order, error.clone())),
            event => panic!("{event:?}"),
        }
    }
    assert_eq!(helper.states(1, vec![Span { frame: FRAME, pages: 1 }]).unwrap(), [PageState::Present]);
    // It is plugged in again, elsewhere.
    helper.layout(1, regions(host)).unwrap();
    assert_eq!(helper.states(1, vec![gone]).unwrap(), [PageState::Present; 10]);
}

#[test]
fn a_process_that_is_killed_amid_orders_is_told_and_every_order_is_answered() {
    let (mut helper, mut guest) = (helper(), StandIn::start());
    let host = guest.tell("anon");
    helper.watch(1, guest.id(), regions(host)).unwrap();
    let whole = || vec![Span { frame: FRAME, pages: 1000 }];
    let mut orders: Vec<u64> = (0..20).map(|_| helper.push_out(1, Push::PageOut, whole()).unwrap()).collect();
    guest.child.kill().unwrap();
    // Not waited for: its number stays taken, as that of a QEMU whose parent is slow.
    orders.extend((0..20).filter_map(|_| helper.bring_in(1, whole()).ok()));
    let mut gone = false;
    while !orders.is_empty() || !gone {
        match helper.next_event(Duration::from_secs(10)).unwrap() {
            Some(Event::Moved { ticket, moved: Ok(_) | Err(MemoryError::Gone { .. } | MemoryError::Unknown(1)) }) => {
                orders.retain(|order| *order != ticket);
            }
            Some(Event::Gone { vm: 1 }) => gone = true,
            event => panic!("{event:?}: {orders:?} left"),
        }
    }
    assert_eq!(helper.residency(1), Err(MemoryError::Unknown(1)));
}

#[test]
fn a_helper_without_capabilities_says_what_it_lacks_and_what_to_do() {
    use std::os::unix::fs::PermissionsExt;
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: a helper without capabilities, which is this one's as well where nobody is root");
        return;
    }
    // where nobody may go
    let folder = tempfile::tempdir().unwrap();
    let (program, script) = (folder.path().join("helper"), folder.path().join("prestage-memory"));
    fs::copy(env!("CARGO_BIN_EXE_prestage-memory"), &program).unwrap();
    let drop = "setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all";
    fs::write(&script, format!("#!/bin/sh\nexec {drop} {} \"$@\"\n", program.display())).unwrap();
    for path in [folder.path(), &program, &script] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let exe = fs::canonicalize(std::env::current_exe().unwrap()).unwrap();
    let mut helper = Helper::start(&script, &[&exe]).unwrap();
    println!("{:?}", helper.abilities().missing);
    assert!(!helper.abilities().missing.is_empty());
    let mut guest = StandIn::start();
    let host = guest.tell("anon");
    match helper.watch(1, guest.id(), regions(host)) {
        Err(MemoryError::NotPermitted { what, remedy }) => {
            println!("{what}; {remedy}");
            assert!(remedy.contains("CAP_") || remedy.contains("prestage-memory"), "{remedy}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn nobody_but_hypervisors_is_touched() {
    let guest = StandIn::start();
    let program = Path::new(env!("CARGO_BIN_EXE_prestage-memory"));
    let mut strict = Helper::start(program, &[]).unwrap();
    let foreign = strict.watch(1, guest.id(), Vec::new());
    assert!(matches!(foreign, Err(MemoryError::Foreign { pid, .. }) if pid == guest.child.id()), "{foreign:?}");
    let mut helper = helper();
    let earlier = ProcessId { started: guest.id().started - 1, ..guest.id() };
    assert!(matches!(helper.watch(1, earlier, Vec::new()), Err(MemoryError::Reused { .. })));
    let twice = vec![Region { frame: 0, pages: 2, host: 4096 }, Region { frame: 1, pages: 2, host: 1 << 20 }];
    assert!(matches!(helper.watch(1, guest.id(), twice), Err(MemoryError::Layout(_))));
}

#[test]
fn the_helper_keeps_four_capabilities_and_no_root() {
    let helper = helper();
    let status = fs::read_to_string(format!("/proc/{}/status", helper.abilities().pid)).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}"));
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    let capabilities = |name| u64::from_str_radix(&field(name), 16).unwrap();
    // CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, CAP_SYS_NICE, CAP_PERFMON: linux/capability.h
    let four = 1 << 2 | 1 << 19 | 1 << 23 | 1_u64 << 38;
    for name in ["CapPrm", "CapEff"] {
        assert_eq!(capabilities(name) & !four, 0, "{name}");
    }
    assert_eq!(capabilities("CapInh"), 0);
    assert_eq!(field("NoNewPrivs"), "1");
    if nix::unistd::geteuid().is_root() {
        assert_eq!(capabilities("CapBnd") & !four, 0);
        assert!(!field("Uid").split_ascii_whitespace().any(|id| id == "0"), "{}", field("Uid"));
        assert_eq!(field("Groups"), "");
    }
    // no other files of the daemon than the socket, and the usual three
    let open = fs::read_dir(format!("/proc/{}/fd", helper.abilities().pid)).unwrap().count();
    assert_eq!(open, 3);
}

#[test]
fn started_by_hand_it_says_that_it_is_not_for_hands() {
    let output = Command::new(env!("CARGO_BIN_EXE_prestage-memory")).stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("started by prestaged alone"), "{text}");
}

#[test]
fn a_helper_that_is_killed_is_an_error_and_no_hang() {
    let mut helper = helper();
    let pid = nix::unistd::Pid::from_raw(helper.abilities().pid.try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert!(matches!(helper.residency(1), Err(MemoryError::HelperGone(_))));
    assert!(matches!(helper.next_event(Duration::from_secs(1)), Err(MemoryError::HelperGone(_))));
}

#[test]
fn noise_on_the_socket_ends_the_helper_and_nothing_else() {
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
    use std::os::fd::AsRawFd;
    for noise in [&[0xff; 40][..], &[1, 1, 0xff, 0xff, 0xff, 0xff, 0x7f], &[0]] {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let mut child =
            Command::new(env!("CARGO_BIN_EXE_prestage-memory")).stdin(theirs).stderr(Stdio::piped()).spawn();
        let child = child.as_mut().unwrap();
        send(ours.as_raw_fd(), noise, MsgFlags::empty()).unwrap();
        drop(ours);
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(!said.contains("panicked"), "{said}");
        assert!(child.wait().unwrap().code().is_some(), "no signal ended it");
    }
}
