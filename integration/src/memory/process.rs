//! That a process is the one that was meant, and stays it.
//!
//! A number is not enough: QEMU ends, the number is used again, and what was meant for a guest would hit anybody. So the
//! process is held by a pidfd (pidfd_open(2)), and its start is compared after that: a process that starts at the right time
//! while it is held is the right one for as long as the pidfd lives.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{MemoryError, ProcessId};

/// A hypervisor's process, held.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: OwnedFd,
}

impl Process {
    /// Holds the process and checks that it is the one that was meant and runs QEMU or one of `also`.
    ///
    /// # Errors
    /// `Gone`, `Reused`, `Foreign`, `NotPermitted`.
    pub fn open(id: ProcessId, also: &[PathBuf]) -> Result<Self, MemoryError> {
        let pidfd = pidfd_open(id.pid).map_err(|error| of_process(id, "cannot hold it", &error))?;
        let process = Self { id, pidfd };
        let found = started(id.pid).map_err(|error| of_process(id, "cannot read its start", &error))?;
        if found != id.started {
            return Err(MemoryError::Reused { pid: id.pid, meant: id.started, found });
        }
        let exe =
            fs::read_link(process.proc("exe")).map_err(|error| of_process(id, "cannot see its program", &error))?;
        if !is_hypervisor(&exe) && !also.contains(&exe) {
            return Err(MemoryError::Foreign { pid: id.pid, exe: exe.display().to_string() });
        }
        process.check()?;
        Ok(process)
    }

    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// A path below `/proc/PID`. What is opened there is the process's own only if [`check`](Self::check) holds after it.
    pub fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.id.pid.to_string()).join(name)
    }

    /// The process has not ended.
    ///
    /// # Errors
    /// `Gone`.
    pub fn check(&self) -> Result<(), MemoryError> {
        let mut ended = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ended, PollTimeout::ZERO) {
            Ok(0) => Ok(()),
            _ => Err(MemoryError::Gone { process: self.id }),
        }
    }

    /// Its threads' numbers.
    ///
    /// # Errors
    /// `Gone`, or what keeps the folder from being read.
    pub fn threads(&self) -> Result<Vec<u32>, MemoryError> {
        let folder =
            fs::read_dir(self.proc("task")).map_err(|error| of_process(self.id, "cannot list threads", &error))?;
        let threads = folder.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        self.check()?;
        Ok(threads)
    }

    /// Major faults of one of its threads since that began; `None` once it has ended.
    pub fn major_faults(&self, thread: u32) -> Option<u64> {
        let majors = field(&self.proc("task").join(thread.to_string()).join("stat"), 12).ok()?;
        self.check().ok()?;
        Some(majors)
    }
}

/// The process that has this number now.
///
/// # Errors
/// There is none, or `/proc` cannot be read.
pub fn identify(pid: u32) -> io::Result<ProcessId> {
    Ok(ProcessId { pid, started: started(pid)? })
}

fn started(pid: u32) -> io::Result<u64> {
    field(Path::new(&format!("/proc/{pid}/stat")), 22)
}

/// A field of a process's or a thread's `stat`, from 1; the name before it may hold anything, so fields are counted from its closing bracket.
fn field(stat: &Path, number: usize) -> io::Result<u64> {
    let stat = fs::read(stat)?;
    let odd = || io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat is not as proc_pid_stat(5) has it");
    let name_end = stat.iter().rposition(|&b| b == b')').ok_or_else(odd)?;
    let fields = std::str::from_utf8(&stat[name_end + 1..]).map_err(|_| odd())?;
    fields.split_ascii_whitespace().nth(number - 3).and_then(|field| field.parse().ok()).ok_or_else(odd)
}

/// As distributions call QEMU. A package that was upgraded under it leaves ` (deleted)` behind the path.
fn is_hypervisor(exe: &Path) -> bool {
    let name = exe.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = name.strip_suffix(" (deleted)").unwrap_or(name);
    name.starts_with("qemu-system-") || name == "qemu-kvm"
}

/// What an error on a process means.
pub(super) fn of_process(process: ProcessId, what: &str, error: &io::Error) -> MemoryError {
    match error.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => MemoryError::Gone { process },
        Some(libc::EPERM | libc::EACCES) => MemoryError::NotPermitted {
            what: format!("{what} ({process})"),
            remedy: "prestage-memory needs CAP_SYS_PTRACE, CAP_SYS_NICE, CAP_PERFMON and CAP_DAC_READ_SEARCH".into(),
        },
        Some(libc::ENOSYS) => MemoryError::Unsupported { what: what.into() },
        _ => MemoryError::Os { what: format!("{what} ({process})"), error: error.to_string() },
    }
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made it for us and nobody else has it; it is close-on-exec by itself.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl AsRawFd for Process {
    fn as_raw_fd(&self) -> i32 {
        self.pidfd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn own() -> (ProcessId, PathBuf) {
        (identify(std::process::id()).unwrap(), std::env::current_exe().unwrap())
    }

    #[test]
    fn a_process_is_held_and_its_end_is_seen() {
        let mut child = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap();
        let id = identify(child.id()).unwrap();
        let exe = fs::canonicalize(format!("/proc/{}/exe", child.id())).unwrap();
        let process = Process::open(id, &[exe]).unwrap();
        assert_eq!(process.threads().unwrap(), [child.id()]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(process.check(), Err(MemoryError::Gone { process: id }));
        assert_eq!(process.threads(), Err(MemoryError::Gone { process: id }));
        assert!(matches!(Process::open(id, &[]), Err(MemoryError::Gone { .. } | MemoryError::Reused { .. })));
    }

    #[test]
    fn a_number_that_is_used_again_is_no_proof() {
        let (id, exe) = own();
        let earlier = ProcessId { started: id.started - 1, ..id };
        let error = Process::open(earlier, &[exe]).unwrap_err();
        assert_eq!(error, MemoryError::Reused { pid: id.pid, meant: id.started - 1, found: id.started });
    }

    #[test]
    fn others_than_hypervisors_are_refused() {
        let (id, exe) = own();
        assert!(matches!(Process::open(id, &[]), Err(MemoryError::Foreign { .. })));
        assert!(Process::open(id, &[exe]).is_ok());
        for (name, is) in [
            ("/usr/bin/qemu-system-x86_64", true),
            ("/usr/libexec/qemu-kvm", true),
            ("/usr/bin/qemu-system-x86_64 (deleted)", true),
            ("/usr/bin/qemu-img", false),
            ("/qemu-system-x/bash", false),
        ] {
            assert_eq!(is_hypervisor(Path::new(name)), is, "{name}");
        }
    }
}
