//! The systemd unit, and what the daemon tells a service manager.

use super::front::LIMIT;
use super::host::Host;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;

fn unit() -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../packaging/prestaged.service");
    std::fs::read_to_string(path).unwrap()
}

/// What a key of the unit is set to, without comments.
fn set<'a>(unit: &'a str, key: &str) -> Vec<&'a str> {
    unit.lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(name, _)| *name == key)
        .map(|(_, value)| value)
        .collect()
}

#[test]
fn the_unit_has_what_the_daemon_counts_on_in_every_systemd_that_is_supported() {
    let unit = unit();
    let is = |key: &str, value: &str| assert_eq!(set(&unit, key), [value], "{key}");
    // notify-reload came with systemd 253: an older one would take the service for one that does not tell of itself (Type=simple).
    is("Type", "notify");
    // The main process is another one after an upgrade.
    is("ExecReload", "/bin/kill -HUP $MAINPID");
    is("ExecStart", "/usr/bin/prestaged --config /etc/prestage/prestaged.toml");
    is("Restart", "always");
    // A qemu-storage-daemon and the broker outlive the daemon's orderly end.
    is("KillMode", "mixed");
    // Hypervisors find their sockets again.
    is("RuntimeDirectoryPreserve", "restart");
    is("LimitMEMLOCK", "infinity");
    for folder in ["RuntimeDirectory", "StateDirectory", "CacheDirectory"] {
        is(folder, "prestage");
    }
    let patience: u64 = set(&unit, "TimeoutStopSec")[0].parse().unwrap();
    assert!(patience >= 60, "a stop writes what is on its way to the SSD tier");
    // Nobody but the main process is heard: that is what MAINPID= changes.
    assert!(set(&unit, "NotifyAccess").is_empty());
    let (folder, program) = (tempfile::tempdir().unwrap(), env!("CARGO_BIN_EXE_prestaged"));
    let file = folder.path().join("prestaged.service");
    // Verified with a program that is there.
    std::fs::write(&file, unit.replace("/usr/bin/prestaged", program)).unwrap();
    match Command::new("systemd-analyze").arg("verify").arg(&file).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let of_unit: Vec<_> = said.lines().filter(|line| line.contains("prestaged.service")).collect();
            assert!(of_unit.is_empty(), "{said}");
        }
        Err(_) => println!("SKIPPED in part: no systemd-analyze here"),
    }
}

#[test]
fn a_service_manager_is_told_of_the_start_and_of_each_reload() {
    let mut host = Host::new();
    let manager = UnixDatagram::bind(host.path("notify")).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let hear = || {
        let mut buffer = [0; 4096];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    host.environment.push(("NOTIFY_SOCKET".to_owned(), host.path("notify").display().to_string()));
    host.start("");
    assert_eq!(hear().trim(), "READY=1");
    host.reload();
    let said = hear();
    assert!(said.lines().any(|line| line == "RELOADING=1"), "{said}");
    // By which the manager tells this reload from another (sd_notify(3)).
    let when = said.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")).unwrap_or_else(|| panic!("{said}"));
    assert!(when.parse::<u64>().unwrap() > 0);
    assert_eq!(hear().trim(), "READY=1");
    host.stop();
    assert_eq!(hear().trim(), "STOPPING=1");
}
