//! Traces, and the tiles that a long history is laid with.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use flate2::read::MultiGzDecoder;
use prestage_cache::access::{Access, AccessOp};
use prestage_cache::types::StorageId;

/// Accesses of a recorded trace; times from its first, in µs.
#[derive(Debug)]
pub(crate) struct Trace {
    pub(crate) name: String,
    pub(crate) accesses: Vec<(u64, AccessOp, u64, u32)>,
    /// Time from the first access to the last.
    pub(crate) span_us: u64,
}

impl Trace {
    /// Reads `ts_us,op,offset,len` with a header line, gzip-compressed when the name says so.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open trace {}", path.display()))?;
        let packed = path.extension().is_some_and(|extension| extension == "gz");
        let text: Box<dyn Read> = if packed { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
        let mut accesses = Vec::new();
        let mut first = None;
        for (at, line) in BufReader::new(text).lines().enumerate().skip(1) {
            let line = line.with_context(|| format!("cannot read trace {}", path.display()))?;
            let Some((time, op, offset, length)) = parse(&line) else {
                bail!("{}:{}: `{line}` is not ts_us,op,offset,len", path.display(), at + 1)
            };
            let first = *first.get_or_insert(time);
            accesses.push((time.saturating_sub(first), op, offset, length));
        }
        let name =
            path.file_name().unwrap_or_default().to_string_lossy().split('.').next().unwrap_or_default().to_owned();
        let Some(span_us) = accesses.iter().map(|access| access.0).max() else {
            bail!("trace {} is empty", path.display())
        };
        Ok(Self { name, accesses, span_us })
    }

    /// The accesses once more, later and elsewhere on the disk.
    pub(crate) fn tile(&self, disk: u32, from_us: u64, shift: u64) -> impl Iterator<Item = Access> {
        self.accesses.iter().map(move |(time, op, offset, length)| Access {
            at: Duration::from_micros(from_us + time),
            disk,
            storage: StorageId(0),
            op: *op,
            offset: offset + shift,
            len: *length,
            waits: false,
        })
    }
}

fn parse(line: &str) -> Option<(u64, AccessOp, u64, u32)> {
    let mut fields = line.split(',').map(str::trim);
    let time = fields.next()?.parse().ok()?;
    let op = match fields.next()? {
        "R" => AccessOp::Read,
        "W" => AccessOp::Write,
        "D" => AccessOp::Discard,
        _ => return None,
    };
    Some((time, op, fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}
