//! What the host has to spare: free memory, limits of control groups, pressure, swap. Files of `/proc` and `/sys/fs/cgroup`
//! alone; behind a trait, so that tests can say what there is.

use std::fs;
use std::path::{Path, PathBuf};

use prestage_integration::memory::PAGE_BYTES;
use prestage_integration::pressure::{Pressure, machine_group};

/// What this host swaps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Swap {
    None,
    /// Compressed RAM alone.
    Zram,
    Disk,
}

/// The control groups of a process whose limits count for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Group {
    /// Files of each limit and of what is used of it.
    limits: Vec<(PathBuf, PathBuf)>,
    /// The same of swap.
    swap: Vec<(PathBuf, PathBuf)>,
    /// Folder of the machine's own group in cgroup v2, which has its pressure.
    folder: Option<PathBuf>,
}

pub(super) trait Host: Send {
    /// Pages that can be had without swapping, and all there are.
    fn memory(&mut self) -> Option<(u64, u64)>;
    fn swap(&mut self) -> Swap;
    /// Share of time, 0 to 1, that some task of the host or of the group waited for memory over the last 10 s; `None`: this kernel
    /// does not tell.
    fn pressure(&mut self, group: &Group) -> Option<f64>;
    /// The same of the group's tasks alone; of the host's where it has no such group.
    fn own_pressure(&mut self, group: &Group) -> Option<f64>;
    /// Pages that swap can still take from the group, and all there are.
    fn swap_room(&mut self, group: &Group) -> (u64, u64);
    fn group(&mut self, pid: u32) -> Group;
    /// Pages below the nearest limit; `None`: there is none.
    fn group_room(&mut self, group: &Group) -> Option<u64>;
}

/// This host.
#[derive(Debug)]
pub(super) struct ThisHost {
    proc: PathBuf,
    groups: PathBuf,
}

impl Default for ThisHost {
    fn default() -> Self {
        Self { proc: "/proc".into(), groups: "/sys/fs/cgroup".into() }
    }
}

impl Host for ThisHost {
    fn memory(&mut self) -> Option<(u64, u64)> {
        let text = fs::read_to_string(self.proc.join("meminfo")).ok()?;
        let pages = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? * 1024 / PAGE_BYTES)
        };
        Some((pages("MemAvailable")?, pages("MemTotal")?))
    }

    fn swap(&mut self) -> Swap {
        let text = fs::read_to_string(self.proc.join("swaps")).unwrap_or_default();
        let areas = text.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
        areas.fold(Swap::None, |found, path| match found {
            Swap::None | Swap::Zram if path.starts_with("/dev/zram") => Swap::Zram,
            _ => Swap::Disk,
        })
    }

    fn pressure(&mut self, group: &Group) -> Option<f64> {
        of_host().into_iter().chain(of_group(group)).reduce(f64::max)
    }

    fn own_pressure(&mut self, group: &Group) -> Option<f64> {
        of_group(group).or_else(of_host)
    }

    fn swap_room(&mut self, group: &Group) -> (u64, u64) {
        let text = fs::read_to_string(self.proc.join("swaps")).unwrap_or_default();
        let areas = text.lines().skip(1).filter_map(|line| {
            // From behind: a path may have blanks.
            let mut fields = line.split_ascii_whitespace().rev().skip(1);
            let used = fields.next()?.parse::<u64>().ok()?;
            Some((fields.next()?.parse::<u64>().ok()?, used))
        });
        let (all, used) = areas.fold((0, 0), |(all, used), area| (all + area.0, used + area.1));
        let kib = PAGE_BYTES / 1024;
        let (all, free) = (all / kib, all.saturating_sub(used) / kib);
        match room_of(&group.swap) {
            Some((room, limit)) if room < free => (room, limit),
            _ => (free, all),
        }
    }

    fn group(&mut self, pid: u32) -> Group {
        let text = fs::read_to_string(self.proc.join(pid.to_string()).join("cgroup")).unwrap_or_default();
        find_group(&text, &self.groups)
    }

    fn group_room(&mut self, group: &Group) -> Option<u64> {
        room_of(&group.limits).map(|(room, _)| room)
    }
}

/// Pages below the nearest limit, and that limit.
fn room_of(limits: &[(PathBuf, PathBuf)]) -> Option<(u64, u64)> {
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let rooms = limits.iter().filter_map(|(limit, used)| {
        // "max", and v1's number near 2^63, are no limits
        let limit = number(limit).filter(|limit| *limit < 1 << 62)?;
        Some((limit.saturating_sub(number(used)?) / PAGE_BYTES, limit / PAGE_BYTES))
    });
    rooms.min()
}

fn some(pressure: Option<Pressure>) -> Option<f64> {
    Some(pressure?.memory?.some.avg10)
}

fn of_host() -> Option<f64> {
    some(Pressure::of_host())
}

fn of_group(group: &Group) -> Option<f64> {
    some(group.folder.as_deref().and_then(Pressure::of_group))
}

/// The groups that `/proc/PID/cgroup` names (cgroups(7)), and those above them.
fn find_group(text: &str, mount: &Path) -> Group {
    let mut group = Group::default();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let path = Path::new(path.trim_start_matches('/'));
        if path.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
            continue;
        }
        let (root, names): (PathBuf, &[(&str, &str)]) = if controllers.is_empty() {
            let unified = mount.join("unified");
            let root = if unified.is_dir() { unified } else { mount.to_owned() };
            (root, &[("memory.max", "memory.current"), ("memory.high", "memory.current")])
        } else if controllers.split(',').any(|name| name == "memory") {
            (mount.join("memory"), &[("memory.limit_in_bytes", "memory.usage_in_bytes")])
        } else {
            continue;
        };
        for above in path.ancestors() {
            let folder = root.join(above);
            if folder.join("memory.swap.max").is_file() {
                group.swap.push((folder.join("memory.swap.max"), folder.join("memory.swap.current")));
            }
            for (limit, used) in names {
                if folder.join(limit).is_file() {
                    group.limits.push((folder.join(limit), folder.join(used)));
                }
            }
        }
        // That of its emulator knows nothing of its processors.
        let own = path.to_str().and_then(machine_group).map_or_else(|| root.join(path), |own| root.join(own));
        if own.join("memory.pressure").is_file() && path.components().next().is_some() {
            group.folder = Some(own);
        }
    }
    group
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn host(dir: &Path) -> ThisHost {
        ThisHost { proc: dir.join("proc"), groups: dir.join("cgroup") }
    }

    #[test]
    fn free_memory_and_swap_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut host = host(dir.path());
        assert_eq!((host.memory(), host.swap()), (None, Swap::None));
        write(dir.path().join("proc/meminfo"), "MemTotal:  4096 kB\nMemFree: 1 kB\nMemAvailable:   2048 kB\n");
        assert_eq!(host.memory(), Some((512, 1024)));
        let head = "Filename Type Size Used Priority\n";
        let none = Group::default();
        assert_eq!(host.swap_room(&none), (0, 0));
        write(dir.path().join("proc/swaps"), head);
        assert_eq!(host.swap(), Swap::None);
        write(dir.path().join("proc/swaps"), &format!("{head}/dev/zram0 partition 8 0 100\n"));
        assert_eq!(host.swap(), Swap::Zram);
        write(dir.path().join("proc/swaps"), &format!("{head}/dev/zram0 partition 8 0 100\n/swap file 8 0 -2\n"));
        assert_eq!((host.swap(), host.swap_room(&none)), (Swap::Disk, (4, 4)));
        write(
            dir.path().join("proc/swaps"),
            &format!("{head}/dev/zram0 partition 4000 400 100\n/sw\\040ap file 80 8 -2\n"),
        );
        assert_eq!(host.swap_room(&none), (918, 1020));
        // A limit of its group counts where it is nearer.
        let group = dir.path().join("cgroup/m");
        write(group.join("memory.swap.max"), "81920\n");
        write(group.join("memory.swap.current"), "40960\n");
        write(dir.path().join("proc/7/cgroup"), "0::/m\n");
        let group = host.group(7);
        assert_eq!(host.swap_room(&group), (10, 20));
    }

    #[test]
    fn pressure_is_that_of_the_machines_group_and_not_of_its_emulators() {
        let dir = tempfile::tempdir().unwrap();
        let mut host = host(dir.path());
        let own = dir.path().join("cgroup/machine.slice/machine-qemu1.scope");
        write(dir.path().join("proc/7/cgroup"), "0::/machine.slice/machine-qemu1.scope/libvirt/emulator\n");
        let text = |share| format!("some avg10={share} avg60=0.00 avg300=0.00 total=0\n");
        write(own.join("memory.pressure"), &text("40.00"));
        write(own.join("libvirt/emulator/memory.pressure"), &text("0.00"));
        let group = host.group(7);
        assert_eq!((host.own_pressure(&group), group.folder.as_ref()), (Some(0.4), Some(&own)));
        assert_eq!(host.own_pressure(&Group::default()), of_host(), "the host's, where it has none");
    }

    #[test]
    fn the_nearest_limit_of_all_groups_above_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut host = host(dir.path());
        let groups = dir.path().join("cgroup");
        write(dir.path().join("proc/7/cgroup"), "0::/machine.slice/vm.scope/libvirt/emulator\n");
        let (slice, scope) = (groups.join("machine.slice"), groups.join("machine.slice/vm.scope"));
        write(slice.join("memory.max"), "1048576\n");
        write(slice.join("memory.current"), "1040384\n");
        write(scope.join("memory.max"), "max\n");
        write(scope.join("memory.current"), "4096\n");
        write(scope.join("memory.high"), "40960\n");
        let group = host.group(7);
        assert_eq!(host.group_room(&group), Some(2), "its own would be 9");
        write(slice.join("memory.max"), "max\n");
        assert_eq!(host.group_room(&group), Some(9));
        write(scope.join("memory.high"), "max\n");
        assert_eq!(host.group_room(&group), None);
        assert_eq!(host.group_room(&self::host(dir.path()).group(8)), None, "no such process");
    }

    #[test]
    fn version_1_groups_have_limits_too_and_paths_stay_below_the_mount() {
        let dir = tempfile::tempdir().unwrap();
        let mut host = host(dir.path());
        let own = dir.path().join("cgroup/memory/machine/qemu-1");
        write(dir.path().join("proc/7/cgroup"), "5:cpu,cpuacct:/machine\n3:memory:/machine/qemu-1\n0::/../../etc\n");
        write(own.join("memory.limit_in_bytes"), "81920");
        write(own.join("memory.usage_in_bytes"), "90000");
        write(dir.path().join("cgroup/memory/memory.limit_in_bytes"), "9223372036854771712");
        write(dir.path().join("cgroup/memory/memory.usage_in_bytes"), "1");
        let group = host.group(7);
        assert_eq!((host.group_room(&group), group.folder), (Some(0), None));
    }
}
