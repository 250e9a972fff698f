//! Lines of bounded length.

use std::io::{self, BufRead};

/// Longest line of a trace, bytes; the longest that any of the tools writes is a tenth of it.
const MAX_LINE: usize = 4096;

/// A line without its end and without white space around it, or what a line should be.
pub(super) enum Line<'a> {
    Text(&'a str),
    Bad(&'static str),
}

pub(super) struct Lines {
    source: Box<dyn BufRead + Send>,
    buf: Vec<u8>,
}

impl Lines {
    pub(super) fn new(source: Box<dyn BufRead + Send>) -> Self {
        Self { source, buf: Vec::with_capacity(MAX_LINE) }
    }

    /// `None` at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        self.buf.clear();
        let mut long = false;
        loop {
            let available = match self.source.fill_buf() {
                Ok(available) => available,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if available.is_empty() {
                if self.buf.is_empty() && !long {
                    return Ok(None);
                }
                break;
            }
            let end = available.iter().position(|byte| *byte == b'\n');
            let part = &available[..end.unwrap_or(available.len())];
            if self.buf.len() + part.len() > MAX_LINE {
                long = true;
            } else {
                self.buf.extend_from_slice(part);
            }
            let taken = part.len() + usize::from(end.is_some());
            self.source.consume(taken);
            if end.is_some() {
                break;
            }
        }
        Ok(Some(match std::str::from_utf8(&self.buf) {
            _ if long => Line::Bad("a line of at most 4096 bytes"),
            // Windows begins text with a byte order mark.
            Ok(text) => Line::Text(text.trim_start_matches('\u{feff}').trim()),
            Err(_) => Line::Bad("text"),
        }))
    }
}
