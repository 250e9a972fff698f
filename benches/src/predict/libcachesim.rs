//! Eviction policies of the Python package `libcachesim` (LRU, S3-FIFO, SIEVE, ARC), in a virtual environment of their own.
//!
//! `eviction_peers.py` feeds them page by page and counts by request, so that its rows compare with all others; its LRU
//! counts exactly what our `none` does. The package's prefetchers are not among what it offers to Python.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::row::{By, Row};
use crate::peers::Counts;
use crate::trace::Trace;

/// The script is handed to Python as its standard input: the program needs no file of the source tree.
const SCRIPT: &str = include_str!("../../eviction_peers.py");
const PACKAGE: &str = "libcachesim";
/// That the script runs at every size.
const POLICIES: usize = 4;

/// An environment in which the package can be imported.
#[derive(Debug)]
pub(super) struct Environment {
    python: PathBuf,
}

/// A line of the script's output.
#[derive(Debug, Deserialize)]
struct Line {
    policy: String,
    version: String,
    capacity_pages: usize,
    requests: usize,
    reads: u64,
    read_hits: u64,
    read_pages: u64,
    page_hits: u64,
}

impl Environment {
    /// Finds the environment in `folder`, or makes it: needs `python3` with `venv`, and an index that has the package.
    pub(super) fn find_or_make(folder: &Path) -> Result<Self> {
        let python = folder.join("bin/python");
        let import = || checked(Command::new(&python).args(["-c", &format!("import {PACKAGE}")]));
        if import().is_err() {
            checked(Command::new("python3").args(["-m", "venv"]).arg(folder))?;
            checked(Command::new(&python).args(["-m", "pip", "install", "--quiet", PACKAGE]))?;
            import()?;
        }
        Ok(Self { python })
    }

    /// Rows of every policy at every share of the trace's pages, and the package's version.
    pub(super) fn run(&self, trace: &Trace, shares: &[f64]) -> Result<(Vec<Row>, String)> {
        let capacities: Vec<String> = shares.iter().map(|share| trace.capacity(*share).to_string()).collect();
        let mut command = Command::new(&self.python);
        command.args(["-c", SCRIPT]).arg(capacities.join(",")).arg(&trace.path);
        let (mut rows, mut version) = (Vec::new(), String::new());
        let text = checked(&mut command)?;
        let mut lines = text.lines();
        for &share in shares {
            for _ in 0..POLICIES {
                let line = lines.next().with_context(|| format!("{PACKAGE} on {}: rows are missing", trace.name))?;
                let line: Line = serde_json::from_str(line).with_context(|| format!("{PACKAGE}: {line:?}"))?;
                let counts = Counts {
                    capacity_pages: line.capacity_pages,
                    requests: line.requests,
                    reads: line.reads,
                    read_hits: line.read_hits,
                    read_pages: line.read_pages,
                    page_hits: line.page_hits,
                    demand_pages: line.read_pages.saturating_sub(line.page_hits),
                    ..Counts::default()
                };
                version = line.version;
                let row = Row::of(&counts, None);
                rows.push(Row {
                    trace: trace.name.clone(),
                    policy: line.policy,
                    by: By::Libcachesim,
                    cache: share,
                    ..row
                });
            }
        }
        Ok((rows, version))
    }
}

/// Runs a command to its end; its output, or its last words as the error.
fn checked(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{program}: {}", words.trim().lines().next_back().unwrap_or("failed without a word"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
