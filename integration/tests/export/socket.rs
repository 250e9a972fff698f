//! Where an export may listen, and who may connect.

use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};

use prestage_integration::export::{DiskConfig, Export, ExportError, ExportOptions};

use crate::disk::{LIMIT, MemoryDisk, Served, export_at, runner};
use crate::front::{FrontEnd, code};

fn small() -> DiskConfig {
    DiskConfig::new(1 << 20)
}

#[test]
fn a_path_that_a_live_server_holds_is_refused_and_the_server_unharmed() {
    let served = Served::new(small(), vec![0; 1 << 20]);
    let disk = MemoryDisk::new(vec![]);
    let error = Export::start(served.path(), small(), runner(&disk), &ExportOptions::default()).unwrap_err();
    assert!(matches!(error, ExportError::InUse { .. }), "{error}");
    UnixStream::connect(served.path()).unwrap();
}

#[test]
fn a_socket_left_by_a_dead_server_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let export = export_at(&path, small(), &MemoryDisk::new(vec![]));
    UnixStream::connect(&path).unwrap();
    export.stop();
    assert!(!path.exists(), "a stopped export takes its socket away");
}

#[test]
fn a_file_that_is_not_a_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    let error = Export::start(&path, small(), runner(&MemoryDisk::new(vec![])), &ExportOptions::default()).unwrap_err();
    assert!(matches!(error, ExportError::NotASocket { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn paths_too_long_or_without_a_directory_are_clear_errors() {
    let disk = MemoryDisk::new(vec![]);
    let start = |path: &str| Export::start(path, small(), runner(&disk), &ExportOptions::default()).unwrap_err();
    let error = start(&format!("/tmp/{}", "x".repeat(103)));
    assert!(matches!(error, ExportError::PathTooLong { len: 108, max: 107, .. }), "{error}");
    let error = start("/nonexistent/disk.sock");
    assert!(matches!(error, ExportError::Bind { .. }), "{error}");
    assert!(error.to_string().contains("/nonexistent/disk.sock"), "{error}");
    let bad = Export::start("/tmp/x", DiskConfig::new(100), runner(&disk), &ExportOptions::default()).unwrap_err();
    assert!(matches!(bad, ExportError::Config(_)), "{bad}");
}

#[test]
fn the_socket_has_the_mode_and_group_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.sock");
    let group = std::fs::metadata(directory.path()).unwrap().gid();
    let options = ExportOptions { mode: 0o600, owner: None, group: Some(group) };
    let export = Export::start(&path, small(), runner(&MemoryDisk::new(vec![])), &options).unwrap();
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!((meta.permissions().mode() & 0o777, meta.gid()), (0o600, group));
    assert_eq!(export.path(), path);
}

#[test]
fn a_second_front_end_is_turned_away_and_the_next_one_after_the_first_is_served() {
    let served = Served::new(small(), vec![0; 1 << 20]);
    let first = UnixStream::connect(served.path()).unwrap();
    served.disk.wait_for(|seen| seen.connected == 1);
    let mut second = UnixStream::connect(served.path()).unwrap();
    second.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(second.read(&mut [0; 1]).unwrap(), 0, "closed by the export");
    assert!(served.export().is_connected());
    drop(first);
    served.disk.wait_for(|seen| seen.disconnected == 1);
    let _third = UnixStream::connect(served.path()).unwrap();
    served.disk.wait_for(|seen| seen.connected == 2);
}

#[test]
fn an_export_stops_while_a_front_end_is_in_the_middle_of_a_message() {
    use std::io::Write;
    let mut served = Served::new(small(), vec![0; 1 << 20]);
    let mut half = UnixStream::connect(served.path()).unwrap();
    half.write_all(&[1, 0, 0, 0, 1]).unwrap();
    served.disk.wait_for(|seen| seen.connected == 1);
    served.export.take().unwrap().stop();
    assert_eq!(served.disk.seen().disconnected, 1);
    assert!(!served.path().exists());
}

#[test]
fn a_front_end_that_stalls_in_a_message_is_cut_off() {
    let served = Served::new(small(), vec![0; 1 << 20]);
    let mut half = FrontEnd::mute(&served.path());
    // A header that announces a payload which never comes whole.
    half.send_raw(&[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 7]).unwrap();
    assert!(half.is_cut_off());
    served.disk.wait_for(|seen| seen.disconnected == 1);
}

#[test]
fn a_front_end_that_never_reads_is_cut_off() {
    let served = Served::new(small(), vec![0; 1 << 20]);
    let mut deaf = FrontEnd::mute(&served.path());
    // Questions without end; the export stops reading them when its answers have no room.
    while deaf.send(code::GET_FEATURES, 0, &[], &[]).is_ok() {}
    served.disk.wait_for(|seen| seen.disconnected == 1);
}

#[test]
fn a_message_that_comes_in_pieces_is_understood() {
    let served = Served::new(small(), vec![0; 1 << 20]);
    let mut slow = FrontEnd::mute(&served.path());
    let message = [code::SET_OWNER, 1 | 1 << 3, 0].map(u32::to_ne_bytes).concat();
    let ask = [code::GET_FEATURES, 1, 0].map(u32::to_ne_bytes).concat();
    for byte in message.iter().chain(&ask[..11]) {
        slow.send_raw(&[*byte]).unwrap();
    }
    slow.send_raw(&ask[11..]).unwrap();
    let answer = slow.receive().unwrap();
    assert_eq!((answer.0, answer.1.len()), (code::GET_FEATURES, 8));
}

#[test]
fn three_hundred_disks_are_exported_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::new(vec![]);
    let exports: Vec<Export> =
        (0..300).map(|i| export_at(&directory.path().join(format!("{i}.sock")), small(), &disk)).collect();
    let peers: Vec<_> = exports.iter().map(|export| UnixStream::connect(export.path()).unwrap()).collect();
    disk.wait_for(|seen| seen.connected == 300);
    drop(peers);
    disk.wait_for(|seen| seen.disconnected == 300);
    exports.into_iter().for_each(Export::stop);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}
