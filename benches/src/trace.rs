//! A recorded trace in memory, and what a replay has to know of it beforehand.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flate2::read::MultiGzDecoder;
use prestage_predictor::access::MAX_PAGES;
use prestage_replay::Mark;
use prestage_replay::trace::MAX_REQUEST_BYTES;

/// Bytes in a page, the unit of caching.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// One guest request: a range of pages, both ends included. Times are as recorded: some run backwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) at_us: u64,
    pub(crate) read: bool,
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl Request {
    pub(crate) fn pages(&self) -> u64 {
        self.last - self.first + 1
    }
}

/// A trace and its marks.
#[derive(Debug)]
pub(crate) struct Trace {
    /// The file's name without its endings.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) requests: Vec<Request>,
    /// What the guest did when; empty where nobody noted it.
    pub(crate) marks: Vec<Mark>,
    distinct_pages: usize,
    pub(crate) last_page: u64,
}

impl Trace {
    pub(crate) fn new(name: &str, requests: Vec<Request>) -> Self {
        let distinct_pages = distinct(&requests);
        let last_page = requests.iter().map(|request| request.last).max().unwrap_or(0);
        let (name, path, marks) = (name.to_owned(), PathBuf::new(), Vec::new());
        Self { name, path, distinct_pages, last_page, requests, marks }
    }

    /// Reads a trace, and its marks if a file `NAME.marks.txt` lies beside it.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        // Looked at before it is opened: a pipe waits for a writer, and a device has no end.
        let meta = std::fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?;
        if !meta.is_file() {
            bail!("{} is no regular file, and a trace is read whole; copy it into one", path.display());
        }
        let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut text = String::new();
        let gz = path.extension().is_some_and(|ending| ending == "gz");
        let mut reader: Box<dyn Read> = if gz { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
        reader.read_to_string(&mut text).with_context(|| format!("cannot read {}", path.display()))?;
        let mut requests = Vec::new();
        for (row, line) in text.lines().enumerate().skip(1) {
            match request(line) {
                Some(request) => requests.extend(request),
                None => bail!("{}:{}: expected ts_us,op,offset,len, found {line:?}", path.display(), row + 1),
            }
        }
        let name = name(path).with_context(|| format!("{} is no name of a trace", path.display()))?;
        let marks = path.with_file_name(format!("{name}.marks.txt"));
        let marks = if marks.exists() { prestage_replay::marks::read(&marks)? } else { Vec::new() };
        Ok(Self { path: path.to_owned(), marks, ..Self::new(&name, requests) })
    }

    /// All traces of a folder, by name.
    pub(crate) fn load_all(folder: &Path) -> Result<Vec<Self>> {
        let entries = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
            if name(&path).is_some() {
                paths.push(path);
            }
        }
        paths.sort();
        if paths.is_empty() {
            bail!("no *.csv or *.csv.gz in {}: record a trace with prestagectl trace record", folder.display());
        }
        paths.iter().map(|path| Self::load(path)).collect()
    }

    /// Pages that a cache of this share of the trace's distinct pages holds; never fewer than 64.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(crate) fn capacity(&self, share: f64) -> usize {
        ((self.distinct_pages as f64 * share) as usize).max(64)
    }

    /// Whether the times are no more than row numbers: the order is all that was recorded.
    pub(crate) fn order_only(&self) -> bool {
        self.requests.iter().zip(0..).all(|(request, row)| request.at_us == row)
    }
}

/// Pages that a trace touches, each counted once: the union of its ranges.
fn distinct(requests: &[Request]) -> usize {
    let mut ranges: Vec<(u64, u64)> = requests.iter().map(|request| (request.first, request.last)).collect();
    ranges.sort_unstable();
    let (mut pages, mut next) = (0, 0);
    for (first, last) in ranges {
        pages += (last + 1).saturating_sub(first.max(next));
        next = next.max(last + 1);
    }
    usize::try_from(pages).unwrap_or(usize::MAX)
}

/// Name of a trace: its file's without `.csv`, `.csv.gz` and `.norm`; nothing for other files.
fn name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file.strip_suffix(".gz").unwrap_or(file).strip_suffix(".csv")?;
    Some(name.strip_suffix(".norm").unwrap_or(name).to_owned())
}

/// A row; nothing in it if it is a request without bytes.
fn request(line: &str) -> Option<Option<Request>> {
    let mut fields = line.split(',');
    let at_us = fields.next()?.parse().ok()?;
    let read = fields.next()? == "R";
    let offset: u64 = fields.next()?.parse().ok()?;
    let len: u64 = fields.next()?.parse().ok()?;
    let Some(before_end) = len.checked_sub(1) else { return Some(None) };
    let last = offset.checked_add(before_end)? / PAGE_BYTES;
    if last >= MAX_PAGES || len > MAX_REQUEST_BYTES {
        return None;
    }
    Some(Some(Request { at_us, read, first: offset / PAGE_BYTES, last }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(folder: &Path) -> String {
        format!("{:#}", Trace::load_all(folder).unwrap_err())
    }

    #[test]
    fn what_has_no_end_or_no_bounds_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.csv");
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(refused(folder.path()).contains("no regular file"), "{}", refused(folder.path()));
        std::fs::remove_file(&path).unwrap();
        let header = "ts_us,op,offset,len\n0,R,0,4096\n";
        std::fs::write(&path, format!("{header}1,R,18446744073709547520,4096\n")).unwrap();
        assert!(refused(folder.path()).contains("t.csv:3: expected"), "{}", refused(folder.path()));
        std::fs::write(&path, format!("{header}1,R,0,100000000000000\n")).unwrap();
        assert!(refused(folder.path()).contains("t.csv:3: expected"), "{}", refused(folder.path()));
        std::fs::write(&path, header).unwrap();
        assert_eq!(Trace::load_all(folder.path()).unwrap()[0].requests.len(), 1);
    }

    #[test]
    fn pages_are_counted_once() {
        let request = |first, last| Request { at_us: 0, read: true, first, last };
        let requests = [request(9, 9), request(0, 5), request(2, 3), request(5, 6), request(9, 10)];
        assert_eq!(Trace::new("t", requests.to_vec()).distinct_pages, 9);
        assert_eq!(distinct(&[]), 0);
    }
}
