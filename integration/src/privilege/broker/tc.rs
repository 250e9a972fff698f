//! Queueing disciplines of interfaces, by `tc`.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use super::children::PATH;
use crate::privilege::protocol::{Qdisc, Refusal};

/// Whether the kernel would take this as the name of an interface, and `tc` not for an option.
pub(crate) fn is_name(device: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=15).contains(&device.len()) && !device.starts_with(['-', '.']) && device.bytes().all(plain)
}

/// The name of an interface that machines have: a tap or macvtap device. The host's own are none of the daemon's business.
pub(super) fn of_machine(device: &str) -> Result<&str, Refusal> {
    if !is_name(device) {
        return Err(Refusal::rule(format!("`{}` is no interface", device.escape_debug())));
    }
    let net = Path::new("/sys/class/net").join(device);
    match ["tun_flags", "macvtap"].iter().any(|mark| net.join(mark).exists()) {
        true => Ok(device),
        false => Err(Refusal::rule(format!("{device} is no machine's interface"))),
    }
}

fn tc(words: &[&str]) -> Result<String, Refusal> {
    let mut command = Command::new("tc");
    let output = command.args(words).env_clear().env("PATH", PATH).stdin(Stdio::null()).output();
    let output = output.map_err(|error: io::Error| Refusal::os("start tc", &error))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(Refusal::rule(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

/// Those of `device`, in `tc`'s words.
pub(crate) fn show(device: &str) -> Result<String, Refusal> {
    tc(&["qdisc", "show", "dev", device])
}

pub(crate) fn remove(device: &str, qdisc: Qdisc) -> Result<(), Refusal> {
    let place = match qdisc {
        Qdisc::Root => "root",
        Qdisc::Ingress => "ingress",
    };
    tc(&["qdisc", "del", "dev", device, place]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_tc_would_misread_are_not_passed_on() {
        assert!(is_name("vnet0") && is_name("tap-web.1"));
        for name in ["", "-batch", "a b", "a;b", "../x", "sixteen_letters_"] {
            assert!(!is_name(name), "{name}");
            assert!(of_machine(name).is_err());
        }
    }

    #[test]
    fn the_hosts_own_interfaces_are_not_touched() {
        assert!(of_machine("lo").unwrap_err().reason.contains("no machine's"));
    }
}
