//! A guest whose one program keeps its disk busy and checks every answer (`verifier.c`): the kernel and initramfs of the guest
//! image, whose first process is replaced by an archive appended to it (Linux
//! Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::fcntl::Flock;

use crate::accelerator::Accelerator;
use crate::guest::{Guest, Run, STEP_LIMIT, escape};
use crate::image::Image;
use crate::libvirt::Libvirt;
use crate::paths::Scratch;
use crate::report::{Line, Sized, Verified};
use crate::rig::alone;
use crate::toucher::feed;

const SOURCE: &str = include_str!("verifier.c");

/// Loads the driver of the disk and becomes the program.
const INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module"; done </modules/order
until [ -b /dev/vda ]; do usleep 20000; done
read -r cmdline </proc/cmdline
depth=${cmdline##* prestage.depth=}
other=
[ -b /dev/vdb ] && other=vdb
exec /verifier /dev/vda "${depth%% *}" $other
"#;

/// What such a guest stands on.
#[derive(Debug)]
pub struct VerifierRig {
    pub accelerator: Accelerator,
    pub libvirt: Arc<Libvirt>,
    image: Image,
    initrd: PathBuf,
    scratch: Scratch,
    _alone: Flock<File>,
}

impl VerifierRig {
    pub fn new() -> Result<Self> {
        let alone = alone()?;
        let image = Image::build_or_find()?;
        let accelerator = Accelerator::find(&image)?;
        let (scratch, libvirt) = (Scratch::new()?, Arc::new(Libvirt::start()?));
        let program = scratch.join("verifier");
        let mut compiler = Command::new("cc");
        compiler.args(["-static", "-O2", "-pthread", "-x", "c", "-", "-o"]).arg(&program);
        feed(&mut compiler, SOURCE)?;
        let program = std::fs::read(&program).context("the verifier")?;
        let bytes = image.initrd_with(&[("init", INIT.as_bytes()), ("verifier", &program)])?;
        let initrd = scratch.join("initrd");
        std::fs::write(&initrd, bytes).with_context(|| format!("cannot write {}", initrd.display()))?;
        Ok(Self { accelerator, libvirt, image, initrd, scratch, _alone: alone })
    }

    /// A domain of `queues` processors on the vhost-user-blk export at `socket`, with as many queues and `depth` requests
    /// under way on each.
    pub fn guest(&self, name: &str, socket: &Path, queues: u32, depth: u32) -> Result<Guest> {
        let disks = disk_xml("vda", socket, queues);
        Guest::define_as(&self.libvirt, &self.scratch, name, |console| self.xml(name, &disks, queues, depth, console))
    }

    /// [`VerifierRig::guest`] with a second disk, of one queue, that is left alone but for [`Run::sized`] and [`Run::write_last`].
    pub fn guest_beside(&self, name: &str, socket: &Path, other: &Path, queues: u32, depth: u32) -> Result<Guest> {
        let disks = disk_xml("vda", socket, queues) + &disk_xml("vdb", other, 1);
        Guest::define_as(&self.libvirt, &self.scratch, name, |console| self.xml(name, &disks, queues, depth, console))
    }

    fn xml(&self, name: &str, disks: &str, queues: u32, depth: u32, console: &str) -> String {
        let (kind, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host-passthrough"),
            Accelerator::Tcg => ("qemu", "maximum"),
        };
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  <memory unit='MiB'>256</memory>
  <vcpu>{queues}</vcpu>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 mitigations=off no5lvl prestage.depth={depth}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='{cpu}'/>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    {disks}
    <controller type='usb' model='none'/>
    <serial type='unix'><source mode='connect' path='{console}'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
",
            name = escape(name),
            kernel = escape(&self.image.kernel.display().to_string()),
            initrd = escape(&self.initrd.display().to_string()),
            console = escape(console),
        )
    }
}

fn disk_xml(target: &str, socket: &Path, queues: u32) -> String {
    format!(
        "<disk type='vhostuser' device='disk'>
      <driver name='qemu' type='raw' queues='{queues}'/>
      <source type='unix' path='{socket}'><reconnect enabled='yes' timeout='1'/></source>
      <target dev='{target}' bus='virtio'/>
    </disk>",
        socket = escape(&socket.display().to_string()),
    )
}

impl Run<'_> {
    /// Waits until the disk is written once and the load has begun.
    pub fn wait_load(&mut self) -> Result<()> {
        self.wait("the verifier", STEP_LIMIT, |line| (line == Line::Alive).then_some(())).map(drop)
    }

    /// What has been verified so far.
    pub fn verified(&mut self) -> Result<Verified> {
        self.ask_verified("count")
    }

    /// Ends the load, has everything read back, and says what has been verified in all.
    pub fn end_load(&mut self) -> Result<Verified> {
        self.ask_verified("end")
    }

    /// What the guest's kernel takes the second disk's size for, and how often it told of a new one.
    pub fn sized(&mut self) -> Result<Sized> {
        self.say("size")?;
        let (_, sized) = self.wait("the disk's size", STEP_LIMIT, |line| match line {
            Line::Sized(sized) => Some(sized),
            _ => None,
        })?;
        Ok(sized)
    }

    /// Has the second disk's last block written, synced, read back and compared: words of 64 bits that count up from `seed`. Returns where
    /// it ends, in bytes.
    pub fn write_last(&mut self, seed: u64) -> Result<u64> {
        self.say(&format!("last {seed}"))?;
        let (_, bytes) = self.wait("the disk's last block", STEP_LIMIT, |line| match line {
            Line::Ended { bytes } => Some(bytes),
            _ => None,
        })?;
        Ok(bytes)
    }

    fn ask_verified(&mut self, order: &str) -> Result<Verified> {
        self.say(order)?;
        let (_, verified) = self.wait("what was verified", STEP_LIMIT, |line| match line {
            Line::Verified(verified) => Some(verified),
            _ => None,
        })?;
        Ok(verified)
    }
}
