//! Measuring and changing through libvirt's test driver, and through LXC's where there is one: what a driver does, it does,
//! and what it does not, is said in words.
// Helpers of tests, which clippy takes for production code.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::time::Duration;

use prestage_integration::libvirt::act::{
    ActError, Change, DiskLimits, Kind, NetLimits, Outcome, Pace, Resource, Setting,
};
use prestage_integration::libvirt::stats::{CollectConfig, Collector};
use prestage_integration::libvirt::{Hypervisor, HypervisorConfig, HypervisorError, VmState};
use uuid::Uuid;

const GIB: u64 = 1 << 30;

fn start(uri: &str) -> Hypervisor {
    Hypervisor::start(HypervisorConfig { uri: uri.to_owned(), ..HypervisorConfig::default() }).unwrap()
}

/// A test driver of its own with one running VM; `test:///default` is one for the whole process.
fn own() -> (tempfile::TempDir, Hypervisor) {
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("node.xml");
    let domain = "<domain type='test'><name>test</name><memory>8388608</memory><currentMemory>2097152</currentMemory>\
        <vcpu>2</vcpu><os><type>hvm</type></os><devices>\
        <disk type='file'><source file='/images/a.img'/><target dev='vda' bus='virtio'/></disk>\
        <interface type='network'><source network='default'/><target dev='testnet0'/></interface>\
        <memballoon model='virtio'/></devices></domain>";
    let network = "<network><name>default</name><bridge name='virbr0'/></network>";
    std::fs::write(&node, format!("<node>{network}{domain}</node>")).unwrap();
    let hypervisor = start(&format!("test://{}", node.display()));
    (dir, hypervisor)
}

async fn the_vm(hypervisor: &Hypervisor) -> Uuid {
    hypervisor.list().await.unwrap()[0].id.uuid
}

fn change(vm: Uuid, to: Setting) -> Change {
    Change { vm, to, not_below: 0 }
}

#[tokio::test]
async fn memory_grows_and_is_never_taken_on_old_figures() {
    let (_dir, hypervisor) = own();
    let vm = the_vm(&hypervisor).await;
    let abilities = hypervisor.abilities(vm).await.unwrap();
    // The driver's guest spoke in 1989.
    assert!(abilities.shrink.reason().unwrap().contains("s old"), "{}", abilities.shrink);
    assert!(abilities.agent.reason().unwrap().contains("no channel"));

    let grown = hypervisor.apply(change(vm, Setting::Memory(3 * GIB)), Pace::default()).await.unwrap();
    assert_eq!((grown.kind, grown.outcome, grown.verified), (Kind::Balloon, Outcome::Reached, true), "{grown:?}");
    assert_eq!((&grown.before, &grown.got), (&Setting::Balloon(2 * GIB), &Setting::Balloon(3 * GIB)));
    assert_eq!(grown.asked.resource(), Resource::Memory);
    let again = hypervisor.apply(change(vm, Setting::Memory(3 * GIB)), Pace::default()).await.unwrap();
    assert_eq!(again.outcome, Outcome::Already);

    let shrunk = hypervisor.apply(change(vm, Setting::Memory(2 * GIB)), Pace::default()).await.unwrap_err();
    assert!(matches!(shrunk, ActError::Refused { .. }) && shrunk.to_string().contains("s old"), "{shrunk}");
    let below = Change { not_below: 5 * GIB / 2, ..change(vm, Setting::Balloon(2 * GIB)) };
    let below = hypervisor.apply(below, Pace::default()).await.unwrap_err();
    assert!(below.to_string().contains("2048 MiB is below the 2560 MiB that it must keep"), "{below}");
    let more = hypervisor.apply(change(vm, Setting::Memory(9 * GIB)), Pace::default()).await.unwrap_err();
    assert!(more.to_string().contains("more than the 8192 MiB"), "{more}");
    assert!(!more.is_permanent());
}

#[tokio::test]
async fn processors_and_limits_are_read_back() {
    let (_dir, hypervisor) = own();
    let vm = the_vm(&hypervisor).await;
    let fewer = hypervisor.apply(change(vm, Setting::Vcpus(1)), Pace::default()).await.unwrap();
    assert_eq!((fewer.before, fewer.got, fewer.outcome), (Setting::Vcpus(2), Setting::Vcpus(1), Outcome::Reached));
    let more = hypervisor.apply(change(vm, Setting::Vcpus(2)), Pace::default()).await.unwrap();
    assert_eq!((more.got, more.outcome), (Setting::Vcpus(2), Outcome::Reached));
    assert!(more.why.contains("can't be seen"), "{}", more.why);
    let too_many = hypervisor.apply(change(vm, Setting::Vcpus(3)), Pace::default()).await.unwrap_err();
    assert!(too_many.is_permanent() && too_many.to_string().contains("all of its vCPUs"), "{too_many}");

    // This driver takes no limit without one for bursts, and says so.
    let limits = DiskLimits { total_bps: Some(10 << 20), ..DiskLimits::default() };
    let refused = change(vm, Setting::Disk { target: "vda".into(), limits });
    let refused = hypervisor.apply(refused, Pace::default()).await.unwrap_err().to_string();
    assert!(refused.contains("total_bytes_sec_max") && refused.ends_with("nothing was changed"), "{refused}");
    let free = Setting::Disk { target: "vda".into(), limits: DiskLimits::default() };
    let done = hypervisor.apply(change(vm, free.clone()), Pace::default()).await.unwrap();
    assert_eq!((&done.before, &done.got, done.outcome, done.verified), (&free, &free, Outcome::Already, true));

    let limits = NetLimits { received_bps: Some(1_000_000), sent_bps: None };
    let net = Setting::Network { device: "testnet0".into(), limits };
    let done = hypervisor.apply(change(vm, net.clone()), Pace::default()).await.unwrap();
    assert_eq!((done.got, done.verified), (net, true));
}

#[tokio::test]
async fn what_a_driver_lacks_is_said_in_words() {
    let (_dir, hypervisor) = own();
    let vm = the_vm(&hypervisor).await;
    for (to, says) in [
        (Setting::CpuWeight(200), "unsupported flags"),
        (Setting::CpuQuota(Some(1.0)), "unsupported flags"),
        (Setting::MemoryDevice { alias: "m".into(), bytes: 0 }, "no virtio-mem device `m`"),
        (Setting::Disk { target: "vdz".into(), limits: DiskLimits::default() }, "no disk `vdz`"),
        (Setting::Network { device: "eth0".into(), limits: NetLimits::default() }, "no network interface `eth0`"),
    ] {
        let kind = to.kind();
        let error = hypervisor.apply(change(vm, to), Pace::default()).await.unwrap_err();
        assert!(error.is_permanent(), "{error}");
        let text = error.to_string();
        assert!(text.contains(says) && text.contains(kind.as_str()), "{text}");
    }
    let nobody = hypervisor.apply(change(Uuid::from_u128(5), Setting::Vcpus(1)), Pace::default()).await.unwrap_err();
    assert!(matches!(nobody, ActError::Hypervisor(HypervisorError::NoSuchVm { .. })), "{nobody}");
    hypervisor.destroy_vm("test").await.unwrap();
    let off = hypervisor.apply(change(vm, Setting::Vcpus(1)), Pace::default()).await.unwrap_err();
    assert!(off.to_string().contains("does not run"), "{off}");
}

#[tokio::test]
async fn running_vms_are_measured_and_others_are_not() {
    let (_dir, hypervisor) = own();
    let mut collector = Collector::new(hypervisor.clone(), CollectConfig::default());
    for _ in 0..2 {
        let turn = collector.turn().await;
        let vms = turn.vms.unwrap();
        assert_eq!(vms.len(), 1);
        assert_eq!((vms[0].vm.name.as_str(), vms[0].state), ("test", VmState::Running));
        // The driver has nothing but states in its bulk statistics.
        assert_eq!((vms[0].cpu.used_cores, vms[0].memory.guest, vms[0].pressure), (None, None, None));
        assert!(turn.host.cpus > 0 && vms[0].at_us == turn.host.at_us);
    }
    hypervisor.destroy_vm("test").await.unwrap();
    assert!(collector.turn().await.vms.unwrap().is_empty());
}

#[tokio::test]
async fn an_unreachable_libvirt_costs_the_vms_alone() {
    let hypervisor = start("qemu+unix:///system?socket=/nowhere/libvirt-sock");
    let config = CollectConfig { patience: Duration::from_secs(5), ..CollectConfig::default() };
    let turn = Collector::new(hypervisor, config).turn().await;
    assert!(
        matches!(turn.vms, Err(HypervisorError::Unreachable { .. } | HypervisorError::Timeout { .. })),
        "{:?}",
        turn.vms
    );
    assert!(turn.host.memory_bytes > 0);
}

#[tokio::test]
async fn containers_are_measured_where_there_are_some() {
    let hypervisor = start("lxc:///system");
    match hypervisor.list().await {
        Err(e) => println!("skipped: no LXC through libvirt here: {e}"),
        Ok(_) => {
            let vms = Collector::new(hypervisor, CollectConfig::default()).turn().await.vms.unwrap();
            println!("{} containers", vms.len());
        }
    }
}
