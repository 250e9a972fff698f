//! Series and points from CSV files.
//!
//! Series: `series,metric,step,value`, by series and step, gaps filled forward, plain or gzip. Points:
//! `series,metric,origin,timestamp`; the timestamp is the origin's unix time. Columns are found by their names.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use prestage_predictor::demand::Metric;
use thiserror::Error;

/// Seconds of a step.
pub const STEP_S: u32 = 300;
/// Steps of a series, at most: ten years.
const STEPS_MOST: usize = 10 * 366 * 288;
/// Values of all series, at most, with what is filled: half a gigabyte.
const VALUES_MOST: usize = 50_000_000;
/// Longest line, bytes.
const LINE_MOST: u64 = 4096;

/// Why a file cannot be used.
#[derive(Debug, Error)]
pub enum TableError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: the header has no column {column}")]
    Column { path: PathBuf, column: &'static str },
    #[error("{path}:{line}: {what}")]
    Row { path: PathBuf, line: usize, what: String },
    #[error("{series} {metric} of the points is not among the series")]
    Unknown { series: String, metric: String },
}

/// Series and metric as the files name them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub series: String,
    pub metric: String,
}

impl Key {
    /// What the metric means; `None` for an unknown word.
    #[must_use]
    pub fn metric(&self) -> Option<Metric> {
        match self.metric.as_str() {
            "cpu" => Some(Metric::Cpu),
            "mem" | "memory" => Some(Metric::Memory),
            "disk" => Some(Metric::Disk),
            "net" | "network" => Some(Metric::Network),
            _ => None,
        }
    }
}

/// One series.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Line {
    /// One a step of [`STEP_S`].
    pub values: Vec<f64>,
    /// False where the value is taken to be filled.
    pub measured: Vec<bool>,
    /// Unix time of the first.
    pub start_s: u64,
}

/// Origins and their unix times, by series.
pub type Points = BTreeMap<Key, Vec<(usize, u64)>>;

/// All series.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    pub lines: BTreeMap<Key, Line>,
}

impl Table {
    /// Reads series.
    ///
    /// # Errors
    /// [`TableError`] with file, line and what is wrong there.
    pub fn read(path: &Path) -> Result<Self, TableError> {
        let mut lines: BTreeMap<Key, Line> = BTreeMap::new();
        let mut total = 0;
        rows(path, ["series", "metric", "step", "value"], |[series, metric, step, value]| {
            let step: usize = step.parse().map_err(|_| format!("step {step:?} is no number"))?;
            let value: f64 = value.parse().map_err(|_| format!("value {value:?} is no number"))?;
            if !(0.0..=1e30).contains(&value) {
                return Err(format!("value {value} is not within 0 and 1e30"));
            }
            let key = Key { series: series.to_owned(), metric: metric.to_owned() };
            if key.metric().is_none() {
                return Err(format!("metric {metric:?} is none of cpu, mem, disk, net"));
            }
            let line = lines.entry(key).or_default();
            if step < line.values.len() || step > STEPS_MOST {
                return Err(format!("step {step} comes after step {}", line.values.len()));
            }
            total += step + 1 - line.values.len();
            if total > VALUES_MOST {
                return Err(format!("{VALUES_MOST} values of all series, with what is filled, are the most"));
            }
            let before = line.values.last().copied().unwrap_or(0.0);
            line.values.resize(step, before);
            line.measured.resize(step, false);
            line.values.push(value);
            line.measured.push(true);
            Ok(())
        })?;
        let mut table = Self { lines };
        table.find_filled();
        Ok(table)
    }

    /// Reads points; the series' first times follow from them, and what was taken for filled there is measured: a point's
    /// origin and horizon are, by definition.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn points(&mut self, path: &Path, horizon: usize) -> Result<Points, TableError> {
        let mut points = Points::new();
        rows(path, ["series", "metric", "origin", "timestamp"], |[series, metric, origin, timestamp]| {
            let origin: usize = origin.parse().map_err(|_| format!("origin {origin:?} is no number"))?;
            let timestamp: u64 = timestamp.parse().map_err(|_| format!("timestamp {timestamp:?} is no number"))?;
            let key = Key { series: series.to_owned(), metric: metric.to_owned() };
            points.entry(key).or_default().push((origin, timestamp));
            Ok(())
        })?;
        let known: Vec<(Key, u64)> = points
            .iter()
            .flat_map(|(key, origins)| origins.iter().map(|at| (key.clone(), at.1 - at.1.min(at.0 as u64 * 300))))
            .collect();
        for (key, origins) in &points {
            let Some(line) = self.lines.get_mut(key) else {
                return Err(TableError::Unknown { series: key.series.clone(), metric: key.metric.clone() });
            };
            for (origin, _) in origins {
                let until = (origin + 1 + horizon).min(line.measured.len());
                line.measured.get_mut(*origin..until).into_iter().flatten().for_each(|known| *known = true);
            }
        }
        // series without a point begin when those of the same data set (the name up to its first dash) do
        let kind = |series: &str| series.split('-').next().unwrap_or_default().to_owned();
        for (key, line) in &mut self.lines {
            let own = known.iter().find(|(other, _)| other.series == key.series);
            let start = own.or_else(|| known.iter().find(|(other, _)| kind(&other.series) == kind(&key.series)));
            line.start_s = start.map_or(0, |(_, start)| *start);
        }
        Ok(points)
    }

    /// The file does not say what was filled: where all metrics of a series stand still, they are taken to be. A series
    /// of one metric is believed.
    fn find_filled(&mut self) {
        let names: Vec<String> = self.lines.keys().map(|key| key.series.clone()).collect();
        for name in names.chunk_by(|a, b| a == b).map(|same| same[0].clone()) {
            let first = Key { series: name.clone(), metric: String::new() };
            let of = |key: &&Key| key.series == name;
            let lines: Vec<&Line> =
                self.lines.range(first.clone()..).take_while(|(key, _)| of(key)).map(|(_, line)| line).collect();
            let steps = lines.iter().map(|line| line.values.len()).max().unwrap_or(0);
            if lines.len() < 2 {
                continue;
            }
            let still: Vec<bool> = (0..steps)
                .map(|at| {
                    at > 0
                        && lines.iter().all(|line| {
                            let pair = line.values.get(at - 1).zip(line.values.get(at));
                            pair.is_none_or(|(before, value)| before.to_bits() == value.to_bits())
                        })
                })
                .collect();
            for (_, line) in self.lines.range_mut(first.clone()..).take_while(|(key, _)| of(key)) {
                for (known, still) in line.measured.iter_mut().zip(&still) {
                    *known &= !still;
                }
            }
        }
    }
}

/// Calls `row` with the named columns of every row behind the header.
fn rows<const N: usize>(
    path: &Path,
    columns: [&'static str; N],
    mut row: impl FnMut([&str; N]) -> Result<(), String>,
) -> Result<(), TableError> {
    let read = |source| TableError::Read { path: path.to_owned(), source };
    let mut file = BufReader::new(File::open(path).map_err(read)?);
    let gzip = file.fill_buf().map_err(read)?.starts_with(&[0x1f, 0x8b]);
    let file: Box<dyn Read> = if gzip { Box::new(flate2::read::MultiGzDecoder::new(file)) } else { Box::new(file) };
    let mut file = BufReader::new(file);
    // A line is a few names and numbers: what is longer is no such file, and does not come into memory whole.
    let mut next = |line: &mut String| {
        line.clear();
        file.by_ref().take(LINE_MOST).read_line(line).map_err(read)
    };
    let (mut header, mut line) = (String::new(), String::new());
    next(&mut header)?;
    let header: Vec<&str> = header.trim().split(',').collect();
    let mut places = [0; N];
    for (place, column) in places.iter_mut().zip(columns) {
        *place = header
            .iter()
            .position(|name| *name == column)
            .ok_or_else(|| TableError::Column { path: path.to_owned(), column })?;
    }
    let mut number = 1;
    while next(&mut line)? > 0 {
        number += 1;
        let wrong = |what| TableError::Row { path: path.to_owned(), line: number, what };
        let fields: Vec<&str> = line.trim().split(',').collect();
        let mut of = [""; N];
        for (field, place) in of.iter_mut().zip(places) {
            *field = fields.get(place).ok_or_else(|| wrong(format!("{} columns are too few", fields.len())))?;
        }
        row(of).map_err(wrong)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What reading a text says.
    fn read(text: &str) -> Result<Table, TableError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("series.csv");
        std::fs::write(&path, text).unwrap();
        Table::read(&path)
    }

    #[test]
    fn small_files_do_not_become_large_in_memory() {
        let mut text = "series,metric,step,value\n".to_owned();
        for series in 0..60 {
            text.push_str(&format!("a{series},cpu,{},1\n", STEPS_MOST - 1));
        }
        let error = read(&text).unwrap_err().to_string();
        assert!(error.contains("are the most"), "{error}");
        let endless = format!("series,metric,step,value\na,cpu,1,{}", "1".repeat(100_000));
        assert!(read(&endless).is_err());
    }

    #[test]
    fn where_all_metrics_stand_still_they_are_filled() {
        let table =
            read("series,metric,step,value\na,cpu,0,1\na,mem,0,2\na,cpu,1,1\na,mem,1,2\nb,cpu,0,1\nb,cpu,1,1\n")
                .unwrap();
        let measured = |series: &str, metric: &str| {
            table.lines[&Key { series: series.to_owned(), metric: metric.to_owned() }].measured.clone()
        };
        assert_eq!((measured("a", "cpu"), measured("a", "mem")), (vec![true, false], vec![true, false]));
        assert_eq!(measured("b", "cpu"), [true, true]);
    }
}
