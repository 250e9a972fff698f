//! A libvirtd of our own, a full `qemu:///system` that shares nothing with the host's and leaves nothing behind.
//!
//! libvirtd's folders are fixed at build time, so it runs in a mount namespace where ours are bound over them, and in a
//! process namespace, so that the kernel ends it and every guest with the namespace's first process. That one is a shell
//! reading commands from a pipe of ours: it ends with us, whatever ended us. No virtlogd (`stdio_handler`), no networks,
//! no D-Bus.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::paths::{self, Scratch};
use crate::process::{Process, run, tail, wait_until};

/// The first process of the namespaces. Bash and no other shell: as the first process it inherits the guests that libvirtd
/// lets go of, and must collect those that end, which dash doesn't.
const HOLDER: &str = r#"
set -e
for folder in etc/libvirt run/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt; do
  mkdir -p "/$folder"
done
mount --bind "$1/etc" /etc/libvirt
mount --bind "$1/run" /run/libvirt
mount --bind "$1/lib" /var/lib/libvirt
mount --bind "$1/log" /var/log/libvirt
mount --bind "$2" /var/cache/libvirt
while read -r command; do
  case $command in
  start) libvirtd --config /etc/libvirt/libvirtd.conf --pid-file "$1/libvirtd.pid" --timeout 0 & ;;
  kill) kill -KILL $! ;;
  esac
done
"#;

/// A private libvirtd.
#[derive(Debug)]
pub struct Libvirt {
    uri: String,
    log: PathBuf,
    holder: Mutex<Process>,
    _scratch: Scratch,
}

impl Libvirt {
    /// Starts libvirtd and waits until it answers. Needs root.
    pub fn start() -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("a private libvirtd needs root, for its namespaces: run this with sudo");
        }
        let scratch = Scratch::new()?;
        let folder = scratch.path();
        for name in ["etc", "run", "lib", "log"] {
            std::fs::create_dir(scratch.join(name))?;
        }
        // asking QEMU what it can do takes libvirtd three seconds; its answer is kept
        let capabilities = paths::cache()?.join("libvirt");
        std::fs::create_dir_all(&capabilities)?;
        let log = scratch.join("libvirtd.log");
        let run_folder = scratch.join("run");
        std::fs::write(
            scratch.join("etc/libvirtd.conf"),
            format!(
                "unix_sock_dir = \"{}\"\nunix_sock_group = \"root\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n\
                 log_outputs = \"3:stderr\"\n",
                run_folder.display()
            ),
        )?;
        std::fs::write(
            scratch.join("etc/qemu.conf"),
            "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\nstdio_handler = \"file\"\n\
             remember_owner = 0\nnamespaces = []\ncgroup_controllers = []\n",
        )?;
        let script = scratch.join("holder.sh");
        std::fs::write(&script, HOLDER)?;
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
        ]);
        command.arg(&script).arg(folder).arg(&capabilities);
        let holder = Process::start_with("libvirtd's namespace", &command, &log, Duration::ZERO, Stdio::piped())?;
        let uri = format!("qemu+unix:///system?socket={}/libvirt-sock", run_folder.display());
        let libvirt = Self { uri, log, holder: Mutex::new(holder), _scratch: scratch };
        libvirt.tell("start")?;
        libvirt.wait_ready()?;
        Ok(libvirt)
    }

    /// For `virsh -c` and the daemon's `[libvirt] uri`.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Kills libvirtd as a crash would and starts it again; running guests go on.
    pub fn crash_and_restart(&self) -> Result<()> {
        self.tell("kill")?;
        wait_until("libvirtd's end", Duration::from_secs(10), || Ok(self.virsh(&["version"]).is_err()))?;
        self.tell("start")?;
        self.wait_ready()
    }

    /// Runs one virsh command and returns what it prints.
    pub fn virsh(&self, words: &[&str]) -> Result<String> {
        run(Command::new("virsh").args(["--quiet", "--connect", &self.uri]).args(words))
    }

    /// Defines a domain from its XML.
    pub fn define(&self, xml: &str, file: &Path) -> Result<()> {
        std::fs::write(file, xml).with_context(|| format!("cannot write {}", file.display()))?;
        self.virsh(&["define", "--validate", &file.display().to_string()]).map(drop)
    }

    /// Lets the namespace's first process end and with it, by the kernel, libvirtd and every guest.
    fn end(&mut self) {
        let holder = self.holder.get_mut().unwrap_or_else(PoisonError::into_inner);
        drop(holder.stdin.take());
        // else its guard kills it
        let _ = holder.wait(Duration::from_secs(10));
    }

    fn tell(&self, command: &str) -> Result<()> {
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        holder.check_alive().with_context(|| tail(&self.log, 10))?;
        let pipe = holder.stdin.as_mut().context("no pipe to libvirtd's namespace")?;
        writeln!(pipe, "{command}").context("libvirtd's namespace does not listen")
    }

    fn wait_ready(&self) -> Result<()> {
        let mut last = None;
        wait_until("libvirtd's start", Duration::from_secs(60), || {
            match self.virsh(&["version"]) {
                Ok(_) => return Ok(true),
                Err(error) => last = Some(error),
            }
            self.holder.lock().unwrap_or_else(PoisonError::into_inner).check_alive()?;
            Ok(false)
        })
        .with_context(|| format!("{}\n{}", last.map(|e| e.to_string()).unwrap_or_default(), tail(&self.log, 10)))
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        self.end();
    }
}
