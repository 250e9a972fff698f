//! `prestaged` with a configuration and state of its own, and `prestagectl` to ask it.
//!
//! - [`Prestaged`], [`DaemonOptions`], [`Counters`]
//! - `succession`: one daemon taking over from another; [`Outcome`]

mod succession;

pub use succession::Outcome;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::paths::{self, Scratch};
use crate::process::{Process, run, tail, wait_until};

/// Sizes and connections of the daemon.
#[derive(Debug, Clone)]
pub struct DaemonOptions {
    pub ram_size: String,
    /// Empty: no SSD tier.
    pub ssd_size: String,
    /// The SSD tier's file is there before the start, as one hole of so many bytes: a size that the disk need not have.
    pub ssd_hole_bytes: Option<u64>,
    /// In place of the one that was built.
    pub program: Option<PathBuf>,
    /// Words in front of the daemon's own: a program that becomes it, such as taskset, or runs it, such as valgrind.
    pub under: Vec<String>,
    /// libvirt's URI, or none.
    pub libvirt_uri: Option<String>,
    /// Further sections of the configuration.
    pub more: String,
}

impl Default for DaemonOptions {
    /// More than the guest image holds, so that what a boot shows is prediction and not eviction.
    fn default() -> Self {
        Self {
            ram_size: "256MiB".to_owned(),
            ssd_size: "1GiB".to_owned(),
            ssd_hole_bytes: None,
            program: None,
            under: Vec::new(),
            libvirt_uri: None,
            more: String::new(),
        }
    }
}

/// The daemon's folders and programs; the daemon itself runs between [`Prestaged::start`] and [`Prestaged::stop`].
#[derive(Debug)]
pub struct Prestaged {
    daemon: PathBuf,
    control: PathBuf,
    config: PathBuf,
    socket: PathBuf,
    ssd: PathBuf,
    log: PathBuf,
    under: Vec<String>,
    process: Option<Process>,
    _run: Scratch,
    _state: Scratch,
}

impl Prestaged {
    /// Writes a configuration and starts the daemon.
    pub fn start(options: &DaemonOptions) -> Result<Self> {
        let (run_folder, state) = (Scratch::new()?, Scratch::large()?);
        let (config, socket) = (run_folder.join("prestaged.toml"), run_folder.join("api.sock"));
        let ssd = state.join("ssd.slab");
        let libvirt = match &options.libvirt_uri {
            Some(uri) => format!("enabled = true\nuri = \"{uri}\""),
            None => "enabled = false".to_owned(),
        };
        let ssd_keys = match options.ssd_size.as_str() {
            "" => String::new(),
            size => format!("ssd_path = \"{}\"\nssd_size = \"{size}\"\n", ssd.display()),
        };
        std::fs::write(
            &config,
            format!(
                "[daemon]\nstate_dir = \"{}\"\nrun_dir = \"{}\"\n\n\
                 [cache]\nram_size = \"{}\"\n{ssd_keys}\n\
                 [api]\nsocket = \"{}\"\n\n[libvirt]\n{libvirt}\n\n{}\n",
                state.join("state").display(),
                run_folder.join("run").display(),
                options.ram_size,
                socket.display(),
                options.more,
            ),
        )?;
        for folder in [state.join("state"), run_folder.join("run")] {
            std::fs::create_dir(folder)?;
        }
        if let Some(bytes) = options.ssd_hole_bytes {
            std::fs::File::create(&ssd)
                .and_then(|file| file.set_len(bytes))
                .context("cannot make the SSD tier's file")?;
        }
        let mut prestaged = Self {
            daemon: options.program.clone().map_or_else(|| paths::program("prestaged"), Ok)?,
            control: paths::program("prestagectl")?,
            config,
            socket,
            ssd,
            log: run_folder.join("prestaged.log"),
            under: options.under.clone(),
            process: None,
            _run: run_folder,
            _state: state,
        };
        prestaged.resume()?;
        Ok(prestaged)
    }

    /// Starts the daemon on what an earlier one left.
    pub fn resume(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("prestaged runs already");
        }
        let process = Process::start("prestaged", &self.command(&[])?, &self.log, Duration::from_secs(20))?;
        let ready = wait_until("prestaged's start", Duration::from_secs(60), || {
            process.check_alive()?;
            Ok(self.socket.exists() && self.ctl(&["status"]).is_ok())
        });
        ready.with_context(|| self.last_words())?;
        self.process = Some(process);
        Ok(())
    }

    fn command(&self, more: &[&str]) -> Result<Command> {
        let mut command = match self.under.split_first() {
            Some((program, words)) => {
                let mut command = Command::new(program);
                command.args(words).arg(&self.daemon);
                command
            }
            None => Command::new(&self.daemon),
        };
        command.arg("--config").arg(&self.config);
        // What tests serve, and where they keep templates: scratch folders and the cache.
        let folders = format!("[\"{}\", \"{}\"]", std::env::temp_dir().display(), paths::cache()?.display());
        let text = std::fs::read_to_string(&self.config)?;
        for (section, key) in [("store", "allowed"), ("daemon", "template_dirs")] {
            if !text.contains(&format!("{key} = ")) {
                command.arg("--set").arg(format!("{section}.{key}={folders}"));
            }
        }
        // A host that has a package's user runs the same tests.
        command.args(["--set", "daemon.user=\"nobody-of-this-name\""]).args(more);
        Ok(command)
    }

    /// Ends the daemon by SIGTERM; fails unless it ends cleanly.
    pub fn stop(&mut self) -> Result<()> {
        let process = self.process.take().context("prestaged does not run")?;
        process.signal(Signal::SIGTERM)?;
        match process.wait(Duration::from_secs(60)) {
            Some(status) if status.success() => self.asked_nothing_forbidden(),
            Some(status) => bail!("prestaged ended with {status} on SIGTERM\n{}", self.last_words()),
            None => bail!("prestaged still runs a minute after SIGTERM\n{}", self.last_words()),
        }
    }

    /// Fails where a daemon asked the kernel for something that its sandbox refuses.
    fn asked_nothing_forbidden(&self) -> Result<()> {
        let log = std::fs::read_to_string(&self.log).context("cannot read prestaged's log")?;
        let calls: Vec<&str> = log
            .lines()
            .filter_map(|line| line.strip_prefix("prestaged: system call ")?.strip_suffix(" is refused by the sandbox"))
            .map(str::trim)
            .collect();
        let names = std::fs::read_to_string("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").unwrap_or_default();
        let name = |number: &&str| {
            let found = names.lines().find(|line| line.ends_with(&format!(" {number}")));
            found.map_or(format!("number {number}"), |line| line.replace("#define ", ""))
        };
        match calls.is_empty() {
            true => Ok(()),
            false => {
                bail!("prestaged was refused system calls: {}", calls.iter().map(name).collect::<Vec<_>>().join(", "))
            }
        }
    }

    /// Ends the daemon by SIGKILL, as a crash would.
    pub fn crash(&mut self) -> Result<()> {
        let process = self.process.take().context("prestaged does not run")?;
        process.signal(Signal::SIGKILL)?;
        process.wait(Duration::from_secs(10)).context("prestaged survived SIGKILL").map(drop)
    }

    /// Runs `prestagectl --json WORDS` and reads its answer; an empty answer is `null`.
    pub fn ctl(&self, words: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.control);
        command.arg("--socket").arg(&self.socket).arg("--json").args(words);
        let text = run(&mut command)?;
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).with_context(|| format!("prestagectl {}: no JSON: {text}", words.join(" ")))
    }

    /// Counters since the daemon started, total over all disks.
    pub fn counters(&self) -> Result<Counters> {
        let stat = self.ctl(&["cache", "stat"])?;
        let total = stat.get("total").with_context(|| format!("`cache stat` has no `total`: {stat}"))?;
        serde_json::from_value(total.clone()).with_context(|| format!("`cache stat`: {total}"))
    }

    /// The vhost-user socket of a disk, once it is there: the daemon is ready before the last of many disks is open.
    pub fn disk_socket(&self, name: &str) -> Result<PathBuf> {
        let disk = self.ctl(&["disk", "show", name])?;
        let socket = disk.get("socket").and_then(Value::as_str);
        let socket: PathBuf = socket.with_context(|| format!("`disk show {name}` has no `socket`: {disk}"))?.into();
        wait_until(&format!("the socket of disk {name}"), Duration::from_secs(60), || Ok(socket.exists()))?;
        Ok(socket)
    }

    /// The SSD tier's file; it must not be touched while the daemon runs.
    #[must_use]
    pub fn ssd(&self) -> &Path {
        &self.ssd
    }

    /// The configuration file.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Process number while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(Process::pid)
    }

    /// The end of the daemon's log.
    #[must_use]
    pub fn last_words(&self) -> String {
        format!("last in prestaged's log:\n{}", tail(&self.log, 20))
    }
}

/// The counters of `prestagectl cache stat` that tests and benchmarks use; `integration/src/api/counters.rs` says what they
/// count. One that the daemon does not report is an error, not a zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
pub struct Counters {
    pub reads: u64,
    pub read_bytes: u64,
    pub served_ram: u64,
    pub served_ssd: u64,
    pub served_store: u64,
    pub read_errors: u64,
    pub read_wait_us: u64,
    pub store_reads: u64,
    pub store_read_bytes: u64,
    pub prefetch_issued_bytes: u64,
    pub prefetch_completed_bytes: u64,
    pub prefetch_used_bytes: u64,
    pub prefetch_late: u64,
}

impl Counters {
    /// What came after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            reads: self.reads.saturating_sub(earlier.reads),
            read_bytes: self.read_bytes.saturating_sub(earlier.read_bytes),
            served_ram: self.served_ram.saturating_sub(earlier.served_ram),
            served_ssd: self.served_ssd.saturating_sub(earlier.served_ssd),
            served_store: self.served_store.saturating_sub(earlier.served_store),
            read_errors: self.read_errors.saturating_sub(earlier.read_errors),
            read_wait_us: self.read_wait_us.saturating_sub(earlier.read_wait_us),
            store_reads: self.store_reads.saturating_sub(earlier.store_reads),
            store_read_bytes: self.store_read_bytes.saturating_sub(earlier.store_read_bytes),
            prefetch_issued_bytes: self.prefetch_issued_bytes.saturating_sub(earlier.prefetch_issued_bytes),
            prefetch_completed_bytes: self.prefetch_completed_bytes.saturating_sub(earlier.prefetch_completed_bytes),
            prefetch_used_bytes: self.prefetch_used_bytes.saturating_sub(earlier.prefetch_used_bytes),
            prefetch_late: self.prefetch_late.saturating_sub(earlier.prefetch_late),
        }
    }
}
