//! A control group of our own for a process, taken back however the program ends: as [`crate::swap`] does, by a child in a
//! session of its own, whose standard input closes with us.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::clean::{self, Guard};

/// Arguments: the folder of the new group, and a process that is to go there. What is left in it goes back up.
const GUARDIAN: &str = r#"
trap '' INT TERM HUP PIPE
folder=$1 process=$2
mkdir "$folder" || { echo "failed cannot make $folder"; exit 1; }
undo() {
  for try in 1 2 3 4 5 6 7 8 9 10; do
    while read -r left; do echo "$left" >"${folder%/*}/cgroup.procs"; done <"$folder/cgroup.procs"
    rmdir "$folder" 2>/dev/null && return 0
    sleep .2
  done
  echo "prestage: the control group $folder could not be removed" >&2
} 2>/dev/null
if echo "$process" >"$folder/cgroup.procs"; then echo ok; else echo "failed process $process does not go there"; fi
read -r _
undo
"#;

/// Where a limit of memory is written, where use is read, and how often the limit was in the way.
#[derive(Debug, Clone, Copy)]
struct Names {
    limit: &'static str,
    used: &'static str,
    hits: &'static str,
}

const VERSION_1: Names =
    Names { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", hits: "memory.failcnt" };
const VERSION_2: Names = Names { limit: "memory.max", used: "memory.current", hits: "memory.events" };

/// A group that limits memory, with one process in it.
#[derive(Debug)]
pub struct Group {
    folder: PathBuf,
    names: Names,
    _guard: Guard,
}

impl Group {
    /// The folder in which groups that limit memory can be made, or why there is none.
    pub fn available() -> Result<(), String> {
        parent().map(drop)
    }

    /// Makes a group with `process` in it. Memory that it has already stays with the group it was in.
    pub fn of(process: i32) -> Result<Self> {
        let (parent, names) = parent().map_err(anyhow::Error::msg)?;
        let folder = parent.join(format!("prestage-test-{}", std::process::id()));
        let mut command = Command::new("setsid");
        command.args(["bash", "-c", GUARDIAN, "prestage-group"]).arg(&folder).arg(process.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).current_dir("/");
        let mut child = command.spawn().context("cannot start the control group's guardian (setsid, bash)")?;
        let orders = Arc::new(Mutex::new(child.stdin.take()));
        let said = child.stdout.take().context("no pipe from the control group's guardian")?;
        let guard = clean::on_exit(move || end(&orders, child));
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line).context("the control group's guardian")?;
        if line.trim() != "ok" {
            bail!("no control group: {}", line.trim());
        }
        Ok(Self { folder, names, _guard: guard })
    }

    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn used_bytes(&self) -> Result<u64> {
        self.read(self.names.used)
    }

    /// How often the kernel had to reclaim because the limit was reached.
    pub fn limit_hits(&self) -> Result<u64> {
        self.read(self.names.hits)
    }

    /// Limits it.
    pub fn limit(&self, bytes: u64) -> Result<()> {
        let path = self.folder.join(self.names.limit);
        fs::write(&path, bytes.to_string()).with_context(|| path.display().to_string())
    }

    fn read(&self, name: &str) -> Result<u64> {
        let path = self.folder.join(name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let number = text.lines().find_map(|line| line.strip_prefix("max ")).unwrap_or(&text);
        number.trim().parse().with_context(|| format!("{}: {text}", path.display()))
    }
}

/// Of version 2 where its memory controller is in use, else of version 1.
fn parent() -> Result<(PathBuf, Names), String> {
    for (mount, file, names) in [
        ("/sys/fs/cgroup", "cgroup.subtree_control", VERSION_2),
        ("/sys/fs/cgroup/unified", "cgroup.subtree_control", VERSION_2),
        ("/sys/fs/cgroup/memory", "memory.usage_in_bytes", VERSION_1),
    ] {
        let Ok(text) = fs::read_to_string(Path::new(mount).join(file)) else { continue };
        if names.limit == VERSION_1.limit || text.split_ascii_whitespace().any(|name| name == "memory") {
            let readonly = nix::unistd::access(mount, nix::unistd::AccessFlags::W_OK).is_err();
            return if readonly { Err(format!("{mount} cannot be written")) } else { Ok((mount.into(), names)) };
        }
    }
    Err("no control groups that limit memory".to_owned())
}

/// Closes the pipe and waits until the group is gone.
fn end(orders: &Mutex<Option<ChildStdin>>, mut child: Child) {
    drop(orders.lock().unwrap_or_else(PoisonError::into_inner).take());
    let _ = child.wait();
}
