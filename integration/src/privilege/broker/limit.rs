//! What the broker gives up before it hears anybody: every capability but those that it acts with.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::geteuid;

/// Each with what it is for. Those of the memory helper are passed on to it (`memory::helper`).
const KEPT: [(Capability, &str); 13] = [
    (Capability::CAP_DAC_OVERRIDE, "stores of other users cannot be written to"),
    (Capability::CAP_DAC_READ_SEARCH, "stores of other users cannot be opened"),
    (Capability::CAP_CHOWN, "sockets and templates cannot be given to QEMU's group"),
    (Capability::CAP_FOWNER, "sockets and templates cannot be given to QEMU's group"),
    (Capability::CAP_NET_ADMIN, "what failed network limits leave stays"),
    (Capability::CAP_KILL, "a stuck memory helper is not ended"),
    // The rest is the memory helper's: to look into hypervisors, and to give up root.
    (Capability::CAP_SYS_PTRACE, "no guest's memory is watched"),
    (Capability::CAP_PERFMON, "guests' faults are seen late"),
    (Capability::CAP_SYS_NICE, "no guest's memory is moved"),
    (Capability::CAP_SYS_RESOURCE, "few guests' faults are seen"),
    (Capability::CAP_SETUID, "the memory helper stays root"),
    (Capability::CAP_SETGID, "the memory helper stays root"),
    (Capability::CAP_SETPCAP, "the memory helper stays root"),
];

/// Gives up all other capabilities, and the way back. Returns what is missing, each with what it costs.
///
/// # Errors
/// What cannot be given up, in words: the broker must not go on then.
pub(super) fn limit() -> Result<Vec<String>, String> {
    let os = |what: &'static str| move |error: nix::Error| format!("{what}: {error}");
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(os("cannot end with the daemon"))?;
    prctl::set_name(c"prestage-broker").map_err(os("cannot set its name"))?;
    let had = caps::read(None, CapSet::Permitted).map_err(|error| format!("cannot read capabilities: {error}"))?;
    let kept: CapsHashSet = KEPT.iter().map(|(kept, _)| *kept).filter(|kept| had.contains(kept)).collect();
    if had.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::read(None, CapSet::Bounding).unwrap_or_default() {
            if !kept.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)
                    .map_err(|error| format!("cannot give up {capability} for good: {error}"))?;
            }
        }
    }
    caps::clear(None, CapSet::Inheritable).map_err(|error| format!("cannot clear capabilities: {error}"))?;
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &kept).map_err(|error| format!("cannot limit capabilities: {error}"))?;
    }
    prctl::set_no_new_privs().map_err(os("cannot give up new privileges"))?;
    if !geteuid().is_root() {
        return Ok(vec!["not root: it may do no more than the daemon".into()]);
    }
    let missing = KEPT.into_iter().filter(|(capability, _)| !kept.contains(capability));
    Ok(missing.map(|(capability, costs)| format!("{capability}: {costs}")).collect())
}
