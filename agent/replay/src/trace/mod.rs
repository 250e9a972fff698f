//! Trace files: `Iterator<Item = Result<Request, TraceError>>` in constant memory, whatever the trace's length.
//!
//! - [`TraceReader`]: opens a file, undoes gzip and zstd, finds out the format, gives requests in order
//! - [`ReadOptions`], [`TraceFormat`], [`BlktraceAction`]: what the operator may say about a file
//! - [`TraceError`]: what is wrong, where, and what is expected
//! - `csv`, `vscsi`, `blktrace`, `nbdkit`: one row each
//! - `lines`: lines of bounded length
//!
//! What every format has in common: requests of no bytes are left out, and so is what is neither read, write nor
//! discard. Times never run backwards: an earlier one is raised to the latest so far, and counted. Every format but CSV,
//! whose times are taken as they are, starts at time 0.

mod blktrace;
mod csv;
mod error;
mod lines;
mod nbdkit;
mod vscsi;

pub use blktrace::BlktraceAction;
pub use error::TraceError;

use lines::{Line, Lines};
use prestage_predictor::{Op, PAGE_BYTES};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest request of a trace. Linux and QEMU split what is longer.
pub const MAX_REQUEST_BYTES: u64 = 2 << 30;
/// Largest offset of a trace: what the predictor can address, just under 256 TiB.
pub const MAX_OFFSET: u64 = prestage_predictor::access::MAX_PAGES * PAGE_BYTES;
/// Bytes looked at to find out a format.
const SNIFF: usize = 4096;

/// One request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Microseconds on the trace's clock; never less than the request's before.
    pub at_us: u64,
    pub op: Op,
    /// Bytes.
    pub offset: u64,
    /// Bytes, 1 to [`MAX_REQUEST_BYTES`].
    pub len: u32,
}

impl Request {
    /// The 4 KiB pages that the request touches, also in part.
    #[must_use]
    pub fn pages(&self) -> RangeInclusive<u64> {
        let last = self.offset.saturating_add(u64::from(self.len.max(1)) - 1) / PAGE_BYTES;
        self.offset / PAGE_BYTES..=last
    }
}

/// Format of a trace file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceFormat {
    /// `ts_us,op,offset,len`, with or without a header.
    Csv,
    /// VMware's vscsiStats records, version 1 or 2, either byte order.
    Vscsi,
    /// What `blkparse` prints.
    Blktrace,
    /// What nbdkit's log filter writes.
    Nbdkit,
}

impl TraceFormat {
    /// As in error texts.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Csv => "CSV",
            Self::Vscsi => "vscsi",
            Self::Blktrace => "blktrace",
            Self::Nbdkit => "nbdkit log",
        }
    }
}

/// How to read a trace file.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReadOptions {
    /// `None`: found out from the first bytes.
    pub format: Option<TraceFormat>,
    /// Which of a request's blktrace events counts.
    pub blktrace_action: BlktraceAction,
    /// Bad rows to leave out before one is an error.
    pub skip_bad: u64,
}

/// How a row failed: what was expected instead.
type Expected = String;

/// A format of text, a row a line.
trait RowFormat: Send {
    /// The request of a line that is not empty, if it has one. Rows count from 1.
    fn parse(&mut self, row: u64, text: &str) -> Result<Option<Raw>, Expected>;
}

enum Rows {
    Text(Lines, Box<dyn RowFormat>),
    Vscsi(Box<dyn BufRead + Send>, vscsi::Vscsi),
}

/// Reads a trace file request by request. Ends after its first error.
pub struct TraceReader {
    file: String,
    format: TraceFormat,
    rows: Rows,
    skip_bad: u64,
    start_us: Option<u64>,
    latest_us: u64,
    row: u64,
    skipped: u64,
    clamped: u64,
    ended: bool,
    consumed: Arc<AtomicU64>,
    total_bytes: u64,
}

impl TraceReader {
    /// Opens a file. A replay reads its trace twice, so it is a file: a pipe is over after the first time, and waits for
    /// ever for somebody to write to it.
    ///
    /// # Errors
    /// The file cannot be read, is none, is empty, or its format cannot be told.
    pub fn open(path: &Path, options: ReadOptions) -> Result<Self, TraceError> {
        let name = path.display().to_string();
        let failed = |source| TraceError::Open { file: name.clone(), source };
        // Looked at before it is opened, which waits if it is a pipe.
        let meta = std::fs::metadata(path).map_err(failed)?;
        if meta.is_dir() {
            return Err(failed(io::Error::from(io::ErrorKind::IsADirectory)));
        }
        if !meta.is_file() {
            return Err(TraceError::NoFile { file: name });
        }
        let file = File::open(path).map_err(failed)?;
        let mut reader = Self::new(&name, file, options)?;
        reader.total_bytes = meta.len();
        Ok(reader)
    }

    /// Reads from `source`; `name` stands for it in errors.
    ///
    /// # Errors
    /// As for [`TraceReader::open`].
    pub fn new(name: &str, source: impl Read + Send + 'static, options: ReadOptions) -> Result<Self, TraceError> {
        let failed = |source| TraceError::Open { file: name.to_owned(), source };
        let consumed = Arc::new(AtomicU64::new(0));
        let counted = Counted { source, consumed: Arc::clone(&consumed) };
        let (head, source) = peek(Box::new(BufReader::with_capacity(1 << 16, counted))).map_err(failed)?;
        if head.is_empty() {
            return Err(TraceError::Empty { file: name.to_owned() });
        }
        let source: Box<dyn BufRead + Send> = match head[..] {
            [0x1f, 0x8b, ..] => Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(source))),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                Box::new(BufReader::new(zstd::stream::read::Decoder::with_buffer(source).map_err(failed)?))
            }
            _ => source,
        };
        let (head, source) = peek(source).map_err(failed)?;
        if head.is_empty() {
            return Err(TraceError::Empty { file: name.to_owned() });
        }
        let format = options.format.or_else(|| sniff(&head));
        let format = format.ok_or_else(|| TraceError::Format { file: name.to_owned() })?;
        let rows = match format {
            TraceFormat::Csv => Rows::Text(Lines::new(source), Box::new(csv::Csv)),
            TraceFormat::Blktrace => {
                Rows::Text(Lines::new(source), Box::new(blktrace::Blktrace::new(options.blktrace_action)))
            }
            TraceFormat::Nbdkit => Rows::Text(Lines::new(source), Box::new(nbdkit::Nbdkit)),
            TraceFormat::Vscsi => match vscsi::Vscsi::sniff(&head) {
                Some(layout) => Rows::Vscsi(source, layout),
                None => return Err(TraceError::Format { file: name.to_owned() }),
            },
        };
        Ok(Self {
            file: name.to_owned(),
            format,
            rows,
            skip_bad: options.skip_bad,
            start_us: None,
            latest_us: 0,
            row: 0,
            skipped: 0,
            clamped: 0,
            ended: false,
            consumed,
            total_bytes: 0,
        })
    }

    #[must_use]
    pub fn format(&self) -> TraceFormat {
        self.format
    }

    /// Bytes of the file taken so far (as they are on disk, compressed or not), a handle that another owner of the
    /// progress can keep.
    #[must_use]
    pub fn consumed(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.consumed)
    }

    /// Bytes of the file; 0 if it is not a file.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Bad rows left out so far.
    #[must_use]
    pub fn skipped_rows(&self) -> u64 {
        self.skipped
    }

    /// Requests so far whose time was raised to that of the one before.
    #[must_use]
    pub fn clamped_rows(&self) -> u64 {
        self.clamped
    }

    fn next_row(&mut self) -> Option<Result<Request, TraceError>> {
        loop {
            let row = self.row + 1;
            let parsed = match &mut self.rows {
                Rows::Vscsi(source, layout) => layout.read(source).map(|read| read.map(|raw| (raw, ""))),
                Rows::Text(lines, format) => lines.next().map(|line| {
                    line.map(|line| match line {
                        Line::Text("") => (Ok(None), ""),
                        Line::Text(text) => (format.parse(row, text), text),
                        Line::Bad(expected) => (Err(expected.to_owned()), ""),
                    })
                }),
            };
            let (parsed, text) = match parsed {
                Ok(None) => return None,
                Ok(Some(parsed)) => parsed,
                Err(source) => return Some(Err(TraceError::Read { file: self.file.clone(), row, source })),
            };
            self.row = row;
            match parsed.and_then(|raw| raw.map(checked).transpose()) {
                Ok(None) => {}
                Ok(Some(request)) if request.len == 0 => {}
                Ok(Some(request)) => return Some(Ok(self.in_time(request))),
                Err(_) if self.skipped < self.skip_bad => self.skipped += 1,
                Err(expected) => {
                    let (file, text, format) = (self.file.clone(), shown(text), self.format);
                    return Some(Err(TraceError::Row { file, row, text, format, expected }));
                }
            }
        }
    }

    fn in_time(&mut self, request: Request) -> Request {
        let start_us = *self.start_us.get_or_insert(match self.format {
            TraceFormat::Csv => 0,
            _ => request.at_us,
        });
        let at_us = request.at_us.saturating_sub(start_us);
        self.clamped += u64::from(request.at_us < start_us || at_us < self.latest_us);
        self.latest_us = self.latest_us.max(at_us);
        Request { at_us: self.latest_us, ..request }
    }
}

impl Iterator for TraceReader {
    type Item = Result<Request, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let row = self.next_row();
        self.ended = !matches!(row, Some(Ok(_)));
        row
    }
}

impl std::fmt::Debug for TraceReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TraceReader").field("file", &self.file).field("row", &self.row).finish_non_exhaustive()
    }
}

/// A request as a row says it, not yet checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Raw {
    at_us: u64,
    op: Op,
    offset: u64,
    len: u64,
}

/// Refuses what no disk does.
fn checked(raw: Raw) -> Result<Request, Expected> {
    let Raw { at_us, op, offset, len } = raw;
    match u32::try_from(len) {
        Ok(len) if u64::from(len) <= MAX_REQUEST_BYTES && offset <= MAX_OFFSET - MAX_REQUEST_BYTES => {
            Ok(Request { at_us, op, offset, len })
        }
        _ => Err("a length up to 2 GiB and an offset below 256 TiB".to_owned()),
    }
}

/// Counts the bytes that pass.
struct Counted<R> {
    source: R,
    consumed: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let got = self.source.read(buf)?;
        self.consumed.fetch_add(got as u64, Ordering::Relaxed);
        Ok(got)
    }
}

/// The first bytes of a source, and the source as if nothing had been taken.
fn peek(mut source: Box<dyn BufRead + Send>) -> io::Result<(Vec<u8>, Box<dyn BufRead + Send>)> {
    let mut head = vec![0; SNIFF];
    let got = read_up_to(&mut source, &mut head)?;
    head.truncate(got);
    let whole = Cursor::new(head.clone()).chain(source);
    Ok((head, Box::new(whole)))
}

/// Fills `buf` as far as the source goes.
fn read_up_to(source: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buf.len() {
        match source.read(&mut buf[got..]) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

fn sniff(head: &[u8]) -> Option<TraceFormat> {
    if vscsi::Vscsi::sniff(head).is_some() {
        return Some(TraceFormat::Vscsi);
    }
    let text = String::from_utf8_lossy(head);
    let first = text.trim_start_matches('\u{feff}').lines().map(str::trim).find(|line| !line.is_empty())?;
    if nbdkit::sniff(first) {
        Some(TraceFormat::Nbdkit)
    } else if blktrace::sniff(first) {
        Some(TraceFormat::Blktrace)
    } else if csv::sniff(first) {
        Some(TraceFormat::Csv)
    } else {
        None
    }
}

/// A row as it may be shown in a terminal.
fn shown(text: &str) -> String {
    const SHOWN: usize = 60;
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}
