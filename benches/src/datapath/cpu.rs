//! Processors: who runs where, and what a process has used.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The processor of the servers and that of the clients.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    pub(super) server: usize,
    pub(super) client: usize,
}

impl Places {
    /// The first two that this program may run on. Must be asked before a thread is pinned.
    pub(super) fn find() -> Result<Self> {
        let set = sched_getaffinity(Pid::from_raw(0)).context("sched_getaffinity")?;
        let mut allowed = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false));
        match (allowed.next(), allowed.next()) {
            (Some(client), Some(server)) => Ok(Self { server, client }),
            _ => bail!("two processors are needed, one for the server and one for the client"),
        }
    }
}

impl Places {
    /// What to start a server with: its first thread is on the servers' processor, and all others inherit that.
    pub(super) fn on_server(self) -> [String; 3] {
        ["taskset".to_owned(), "--cpu-list".to_owned(), self.server.to_string()]
    }
}

/// Keeps the calling thread on one processor.
pub(super) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .with_context(|| format!("cannot run on processor {cpu}"))
}

/// Processor time of all threads of a process that are alive, to the nanosecond (`/proc/PID/task/TID/schedstat`). What
/// threads used that have ended is not in it: long-lived threads alone do the work that is measured here.
pub(super) fn used(pid: i32) -> Result<Duration> {
    let folder = format!("/proc/{pid}/task");
    let mut sum = 0u64;
    for task in std::fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))? {
        let path = task?.path().join("schedstat");
        // A thread may end between the listing and the look.
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let run_ns: Option<u64> = text.split_ascii_whitespace().next().and_then(|field| field.parse().ok());
        sum += run_ns.with_context(|| format!("{}: `{}`", path.display(), text.trim()))?;
    }
    Ok(Duration::from_nanos(sum))
}

/// The same by thread name, largest first: where a server's time went.
pub(super) fn used_by_thread(pid: i32) -> Vec<(String, Duration)> {
    let mut all = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let run_ns = read("schedstat").split_ascii_whitespace().next().and_then(|field| field.parse().ok());
        all.push((read("comm").trim().to_owned(), Duration::from_nanos(run_ns.unwrap_or(0))));
    }
    all.sort_by_key(|(_, used)| std::cmp::Reverse(*used));
    all
}

/// Bytes a second that one thread on `cpu` copies from a large memory to a small one, as a server does that answers
/// sequential reads of `chunk_bytes`: the best of several rounds.
pub(super) fn copy_bandwidth(cpu: usize, chunk_bytes: usize, depth: usize) -> Result<f64> {
    const SOURCE_BYTES: usize = 256 << 20;
    let measure = move || -> Result<f64> {
        pin(cpu)?;
        let source = vec![1u8; SOURCE_BYTES];
        let mut target = vec![0u8; chunk_bytes * depth];
        let mut best = 0f64;
        for _ in 0..8 {
            let began = std::time::Instant::now();
            for (chunk, at) in source.chunks_exact(chunk_bytes).zip((0..depth).cycle()) {
                target[at * chunk_bytes..(at + 1) * chunk_bytes].copy_from_slice(chunk);
                std::hint::black_box(&mut target);
            }
            #[allow(clippy::cast_precision_loss)] // a figure of three digits
            let rate = SOURCE_BYTES as f64 / began.elapsed().as_secs_f64();
            best = best.max(rate);
        }
        Ok(best)
    };
    let thread = std::thread::spawn(measure);
    thread.join().map_err(|_| anyhow::anyhow!("the thread that copies panicked"))?
}
