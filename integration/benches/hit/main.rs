//! Instructions of a guest's read of 4 KiB that is in RAM, counted by callgrind and compared with those on record: the
//! same on every run of one build, so that a loss shows which a clock would not. `make bench-callgrind`, a part of
//! `make test`; needs `valgrind`.
//!
//! - `lookup`: from an offset to a copy of the bytes: the cache alone
//! - `ring`: from an available chain of a virtqueue to the used one, the copy into guest memory in between
//!
//! The program runs itself under valgrind once a path. Counted is what [`paths`]' functions `…hit_measured` do, not what
//! fills the cache, nor the guest. With `-- --save` the figures on record become those of this run. The profiles stay in
//! the build's folder for `callgrind_annotate`.

mod paths;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Followed by a path's name: the child's part.
const CHILD: &str = "--path";
/// A loss that is let pass: what a new compiler or a changed layout of the code brings without any fault.
const TOLERANCE: f64 = 0.03;

/// The figures on record: `path instructions` a line, comments with `#`.
fn record() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/hit/record.txt")
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == CHILD) {
        return match paths::run(arguments.get(at + 1).map_or("", String::as_str)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        };
    }
    match compare(arguments.iter().any(|argument| argument == "--save")) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => failed(&error),
    }
}

fn failed(error: &str) -> ExitCode {
    eprintln!("instructions of a hit were not counted: {error}");
    ExitCode::FAILURE
}

/// Counts every path. False: one takes more than is on record.
fn compare(save: bool) -> Result<bool, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("callgrind");
    std::fs::create_dir_all(&folder).map_err(|error| format!("cannot create {}: {error}", folder.display()))?;
    let known = std::fs::read_to_string(record()).unwrap_or_default();
    let mut text = format!(
        "# Instructions of a read of 4 KiB that is in RAM: integration/benches/hit, by {}.\n\
         # Written by `cargo bench -p prestage-integration --bench hit -- --save`.\n",
        compiler()
    );
    let mut good = true;
    println!("{:<8} {:>18} {:>10} {:>8}", "path", "instructions/read", "on record", "change");
    for name in paths::NAMES {
        let each = count(name, &folder)? as f64 / paths::READS as f64;
        let _ = writeln!(text, "{name} {each:.1}");
        let before = known.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        match before {
            Some(before) => {
                let change = each / before - 1.0;
                println!("{name:<8} {each:>18.1} {before:>10.1} {:>7.1}%", 100.0 * change);
                good &= save || change <= TOLERANCE;
            }
            None => {
                println!("{name:<8} {each:>18.1} {:>10} {:>8}", "-", "-");
                good &= save;
            }
        }
    }
    if save {
        std::fs::write(record(), text).map_err(|error| format!("cannot write {}: {error}", record().display()))?;
    }
    println!("profiles for callgrind_annotate: {}", folder.display());
    if !good {
        eprintln!(
            "a hit takes more instructions than {} says, by more than {:.0} %: find out why, or write the new figure down \
             with `cargo bench -p prestage-integration --bench hit -- --save` (this compiler: {})",
            record().display(),
            100.0 * TOLERANCE,
            compiler()
        );
    }
    Ok(good)
}

/// What the code was most likely compiled by.
fn compiler() -> String {
    let told = Command::new("rustc").arg("--version").output().ok();
    let told = told.and_then(|output| String::from_utf8(output.stdout).ok());
    told.map_or("an unknown compiler".to_owned(), |version| version.trim().to_owned())
}

/// Instructions of a path's measured part.
fn count(name: &str, folder: &Path) -> Result<u64, String> {
    let program = std::env::current_exe().map_err(|error| format!("this program's own path: {error}"))?;
    let out = folder.join(format!("hit-{name}.out"));
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--toggle-collect=*hit_measured*"]);
    command.arg(format!("--callgrind-out-file={}", out.display())).arg(program).args([CHILD, name]);
    let ended = command
        .output()
        .map_err(|error| format!("cannot run valgrind: {error}; scripts/setup.sh callgrind installs it on Debian"))?;
    if !ended.status.success() {
        return Err(format!("valgrind: {}: {}", ended.status, String::from_utf8_lossy(&ended.stderr).trim()));
    }
    let text = std::fs::read_to_string(&out).map_err(|error| format!("cannot read {}: {error}", out.display()))?;
    // With threads there is a summary of each and the total of all.
    let line =
        |start: &'static str| text.lines().filter_map(move |line| line.strip_prefix(start)?.trim().parse::<u64>().ok());
    let all = line("totals:").next_back().or_else(|| line("summary:").next_back());
    all.filter(|instructions| *instructions > 0).ok_or_else(|| {
        format!(
            "{}: valgrind collected nothing: are the measured functions still functions of their own?",
            out.display()
        )
    })
}
