//! Swapped-out guests through the real daemon and its real helper: what is brought in, what is pushed out, and what is told where
//! neither can be.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::elastic::{self, ElasticRig};
use prestage_tests::group::Group;
use prestage_tests::libvirt::Libvirt;
use prestage_tests::pages::{Memory, Usage, descendants};
use prestage_tests::paths::Scratch;
use prestage_tests::process::wait_until;
use prestage_tests::swap::Swap;
use prestage_tests::toucher::{Backing, MemoryRig};
use serde_json::Value;

const GUEST: &str = "prestage-daemon-pages";
const MEMORY_MIB: u64 = 256;
const MIB: u64 = 1 << 20;

fn daemon(libvirt: &Libvirt, config: &str) -> Prestaged {
    let options = DaemonOptions {
        libvirt_uri: Some(libvirt.uri().to_owned()),
        ram_size: "16MiB".to_owned(),
        ssd_size: "64MiB".to_owned(),
        more: format!("[memory]\n{config}"),
        ..DaemonOptions::default()
    };
    Prestaged::start(&options).unwrap()
}

fn pages(daemon: &Prestaged) -> Value {
    daemon.ctl(&["vm", "show", GUEST]).unwrap()["pages"].clone()
}

fn number(pages: &Value, name: &str) -> u64 {
    pages[name].as_u64().unwrap_or_else(|| panic!("no {name}: {pages}"))
}

/// Waits until what is told of the guest's memory is as wanted.
fn told(daemon: &Prestaged, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    let waited = wait_until(what, Duration::from_secs(30), || {
        last = pages(daemon);
        Ok(is(&last))
    });
    waited.unwrap_or_else(|error| panic!("{error:#}: {last}\n{}", daemon.last_words()));
    last
}

fn says(pages: &Value, name: &str, words: &str) -> bool {
    pages[name].as_str().is_some_and(|text| text.contains(words))
}

fn watched(daemon: &Prestaged) {
    told(daemon, "a watch over the guest's memory", |pages| pages["signal"].is_string());
}

fn begin(daemon: &Prestaged) -> String {
    daemon.ctl(&["execution", "start", GUEST, "toucher"]).unwrap()["id"].to_string()
}

fn end(daemon: &Prestaged, execution: &str) {
    daemon.ctl(&["execution", "end", execution]).unwrap();
}

fn helper_of(daemon: &Prestaged) -> Option<i32> {
    let of = |pid: &i32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "prestage-memory")
    };
    descendants(daemon.pid().unwrap()).unwrap().into_iter().find(of)
}

#[test]
fn an_announced_program_finds_its_pages_there_within_its_groups_limit_and_whatever_happens_to_the_helper() {
    const FILLED_MIB: u64 = 64;
    const FILLED: u64 = FILLED_MIB << 8;
    if let Err(why) = Swap::zram_available() {
        println!("SKIPPED: {why}");
        return;
    }
    let rig = MemoryRig::new().unwrap();
    let guest = rig.guest(GUEST, MEMORY_MIB, Backing::Anonymous).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_alive().unwrap();
    let qemu = guest.pid().unwrap();
    // before it has its memory: that stays with the group it was in
    let group = Group::available().map(|()| Group::of(qemu).unwrap());
    run.fill(FILLED_MIB).unwrap();
    let mut swap = Swap::zram(2 * MEMORY_MIB * MIB).unwrap();
    swap.set_page_cluster(0).unwrap();
    let memory = Memory::of(qemu, MEMORY_MIB * MIB).unwrap();
    let daemon = daemon(&rig.libvirt, "");
    watched(&daemon);

    let mut out = |seed: u64| {
        memory.push_out().unwrap();
        run.order_pages(seed).unwrap();
        Usage::of(qemu).unwrap()
    };
    // learned
    let usage = out(7);
    let execution = begin(&daemon);
    let first = run.touch(Duration::ZERO).unwrap();
    let majors = Usage::of(qemu).unwrap().since(&usage).major_faults;
    end(&daemon, &execution);
    // what one page tells of its neighbours saves some
    assert!(majors >= FILLED / 2, "{majors}");
    // and brought in, in whatever order it is touched
    let mut out = |seed: u64| {
        memory.push_out().unwrap();
        run.order_pages(seed).unwrap();
        (Usage::of(qemu).unwrap(), number(&pages(&daemon), "staged_bytes"))
    };
    let (usage, before) = out(8);
    let execution = begin(&daemon);
    told(&daemon, "its set in memory", |pages| number(pages, "staged_bytes") >= before + FILLED_MIB * MIB * 9 / 10);
    run.touch(Duration::ZERO).unwrap();
    let left = Usage::of(qemu).unwrap().since(&usage).major_faults;
    println!("{left} major faults on {FILLED} pages, {majors} when they were not known");
    assert!(left * 10 <= FILLED, "{left} of {FILLED}");
    end(&daemon, &execution);
    // before it is taken out again: a page of which nobody knows yet that it was used is not brought a second time
    told(&daemon, "its use counted", |pages| number(pages, "used_bytes") >= FILLED_MIB * MIB * 9 / 10);

    // no further than its control group's limit
    if let Err(why) = &group {
        println!("SKIPPED: limits of control groups: {why}");
    }
    let mut attempts = 0;
    while let Ok(group) = &group {
        attempts += 1;
        memory.push_out().unwrap();
        let limit = group.used_bytes().unwrap() + 16 * MIB;
        group.limit(limit).unwrap();
        let now = pages(&daemon);
        let (before, used) = (number(&now, "staged_bytes"), number(&now, "used_bytes"));
        let hits = group.limit_hits().unwrap();
        let execution = begin(&daemon);
        let at_limit = |pages: &Value| says(pages, "held", "control group is at its memory limit");
        let held = told(&daemon, "a word about the limit, or all of it staged", |pages| {
            at_limit(pages) || number(pages, "staged_bytes") >= before + FILLED_MIB * MIB * 9 / 10
        });
        // what it does then is nothing
        std::thread::sleep(Duration::from_millis(300));
        let staged = number(&pages(&daemon), "staged_bytes") - before;
        println!("{} MiB of {FILLED_MIB} were brought in below a limit 16 MiB away: {}", staged / MIB, held["held"]);
        assert!(group.used_bytes().unwrap() <= limit);
        // more than the 16 MiB, where the guest had touched some of its memory before it came into the group
        if at_limit(&held) && (4 * MIB..=FILLED_MIB * MIB * 3 / 4).contains(&staged) {
            assert_eq!(group.limit_hits().unwrap(), hits, "the limit was never in the way");
            end(&daemon, &execution);
            group.limit(1 << 40).unwrap();
            break;
        }
        // on a busy host the kernel leaves pages that are out in its swap cache: to bring them costs the group nothing
        assert!(attempts < 6, "never held back by its group's limit");
        group.limit(1 << 40).unwrap();
        run.touch(Duration::ZERO).unwrap();
        end(&daemon, &execution);
        told(&daemon, "its use counted", |pages| number(pages, "used_bytes") >= used + FILLED_MIB * MIB / 2);
    }

    // the helper is killed while it moves pages
    memory.push_out().unwrap();
    run.order_pages(7).unwrap();
    let before = number(&pages(&daemon), "staged_bytes");
    let execution = begin(&daemon);
    told(&daemon, "pages under way", |pages| number(pages, "staged_bytes") > before);
    let helper = helper_of(&daemon).unwrap();
    kill(Pid::from_raw(helper), Signal::SIGKILL).unwrap();
    let touched = run.touch(Duration::ZERO).unwrap();
    assert_eq!(touched.sum, first.sum, "the guest reads what it wrote");
    told(&daemon, "another helper", |pages| {
        pages["signal"].is_string() && helper_of(&daemon).is_some_and(|pid| pid != helper)
    });
    end(&daemon, &execution);
    assert!(says(&pages(&daemon), "state", "watched, and pages are brought in"), "{}", pages(&daemon));

    // QEMU is killed while it does
    memory.push_out().unwrap();
    begin(&daemon);
    kill(Pid::from_raw(qemu), Signal::SIGKILL).unwrap();
    told(&daemon, "the guest's end", |pages| {
        says(pages, "state", "QEMU is gone") || says(pages, "state", "the machine does not run")
    });
    assert!(daemon.ctl(&["status"]).unwrap()["memory"]["detail"].is_null());
}

#[test]
fn idle_memory_goes_out_and_what_the_guest_uses_stays() {
    const FILLED: u64 = 160 << 8;
    const HOT: u64 = 32 << 8;
    const FLOOR: f64 = 0.4;
    if let Err(why) = Swap::zram_available() {
        println!("SKIPPED: {why}");
        return;
    }
    let rig = MemoryRig::new().unwrap();
    let guest = rig.guest(GUEST, MEMORY_MIB, Backing::Anonymous).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_alive().unwrap();
    run.fill(FILLED >> 8).unwrap();
    let qemu = guest.pid().unwrap();
    let mut swap = Swap::zram(2 * MEMORY_MIB * MIB).unwrap();
    swap.set_page_cluster(0).unwrap();
    // ten steps a second instead of a minute; the host is busy with other tests
    let config = format!("push_out = true\npush_every = \"100ms\"\npush_floor = {FLOOR}\npush_pressure = 1.0");
    let daemon = daemon(&rig.libvirt, &config);
    watched(&daemon);
    daemon.ctl(&["vm", "policy", GUEST, "--pages", "observe"]).unwrap();
    let observed = told(&daemon, "what its policy does", |pages| says(pages, "push_state", "its policy"));
    assert_eq!(number(&observed, "pushed_bytes"), 0);
    daemon.ctl(&["vm", "policy", GUEST, "--pages", "act"]).unwrap();

    run.order_part(0, HOT, 0).unwrap();
    let usage = Usage::of(qemu).unwrap();
    let started = Instant::now();
    let floored = loop {
        run.touch(Duration::ZERO).unwrap();
        let seen = pages(&daemon);
        let (present, swapped) = (number(&seen, "present_bytes"), number(&seen, "swapped_bytes"));
        // counts of bytes, far below 2^53
        #[allow(clippy::cast_precision_loss)]
        let share = present as f64 / (present + swapped) as f64;
        assert!(share >= FLOOR - 0.01, "{share}: {seen}");
        if says(&seen, "push_state", "floor") {
            break seen;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{seen}\n{}", daemon.last_words());
    };
    let all = Usage::of(qemu).unwrap().since(&usage).major_faults;
    let pushed = number(&floored, "pushed_bytes");
    println!("{} MiB went out in {:?}; {all} major faults; {}", pushed / MIB, started.elapsed(), floored);
    assert!(pushed >= 80 * MIB, "{floored}");
    // each of its 128 chunks lost two witnesses, some of them twice
    assert!(all < HOT / 10, "{all} major faults on {HOT} pages in use");
    let usage = Usage::of(qemu).unwrap();
    run.touch(Duration::ZERO).unwrap();
    let once = Usage::of(qemu).unwrap().since(&usage).major_faults;
    assert!(once < HOT / 100, "{once} of {HOT}");

    // It takes back what went: that stops it at once.
    run.order_part(HOT, FILLED - HOT, 3).unwrap();
    run.touch(Duration::ZERO).unwrap();
    let stopped = told(&daemon, "the end of pushing", |pages| says(pages, "push_state", "too much of it came back"));
    println!("{}", stopped["push_state"]);
    assert!(number(&stopped, "refaulted_bytes") >= MIB, "{stopped}");
    assert_eq!(number(&stopped, "push_failed"), 0, "{stopped}");

    drop(swap);
    let state = told(&daemon, "the end of swap", |pages| says(pages, "state", "no swap"));
    assert!(says(&state, "push_state", "no swap"), "{state}");
}

#[test]
fn memory_that_is_plugged_in_and_out_is_followed_while_pages_are_pushed_out() {
    const MORE_MIB: u64 = 128;
    const FILLED: u64 = 48 << 8;
    if let Err(why) = Swap::zram_available() {
        println!("SKIPPED: {why}");
        return;
    }
    let rig = MemoryRig::new().unwrap();
    let guest = rig.guest_with_slot(GUEST, MEMORY_MIB, MORE_MIB).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_alive().unwrap();
    run.fill(FILLED >> 8).unwrap();
    let _swap = Swap::zram(2 * MEMORY_MIB * MIB).unwrap();
    let daemon = daemon(&rig.libvirt, "push_out = true\npush_every = \"100ms\"\npush_floor = 0.1\npush_pressure = 1.0");
    watched(&daemon);
    run.order_part(0, FILLED, 5).unwrap();
    let first = run.touch(Duration::ZERO).unwrap();
    let all =
        |pages: &Value| number(pages, "present_bytes") + number(pages, "swapped_bytes") + number(pages, "absent_bytes");
    let before = all(&pages(&daemon));

    let folder = Scratch::new().unwrap();
    let device = folder.join("dimm.xml");
    let target = format!("<target><size unit='MiB'>{MORE_MIB}</size><node>0</node></target>");
    std::fs::write(&device, format!("<memory model='dimm'>{target}</memory>")).unwrap();
    let device = device.display().to_string();
    rig.libvirt.virsh(&["attach-device", GUEST, &device, "--live"]).unwrap();
    told(&daemon, "the memory that was plugged in", |pages| {
        pages["signal"].is_string() && all(pages) == before + MORE_MIB * MIB
    });
    told(&daemon, "pages pushed out", |pages| number(pages, "pushed_bytes") >= 16 * MIB);
    rig.libvirt.virsh(&["detach-device", GUEST, &device, "--live"]).unwrap();
    // the guest has to let go of it
    let went = wait_until("the memory's end", Duration::from_secs(15), || Ok(all(&pages(&daemon)) == before));
    if let Err(error) = went {
        println!("SKIPPED: memory that is unplugged: the guest keeps it: {error:#}");
    }
    run.order_part(0, FILLED, 5).unwrap();
    assert_eq!(run.touch(Duration::ZERO).unwrap().sum, first.sum, "the guest reads what it wrote");
    let last = pages(&daemon);
    assert!(says(&last, "state", "watched") && number(&last, "push_failed") == 0, "{last}");
}

/// What of the machine's memory is anywhere: in RAM or in swap.
fn held_bytes(memory: &[Memory]) -> u64 {
    memory.iter().map(|of| of.residency().unwrap()).map(|of| of.mapped_bytes + of.swapped_bytes).sum()
}

#[test]
fn memory_that_a_balloon_or_a_memory_device_takes_meanwhile_is_not_brought_in_and_nothing_is_lost() {
    const FILLED_MIB: u64 = 96;
    if let Err(why) = Swap::zram_available() {
        println!("SKIPPED: {why}");
        return;
    }
    let rig = ElasticRig::touching().unwrap();
    let guest = rig.guest(GUEST, &[]).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_alive().unwrap();
    let virsh = |words: &[&str]| rig.libvirt.virsh(words).unwrap();
    let device = |mib: u64| {
        virsh(&["update-memory-device", GUEST, "--live", "--requested-size", &format!("{mib}MiB")]);
        let holds = || {
            let xml = virsh(&["dumpxml", GUEST]);
            let (_, rest) = xml.split_once("<current unit='KiB'>").unwrap();
            Ok(rest.split('<').next() == Some(&(mib << 10).to_string()))
        };
        wait_until(&format!("{mib} MiB in the memory device"), Duration::from_secs(30), holds).unwrap();
    };
    let balloon = |mib: u64| {
        virsh(&["setmem", GUEST, &format!("{mib}MiB"), "--live"]);
        let there = || {
            let stats = virsh(&["dommemstat", GUEST]);
            let actual = stats.lines().find_map(|line| line.strip_prefix("actual ")).unwrap();
            Ok(actual.trim().parse::<u64>().unwrap() == mib << 10)
        };
        wait_until(&format!("a balloon that leaves {mib} MiB"), Duration::from_secs(30), there).unwrap();
    };
    // What the program maps comes from the device, as far as it goes.
    device(64);
    run.fill(FILLED_MIB).unwrap();
    let qemu = guest.pid().unwrap();
    let _swap = Swap::zram(4 * MEMORY_MIB * MIB).unwrap();
    let daemon = daemon(&rig.libvirt, "");
    watched(&daemon);
    let memory = Memory::all_of(qemu, elastic::DEVICE_MIB * MIB).unwrap();
    let mut round = |what: &str, first: Option<u64>, meanwhile: &dyn Fn()| {
        for of in &memory {
            of.push_out().unwrap();
        }
        run.order_pages(3).unwrap();
        let (held, before) = (held_bytes(&memory), number(&pages(&daemon), "staged_bytes"));
        let execution = begin(&daemon);
        if first.is_some() {
            told(&daemon, what, |pages| number(pages, "staged_bytes") >= before + 8 * MIB);
        }
        meanwhile();
        let touched = run.touch(Duration::ZERO).unwrap();
        end(&daemon, &execution);
        let (now, last) = (held_bytes(&memory), pages(&daemon));
        let staged = number(&last, "staged_bytes") - before;
        println!("{what}: {} MiB staged; {} MiB held before, {} after", staged / MIB, held / MIB, now / MIB);
        assert!(says(&last, "state", "watched, and pages are brought in"), "{last}");
        assert!(first.is_none_or(|sum| sum == touched.sum), "{what}: the guest does not read what it wrote");
        (touched.sum, held, now)
    };
    let (sum, ..) = round("learned", None, &|| {});
    let all = elastic::MEMORY_MIB;
    let (_, held, now) = round("the balloon takes", Some(sum), &|| balloon(all - 96));
    // The balloon gives up what is its own; nothing of it comes back by being staged.
    assert!(now <= held + 4 * MIB, "{held} {now}");
    let (_, held, now) = round("what the balloon has", Some(sum), &|| {});
    assert!(now <= held + 4 * MIB, "{held} {now}");
    round("the balloon gives", Some(sum), &|| balloon(all));
    // The guest moves what lies there.
    round("the device shrinks", Some(sum), &|| device(0));
    round("the device grows", Some(sum), &|| device(128));
    round("at last", Some(sum), &|| {});
}
