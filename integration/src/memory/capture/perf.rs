//! Faults one by one: a ring for each thread of the process.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::ring::{Counts, Ring};
use super::{Caught, Place};
use crate::memory::process::Process;
use crate::memory::{PAGE_BYTES, Signal};

/// Threads of one process that are listened to, at most: a ring takes half a MiB.
const MAX_THREADS: usize = 512;
/// Where the kernel describes its tracepoints (Documentation/trace/events.rst).
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

#[derive(Debug)]
pub(super) struct Perf {
    counts: Counts,
    field: Field,
    period: u32,
    threads: HashMap<u32, Heard>,
    /// Faults of threads that could not be listened to cannot be counted; that there are such threads is lost once.
    unheard: bool,
}

/// A thread that is listened to.
#[derive(Debug)]
struct Heard {
    ring: Ring,
    /// Its major faults when it began to be.
    majors: u64,
}

/// Where a sample says what was touched.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Field {
    /// `PERF_SAMPLE_ADDR`.
    Address,
    /// At this place of the raw bytes: a guest frame or a guest physical address.
    Raw { offset: usize, unit: u64 },
}

impl Perf {
    /// Errors say why this signal does not work for this process.
    pub(super) fn open(process: &Process, signal: Signal) -> Result<Self, String> {
        let (counts, field) = match signal {
            Signal::KvmSpte => tracepoint(process, "kvmmmu/kvm_mmu_spte_requested", "gfn", 1)?,
            Signal::KvmFault => tracepoint(process, "kvm/kvm_page_fault", "fault_address", PAGE_BYTES)?,
            _ => (Counts::MajorFaults, Field::Address),
        };
        let mut perf = Self { counts, field, period: 0, threads: HashMap::new(), unheard: false };
        let thread = process.id().pid;
        let ring = Ring::open(thread, counts).map_err(|error| match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => {
                "not permitted: prestage-memory needs CAP_PERFMON and a locked memory limit".to_owned()
            }
            _ => format!("perf_event_open: {error}"),
        })?;
        perf.threads.insert(thread, Heard { ring, majors: 0 });
        perf.follow_threads(process);
        Ok(perf)
    }

    pub(super) fn listen(&mut self, process: &Process, period: u32) {
        self.period = period;
        self.follow_threads(process);
        for (thread, heard) in &mut self.threads {
            heard.ring.listen(period);
            heard.majors = process.major_faults(*thread).unwrap_or(u64::MAX);
        }
    }

    /// Major faults, since it listens, of the threads that are listened to. What others do, as those that QEMU starts to write its
    /// machine's memory to a file and that have ended by the time they are noticed, says nothing of the signal.
    pub(super) fn majors(&self, process: &Process) -> u64 {
        let since = |(thread, heard): (&u32, &Heard)| Some(process.major_faults(*thread)?.saturating_sub(heard.majors));
        self.threads.iter().filter_map(since).sum()
    }

    pub(super) fn follow_threads(&mut self, process: &Process) {
        let Ok(there) = process.threads() else { return };
        self.threads.retain(|thread, _| there.contains(thread));
        for thread in there {
            if self.threads.contains_key(&thread) {
                continue;
            }
            if self.threads.len() >= MAX_THREADS {
                self.unheard = true;
                break;
            }
            // a thread that has ended meanwhile, or whose number is another process's by now
            let Ok(mut ring) = Ring::open(thread, self.counts) else { continue };
            if process.check().is_ok() && process.proc("task").join(thread.to_string()).exists() {
                ring.listen(self.period);
                let majors = process.major_faults(thread).unwrap_or(u64::MAX);
                self.threads.insert(thread, Heard { ring, majors });
            }
        }
    }

    pub(super) fn take(&mut self, caught: &mut Vec<Caught>) -> u64 {
        let from = caught.len();
        let field = self.field;
        let mut lost = u64::from(std::mem::take(&mut self.unheard));
        for heard in self.threads.values_mut() {
            lost += heard.ring.take(|sample| {
                if let Some(place) = field.read(sample.rest) {
                    caught.push(Caught { at_ns: sample.at_ns, place });
                }
            });
        }
        // each ring is in order
        if self.threads.len() > 1 {
            caught[from..].sort_by_key(|caught| caught.at_ns);
        }
        lost
    }
}

impl Field {
    fn read(self, bytes: &[u8]) -> Option<Place> {
        let number = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?));
        match self {
            Self::Address => number(0).map(Place::Host),
            // the raw bytes come after their length, a u32
            Self::Raw { offset, unit } => number(4 + offset).map(|value| Place::Guest(value / unit)),
        }
    }
}

fn tracepoint(process: &Process, name: &str, field: &str, unit: u64) -> Result<(Counts, Field), String> {
    if !runs_under_kvm(process) {
        return Err("this machine does not run under KVM".into());
    }
    let folder = TRACEFS.iter().map(|root| Path::new(root).join("events").join(name)).find(|folder| folder.exists());
    let folder = folder.ok_or_else(|| {
        format!("no tracepoint {name} under {}: mount tracefs there, or this kernel lacks it", TRACEFS[0])
    })?;
    let read = |file: &str| {
        let path = folder.join(file);
        fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let number = read("id")?.trim().parse().map_err(|_| format!("tracepoint {name} has no number"))?;
    let offset = offset_of(&read("format")?, field).ok_or_else(|| format!("tracepoint {name} has no field {field}"))?;
    Ok((Counts::Tracepoint(number), Field::Raw { offset, unit }))
}

/// The place of an 8-byte field in a tracepoint's raw bytes.
fn offset_of(format: &str, field: &str) -> Option<usize> {
    let line = format.lines().find(|line| {
        let declared = line.trim().strip_prefix("field:").and_then(|rest| rest.split(';').next()).unwrap_or_default();
        declared.split_ascii_whitespace().next_back() == Some(field)
    })?;
    let value = |key: &str| {
        line.split(';').find_map(|part| part.trim().strip_prefix(key)?.strip_prefix(':')?.trim().parse::<usize>().ok())
    };
    (value("size")? == 8).then_some(value("offset")?).filter(|offset| *offset < 128)
}

fn runs_under_kvm(process: &Process) -> bool {
    let Ok(folder) = fs::read_dir(process.proc("fd")) else { return false };
    folder.flatten().filter_map(|entry| fs::read_link(entry.path()).ok()).any(|link| {
        link.to_str()
            .is_some_and(|link| link.starts_with("anon_inode:kvm-vm") || link.starts_with("anon_inode:[kvm-vm"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_in_a_tracepoints_description() {
        let format = "name: kvm_mmu_spte_requested\nID: 1042\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\n\tfield:u64 gfn;\toffset:8;\tsize:8;\tsigned:0;\n\tfield:u64 pfn;\toffset:16;\tsize:8;\tsigned:0;\n\tfield:u8 level;\toffset:24;\tsize:1;\tsigned:0;\n";
        assert_eq!(offset_of(format, "gfn"), Some(8));
        assert_eq!(offset_of(format, "level"), None, "not 8 bytes");
        assert_eq!(offset_of(format, "fn"), None);
        let mut raw = 32_u32.to_ne_bytes().to_vec();
        raw.extend([0; 8]);
        raw.extend(0x1234_u64.to_ne_bytes());
        let field = Field::Raw { offset: 8, unit: 1 };
        assert_eq!(field.read(&raw), Some(Place::Guest(0x1234)));
        assert_eq!(field.read(&raw[..15]), None);
        assert_eq!(Field::Raw { offset: usize::MAX - 4, unit: 1 }.read(&raw), None);
    }
}
