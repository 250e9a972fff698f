//! Raw files and block devices as stores.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

mod nbd_common;

use nbd_common::{MODES, Random, compare_with_model, hammer, on, open, read, write};
use prestage_cache::backend::{StoreError, StoreOptions};
use prestage_cache::engine::EngineMode;
use std::io::Write as _;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn disk(folder: &Path, name: &str, size: u64) -> PathBuf {
    let path = folder.join(name);
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn folder() -> tempfile::TempDir {
    // Not in /tmp, which may be a tmpfs: direct I/O is what is to be tested.
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn name(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn open_error(mode: EngineMode, spec: String, options: StoreOptions) -> StoreError {
    on(mode, move |shard| async move { open(&shard, &spec, &options).await.map(|_| ()).unwrap_err() })
}

#[test]
fn a_file_does_what_the_model_does() {
    let folder = folder();
    for (i, mode) in MODES.into_iter().enumerate() {
        for direct in [true, false] {
            for size in [1 << 20, (1 << 20) + 512, 512] {
                let path = name(&disk(folder.path(), &format!("{mode:?}{direct}{size}"), size));
                let seed = size ^ (i as u64) << 40 ^ u64::from(direct) << 41;
                on(mode, move |shard| async move {
                    let options = StoreOptions { direct, ..StoreOptions::default() };
                    let store = open(&shard, &path, &options).await.unwrap();
                    assert_eq!(store.info().size_bytes, size);
                    compare_with_model(&store, seed, 300, true).await;
                    store.close().await;
                    assert_eq!(std::fs::metadata(&path).unwrap().len(), size, "a file must not change its size");
                });
            }
        }
    }
}

#[test]
fn requests_that_overlap_in_time_do_not_disturb_each_other() {
    let folder = folder();
    for mode in MODES {
        let path = name(&disk(folder.path(), &format!("{mode:?}"), 2 << 20));
        on(mode, move |shard| async move {
            let store = open(&shard, &path, &StoreOptions::default()).await.unwrap();
            hammer(&shard, &store, 5, 16, 60).await;
        });
    }
}

/// A loop device with sectors of 4096 bytes, which goes away.
struct LoopDevice(String);

impl LoopDevice {
    fn new(path: &Path) -> Option<LoopDevice> {
        let output =
            Command::new("losetup").args(["--find", "--show", "--sector-size", "4096"]).arg(path).output().ok()?;
        output.status.success().then(|| LoopDevice(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Requests in the kernel keep the open file that they go through, and its locks, when the process is killed.
#[test]
fn the_open_file_that_direct_writes_go_through_has_the_locks() {
    let folder = folder();
    let path = name(&disk(folder.path(), "locked", 1 << 20));
    let direct = std::fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(&path).is_ok();
    let looked_at = path.clone();
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &path, &StoreOptions::default()).await.unwrap();
        let mut holders = Vec::new();
        for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
            if std::fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == looked_at.as_str()) {
                let number = entry.file_name().into_string().unwrap();
                let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
                let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
                let is_direct = i32::from_str_radix(flags, 8).unwrap() & libc::O_DIRECT != 0;
                holders.push((is_direct, info.matches("FLOCK").count(), info.matches("OFDLCK").count()));
            }
        }
        holders.sort_unstable();
        if direct {
            assert_eq!(holders, [(false, 0, 0), (true, 1, 2)]);
        } else {
            assert_eq!(holders, [(false, 1, 2)]);
        }
        store.close().await;
    });
}

#[test]
fn a_lock_that_is_given_back_soon_is_waited_for() {
    let folder = folder();
    let path = name(&disk(folder.path(), "killed", 1 << 20));
    let under_way = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    under_way.lock().unwrap();
    on(EngineMode::Auto, move |shard| async move {
        let refused = open(&shard, &path, &StoreOptions::default()).await.unwrap_err();
        assert!(matches!(refused, StoreError::Locked { writer: true, .. }), "{refused}");
        let ended = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(300));
            drop(under_way);
        });
        open(&shard, &path, &StoreOptions::default()).await.unwrap().close().await;
        ended.join().unwrap();
    });
}

#[test]
fn small_sectors_work_on_a_block_device_with_large_ones() {
    let folder = folder();
    for mode in MODES {
        let Some(device) = LoopDevice::new(&disk(folder.path(), &format!("{mode:?}"), 2 << 20)) else {
            let user = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap());
            assert_ne!(user, 0, "root must be able to make a loop device");
            eprintln!("not root: nothing tested here");
            return;
        };
        let path = device.0.clone();
        on(mode, move |shard| async move {
            let store = open(&shard, &path, &StoreOptions::default()).await.unwrap();
            assert_eq!(store.info().min_io_bytes, 4096);
            compare_with_model(&store, 11, 300, true).await;
            // Neighbouring sectors of one unit, written by different tasks at the same time.
            let writers: Vec<_> = (0..64u64)
                .map(|i| {
                    let store = std::rc::Rc::clone(&store);
                    shard.spawn(async move { write(&store, i * 512, &[i as u8 + 1; 512], false).await.unwrap() })
                })
                .collect();
            for writer in writers {
                writer.await.unwrap();
            }
            let got = read(&store, 0, 64 * 512).await.unwrap();
            assert!(got.chunks(512).enumerate().all(|(i, c)| c.iter().all(|b| *b == i as u8 + 1)));
            store.close().await;
        });
    }
}

#[test]
fn the_last_page_is_filled_up_with_zeroes() {
    let folder = folder();
    for direct in [true, false] {
        let path = disk(folder.path(), &format!("{direct}"), 3 * 4096 + 1024);
        std::fs::File::options().write(true).open(&path).unwrap().write_all_at(&[9; 3 * 4096 + 1024], 0).unwrap();
        on(EngineMode::Auto, move |shard| async move {
            let store = open(&shard, &name(&path), &StoreOptions { direct, ..StoreOptions::default() }).await.unwrap();
            let got = read(&store, 8192, 8192).await.unwrap();
            assert!(got[..5120].iter().all(|b| *b == 9) && got[5120..].iter().all(|b| *b == 0));
            let beyond = read(&store, 16384, 4096).await.unwrap_err();
            assert!(matches!(beyond, StoreError::OutOfRange { .. }), "{beyond}");
            let beyond = write(&store, 3 * 4096, &[1; 4096], false).await.unwrap_err();
            assert!(matches!(beyond, StoreError::OutOfRange { .. }), "{beyond}");
        });
    }
}

#[test]
fn what_is_not_a_raw_disk_is_refused_with_a_reason() {
    let folder = folder();
    let at = |file: &str| name(&folder.path().join(file));
    disk(folder.path(), "empty", 0);
    disk(folder.path(), "odd", 1000);
    std::fs::write(at("image"), [b"QFI\xfb".as_slice(), &[0; 508]].concat()).unwrap();
    nix::unistd::mkfifo(&folder.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let options = StoreOptions::default();
    let refused = |file: &str| open_error(EngineMode::Auto, at(file), options.clone());
    assert!(matches!(refused("nothing"), StoreError::NotFound { .. }));
    assert!(matches!(refused("."), StoreError::NotADisk { .. }));
    assert!(matches!(refused("pipe"), StoreError::NotADisk { .. }));
    assert!(matches!(refused("empty"), StoreError::BadSize { size_bytes: 0, .. }));
    assert!(matches!(refused("odd"), StoreError::BadSize { size_bytes: 1000, .. }));
    let image = refused("image");
    assert!(matches!(image, StoreError::NotRaw { format: "qcow2", .. }));
    assert!(image.to_string().contains("name it as qcow2:/path"), "{image}");
    let path = at("image");
    on(EngineMode::Auto, move |shard| async move {
        let options = StoreOptions { force_raw: true, ..StoreOptions::default() };
        let store = open(&shard, &path, &options).await.unwrap();
        assert_eq!(&read(&store, 0, 512).await.unwrap()[..4], b"QFI\xfb");
    });
}

#[test]
fn one_writer_or_many_readers() {
    let folder = folder();
    let path = name(&disk(folder.path(), "d", 4096));
    on(EngineMode::Auto, move |shard| async move {
        let writer = StoreOptions::default();
        let reader = StoreOptions { read_only: true, ..StoreOptions::default() };
        let first = open(&shard, &path, &writer).await.unwrap();
        for options in [&writer, &reader] {
            let refused = open(&shard, &path, options).await.unwrap_err();
            assert!(matches!(refused, StoreError::Locked { writer: true, .. }), "{refused}");
        }
        first.close().await;
        let closed = read(&first, 0, 512).await.unwrap_err();
        assert!(matches!(closed, StoreError::Closed { .. }), "{closed}");
        let readers = (open(&shard, &path, &reader).await.unwrap(), open(&shard, &path, &reader).await.unwrap());
        let refused = open(&shard, &path, &writer).await.unwrap_err();
        assert!(matches!(refused, StoreError::Locked { writer: false, .. }), "{refused}");
        let refused = write(&readers.0, 0, &[1; 512], false).await.unwrap_err();
        assert!(matches!(refused, StoreError::ReadOnly { .. }), "{refused}");
        assert_eq!(refused.errno(), libc::EROFS);
        drop(readers);
        open(&shard, &path, &writer).await.unwrap();
    });
}

#[test]
fn an_image_that_qemu_writes_to_is_refused_and_the_other_way_round() {
    let folder = folder();
    let path = name(&disk(folder.path(), "d", 1 << 20));
    let qemu_io = |args: &[&str]| {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(args).arg(&path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("qemu-io is missing: run scripts/setup.sh")
    };
    // Interactive, so that it holds the image until told to quit; it prints what it read first.
    let mut holder = qemu_io(&[]);
    let mut stdin = holder.stdin.take().unwrap();
    stdin.write_all(b"write 0 512\n").unwrap();
    stdin.flush().unwrap();
    let mut line = String::new();
    let mut stdout = std::io::BufReader::new(holder.stdout.take().unwrap());
    while !line.contains("wrote 512") {
        assert!(std::io::BufRead::read_line(&mut stdout, &mut line).unwrap() > 0, "qemu-io said only: {line}");
    }
    for read_only in [false, true] {
        let refused = open_error(EngineMode::Auto, path.clone(), StoreOptions { read_only, ..StoreOptions::default() });
        assert!(matches!(refused, StoreError::Locked { writer: true, .. }), "{refused}");
    }
    stdin.write_all(b"quit\n").unwrap();
    assert!(holder.wait().unwrap().success());

    let shard = nbd_common::start(EngineMode::Auto);
    let spec = path.clone();
    let (send, receive) = std::sync::mpsc::channel();
    let (done, wait) = std::sync::mpsc::channel::<()>();
    shard.spawn(move |shard| async move {
        let store = open(&shard, &spec, &StoreOptions::default()).await.unwrap();
        send.send(()).unwrap();
        let _ = shard.blocking(move || wait.recv()).await;
        store.close().await;
    });
    receive.recv().unwrap();
    let refused = qemu_io(&["-c", "write 0 512"]).wait_with_output().unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("lock"), "{}", String::from_utf8_lossy(&refused.stderr));
    drop(done);
}

#[test]
fn a_file_that_shrinks_is_an_error_and_never_made_up_data() {
    let folder = folder();
    for direct in [true, false] {
        let path = disk(folder.path(), &format!("{direct}"), 1 << 20);
        on(EngineMode::Auto, move |shard| async move {
            let options = StoreOptions { direct, ..StoreOptions::default() };
            let store = open(&shard, &name(&path), &options).await.unwrap();
            std::fs::File::options().write(true).open(&path).unwrap().set_len(64 << 10).unwrap();
            let error = read(&store, 0, 1 << 20).await.unwrap_err();
            assert!(matches!(error, StoreError::Shrunk { was_bytes: 0x10_0000, now_bytes: 0x1_0000, .. }), "{error}");
            assert!(matches!(store.refresh_size().await.unwrap_err(), StoreError::Shrunk { .. }));
            read(&store, 0, 64 << 10).await.unwrap();
        });
    }
}

#[test]
fn a_file_that_shrinks_is_never_made_larger_by_a_guest() {
    const WAS: u64 = 1 << 20;
    const NOW: u64 = 512 << 10;
    let folder = folder();
    for (mode, direct) in MODES.into_iter().flat_map(|mode| [(mode, true), (mode, false)]) {
        let path = disk(folder.path(), &format!("{mode:?}{direct}"), WAS);
        on(mode, move |shard| async move {
            let options = StoreOptions { direct, ..StoreOptions::default() };
            let store = open(&shard, &name(&path), &options).await.unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_len(NOW).unwrap();
            // Beyond the end, across it, at it, before it; whole units and single sectors.
            for (offset, len) in [(WAS - 4096, 4096), (NOW - 4096, 8192), (NOW, 512), (WAS - 512, 512), (0, 4096)] {
                let failures = [
                    write(&store, offset, &vec![5; len], false).await,
                    store.write_zeroes(offset, len as u64, false).await,
                    store.write_zeroes(offset, len as u64, true).await,
                ];
                for failure in failures {
                    let error = failure.unwrap_err();
                    assert!(matches!(error, StoreError::Shrunk { was_bytes: WAS, now_bytes: NOW, .. }), "{error}");
                }
                assert_eq!(file.metadata().unwrap().len(), NOW, "{len} bytes at {offset} made the file grow");
            }
            assert!(matches!(store.discard(NOW, 64 << 10).await, Err(StoreError::Shrunk { .. })));
            assert!(matches!(read(&store, NOW, 4096).await, Err(StoreError::Shrunk { .. })));
            assert!(read(&store, 0, NOW as usize).await.unwrap().iter().all(|b| *b == 0), "a refused write was made");
            file.set_len(WAS).unwrap();
            write(&store, WAS - 512, &[5; 512], false).await.unwrap();
            // A size that was asked for is what counts from then on.
            file.set_len(2 * WAS).unwrap();
            assert_eq!(store.refresh_size().await.unwrap(), 2 * WAS);
            file.set_len(WAS).unwrap();
            let error = write(&store, 0, &[5; 512], false).await.unwrap_err();
            assert!(matches!(error, StoreError::Shrunk { was_bytes: 0x20_0000, now_bytes: WAS, .. }), "{error}");
        });
    }
}

#[test]
fn a_file_that_grows_is_larger_after_a_refresh() {
    let folder = folder();
    let path = disk(folder.path(), "d", 8192);
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &name(&path), &StoreOptions::default()).await.unwrap();
        let before = store.info().version_stamp.unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(16384).unwrap();
        assert!(matches!(read(&store, 8192, 4096).await.unwrap_err(), StoreError::OutOfRange { .. }));
        assert_eq!(store.refresh_size().await.unwrap(), 16384);
        read(&store, 8192, 4096).await.unwrap();
        let after = store.info().version_stamp.unwrap();
        assert_eq!((after.inode, after.device, after.size_bytes), (before.inode, before.device, 16384));
        assert_ne!(before.ctime_ns, after.ctime_ns);
    });
}

#[test]
fn a_file_is_made_larger_and_never_smaller() {
    let folder = folder();
    for mode in [EngineMode::Auto, EngineMode::ThreadPool] {
        let path = disk(folder.path(), &format!("{mode:?}"), 8192);
        on(mode, move |shard| async move {
            let store = open(&shard, &name(&path), &StoreOptions::default()).await.unwrap();
            write(&store, 4096, &[7; 4096], true).await.unwrap();
            assert_eq!(store.grow(64 << 20).await.unwrap(), 64 << 20);
            assert_eq!((store.info().size_bytes, path.metadata().unwrap().len()), (64 << 20, 64 << 20));
            assert!(
                std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap()) * 512 < 1 << 20,
                "space is taken when it is written to"
            );
            let whole = read(&store, 0, 16384).await.unwrap();
            assert!(whole[4096..8192].iter().all(|b| *b == 7) && whole[8192..].iter().all(|b| *b == 0));
            write(&store, (64 << 20) - 512, &[9; 512], true).await.unwrap();
            assert_eq!(store.grow(64 << 20).await.unwrap(), 64 << 20, "as it is");
            let error = store.grow(8192).await.unwrap_err();
            assert!(matches!(error, StoreError::Smaller { now_bytes: 0x400_0000, asked_bytes: 8192, .. }), "{error}");
            // Somebody else has made it larger still: what is there now is what counts, not what was there once.
            std::fs::File::options().write(true).open(&path).unwrap().set_len(96 << 20).unwrap();
            assert!(matches!(store.grow(80 << 20).await, Err(StoreError::Smaller { now_bytes: 0x600_0000, .. })));
            assert_eq!(store.grow(96 << 20).await.unwrap(), 96 << 20);
            for odd in [0, 1000, 1 << 63, u64::MAX - 511, u64::MAX] {
                assert!(matches!(store.grow(odd).await, Err(StoreError::BadSize { .. })), "{odd}");
            }
            // Beyond what the file system takes: what it takes is told, and the kernel agrees.
            let error = store.grow(1 << 62).await.unwrap_err();
            let StoreError::TooLarge { most_bytes, .. } = error else { panic!("{error}") };
            assert!(matches!(store.grow(most_bytes + 512).await, Err(StoreError::TooLarge { .. })), "{error}");
            let other = std::fs::File::create(path.with_extension("other")).unwrap();
            assert!(other.set_len(most_bytes).is_ok() && other.set_len(most_bytes + 512).is_err(), "{most_bytes}");
            assert_eq!(path.metadata().unwrap().len(), 96 << 20);
            assert_eq!(read(&store, (64 << 20) - 512, 512).await.unwrap(), [9; 512]);
            let reader = StoreOptions { read_only: true, ..StoreOptions::default() };
            store.close().await;
            let store = open(&shard, &name(&path), &reader).await.unwrap();
            assert!(matches!(store.grow(128 << 20).await, Err(StoreError::ReadOnly { .. })));
        });
    }
}

/// What was cut off may be cached: a store that has it as zeroes would be another than the one that guests are served.
#[test]
fn a_file_that_was_cut_is_not_made_larger() {
    let folder = folder();
    let path = disk(folder.path(), "d", 65536);
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &name(&path), &StoreOptions::default()).await.unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(16384).unwrap();
        for size in [8192, 16384, 32768, 65536, 131_072] {
            let error = store.grow(size).await.unwrap_err();
            assert!(matches!(error, StoreError::Shrunk { was_bytes: 65536, now_bytes: 16384, .. }), "{size}: {error}");
        }
        assert_eq!((store.info().size_bytes, path.metadata().unwrap().len()), (65536, 16384));
        // Put back by whoever cut it.
        std::fs::File::options().write(true).open(&path).unwrap().set_len(65536).unwrap();
        assert_eq!(store.grow(131_072).await.unwrap(), 131_072);
    });
}

#[test]
fn one_file_has_one_identity_by_whatever_name() {
    let folder = folder();
    let path = disk(folder.path(), "d", 4096);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    on(EngineMode::Auto, move |shard| async move {
        let options = StoreOptions { read_only: true, ..StoreOptions::default() };
        let by_link = open(&shard, &name(&link), &options).await.unwrap();
        let by_path = open(&shard, &format!("file:{}", name(&path)), &options).await.unwrap();
        assert_eq!(by_link.info().identity, by_path.info().identity);
    });
}

#[test]
fn ranges_beyond_the_store_are_refused() {
    let folder = folder();
    let path = name(&disk(folder.path(), "d", 8192));
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &path, &StoreOptions::default()).await.unwrap();
        let mut random = Random(3);
        for (offset, len) in [(8192, 512), (8191, 2), (u64::MAX - 511, 512), (4096, 8192)] {
            let data = random.bytes(len);
            assert!(matches!(write(&store, offset, &data, false).await, Err(StoreError::OutOfRange { .. })));
            assert!(matches!(read(&store, offset, len).await, Err(StoreError::OutOfRange { .. })));
            assert!(matches!(store.discard(offset, len as u64).await, Err(StoreError::OutOfRange { .. })));
            let zeroed = store.write_zeroes(offset, len as u64, true).await;
            assert!(matches!(zeroed, Err(StoreError::OutOfRange { .. })));
            assert!(matches!(store.extents(offset, len as u64, 9).await, Err(StoreError::OutOfRange { .. })));
        }
        assert!(matches!(store.discard(512, u64::MAX - 511).await, Err(StoreError::OutOfRange { .. })));
        assert!(read(&store, 0, 8192).await.unwrap().iter().all(|b| *b == 0));
    });
}

#[test]
fn a_file_says_where_its_data_is() {
    let folder = folder();
    let path = disk(folder.path(), "d", 4 << 20);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[7; 65536], 1 << 20).unwrap();
    file.write_all_at(&[7; 65536], 3 << 20).unwrap();
    let path = name(&path);
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &path, &StoreOptions::default()).await.unwrap();
        let found = store.extents(0, 4 << 20, 100).await.unwrap();
        let spans: Vec<_> = found.iter().map(|extent| (extent.len_bytes, extent.hole)).collect();
        let (mib, piece) = (1 << 20, 65536);
        assert_eq!(
            spans,
            [(mib, true), (piece, false), (2 * mib - piece, true), (piece, false), (mib - piece, true)],
            "the file system keeps holes of 64 KiB"
        );
        assert!(found.iter().all(|extent| extent.hole == extent.zero));
        // From the middle, only so many, and not beyond what was asked for.
        let some = store.extents(mib + 512, mib, 1).await.unwrap();
        assert_eq!(some, [prestage_cache::backend::Extent::data(piece - 512)]);
        let some = store.extents(mib + 512, 512, 9).await.unwrap();
        assert_eq!(some, [prestage_cache::backend::Extent::data(512)]);
    });
}
