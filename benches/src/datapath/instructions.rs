//! Instructions that the daemon takes to answer a read from RAM, counted by callgrind: the same on every run of one build,
//! however busy the host is.
//!
//! The daemon itself runs under valgrind, and a client outside of it. Counted is `serve_batch` (`agent/src/serve.rs`), all that is
//! done about a request on its shard: from the ring to the RAM tier and back. What the kernel does for it, and the learner, is not in it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use prestage_tests::process::run as run_command;

use super::load::{self, Job, Op, Order};
use super::report::Figure;
use super::servers::{Server, Serving, Who};
use super::{Bench, content, share, verdict, warm};

pub(super) const FIGURE: &str = "instructions of a RAM hit of 4 KiB";
/// Above this a change made hits dearer, or a new compiler did. Measured on the release build; a twentieth is left for
/// batches that come in other sizes.
pub(super) const MOST: f64 = 0.0;

const DISK_BYTES: u64 = 16 << 20;
const TIME: Duration = Duration::from_secs(5);
const FEWEST_REQUESTS: u64 = 2000;

/// None without valgrind, which is said.
pub(super) fn run(bench: &Bench<'_>) -> Result<Option<Figure>> {
    if let Err(error) = run_command(Command::new("callgrind_control").arg("--version")) {
        bench
            .progress
            .step(&format!("SKIPPED: {FIGURE}: {error:#}; scripts/setup.sh callgrind installs valgrind on Debian"));
        return Ok(None);
    }
    let (disk, out) = (bench.scratch.join("instructions.raw"), bench.scratch.join("callgrind"));
    content::make(&disk, DISK_BYTES, &[(0, DISK_BYTES)])?;
    let valgrind = [
        "valgrind".to_owned(),
        "--tool=callgrind".to_owned(),
        "--toggle-collect=*serve_batch*".to_owned(),
        format!("--callgrind-out-file={}", out.display()),
    ];
    let serving = Serving { read_only: true, direct: false, size_bytes: DISK_BYTES };
    let server = Server::under(Who::Prestaged, &disk, serving, valgrind.to_vec())?;
    warm(&server, DISK_BYTES)?;
    let pid = server.pid()?.to_string();
    let job =
        Job { op: Op::Read, order: Order::Random, block_bytes: 4096, depth: 32, span_bytes: DISK_BYTES, check: true };
    let mut device = server.connect(job.depth, job.block_bytes)?;
    load::run(device.as_mut(), &job, TIME / 10, 1)?;
    let control = |word: &str| run_command(Command::new("callgrind_control").args([word, &pid])).map(drop);
    control("--zero")?;
    let before = server.counters()?.context("no daemon of this project")?;
    let seen = load::run(device.as_mut(), &job, TIME, 2)?;
    let counted = server.counters()?.context("no daemon of this project")?.since(&before);
    control("--dump")?;
    ensure!(seen.requests >= FEWEST_REQUESTS, "{} requests within {TIME:?}: too few to count by", seen.requests);
    let hits = share(&counted);
    ensure!(
        hits.is_some_and(|share| share >= verdict::HITS),
        "from RAM were {hits:?} of the reads that were to be counted"
    );
    let instructions: u64 = dumps(&out)?.iter().map(|dump| total(dump)).sum::<Result<_>>()?;
    ensure!(instructions > 0, "valgrind collected nothing: is serve_batch still a function of its own?");
    #[allow(clippy::cast_precision_loss)] // a figure of four digits
    let each = instructions as f64 / seen.requests as f64;
    Ok(Some(Figure { name: FIGURE.to_owned(), value: each, unit: "instructions" }))
}

/// Files that begin with this path: one a dump.
fn dumps(out: &Path) -> Result<Vec<PathBuf>> {
    let (folder, name) = (out.parent().context("no folder")?, out.file_name().unwrap_or_default());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let is_dump = |name: &str, file: &str| file.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
        if is_dump(&name.to_string_lossy(), &path.file_name().unwrap_or_default().to_string_lossy()) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Instructions in a dump.
fn total(dump: &Path) -> Result<u64> {
    let text = std::fs::read_to_string(dump).with_context(|| format!("cannot read {}", dump.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("summary:").or_else(|| line.strip_prefix("totals:")));
    line.and_then(|line| line.trim().parse().ok()).with_context(|| format!("{}: no summary", dump.display()))
}
