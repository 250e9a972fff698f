//! A guest without a disk whose memory and processors change while it runs: `scripts/guest/demand` under libvirt, with a
//! balloon, a virtio-mem device, a second processor to plug, a disk and a network interface to limit, and a channel for the guest
//! agent.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::Flock;

use crate::accelerator::Accelerator;
use crate::guest::{Guest, Run, STEP_LIMIT, escape};
use crate::image::Image;
use crate::libvirt::Libvirt;
use crate::paths::Scratch;
use crate::report::{Line, State};
use crate::rig::alone;
use crate::toucher;

/// What the guest starts with, and has without balloon and devices.
pub const MEMORY_MIB: u64 = 512;
/// What its memory device can hold.
pub const DEVICE_MIB: u64 = 512;

/// The host's side of its network interface, another in each process.
#[must_use]
pub fn tap() -> String {
    format!("prestage{}", std::process::id())
}

/// The first process of a guest that touches memory: what comes from a memory device can leave again.
const TOUCHING: &str = r#"#!/bin/busybox sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module"; done </modules/order
echo online_movable >/sys/devices/system/memory/auto_online_blocks
exec /program
"#;

/// What such a guest stands on.
#[derive(Debug)]
pub struct ElasticRig {
    pub libvirt: Arc<Libvirt>,
    image: Image,
    initrd: PathBuf,
    accelerator: Accelerator,
    /// Empty; the guest has no driver for it.
    disk: PathBuf,
    scratch: Scratch,
    _alone: Flock<File>,
}

impl ElasticRig {
    pub fn new() -> Result<Self> {
        Self::with(|image, _| Ok(image.initrd_demand.clone()))
    }

    /// One whose guest, once it has its drivers, runs the program of [`toucher`] in place of `scripts/guest/demand`.
    pub fn touching() -> Result<Self> {
        Self::with(|image, scratch| {
            let folder = scratch.join("program");
            std::fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
            let program = toucher::build(&folder)?;
            let program = std::fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
            let initrd = scratch.join("initrd");
            std::fs::write(&initrd, image.demand_with(&[("init", TOUCHING.as_bytes()), ("program", &program)])?)
                .with_context(|| format!("cannot write {}", initrd.display()))?;
            Ok(initrd)
        })
    }

    fn with(initrd: impl FnOnce(&Image, &Scratch) -> Result<PathBuf>) -> Result<Self> {
        let alone = alone()?;
        let image = Image::build_or_find()?;
        let accelerator = Accelerator::find(&image)?;
        let (scratch, libvirt) = (Scratch::new()?, Arc::new(Libvirt::start()?));
        let initrd = initrd(&image, &scratch)?;
        let disk = scratch.join("empty.raw");
        std::fs::write(&disk, vec![0; 1 << 20]).with_context(|| format!("cannot write {}", disk.display()))?;
        Ok(Self { libvirt, image, initrd, accelerator, disk, scratch, _alone: alone })
    }

    /// A domain; `words` are for its kernel's command line. The balloon has no autodeflate: what takes too much, kills.
    pub fn guest(&self, name: &str, words: &[&str]) -> Result<Guest> {
        Guest::define_as(&self.libvirt, &self.scratch, name, |console| self.xml(name, words, console))
    }

    fn xml(&self, name: &str, words: &[&str], console: &str) -> String {
        let (kind, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host-passthrough"),
            Accelerator::Tcg => ("qemu", "maximum"),
        };
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  <maxMemory slots='4' unit='MiB'>{most}</maxMemory>
  <memory unit='MiB'>{MEMORY_MIB}</memory>
  <vcpu placement='static' current='1'>2</vcpu>
  <vcpus><vcpu id='0' enabled='yes' hotpluggable='no' order='1'/><vcpu id='1' enabled='no' hotpluggable='yes'/></vcpus>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 mitigations=off no5lvl {words}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='{cpu}'><numa><cell id='0' cpus='0-1' memory='{MEMORY_MIB}' unit='MiB'/></numa></cpu>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <controller type='usb' model='none'/>
    <serial type='unix'><source mode='connect' path='{console}'/><target port='0'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
    <interface type='ethernet'><target dev='{tap}'/><model type='virtio'/></interface>
    <memballoon model='virtio' autodeflate='off' freePageReporting='on'/>
    <memory model='virtio-mem'>
      <target>
        <size unit='MiB'>{DEVICE_MIB}</size><node>0</node><block unit='MiB'>2</block><requested unit='MiB'>0</requested>
      </target>
    </memory>
  </devices>
</domain>
",
            name = escape(name),
            most = MEMORY_MIB + DEVICE_MIB,
            kernel = escape(&self.image.kernel.display().to_string()),
            initrd = escape(&self.initrd.display().to_string()),
            tap = tap(),
            words = escape(&words.join(" ")),
            disk = escape(&self.disk.display().to_string()),
            console = escape(console),
        )
    }
}

impl Run<'_> {
    /// The state that the guest reports when it has started.
    pub fn wait_state(&mut self) -> Result<State> {
        self.state_where("a state", STEP_LIMIT, |state| !state.changed)
    }

    /// Has the guest do something (`scripts/guest/demand`) and waits for the state after it.
    pub fn order(&mut self, line: &str) -> Result<State> {
        self.say(line)?;
        self.wait_state()
    }

    /// Waits for a state of this kind, whether asked for or not.
    pub fn state_where(&mut self, what: &str, limit: Duration, pick: impl Fn(&State) -> bool) -> Result<State> {
        let (_, state) = self.wait(what, limit, |line| match line {
            Line::State(state) if pick(&state) => Some(state),
            _ => None,
        })?;
        Ok(state)
    }
}
