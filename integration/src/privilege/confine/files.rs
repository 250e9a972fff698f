//! Where the daemon may write and read: Landlock (docs.kernel.org/userspace-api/landlock.html).
//!
//! What the broker opens for it is not judged here: a descriptor keeps what it could when it was made.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

use super::Plan;

/// What is asked of the kernel: the newest that was tested. An older one does what it can.
const WANTED: ABI = ABI::V6;

/// What libraries read, and what is told of the host and its machines.
const READ: [&str; 39] = [
    "/usr",
    "/lib",
    "/lib64",
    "/proc",
    "/sys",
    "/dev/full",
    "/dev/null",
    "/dev/random",
    "/dev/urandom",
    "/dev/zero",
    "/etc/ca-certificates",
    "/etc/crypto-policies",
    "/etc/gai.conf",
    "/etc/gnutls",
    "/etc/group",
    "/etc/host.conf",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/libvirt/libvirt.conf",
    "/etc/localtime",
    "/etc/machine-id",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/passwd",
    "/etc/pki/ca-trust",
    "/etc/pki/tls/cert.pem",
    "/etc/pki/tls/certs",
    "/etc/protocols",
    "/etc/resolv.conf",
    "/etc/services",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/etc/ssl/certs",
    "/run/NetworkManager",
    "/run/libvirt",
    "/run/resolvconf",
    "/run/systemd/resolve",
    "/var/lib/ca-certificates",
];
/// Where anybody may write what is lost.
const SINKS: [&str; 1] = ["/dev/null"];

/// Everything that a daemon does to files of its own. Not: device nodes, `ioctl` of devices, programs.
fn own() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{
        ReadFile | ReadDir | WriteFile | Truncate | RemoveDir | RemoveFile | MakeDir | MakeReg | MakeSock | MakeFifo | MakeSym | Refer
    })
}

/// Confines this thread and those it starts. Returns how far that goes.
///
/// # Errors
/// In words: why it does not hold.
pub(super) fn confine(plan: &Plan) -> Result<String, String> {
    let (state, left_out) = restrict(plan).map_err(|error| format!("not confined: {error}"))?;
    let mut detail = match (state.ruleset, state.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotImplemented) => {
            return Err("not confined: this kernel has no Landlock (Linux 5.13)".to_owned());
        }
        (RulesetStatus::NotEnforced, _) => {
            return Err("not confined: Landlock is switched off (lsm= at boot)".to_owned());
        }
        (RulesetStatus::PartiallyEnforced, LandlockStatus::Available { effective_abi, .. }) => format!(
            "Landlock as far as this kernel goes (version {} of {}); written to: ",
            effective_abi as i32, WANTED as i32
        ),
        _ => "written to: ".to_owned(),
    };
    let written: Vec<_> = plan.write.iter().map(|path| path.display().to_string()).collect();
    detail.push_str(&written.join(", "));
    if !left_out.is_empty() {
        detail.push_str("; not there at the start: ");
        detail.push_str(&left_out.join(", "));
    }
    Ok(detail)
}

fn restrict(plan: &Plan) -> Result<(landlock::RestrictionStatus, Vec<String>), RulesetError> {
    let scopes = if plan.abstract_sockets { Scope::Signal.into() } else { Scope::from_all(WANTED) };
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(WANTED))?
        .scope(scopes)?
        .create()?;
    let mut left_out = Vec::new();
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let known = READ.iter().map(PathBuf::from);
    for path in known.chain(plan.read.iter().cloned()) {
        // What is not there is not missed: hosts differ.
        if let Some(rule) = rule(&path, read) {
            rules = rules.add_rule(rule)?;
        }
    }
    for path in SINKS.iter().map(PathBuf::from) {
        if let Some(rule) = rule(&path, AccessFs::WriteFile.into()) {
            rules = rules.add_rule(rule)?;
        }
    }
    for path in &plan.write {
        match rule(path, own()) {
            Some(rule) => rules = rules.add_rule(rule)?,
            None => left_out.push(path.display().to_string()),
        }
    }
    Ok((rules.restrict_self()?, left_out))
}

/// A confinement for a program: it writes to these files alone, and to nothing else that has a name. `None`: this kernel has no
/// Landlock.
///
/// # Errors
/// In words: why it cannot be made.
pub(super) fn writing_only(files: &[BorrowedFd<'_>]) -> Result<Option<OwnedFd>, String> {
    let made = || -> Result<Option<OwnedFd>, RulesetError> {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_write(WANTED))?
            .scope(Scope::from_all(WANTED))?
            .create()?;
        for file in files {
            let access = AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
            rules = rules.add_rule(PathBeneath::new(file, access))?;
        }
        for sink in SINKS.iter().map(PathBuf::from) {
            if let Some(rule) = rule(&sink, AccessFs::WriteFile.into()) {
                rules = rules.add_rule(rule)?;
            }
        }
        Ok(rules.into())
    };
    made().map_err(|error| format!("files: not confined: {error}"))
}

fn rule(path: &std::path::Path, access: BitFlags<AccessFs>) -> Option<PathBeneath<PathFd>> {
    let fd = PathFd::new(path).ok()?;
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(WANTED) };
    Some(PathBeneath::new(fd, access))
}
