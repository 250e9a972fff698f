//! KVM where a guest really boots under it, emulation (TCG) otherwise.
//!
//! `/dev/kvm` alone says little: nested and paravirtual KVMs open it and then hang or abort on an ordinary kernel. So a
//! kernel is booted to its first process, once per host; the answer is kept in the cache.

use std::fmt;
use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::image::Image;
use crate::paths::{self, Scratch};
use crate::process::Process;
use crate::report::Line;

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    Kvm,
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "TCG (emulation)",
        })
    }
}

/// A kernel under KVM reaches its first process within two seconds; ten times that on a loaded host.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

const QEMU: &str = "qemu-system-x86_64";

impl Accelerator {
    /// Finds out, or remembers. `PRESTAGE_ACCELERATOR` = `kvm` or `tcg` overrides it.
    pub fn find(image: &Image) -> Result<Self> {
        if let Some(asked) = std::env::var_os("PRESTAGE_ACCELERATOR") {
            return match asked.to_str() {
                Some("kvm") => Ok(Self::Kvm),
                Some("tcg") => Ok(Self::Tcg),
                _ => bail!("PRESTAGE_ACCELERATOR is {}; it must be kvm or tcg", asked.to_string_lossy()),
            };
        }
        if OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Self::Tcg);
        }
        // the answer holds for this host, kernel and guest kernel
        let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
        let release = std::fs::read_to_string("/proc/version").context("cannot read /proc/version")?;
        let key = format!("{} {} {}", machine.trim(), release.trim(), image.kernel.display());
        let kept = paths::cache()?.join("accelerator");
        if let Ok(text) = std::fs::read_to_string(&kept)
            && let Some((old, answer)) = text.trim_end().rsplit_once('\n')
            && old == key
        {
            return Ok(if answer == "kvm" { Self::Kvm } else { Self::Tcg });
        }
        eprintln!("accelerator: /dev/kvm is there; does a guest boot under it? (at most {} s)", PROBE_LIMIT.as_secs());
        let found = if boots_under_kvm(image)? { Self::Kvm } else { Self::Tcg };
        let word = if found == Self::Kvm { "kvm" } else { "tcg" };
        std::fs::write(&kept, format!("{key}\n{word}\n"))
            .with_context(|| format!("cannot write {}", kept.display()))?;
        Ok(found)
    }
}

fn boots_under_kvm(image: &Image) -> Result<bool> {
    let scratch = Scratch::new()?;
    let console = scratch.join("console");
    let mut command = Command::new(QEMU);
    command.args(["-nodefaults", "-display", "none", "-no-reboot", "-machine", "q35", "-accel", "kvm", "-cpu", "host"]);
    command.args(["-m", "256", "-append", "console=ttyS0 quiet panic=-1 prestage.probe"]);
    command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initrd);
    command.arg("-serial").arg(format!("file:{}", console.display()));
    // an answer on the console counts, however QEMU ends; one that hangs is killed by the guard
    let qemu = Process::start("QEMU under KVM", &command, &scratch.join("log"), Duration::ZERO)?;
    let ended = qemu.wait(PROBE_LIMIT).is_some();
    Ok(ended && says_alive(&console))
}

fn says_alive(console: &Path) -> bool {
    let text = std::fs::read(console).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().any(|line| Line::parse(line) == Some(Line::Alive))
}
