//! Machines saved as templates and clones started from them, by the real daemon on a real libvirt with real guests.
// Helpers of tests, which clippy takes for production code.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prestage_tests::clean::on_exit;
use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::process::{run, wait_until};
use prestage_tests::template::{TemplateGuest, TemplateRig};
use serde_json::Value;

const SIZES: TemplateGuest = TemplateGuest { memory_mib: 160, set_mib: 12, rest_mib: 36 };

fn daemon(rig: &TemplateRig) -> Prestaged {
    let uri = Some(rig.libvirt.uri().to_owned());
    let small = |mib: &str| format!("{mib}MiB");
    let (ram_size, ssd_size) = (small("64"), small("128"));
    Prestaged::start(&DaemonOptions { libvirt_uri: uri, ram_size, ssd_size, ..DaemonOptions::default() }).unwrap()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Sums of a field of the lines of `/proc/PID/smaps` that belong to mappings of `file`, of every QEMU that has one, in KiB.
fn smaps(file: &Path, field: &str) -> Vec<u64> {
    let file = text(file);
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(smaps) = std::fs::read_to_string(entry.path().join("smaps")) else { continue };
        let (mut ours, mut sum, mut any) = (false, 0, false);
        for line in smaps.lines() {
            match line.split_once(':') {
                // a mapping's first line has its addresses before its first blank
                _ if line.split(' ').next().is_some_and(|word| word.contains('-')) => {
                    ours = line.ends_with(&file);
                    any |= ours;
                }
                Some((name, value)) if ours && name == field => {
                    sum += value.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
                }
                _ => {}
            }
        }
        if any {
            found.push(sum);
        }
    }
    found
}

/// Where the daemon keeps templates that are named without a folder.
fn templates(daemon: &Prestaged) -> PathBuf {
    let config = std::fs::read_to_string(daemon.config()).unwrap();
    let state = config.lines().find_map(|line| line.strip_prefix("state_dir = ")).unwrap();
    Path::new(state.trim_matches('"')).join("templates")
}

/// Names in a folder that begin with a dot, as those of drafts do.
fn hidden(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

/// What is read for a clone, by `vm show`.
fn progress(daemon: &Prestaged, vm: &str) -> Value {
    daemon.ctl(&["vm", "show", vm]).unwrap()["clone"].clone()
}

fn refused(daemon: &Prestaged, words: &[&str]) -> String {
    daemon.ctl(words).expect_err("it was done").to_string()
}

#[test]
fn clones_have_the_memory_share_it_and_learn_what_they_need() {
    let rig = TemplateRig::new().unwrap();
    let mut daemon = daemon(&rig);
    let network = "<interface type='user'><mac address='52:54:00:00:00:07'/><model type='virtio'/></interface>";
    let (mut source, sum) = rig.guest("source", SIZES, network).unwrap();
    let folder = rig.template("first");
    let path = text(&folder);
    let saved = daemon.ctl(&["vm", "save-template", "source", "--to", &path]).unwrap();
    println!("{saved}");
    assert_eq!(source.state().unwrap(), "running");
    assert_eq!(source.ask("sum").unwrap(), sum, "the machine goes on as it was");
    assert_eq!(source.ask("write").unwrap(), "done");
    assert!(saved["used_bytes"].as_u64().unwrap() > 48 << 20, "{saved}");
    assert!(refused(&daemon, &["vm", "save-template", "source", "--to", &path]).contains("exists already"));

    // The first clone is read as the machine was, and teaches.
    let started = daemon.ctl(&["vm", "start-from-template", &path, "--name", "one"]).unwrap();
    println!("{started}");
    assert_eq!(started["progress"]["phase"], "learning", "{started}");
    let mut one = rig.console("one").unwrap();
    assert!(started["notes"].to_string().contains("unplugged"), "{started}");
    let xml = rig.libvirt.virsh(&["dumpxml", "one"]).unwrap();
    assert!(xml.contains("<mac address=") && !xml.contains("52:54:00:00:00:07"), "{xml}");
    let info = rig.libvirt.virsh(&["qemu-monitor-command", "one", "--hmp", "info network"]).unwrap();
    println!("{info}");
    assert_eq!(one.ask("sum").unwrap(), sum, "the clone has the memory as it was saved");
    let shown = progress(&daemon, "one");
    assert_eq!((&shown["template"], &shown["read_errors"]), (&path.as_str().into(), &0.into()), "{shown}");
    let listed = daemon.ctl(&["vm", "list"]).unwrap();
    let row = listed["vms"].as_array().unwrap().iter().find(|vm| vm["name"] == "one").unwrap().clone();
    assert_eq!(row["clone"]["template"], path, "{row}");
    let learned = || Ok(progress(&daemon, "one")["phase"] != "learning");
    wait_until("the end of learning", Duration::from_secs(60), learned).unwrap();
    assert_eq!(progress(&daemon, "one")["notes"], Value::Null, "nothing stood against it");
    let learned = std::fs::read_to_string(folder.join("working-set.json")).unwrap();
    assert!(learned.contains("first_touch"), "{}", &learned[..80]);

    // The second is read in that order; it needs less than all.
    let words = ["vm", "start-from-template", &path, "--name", "two", "--wait", "--verify"];
    let second = daemon.ctl(&words).unwrap();
    println!("{second}");
    assert_eq!(second["progress"]["phase"], "done");
    let bytes = |name: &str| second["progress"][name].as_u64().unwrap();
    assert_eq!((bytes("needed_done_bytes"), bytes("rest_done_bytes")), (bytes("needed_bytes"), bytes("rest_bytes")));
    assert!(bytes("needed_bytes") > 12 << 20 && bytes("rest_bytes") > 12 << 20, "{second}");
    let mut two = rig.console("two").unwrap();
    assert_eq!(two.ask("sum").unwrap(), sum);
    let uuid = |of: &Value| of["uuid"].as_str().unwrap().to_owned();
    assert_ne!(uuid(&started), uuid(&second));

    // Both map the same pages, each has what it wrote.
    let state = folder.join("state");
    let (rss, pss) = (smaps(&state, "Rss"), smaps(&state, "Pss"));
    println!("KiB of {}: resident {rss:?}, by share {pss:?}", state.display());
    assert_eq!(rss.len(), 2);
    assert!(pss.iter().sum::<u64>() * 10 < rss.iter().sum::<u64>() * 7, "{rss:?} {pss:?}");
    assert_eq!(two.ask("write").unwrap(), "done");
    assert_eq!(one.ask("sum").unwrap(), sum, "what one clone writes no other sees");
    assert_ne!(two.ask("sum").unwrap(), sum);

    // A set that is damaged is said, not used, and learned anew.
    let set = folder.join("working-set.json");
    let good = std::fs::read(&set).unwrap();
    std::fs::write(&set, &good[..good.len() / 2]).unwrap();
    let third = daemon.ctl(&["vm", "start-from-template", &path, "--name", "three"]).unwrap();
    let mut three = rig.console("three").unwrap();
    assert_eq!(three.ask("sum").unwrap(), sum);
    assert!(third["progress"]["notes"][0].as_str().unwrap().contains("recorded anew"), "{third}");
    assert!(third["progress"]["needed_bytes"].as_u64().unwrap() < 8 << 20, "devices alone: {third}");
    wait_until(
        "the end of learning",
        Duration::from_secs(60),
        || Ok(progress(&daemon, "three")["phase"] != "learning"),
    )
    .unwrap();
    assert!(std::fs::read_to_string(&set).unwrap().contains("first_touch"));
    drop(three);

    assert!(refused(&daemon, &["vm", "start-from-template", &path, "--name", "two"]).contains("already"));
    assert!(refused(&daemon, &["vm", "save-template", "two", "--to", "again"]).contains("is itself a clone"));
    assert_eq!((one.state().unwrap(), two.state().unwrap()), ("running".into(), "running".into()));
    daemon.stop().unwrap();
    assert_eq!(one.ask("sum").unwrap(), sum, "clones need no daemon");

    // After a restart clones are still called so, and their template is kept.
    daemon.resume().unwrap();
    let shown = progress(&daemon, "one");
    assert_eq!((&shown["template"], &shown["phase"]), (&path.as_str().into(), &"done".into()), "{shown}");
    assert!(shown["notes"][0].as_str().unwrap().contains("prestaged was restarted"), "{shown}");
    assert_eq!(progress(&daemon, "source"), Value::Null);
    let said = refused(&daemon, &["template", "remove", &path]);
    assert!(said.contains("has clones that run: ") && said.contains("one"), "{said}");
    let named = daemon.ctl(&["vm", "save-template", "source", "--to", "named"]).unwrap();
    let list = daemon.ctl(&["template", "list"]).unwrap();
    let row = list["templates"].as_array().unwrap().iter().find(|row| row["name"] == "named").unwrap();
    assert_eq!((&row["machine"], &row["clones"]), (&"source".into(), &serde_json::json!([])), "{list}");
    assert_eq!((&row["path"], &row["learned"]), (&named["template"], &false.into()), "{list}");
    daemon.ctl(&["template", "remove", "named"]).unwrap();
    assert!(!Path::new(named["template"].as_str().unwrap()).exists());
    for clone in ["one", "two"] {
        rig.libvirt.virsh(&["destroy", clone]).unwrap();
    }
    daemon.ctl(&["template", "remove", &path]).unwrap();
    assert!(!folder.exists());
    assert!(refused(&daemon, &["template", "remove", &path]).contains("there is no template"));
}

#[test]
fn what_can_not_be_used_is_refused_in_words_and_leaves_nothing() {
    let rig = TemplateRig::new().unwrap();
    let daemon = daemon(&rig);
    let image = rig.folder.join("disk.raw");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let disk = format!("<disk type='file'><source file='{}'/><target dev='vdb' bus='virtio'/></disk>", text(&image));
    let (mut written, _) = rig.guest("written", SIZES, &disk).unwrap();
    let path = text(&rig.template("written"));
    let said = refused(&daemon, &["vm", "save-template", "written", "--to", &path]);
    assert!(said.contains("`vdb` is writable"), "{said}");
    assert!(refused(&daemon, &["vm", "save-template", "nobody"]).contains("no VM"));
    assert_eq!(written.state().unwrap(), "running");
    written.ask("sum").unwrap();
    drop(written);

    let (mut source, sum) = rig.guest("source", SIZES, "").unwrap();
    // a disk that is full
    let small = rig.folder.join("small");
    std::fs::create_dir(&small).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"]).arg(&small)).unwrap();
    let undone = small.clone();
    let mounted = on_exit(move || drop(run(Command::new("umount").arg(&undone))));
    let said = refused(&daemon, &["vm", "save-template", "source", "--to", &text(&small.join("web"))]);
    println!("{said}");
    assert!(said.contains("is full: free some space there, or save to another folder"), "{said}");
    assert_eq!(std::fs::read_dir(&small).unwrap().count(), 0, "nothing is left");
    assert_eq!(hidden(&templates(&daemon)), [""; 0], "nor on record");
    assert_eq!(source.state().unwrap(), "running");
    assert_eq!(source.ask("sum").unwrap(), sum);
    let notes = rig.libvirt.virsh(&["dumpxml", "source"]).unwrap();
    assert!(!notes.contains("xmlns/template"), "{notes}");
    drop(mounted);
    std::fs::remove_dir(&small).unwrap();
    // a folder that can't be made
    let said = refused(&daemon, &["vm", "save-template", "source", "--to", &text(&image.join("x"))]);
    assert!(said.contains("cannot make"), "{said}");
    let path = text(&rig.template("good"));
    daemon.ctl(&["vm", "save-template", "source", "--to", &path]).unwrap();
    let start = |path: &str| refused(&daemon, &["vm", "start-from-template", path, "--name", "clone"]);
    assert!(start(&text(&rig.folder.path().join("nowhere"))).contains("no template"));
    assert!(start("/nowhere").contains("`daemon.template_dirs`"));
    assert!(start(&text(rig.folder.path())).contains("not a template"));
    let state = rig.template("good").join("state");
    let file = std::fs::OpenOptions::new().write(true).open(&state).unwrap();
    let size = file.metadata().unwrap().len();
    file.write_all_at(b"damage", size - 1000).unwrap();
    assert!(start(&path).contains("checksum of state"));
    file.set_len(size / 2).unwrap();
    assert!(start(&path).contains("bytes, it had"));
    let domains = rig.libvirt.virsh(&["list", "--name"]).unwrap();
    assert_eq!(domains.split_whitespace().collect::<Vec<_>>(), ["source"]);
    let left: Vec<_> = std::fs::read_dir(rig.folder.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_daemon_that_is_killed_leaves_no_machine_paused_and_no_half_template() {
    let rig = TemplateRig::new().unwrap();
    let mut daemon = daemon(&rig);
    let (mut source, sum) = rig.guest("source", SIZES, "").unwrap();
    let path = text(&rig.template("cut"));

    // What it leaves when it is killed while the machine stands: marked and paused. The state is written within a tenth of a
    // second, too short to hit; so the same is made by hand.
    daemon.crash().unwrap();
    let mark = |vm: &str, word: &str| {
        let uri = "https://prestage.dev/xmlns/template/1";
        let set = ["metadata", vm, "--live", "--uri", uri, "--key", "prestage", "--set", word];
        rig.libvirt.virsh(&set).unwrap();
    };
    mark("source", "<saving template=''/>");
    rig.libvirt.virsh(&["suspend", "source"]).unwrap();
    daemon.resume().unwrap();
    wait_until("the machine to go on", Duration::from_secs(20), || Ok(source.state()? == "running")).unwrap();
    assert_eq!(source.ask("sum").unwrap(), sum);

    // So are drafts: one where templates usually are, and one elsewhere.
    daemon.crash().unwrap();
    let usual = templates(&daemon);
    let drafts = [usual.join(".web.draft"), rig.folder.join(".web.draft")];
    for draft in &drafts {
        std::fs::create_dir_all(draft).unwrap();
        std::fs::write(draft.join("state"), "half").unwrap();
    }
    std::os::unix::fs::symlink(&drafts[1], usual.join(".1-0.draft")).unwrap();
    daemon.resume().unwrap();
    assert_eq!((hidden(&usual), hidden(rig.folder.path())), (Vec::new(), Vec::new()));

    // Killed at any time while it saves: by its next start all is as it was, or the template is whole.
    for after in [5, 60, 240, 700, 2000] {
        let (_, _) = (rig.libvirt.virsh(&["domstate", "source"]).unwrap(), std::fs::remove_dir_all(&path));
        let saving = std::thread::scope(|scope| {
            let saving = scope.spawn(|| daemon.ctl(&["vm", "save-template", "source", "--to", &path]).is_ok());
            std::thread::sleep(Duration::from_millis(after));
            let pid = Pid::from_raw(daemon.pid().unwrap());
            kill(pid, Signal::SIGKILL).unwrap();
            saving.join().unwrap()
        });
        daemon.crash().unwrap();
        daemon.resume().unwrap();
        wait_until("the machine to go on", Duration::from_secs(30), || Ok(source.state()? == "running")).unwrap();
        assert_eq!((hidden(&usual), hidden(rig.folder.path())), (Vec::new(), Vec::new()), "killed after {after} ms");
        let whole = Path::new(&path).join("manifest.json").exists();
        println!("killed after {after} ms: answered {saving}, template {whole}");
        if whole {
            assert!(std::fs::read_dir(&path).unwrap().count() == 4);
            let began = Instant::now();
            daemon.ctl(&["vm", "start-from-template", &path, "--name", "clone", "--verify"]).unwrap();
            assert_eq!(rig.console("clone").unwrap().ask("sum").unwrap(), sum, "{:?}", began.elapsed());
        }
    }
    assert_eq!(source.ask("sum").unwrap(), sum);

    // A clone that did not get to run ends.
    let _ = std::fs::remove_dir_all(&path);
    daemon.ctl(&["vm", "save-template", "source", "--to", &path]).unwrap();
    // Killed at any time while it starts one: by its next start the clone runs, or is gone.
    for after in [20, 150, 300, 450] {
        let started = std::thread::scope(|scope| {
            let starting = scope.spawn(|| daemon.ctl(&["vm", "start-from-template", &path, "--name", "clone"]).is_ok());
            std::thread::sleep(Duration::from_millis(after));
            kill(Pid::from_raw(daemon.pid().unwrap()), Signal::SIGKILL).unwrap();
            starting.join().unwrap()
        });
        daemon.crash().unwrap();
        daemon.resume().unwrap();
        // libvirt may be at it still, and bring it later than the daemon is there
        std::thread::sleep(Duration::from_secs(1));
        let settled = || Ok(rig.libvirt.virsh(&["domstate", "clone"]).map_or(true, |state| state.trim() == "running"));
        wait_until("the clone to run or to be gone", Duration::from_secs(30), settled).unwrap();
        let runs = rig.libvirt.virsh(&["domstate", "clone"]).is_ok();
        println!("killed after {after} ms: answered {started}, runs {runs}");
        if started || runs {
            assert_eq!(rig.console("clone").unwrap().ask("sum").unwrap(), sum);
        }
    }
    daemon.ctl(&["vm", "start-from-template", &path, "--name", "clone"]).unwrap();
    daemon.crash().unwrap();
    rig.libvirt.virsh(&["suspend", "clone"]).unwrap();
    mark("clone", "<starting template=''/>");
    daemon.resume().unwrap();
    let gone = || Ok(!rig.libvirt.virsh(&["list", "--all", "--name"])?.contains("clone"));
    wait_until("the clone's end", Duration::from_secs(20), gone).unwrap();
}
