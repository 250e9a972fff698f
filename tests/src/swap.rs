//! Swap areas of our own, taken back however the program ends.
//!
//! A child process does all that touches the host: it makes the area, switches it on above every other one, sets
//! `vm.page-cluster` and, when its standard input closes, undoes all of it. That pipe closes with us, even by SIGKILL, and
//! the child is in a session of its own that no signal meant for us reaches. Its orders follow each other in one process,
//! so that nothing is switched on after it was undone. Only a SIGKILL on the child itself leaves an area behind.
//!
//! One area on a host at a time: the child holds `/run/lock/prestage-swap.lock` until everything is undone. Areas, devices
//! and settings of others are not touched; other areas may be on, ours has the highest priority there is.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::clean::{self, Guard};
use crate::process::run;

/// The highest that swapon(8) takes.
const PRIORITY: i32 = 32767;

/// CAP_SYS_ADMIN, which swapon(2) asks for (capabilities(7)).
const SYS_ADMIN: u32 = 21;

/// The child. Arguments: lock file, priority, size in bytes, and a path for a file or nothing for a zram device. Replies to
/// each order with a line `ok …` or `failed WHY`.
const GUARDIAN: &str = r#"
trap '' INT TERM HUP PIPE
lock=$1 priority=$2 bytes=$3 file=$4 number= device= made=
exec 9>>"$lock" || { echo "failed cannot write $lock"; exit 1; }
flock --timeout 900 9 || { echo "failed another holds $lock for a quarter of an hour"; exit 1; }
cluster=$(cat /proc/sys/vm/page-cluster)
is_on() { grep -q "^$device[[:blank:]]" /proc/swaps; }
on() { swapon --priority "$priority" "$device" 2>&1; }
off() { ! is_on || swapoff "$device" 2>&1; }
make() {
  if [ -n "$file" ]; then
    [ ! -e "$file" ] || { echo "$file exists"; return 1; }
    device=$file made=1
    (umask 077 && fallocate --length "$bytes" "$file") 2>&1 || return 1
  else
    number=$(cat /sys/class/zram-control/hot_add 2>&1) || { echo "hot_add: $number"; number=; return 1; }
    device=/dev/zram$number made=1
    echo "$bytes" 2>&1 >"/sys/block/zram$number/disksize" || return 1
    for try in 1 2 3 4 5 6 7 8 9 10; do [ -b "$device" ] && break; sleep .1; done
  fi
  mkswap "$device" 2>&1 >/dev/null || return 1
  on
}
undo() {
  [ "$(cat /proc/sys/vm/page-cluster)" = "$cluster" ] || echo "$cluster" >/proc/sys/vm/page-cluster
  [ -n "$made" ] || return 0
  # memory may be short for a while, and a device is busy for a moment after it was used
  for try in 1 2 3 4 5 6 7 8 9 10; do
    if why=$(off); then
      if [ -n "$file" ]; then rm -f "$file" && return 0
      else why=$( (echo "$number" >/sys/class/zram-control/hot_remove) 2>&1) && return 0; fi
    fi
    sleep 1
  done
  echo "prestage: swap on $device could not be taken back: $why" >&2
}
# not in a subshell: it sets what undo needs
report=$(mktemp)
if make >"$report" 2>&1; then why=; else why=$(tr '\n' ' ' <"$report"); [ -n "$why" ] || why="unknown"; fi
rm -f "$report"
if [ -n "$why" ]; then undo; echo "failed $why"; exit 1; fi
echo "ok $device"
while read -r order value; do
  case $order in
  renew) why=$(off && on) && echo ok || echo "failed $why" ;;
  cluster) why=$( (echo "$value" >/proc/sys/vm/page-cluster) 2>&1) && echo ok || echo "failed $why" ;;
  esac
done
undo
"#;

/// Who holds it (flock(1)) sees the host as it is without an area of ours.
pub const LOCK: &str = "/run/lock/prestage-swap.lock";

/// A swap area that is on; taken back when dropped.
#[derive(Debug)]
pub struct Swap {
    device: PathBuf,
    orders: Arc<Mutex<Option<ChildStdin>>>,
    replies: BufReader<ChildStdout>,
    _guard: Guard,
}

impl Swap {
    /// Whether this process may switch swap on; the error says why not.
    pub fn available() -> Result<(), String> {
        let status = fs::read_to_string("/proc/self/status").map_err(|error| format!("/proc/self/status: {error}"))?;
        if !has_capability(&status, SYS_ADMIN) {
            return Err("swapon needs CAP_SYS_ADMIN: run this with sudo".to_owned());
        }
        for tool in ["swapon", "swapoff", "mkswap", "flock", "fallocate"] {
            if Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
                return Err(format!("no {tool} here (package util-linux, and its folder in PATH)"));
            }
        }
        // another test's area is no rival: it goes before ours comes
        let swaps = run(Command::new("flock").args(["--timeout", "900", LOCK, "cat", "/proc/swaps"]));
        let swaps = swaps.map_err(|error| format!("/proc/swaps: {error:#}"))?;
        match rival(&swaps) {
            Some(other) => Err(format!("{other} has the highest priority already, pages would go to both")),
            None => Ok(()),
        }
    }

    /// Like [`Swap::available`], for a zram device.
    pub fn zram_available() -> Result<(), String> {
        Self::available()?;
        if !Path::new("/sys/class/zram-control/hot_add").exists() {
            return Err("no zram in this kernel, or its module is not loaded (modprobe zram)".to_owned());
        }
        Ok(())
    }

    /// A new zram device that holds `bytes` bytes, with the kernel's default compressor.
    pub fn zram(bytes: u64) -> Result<Self> {
        Self::start(bytes, None)
    }

    /// A new file of `bytes` bytes; `path` must not exist and be on a file system that can hold swap.
    pub fn file(path: &Path, bytes: u64) -> Result<Self> {
        Self::start(bytes, Some(path))
    }

    fn start(bytes: u64, file: Option<&Path>) -> Result<Self> {
        let mut command = Command::new("setsid");
        command.args(["bash", "-c", GUARDIAN, "prestage-swap", LOCK]);
        command.arg(PRIORITY.to_string()).arg(bytes.to_string()).arg(file.unwrap_or(Path::new("")));
        // setsid(1) forks only where it leads a process group, which a new child does not: this child is the guardian
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).current_dir("/");
        let mut child = command.spawn().context("cannot start the swap area's guardian (setsid, bash)")?;
        let orders = Arc::new(Mutex::new(child.stdin.take()));
        let replies = BufReader::new(child.stdout.take().context("no pipe from the swap area's guardian")?);
        let closed = Arc::clone(&orders);
        let guard = clean::on_exit(move || end(&closed, child));
        let mut swap = Self { device: PathBuf::new(), orders, replies, _guard: guard };
        swap.device = swap.reply().context("swap cannot be switched on")?.into();
        Ok(swap)
    }

    /// The device or file.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Switches the area off and on again: everything in it is in memory afterwards and all of it is free.
    pub fn renew(&mut self) -> Result<()> {
        self.order("renew").with_context(|| format!("cannot renew {}", self.device.display()))
    }

    /// Sets `vm.page-cluster`, the power of two of pages that the kernel reads ahead from swap.
    pub fn set_page_cluster(&mut self, pages_log2: u8) -> Result<()> {
        self.order(&format!("cluster {pages_log2}")).context("cannot set vm.page-cluster")
    }

    fn order(&mut self, line: &str) -> Result<()> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(orders.as_mut().context("the swap area is being taken back")?, "{line}")
            .context("the swap area's guardian does not listen")?;
        drop(orders);
        self.reply().map(drop)
    }

    fn reply(&mut self) -> Result<String> {
        let mut line = String::new();
        self.replies.read_line(&mut line).context("the swap area's guardian")?;
        match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("ok", rest) => Ok(rest.to_owned()),
            ("failed", why) => bail!("{why}"),
            _ => bail!("the swap area's guardian has ended"),
        }
    }
}

/// Closes the pipe and waits until everything is undone.
fn end(orders: &Mutex<Option<ChildStdin>>, mut child: Child) {
    drop(orders.lock().unwrap_or_else(PoisonError::into_inner).take());
    let _ = child.wait();
}

/// Whether `/proc/PID/status` has this effective capability.
fn has_capability(status: &str, number: u32) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).is_some_and(|set| set >> number & 1 == 1)
}

/// The area of `/proc/swaps` that has our priority or more.
fn rival(swaps: &str) -> Option<&str> {
    swaps.lines().skip(1).find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let name = words.next()?;
        (words.next_back()?.parse::<i32>().ok()? >= PRIORITY).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_of_our_priority_is_a_rival_and_others_are_not() {
        let head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        assert_eq!(rival(head), None);
        let low = format!("{head}/swap.img   file\t\t4194300\t\t12\t\t-2\n/dev/zram0   partition\t8\t\t0\t\t100\n");
        assert_eq!(rival(&low), None);
        assert_eq!(rival(&format!("{low}/dev/zram7   partition\t8\t\t0\t\t32767\n")), Some("/dev/zram7"));
    }

    #[test]
    fn capabilities_are_read_from_the_effective_set() {
        let none = "Name:\tx\nCapPrm:\tffffffffffffffff\nCapEff:\t0000000000000000\n";
        assert!(!has_capability(none, SYS_ADMIN));
        assert!(has_capability("CapEff:\t0000000000200000\n", SYS_ADMIN));
        assert!(!has_capability("", SYS_ADMIN));
    }
}
