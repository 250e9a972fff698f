//! Where the SSD tier may live: what it refuses to touch, full file systems, block devices.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

mod ssd_common;

use prestage_cache::ssd::{Found, SsdError, SsdTier};
use prestage_cache::types::{BLOCK_BYTES, BlockIndex, PAGE_BYTES, PageMask};
use ssd_common::*;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn another_version_is_refused_and_left_alone() {
    let place = Place::filled();
    for copy in SUPERBLOCKS {
        place.poke(copy + 16, |_| 2);
        // Its layout is its own.
        place.poke(copy + 300, |_| 7);
    }
    let before = std::fs::read(&place.path).unwrap();
    let error = SsdTier::open(&place.path, slab_bytes(80)).unwrap_err();
    assert!(matches!(error, SsdError::OtherVersion { found: 2, supported: 1, .. }), "{error}");
    assert!(error.to_string().contains("rm "), "{error}");
    assert_eq!(std::fs::read(&place.path).unwrap(), before);
}

#[test]
fn what_is_not_ours_is_refused_and_left_alone() {
    let place = Place::new();
    let mut big = vec![0; 8 << 20];
    big[7 << 20] = 1;
    let mut md_over_us = std::fs::read(&Place::filled().path).unwrap();
    md_over_us[4096..4100].copy_from_slice(b"\xfc\x4e\x2b\xa9");
    let mut fs_over_us = std::fs::read(&Place::filled().path).unwrap();
    fs_over_us[..4096].fill(0);
    fs_over_us[1080..1082].copy_from_slice(b"\x53\xef");
    let qcow2 = [b"QFI\xfb".to_vec(), vec![0; 100_000]].concat();
    for (bytes, name) in [
        (b"precious".to_vec(), "unknown data"),
        (qcow2, "qcow2"),
        (big, "leading zeros"),
        (md_over_us, "md array"),
        (fs_over_us, "ext2/3/4"),
    ] {
        std::fs::write(&place.path, &bytes).unwrap();
        let error = SsdTier::open(&place.path, slab_bytes(80)).unwrap_err();
        assert!(matches!(error, SsdError::Foreign { .. }) && error.to_string().contains(name), "{error}");
        assert!(std::fs::read(&place.path).unwrap() == bytes, "{name}: changed");
    }
    let error = SsdTier::open(place.dir.path(), slab_bytes(80)).unwrap_err();
    assert!(matches!(error, SsdError::WrongFileType { .. }), "{error}");
    let error = SsdTier::open(Path::new("/dev/null"), slab_bytes(80)).unwrap_err();
    assert!(matches!(error, SsdError::WrongFileType { .. }), "{error}");
    let error = SsdTier::open(Path::new("/dev/prestage-no-such-disk"), slab_bytes(80)).unwrap_err();
    assert!(matches!(error, SsdError::Io { .. }) && !Path::new("/dev/prestage-no-such-disk").exists(), "{error}");
}

#[test]
fn an_empty_or_sparse_file_made_beforehand_is_taken() {
    for len in [0, 5000, slab_bytes(80), slab_bytes(500)] {
        let place = Place::new();
        File::create(&place.path).unwrap().set_len(len).unwrap();
        let (_, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
        assert_eq!(report.found, Found::Created, "{len}");
        assert_eq!(std::fs::metadata(&place.path).unwrap().len(), slab_bytes(80));
    }
}

#[test]
fn a_size_without_room_for_a_slot_is_refused_and_leaves_no_file() {
    let place = Place::new();
    for size in [0, 1, slab_bytes(1) - 1, u64::MAX] {
        let error = SsdTier::open(&place.path, size).unwrap_err();
        assert!(matches!(error, SsdError::SizeOutOfRange { .. }), "{error}");
        assert!(!place.path.exists());
    }
    assert_eq!(SsdTier::open(&place.path, slab_bytes(1)).unwrap().1.slots, 1);
}

#[test]
fn a_slab_in_use_is_refused_to_a_second_daemon() {
    let place = Place::filled();
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    let reading = tier.begin_read(s, BlockIndex(0)).unwrap();
    let in_use = || matches!(SsdTier::open(&place.path, slab_bytes(80)), Err(SsdError::InUse { .. }));
    assert!(in_use());
    tier.close().unwrap();
    drop(tier);
    assert!(in_use(), "I/O under way may still write there");
    drop(reading);
    assert_eq!(SsdTier::open(&place.path, slab_bytes(80)).unwrap().1.kept_slots, 10);
}

#[test]
fn an_empty_tier_of_a_tebibyte_takes_next_to_no_memory_and_disk() {
    let place = Place::new();
    for found in [Found::Created, Found::Clean] {
        let (tier, report) = SsdTier::open_with(&place.path, 1 << 40, sparse()).unwrap();
        assert_eq!(report.found, found);
        assert!(report.slots > (1 << 24) * 998 / 1000, "{}", report.slots);
        assert!(tier.stats().index_bytes < 64 << 10);
        tier.close().unwrap();
    }
    assert!(std::fs::metadata(&place.path).unwrap().blocks() * 512 < 2 << 20, "the bitmap and little else");
}

/// Runs a program; `None`, said aloud, where that is not permitted or not installed.
fn run(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output();
    match output {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        Ok(output) => {
            eprintln!("NOT TESTED: {program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
            None
        }
        Err(error) => {
            eprintln!("NOT TESTED: {program}: {error}");
            None
        }
    }
}

/// A program to run when a test is over, whichever way.
struct Finally(&'static str, Vec<String>);

impl Drop for Finally {
    fn drop(&mut self) {
        let _ = Command::new(self.0).args(&self.1).status();
    }
}

#[test]
fn a_full_file_system_is_said_at_once_and_a_slab_that_cannot_be_closed_stays_dirty() {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().to_str().unwrap().to_owned();
    if run("mount", &["-t", "tmpfs", "-o", "size=6m", "tmpfs", &mount]).is_none() {
        return;
    }
    let _unmount = Finally("umount", vec![mount]);
    let path = dir.path().join("slab");
    let error = SsdTier::open(&path, slab_bytes(80)).unwrap_err();
    let SsdError::NoSpace { needed_bytes, free_bytes, .. } = error else { panic!("{error}") };
    // Its superblocks are there already.
    assert_eq!(needed_bytes, slab_bytes(80) - 2 * 4096);
    assert!(free_bytes <= 6 << 20);
    assert!(!path.exists(), "nothing is left behind");
    File::create(&path).unwrap();
    assert!(matches!(SsdTier::open(&path, slab_bytes(80)), Err(SsdError::NoSpace { .. })));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0, "as it was found");
    // It fits.
    assert_eq!(SsdTier::open(&path, slab_bytes(16)).unwrap().1.found, Found::Created);
    std::fs::remove_file(&path).unwrap();

    let (tier, _) = SsdTier::open_with(&path, slab_bytes(80), sparse()).unwrap();
    let s = tier.storage("file:/a", None).unwrap();
    (0..70).for_each(|block| {
        let write = tier.begin_insert(s, BlockIndex(block), PageMask::ALL).unwrap();
        assert!(tier.finish_insert(write, 1, true));
    });
    let filler = File::create(dir.path().join("filler")).unwrap();
    let page = [1; PAGE_BYTES];
    let mut at = 0;
    while filler.write_all_at(&page, at).is_ok() {
        at += PAGE_BYTES as u64;
    }
    let error = tier.close().unwrap_err();
    assert!(matches!(error, SsdError::Io { .. }), "{error}");
    let copy = tempfile::NamedTempFile::new().unwrap();
    std::fs::copy(&path, copy.path()).unwrap();
    assert_eq!(SsdTier::open_with(copy.path(), slab_bytes(80), sparse()).unwrap().1.found, Found::Recovered);
    filler.set_len(0).unwrap();
    tier.close().unwrap();
    drop(tier);
    assert_eq!(SsdTier::open_with(&path, slab_bytes(80), sparse()).unwrap().1.kept_slots, 70);
}

#[test]
fn a_block_device_is_used_whole_and_refused_when_it_holds_something_or_is_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let Some(device) = run("losetup", &["--find", "--show", image.to_str().unwrap()]) else { return };
    let _detach = Finally("losetup", vec!["--detach".to_owned(), device.clone()]);
    let path = PathBuf::from(&device);
    let error = SsdTier::open(&path, 65 << 20).unwrap_err();
    assert!(matches!(error, SsdError::NoSpace { free_bytes: 0x400_0000, .. }), "{error}");

    let (tier, report) = SsdTier::open(&path, 0).unwrap();
    assert!(report.block_device && report.found == Found::Created);
    assert_eq!(report.slots, ((64 << 20) - DATA) / BLOCK_BYTES as u64);
    let s = tier.storage("file:/a", None).unwrap();
    (0..10).for_each(|block| insert(&tier, s, block, PageMask::ALL));
    tier.close().unwrap();
    drop(tier);
    let (tier, report) = SsdTier::open(&path, 32 << 20).unwrap();
    assert_eq!((report.found, report.kept_slots), (Found::Clean, 10));
    let s = tier.storage("file:/a", None).unwrap();
    (0..10).for_each(|block| assert_eq!(read(&tier, s, block), PageMask::ALL));
    drop(tier);

    // The advice of the error messages, and a file system over what was a slab.
    let erase = |count: &str| run("dd", &["if=/dev/zero", &format!("of={device}"), "bs=1M", count, "conv=fsync"]);
    erase("count=4").unwrap();
    assert_eq!(SsdTier::open(&path, 0).unwrap().1.found, Found::Created);
    if run("mkfs.ext4", &["-q", "-F", &device]).is_none() {
        return;
    }
    let before = std::fs::read(&image).unwrap();
    let error = SsdTier::open(&path, 0).unwrap_err();
    assert!(matches!(error, SsdError::Foreign { .. }) && error.to_string().contains("ext2/3/4"), "{error}");
    assert!(std::fs::read(&image).unwrap() == before, "changed");
    let mount = dir.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    let mount = mount.to_str().unwrap().to_owned();
    if run("mount", &[&device, &mount]).is_some() {
        let _unmount = Finally("umount", vec![mount]);
        let error = SsdTier::open(&path, 0).unwrap_err();
        assert!(matches!(error, SsdError::InUse { .. }), "{error}");
    }
}

/// A predecessor is still there, with all its memory, when its successor opens the tier.
#[test]
fn a_tier_that_was_closed_and_let_go_is_the_next_ones() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let device = run("losetup", &["--find", "--show", image.to_str().unwrap()]);
    let _detach = device.clone().map(|device| Finally("losetup", vec!["--detach".to_owned(), device]));
    for path in [Some(dir.path().join("slab")), device.map(PathBuf::from)].into_iter().flatten() {
        let (tier, _) = SsdTier::open(&path, 32 << 20).unwrap();
        let s = tier.storage("file:/a", None).unwrap();
        insert(&tier, s, 3, PageMask::ALL);
        tier.let_go();
        assert!(SsdTier::open(&path, 32 << 20).is_err(), "not before it is closed");
        assert_eq!(read(&tier, s, 3), PageMask::ALL);
        tier.close().unwrap();
        assert!(SsdTier::open(&path, 32 << 20).is_err(), "closed is not let go");
        tier.let_go();
        let (next, report) = SsdTier::open(&path, 32 << 20).unwrap();
        assert_eq!((report.found, report.kept_slots), (Found::Clean, 1), "{}", path.display());
        drop(tier);
        assert!(SsdTier::open(&path, 32 << 20).is_err(), "the first one's end takes nothing from the second");
        drop(next);
    }
}
