//! What is mounted where, as `/proc/self/mountinfo` tells it (proc_pid_mountinfo(5)): no file system is asked, which may hang.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Where something is mounted.
pub(super) struct Mounts(Vec<PathBuf>);

impl Mounts {
    /// # Errors
    /// What the kernel says.
    pub(super) fn now() -> io::Result<Mounts> {
        Ok(Mounts::of(&std::fs::read("/proc/self/mountinfo")?))
    }

    fn of(mountinfo: &[u8]) -> Mounts {
        let lines = mountinfo.split(|byte| *byte == b'\n');
        let points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
        Mounts(points.map(|point| OsString::from_vec(unescaped(point)).into()).collect())
    }

    /// The mount point that a path without links lies on.
    pub(super) fn point(&self, path: &Path) -> Option<&Path> {
        let around = self.0.iter().filter(|point| path.starts_with(point));
        around.max_by_key(|point| point.components().count()).map(PathBuf::as_path)
    }
}

/// Space, tab, newline and backslash stand there as `\` and three octal digits.
fn unescaped(name: &[u8]) -> Vec<u8> {
    let (mut rest, mut out) = (name, Vec::with_capacity(name.len()));
    while let Some((byte, after)) = rest.split_first() {
        let escaped = match (byte, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        out.push(escaped.unwrap_or(*byte));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_lies_on_the_nearest_mount_point_whatever_its_name() {
        let text = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 8:2 / /cache rw shared:1 - xfs /dev/sdb rw\n\
            31 30 8:3 /sub /cache/a\\040b\\134\\011c rw - xfs /dev/sdc rw\n32 22 0:5 / /cachet rw - tmpfs tmpfs rw\nrot\n\n";
        let mounts = Mounts::of(text);
        for (path, point) in [
            ("/cache/ssd", "/cache"),
            ("/cache", "/cache"),
            ("/cache/a b\\\tc/ssd", "/cache/a b\\\tc"),
            ("/cache/a b/ssd", "/cache"),
            ("/caches/ssd", "/"),
            ("/cachet/x/y", "/cachet"),
        ] {
            assert_eq!(mounts.point(Path::new(path)), Some(Path::new(point)), "{path}");
        }
        assert_eq!(Mounts::of(b"").point(Path::new("/x")), None);
        // What is no escape is a name.
        for (name, plain) in [("/a\\04", "/a\\04"), ("/a\\", "/a\\"), ("/a\\477", "/a\\477"), ("/\\0401", "/ 1")] {
            assert_eq!(unescaped(name.as_bytes()), plain.as_bytes());
        }
    }

    #[test]
    fn the_kernel_names_the_file_system_of_processes() {
        let mounts = Mounts::now().unwrap();
        assert_eq!(mounts.point(Path::new("/proc/self/status")), Some(Path::new("/proc")));
    }
}
