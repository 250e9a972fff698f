//! What the running daemon may not do, tried as somebody who has taken it over would; and what becomes of guests' disks when one
//! of daemon and broker is killed.
#![allow(clippy::unwrap_used, reason = "a failed assumption of a test is a failed test")]

#[path = "daemon_host/mod.rs"]
mod host;

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use host::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

const LIMIT: Duration = Duration::from_secs(60);
/// Of the self-test: what was tried is refused.
const REFUSED: Option<i32> = Some(10);

/// `/proc/PID/status` or that of a thread, by name.
fn status(path: &Path) -> Option<BTreeMap<String, String>> {
    let text = std::fs::read_to_string(path.join("status")).ok()?;
    let field = |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
    Some(text.lines().filter_map(field).collect())
}

fn proc(pid: impl std::fmt::Display) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

fn daemon(host: &Host) -> i32 {
    i32::try_from(host.daemon.as_ref().unwrap().id()).unwrap()
}

/// Processes of this name that the process has started.
fn child(pid: i32, name: &str) -> Option<i32> {
    let threads = std::fs::read_dir(proc(pid).join("task")).ok()?.flatten();
    let children = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let pids: Vec<i32> =
        children.flat_map(|text| text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect();
    pids.into_iter().find(|pid| status(&proc(pid)).is_some_and(|status| status["Name"] == name))
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Tries an act in a process that is confined as the daemon is, or not.
fn attempt(host: &Host, sandbox: &str, more: &[&str], act: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prestaged"));
    command.arg("--config").arg(host.path("prestaged.toml"));
    let user = "daemon.user=\"nobody-of-this-name\"".to_owned();
    let set = [host.allowed(), user, format!("daemon.sandbox=\"{sandbox}\"")];
    for set in set.iter().map(String::as_str).chain(more.iter().copied()) {
        command.arg("--set").arg(set);
    }
    command.arg("--self-test").args(act).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The guest of a disk.
struct Guest {
    queue: Blkioq,
    buffer: usize,
    _device: Blkio,
}

impl Guest {
    fn start(socket: &Path) -> Guest {
        let mut device = Blkio::new("virtio-blk-vhost-user").unwrap();
        device.set_str("path", socket.to_str().unwrap()).unwrap();
        device.connect().unwrap();
        let queue = device.start().unwrap().queues.remove(0);
        let memory = device.alloc_mem_region(1 << 16).unwrap();
        device.map_mem_region(&memory).unwrap();
        Guest { queue, buffer: memory.addr, _device: device }
    }

    /// The first byte of the sector.
    fn read(&mut self, offset: u64) -> u8 {
        self.queue.read(offset, self.buffer as *mut u8, 4096, 0, ReqFlags::empty());
        self.wait();
        // SAFETY: the region is mapped as long as the device, and the request that writes to it is done.
        unsafe { *(self.buffer as *const u8) }
    }

    fn write(&mut self, offset: u64, byte: u8) {
        // SAFETY: as above; 4096 bytes are within the region.
        unsafe { std::ptr::write_bytes(self.buffer as *mut u8, byte, 4096) };
        self.queue.write(offset, self.buffer as *const u8, 4096, 0, ReqFlags::empty());
        self.wait();
    }

    fn wait(&mut self) {
        let mut done: [MaybeUninit<Completion>; 1] = [const { MaybeUninit::uninit() }];
        let mut timeout = LIMIT;
        assert_eq!(self.queue.do_io(&mut done, 1, Some(&mut timeout), None).unwrap(), 1);
        // SAFETY: do_io has filled in the first.
        assert_eq!(unsafe { done[0].assume_init_ref() }.ret, 0);
    }
}

#[test]
fn every_thread_of_the_daemon_is_without_capabilities_and_filtered() {
    let mut host = Host::new();
    host.start("");
    let store = host.store("store", 1 << 20);
    host.does(&["disk", "add", "d", &store]);
    let mut guest = Guest::start(&host.path("run/vm/d.sock"));
    guest.write(4096, 7);
    let pid = daemon(&host);
    assert_confined(pid);
    let broker = status(&proc(child(pid, "prestage-broker").unwrap())).unwrap();
    // linux/capability.h: what nobody here needs: CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_ADMIN, CAP_SYS_BOOT, CAP_BPF
    let never = 1 << 16 | 1 << 17 | 1 << 21 | 1 << 22 | 1_u64 << 39;
    for name in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(u64::from_str_radix(&broker[name], 16).unwrap() & never, 0, "{name} of the broker");
    }
    let told: serde_json::Value = serde_json::from_str(&host.does(&["--json", "status"])).unwrap();
    let layers = told["sandbox"]["layers"].as_array().unwrap();
    for name in ["capabilities", "system calls"] {
        assert!(layers.iter().any(|layer| layer["name"] == name && layer["holds"] == true), "{told}");
    }
    assert!(host.does(&["status"]).contains("sandbox:"));
    assert!(host.log().contains("confined: capabilities"), "{}", host.log());
    drop(guest);
    host.stop();
    assert!(!host.log().contains("the broker has ended"), "{}", host.log());
}

/// All its threads, in all sets.
fn assert_confined(pid: i32) {
    let threads: Vec<_> = std::fs::read_dir(proc(pid).join("task")).unwrap().flatten().collect();
    assert!(threads.len() > 4, "{} threads", threads.len());
    for thread in threads {
        // one may have ended meanwhile
        let Some(status) = status(&thread.path()) else { continue };
        for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            // who is not root cannot empty the bounding set, and has no use for it
            if name != "CapBnd" || geteuid().is_root() {
                assert_eq!(u64::from_str_radix(&status[name], 16), Ok(0), "{name} of {}", status["Name"]);
            }
        }
        assert_eq!((status["NoNewPrivs"].as_str(), status["Seccomp"].as_str()), ("1", "2"), "{}", status["Name"]);
    }
}

/// A daemon that is no child of ours from its start; it is killed with this.
struct Stranger(i32);

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0), Signal::SIGKILL);
    }
}

#[test]
fn a_successor_that_the_broker_starts_is_confined_and_serves() {
    // The predecessor's broker starts it, and ends: somebody must collect it.
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let mut host = Host::new();
    host.start("");
    let store = host.store("store", 1 << 20);
    host.does(&["disk", "add", "d", &store]);
    let mut guest = Guest::start(&host.path("run/vm/d.sock"));
    guest.write(4096, 7);
    let first = Stranger(i32::try_from(host.daemon.take().unwrap().id()).unwrap());
    // Ours only when the last thread of the broker that started it has ended, which its first may do sooner.
    let ended = |pid: i32| loop {
        match nix::sys::wait::waitpid(Pid::from_raw(pid), None) {
            Err(nix::errno::Errno::ECHILD) if status(&proc(pid)).is_some() => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            ended => break ended.unwrap_or_else(|error| panic!("{error}\n{}", host.log())),
        }
    };
    let well = |pid: i32| nix::sys::wait::WaitStatus::Exited(Pid::from_raw(pid), 0);
    let mut running = first;
    for round in 8..11 {
        let broker = child(running.0, "prestage-broker").unwrap();
        kill(Pid::from_raw(running.0), Signal::SIGUSR2).unwrap();
        assert_eq!(ended(running.0), well(running.0), "{}", host.log());
        let told: serde_json::Value = serde_json::from_str(&host.does(&["--json", "status"])).unwrap();
        let next = Stranger(i32::try_from(told["pid"].as_i64().unwrap()).unwrap());
        assert_ne!(next.0, running.0);
        assert_confined(next.0);
        assert_ne!(child(next.0, "prestage-broker").unwrap(), broker, "it has a broker of its own");
        wait_for("the broker outlives its daemon", || {
            status(&proc(broker)).is_none_or(|status| status["State"].starts_with('Z'))
        });
        assert_eq!(guest.read(4096), round - 1);
        guest.write(4096, round);
        std::mem::forget(std::mem::replace(&mut running, next));
    }
    drop(guest);
    kill(Pid::from_raw(running.0), Signal::SIGTERM).unwrap();
    assert_eq!(ended(running.0), well(running.0), "{}", host.log());
    std::mem::forget(running);
}

/// A broker without a daemon, and our end of its socket.
fn broker(host: &Host) -> (std::process::Child, std::os::fd::OwnedFd) {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    let config = host.config("");
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_prestaged"));
    command.arg("--broker").arg("0").arg("--config").arg(config).stdin(theirs).stderr(std::process::Stdio::piped());
    (command.spawn().unwrap(), ours)
}

/// Whatever has taken the daemon over may say what it likes: the broker ends, and with it nothing else.
#[test]
fn a_broker_that_is_told_nonsense_ends() {
    let host = Host::new();
    let say = |socket: &std::os::fd::OwnedFd, bytes: &[u8]| nix::unistd::write(socket, bytes).unwrap();
    let cases: [&[u8]; 5] = [&[0xff; 40], &[1], &[1, 200], &[0; 1], &[b'x'; 17 << 10]];
    for bytes in cases {
        let (broker, socket) = broker(&host);
        say(&socket, bytes);
        let output = broker.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{bytes:?}: {}", said(&output));
        assert!(said(&output).contains("prestaged's broker:"), "{}", said(&output));
        drop(socket);
    }
    // One that is left alone ends well.
    let (broker, socket) = broker(&host);
    drop(socket);
    let output = broker.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
}

#[test]
fn check_says_what_the_host_can_confine() {
    let host = Host::new();
    let config = host.config("");
    let check = |set: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_prestaged"));
        let output = command.arg("--check").arg("--config").arg(&config).arg("--set").arg(set).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        said(&output)
    };
    let full = check("daemon.user=\"nobody-of-this-name\"");
    assert!(full.contains("sandbox: NOT user: stays who starts it, without capabilities: "), "{full}");
    for layer in ["files: ", "system calls: "] {
        assert!(
            full.contains(&format!("sandbox: {layer}")) || full.contains(&format!("sandbox: NOT {layer}")),
            "{full}"
        );
    }
    let off = check("daemon.sandbox=\"off\"");
    assert!(off.contains("sandbox: OFF (daemon.sandbox)") && !off.contains("system calls"), "{off}");
}

#[test]
fn what_is_forbidden_fails_and_would_work_without_the_sandbox() {
    let host = Host::new();
    host.config("");
    let outside = host.path("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    std::fs::create_dir_all(host.path("run")).unwrap();
    let text = |path: PathBuf| path.display().to_string();
    let (new, secret, link) = (text(outside.join("new")), text(outside.join("secret")), text(host.path("run/link")));
    let parent = std::process::id().to_string();
    let (packet, made) = (family(), text(host.path("run/made")));
    // What it may: else everything below would be refused for another reason.
    let inside = text(host.path("run/new"));
    let written = attempt(&host, "full", &[], &["write", &inside]);
    assert_eq!(written.status.code(), Some(0), "{}", said(&written));
    let denied: &[&[&str]] = &[
        &["write", &new],
        &["write", &secret],
        &["read", &secret],
        &["link", &secret, &link],
        &["set-id", &inside],
        &["make-set-id", &made],
        &["socket", &packet],
        &["spawn"],
        &["fork"],
        &["kill", &parent],
        &["uring"],
        &["program"],
    ];
    let deadly: &[&[&str]] = &[&["exec"], &["ptrace"]];
    for act in denied.iter().chain(deadly) {
        let free = attempt(&host, "off", &[], act);
        if free.status.code() != Some(0) {
            println!("SKIPPED {act:?}: this host lets nobody do that: {}", said(&free));
            continue;
        }
        for trace in [&new, &link, &made] {
            let _ = std::fs::remove_file(trace);
        }
        std::fs::write(&secret, "secret").unwrap();
        std::fs::set_permissions(&inside, PermissionsExt::from_mode(0o644)).unwrap();
        let confined = attempt(&host, "full", &[], act);
        match deadly.contains(act) {
            true => assert_eq!(confined.status.signal(), Some(Signal::SIGSYS as i32), "{act:?}: {}", said(&confined)),
            false => assert_eq!(confined.status.code(), REFUSED, "{act:?}: {}", said(&confined)),
        }
        assert!([&new, &link, &made].iter().all(|trace| !Path::new(trace).exists()), "{act:?}");
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), "secret", "{act:?}");
        assert_eq!(std::fs::metadata(&inside).unwrap().mode() & 0o7000, 0, "{act:?}");
    }
}

/// The same calls by other numbers. Few kernels have them, and those that do not say so, unless the sandbox is there first.
#[test]
#[cfg(target_arch = "x86_64")]
fn calls_by_other_numbers_end_the_daemon() {
    let host = Host::new();
    host.config("");
    assert_eq!(attempt(&host, "off", &[], &["other-number"]).status.signal(), None);
    let confined = attempt(&host, "full", &[], &["other-number"]);
    assert_eq!(confined.status.signal(), Some(Signal::SIGSYS as i32), "{}", said(&confined));
}

/// AF_PACKET, which sees all that the host's interfaces see; AF_NETLINK where that is not to be had.
fn family() -> String {
    if geteuid().is_root() { "17" } else { "16" }.to_owned()
}

#[test]
fn the_broker_opens_what_the_configuration_allows_and_nothing_else() {
    let host = Host::new();
    let named = "[[disk]]\nname = \"golden\"\nstore = \"/etc/hostname\"\nread_only = true\n";
    host.config(named);
    let images = host.path("images");
    std::fs::create_dir(&images).unwrap();
    std::fs::write(images.join("disk"), [0; 512]).unwrap();
    symlink("/etc/passwd", images.join("link")).unwrap();
    let allowed = format!("store.allowed=[\"{}\"]", images.display());
    let open = |act: &str, path: &Path| attempt(&host, "full", &[&allowed], &[act, path.to_str().unwrap()]);
    for act in ["open", "open-write"] {
        let opened = open(act, &images.join("disk"));
        assert_eq!(opened.status.code(), Some(0), "{act}: {}", said(&opened));
        for (path, why) in [
            (host.path("prestaged.toml"), "store.allowed"),
            (PathBuf::from("/etc/passwd"), "store.allowed"),
            (images.join("link"), "leads out of"),
            (images.join("../prestaged.toml"), "without `..`"),
        ] {
            let refused = open(act, &path);
            assert_eq!(refused.status.code(), REFUSED, "{act} {}: {}", path.display(), said(&refused));
            assert!(said(&refused).contains(why), "{act} {}: {}", path.display(), said(&refused));
        }
    }
    assert_eq!(open("open", Path::new("/etc/hostname")).status.code(), Some(0));
    assert_eq!(open("open-write", Path::new("/etc/hostname")).status.code(), REFUSED);
}

/// A disk that the configuration names in a folder that the daemon writes to: its own, or one of its user's.
#[test]
fn the_broker_follows_no_link_that_the_daemon_has_put_where_the_configuration_says() {
    let host = Host::new();
    std::fs::set_permissions(host.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    let (disk, secret) = (host.path("run/disk"), host.path("secret"));
    host.config(&format!("[[disk]]\nname = \"d\"\nstore = \"{}\"\n", disk.display()));
    std::fs::create_dir_all(host.path("run")).unwrap();
    std::fs::write(&secret, [0; 512]).unwrap();
    let none = "store.allowed=[]";
    let nobody = nix::unistd::User::from_name("nobody").unwrap().filter(|_| geteuid().is_root());
    for user in ["nobody-of-this-name", "nobody"] {
        if user == "nobody" && nobody.is_none() {
            println!("SKIPPED in part: not root, or no user `nobody`");
            continue;
        }
        let user = format!("daemon.user=\"{user}\"");
        let open = || attempt(&host, "full", &[none, &user], &["open-write", disk.to_str().unwrap()]);
        let _ = std::fs::remove_file(&disk);
        std::fs::write(&disk, [0; 512]).unwrap();
        let opened = open();
        assert_eq!(opened.status.code(), Some(0), "{user}: {}", said(&opened));
        std::fs::remove_file(&disk).unwrap();
        symlink(&secret, &disk).unwrap();
        let refused = open();
        assert_eq!(refused.status.code(), REFUSED, "{user}: {}", said(&refused));
        assert!(said(&refused).contains("is a link in a folder that prestaged writes to"), "{}", said(&refused));
    }
}

#[test]
fn a_store_outside_is_refused_with_what_to_do_until_the_operator_allows_it() {
    let mut host = Host::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let store = elsewhere.path().join("store");
    std::fs::File::create(&store).unwrap().set_len(1 << 20).unwrap();
    let store = store.display().to_string();
    host.start("");
    host.refuses(&["disk", "add", "d", &store], 1, &["is not opened", "store.allowed", "add its folder there"]);
    let socket = elsewhere.path().join("d.sock").display().to_string();
    let own = host.store("own", 1 << 20);
    host.refuses(&["disk", "add", "e", &own, "--export-socket", &socket], 1, &["export.socket_dirs"]);
    // A disk that the operator's own file names needs no more, and takes effect at a reload.
    host.config(&format!("[[disk]]\nname = \"d\"\nstore = \"{store}\"\n"));
    kill(Pid::from_raw(daemon(&host)), Signal::SIGHUP).unwrap();
    wait_for("the disk is not served", || host.does(&["disk", "list"]).contains(" ok"));
    host.stop();
}

#[test]
fn a_daemon_whose_broker_is_killed_ends_and_its_disks_come_back() {
    let mut host = Host::new();
    host.start("");
    let store = host.store("store", 1 << 20);
    host.does(&["disk", "add", "d", &store]);
    let socket = host.path("run/vm/d.sock");
    let mut guest = Guest::start(&socket);
    guest.write(8192, 42);
    let broker = child(daemon(&host), "prestage-broker").unwrap();
    kill(Pid::from_raw(broker), Signal::SIGKILL).unwrap();
    let ended = host.daemon.take().unwrap().wait().unwrap();
    assert_eq!(ended.code(), Some(1), "{}", host.log());
    assert!(host.log().contains("the broker has ended"), "{}", host.log());
    drop(guest);
    host.start("");
    assert_eq!(Guest::start(&socket).read(8192), 42);
    host.stop();
}

#[test]
fn a_broker_whose_daemon_is_killed_ends_and_the_next_daemon_serves() {
    let mut host = Host::new();
    host.start("");
    let store = host.store("store", 1 << 20);
    host.does(&["disk", "add", "d", &store]);
    let socket = host.path("run/vm/d.sock");
    let mut guest = Guest::start(&socket);
    guest.write(8192, 43);
    let broker = child(daemon(&host), "prestage-broker").unwrap();
    // the service manager asks all processes of a service to end: the broker is not to be first
    kill(Pid::from_raw(broker), Signal::SIGTERM).unwrap();
    host.does(&["disk", "list"]);
    let mut killed = host.daemon.take().unwrap();
    killed.kill().unwrap();
    killed.wait().unwrap();
    wait_for("the broker outlives its daemon", || {
        status(&proc(broker)).is_none_or(|status| status["State"].starts_with('Z'))
    });
    drop(guest);
    host.start("");
    assert_eq!(Guest::start(&socket).read(8192), 43);
    host.stop();
}

/// As a package has it: a user of its own, an image that only root may open, a configuration that only root may read.
#[test]
fn as_another_user_it_serves_what_only_the_broker_may_open() {
    if !geteuid().is_root() {
        println!("SKIPPED: not root, nobody else can be become");
        return;
    }
    // Root's files of an earlier version come along.
    let mut host = Host::new();
    std::fs::set_permissions(host.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    let store = host.store("store", 1 << 20);
    let mode = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    mode(Path::new(&store), 0o600);
    let ssd = format!("ssd_path = \"{}\"\nssd_size = \"64MiB\"\n", host.path("ssd/tier").display());
    host.start(&ssd);
    host.does(&["disk", "add", "d", &store]);
    host.stop();
    assert_eq!(host.path("state/prestage.db").metadata().unwrap().uid(), 0);

    // A group that the user is not in: only the broker can give it the sockets.
    let group =
        nix::unistd::Group::from_name("daemon").unwrap().or(nix::unistd::Group::from_name("bin").unwrap()).unwrap();
    let user = format!("{ssd}[export]\nsocket_group = \"{}\"\n", group.name);
    host.also = vec!["daemon.user=\"nobody\"".to_owned()];
    host.start(&user);
    let pid = daemon(&host);
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let fields = status(&proc(pid)).unwrap();
    let ids = [nobody.uid.as_raw(); 4].map(|id| id.to_string()).join("\t");
    assert_eq!(fields["Uid"], ids);
    assert_eq!((fields["CapPrm"].as_str(), fields["CapBnd"].as_str()), ("0000000000000000", "0000000000000000"));
    for own in ["state", "state/prestage.db", "run/vm/d.sock", "ssd/tier"] {
        assert_eq!(host.path(own).metadata().unwrap().uid(), nobody.uid.as_raw(), "{own}");
    }
    assert_eq!(host.path("run/vm/d.sock").metadata().unwrap().gid(), group.gid.as_raw());
    assert_eq!(Path::new(&store).metadata().unwrap().uid(), 0);
    let told = host.does(&["status"]);
    assert!(told.contains("user, capabilities, files, system calls") && told.contains("health:     ok"), "{told}");
    let mut guest = Guest::start(&host.path("run/vm/d.sock"));
    guest.write(4096, 9);
    assert_eq!(guest.read(4096), 9);

    // What only root may read is still read at a reload.
    let second = host.store("second", 1 << 20);
    mode(&host.config(&format!("{user}[[disk]]\nname = \"e\"\nstore = \"{second}\"\n")), 0o600);
    kill(Pid::from_raw(pid), Signal::SIGHUP).unwrap();
    wait_for("no reload", || host.does(&["disk", "list"]).contains("/second"));
    wait_for("the second disk is not served", || host.does(&["disk", "list"]).matches(" ok").count() == 2);
    drop(guest);
    host.stop();
    let bytes = std::fs::read(&store).unwrap();
    assert_eq!(bytes[4096], 9);

    // And back: the user is gone, and root without capabilities has no right to what was that user's.
    host.also.clear();
    host.start(&format!("{user}[[disk]]\nname = \"e\"\nstore = \"{second}\"\n"));
    for own in ["state", "state/prestage.db", "run/vm/d.sock", "ssd/tier"] {
        assert_eq!(host.path(own).metadata().unwrap().uid(), 0, "{own}");
    }
    assert_eq!(host.does(&["disk", "list"]).matches(" ok").count(), 2);
    assert!(host.does(&["status"]).contains("health:     ok"), "{}", host.does(&["status"]));
    host.stop();
}
