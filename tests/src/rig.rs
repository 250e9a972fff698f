//! What an end-to-end test stands on: guest image, accelerator, slow store, private libvirtd. One rig at a time on a host:
//! several emulated guests on two cores would only be slow.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::accelerator::Accelerator;
use crate::daemon::{DaemonOptions, Prestaged};
use crate::guest::{Guest, GuestDisk, GuestOptions};
use crate::image::Image;
use crate::libvirt::Libvirt;
use crate::paths::{self, Scratch};
use crate::store::{Nbd, NbdOptions};

/// Everything but the daemon and the guest. Parts are dropped in this order.
#[derive(Debug)]
pub struct Rig {
    pub image: Image,
    pub accelerator: Accelerator,
    pub nbd: Nbd,
    /// The store's file where writes are kept.
    pub disk: PathBuf,
    pub libvirt: Arc<Libvirt>,
    pub scratch: Scratch,
    _large: Scratch,
    _alone: Flock<File>,
}

impl Rig {
    /// A rig whose store forgets writes with its server.
    pub fn new() -> Result<Self> {
        Self::build(false)
    }

    /// A rig whose store keeps writes in `disk`, a copy of the image's.
    pub fn writable() -> Result<Self> {
        Self::build(true)
    }

    fn build(keep_writes: bool) -> Result<Self> {
        let alone = alone()?;
        let image = Image::build_or_find()?;
        let accelerator = Accelerator::find(&image)?;
        let (scratch, large) = (Scratch::new()?, Scratch::large()?);
        let disk = if keep_writes {
            let copy = large.join("disk.raw");
            image.copy_disk(&copy)?;
            copy
        } else {
            image.disk.clone()
        };
        let nbd = Nbd::start(&scratch, "store", &disk, &NbdOptions { keep_writes, ..NbdOptions::default() })?;
        let libvirt = Arc::new(Libvirt::start()?);
        Ok(Self { image, accelerator, nbd, disk, libvirt, scratch, _large: large, _alone: alone })
    }

    /// A daemon that knows nothing, connected to the rig's libvirt.
    pub fn prestaged(&self) -> Result<Prestaged> {
        let uri = Some(self.libvirt.uri().to_owned());
        Prestaged::start(&DaemonOptions { libvirt_uri: uri, ..DaemonOptions::default() })
    }

    /// A domain with the disk; `words` say what the guest does (`scripts/guest/probe`).
    pub fn guest(&self, name: &str, disk: GuestDisk, words: &[&str]) -> Result<Guest> {
        let options = GuestOptions::new(name, self.accelerator, disk, words);
        Guest::define(&self.libvirt, &self.scratch, &self.image, &options)
    }
}

/// Waits until no other rig runs, and keeps others waiting.
pub(crate) fn alone() -> Result<Flock<File>> {
    let lock = paths::cache()?.join("guests.lock");
    let file = File::create(&lock).with_context(|| format!("cannot write {}", lock.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("cannot lock {}", lock.display()))
}
