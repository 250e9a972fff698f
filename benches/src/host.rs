//! The machine a measurement was taken on: figures mean little without it.

use std::process::Command;

use prestage_tests::process::run;
use serde::Serialize;

/// Hardware and the versions that matter.
#[derive(Debug, Serialize)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) kernel: String,
    pub(crate) qemu: String,
    pub(crate) libvirt: String,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The value of the first `key : value` line.
fn field(text: &str, key: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix(':'));
    line.unwrap_or("unknown").trim().to_owned()
}

fn first_line(program: &str, argument: &str) -> String {
    let text = run(Command::new(program).arg(argument)).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").trim().to_owned()
}

impl Host {
    pub(crate) fn find() -> Self {
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib: u64 = memory.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0);
        Self {
            name: read("/proc/sys/kernel/hostname"),
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib.saturating_mul(1024),
            kernel: read("/proc/sys/kernel/osrelease"),
            qemu: first_line("qemu-system-x86_64", "--version"),
            libvirt: first_line("libvirtd", "--version"),
        }
    }
}
