//! A real guest's memory and processors change through libvirt: the guest sees it, and is never driven out of memory.
//!
//! `PRESTAGE_SCHEDULES` says how many random balloon schedules run, default 5; `make torture` runs 100.
// Helpers of tests, which clippy takes for production code.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use prestage_integration::libvirt::act::{
    ActError, Change, DiskLimits, Done, Kind, Latencies, NetLimits, Outcome, Pace, Setting,
};
use prestage_integration::libvirt::stats::{CollectConfig, Collector, VmSample};
use prestage_integration::libvirt::{Hypervisor, HypervisorConfig};
use prestage_tests::elastic::{ElasticRig, MEMORY_MIB, tap};
use prestage_tests::guest::{Run, STEP_LIMIT};
use prestage_tests::process::run as run_command;
use tokio::runtime::Runtime;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

/// The side of the host: what the agent would do.
struct Host {
    runtime: Runtime,
    hypervisor: Hypervisor,
    collector: Collector,
    vm: Uuid,
}

impl Host {
    fn new(rig: &ElasticRig) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let config = HypervisorConfig { uri: rig.libvirt.uri().to_owned(), ..HypervisorConfig::default() };
        let hypervisor = Hypervisor::start(config).unwrap();
        let config = CollectConfig { period: Duration::from_secs(1), ..CollectConfig::default() };
        let collector = Collector::new(hypervisor.clone(), config);
        let vm = runtime.block_on(hypervisor.list()).unwrap()[0].id.uuid;
        Self { runtime, hypervisor, collector, vm }
    }

    /// Samples until one is as wanted.
    fn sample_where(&mut self, what: &str, wanted: impl Fn(&VmSample) -> bool) -> VmSample {
        let until = Instant::now() + STEP_LIMIT;
        loop {
            let sample = self.runtime.block_on(self.collector.turn()).vms.map(|mut vms| vms.remove(0));
            match sample {
                Ok(sample) if wanted(&sample) => return sample,
                _ => {}
            }
            assert!(Instant::now() < until, "{what}: {sample:?}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn apply(&self, to: Setting, not_below: u64, pace: Pace) -> Result<Done, ActError> {
        let change = Change { vm: self.vm, to, not_below };
        let result = self.runtime.block_on(self.hypervisor.apply(change, pace));
        match &result {
            Ok(done) => {
                println!("{} → {} in {:?}: {:?} {}", done.before, done.got, done.took, done.outcome, done.why)
            }
            Err(error) => println!("{error}"),
        }
        result
    }
}

#[test]
fn a_guest_sees_memory_and_processors_come_and_go() {
    let rig = ElasticRig::new().unwrap();
    let guest = rig.guest("elastic", &[]).unwrap();
    let mut run = guest.start().unwrap();
    let mut host = Host::new(&rig);
    let early = host.runtime.block_on(host.hypervisor.abilities(host.vm)).unwrap();
    println!("before the guest is up: balloon {}, shrink {}, agent {}", early.balloon, early.shrink, early.agent);
    let began = run.wait_state().unwrap();
    assert_eq!((began.online.as_str(), began.ooms), ("0", 0));

    let sample = host.sample_where("the guest's own figures", |s| {
        s.memory.guest.is_some() && s.memory.period.is_some() && s.cpu.used_cores.is_some()
    });
    let (memory, said) = (sample.memory, sample.memory.guest.unwrap());
    assert_eq!(memory.period, Some(Duration::from_secs(1)), "it was never asked before");
    assert_eq!(memory.current_bytes, Some(MEMORY_MIB * MIB));
    assert!(said.total_bytes.abs_diff(began.total_bytes) < MIB, "{said:?} {began:?}");
    assert!(said.is_fresh(Duration::from_secs(1)) && memory.resident_bytes.unwrap() > 64 * MIB, "{memory:?}");
    assert_eq!((sample.cpu.vcpus, sample.cpu.vcpus_max), (Some(1), Some(2)));
    let able = host.runtime.block_on(host.hypervisor.abilities(host.vm)).unwrap();
    println!("{able:#?}");
    assert!(able.balloon.is_yes() && able.shrink.is_yes() && able.vcpus.add.is_yes(), "{able:?}");
    assert!(!able.autodeflate && able.free_page_reporting && able.devices.len() == 1);
    host.sample_where("the guest agent", |_| true);
    let until = Instant::now() + STEP_LIMIT;
    while !host.runtime.block_on(host.hypervisor.abilities(host.vm)).unwrap().agent.is_yes() {
        assert!(Instant::now() < until, "the guest agent does not answer");
        std::thread::sleep(Duration::from_millis(500));
    }

    let mut latencies = Latencies::default();
    // Taken and given back by the balloon.
    let low = 352 * MIB;
    let done = host.apply(Setting::Balloon(low), low, Pace::default()).unwrap();
    assert_eq!((done.outcome, done.verified), (Outcome::Reached, true), "{done:?}");
    latencies.learn(&done);
    let less = run.order("state").unwrap();
    assert!(less.total_bytes + 150 * MIB < began.total_bytes && less.ooms == 0, "{less:?}");
    let below = host.apply(Setting::Memory(low - MIB * 32), low, Pace::default()).unwrap_err();
    assert!(matches!(below, ActError::Refused { .. }), "{below}");
    // What takes is broken off before it takes, what gives is not.
    let broken_off = |to: u64| {
        let (hypervisor, vm) = (host.hypervisor.clone(), host.vm);
        let change = Change { vm, to: Setting::Balloon(to), not_below: 0 };
        let done = host.runtime.block_on(async move {
            let others = hypervisor.clone();
            let applied = tokio::spawn(async move { others.apply(change, Pace::default()).await });
            // It begins.
            tokio::task::yield_now().await;
            hypervisor.break_off(vm);
            applied.await
        });
        done.unwrap().unwrap()
    };
    let done = broken_off(low - MIB * 32);
    assert!(done.outcome == Outcome::Unchanged && done.why.contains("broken off"), "{done:?}");
    let done = broken_off(MEMORY_MIB * MIB);
    assert_eq!(done.outcome, Outcome::Reached, "{done:?}");
    latencies.learn(&done);
    let more = run.order("state").unwrap();
    assert!(more.total_bytes.abs_diff(began.total_bytes) <= MIB, "{more:?}");
    println!("in the guest {} ms lie between less and all of its memory", more.uptime_ms - less.uptime_ms);

    // A second processor, used by the guest because its agent was asked to.
    let before = run.order("state").unwrap();
    let done = host.apply(Setting::Vcpus(2), 0, Pace::default()).unwrap();
    assert_eq!((done.outcome, done.verified, done.why.as_str()), (Outcome::Reached, true, ""), "{done:?}");
    latencies.learn(&done);
    let both = run.state_where("a second processor", STEP_LIMIT, |state| state.online == "0-1").unwrap();
    println!("the guest saw it {} ms after it was last asked", both.uptime_ms - before.uptime_ms);
    let done = host.apply(Setting::Vcpus(1), 0, Pace::default()).unwrap();
    assert_eq!((done.outcome, &done.got), (Outcome::Reached, &Setting::Vcpus(1)), "{done:?}");
    run.state_where("one processor", STEP_LIMIT, |state| state.online == "0").unwrap();

    // The device's memory comes, and goes first.
    let full = MEMORY_MIB * MIB;
    let done = host.apply(Setting::Memory(full + 256 * MIB), 0, Pace::default()).unwrap();
    assert_eq!((done.outcome, &done.got), (Outcome::Reached, &Setting::Memory(full + 256 * MIB)), "{done:?}");
    let grown = run.state_where("more memory", STEP_LIMIT, |s| s.total_bytes > began.total_bytes + 200 * MIB).unwrap();
    assert_eq!(grown.ooms, 0);
    host.sample_where("the guest's word on it", |s| {
        s.memory.guest.is_some_and(|g| g.total_bytes > began.total_bytes + 200 * MIB)
    });
    let done = host.apply(Setting::Memory(full), 0, Pace::default()).unwrap();
    assert!(matches!(done.outcome, Outcome::Reached | Outcome::Partial), "{done:?}");
    let end = run.order("state").unwrap();
    assert!(end.total_bytes < grown.total_bytes && end.ooms == 0, "{end:?}");

    let quantile = |kind, grows| latencies.quantile(host.vm, kind, grows, 0.9);
    println!(
        "shrink {:?}, grow {:?}, vCPU {:?}",
        quantile(Kind::Balloon, false),
        quantile(Kind::Balloon, true),
        quantile(Kind::Vcpus, true)
    );
    assert!(quantile(Kind::Balloon, false) > quantile(Kind::Balloon, true));
}

#[test]
fn a_processor_comes_without_an_agent_and_nobody_claims_to_have_seen_it() {
    let rig = ElasticRig::new().unwrap();
    // Its first process brings new processors online, as a udev rule does.
    let guest = rig.guest("alone", &["prestage.noagent"]).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_state().unwrap();
    let mut host = Host::new(&rig);
    host.sample_where("a turn", |_| true);
    let able = host.runtime.block_on(host.hypervisor.abilities(host.vm)).unwrap();
    assert!(able.agent.reason().is_some_and(|r| r.contains("does not answer")), "{}", able.agent);
    let done = host.apply(Setting::Vcpus(2), 0, Pace::default()).unwrap();
    assert_eq!((&done.got, done.outcome), (&Setting::Vcpus(2), Outcome::Reached), "{done:?}");
    assert!(done.why.contains("can't be seen"), "{}", done.why);
    run.state_where("a second processor", STEP_LIMIT, |state| state.online == "0-1").unwrap();
    let error = host.apply(Setting::Vcpus(3), 0, Pace::default()).unwrap_err();
    assert!(error.is_permanent() && error.to_string().contains("has all of its vCPUs"), "{error}");
    let device = |bytes| Setting::MemoryDevice { alias: able.devices[0].alias.clone(), bytes };
    let odd = host.apply(device(3 * MIB), 0, Pace::default()).unwrap_err();
    assert!(odd.to_string().contains("blocks of 2 MiB"), "{odd}");
    let done = host.apply(device(64 * MIB), 0, Pace::default()).unwrap();
    assert_eq!((&done.before, &done.got, done.verified), (&device(0), &device(64 * MIB), true), "{done:?}");
}

#[test]
fn limits_hold_or_leave_nothing_behind() {
    let rig = ElasticRig::new().unwrap();
    let guest = rig.guest("limited", &["prestage.noagent"]).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_state().unwrap();
    let mut host = Host::new(&rig);
    let tap = tap();
    let sample = host.sample_where("two turns", |s| s.disk_bps().is_some() && s.net_bps().is_some());
    assert_eq!((sample.disks[0].target.as_str(), sample.nets[0].device.as_str()), ("vda", tap.as_str()));
    assert_eq!(sample.disks[0].capacity_bytes, Some(MIB));
    assert!(
        sample.cpu.used_cores.is_some_and(|c| (0.0..2.5).contains(&c)) && sample.cpu.total_cores.is_some(),
        "{sample:?}"
    );

    let disk = |limits| Setting::Disk { target: "vda".to_owned(), limits };
    let limits = DiskLimits {
        read_bps: Some(10 * MIB),
        write_bps: Some(5 * MIB),
        total_ops: Some(500),
        ..DiskLimits::default()
    };
    let done = host.apply(disk(limits), 0, Pace::default()).unwrap();
    assert_eq!((done.outcome, done.verified, &done.got), (Outcome::Reached, true, &disk(limits)), "{done:?}");
    // From limits of each kind to one of both.
    let limits = DiskLimits { total_bps: Some(20 * MIB), ..DiskLimits::default() };
    let done = host.apply(disk(limits), 0, Pace::default()).unwrap();
    assert_eq!((done.outcome, &done.got), (Outcome::Reached, &disk(limits)), "{done:?}");
    let both = DiskLimits { total_bps: Some(MIB), read_bps: Some(MIB), ..DiskLimits::default() };
    let error = host.apply(disk(both), 0, Pace::default()).unwrap_err();
    assert!(matches!(error, ActError::Failed { .. }) && error.to_string().ends_with("nothing was changed"), "{error}");
    let done = host.apply(disk(DiskLimits::default()), 0, Pace::default()).unwrap();
    assert_eq!((&done.before, &done.got), (&disk(limits), &disk(DiskLimits::default())));

    // Whether the kernel has what libvirt makes a limit of is the host's affair; what is left behind is not.
    let qdiscs = || run_command(Command::new("tc").args(["qdisc", "show", "dev", &tap])).unwrap();
    let before = qdiscs();
    let limits = NetLimits { received_bps: Some(10_000_000), sent_bps: Some(5_000_000) };
    let net = |limits| Setting::Network { device: tap.clone(), limits };
    match host.apply(net(limits), 0, Pace::default()) {
        Ok(done) => {
            assert_eq!((done.outcome, done.verified), (Outcome::Reached, true), "{done:?}");
            assert!(qdiscs().contains("htb"), "{}", qdiscs());
            host.apply(net(NetLimits::default()), 0, Pace::default()).unwrap();
        }
        Err(ActError::Failed { reason, left, .. }) => println!("this host can't limit networks: {reason}; {left}"),
        Err(error) => panic!("{error}"),
    }
    assert!(!qdiscs().contains("htb"), "before {before}after {}", qdiscs());

    // The rig's libvirtd has no control groups, and says so; where one has them, the quota holds.
    match host.apply(Setting::CpuQuota(Some(0.5)), 0, Pace::default()) {
        Ok(done) => assert_eq!((done.outcome, done.verified), (Outcome::Reached, true), "{done:?}"),
        Err(error) => assert!(error.is_permanent() && error.to_string().contains("cgroup"), "{error}"),
    }

    // A libvirtd that dies costs a few turns; the guest is the same one afterwards.
    rig.libvirt.crash_and_restart().unwrap();
    let again = host.sample_where("figures after libvirtd's death", |s| s.cpu.used_cores.is_some());
    assert_eq!((&again.vm, again.instance), (&sample.vm, sample.instance));
}

/// Marsaglia's xorshift64: the same schedules in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// One schedule: programs take and leave the guest's memory while its balloon is asked for more than it can give.
fn torture(host: &Host, run: &mut Run<'_>, seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    // Long enough for several steps. What is not reached by then stays.
    let pace = Pace { shrink: Duration::from_secs(12), ..Pace::default() };
    run.order("free").unwrap();
    host.apply(Setting::Balloon(MEMORY_MIB * MIB), 0, pace).unwrap();
    for _ in 0..3 {
        // Up to the limit: programs stop where 40 MiB are left. One that takes more is killed with or without a balloon.
        let left = run.order("state").unwrap().available_bytes / MIB;
        let first = match random.below(4) {
            0 => "free".to_owned(),
            1 if left > 48 => format!("hold {}", 8 + random.below(left - 48)),
            _ => format!("fill {}", 40 + random.below(100)),
        };
        let held = run.order(&first).unwrap();
        let target = 96 + random.below(MEMORY_MIB - 96);
        let meanwhile = (random.below(2) == 0).then(|| (random.below(4000), format!("fill {}", 40 + random.below(60))));
        println!(
            "schedule {seed}: {first} leaves {} MiB, balloon to {target} MiB, meanwhile {meanwhile:?}",
            held.available_bytes / MIB
        );
        let mut console = run.console().unwrap();
        let later = meanwhile.clone().map(|(ms, line)| {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(ms));
                writeln!(console, "{line}").unwrap();
            })
        });
        match host.apply(Setting::Balloon(target * MIB), 0, pace) {
            Ok(_) | Err(ActError::Refused { .. }) => {}
            Err(error) => panic!("schedule {seed}: {error}"),
        }
        if let Some(later) = later {
            later.join().unwrap();
            run.wait_state().unwrap();
        }
        let state = run.order("state").unwrap();
        assert_eq!(state.ooms, 0, "schedule {seed}: programs were killed; {}", run.transcript());
    }
}

#[test]
fn a_guest_filled_to_its_limit_is_never_driven_out_of_memory() {
    let schedules: u64 =
        std::env::var("PRESTAGE_SCHEDULES").map_or(5, |n| n.parse().expect("PRESTAGE_SCHEDULES is a number"));
    let rig = ElasticRig::new().unwrap();
    let guest = rig.guest("full", &["prestage.noagent"]).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_state().unwrap();
    let mut host = Host::new(&rig);
    host.sample_where("the guest's own figures", |s| s.memory.guest.is_some());
    for seed in 1..=schedules {
        torture(&host, &mut run, seed);
    }
    println!("{schedules} schedules, no program killed");

    // The same guest, asked for as much without a look at what it needs: it could have been killed all along.
    run.order("free").unwrap();
    host.apply(Setting::Balloon(MEMORY_MIB * MIB), 0, Pace::default()).unwrap();
    run.order("fill 40").unwrap();
    rig.libvirt.virsh(&["setmem", guest.name(), &format!("{}", 128 * 1024), "--live"]).unwrap();
    let until = Instant::now() + STEP_LIMIT;
    let killed = loop {
        assert!(Instant::now() < until, "a balloon without guards kills nothing: the schedules prove nothing");
        match run.order("state") {
            Ok(state) if state.ooms > 0 => break state.ooms.to_string(),
            Ok(_) => std::thread::sleep(Duration::from_millis(200)),
            // It was the guest's first process, and took the guest with it.
            Err(_) => break "all".to_owned(),
        }
    };
    println!("without guards: {killed} programs killed");
}
