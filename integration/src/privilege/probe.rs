//! Acts that the confinement forbids, to show that it does: each is tried as whoever has taken over the daemon would.
//!
//! Leaf module: it makes system calls by number.

use std::fs;
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// What can be tried, each with its words.
pub const ACTS: [&str; 16] = [
    "write PATH",
    "read PATH",
    "link PATH PATH",
    "set-id PATH",
    "make-set-id PATH",
    "other-number",
    "socket FAMILY",
    "exec",
    "spawn",
    "fork",
    "ptrace",
    "kill PID",
    "uring",
    "program",
    "open PATH",
    "open-write PATH",
];

fn number(word: Option<&String>) -> io::Result<i32> {
    let number = word.and_then(|word| word.parse().ok());
    number.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a number is missing"))
}

fn path(word: Option<&String>) -> io::Result<&Path> {
    word.map(Path::new).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a path is missing"))
}

fn outcome(result: libc::c_long) -> io::Result<()> {
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Tries one act.
///
/// # Errors
/// What keeps it from being done. One that is deadly does not return.
pub fn attempt(words: &[String]) -> io::Result<()> {
    let zero: libc::c_long = 0;
    match words.first().map(String::as_str) {
        Some("write") => fs::write(path(words.get(1))?, "probe"),
        Some("read") => fs::read(path(words.get(1))?).map(drop),
        Some("link") => fs::hard_link(path(words.get(1))?, path(words.get(2))?),
        Some("set-id") => fs::set_permissions(path(words.get(1))?, PermissionsExt::from_mode(0o4755)),
        Some("make-set-id") => {
            let made = fs::File::options().write(true).create_new(true).mode(0o4755).open(path(words.get(1))?);
            made.map(drop)
        }
        Some("other-number") => {
            // The number of getpid by the x32 way: <asm/unistd.h>, `__X32_SYSCALL_BIT`.
            // SAFETY: takes nothing and touches no memory.
            outcome(unsafe { libc::syscall(libc::SYS_getpid | 0x4000_0000) })
        }
        Some("socket") => {
            // SAFETY: takes numbers only; the descriptor is left to the end of this process.
            outcome(unsafe { libc::socket(number(words.get(1))?, libc::SOCK_RAW, 0) }.into())
        }
        // It does not return if it succeeds, and the exit code then is that of `true`.
        Some("exec") => Err(Command::new("/bin/true").exec()),
        Some("spawn") => Command::new("/bin/true").status().map(drop),
        Some("fork") => {
            // SAFETY: the child does nothing but end.
            match unsafe { libc::fork() } {
                // SAFETY: ends the child without running anything of the parent's.
                0 => unsafe { libc::_exit(0) },
                result => outcome(result.into()),
            }
        }
        Some("ptrace") => {
            // SAFETY: asks to be traced by the parent, which touches no memory.
            outcome(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, zero, zero, zero) })
        }
        Some("kill") => {
            // SAFETY: takes numbers only; signal 0 asks for permission alone.
            outcome(unsafe { libc::syscall(libc::SYS_kill, number(words.get(1))?, 0) })
        }
        Some("uring") => {
            let mut params = [0_u8; 120]; // struct io_uring_params of <linux/io_uring.h>
            // SAFETY: the parameters are as large as the kernel's structure; zeroes ask for a plain ring.
            outcome(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) })
        }
        Some("program") => {
            let (writable, executable) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping at a place of the kernel's choice.
            let memory = unsafe { libc::mmap(std::ptr::null_mut(), 4096, writable, flags, -1, 0) };
            if memory == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the mapping is ours alone.
            outcome(unsafe { libc::mprotect(memory, 4096, executable) }.into())
        }
        Some(act @ ("open" | "open-write")) => {
            let broker = super::broker().ok_or_else(|| io::Error::other("there is no broker"))?;
            let how = super::protocol::How { write: act == "open-write", ..Default::default() };
            broker.open(path(words.get(1))?, how).map(drop)
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("known are: {}", ACTS.join(", ")))),
    }
}
