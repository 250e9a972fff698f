//! The handle against a real libvirtd with QEMU: what libvirt and QEMU accept, and what survives the daemon's death.
//!
//! Every test starts a libvirtd of its own, in a mount namespace where libvirt's fixed folders are folders of the test.
//! That needs root, `libvirtd` and QEMU (scripts/setup.sh installs them).
// Helpers of tests, which clippy takes for production code.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prestage_integration::libvirt::stats::{CollectConfig, Collector};
use prestage_integration::libvirt::{
    AttachOptions, Hypervisor, HypervisorConfig, HypervisorError, HypervisorEvent, PlanError, StopCause, StoreSource,
    TakesEffect, VmEventKind, VmState,
};
use tempfile::TempDir;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

/// Far beyond what anything here takes: reaching it means that it never comes.
const LONG: Duration = Duration::from_secs(120);

const BIND_AND_RUN: &str = r#"set -e
mkdir -p /run/libvirt
mount --bind "$0/etc" /etc/libvirt
mount --bind "$0/run" /run/libvirt
mount --bind "$0/lib" /var/lib/libvirt
mount --bind "$0/log" /var/log/libvirt
mount --bind "$0/cache" /var/cache/libvirt
exec libvirtd -f /etc/libvirt/libvirtd.conf -p "$0/libvirtd.pid""#;

fn tool(name: &str) {
    let found = std::env::var_os("PATH").is_some_and(|p| std::env::split_paths(&p).any(|d| d.join(name).is_file()))
        || ["/usr/sbin", "/sbin"].iter().any(|d| Path::new(d).join(name).is_file());
    assert!(found, "{name} is not installed: run scripts/setup.sh");
}

/// A libvirtd that shares nothing with the host's.
struct Libvirtd {
    dir: TempDir,
    child: Child,
}

impl Libvirtd {
    fn start() -> Self {
        for name in ["libvirtd", "virsh", "unshare", "qemu-system-x86_64", "qemu-storage-daemon"] {
            tool(name);
        }
        assert!(nix::unistd::geteuid().is_root(), "these tests start a private libvirtd, which needs root");
        let dir = tempfile::Builder::new().prefix("lv").tempdir().unwrap();
        let root = dir.path().display().to_string();
        for sub in ["etc", "run", "lib", "log", "cache", "images"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let daemon = format!(
            "unix_sock_dir = \"{root}/run\"\nunix_sock_group = \"root\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n\
             log_outputs = \"3:file:{root}/libvirtd.log\"\n"
        );
        let qemu = "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\nstdio_handler = \"file\"\n\
                    remember_owner = 0\nnamespaces = []\ncgroup_controllers = []\n";
        fs::write(dir.path().join("etc/libvirtd.conf"), daemon).unwrap();
        fs::write(dir.path().join("etc/qemu.conf"), qemu).unwrap();
        let child = Self::run(dir.path());
        let mut this = Self { dir, child };
        this.wait_ready();
        this
    }

    fn run(dir: &Path) -> Child {
        let output = fs::File::create(dir.join("output")).unwrap();
        Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", BIND_AND_RUN])
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap()
    }

    fn wait_ready(&mut self) {
        let until = Instant::now() + LONG;
        while UnixStream::connect(self.path("run/libvirt-sock")).is_err() {
            let ended = self.child.try_wait().unwrap();
            if ended.is_some() || Instant::now() > until {
                let said = |name: &str| fs::read_to_string(self.path(name)).unwrap_or_default();
                panic!("libvirtd did not start ({ended:?}): {} {}", said("output"), said("libvirtd.log"));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// `exec` all the way: the child is libvirtd itself.
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = Self::run(self.dir.path());
        self.wait_ready();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.path("run/libvirt-sock").display())
    }

    fn handle(&self) -> Hypervisor {
        Hypervisor::start(HypervisorConfig { uri: self.uri(), ..HypervisorConfig::default() }).unwrap()
    }

    fn virsh(&self, args: &[&str]) -> String {
        let output = Command::new("virsh").args(["-q", "-c", &self.uri()]).args(args).output().unwrap();
        assert!(output.status.success(), "virsh {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn define(&self, xml: &str) {
        let file = self.path("domain.xml");
        fs::write(&file, xml).unwrap();
        self.virsh(&["define", "--validate", file.to_str().unwrap()]);
    }

    fn definition(&self, vm: &str) -> String {
        self.virsh(&["dumpxml", "--inactive", "--security-info", vm])
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.path("images").join(name);
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The QEMUs that this libvirtd started, by its own pid files.
        let files = fs::read_dir(self.path("run/qemu")).into_iter().flatten().flatten();
        for pid in files.filter(|f| f.path().extension().is_some_and(|e| e == "pid")) {
            let text = fs::read_to_string(pid.path()).unwrap_or_default();
            // "driver.pid" is the daemon's own.
            if let Some(pid) = text.trim().parse().ok().filter(|p| *p != self.child.id() as i32) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        if thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.path("libvirtd.log")).unwrap_or_default());
        }
    }
}

/// A vhost-user-blk server that is not ours, to see that QEMU starts on the rewritten disk.
struct Server(Child);

impl Server {
    fn start(image: &Path, socket: &Path, writable: bool) -> Self {
        let blockdev = format!(
            "driver=file,node-name=f,filename={},read-only={}",
            image.display(),
            if writable { "off" } else { "on" }
        );
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable={},num-queues=4",
            socket.display(),
            if writable { "on" } else { "off" }
        );
        let child =
            Command::new("qemu-storage-daemon").args(["--blockdev", &blockdev, "--export", &export]).spawn().unwrap();
        let until = Instant::now() + LONG;
        while !socket.exists() {
            assert!(Instant::now() < until, "qemu-storage-daemon does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A VM that boots into nothing, in little memory.
fn tiny(name: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>2</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{devices}\
         <graphics type='vnc' passwd='s3cret'><listen type='none'/></graphics></devices></domain>"
    )
}

async fn wait_for<T>(
    events: &mut Receiver<HypervisorEvent>,
    what: &str,
    mut pick: impl FnMut(HypervisorEvent) -> Option<T>,
) -> T {
    let found = async {
        loop {
            if let Some(found) = pick(events.recv().await.expect("events keep coming")) {
                return found;
            }
        }
    };
    tokio::time::timeout(LONG, found).await.unwrap_or_else(|_| panic!("not seen: {what}"))
}

async fn wait_vm(events: &mut Receiver<HypervisorEvent>, vm: &str, kind: VmEventKind) {
    let what = format!("{kind:?} of {vm}");
    wait_for(events, &what, |e| matches!(e, HypervisorEvent::Vm(e) if e.vm.name == vm && e.kind == kind).then_some(()))
        .await;
}

fn shared() -> AttachOptions {
    AttachOptions { enable_shared_memory: true, ..AttachOptions::default() }
}

#[tokio::test]
async fn libvirt_and_qemu_take_an_attached_disk_and_detach_restores_the_definition() {
    let libvirtd = Libvirtd::start();
    let hypervisor = libvirtd.handle();
    let mut events = hypervisor.events();
    let (root, data) = (libvirtd.image("root & <1>.img"), libvirtd.image("data.img"));
    libvirtd.define(&tiny(
        "web",
        &format!(
            "<disk type='file' device='disk' model='virtio-non-transitional' snapshot='external'>\
             <driver name='qemu' type='raw' cache='none' io='native' error_policy='stop' rerror_policy='stop' discard='unmap' \
             detect_zeroes='unmap' copy_on_read='off' ioeventfd='on' event_idx='on' queues='2' queue_size='256' packed='off' \
             page_per_vq='off'/><source file='{}/images/root &amp; &lt;1&gt;.img'/><target dev='vda' bus='virtio'/>\
             <iotune><total_iops_sec>500</total_iops_sec></iotune><serial>ROOT</serial><boot order='1'/>\
             <alias name='ua-root'/><acpi index='3'/><blockio physical_block_size='4096'/></disk>\
             <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vdb' bus='virtio'/><readonly/></disk>",
            libvirtd.dir.path().display(),
            data.display()
        ),
    ));
    let before = libvirtd.definition("web");

    let socket = libvirtd.path("vda.sock");
    let plan = hypervisor.preview("web", "vda", &socket, &shared()).await.unwrap();
    assert_eq!(plan.store, StoreSource::File(root.clone()));
    assert_eq!(libvirtd.definition("web"), before, "a preview changes nothing");

    let attached = hypervisor.attach("web", "vda", &socket, &shared()).await.unwrap();
    assert_eq!(attached.takes_effect, TakesEffect::Now);
    assert_eq!(attached.plan, plan);
    wait_vm(&mut events, "web", VmEventKind::Defined).await;
    let error = hypervisor.attach("web", "vda", &socket, &shared()).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::Plan { plan: PlanError::AlreadyAttached { .. }, .. }), "{error}");
    let attached =
        hypervisor.attach("web", "vdb", &libvirtd.path("vdb.sock"), &AttachOptions::default()).await.unwrap();
    assert!(attached.plan.read_only);

    let now = libvirtd.definition("web");
    assert!(now.contains("passwd='s3cret'"), "passwords survive a redefinition");
    let vm = hypervisor.get("web").await.unwrap();
    assert!(vm.shared_memory);
    let info = vm.disks[0].attached.as_ref().unwrap();
    assert_eq!(
        (&info.socket, &info.store, info.serial.as_deref()),
        (&socket, &Some(StoreSource::File(root.clone())), Some("ROOT"))
    );
    assert!(info.next_start && !info.in_use);
    assert!(vm.disks[1].read_only);

    // QEMU itself starts on it, with real servers behind.
    let server = Server::start(&root, &socket, true);
    let read_only = Server::start(&data, &libvirtd.path("vdb.sock"), false);
    hypervisor.start_vm("web").await.unwrap();
    wait_vm(&mut events, "web", VmEventKind::Started).await;
    let vm = hypervisor.get("web").await.unwrap();
    assert_eq!(vm.state, VmState::Running);
    assert!(vm.disks[0].attached.as_ref().is_some_and(|a| a.in_use && a.next_start));

    // Detaching under a running VM changes its next start only, and says so.
    let detached = hypervisor.detach("web", "vda").await.unwrap();
    assert_eq!(detached.takes_effect, TakesEffect::NextStart);
    assert_eq!(detached.plan.socket, socket);
    let vm = hypervisor.get("web").await.unwrap();
    assert!(vm.disks[0].attached.as_ref().is_some_and(|a| a.in_use && !a.next_start), "{:?}", vm.disks[0]);
    hypervisor.destroy_vm("web").await.unwrap();
    wait_vm(&mut events, "web", VmEventKind::Stopped(StopCause::Destroyed)).await;
    drop((server, read_only));
    assert_eq!(hypervisor.get("web").await.unwrap().disks[0].attached, None);

    hypervisor.detach("web", "vdb").await.unwrap();
    assert_eq!(libvirtd.definition("web"), before, "byte for byte what it was");
    let error = hypervisor.detach("web", "vdb").await.unwrap_err();
    assert!(matches!(&error, HypervisorError::Plan { plan: PlanError::NotAttached { .. }, .. }), "{error}");
    // The restored definition starts as well.
    hypervisor.start_vm("web").await.unwrap();
    hypervisor.destroy_vm("web").await.unwrap();
}

#[tokio::test]
async fn attachments_that_could_not_work_are_refused_and_change_nothing() {
    let libvirtd = Libvirtd::start();
    let hypervisor = libvirtd.handle();
    let image = libvirtd.image("a.img");
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/><target dev='vda' bus='virtio'/></disk>",
        image.display()
    );
    libvirtd.define(&tiny("plain", &disk));
    let before = libvirtd.definition("plain");
    let socket = libvirtd.path("s");
    let error = hypervisor.attach("plain", "vda", &socket, &AttachOptions::default()).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::Plan { plan: PlanError::MemoryNotShared, .. }), "{error}");

    // A saved state would bring the old disks back.
    hypervisor.start_vm("plain").await.unwrap();
    libvirtd.virsh(&["managedsave", "plain"]);
    let error = hypervisor.attach("plain", "vda", &socket, &shared()).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::ManagedSave { .. }), "{error}");
    libvirtd.virsh(&["managedsave-remove", "plain"]);
    assert_eq!(libvirtd.definition("plain"), before);

    // A transient VM has no definition to change.
    let file = libvirtd.path("transient.xml");
    fs::write(&file, tiny("gone", &disk.replace("a.img", "b.img"))).unwrap();
    libvirtd.image("b.img");
    libvirtd.virsh(&["create", file.to_str().unwrap()]);
    let vm = hypervisor.get("gone").await.unwrap();
    assert!(!vm.persistent && vm.is_running());
    let error = hypervisor.attach("gone", "vda", &socket, &shared()).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::TransientVm { .. }), "{error}");
    assert!(error.to_string().contains("virsh define"), "{error}");
    hypervisor.destroy_vm("gone").await.unwrap();
    let error = hypervisor.get("gone").await.unwrap_err();
    assert!(matches!(error, HypervisorError::NoSuchVm { .. }), "{error}");

    // Volumes of a pool are looked up.
    let pool = format!(
        "<pool type='dir'><name>images</name><target><path>{}</path></target></pool>",
        libvirtd.path("images").display()
    );
    let file = libvirtd.path("pool.xml");
    fs::write(&file, pool).unwrap();
    libvirtd.define(&tiny(
        "pooled",
        "<disk type='volume' device='disk'><driver name='qemu' type='raw'/><source pool='images' volume='a.img'/>\
         <target dev='vda' bus='virtio'/></disk>",
    ));
    let error = hypervisor.preview("pooled", "vda", &socket, &shared()).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::Plan { plan: PlanError::Volume { .. }, .. }), "{error}");
    libvirtd.virsh(&["pool-create", file.to_str().unwrap()]);
    assert_eq!(hypervisor.preview("pooled", "vda", &socket, &shared()).await.unwrap().store, StoreSource::File(image));
    hypervisor.attach("pooled", "vda", &socket, &shared()).await.unwrap();
    hypervisor.detach("pooled", "vda").await.unwrap();
}

#[tokio::test]
async fn events_tell_what_happens_inside_a_running_vm() {
    let libvirtd = Libvirtd::start();
    let hypervisor = libvirtd.handle();
    hypervisor.list().await.unwrap();
    let mut events = hypervisor.events();
    let disk = |target: &str, image: &str| {
        let path = libvirtd.image(image);
        format!(
            "<disk type='file' device='disk'><source file='{}'/><target dev='{target}' bus='virtio'/></disk>",
            path.display()
        )
    };
    libvirtd.define(&tiny("busy", &disk("vda", "a.img")));
    wait_vm(&mut events, "busy", VmEventKind::Defined).await;
    hypervisor.start_vm("busy").await.unwrap();
    wait_vm(&mut events, "busy", VmEventKind::Started).await;
    libvirtd.virsh(&["suspend", "busy"]);
    wait_vm(&mut events, "busy", VmEventKind::Suspended).await;
    assert_eq!(hypervisor.get("busy").await.unwrap().state, VmState::Paused);
    libvirtd.virsh(&["resume", "busy"]);
    wait_vm(&mut events, "busy", VmEventKind::Resumed).await;
    libvirtd.virsh(&["reset", "busy"]);
    wait_vm(&mut events, "busy", VmEventKind::Rebooted).await;
    let file = libvirtd.path("disk.xml");
    fs::write(&file, disk("vdb", "b.img")).unwrap();
    libvirtd.virsh(&["attach-device", "busy", file.to_str().unwrap(), "--live"]);
    wait_vm(&mut events, "busy", VmEventKind::DeviceAdded { alias: "virtio-disk1".into() }).await;
    assert_eq!(hypervisor.get("busy").await.unwrap().disks.len(), 2);

    // The process dies by itself.
    let pid = fs::read_to_string(libvirtd.path("run/qemu/busy.pid")).unwrap();
    kill(Pid::from_raw(pid.trim().parse().unwrap()), Signal::SIGKILL).unwrap();
    wait_vm(&mut events, "busy", VmEventKind::Stopped(StopCause::Failed)).await;
    libvirtd.virsh(&["undefine", "busy"]);
    wait_vm(&mut events, "busy", VmEventKind::Undefined).await;
    assert!(hypervisor.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn the_connection_survives_the_death_of_libvirtd() {
    let mut libvirtd = Libvirtd::start();
    let hypervisor = libvirtd.handle();
    let mut events = hypervisor.events();
    libvirtd.define(&tiny("survivor", ""));
    hypervisor.start_vm("survivor").await.unwrap();
    wait_vm(&mut events, "survivor", VmEventKind::Started).await;
    let instance = hypervisor.get("survivor").await.unwrap().instance;

    for round in 1..=3 {
        libvirtd.kill();
        wait_for(&mut events, "the disconnection", |e| matches!(e, HypervisorEvent::Disconnected { .. }).then_some(()))
            .await;
        let error = hypervisor.list().await.unwrap_err();
        assert!(matches!(error, HypervisorError::Unreachable { .. }), "{error}");
        assert!(!hypervisor.state().borrow().connected);

        libvirtd.restart();
        let vms = wait_for(&mut events, "the resync", |e| match e {
            HypervisorEvent::Resync(vms) => Some(vms),
            _ => None,
        })
        .await;
        assert_eq!(vms.len(), 1);
        assert_eq!((vms[0].state, vms[0].instance), (VmState::Running, instance), "QEMU went on meanwhile");
        let state = hypervisor.state().borrow().clone();
        assert!(state.connected && state.reconnects == round, "{state:?}");
    }
    // Events come over the new connection.
    hypervisor.destroy_vm("survivor").await.unwrap();
    wait_vm(&mut events, "survivor", VmEventKind::Stopped(StopCause::Destroyed)).await;

    // Neither the dead connections nor the last one leave callbacks behind, which hold the last senders of events.
    drop(hypervisor);
    let end = async { while !matches!(events.recv().await, Err(RecvError::Closed)) {} };
    tokio::time::timeout(LONG, end).await.expect("all connections are closed and their callbacks freed");
}

#[tokio::test]
async fn a_call_right_after_a_restart_needs_no_second_try() {
    let mut libvirtd = Libvirtd::start();
    let hypervisor = libvirtd.handle();
    libvirtd.define(&tiny("any", ""));
    assert_eq!(hypervisor.list().await.unwrap().len(), 1);
    libvirtd.kill();
    libvirtd.restart();
    assert_eq!(hypervisor.list().await.unwrap().len(), 1);
    assert_eq!(hypervisor.state().borrow().reconnects, 1);
}

#[tokio::test]
async fn a_libvirtd_that_hangs_costs_a_caller_an_error_and_is_left_behind() {
    let libvirtd = Libvirtd::start();
    let config = HypervisorConfig {
        uri: libvirtd.uri(),
        call_timeout: Duration::from_millis(500),
        keep_alive_interval_secs: 1,
        keep_alive_count: 2,
        ..HypervisorConfig::default()
    };
    let hypervisor = Hypervisor::start(config).unwrap();
    let mut events = hypervisor.events();
    let mut state = hypervisor.state();
    tokio::time::timeout(LONG, state.wait_for(|s| s.connected)).await.unwrap().unwrap();

    libvirtd.signal(Signal::SIGSTOP);
    let error = hypervisor.list().await.unwrap_err();
    assert!(matches!(error, HypervisorError::Timeout { .. }), "{error}");
    let config = CollectConfig { patience: Duration::from_millis(500), ..CollectConfig::default() };
    let mut collector = Collector::new(hypervisor.clone(), config);
    let turn = collector.turn().await;
    assert!(matches!(turn.vms, Err(HypervisorError::Timeout { .. })), "{:?}", turn.vms);
    assert!(turn.host.cpus > 0, "the host is measured without libvirt");
    // The queue is bounded: callers are turned away, not piled up.
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let hypervisor = hypervisor.clone();
        waiting.spawn(async move { hypervisor.list().await });
    }
    let results = waiting.join_all().await;
    assert!(results.iter().any(|r| matches!(r, Err(HypervisorError::Busy))));
    assert!(results.iter().all(|r| r.is_err()));
    // Unanswered keep-alive probes end the call that hangs.
    wait_for(&mut events, "the disconnection", |e| matches!(e, HypervisorEvent::Disconnected { .. }).then_some(()))
        .await;

    libvirtd.signal(Signal::SIGCONT);
    tokio::time::timeout(LONG, state.wait_for(|s| s.connected)).await.unwrap().unwrap();
    assert!(hypervisor.list().await.unwrap().is_empty());
    assert!(collector.turn().await.vms.unwrap().is_empty());
}
