//! A file system on slow storage: ext4 on a loop device on an NBD export whose server delays every read. Needs root, loop devices
//! and FUSE (nbdfuse stands between the server and the loop device).
//!
//! Reads go to the store as the kernel sends them: the loop device uses direct I/O, so that nothing but the mounted file system
//! caches, and its readahead is the kernel's default (128 KiB) whatever FUSE says of itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::clean::{self, Guard};
use crate::paths::Scratch;
use crate::process::{Process, run, tail, wait_until};
use crate::store::{Nbd, NbdOptions, Traffic};

/// Readahead of a block device in sectors, as `blockdev --setra` takes it.
const READAHEAD_SECTORS: &str = "256";

/// A file system image that is filled before it becomes slow.
#[derive(Debug)]
pub struct Image {
    file: PathBuf,
    folder: PathBuf,
    mounted: Guard,
}

/// A mounted file system. Parts are dropped in this order.
#[derive(Debug)]
pub struct SlowDisk {
    folder: PathBuf,
    _mounted: Guard,
    _device: Guard,
    _fuse: Process,
    nbd: Nbd,
}

fn unmount(folder: &Path) -> Guard {
    let folder = folder.to_owned();
    clean::on_exit(move || {
        let _ = run(Command::new("umount").arg(&folder));
    })
}

impl Image {
    /// An empty file system of `mib` MiB in the file `NAME.ext4` of `scratch`, mounted in the folder `NAME` there.
    pub fn new(scratch: &Scratch, name: &str, mib: u64) -> Result<Self> {
        let (file, folder) = (scratch.join(format!("{name}.ext4")), scratch.join(name));
        std::fs::File::create_new(&file).and_then(|file| file.set_len(mib << 20))?;
        std::fs::create_dir(&folder)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-E", "lazy_itable_init=0"]).arg(&file))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&folder))?;
        Ok(Self { file, mounted: unmount(&folder), folder })
    }

    /// Where it is mounted, now and when it is slow.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Mounts it again in the same place, read-only and behind a store that delays each read.
    pub fn slow(self, scratch: &Scratch, delay: Duration) -> Result<SlowDisk> {
        let Self { file, folder, mounted } = self;
        run(Command::new("sync").arg("--file-system").arg(&folder))?;
        drop(mounted);
        // nothing is written to it: it needs no overlay
        let nbd = Nbd::start(
            scratch,
            "slow",
            &file,
            &NbdOptions { read_delay: delay, keep_writes: true, ..NbdOptions::default() },
        )?;
        let (point, log) = (scratch.join("slow.raw"), scratch.join("nbdfuse.log"));
        std::fs::File::create_new(&point)?;
        let mut command = Command::new("nbdfuse");
        command.arg("--readonly").arg(&point).arg("--unix").arg(scratch.join("nbd-slow.sock"));
        let fuse = Process::start("nbdfuse", &command, &log, Duration::from_secs(5))?;
        let size = std::fs::metadata(&file)?.len();
        let ready = wait_until("nbdfuse's start", Duration::from_secs(10), || {
            fuse.check_alive()?;
            Ok(std::fs::metadata(&point).is_ok_and(|found| found.len() == size))
        });
        ready.with_context(|| tail(&log, 5))?;
        let mut attach = Command::new("losetup");
        let device = run(attach.args(["--direct-io=on", "--read-only", "--find", "--show"]).arg(&point))?;
        let device = device.trim().to_owned();
        let detached = device.clone();
        let guard = clean::on_exit(move || {
            let _ = run(Command::new("losetup").args(["--detach", &detached]));
        });
        run(Command::new("blockdev").args(["--setra", READAHEAD_SECTORS, &device]))?;
        run(Command::new("mount").args(["-o", "ro,noload", &device]).arg(&folder))?;
        Ok(SlowDisk { _mounted: unmount(&folder), folder, _device: guard, _fuse: fuse, nbd })
    }
}

impl SlowDisk {
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// All requests so far, as the store saw them.
    pub fn traffic(&self) -> Result<Traffic> {
        self.nbd.traffic()
    }
}
