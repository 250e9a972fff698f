//! The handle against libvirt's own test driver: lists, events and lifecycle without a daemon.
// Helpers of tests, which clippy takes for production code.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use prestage_integration::libvirt::{
    AttachOptions, DiskKind, Hypervisor, HypervisorConfig, HypervisorError, HypervisorEvent, PlanError, StopCause,
    VmEventKind, VmState,
};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

/// Far beyond what anything here takes: reaching it means that it never comes.
const LONG: Duration = Duration::from_secs(60);

fn start(uri: &str) -> Hypervisor {
    Hypervisor::start(HypervisorConfig { uri: uri.to_owned(), ..HypervisorConfig::default() }).unwrap()
}

async fn wait_for(events: &mut Receiver<HypervisorEvent>, vm: &str, kind: VmEventKind) {
    let found = async {
        loop {
            match events.recv().await.expect("events keep coming") {
                HypervisorEvent::Vm(e) if e.vm.name == vm && e.kind == kind => return,
                _ => {}
            }
        }
    };
    tokio::time::timeout(LONG, found).await.unwrap_or_else(|_| panic!("no {kind:?} of {vm}"));
}

async fn closed(events: &mut Receiver<HypervisorEvent>) {
    let end = async { while !matches!(events.recv().await, Err(RecvError::Closed)) {} };
    tokio::time::timeout(LONG, end).await.expect("the connection is closed and its callbacks are freed");
}

#[tokio::test]
async fn lifecycle_calls_work_and_their_events_arrive() {
    let hypervisor = start("test:///default");
    let mut events = hypervisor.events();
    let vms = hypervisor.list().await.unwrap();
    assert_eq!(vms.len(), 1);
    let vm = &vms[0];
    assert_eq!((vm.id.name.as_str(), vm.state), ("test", VmState::Running));
    assert!(vm.is_running() && vm.persistent);
    assert!(vm.vcpus >= 1 && vm.memory_bytes >= 1 << 20);
    assert_eq!(&hypervisor.get("test").await.unwrap(), vm);
    assert_eq!(&hypervisor.get(&vm.id.uuid.to_string()).await.unwrap(), vm);

    hypervisor.destroy_vm("test").await.unwrap();
    wait_for(&mut events, "test", VmEventKind::Stopped(StopCause::Destroyed)).await;
    let off = hypervisor.get("test").await.unwrap();
    assert_eq!((off.state, off.instance), (VmState::ShutOff, None));

    hypervisor.start_vm("test").await.unwrap();
    wait_for(&mut events, "test", VmEventKind::Started).await;
    let error = hypervisor.start_vm("test").await.unwrap_err();
    assert!(matches!(error, HypervisorError::Libvirt { .. }), "{error}");
    assert!(error.to_string().contains("start the VM `test`"), "{error}");

    hypervisor.shutdown_vm("test").await.unwrap();
    wait_for(&mut events, "test", VmEventKind::Stopped(StopCause::Shutdown)).await;
    hypervisor.start_vm("test").await.unwrap();
    wait_for(&mut events, "test", VmEventKind::Started).await;

    let state = hypervisor.state().borrow().clone();
    assert!(state.connected);
    assert_eq!((state.reconnects, state.last_error), (0, None));
    assert!(state.libvirt_version.is_some());

    // With the last handle everything goes, the callbacks included: they hold the last senders of events.
    drop(hypervisor);
    closed(&mut events).await;
}

#[tokio::test]
async fn disks_are_described_and_foreign_hypervisors_refused() {
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("node.xml");
    let domain = "<domain type='test'><name>guest</name><memory>65536</memory><vcpu>3</vcpu><os><type>hvm</type></os><devices>\
        <disk type='file'><source file='/images/a.img'/><target dev='vda' bus='virtio'/></disk>\
        <disk type='network'><driver type='raw'/><source protocol='nbd' name='x'><host name='h' port='10809'/></source>\
        <target dev='vdb' bus='virtio'/><readonly/></disk>\
        <disk type='file' device='cdrom'><target dev='hda' bus='ide'/></disk></devices></domain>";
    std::fs::write(&node, format!("<node>{domain}</node>")).unwrap();
    let hypervisor = start(&format!("test://{}", node.display()));
    let vm = hypervisor.get("guest").await.unwrap();
    assert_eq!((vm.vcpus, vm.memory_bytes, vm.shared_memory), (3, 64 << 20, false));
    let disks: Vec<_> = vm
        .disks
        .iter()
        .map(|d| (d.target.as_str(), d.device.as_str(), &d.kind, d.source.as_deref(), d.read_only))
        .collect();
    assert_eq!(
        disks,
        [
            ("vda", "disk", &DiskKind::File, Some("/images/a.img"), false),
            ("vdb", "disk", &DiskKind::Network, Some("nbd://h/x"), true),
            ("hda", "cdrom", &DiskKind::File, None, true),
        ]
    );
    let error = hypervisor.attach("guest", "vda", Path::new("/s"), &AttachOptions::default()).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::Plan { plan: PlanError::NotQemu { .. }, .. }), "{error}");
}

#[tokio::test]
async fn unknown_vms_and_hostile_names_are_errors() {
    let hypervisor = start("test:///default");
    for name in ["nobody", "", "a\0b", "6695eb01-f6a4-8304-79aa-97f2502e1931"] {
        let error = hypervisor.get(name).await.unwrap_err();
        assert!(matches!(error, HypervisorError::NoSuchVm { .. }), "{name:?}: {error}");
    }
    let error = hypervisor.attach("nobody", "vda", Path::new("/s"), &AttachOptions::default()).await.unwrap_err();
    assert!(matches!(error, HypervisorError::NoSuchVm { .. }), "{error}");
}

#[tokio::test]
async fn an_unreachable_libvirt_is_an_error_that_says_where_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("qemu+unix:///system?socket={}/none", dir.path().display());
    let hypervisor = start(&uri);
    let error = hypervisor.list().await.unwrap_err();
    assert!(matches!(error, HypervisorError::Unreachable { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&uri) && text.contains("No such file") && text.contains("Is libvirtd"), "{text}");
    let state = hypervisor.state().borrow().clone();
    assert!(!state.connected);
    assert!(state.last_error.is_some_and(|e| e.contains("No such file")));
    assert!(Hypervisor::start(HypervisorConfig { uri: "qemu\0".into(), ..HypervisorConfig::default() }).is_err());
}
