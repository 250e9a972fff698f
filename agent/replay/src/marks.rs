//! What the guest did when: lines `<ts_us> start NAME`, `<ts_us> end NAME`, `<ts_us> boot-done`, `<ts_us> off`.
//!
//! A guest boots from time 0 until `boot-done`. Times are those of the trace.

use prestage_predictor::Phase;
use std::hash::{Hash, Hasher};
use std::path::Path;

/// Name of the phase that a trace with marks begins with.
const BOOT: &str = "boot";

/// Something began or ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    pub at_us: u64,
    pub kind: MarkKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MarkKind {
    Start { name: String, phase: Phase },
    End,
}

/// Why a file of marks cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MarksError {
    #[error("{file}: {source}")]
    Open { file: String, source: std::io::Error },
    #[error("{file} is a pipe or device; copy it into a file")]
    NoFile { file: String },
    #[error(
        "{file}:{line}: `{text}` is no mark: expected `TS_US start NAME`, `TS_US end NAME`, `TS_US boot-done` or `TS_US off`, in order of time"
    )]
    Row { file: String, line: usize, text: String },
}

/// Reads a file of marks.
///
/// # Errors
/// The file cannot be read, or a line is no mark or earlier than the one before.
pub fn read(path: &Path) -> Result<Vec<Mark>, MarksError> {
    let file = path.display().to_string();
    // A device may have no end, and a pipe nobody who writes to it.
    if std::fs::metadata(path).is_ok_and(|meta| !meta.is_file() && !meta.is_dir()) {
        return Err(MarksError::NoFile { file });
    }
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&file, &text),
        Err(source) => Err(MarksError::Open { file, source }),
    }
}

/// Parses marks; `file` stands in errors.
///
/// # Errors
/// As for [`read`].
pub fn parse(file: &str, text: &str) -> Result<Vec<Mark>, MarksError> {
    let mut marks = vec![Mark { at_us: 0, kind: MarkKind::Start { name: BOOT.to_owned(), phase: Phase::Boot } }];
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let latest_us = marks.last().map_or(0, |mark| mark.at_us);
        let mark = mark(line).filter(|mark| mark.at_us >= latest_us).ok_or_else(|| MarksError::Row {
            file: file.to_owned(),
            line: index + 1,
            text: line.chars().take(60).flat_map(char::escape_debug).collect(),
        })?;
        marks.push(mark);
    }
    Ok(marks)
}

fn mark(line: &str) -> Option<Mark> {
    let mut fields = line.split_ascii_whitespace();
    let at_us = fields.next()?.parse().ok()?;
    let kind = match (fields.next()?, fields.next()) {
        ("start", Some(name)) => MarkKind::Start { name: name.to_owned(), phase: Phase::Program(program_id(name)) },
        ("end", Some(_)) | ("boot-done" | "off", None) => MarkKind::End,
        _ => return None,
    };
    fields.next().is_none().then_some(Mark { at_us, kind })
}

/// A program's number: a stable hash of its name.
#[must_use]
pub fn program_id(name: &str) -> u64 {
    let mut hasher = rustc_hash::FxHasher::default();
    name.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_boots_until_it_is_done() {
        let marks = parse("m", "70 boot-done\n# programs\n\n80 start py\n90 end py\n100 off\n").unwrap();
        let start = |at_us, name: &str, phase| Mark { at_us, kind: MarkKind::Start { name: name.to_owned(), phase } };
        let end = |at_us| Mark { at_us, kind: MarkKind::End };
        let py = Phase::Program(program_id("py"));
        assert_eq!(marks, [start(0, "boot", Phase::Boot), end(70), start(80, "py", py), end(90), end(100)]);
        assert_ne!(program_id("py"), program_id("www"));
    }

    #[test]
    fn marks_are_a_file() {
        let error = read(Path::new("/dev/zero")).unwrap_err().to_string();
        assert_eq!(error, "/dev/zero is a pipe or device; copy it into a file");
    }

    #[test]
    fn what_is_no_mark_is_named() {
        for row in ["80 start", "x boot-done", "80 begin py", "80 end py now", "60 off", "80"] {
            let error = parse("m", &format!("70 boot-done\n{row}\n")).unwrap_err().to_string();
            assert!(error.starts_with(&format!("m:2: `{row}` is no mark: expected")), "{error}");
        }
    }
}
