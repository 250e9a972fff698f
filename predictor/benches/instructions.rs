//! Instructions that the hot path takes an access, counted by callgrind: the same on every run of one build, whatever else
//! the host does. Beside them the time of single accesses, without callgrind. `make bench-callgrind`, or
//! `cargo bench -p prestage-predictor --bench instructions`; needs `valgrind`.
//!
//! The program runs itself under valgrind once a load. Counted is what [`hot_path_measured`] does; what warms up is not.
//! The profiles stay in the build's folder for `callgrind_annotate`.

mod loads;

use loads::{HotPath, Load, Spread};
use prestage_predictor::Access;
use std::path::Path;
use std::process::{Command, ExitCode};

/// Followed by a load's name: the child's part.
const CHILD: &str = "--load";

/// Valgrind collects while this runs, and knows it by its name.
#[inline(never)]
fn hot_path_measured(path: &mut HotPath, accesses: &[Access]) {
    accesses.iter().for_each(|access| path.step(access));
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let loads = loads::all();
    if let Some(at) = arguments.iter().position(|argument| argument == CHILD) {
        for load in loads.iter().filter(|load| Some(load.name) == arguments.get(at + 1).map(String::as_str)) {
            hot_path_measured(&mut HotPath::warm(load), load.measured());
        }
        return ExitCode::SUCCESS;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("callgrind");
    let mut failure = None;
    println!(
        "{:<12} {:>9} {:>21} {:>8} {:>8} {:>8}",
        "load", "accesses", "instructions/access", "mean ns", "p50 ns", "p99 ns"
    );
    for load in &loads {
        let counted = match &failure {
            None => count(load, &folder),
            Some(_) => Err(String::new()),
        };
        let accesses = load.measured().len();
        let each =
            counted.as_ref().map_or("-".to_owned(), |all| format!("{:.1}", *all as f64 / accesses.max(1) as f64));
        failure = failure.or(counted.err());
        let Spread { mean, p50, p99 } = Spread::of(load);
        println!("{:<12} {accesses:>9} {each:>21} {mean:>8.0} {p50:>8} {p99:>8}", load.name);
    }
    match failure {
        None => {
            println!("profiles for callgrind_annotate: {}", folder.display());
            ExitCode::SUCCESS
        }
        Some(failure) => {
            eprintln!("instructions were not counted: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Instructions of a load's measured part.
fn count(load: &Load, folder: &Path) -> Result<u64, String> {
    let program = std::env::current_exe().map_err(|error| format!("this program's own path: {error}"))?;
    std::fs::create_dir_all(folder).map_err(|error| format!("cannot create {}: {error}", folder.display()))?;
    let out = folder.join(format!("{}.out", load.name.replace(' ', "-")));
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--toggle-collect=*hot_path_measured*"]);
    command.arg(format!("--callgrind-out-file={}", out.display())).arg(program).args([CHILD, load.name]);
    let ended = command
        .output()
        .map_err(|error| format!("cannot run valgrind: {error}; scripts/setup.sh callgrind installs it on Debian"))?;
    if !ended.status.success() {
        return Err(format!("valgrind: {}: {}", ended.status, String::from_utf8_lossy(&ended.stderr).trim()));
    }
    let text = std::fs::read_to_string(&out).map_err(|error| format!("cannot read {}: {error}", out.display()))?;
    let summary = text.lines().find_map(|line| line.strip_prefix("summary:")?.trim().parse().ok());
    summary.filter(|instructions| *instructions > 0).ok_or_else(|| {
        format!("{}: valgrind collected nothing: is hot_path_measured still a function of its own?", out.display())
    })
}
