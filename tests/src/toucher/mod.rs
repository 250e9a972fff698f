//! A guest whose one program touches memory in the order it is told (`toucher.c`): the kernel of the guest image and an
//! initramfs of that program alone. The program also runs as a plain process, in place of a guest's QEMU.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::Flock;

use crate::accelerator::Accelerator;
use crate::guest::{Guest, Run, STEP_LIMIT, escape};
use crate::image::Image;
use crate::libvirt::Libvirt;
use crate::paths::Scratch;
use crate::report::{Line, Touched};
use crate::rig::alone;

const SOURCE: &str = include_str!("toucher.c");

/// Builds the program, linked statically, in `folder` and returns its path.
pub fn build(folder: &Path) -> Result<PathBuf> {
    let program = folder.join("init");
    let mut compiler = Command::new("cc");
    compiler.args(["-static", "-O2", "-x", "c", "-", "-o"]).arg(&program);
    feed(&mut compiler, SOURCE)?;
    Ok(program)
}

/// Runs `command` with `input` on its standard input.
pub(crate) fn feed(command: &mut Command, input: &str) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child =
        command.spawn().with_context(|| format!("cannot start {name}; is it installed? (scripts/setup.sh)"))?;
    let mut pipe = child.stdin.take().with_context(|| format!("no pipe to {name}"))?;
    pipe.write_all(input.as_bytes()).with_context(|| format!("{name} does not read"))?;
    drop(pipe);
    let output = child.wait_with_output().with_context(|| name.clone())?;
    if !output.status.success() {
        bail!("{name}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// What the guest's memory is in QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Private and anonymous, libvirt's default.
    Anonymous,
    /// A memfd that others may map, as guests with vhost-user devices have.
    Shared,
}

/// What such a guest stands on.
#[derive(Debug)]
pub struct MemoryRig {
    pub accelerator: Accelerator,
    pub libvirt: Arc<Libvirt>,
    image: Image,
    initrd: PathBuf,
    scratch: Scratch,
    _alone: Flock<File>,
}

impl MemoryRig {
    pub fn new() -> Result<Self> {
        let alone = alone()?;
        let image = Image::build_or_find()?;
        let accelerator = Accelerator::find(&image)?;
        let (scratch, libvirt) = (Scratch::new()?, Arc::new(Libvirt::start()?));
        let folder = scratch.join("initramfs");
        std::fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        build(&folder)?;
        let initrd = scratch.join("initrd");
        let mut cpio = Command::new("cpio");
        cpio.args(["--quiet", "--create", "--format=newc", "--file"]).arg(&initrd).current_dir(&folder);
        feed(&mut cpio, "init\n")?;
        Ok(Self { accelerator, libvirt, image, initrd, scratch, _alone: alone })
    }

    /// A domain of one processor and `memory_mib` MiB, without a disk.
    pub fn guest(&self, name: &str, memory_mib: u64, backing: Backing) -> Result<Guest> {
        Guest::define_as(&self.libvirt, &self.scratch, name, |console| self.xml(name, memory_mib, backing, "", console))
    }

    /// The same with a slot for `more_mib` MiB that are plugged in while it runs.
    pub fn guest_with_slot(&self, name: &str, memory_mib: u64, more_mib: u64) -> Result<Guest> {
        let slot = format!("<maxMemory slots='1' unit='MiB'>{}</maxMemory>", memory_mib + more_mib);
        Guest::define_as(&self.libvirt, &self.scratch, name, |console| {
            self.xml(name, memory_mib, Backing::Anonymous, &slot, console)
        })
    }

    fn xml(&self, name: &str, memory_mib: u64, backing: Backing, slot: &str, console: &str) -> String {
        // libvirt plugs memory into nodes alone
        let node = match slot {
            "" => String::new(),
            _ => format!("<numa><cell id='0' cpus='0' memory='{memory_mib}' unit='MiB'/></numa>"),
        };
        let (kind, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host-passthrough"),
            Accelerator::Tcg => ("qemu", "maximum"),
        };
        let backing = match backing {
            Backing::Anonymous => "",
            Backing::Shared => "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        };
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  {slot}
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  {backing}
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 mitigations=off no5lvl</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='{cpu}'>{node}</cpu>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
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

impl Run<'_> {
    /// Waits until the program runs.
    pub fn wait_alive(&mut self) -> Result<()> {
        self.wait("the toucher", STEP_LIMIT, |line| (line == Line::Alive).then_some(())).map(drop)
    }

    /// Has `mib` MiB mapped and filled.
    pub fn fill(&mut self, mib: u64) -> Result<()> {
        self.say(&format!("fill {mib}"))?;
        self.wait("filled memory", STEP_LIMIT, |line| matches!(line, Line::Filled { .. }).then_some(())).map(drop)
    }

    /// Has the next touch take every page once, in ascending order for seed 0 and shuffled by any other.
    pub fn order_pages(&mut self, seed: u64) -> Result<()> {
        self.draw(&format!("order {seed}"))
    }

    /// The same of `pages` pages from page `first` on.
    pub fn order_part(&mut self, first: u64, pages: u64, seed: u64) -> Result<()> {
        self.draw(&format!("part {first} {pages} {seed}"))
    }

    /// Has the next touch take `pages` pages at random, with repetition.
    pub fn random_pages(&mut self, pages: u64, seed: u64) -> Result<()> {
        self.draw(&format!("random {pages} {seed}"))
    }

    fn draw(&mut self, line: &str) -> Result<()> {
        self.say(line)?;
        self.wait("an order of pages", STEP_LIMIT, |line| matches!(line, Line::Ordered { .. }).then_some(())).map(drop)
    }

    /// Has the pages touched in the order drawn last, with `compute` of computing after each.
    pub fn touch(&mut self, compute: Duration) -> Result<Touched> {
        self.say(&format!("touch {}", compute.as_nanos()))?;
        let (_, touched) = self.wait("touched memory", STEP_LIMIT, |line| match line {
            Line::Touched(touched) => Some(touched),
            _ => None,
        })?;
        Ok(touched)
    }
}
