//! What the helper gives up before it hears anybody: everything but four capabilities. And what the daemon gives up, so that
//! the helper alone has them.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};

/// perf events of other users' processes; reading their page tables and advising on them; seeing their files in `/proc`.
const KEPT: [Capability; 4] =
    [Capability::CAP_PERFMON, Capability::CAP_SYS_PTRACE, Capability::CAP_SYS_NICE, Capability::CAP_DAC_READ_SEARCH];
/// Owns nothing.
const NOBODY: u32 = 65_534;

/// Gives up root, all other capabilities, and the way back. Returns what could not be had, each with what it costs.
///
/// # Errors
/// What cannot be given up, in words: the helper must not go on then.
pub(super) fn limit() -> Result<Vec<String>, String> {
    let os = |what: &'static str| move |error: nix::Error| format!("{what}: {error}");
    // the daemon must not leave a process behind that may look into every guest
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(os("cannot end with the daemon"))?;
    // rings are locked memory; without CAP_IPC_LOCK the limit counts. Fewer rings work as well.
    let mut missing = Vec::new();
    let unlimited = libc::RLIM_INFINITY;
    if setrlimit(Resource::RLIMIT_MEMLOCK, unlimited, unlimited).is_err() {
        missing.push(
            "locked memory is limited (RLIMIT_MEMLOCK): of a machine with many threads, what some of them touch is found by looks \
             at its page table alone; LimitMEMLOCK=infinity in prestaged's unit mends that"
                .to_owned(),
        );
    }
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 1 << 16, 1 << 16);
    let had = caps::read(None, CapSet::Permitted).map_err(|error| format!("cannot read capabilities: {error}"))?;
    let kept: CapsHashSet = KEPT.into_iter().filter(|kept| had.contains(kept)).collect();
    if geteuid().is_root() {
        for capability in caps::read(None, CapSet::Bounding).unwrap_or_default() {
            if !KEPT.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)
                    .map_err(|error| format!("cannot give up {capability} for good: {error}"))?;
            }
        }
        prctl::set_keepcaps(true).map_err(os("cannot keep capabilities"))?;
        setgroups(&[]).map_err(os("cannot leave groups"))?;
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        setresgid(group, group, group).map_err(os("cannot leave root's group"))?;
        setresuid(user, user, user).map_err(os("cannot give up root"))?;
    }
    let set = |set, what: &str| {
        caps::set(None, set, &kept).map_err(|error| format!("cannot limit {what} capabilities: {error}"))
    };
    caps::clear(None, CapSet::Inheritable).map_err(|error| format!("cannot clear capabilities: {error}"))?;
    set(CapSet::Effective, "effective")?;
    set(CapSet::Permitted, "permitted")?;
    prctl::set_no_new_privs().map_err(os("cannot give up new privileges"))?;
    for (capability, costs) in KEPT.into_iter().zip([
        "faults are seen by looks at the page table alone",
        "no hypervisor can be looked into",
        "nothing can be brought in or pushed out",
        "hypervisors of other users cannot be looked into",
    ]) {
        if !kept.contains(&capability) {
            missing.push(format!("{capability}: {costs}"));
        }
    }
    // changing the user has cleared it
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(os("cannot end with the daemon"))?;
    Ok(missing)
}

/// What lets look into other processes, hear their faults and move their memory; `CAP_SYS_ADMIN` stands in for the second
/// (capabilities(7)).
const OF_HELPER: [Capability; 4] =
    [Capability::CAP_SYS_PTRACE, Capability::CAP_PERFMON, Capability::CAP_SYS_NICE, Capability::CAP_SYS_ADMIN];

/// The daemon gives up what only its helper needs; a program that it starts as root has it anew. To be called before there are
/// other threads: each has its own.
///
/// # Errors
/// In words: which capability cannot be given up.
pub fn leave_to_helper() -> Result<(), String> {
    for capability in OF_HELPER {
        for set in [CapSet::Effective, CapSet::Permitted] {
            caps::drop(None, set, capability).map_err(|error| format!("cannot give up {capability}: {error}"))?;
        }
    }
    Ok(())
}
