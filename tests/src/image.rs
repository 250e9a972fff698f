//! The Debian guest: kernel, initramfs, disk and the checksums of its files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::paths;

/// A built guest.
#[derive(Debug, Clone)]
pub struct Image {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// The initramfs of a guest without a disk whose resources change (`scripts/guest/demand`).
    pub initrd_demand: PathBuf,
    /// The root file system, raw ext4.
    pub disk: PathBuf,
    /// What the guest must find: path to SHA-256 in hexadecimal.
    pub sums: BTreeMap<String, String>,
}

impl Image {
    /// Builds the guest by `scripts/guest-image.sh`, or finds it in the cache. The script's progress goes to standard error.
    pub fn build_or_find() -> Result<Self> {
        let script = paths::source().join("scripts/guest-image.sh");
        let output = Command::new(&script)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot run {}", script.display()))?;
        if !output.status.success() {
            bail!("{} failed ({}): see its messages above", script.display(), output.status);
        }
        let text = String::from_utf8(output.stdout).context("path of the guest image")?;
        let folder = text.lines().last().context("scripts/guest-image.sh named no folder")?;
        Self::open(Path::new(folder))
    }

    fn open(folder: &Path) -> Result<Self> {
        let manifest = folder.join("sums");
        let text = std::fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
        let mut sums = BTreeMap::new();
        for line in text.lines() {
            let (sum, path) =
                line.split_once(' ').with_context(|| format!("{}: bad line `{line}`", manifest.display()))?;
            sums.insert(path.to_owned(), sum.to_owned());
        }
        Ok(Self {
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd"),
            initrd_demand: folder.join("initrd-demand"),
            disk: folder.join("disk.raw"),
            sums,
        })
    }

    /// The initramfs of the guest without a disk, with these files ([`with_files`]).
    pub fn demand_with(&self, files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
        with_files(&self.initrd_demand, files)
    }

    /// The initramfs of the guest with a disk, with these files ([`with_files`]).
    pub fn initrd_with(&self, files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
        with_files(&self.initrd, files)
    }

    /// Copies the disk to `target`, sharing extents where the file system can and keeping holes.
    pub fn copy_disk(&self, target: &Path) -> Result<()> {
        let mut copy = Command::new("cp");
        copy.args(["--reflink=auto", "--sparse=always"]).arg(&self.disk).arg(target);
        crate::process::run(&mut copy).map(drop)
    }
}

/// An initramfs with files put in place of its own or beside them: an archive appended to it (Linux
/// Documentation/driver-api/early-userspace/buffer-format.rst).
fn with_files(initrd: &Path, files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut bytes = std::fs::read(initrd).with_context(|| format!("cannot read {}", initrd.display()))?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    for (name, contents) in files {
        archive(&mut bytes, name, 0o100_755, contents);
    }
    archive(&mut bytes, "TRAILER!!!", 0, &[]);
    Ok(bytes)
}

/// One file of a `newc` archive (cpio(5)).
fn archive(bytes: &mut Vec<u8>, name: &str, mode: usize, contents: &[u8]) {
    bytes.extend(b"070701");
    for field in [0, mode, 0, 0, 1, 0, contents.len(), 0, 0, 0, 0, name.len() + 1, 0] {
        bytes.extend(format!("{field:08x}").bytes());
    }
    bytes.extend(name.bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(contents);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}
