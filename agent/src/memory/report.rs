//! How machines' memory fares, as the API words it.

use super::host::Swap;
use super::idle::Hold;
use super::keeper::Keeper;
use super::machine::Machine;
use super::mind;
use super::places::NO_SWAP;
use crate::config::units::human_duration;
use prestage_integration::api::demand::Mode;
use prestage_integration::api::types::{Health, MemoryStatus, PagesSet, PassedOver, VmPages};
use prestage_integration::libvirt::Uuid;
use prestage_integration::memory::PAGE_BYTES;
use prestage_predictor::Phase;
use std::time::Duration;

impl Keeper {
    /// All machines together.
    pub(super) fn status(&self) -> MemoryStatus {
        let (health, detail) = match &self.helper_trouble {
            Some(trouble) => (Health::Degraded, Some(trouble.clone())),
            None if self.swap == Swap::None && !self.machines.is_empty() => {
                (Health::Off, Some(Hold::NoSwap.to_string()))
            }
            None => (Health::Ok, None),
        };
        let mut status =
            MemoryStatus { health, detail, machines: self.machines.len() as u32, ..MemoryStatus::default() };
        for machine in self.machines.values() {
            let counts = machine.mind.stage.counts();
            status.watched += u32::from(machine.watching.is_some());
            status.staged_bytes += counts.staged * PAGE_BYTES;
            status.used_bytes += counts.used * PAGE_BYTES;
            status.wasted_bytes += counts.wasted * PAGE_BYTES;
            status.faults_lost += machine.mind.lost;
        }
        status
    }

    pub(super) fn report(&mut self, vm: Uuid, now_us: u64) -> VmPages {
        let mode = self.mode(vm);
        let Some(id) = self.find(vm) else {
            return VmPages {
                health: Health::Off,
                state: "the machine does not run, or was not looked at yet".to_owned(),
                mode,
                ..VmPages::default()
            };
        };
        let watched = self.machines.get(&id).is_some_and(|machine| machine.watching.is_some());
        let residency = self.hands.as_mut().filter(|_| watched).and_then(|hands| hands.residency(id).ok());
        let missing = self.hands.as_ref().map(|hands| hands.missing().to_vec()).unwrap_or_default();
        let Some(machine) = self.machines.get(&id) else { return VmPages::default() };
        let (health, state) = state(machine, mode, self.swap);
        let mind = &machine.mind;
        let (counts, idle) = (mind.stage.counts(), machine.idle.counts());
        let watching = machine.watching.as_ref();
        let passed_over = watching.map(|watching| &watching.passed_over[..]).unwrap_or_default();
        let bytes = |pages: u64| pages * PAGE_BYTES;
        let sets = mind.summary().phases.into_iter().map(|phase| PagesSet {
            program: match phase.phase {
                Phase::Boot => "boot".to_owned(),
                Phase::Program(id) => unnamed(id),
            },
            runs: phase.runs,
            size_bytes: phase.bytes,
        });
        VmPages {
            health,
            state,
            mode,
            signal: watching.map(|watching| watching.signal.to_string()),
            passed_over: passed_over
                .iter()
                .map(|(signal, why)| PassedOver { signal: signal.to_string(), why: why.clone() })
                .collect(),
            missing,
            period: machine.period,
            present_bytes: residency.map(|residency| bytes(residency.present)),
            swapped_bytes: residency.map(|residency| bytes(residency.swapped)),
            absent_bytes: residency.map(|residency| bytes(residency.absent)),
            faults: mind.faults,
            faults_lost: mind.lost,
            sets: sets.collect(),
            sets_cut: mind.cut,
            recognised: mind.recognised,
            held: mind.stage.hold().filter(|_| mind.stage.is_waiting()).map(|hold| hold.to_string()),
            staged_bytes: bytes(counts.staged),
            used_bytes: bytes(counts.used),
            late_bytes: bytes(counts.late),
            wasted_bytes: bytes(counts.wasted),
            unread_bytes: bytes(mind.stage.unread()),
            cpu_us: counts.cpu_us,
            pushed_bytes: bytes(idle.pushed),
            refaulted_bytes: bytes(idle.refaulted),
            push_failed: idle.failed,
            push_cpu_us: idle.cpu_us,
            push_state: self.settings.push.map(|_| push_state(machine, mode, self.swap, now_us)),
        }
    }
}

/// What a program is called that nobody has named yet.
fn unnamed(id: u64) -> String {
    format!("program {id:016x}")
}

/// Gives the programs of `pages` their names and tags, as far as they are among `known`.
pub(crate) fn name_programs<'a>(pages: &mut VmPages, known: impl Iterator<Item = (&'a str, &'a [String])>) {
    for (name, tags) in known {
        let unnamed = unnamed(mind::program(name, tags));
        for set in pages.sets.iter_mut().filter(|set| set.program == unnamed) {
            set.program = if tags.is_empty() { name.to_owned() } else { format!("{name} [{}]", tags.join(" ")) };
        }
    }
}

fn push_state(machine: &Machine, mode: Mode, swap: Swap, now_us: u64) -> String {
    let without_swap = swap == Swap::None || machine.trouble.as_deref() == Some(NO_SWAP);
    let why = match (without_swap, mode, &machine.watching) {
        (true, ..) => Hold::NoSwap.to_string(),
        (_, _, None) => "it is not watched".to_owned(),
        (_, Mode::Act, _) => match machine.idle.hold(now_us) {
            None => return "in small steps".to_owned(),
            Some((hold, None)) => hold.to_string(),
            Some((hold, Some(left_us))) => {
                let left = Duration::from_secs(left_us.div_ceil(1_000_000));
                format!("{hold}; again in {}", human_duration(left))
            }
        },
        _ => "its policy, or memory.prestage where it has none, moves none of its pages (vm policy --pages act)"
            .to_owned(),
    };
    format!("not now: {why}")
}

fn state(machine: &Machine, mode: Mode, swap: Swap) -> (Health, String) {
    // Whatever else there is to say: nothing is missed.
    if swap == Swap::None || machine.trouble.as_deref() == Some(NO_SWAP) {
        return (Health::Off, NO_SWAP.to_owned());
    }
    if let Some(trouble) = &machine.trouble {
        return (Health::Degraded, trouble.clone());
    }
    if machine.watching.is_none() {
        return (Health::Degraded, "not watched yet".to_owned());
    }
    if let Some(refused) = &machine.mind.refused {
        return (Health::Degraded, format!("the saved profile is not used: {refused}"));
    }
    match mode {
        Mode::Act => (Health::Ok, "watched, and pages are brought in".to_owned()),
        _ => (Health::Ok, "watched; pages are not brought in".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_called_by_what_they_were_announced_as() {
        let tags = ["day".to_owned(), "eu".to_owned()];
        let set = |id| PagesSet { program: unnamed(id), runs: 1, size_bytes: 1 };
        let sets = vec![set(mind::program("job", &[])), set(mind::program("job", &tags)), set(7)];
        let mut pages = VmPages { sets, ..VmPages::default() };
        name_programs(&mut pages, [("job", &tags[..]), ("job", &[]), ("other", &[])].into_iter());
        let names: Vec<&str> = pages.sets.iter().map(|set| set.program.as_str()).collect();
        assert_eq!(names, ["job", "job [day eu]", "program 0000000000000007"]);
    }
}
