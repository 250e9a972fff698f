//! `trace record`: a live disk's requests into a file or a pipe.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use super::args::disk_name;
use super::render::count;
use super::table::printable;
use super::{Failure, print_json};
use crate::client::{Client, encode};
use crate::config::units::human_duration;

/// Between two status lines on a terminal, and between two looks at what waits in a pipe.
const TICK: Duration = Duration::from_millis(500);
/// A recording without an end of its own; as good as for ever.
const YEAR: Duration = Duration::from_secs(366 * 86_400);

#[derive(Debug, Args)]
#[command(
    long_about = "Record a disk's requests as they come, until stopped (Ctrl-C), or until --seconds or --requests are \
    over.\n\nA line a request: ts_us,op,offset,len. Time is Unix time in microseconds; op is R, W or D (discard); offset and \
    length are bytes, exactly as the guest asked. Requests that come faster than they can be written are left out and \
    counted, in a line `# missing N` at their place and on standard error: recording never delays a guest."
)]
pub struct RecordArgs {
    /// Name of the disk
    #[arg(value_parser = disk_name)]
    pub disk: String,
    /// New file, compressed if its name ends in .gz, or `-` for standard output [default: DISK.csv.gz]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Stop after so many seconds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub seconds: Option<u64>,
    /// Stop after so many requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub requests: Option<u64>,
}

/// Where the rows go.
enum Sink<'a, W: Write> {
    Pipe(BufWriter<&'a mut W>),
    Plain(BufWriter<File>),
    Gzip(Box<GzEncoder<BufWriter<File>>>),
}

impl<'a, W: Write> Sink<'a, W> {
    fn open(path: &Path, pipe: &'a mut W) -> Result<Self, Failure> {
        if path == Path::new("-") {
            return Ok(Self::Pipe(BufWriter::new(pipe)));
        }
        let file = File::create_new(path).map_err(|error| {
            let hint = if error.kind() == io::ErrorKind::AlreadyExists { "; name another with --out" } else { "" };
            Failure::Failed(format!("cannot make {}: {error}{hint}", path.display()))
        })?;
        let file = BufWriter::new(file);
        Ok(match path.extension() {
            Some(suffix) if suffix == "gz" => Self::Gzip(Box::new(GzEncoder::new(file, Compression::default()))),
            _ => Self::Plain(file),
        })
    }

    fn line(&mut self, line: &str) -> io::Result<()> {
        let writer: &mut dyn Write = match self {
            Self::Pipe(pipe) => pipe,
            Self::Plain(file) => file,
            Self::Gzip(file) => file,
        };
        writer.write_all(line.as_bytes())?;
        writer.write_all(b"\n")
    }

    /// Whoever reads a pipe wants its rows now.
    fn pause(&mut self) -> io::Result<()> {
        if let Self::Pipe(pipe) = self { pipe.flush() } else { Ok(()) }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Pipe(mut pipe) => pipe.flush(),
            Self::Plain(mut file) => file.flush(),
            Self::Gzip(file) => file.finish()?.flush(),
        }
    }
}

#[derive(Debug, Default)]
struct Recorded {
    requests: u64,
    missing: u64,
}

pub(super) async fn run(client: &Client, args: RecordArgs, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut rows = client.rows(&format!("/v1/disks/{}/trace", encode(&args.disk))).await?;
    let path = args.out.unwrap_or_else(|| PathBuf::from(format!("{}.csv.gz", args.disk)));
    let piped = path == Path::new("-");
    let mut sink = Sink::open(&path, out)?;
    let write_failed = |error: io::Error| match piped {
        true => Failure::Output(error),
        false => Failure::Failed(format!("cannot write {}: {error}", path.display())),
    };
    let mut recorded = Recorded::default();
    let begun = Instant::now();
    let until = begun + args.seconds.map_or(YEAR, Duration::from_secs);
    let watched = io::stderr().is_terminal();
    let mut tick_at = begun;
    let why = loop {
        if args.requests.is_some_and(|limit| recorded.requests >= limit) {
            break Ok("as many as asked for");
        }
        let now = Instant::now();
        if now >= tick_at {
            tick_at = now + TICK;
            sink.pause().map_err(&write_failed)?;
            if watched {
                eprint!("\r\x1b[K{}", status(&recorded, now - begun));
            }
        }
        tokio::select! {
            biased;
            _ = interrupt.recv() => break Ok("stopped"),
            _ = terminate.recv() => break Ok("stopped"),
            () = sleep_until(until) => break Ok("time is over"),
            () = sleep_until(tick_at) => {}
            line = rows.next() => match line {
                Ok(Some(line)) => {
                    if line.starts_with("# end: ") {
                        break Ok("the disk is no longer served");
                    }
                    match line.strip_prefix("# missing ") {
                        Some(missing) => recorded.missing += leading_number(missing),
                        // The first line names the columns.
                        None => recorded.requests += u64::from(line.starts_with(|c: char| c.is_ascii_digit())),
                    }
                    sink.line(&line).map_err(&write_failed)?;
                }
                Ok(None) => break Err("prestaged closed the connection".to_owned()),
                Err(error) => break Err(format!("the connection to prestaged broke off: {error}")),
            },
        }
    };
    let elapsed = begun.elapsed();
    // Whatever ended it: what came is kept, and the file is whole.
    sink.finish().map_err(&write_failed)?;
    if watched {
        eprint!("\r\x1b[K");
    }
    let Recorded { requests, missing } = recorded;
    if missing > 0 {
        let requests = count(missing, "request is", "requests are");
        eprintln!("prestagectl: {requests} missing: guests were faster than the recording could be written");
    }
    let file = if piped { "standard output".to_owned() } else { path.display().to_string() };
    let why = why.map_err(|error| {
        let requests = count(requests, "request is", "requests are");
        Failure::Failed(format!("{error}; {requests} in {file}"))
    })?;
    let text = format!(
        "{} of disk {} within {}, {missing} missing, in {} ({why})\n",
        count(requests, "request", "requests"),
        args.disk,
        human_duration(elapsed),
        printable(&file)
    );
    if piped {
        // Standard output has the rows.
        eprint!("{text}");
        return Ok(());
    }
    if json {
        let seconds = elapsed.as_secs_f64();
        let value = json!({
            "disk": args.disk, "file": file, "requests": requests, "missing": missing, "seconds": seconds, "ended": why,
        });
        return print_json(out, &value);
    }
    Ok(out.write_all(text.as_bytes())?)
}

fn status(recorded: &Recorded, elapsed: Duration) -> String {
    let Recorded { requests, missing } = recorded;
    format!("{}: {}, {missing} missing; Ctrl-C ends", human_duration(elapsed), count(*requests, "request", "requests"))
}

pub(super) fn leading_number(text: &str) -> u64 {
    let digits = text.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or(0)
}
