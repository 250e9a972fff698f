//! What can be wrong with a trace.

use super::TraceFormat;
use std::io;

/// Why a trace cannot be read. Rows are lines of text or records of a binary trace, counted from 1.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("{file}: {source}")]
    Open { file: String, source: io::Error },
    #[error("{file} is a pipe or device, and a trace is read more than once; copy it into a file")]
    NoFile { file: String },
    #[error(
        "the trace's first {requests} requests lie too far apart: more than 2 TiB in over 100000 places; cut it into parts"
    )]
    Scattered { requests: u64 },
    #[error("{file} is empty")]
    Empty { file: String },
    #[error(
        "{file}: not a trace that prestage knows: CSV (ts_us,op,offset,len), vscsi, blkparse's text, nbdkit's log; if it is one, name it with --format"
    )]
    Format { file: String },
    #[error("{file}:{row}: cannot be read on: {source}")]
    Read { file: String, row: u64, source: io::Error },
    #[error("{file}:{row}: bad {} row{}: expected {expected}; --skip-bad N leaves out up to N such rows", .format.name(), quoted(.text))]
    Row { file: String, row: u64, text: String, format: TraceFormat, expected: String },
}

fn quoted(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" `{text}`") }
}
