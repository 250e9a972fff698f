//! The lines the guest prints on its first serial port; `scripts/guest/probe` writes them.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The guest's own figures of its disk since its kernel started, from `/proc/diskstats`
/// (Linux Documentation/admin-guide/iostats.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Time since the guest's kernel started.
    pub uptime_ms: u64,
    /// Read requests completed.
    pub reads: u64,
    /// Bytes they read.
    pub read_bytes: u64,
    /// Time all of them waited together; two that wait at once count twice.
    pub read_wait_ms: u64,
    /// Time during which at least one request was waiting.
    pub busy_ms: u64,
    /// Write requests completed.
    pub writes: u64,
}

impl Figures {
    /// What happened after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            uptime_ms: self.uptime_ms.saturating_sub(earlier.uptime_ms),
            reads: self.reads.saturating_sub(earlier.reads),
            read_bytes: self.read_bytes.saturating_sub(earlier.read_bytes),
            read_wait_ms: self.read_wait_ms.saturating_sub(earlier.read_wait_ms),
            busy_ms: self.busy_ms.saturating_sub(earlier.busy_ms),
            writes: self.writes.saturating_sub(earlier.writes),
        }
    }

    /// Time since the guest's kernel started.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        Duration::from_millis(self.uptime_ms)
    }
}

/// What a guest whose resources change has (`scripts/guest/demand`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// It changed unasked.
    pub changed: bool,
    /// Time since the guest's kernel started, by its own clock.
    pub uptime_ms: u64,
    /// `MemTotal`, `MemFree` and `MemAvailable`.
    pub total_bytes: u64,
    pub free_bytes: u64,
    pub available_bytes: u64,
    /// Programs killed for want of memory since the start.
    pub ooms: u64,
    /// Processors in use, such as `0-1`.
    pub online: String,
}

/// What touching memory took, by the guest's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touched {
    pub pages: u64,
    pub time: Duration,
    /// Of what was read, in the order it was read in.
    pub sum: u64,
}

/// What a guest's verifier has done (`verifier.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    pub reads: u64,
    pub writes: u64,
    /// The longest time without an answer on one of its threads since it was last asked, by the guest's clock.
    pub gap: Duration,
    /// Lines of the kernel's log that tell of failed I/O.
    pub errors: u64,
}

/// A disk that became larger while a guest's verifier ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sized {
    pub bytes: u64,
    /// Lines of the kernel's log that tell of a new size.
    pub told: u64,
}

/// One line of the guest's report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// A kernel and an initramfs run, asked for by `prestage.probe`.
    Alive,
    /// The boot is over.
    Ready(Figures),
    /// The program starts.
    Start(Figures),
    /// The program has ended.
    Done {
        status: i32,
        figures: Figures,
    },
    /// A line of the failed program's standard error.
    Note(String),
    Sum {
        sum: String,
        path: String,
    },
    /// A file was written and synced.
    Wrote {
        sum: String,
        bytes: u64,
        path: String,
    },
    /// Figures after the last step.
    Last(Figures),
    /// What it has now.
    State(State),
    /// Memory is filled (`toucher.c`).
    Filled {
        bytes: u64,
    },
    /// The order of the next touch is drawn.
    Ordered {
        pages: u64,
    },
    /// Memory was touched.
    Touched(Touched),
    /// A disk's answers were checked.
    Verified(Verified),
    Sized(Sized),
    /// A disk's last block was written and read back; where it ends.
    Ended {
        bytes: u64,
    },
    /// The guest powers off now.
    End,
    /// The guest can't go on.
    Failed(String),
}

impl Line {
    /// Reads one line of the console; `None` for what is not of the report, or is garbled by a kernel message.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let words = &text[text.find("PRESTAGE ")? + "PRESTAGE ".len()..];
        let words = words.trim_end();
        let (verb, rest) = words.split_once(' ').unwrap_or((words, ""));
        Some(match verb {
            "alive" => Self::Alive,
            "ready" => Self::Ready(figures(rest)?),
            "start" => Self::Start(figures(rest)?),
            "done" => Self::Done { status: value(rest, "status")?, figures: figures(rest)? },
            "note" => Self::Note(rest.to_owned()),
            "sum" => {
                let (sum, path) = rest.split_once(' ')?;
                Self::Sum { sum: sum.to_owned(), path: path.to_owned() }
            }
            "wrote" => {
                let mut words = rest.splitn(3, ' ');
                Self::Wrote {
                    sum: words.next()?.to_owned(),
                    bytes: words.next()?.parse().ok()?,
                    path: words.next()?.to_owned(),
                }
            }
            "last" => Self::Last(figures(rest)?),
            "state" => Self::State(state(rest)?),
            "filled" => Self::Filled { bytes: value(rest, "bytes")? },
            "ordered" => Self::Ordered { pages: value(rest, "pages")? },
            "touched" => Self::Touched(Touched {
                pages: value(rest, "pages")?,
                time: Duration::from_nanos(value(rest, "ns")?),
                sum: value(rest, "sum")?,
            }),
            "verified" => Self::Verified(Verified {
                reads: value(rest, "reads")?,
                writes: value(rest, "writes")?,
                gap: Duration::from_millis(value(rest, "gap_ms")?),
                errors: value(rest, "errors")?,
            }),
            "sized" => Self::Sized(Sized { bytes: value(rest, "bytes")?, told: value(rest, "told")? }),
            "ended" => Self::Ended { bytes: value(rest, "bytes")? },
            "end" => Self::End,
            "failed" => Self::Failed(rest.to_owned()),
            _ => return None,
        })
    }
}

fn value<T: std::str::FromStr>(rest: &str, key: &str) -> Option<T> {
    rest.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
}

fn state(rest: &str) -> Option<State> {
    let bytes = |key| value::<u64>(rest, key)?.checked_mul(1024);
    Some(State {
        changed: value::<String>(rest, "why")? == "changed",
        uptime_ms: uptime_ms(value(rest, "uptime")?)?,
        total_bytes: bytes("total")?,
        free_bytes: bytes("free")?,
        available_bytes: bytes("available")?,
        ooms: value(rest, "ooms")?,
        online: value(rest, "online")?,
    })
}

fn uptime_ms(seconds: f64) -> Option<u64> {
    Duration::try_from_secs_f64(seconds).ok()?.as_millis().try_into().ok()
}

fn figures(rest: &str) -> Option<Figures> {
    let pairs: HashMap<&str, &str> = rest.split(' ').filter_map(|word| word.split_once('=')).collect();
    let number = |key: &str| pairs.get(key)?.parse::<u64>().ok();
    // hundredths of a second, as in /proc/uptime
    let uptime: f64 = pairs.get("uptime")?.parse().ok()?;
    Some(Figures {
        uptime_ms: uptime_ms(uptime)?,
        reads: number("reads")?,
        read_bytes: number("sectors")?.checked_mul(512)?,
        read_wait_ms: number("read_ms")?,
        busy_ms: number("busy_ms")?,
        writes: number("writes")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_after_a_prompt_is_read() {
        let line = "\x1b[0mfoo PRESTAGE done status=3 uptime=9.00 reads=1542 merged=379 sectors=120194 read_ms=487 writes=0 busy_ms=424\r";
        let Some(Line::Done { status, figures }) = Line::parse(line) else { panic!("not read") };
        assert_eq!(status, 3);
        let expected = Figures {
            uptime_ms: 9000,
            reads: 1542,
            read_bytes: 120_194 * 512,
            read_wait_ms: 487,
            busy_ms: 424,
            writes: 0,
        };
        assert_eq!(figures, expected);
    }

    #[test]
    fn a_garbled_line_is_no_report() {
        for line in ["", "PRESTAGE", "PRESTAGE ready uptime=x", "PRESTAGE ready uptime=-1 reads=1", "PRESTAGE sum abc"]
        {
            assert_eq!(Line::parse(line), None, "{line}");
        }
    }

    #[test]
    fn a_state_is_read_whole_or_not_at_all() {
        let line = "PRESTAGE state why=changed uptime=3.16 total=352276 free=316020 available=317424 ooms=0 online=0-1";
        let Some(Line::State(state)) = Line::parse(line) else { panic!("not read") };
        assert_eq!((state.changed, state.uptime_ms, state.total_bytes), (true, 3160, 352_276 << 10));
        assert_eq!((state.ooms, state.online.as_str()), (0, "0-1"));
        assert_eq!(Line::parse(&line.replace(" online=0-1", "")), None);
    }

    #[test]
    fn a_touch_is_read_with_its_time() {
        let expected = Touched { pages: 65536, time: Duration::from_nanos(35_511_504), sum: u64::MAX };
        let line = format!("PRESTAGE touched pages=65536 ns=35511504 sum={}\r", u64::MAX);
        assert_eq!(Line::parse(&line), Some(Line::Touched(expected)));
        assert_eq!(Line::parse("PRESTAGE touched pages=65536 ns=-1 sum=0"), None);
    }

    #[test]
    fn paths_with_blanks_stay_whole() {
        let expected = Line::Sum { sum: "ab".to_owned(), path: "/a b".to_owned() };
        assert_eq!(Line::parse("PRESTAGE sum ab /a b"), Some(expected));
    }
}
