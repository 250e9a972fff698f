//! Demand of real machines, from files.
//!
//! Two formats of text, plain or gzip, told apart by their first line:
//!
//! - comma-separated, one file for many machines, columns by name in any order: `ts` (Unix seconds), `vm`, `cores`,
//!   `cpu_pct` (% of the cores), `mem_cap_kb`, `mem_kb`; others are left alone;
//! - GWA-T-12 as published (Shen, van Beek, Iosup, CCGRID 2015), one file a machine: semicolons, `Timestamp [ms]`
//!   (which are seconds), `CPU cores`, `CPU usage [%]`, `Memory capacity provisioned [KB]`, `Memory usage [KB]`.
//!
//! A sample goes to the nearest step, half up; the last of a step wins. Steps without one are missing. A machine
//! without cores and memory is off.

use flate2::read::MultiGzDecoder;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Seconds between samples.
pub(super) const STEP_S: u64 = 300;
/// Samples of a machine at most: 20 years.
const STEPS_MAX: usize = 20 * 366 * 288;
/// Samples of all machines at most, with what is held over: a gigabyte.
const SAMPLES_MAX: usize = 20_000_000;
/// Machines at most: what one host can have, with room.
const VMS_MAX: usize = 4096;

/// Why demand cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("{file}: {source}")]
    Read { file: String, source: std::io::Error },
    #[error("{file}, line {line}: {expected}")]
    Row { file: String, line: u64, expected: String },
    #[error(
        "{folder} has no demand to replay; give files with the columns ts, vm, cores, cpu_pct, mem_cap_kb, mem_kb, or of GWA-T-12"
    )]
    Empty { folder: String },
    #[error(
        "the demand of all machines is more than {SAMPLES_MAX} steps of 5 minutes; give fewer machines or a shorter time"
    )]
    Long,
}

/// One step of a machine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Provisioned, cores.
    pub cores: f64,
    /// Used, cores; at most `cores`.
    pub cpu: f64,
    /// Provisioned, bytes.
    pub capacity: f64,
    /// Used, bytes; at most `capacity`.
    pub memory: f64,
    /// Measured, not held over from the step before.
    pub measured: bool,
}

impl Sample {
    /// Whether the machine runs.
    #[must_use]
    pub fn on(&self) -> bool {
        self.cores > 0.0 && self.capacity > 0.0
    }
}

/// A machine's demand, a sample a step.
#[derive(Debug, Clone, PartialEq)]
pub struct VmTrace {
    pub name: String,
    pub samples: Vec<Sample>,
}

/// The demand of all machines on one grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// Unix seconds of step 0.
    pub start_s: u64,
    pub vms: Vec<VmTrace>,
    /// What was not read, and why.
    pub notes: Vec<String>,
}

impl Trace {
    /// Steps of the longest machine.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.vms.iter().map(|vm| vm.samples.len()).max().unwrap_or(0)
    }

    /// Reads files, and of folders what is in them and can be read.
    ///
    /// # Errors
    /// A file that was named cannot be read or has a bad row; nothing is left to replay.
    pub fn read(paths: &[PathBuf]) -> Result<Self, TraceError> {
        let mut rows = Rows::default();
        let mut notes = Vec::new();
        for path in paths {
            let failed = |source| TraceError::Read { file: path.display().to_string(), source };
            if !std::fs::metadata(path).map_err(failed)?.is_dir() {
                if !rows.file(path)? {
                    let expected = "the first line names no columns that are known".to_owned();
                    return Err(TraceError::Row { file: path.display().to_string(), line: 1, expected });
                }
                continue;
            }
            let mut files: Vec<PathBuf> =
                std::fs::read_dir(path).map_err(failed)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
            files.retain(|file| {
                let name = file.to_string_lossy();
                file.is_file() && (name.ends_with(".csv") || name.ends_with(".csv.gz"))
            });
            files.sort();
            for file in files {
                if !rows.file(&file)? {
                    notes.push(format!("{} left out: it has no memory or no times", file.display()));
                }
            }
        }
        let folder = paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        rows.trace(notes)?.ok_or(TraceError::Empty { folder })
    }
}

#[derive(Default)]
struct Rows(BTreeMap<String, Vec<(u64, Sample)>>);

impl Rows {
    /// Whether the file has known columns.
    fn file(&mut self, path: &Path) -> Result<bool, TraceError> {
        let name = path.display().to_string();
        let failed = |source| TraceError::Read { file: name.clone(), source };
        let file = File::open(path).map_err(failed)?;
        let plain: Box<dyn Read> =
            if name.ends_with(".gz") { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
        let stem = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let own = stem.trim_end_matches(".gz").trim_end_matches(".csv").to_owned();
        self.text(&name, &own, BufReader::new(plain))
    }

    fn text(&mut self, file: &str, own: &str, mut from: impl BufRead) -> Result<bool, TraceError> {
        let failed = |source| TraceError::Read { file: file.to_owned(), source };
        let mut line = String::new();
        // A line is a few numbers: what is longer is no such file.
        let mut next = |line: &mut String| {
            line.clear();
            from.by_ref().take(4096).read_line(line).map_err(failed)
        };
        next(&mut line)?;
        let Some(columns) = Columns::find(&line) else { return Ok(false) };
        let mut number = 1;
        while next(&mut line)? > 0 {
            number += 1;
            let text = line.trim();
            if text.is_empty() {
                continue;
            }
            let bad = |expected: String| TraceError::Row { file: file.to_owned(), line: number, expected };
            let (vm, ts, sample) = columns.row(text, own).map_err(bad)?;
            if !self.0.contains_key(vm) && self.0.len() >= VMS_MAX {
                return Err(bad(format!("{VMS_MAX} machines are the most")));
            }
            match self.0.get_mut(vm) {
                Some(rows) => rows.push((ts, sample)),
                None => drop(self.0.insert(vm.to_owned(), vec![(ts, sample)])),
            }
        }
        Ok(true)
    }

    /// `None`: there is nothing.
    fn trace(self, notes: Vec<String>) -> Result<Option<Trace>, TraceError> {
        let Some(start_s) = self.0.values().flatten().map(|(ts, _)| *ts).min() else { return Ok(None) };
        let (mut vms, mut total) = (Vec::new(), 0);
        for (name, mut rows) in self.0 {
            rows.sort_by_key(|(ts, _)| *ts);
            let step = |ts: u64| ((ts - start_s + STEP_S / 2) / STEP_S) as usize;
            let last = rows.last().map_or(0, |(ts, _)| step(*ts)).min(STEPS_MAX);
            let off = Sample { cores: 0.0, cpu: 0.0, capacity: 0.0, memory: 0.0, measured: false };
            total += last + 1;
            if total > SAMPLES_MAX {
                return Err(TraceError::Long);
            }
            let mut samples = vec![off; last + 1];
            for (ts, sample) in rows {
                if let Some(slot) = samples.get_mut(step(ts)) {
                    *slot = sample;
                }
            }
            let mut held = off;
            for sample in &mut samples {
                if sample.measured {
                    held = *sample;
                } else {
                    *sample = Sample { measured: false, ..held };
                }
            }
            vms.push(VmTrace { name, samples });
        }
        // By number where names are numbers.
        vms.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
        Ok(Some(Trace { start_s, vms, notes }))
    }
}

/// Which column has what.
struct Columns {
    comma: char,
    vm: Option<usize>,
    ts: usize,
    cores: usize,
    cpu: usize,
    capacity: usize,
    memory: usize,
}

impl Columns {
    fn find(header: &str) -> Option<Self> {
        let comma = if header.contains(';') { ';' } else { ',' };
        let names: Vec<String> = header
            .split(comma)
            .map(|n| n.trim().trim_start_matches('\u{feff}').trim_matches('"').to_lowercase())
            .collect();
        let at = |options: [&str; 2]| names.iter().position(|name| options.contains(&name.as_str()));
        Some(Self {
            comma,
            vm: at(["vm", "vm"]),
            ts: at(["ts", "timestamp [ms]"])?,
            cores: at(["cores", "cpu cores"])?,
            cpu: at(["cpu_pct", "cpu usage [%]"])?,
            capacity: at(["mem_cap_kb", "memory capacity provisioned [kb]"])?,
            memory: at(["mem_kb", "memory usage [kb]"])?,
        })
    }

    fn row<'a>(&self, text: &'a str, own: &'a str) -> Result<(&'a str, u64, Sample), String> {
        let mut cells = [""; 32];
        for (cell, part) in cells.iter_mut().zip(text.split(self.comma)) {
            *cell = part.trim();
        }
        let number = |at: usize, what: &str| {
            let cell = cells.get(at).copied().unwrap_or("");
            match cell.parse::<f64>() {
                Ok(number) if (0.0..1e15).contains(&number) => Ok(number),
                _ => Err(format!("`{}` is no {what}", cell.chars().take(40).collect::<String>())),
            }
        };
        let cores = number(self.cores, "number of cores")?;
        let capacity = number(self.capacity, "memory capacity in KB")? * 1024.0;
        let cpu = (number(self.cpu, "CPU use in %")? / 100.0 * cores).min(cores);
        let memory = (number(self.memory, "memory use in KB")? * 1024.0).min(capacity);
        let vm = self.vm.and_then(|at| cells.get(at).copied()).unwrap_or(own);
        Ok((vm, number(self.ts, "time in seconds")? as u64, Sample { cores, cpu, capacity, memory, measured: true }))
    }
}
