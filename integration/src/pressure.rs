//! Pressure stall information: how long tasks waited for CPU, memory and I/O (Linux Documentation/accounting/psi.rst), of
//! the host and of each VM's control group.
//!
//! A VM's group is found by its QEMU process, since libvirt tells neither. It exists where libvirt manages cgroups, and has
//! pressure files in cgroup v2 alone.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::processes::Processes;

/// Stalls by resource; `None` where the kernel does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pressure {
    pub cpu: Option<Stall>,
    pub memory: Option<Stall>,
    pub io: Option<Stall>,
}

/// Stalls for one resource.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stall {
    /// At least one task waited.
    pub some: Window,
    /// All tasks that were not idle waited. Missing for CPU before Linux 5.13.
    pub full: Option<Window>,
}

/// Shares of time, 0 to 1, over the last 10, 60 and 300 s, and the sum since the group was made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
    pub total: Duration,
}

impl Pressure {
    /// Of the host; `None` where the kernel has no PSI, or it is off (`psi=0`).
    pub fn of_host() -> Option<Self> {
        Self::read(Path::new("/proc/pressure"), "")
    }

    /// Of a cgroup v2 folder.
    pub fn of_group(folder: &Path) -> Option<Self> {
        Self::read(folder, ".pressure")
    }

    fn read(folder: &Path, suffix: &str) -> Option<Self> {
        let stall = |name: &str| {
            // Longer than the file ever is, so that one read takes it whole.
            let mut buffer = [0; 512];
            let mut file = std::fs::File::open(folder.join(format!("{name}{suffix}"))).ok()?;
            let length = file.read(&mut buffer).ok()?;
            Stall::parse(std::str::from_utf8(&buffer[..length]).ok()?)
        };
        let found = Self { cpu: stall("cpu"), memory: stall("memory"), io: stall("io") };
        (found != Self::default()).then_some(found)
    }
}

impl Stall {
    fn parse(text: &str) -> Option<Self> {
        let window = |kind: &str| text.lines().find_map(|line| Window::parse(line.strip_prefix(kind)?));
        Some(Self { some: window("some ")?, full: window("full ") })
    }
}

impl Window {
    /// `avg10=0.00 avg60=0.00 avg300=0.00 total=0`: per cent, and µs.
    fn parse(text: &str) -> Option<Self> {
        let field = |key: &str| text.split_ascii_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('='));
        let share = |key: &str| Some(field(key)?.parse::<f64>().ok()?.clamp(0.0, 100.0) / 100.0);
        Some(Self {
            avg10: share("avg10")?,
            avg60: share("avg60")?,
            avg300: share("avg300")?,
            total: Duration::from_micros(field("total")?.parse().ok()?),
        })
    }
}

/// A VM without a group is looked for again after this long: its process may not have been there yet.
const RETRY: Duration = Duration::from_secs(60);

/// The control groups of VMs.
#[derive(Debug)]
pub struct Groups {
    processes: Processes,
    mount: Option<PathBuf>,
    known: HashMap<(Uuid, u32), Known>,
    said: bool,
}

#[derive(Debug)]
struct Known {
    folder: Option<PathBuf>,
    looked: Instant,
    seen: bool,
}

impl Default for Groups {
    fn default() -> Self {
        Self::new(Path::new("/proc"), Path::new("/run/libvirt/qemu"))
    }
}

impl Groups {
    /// Reads `proc` for the mount of cgroup v2 and for processes.
    pub fn new(proc: &Path, pid_files: &Path) -> Self {
        let mounts = std::fs::read_to_string(proc.join("self/mountinfo")).unwrap_or_default();
        let processes = Processes::new(proc, pid_files);
        Self { processes, mount: mount_of(&mounts), known: HashMap::new(), said: false }
    }

    /// The pressure of the VM's group; `None` where there is no such group, which is said once in the log.
    pub fn pressure(&mut self, uuid: Uuid, name: &str, instance: u32, now: Instant) -> Option<Pressure> {
        let mount = self.mount.clone();
        let look = match self.known.get_mut(&(uuid, instance)) {
            Some(known) => {
                known.seen = true;
                known.folder.is_none() && now.saturating_duration_since(known.looked) >= RETRY
            }
            None => true,
        };
        if look {
            let folder = mount.as_ref().and_then(|mount| self.find(mount, uuid, name, now));
            if folder.is_none() && !self.said {
                self.said = true;
                let why = if mount.is_none() { "this host has no cgroup v2" } else { "it has no group of its own" };
                tracing::info!(vm = name, "no pressure of VMs: {why}; the host's is used alone");
            }
            self.known.insert((uuid, instance), Known { folder, looked: now, seen: true });
        }
        let folder = self.known.get(&(uuid, instance))?.folder.as_deref()?;
        Pressure::of_group(folder)
    }

    /// Forgets VMs that were not asked for since the last call.
    pub fn forget_unseen(&mut self) {
        self.known.retain(|_, known| std::mem::take(&mut known.seen));
    }

    fn find(&mut self, mount: &Path, uuid: Uuid, name: &str, now: Instant) -> Option<PathBuf> {
        let pid = self.processes.pid(uuid, name, now)?;
        let groups = std::fs::read_to_string(self.processes.proc().join(pid.to_string()).join("cgroup")).ok()?;
        let own = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
        let folder = mount.join(machine_group(own)?.trim_start_matches('/'));
        folder.join("cpu.pressure").is_file().then_some(folder)
    }
}

/// The mount point of cgroup v2 (proc(5), mountinfo: the fields after `-` are type, source, options).
fn mount_of(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        let path = fields.split(' ').nth(4)?;
        kind.starts_with("cgroup2 ").then(|| PathBuf::from(path.replace("\\040", " ")))
    })
}

/// The machine's own group above that of its threads (`…/libvirt/emulator`). Only below a folder that libvirt or systemd
/// keeps for machines: any process can have another VM's UUID on its command line, none can join such a group.
#[must_use]
pub fn machine_group(own: &str) -> Option<&str> {
    let parts = || own.split('/').filter(|part| !part.is_empty());
    if parts().any(|part| part == "..") || !parts().any(|part| part.starts_with("machine")) {
        return None;
    }
    let own = own.strip_suffix("/emulator").unwrap_or(own);
    let own = own.strip_suffix("/libvirt").unwrap_or(own);
    let last = own.rsplit('/').next()?;
    (last.contains("qemu") || last.contains("lxc")).then_some(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "some avg10=1.50 avg60=2.00 avg300=100.00 total=2500000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";

    #[test]
    fn stalls_are_shares_and_durations() {
        let stall = Stall::parse(TEXT).unwrap();
        assert_eq!((stall.some.avg10, stall.some.avg60, stall.some.avg300), (0.015, 0.02, 1.0));
        assert_eq!(
            (stall.some.total, stall.full.unwrap().total),
            (Duration::from_millis(2500), Duration::from_micros(7))
        );
        assert_eq!(Stall::parse(TEXT.lines().next().unwrap()).unwrap().full, None, "as before Linux 5.13");
        assert_eq!(Stall::parse("some avg10=x"), None);
        assert_eq!(Stall::parse(""), None);
    }

    #[test]
    fn a_vm_is_found_by_its_process_and_has_its_machines_group() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, mount) = (dir.path().join("proc"), dir.path().join("cg roup"));
        let (uuid, other) = (Uuid::from_u128(7), Uuid::from_u128(8));
        let group = "machine.slice/machine-qemu\\x2d1\\x2da.scope";
        let write = |path: PathBuf, text: &str| {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let line =
            format!("25 24 0:22 / {} rw - cgroup2 cgroup2 rw\n", mount.display()).replace("cg roup", "cg\\040roup");
        write(proc.join("self/mountinfo"), &line);
        for (pid, uuid) in [(40, other), (41, uuid)] {
            write(proc.join(format!("{pid}/cmdline")), &format!("qemu\0-name\0a\0-uuid\0{uuid}\0-x"));
        }
        write(proc.join("41/cgroup"), &format!("1:name=systemd:/\n0::/{group}/libvirt/emulator\n"));
        write(proc.join("40/cgroup"), "0::/user.slice/session-1.scope\n");
        for name in ["cpu", "memory", "io"] {
            write(mount.join(group).join(format!("{name}.pressure")), TEXT);
        }
        // The pid file is of an earlier run, and its number another's now.
        write(dir.path().join("run/a.pid"), "40\n");
        let mut groups = Groups::new(&proc, &dir.path().join("run"));
        let now = Instant::now();
        let found = groups.pressure(uuid, "a", 1, now).unwrap();
        assert_eq!(found.io.unwrap().some.avg10, 0.015);
        assert_eq!(groups.pressure(other, "b", 2, now), None, "its process is in no machine's group");
        assert_eq!(groups.pressure(Uuid::from_u128(9), "../c", 3, now), None);
        assert_eq!(groups.known.len(), 3);
        groups.forget_unseen();
        groups.pressure(uuid, "a", 1, now);
        groups.forget_unseen();
        assert_eq!(groups.known.len(), 1);
    }

    #[test]
    fn groups_of_others_are_not_taken_for_a_machines() {
        assert_eq!(machine_group("/machine/qemu-1-a.libvirt-qemu/emulator"), Some("/machine/qemu-1-a.libvirt-qemu"));
        let scope = "/machine.slice/machine-qemu\\x2d1\\x2da.scope";
        assert_eq!(machine_group(&format!("{scope}/libvirt/emulator")), Some(scope));
        for own in ["/", "/system.slice/libvirtd.service", "/user.slice/x", "/machine.slice", "/machine/../qemu-1"] {
            assert_eq!(machine_group(own), None, "{own}");
        }
    }
}
