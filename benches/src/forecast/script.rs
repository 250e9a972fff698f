//! The script with the peers, and the Python it runs in.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

/// What the script imports.
const PACKAGES: [&str; 4] = ["numpy", "pandas", "lightgbm", "statsforecast"];

#[derive(Debug)]
pub(super) struct Script {
    python: PathBuf,
    path: PathBuf,
    data: PathBuf,
}

/// The peers at work; ended with this value.
#[derive(Debug)]
pub(super) struct Running(Child);

impl Script {
    /// Finds Python, or makes an environment for it below the build's folder: needs `python3` with `venv`, an index that has the
    /// packages, and the system library libgomp1.
    pub(super) fn find(path: &Path, data: &Path, python: Option<&Path>) -> Result<Self> {
        for needed in [path, data] {
            if !needed.exists() {
                bail!("{} does not exist; give the script with --peers and the traces with --data", needed.display());
            }
        }
        let python = match python {
            Some(python) => python.to_owned(),
            None => environment(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/forecast-peers")))?,
        };
        checked(Command::new(&python).args(["-c", &import()]))
            .with_context(|| format!("{} lacks {}", python.display(), PACKAGES.join(", ")))?;
        Ok(Self { python, path: path.to_owned(), data: data.to_owned() })
    }

    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(&self.path).arg(what).arg("--data").arg(&self.data);
        command
    }

    /// Runs one of the script's commands; the files follow the words.
    pub(super) fn run(&self, what: &str, words: &[&str], files: &[&Path]) -> Result<String> {
        checked(self.command(what).args(words).args(files))
    }

    pub(super) fn start_peers(&self, points: &Path, out: &Path) -> Result<Running> {
        let mut command = self.command("peers");
        command.arg("--points").arg(points).arg("--out").arg(out).stdout(Stdio::null());
        Ok(Running(command.spawn().with_context(|| format!("cannot run {}", self.python.display()))?))
    }

    /// The scores of all forecasts, as JSON.
    pub(super) fn score(&self, points: &Path, predictions: &[&Path]) -> Result<String> {
        checked(self.command("score").arg("--json").arg("--points").arg(points).arg("--predictions").args(predictions))
    }
}

impl Running {
    pub(super) fn finish(mut self) -> Result<()> {
        let status = self.0.wait().context("cannot wait for the peers")?;
        if !status.success() {
            bail!("the peers failed, see above");
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // after a failure elsewhere; one that has ended is not there to be killed
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn import() -> String {
    format!("import {}", PACKAGES.join(", "))
}

fn environment(folder: &Path) -> Result<PathBuf> {
    let python = folder.join("bin/python");
    if checked(Command::new(&python).args(["-c", &import()])).is_err() {
        checked(Command::new("python3").args(["-m", "venv"]).arg(folder))?;
        checked(Command::new(&python).args(["-m", "pip", "install", "--quiet"]).args(PACKAGES))?;
    }
    Ok(python)
}

/// Runs a command to its end; its output, or its last words as the error.
fn checked(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{program}: {}", words.trim().lines().next_back().unwrap_or("failed without a word"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
