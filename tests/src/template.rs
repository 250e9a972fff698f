//! A guest to save as a template: it holds data in its memory, reads a part of it on demand and answers. Without a disk, with a
//! console that every clone has one of.
//!
//! Its first process replaces that of the guest whose resources change, by an archive appended to its initramfs.
//! It says and obeys, a line at a time:
//!
//! ```text
//! PRESTAGE ready SUM      all is in memory; the MD5 of the set
//! touch  → PRESTAGE answer MIBM    reads the set from beginning to end
//! sum    → PRESTAGE answer SUM     the set's MD5, as it is now
//! write  → PRESTAGE answer done    writes to the set: the memory is this guest's own from then on
//! ```

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::Flock;

use crate::accelerator::Accelerator;
use crate::clean::{self, Guard};
use crate::guest::{STEP_LIMIT, escape};
use crate::image::Image;
use crate::libvirt::Libvirt;
use crate::paths::Scratch;
use crate::rig::alone;

/// Set and rest lie among each other, as what a program needs does in a machine that has run for a while.
const INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
exec 3</dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo <&3
read -r cmdline </proc/cmdline
set=${cmdline##* prestage.set=}
set=${set%% *}
rest=${cmdline##* prestage.rest=}
rest=${rest%% *}
mkdir /data
mount -t tmpfs -o size=100% tmpfs /data
i=0
while [ "$i" -lt "$set" ]; do
  dd if=/dev/urandom bs=512k count=2 2>/dev/null >>/data/set
  dd if=/dev/urandom bs=64k count=$((rest * 16 / set)) 2>/dev/null >>/data/rest
  i=$((i + 1))
done
sum() { md5sum </data/set | cut -c 1-32; }
echo "PRESTAGE ready $(sum)"
while read -r verb <&3; do
  case $verb in
  touch) dd if=/data/set of=/dev/null bs=64k 2>/dev/null && echo "PRESTAGE answer ${set}M" ;;
  sum) echo "PRESTAGE answer $(sum)" ;;
  write)
    dd if=/dev/urandom of=/data/set bs=1M count=1 conv=notrunc 2>/dev/null
    echo "PRESTAGE answer done"
    ;;
  esac
done
"#;

/// Sizes of the guest.
#[derive(Debug, Clone, Copy)]
pub struct TemplateGuest {
    pub memory_mib: u64,
    /// What it reads on demand.
    pub set_mib: u64,
    /// What else it holds and does not read again.
    pub rest_mib: u64,
}

/// What such a guest stands on.
#[derive(Debug)]
pub struct TemplateRig {
    pub libvirt: Arc<Libvirt>,
    /// Large, for templates.
    pub folder: Scratch,
    image: Image,
    accelerator: Accelerator,
    initrd: PathBuf,
    scratch: Scratch,
    _alone: Flock<File>,
}

impl TemplateRig {
    pub fn new() -> Result<Self> {
        let alone = alone()?;
        let image = Image::build_or_find()?;
        let accelerator = Accelerator::find(&image)?;
        let (scratch, folder, libvirt) = (Scratch::new()?, Scratch::large()?, Arc::new(Libvirt::start()?));
        let initrd = scratch.join("initrd");
        let bytes = image.demand_with(&[("init", INIT.as_bytes())])?;
        std::fs::write(&initrd, bytes).with_context(|| format!("cannot write {}", initrd.display()))?;
        Ok(Self { libvirt, folder, image, accelerator, initrd, scratch, _alone: alone })
    }

    /// Replaces libvirtd by a new one, which sees what has been mounted meanwhile. Its machines end.
    pub fn renew_libvirt(&mut self) -> Result<()> {
        self.libvirt = Arc::new(Libvirt::start()?);
        Ok(())
    }

    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// Starts the guest and waits until it has its data. Returns its console and the set's MD5.
    pub fn guest(&self, name: &str, sizes: TemplateGuest, more: &str) -> Result<(Machine, String)> {
        let xml = self.scratch.join(format!("{name}.xml"));
        std::fs::write(&xml, self.xml(name, sizes, more)).with_context(|| format!("cannot write {}", xml.display()))?;
        self.libvirt.virsh(&["create", "--validate", &xml.display().to_string()])?;
        let mut guest = self.console(name)?;
        let sum = guest.wait("ready", STEP_LIMIT)?;
        Ok((guest, sum))
    }

    /// The console of a running machine, which is destroyed when this is dropped.
    pub fn console(&self, name: &str) -> Result<Machine> {
        Machine::open(&self.libvirt, name)
    }

    fn xml(&self, name: &str, sizes: TemplateGuest, more: &str) -> String {
        let (kind, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "<cpu mode='host-passthrough'/>".to_owned()),
            // emulated string instructions copy a byte at a time, and would be most of what reading the set takes
            Accelerator::Tcg => {
                let without = ["erms", "fsrm"].map(|name| format!("<feature policy='disable' name='{name}'/>"));
                ("qemu", format!("<cpu mode='maximum'>{}</cpu>", without.concat()))
            }
        };
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 mitigations=off no5lvl prestage.set={set} prestage.rest={rest}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  {cpu}
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <controller type='usb' model='none'/>
    <serial type='pty'><target port='0'/></serial>
    <memballoon model='virtio'/>
    {more}
  </devices>
</domain>
",
            name = escape(name),
            memory = sizes.memory_mib,
            set = sizes.set_mib,
            rest = sizes.rest_mib,
            kernel = escape(&self.image.kernel.display().to_string()),
            initrd = escape(&self.initrd.display().to_string()),
        )
    }

    /// A folder for a template.
    #[must_use]
    pub fn template(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// A running machine with a console; destroyed when dropped.
#[derive(Debug)]
pub struct Machine {
    libvirt: Arc<Libvirt>,
    name: String,
    console: File,
    lines: Receiver<String>,
    _guard: Guard,
}

impl Machine {
    fn open(libvirt: &Arc<Libvirt>, name: &str) -> Result<Self> {
        let (undone, owned) = (Arc::clone(libvirt), name.to_owned());
        let guard = clean::on_exit(move || {
            let _ = undone.virsh(&["destroy", &owned]);
        });
        let tty = libvirt.virsh(&["ttyconsole", name])?;
        let tty = Path::new(tty.trim());
        let open = || OpenOptions::new().read(true).write(true).open(tty);
        let console = open().with_context(|| format!("cannot open {}", tty.display()))?;
        let reader = BufReader::new(console.try_clone()?);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for bytes in reader.split(b'\n') {
                // the terminal ends with its machine
                let Ok(bytes) = bytes else { break };
                if sender.send(String::from_utf8_lossy(&bytes).trim_end().to_owned()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { libvirt: Arc::clone(libvirt), name: name.to_owned(), console, lines, _guard: guard })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Says a line and waits for the answer to it.
    pub fn ask(&mut self, verb: &str) -> Result<String> {
        writeln!(self.console, "{verb}").with_context(|| format!("{} does not listen", self.name))?;
        self.wait("answer", STEP_LIMIT)
    }

    fn wait(&mut self, word: &str, limit: Duration) -> Result<String> {
        let until = Instant::now() + limit;
        let wanted = format!("PRESTAGE {word} ");
        let mut last = String::new();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(at) = line.find(&wanted) {
                        return Ok(line[at + wanted.len()..].trim().to_owned());
                    }
                    last = line;
                }
                Err(RecvTimeoutError::Timeout) => bail!("{}: no {word} within {limit:?}; last: {last}", self.name),
                Err(RecvTimeoutError::Disconnected) => bail!("{} ended before its {word}; last: {last}", self.name),
            }
        }
    }

    /// Its state by libvirt.
    pub fn state(&self) -> Result<String> {
        self.libvirt.virsh(&["domstate", &self.name]).map(|text| text.trim().to_owned())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // fails when it has ended, which is what is wanted
        let _ = self.libvirt.virsh(&["destroy", &self.name]);
    }
}
