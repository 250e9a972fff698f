//! A machine of libvirt's whose disk is an overlay on a base image: attached, booted, killed under, written to, and whole.

use std::process::Command;
use std::time::Duration;

use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::guest::{GuestDisk, STEP_LIMIT};
use prestage_tests::paths::Scratch;
use prestage_tests::process::{run, wait_until};
use prestage_tests::report::Line;
use prestage_tests::rig::Rig;

#[test]
fn a_guest_on_an_overlay_writes_while_the_daemon_is_killed_and_its_image_is_whole() {
    let rig = Rig::new().unwrap();
    let images = Scratch::large().unwrap();
    let (base, top) = (images.join("base.qcow2"), images.join("top.qcow2"));
    let qemu_img = |words: &[&str]| run(Command::new("qemu-img").args(words)).unwrap();
    let (base_name, top_name) = (base.display().to_string(), top.display().to_string());
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &rig.disk.display().to_string(), &base_name]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base_name, "-F", "qcow2", &top_name]);
    let before = std::fs::metadata(&base).unwrap().modified().unwrap();

    let guest = rig.guest("overlay", GuestDisk::Qcow2(top.clone()), &["prestage.rw", "prestage.write=16"]).unwrap();
    let mut daemon = Prestaged::start(&DaemonOptions {
        libvirt_uri: Some(rig.libvirt.uri().to_owned()),
        more: format!("[store]\nimage_folder = \"{}\"\n", base.parent().unwrap().display()),
        ..DaemonOptions::default()
    })
    .unwrap();
    let attached = daemon.ctl(&["vm", "attach", "overlay", "vda"]).unwrap();
    assert_eq!(attached["store"], format!("qcow2:{top_name}"), "{attached}");
    let name = attached["disk"].as_str().unwrap().to_owned();
    let shown = daemon.ctl(&["disk", "show", &name]).unwrap();
    assert_eq!(shown["images"].as_array().map(Vec::len), Some(2), "{shown}");

    let mut sums = Vec::new();
    for killed in [false, true] {
        let mut boot = guest.start().unwrap();
        if killed {
            // While it writes; the guest must not notice but by waiting.
            wait_until("writes of the guest", Duration::from_secs(600), || {
                let disk = daemon.ctl(&["disk", "show", &name])?;
                Ok(disk["counters"]["write_bytes"].as_u64() >= Some(4 << 20))
            })
            .unwrap();
            daemon.crash().unwrap();
            daemon.resume().unwrap();
        }
        let (_, (sum, bytes, path)) = boot
            .wait("the written file", STEP_LIMIT, |line| match line {
                Line::Wrote { sum, bytes, path } => Some((sum, bytes, path)),
                _ => None,
            })
            .unwrap();
        boot.wait_off().unwrap();
        assert_eq!(bytes, 16 << 20);
        sums.push((sum, path));
        if !killed {
            let counters = daemon.counters().unwrap();
            println!("{counters:?}");
            assert_eq!(counters.read_errors, 0);
            // Counted anew for the second boot.
            daemon.stop().unwrap();
            println!("{}", qemu_img(&["check", &top_name]));
            daemon.resume().unwrap();
        }
    }
    daemon.ctl(&["vm", "detach", "overlay", "vda"]).unwrap();
    daemon.stop().unwrap();

    // What the killed daemon had allocated and not put to use yet is lost room, which the repair of leaks alone gives back.
    let checked = Command::new("qemu-img").args(["check", "--output=json", &top_name]).output().unwrap();
    let found: serde_json::Value = serde_json::from_slice(&checked.stdout).unwrap();
    println!("{found}");
    assert!(matches!(checked.status.code(), Some(0 | 3)) && found["corruptions"].is_null(), "{found}");
    if checked.status.code() == Some(3) {
        qemu_img(&["check", "-r", "leaks", &top_name]);
        println!("{}", qemu_img(&["check", &top_name]));
    }
    assert_eq!(std::fs::metadata(&base).unwrap().modified().unwrap(), before, "nobody writes to the base");
    let raw = images.join("top.raw");
    qemu_img(&["convert", "-O", "raw", &top_name, &raw.display().to_string()]);
    let check = run(Command::new("e2fsck").args(["-f", "-n"]).arg(&raw)).unwrap();
    let (sum, path) = sums.pop().unwrap();
    let copy = rig.scratch.join("copy");
    run(Command::new("debugfs").arg("-R").arg(format!("dump {path} {}", copy.display())).arg(&raw)).unwrap();
    let found = run(Command::new("sha256sum").arg(&copy)).unwrap();
    assert_eq!(found.split(' ').next(), Some(sum.as_str()), "the image has the bytes that the guest saw: {check}");
}
