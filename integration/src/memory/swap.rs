//! What this host swaps to (`/proc/swaps`, proc(5)).

use std::fs;
use std::path::{Path, PathBuf};

/// A swap area.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwapArea {
    pub path: PathBuf,
    pub kind: SwapKind,
    pub size_bytes: u64,
    pub used_bytes: u64,
    pub priority: i32,
}

/// What a page costs that comes from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SwapKind {
    /// Compressed RAM: decompression on the processor that faults, no waiting, and no readahead by the kernel.
    Zram,
    /// A partition or file on a disk: many pages can be asked for at once.
    Disk,
}

impl std::fmt::Display for SwapKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Zram => "zram",
            Self::Disk => "disk",
        })
    }
}

/// The areas in use, the one that is filled first in front. Empty where there are none, or `/proc` cannot be read.
#[must_use]
pub fn areas() -> Vec<SwapArea> {
    parse(&fs::read_to_string("/proc/swaps").unwrap_or_default())
}

fn parse(text: &str) -> Vec<SwapArea> {
    let area = |line: &str| {
        // from behind, since a path may have blanks (as \040)
        let mut fields = line.split_ascii_whitespace().rev();
        let priority = fields.next()?.parse().ok()?;
        let used = fields.next()?.parse::<u64>().ok()?;
        let size = fields.next()?.parse::<u64>().ok()?;
        fields.next()?;
        let path = PathBuf::from(fields.next()?.replace("\\040", " "));
        let kind = if is_zram(&path) { SwapKind::Zram } else { SwapKind::Disk };
        let bytes = |kib: u64| kib.saturating_mul(1024);
        Some(SwapArea { path, kind, size_bytes: bytes(size), used_bytes: bytes(used), priority })
    };
    let mut areas: Vec<_> = text.lines().skip(1).filter_map(area).collect();
    areas.sort_by_key(|area| std::cmp::Reverse(area.priority));
    areas
}

fn is_zram(path: &Path) -> bool {
    let name = path.strip_prefix("/dev").ok().and_then(Path::to_str).unwrap_or_default();
    name.strip_prefix("zram").is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_read_and_ordered_by_priority() {
        let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/var/swap\\040file                       file\t\t1048572\t\t12\t\t-2\n/dev/zram1                              partition\t8388604\t\t0\t\t100\nodd\n";
        let areas = parse(text);
        assert_eq!(areas.len(), 2);
        assert_eq!((areas[0].kind, areas[0].priority, areas[0].size_bytes), (SwapKind::Zram, 100, 8_388_604 << 10));
        assert_eq!((areas[1].path.as_path(), areas[1].kind), (Path::new("/var/swap file"), SwapKind::Disk));
        assert_eq!(areas[1].used_bytes, 12 << 10);
        assert_eq!(parse(""), []);
        assert!(!is_zram(Path::new("/srv/zram0")));
    }
}
