//! A guest under libvirt, from its domain XML to its last line.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::accelerator::Accelerator;
use crate::clean::{self, Guard};
use crate::image::Image;
use crate::libvirt::Libvirt;
use crate::paths::Scratch;
use crate::process::wait_until;
use crate::report::{Figures, Line};
use crate::store::Store;

/// What the guest's disk is behind.
#[derive(Debug, Clone)]
pub enum GuestDisk {
    /// The store itself, through QEMU's own drivers, without the host's page cache.
    Straight(Store),
    /// An image in qcow2 format, through QEMU's own drivers until it is attached.
    Qcow2(PathBuf),
    /// A vhost-user-blk export at this socket.
    VhostUser(PathBuf),
}

/// What kind of guest, and what it does; `scripts/guest/probe` has the words of the command line.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    pub name: String,
    pub accelerator: Accelerator,
    pub disk: GuestDisk,
    pub vcpus: u32,
    pub memory_mib: u32,
    /// Words for the kernel command line, such as `prestage.program`.
    pub words: Vec<String>,
}

impl GuestOptions {
    /// One vCPU and 512 MiB: the host has two cores for the guest's emulation and what serves its disk.
    #[must_use]
    pub fn new(name: &str, accelerator: Accelerator, disk: GuestDisk, words: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            accelerator,
            disk,
            vcpus: 1,
            memory_mib: 512,
            words: words.iter().map(|&word| word.to_owned()).collect(),
        }
    }
}

pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;").replace('\'', "&apos;")
}

/// The `<disk>` element.
fn disk_xml(disk: &GuestDisk) -> String {
    let target = "<target dev='vda' bus='virtio'/>";
    let raw = "<driver name='qemu' type='raw' cache='none' discard='unmap'/>";
    match disk {
        GuestDisk::Straight(Store::Path(path)) => {
            let (kind, attribute) = if path.starts_with("/dev") { ("block", "dev") } else { ("file", "file") };
            format!(
                "<disk type='{kind}' device='disk'>{raw}<source {attribute}='{}'/>{target}</disk>",
                escape(&path.display().to_string())
            )
        }
        GuestDisk::Straight(Store::NbdUnix { socket, export }) => format!(
            "<disk type='network' device='disk'>{raw}<source protocol='nbd' name='{}'>\
             <host transport='unix' socket='{}'/></source>{target}</disk>",
            escape(export),
            escape(&socket.display().to_string())
        ),
        GuestDisk::Straight(Store::NbdTcp { host, port, export }) => format!(
            "<disk type='network' device='disk'>{raw}<source protocol='nbd' name='{}'>\
             <host name='{}' port='{port}'/></source>{target}</disk>",
            escape(export),
            escape(host)
        ),
        GuestDisk::Qcow2(path) => format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' discard='unmap'/>\
             <source file='{}'/>{target}</disk>",
            escape(&path.display().to_string())
        ),
        GuestDisk::VhostUser(socket) => format!(
            "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/><source type='unix' path='{}'>\
             <reconnect enabled='yes' timeout='1'/></source>{target}</disk>",
            escape(&socket.display().to_string())
        ),
    }
}

fn domain_xml(image: &Image, options: &GuestOptions, console: &str) -> String {
    let (kind, cpu) = match options.accelerator {
        Accelerator::Kvm => ("kvm", "host-passthrough"),
        Accelerator::Tcg => ("qemu", "maximum"),
    };
    // mitigations and five-level tables cost emulation time and change no disk access
    let command_line = format!("console=ttyS0 quiet panic=-1 mitigations=off no5lvl {}", options.words.join(" "));
    format!(
        "<domain type='{kind}'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>{vcpus}</vcpu>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='{cpu}'/>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    {disk}
    <controller type='usb' model='none'/>
    <serial type='unix'><source mode='connect' path='{console}'/><target port='0'/></serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='none'/>
  </devices>
</domain>
",
        name = escape(&options.name),
        memory = options.memory_mib,
        vcpus = options.vcpus,
        kernel = escape(&image.kernel.display().to_string()),
        initrd = escape(&image.initrd.display().to_string()),
        command_line = escape(&command_line),
        disk = disk_xml(&options.disk),
        console = escape(console),
    )
}

/// A defined domain; undefined when dropped.
#[derive(Debug)]
pub struct Guest {
    libvirt: Arc<Libvirt>,
    name: String,
    console: PathBuf,
    listener: UnixListener,
    _guard: Guard,
}

impl Guest {
    /// Defines the domain; its console and XML live in `scratch`.
    pub fn define(libvirt: &Arc<Libvirt>, scratch: &Scratch, image: &Image, options: &GuestOptions) -> Result<Self> {
        Self::define_as(libvirt, scratch, &options.name, |console| domain_xml(image, options, console))
    }

    /// Defines a domain from the XML that `xml` makes of its name's console socket.
    pub(crate) fn define_as(
        libvirt: &Arc<Libvirt>,
        scratch: &Scratch,
        name: &str,
        xml: impl FnOnce(&str) -> String,
    ) -> Result<Self> {
        let console = scratch.join(format!("{name}.console"));
        let _ = std::fs::remove_file(&console);
        let listener = UnixListener::bind(&console).with_context(|| format!("cannot bind {}", console.display()))?;
        libvirt.define(&xml(&console.display().to_string()), &scratch.join(format!("{name}.xml")))?;
        let (undone, owned) = (Arc::clone(libvirt), name.to_owned());
        let guard = clean::on_exit(move || {
            let _ = undone.virsh(&["destroy", &owned]);
            let _ = undone.virsh(&["undefine", &owned]);
        });
        Ok(Self { libvirt: Arc::clone(libvirt), name: name.to_owned(), console, listener, _guard: guard })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The domain's persistent definition as libvirt has it.
    pub fn xml(&self) -> Result<String> {
        self.libvirt.virsh(&["dumpxml", "--inactive", &self.name])
    }

    /// The guest's QEMU by the host's process number; libvirt's own is that of its namespace. Fails when it does not run.
    pub fn pid(&self) -> Result<i32> {
        let console = self.console.display().to_string();
        for entry in std::fs::read_dir("/proc").context("cannot read /proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // one that has just ended has neither
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if name.starts_with("qemu") && String::from_utf8_lossy(&words).contains(&console) {
                return Ok(pid);
            }
        }
        bail!("{} has no QEMU that runs", self.name)
    }

    /// Starts the domain.
    pub fn start(&self) -> Result<Run<'_>> {
        let started = Instant::now();
        self.libvirt.virsh(&["start", &self.name])?;
        // QEMU has connected when libvirt says that it runs
        self.listener.set_nonblocking(true)?;
        let mut accepted = None;
        wait_until("the guest's console", Duration::from_secs(10), || match self.listener.accept() {
            Ok((stream, _)) => {
                accepted = Some(stream);
                Ok(true)
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        })?;
        let console = accepted.context("no console")?;
        console.set_nonblocking(false)?;
        let reader = BufReader::new(console.try_clone()?);
        let (sender, lines) = mpsc::channel();
        let transcript = Arc::new(Mutex::new(String::new()));
        let written = Arc::clone(&transcript);
        std::thread::spawn(move || {
            for bytes in reader.split(b'\n') {
                let Ok(bytes) = bytes else { break };
                let at = Instant::now();
                let text = String::from_utf8_lossy(&bytes);
                let mut transcript = written.lock().unwrap_or_else(PoisonError::into_inner);
                transcript.push_str(text.trim_end());
                transcript.push('\n');
                drop(transcript);
                if let Some(line) = Line::parse(&text)
                    && sender.send((at, line)).is_err()
                {
                    break;
                }
            }
        });
        Ok(Run { guest: self, started, console, lines, transcript, tick: None })
    }
}

/// What a [`Run`] calls about once a second while it waits, with the time since the start.
pub type Tick<'a> = Box<dyn FnMut(Duration) + 'a>;

/// One boot of a guest; destroyed when dropped.
pub struct Run<'a> {
    guest: &'a Guest,
    started: Instant,
    console: UnixStream,
    lines: Receiver<(Instant, Line)>,
    transcript: Arc<Mutex<String>>,
    tick: Option<Tick<'a>>,
}

impl std::fmt::Debug for Run<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run").field("guest", &self.guest.name).finish_non_exhaustive()
    }
}

/// A boot under emulation takes 10 to 60 s; a host that tests run on in parallel makes it several times that.
pub const STEP_LIMIT: Duration = Duration::from_secs(400);

impl<'a> Run<'a> {
    /// Shows that something goes on while the guest is waited for.
    #[must_use]
    pub fn on_tick(mut self, tick: impl FnMut(Duration) + 'a) -> Self {
        self.tick = Some(Box::new(tick));
        self
    }

    /// Lets the guest take its next step (`prestage.go`).
    pub fn go(&mut self) -> Result<()> {
        self.console.write_all(b"go\n").context("the guest's console is closed")
    }

    /// Writes a line to the guest's console.
    pub fn say(&mut self, line: &str) -> Result<()> {
        writeln!(self.console, "{line}").context("the guest's console is closed")
    }

    /// The console alone, to write to while another waits for lines.
    pub fn console(&self) -> Result<UnixStream> {
        self.console.try_clone().context("the guest's console")
    }

    /// Waits for the next line that `pick` takes, and says when after the start it came. Fails when the guest fails, ends
    /// or says nothing of the kind within `limit`; the error shows its last words.
    pub fn wait<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut pick: impl FnMut(Line) -> Option<T>,
    ) -> Result<(Duration, T)> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.min(Duration::from_secs(1))) {
                Ok((_, Line::Failed(reason))) => bail!("the guest failed: {reason}\n{}", self.last_words()),
                Ok((at, line)) => {
                    if let Some(picked) = pick(line) {
                        return Ok((at - self.started, picked));
                    }
                }
                Err(RecvTimeoutError::Timeout) if !left.is_zero() => {}
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{what}: nothing from the guest within {} s\n{}", limit.as_secs(), self.last_words())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("{what}: the guest ended before it\n{}", self.last_words())
                }
            }
            if let Some(tick) = &mut self.tick {
                tick(self.started.elapsed());
            }
        }
    }

    /// The end of the boot: when after the start, and the guest's own figures.
    pub fn wait_ready(&mut self) -> Result<(Duration, Figures)> {
        self.wait("end of the boot", STEP_LIMIT, |line| match line {
            Line::Ready(figures) => Some(figures),
            _ => None,
        })
    }

    /// The end of the program, started at [`Line::Start`]: figures before and after it. Fails when the program did.
    pub fn wait_program(&mut self) -> Result<(Figures, Figures)> {
        let mut before = None;
        let mut notes = Vec::new();
        let (_, (status, after)) = self.wait("end of the program", STEP_LIMIT, |line| match line {
            Line::Start(figures) => {
                before = Some(figures);
                None
            }
            Line::Done { status, figures } => Some((status, figures)),
            _ => None,
        })?;
        if status != 0 {
            let (_, ()) = self.wait("the program's errors", STEP_LIMIT, |line| match line {
                Line::Note(text) => {
                    notes.push(text);
                    None
                }
                _ => Some(()),
            })?;
            bail!("the program in the guest failed with status {status}: {}", notes.join("\n"));
        }
        Ok((before.context("the guest said nothing of the program's start")?, after))
    }

    /// Every checksum the guest takes (`prestage.checksums`), path to SHA-256, and its last figures.
    pub fn wait_sums(&mut self) -> Result<(BTreeMap<String, String>, Figures)> {
        let mut sums = BTreeMap::new();
        let (_, figures) = self.wait("checksums", STEP_LIMIT, |line| match line {
            Line::Sum { sum, path } => {
                sums.insert(path, sum);
                None
            }
            Line::Last(figures) => Some(figures),
            _ => None,
        })?;
        Ok((sums, figures))
    }

    /// The guest's last figures.
    pub fn wait_last(&mut self) -> Result<Figures> {
        let (_, figures) = self.wait("last figures", STEP_LIMIT, |line| match line {
            Line::Last(figures) => Some(figures),
            _ => None,
        })?;
        Ok(figures)
    }

    /// Waits until the guest has powered itself off.
    pub fn wait_off(mut self) -> Result<()> {
        self.wait("power-off", STEP_LIMIT, |line| (line == Line::End).then_some(()))?;
        wait_until("power-off", Duration::from_secs(120), || {
            Ok(self.guest.libvirt.virsh(&["domstate", &self.guest.name])?.trim() == "shut off")
        })
        .with_context(|| self.last_words())
    }

    /// Everything on the console so far.
    #[must_use]
    pub fn transcript(&self) -> String {
        self.transcript.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn last_words(&self) -> String {
        let text = self.transcript();
        let lines: Vec<_> = text.lines().collect();
        format!("last on its console:\n{}", lines[lines.len().saturating_sub(15)..].join("\n"))
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        // fails when the guest is off, which is what is wanted
        let _ = self.guest.libvirt.virsh(&["destroy", &self.guest.name]);
    }
}
