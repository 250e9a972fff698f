//! Which process is a VM's: libvirt does not tell.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use uuid::Uuid;

/// All processes are looked at no more often than this, however many VMs are new.
const SCAN_EVERY: Duration = Duration::from_secs(10);

/// QEMU processes by VM.
#[derive(Debug)]
pub struct Processes {
    proc: PathBuf,
    /// Where libvirt keeps `NAME.pid`.
    pid_files: PathBuf,
    /// By their VM's UUID, as of the last look at all processes.
    scanned: Option<(Instant, HashMap<Uuid, Option<u32>>)>,
}

impl Default for Processes {
    fn default() -> Self {
        Self::new(Path::new("/proc"), Path::new("/run/libvirt/qemu"))
    }
}

impl Processes {
    /// With other places than `/proc` and `/run/libvirt/qemu`.
    pub fn new(proc: &Path, pid_files: &Path) -> Self {
        Self { proc: proc.to_owned(), pid_files: pid_files.to_owned(), scanned: None }
    }

    pub(crate) fn proc(&self) -> &Path {
        &self.proc
    }

    /// The QEMU process of a VM: by libvirt's pid file, else by a look at all processes.
    pub fn pid(&mut self, uuid: Uuid, name: &str, now: Instant) -> Option<u32> {
        let by_file = || {
            if name.contains(['/', '\0']) {
                return None;
            }
            std::fs::read_to_string(self.pid_files.join(format!("{name}.pid"))).ok()?.trim().parse().ok()
        };
        if let Some(pid) = by_file().filter(|&pid| self.vm_of(pid) == Some(uuid)) {
            return Some(pid);
        }
        let fresh = self.scanned.as_ref().is_some_and(|(at, _)| now.saturating_duration_since(*at) < SCAN_EVERY);
        if !fresh {
            self.scanned = Some((now, self.scan()));
        }
        self.scanned.as_ref()?.1.get(&uuid).copied().flatten().filter(|&pid| self.vm_of(pid) == Some(uuid))
    }

    /// Anybody may start a process with any words: of two with one UUID neither is taken.
    fn scan(&self) -> HashMap<Uuid, Option<u32>> {
        let entries = std::fs::read_dir(&self.proc).into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut found = HashMap::new();
        for (vm, pid) in pids.filter_map(|pid: u32| Some((self.vm_of(pid)?, pid))) {
            found.entry(vm).and_modify(|one| *one = None).or_insert(Some(pid));
        }
        found
    }

    /// The VM whose UUID a process has on its command line.
    fn vm_of(&self, pid: u32) -> Option<Uuid> {
        let line = std::fs::read(self.proc.join(pid.to_string()).join("cmdline")).ok()?;
        let mut words = line.split(|&b| b == 0);
        words.find(|word| *word == b"-uuid")?;
        Uuid::try_parse_ascii(words.next()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_processes_with_one_uuid_neither_is_the_machines() {
        let folder = tempfile::tempdir().unwrap();
        let (proc, pid_files) = (folder.path().join("proc"), folder.path().join("qemu"));
        let uuid = Uuid::from_u128(7);
        let run = |pid: u32| {
            let folder = proc.join(pid.to_string());
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("cmdline"), format!("qemu\0-uuid\0{uuid}\0")).unwrap();
        };
        std::fs::create_dir_all(&pid_files).unwrap();
        let find = || Processes::new(&proc, &pid_files).pid(uuid, "web1", Instant::now());
        run(10);
        assert_eq!(find(), Some(10));
        run(11);
        assert_eq!(find(), None);
        // libvirt's word decides
        std::fs::write(pid_files.join("web1.pid"), "10\n").unwrap();
        assert_eq!(find(), Some(10));
    }
}
