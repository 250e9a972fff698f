//! What the SSD tier of a killed daemon is worth to its successor, and that it is never stale.

use super::{Guest, Host, LIMIT};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

const BLOCK: u64 = 1 << 16;
/// What one mark takes along.
const REGION: u64 = 64 << 20;
/// Blocks read in each region.
const READ: u64 = 24;

/// What a block of a store holds at first; it tells blocks and stores apart.
fn content(store: u8, block: u64) -> Vec<u8> {
    let word = (block * 256 + u64::from(store) + 1).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK as usize).collect()
}

struct Rig {
    host: Host,
    settings: String,
}

impl Rig {
    /// A disk `d` to write to and a golden image `g`, three regions each.
    fn new() -> Rig {
        let host = Host::new();
        let mut settings = format!(
            "ssd_path = \"{}\"\nssd_size = \"256MiB\"\n[prefetch]\nenabled = false\n",
            host.path("ssd").display()
        );
        for (store, name) in [(0, "d"), (1, "g")] {
            let path = host.store(name, 3 * REGION);
            let file = File::options().write(true).open(&path).unwrap();
            for block in (0..3).flat_map(|region| (0..READ).map(move |i| region * REGION / BLOCK + i)) {
                file.write_all_at(&content(store, block), block * BLOCK).unwrap();
            }
            file.sync_all().unwrap();
            let read_only = store == 1;
            settings += &format!("[[disk]]\nname = \"{name}\"\nstore = \"{path}\"\nread_only = {read_only}\n");
        }
        let mut rig = Rig { host, settings };
        rig.start();
        rig
    }

    fn start(&mut self) {
        let settings = self.settings.clone();
        self.host.start(&settings);
    }

    fn kill(&mut self) {
        let mut daemon = self.host.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    fn json(&self, words: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend_from_slice(words);
        serde_json::from_str(&self.host.does(&all)).unwrap()
    }

    fn recovery(&self, what: &str) -> u64 {
        self.json(&["status"])["cache"]["ssd_recovery"][what].as_u64().unwrap()
    }

    fn served(&self, by: &str) -> u64 {
        self.json(&["cache", "stat"])["total"][by].as_u64().unwrap()
    }

    fn wait(&self, what: &str, done: impl Fn(&Rig) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !done(self) {
            assert!(Instant::now() < deadline, "{what}: {}\n{}", self.host.does(&["cache", "tiers"]), self.host.log());
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    /// Reads the first blocks of every region of both disks until the SSD tier has them on record.
    fn warm(&self) {
        for name in ["d", "g"] {
            let mut guest = front(&self.host, name);
            for at in (0..3).flat_map(|region| (0..READ).map(move |i| region * REGION + i * BLOCK)) {
                guest.read(at, BLOCK as usize);
            }
        }
        self.wait("blocks on the SSD", |rig| rig.json(&["status"])["cache"]["ssd_used_bytes"] == 6 * READ * BLOCK);
        // A mark is cleared by the checkpoint that has records written.
        let mut guest = front(&self.host, "d");
        guest.write_all(2 * REGION + (READ - 1) * BLOCK, &content(0, 2 * REGION / BLOCK + READ - 1));
        assert_eq!(self.recovery("marked_regions"), 1, "on the disk before the guest was told");
        self.wait("a checkpoint", |rig| rig.recovery("marked_regions") == 0);
    }
}

/// The golden image is not to be written to.
fn front(host: &Host, disk: &str) -> Guest {
    if disk == "g" { Guest::reading(host, disk) } else { Guest::start(host, disk) }
}

fn expect(guest: &mut Guest, offset: u64, expected: &[u8]) {
    let found = guest.read(offset, expected.len());
    assert!(found == expected, "at {offset}: {:?} instead of {:?}", &found[..16], &expected[..16]);
}

#[test]
fn after_sigkill_the_ssd_serves_at_once_what_is_true_and_drops_what_was_being_written() {
    let mut rig = Rig::new();
    rig.warm();
    // Under load: the first region is written to until the end.
    let mut guest = front(&rig.host, "d");
    for i in 0..200u64 {
        guest.write_all(i % READ * BLOCK, &content(7, i));
    }
    rig.kill();
    drop(guest);
    rig.start();
    let dropped = rig.recovery("dropped_written");
    let kept = rig.recovery("kept_blocks");
    assert!(dropped >= READ && kept >= 4 * READ, "kept {kept}, dropped {dropped}: {}", rig.host.log());
    let status = rig.host.does(&["status"]);
    assert!(status.contains("after a crash; dropped: ") && status.contains("being written to"), "{status}");
    for (store, name) in [(0, "d"), (1, "g")] {
        let mut guest = front(&rig.host, name);
        for region in 0..3 {
            for i in 0..READ {
                let block = region * REGION / BLOCK + i;
                // The last to be written to it.
                let now = (0..200).rev().find(|n| n % READ == i).unwrap();
                let written = store == 0 && region == 0;
                expect(&mut guest, block * BLOCK, &if written { content(7, now) } else { content(store, block) });
            }
        }
    }
    let served = rig.served("served_ssd");
    println!("kept {kept} blocks, dropped {dropped}; {served} of {} reads from the SSD after SIGKILL", 6 * READ);
    assert!(served >= 4 * READ, "{served} reads from the SSD");
    rig.host.stop();
    assert_eq!(rig.host.log().matches("SSD tier recovered").count(), 1, "{}", rig.host.log());
}

#[test]
fn a_store_that_was_changed_while_the_daemon_was_down_is_read_anew_and_said_once() {
    let mut rig = Rig::new();
    rig.warm();
    rig.kill();
    let path = rig.host.path("d");
    File::options().write(true).open(&path).unwrap().write_all_at(&content(9, 0), 0).unwrap();
    rig.start();
    assert!(rig.recovery("dropped_changed_store") >= 2 * READ, "{}", rig.host.does(&["status"]));
    let mut guest = front(&rig.host, "d");
    expect(&mut guest, 0, &content(9, 0));
    expect(&mut guest, REGION, &content(0, REGION / BLOCK));
    drop(guest);
    let mut guest = front(&rig.host, "g");
    expect(&mut guest, 0, &content(1, 0));
    drop(guest);
    assert_eq!(rig.served("served_ssd"), 1, "the golden image is what it was");
    assert_eq!(rig.host.log().matches("changed while nobody watched").count(), 1, "{}", rig.host.log());
    rig.host.stop();
}

/// After a loss of power nobody knows when we last wrote: the run directory is gone.
#[test]
fn after_a_loss_of_power_what_was_not_written_to_survives() {
    let mut rig = Rig::new();
    rig.warm();
    let mut guest = front(&rig.host, "d");
    guest.write_all(0, &content(7, 0));
    rig.kill();
    drop(guest);
    std::fs::remove_file(rig.host.path("run/ssd.own")).unwrap();
    rig.start();
    let mut guest = front(&rig.host, "g");
    (0..READ).for_each(|i| expect(&mut guest, i * BLOCK, &content(1, i)));
    drop(guest);
    assert_eq!(rig.served("served_ssd"), READ);
    let mut guest = front(&rig.host, "d");
    expect(&mut guest, 0, &content(7, 0));
    expect(&mut guest, REGION, &content(0, REGION / BLOCK));
    drop(guest);
    assert_eq!(rig.served("served_ssd"), READ, "of the other nobody can tell");
    rig.host.stop();
}

#[test]
fn a_slab_of_a_killed_daemon_that_was_cut_short_or_rotted_serves_nothing_wrong() {
    let mut rig = Rig::new();
    rig.warm();
    rig.kill();
    let slab = File::options().read(true).write(true).open(rig.host.path("ssd")).unwrap();
    // A bit of every tenth page of the first slots, and of some records; then the end is gone.
    let data = (4 << 20) + (256 << 10);
    for at in
        (0..60 * BLOCK).step_by(40_960).map(|at| data + at).chain((0..64).step_by(7).map(|i| (4 << 20) + i * 64 + 9))
    {
        let mut byte = [0];
        slab.read_exact_at(&mut byte, at).unwrap();
        slab.write_all_at(&[byte[0] ^ 4], at).unwrap();
    }
    slab.set_len(data + 100 * BLOCK).unwrap();
    drop(slab);
    rig.start();
    for (store, name) in [(0, "d"), (1, "g")] {
        let mut guest = front(&rig.host, name);
        for block in (0..3).flat_map(|region| (0..READ).map(move |i| region * REGION / BLOCK + i)) {
            expect(&mut guest, block * BLOCK, &content(store, block));
        }
    }
    let (served, overtaken) = (rig.served("served_ssd"), rig.recovery("dropped_overtaken"));
    assert!(served >= 20 && overtaken >= 40, "{served} from the SSD, {overtaken} whose checksum was wrong");
    assert!(rig.recovery("dropped_damaged") >= 40, "{}", rig.host.does(&["status"]));
    rig.host.stop();
}

/// Answers as long as it lives; nothing shows a change of what it serves.
struct NbdServer(Child);

impl NbdServer {
    fn start(host: &Host, file: &str) -> NbdServer {
        let socket = host.path("nbd.sock");
        let child = Command::new("qemu-nbd")
            .args(["--persistent", "--shared=0", "--format=raw", "--cache=writeback", "--socket"])
            .arg(&socket)
            .arg(file)
            .spawn()
            .unwrap();
        let server = NbdServer(child);
        let deadline = Instant::now() + LIMIT;
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < deadline, "qemu-nbd does not answer");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        server
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        println!("not tested: {program} is not installed");
    }
    found
}

#[test]
fn a_run_without_the_ssd_tier_costs_what_it_had_of_stores_that_show_no_changes() {
    if !has("qemu-nbd") {
        return;
    }
    let host = Host::new();
    let file = host.store("n", REGION);
    File::options().write(true).open(&file).unwrap().write_all_at(&content(0, 0), 0).unwrap();
    let _server = NbdServer::start(&host, &file);
    let ssd = format!("ssd_path = \"{}\"\nssd_size = \"64MiB\"\n", host.path("ssd").display());
    let disk = format!(
        "[prefetch]\nenabled = false\n[[disk]]\nname = \"n\"\nstore = \"nbd+unix:///?socket={}\"\n",
        host.path("nbd.sock").display()
    );
    let mut rig = Rig { host, settings: format!("{ssd}{disk}") };
    rig.start();
    let mut guest = front(&rig.host, "n");
    (0..READ).for_each(|i| _ = guest.read(i * BLOCK, BLOCK as usize));
    rig.wait("blocks on the SSD", |rig| rig.json(&["status"])["cache"]["ssd_used_bytes"] == READ * BLOCK);
    drop(guest);
    rig.host.stop();
    // With the tier all the time: kept.
    rig.start();
    expect(&mut front(&rig.host, "n"), 0, &content(0, 0));
    assert_eq!((rig.served("served_ssd"), rig.recovery("dropped_unvouched")), (1, 0));
    rig.kill();
    rig.host.start(&disk);
    front(&rig.host, "n").write_all(0, &content(5, 0));
    rig.kill();
    rig.start();
    expect(&mut front(&rig.host, "n"), 0, &content(5, 0));
    assert_eq!((rig.served("served_ssd"), rig.recovery("dropped_unvouched")), (0, READ));
    let status = rig.host.does(&["status"]);
    assert!(status.contains("of stores that a run without the SSD may have changed"), "{status}");
    rig.host.stop();
    assert_eq!(rig.host.log().matches("ran without it, or with another").count(), 1, "{}", rig.host.log());
}

fn run(program: &str, arguments: &[&str]) {
    assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program} {arguments:?}");
}

/// An image, the image below it and one that only QEMU understands: each is a storage of its own.
#[test]
fn images_and_what_they_stand_on_survive_sigkill_and_are_read_anew_when_they_changed() {
    if !has("qemu-img") || !has("qemu-io") || !has("qemu-storage-daemon") {
        return;
    }
    const SIZE: u64 = 16 << 20;
    let host = Host::new();
    let raw = host.store("raw", SIZE);
    let file = File::options().write(true).open(&raw).unwrap();
    (0..SIZE / BLOCK).for_each(|block| file.write_all_at(&content(0, block), block * BLOCK).unwrap());
    let at = |name: &str| host.path(name).display().to_string();
    let (base, top, zstd) = (at("base"), at("top"), at("zstd"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &base]);
    run("qemu-img", &["convert", "-c", "-o", "compression_type=zstd", "-O", "qcow2", &raw, &zstd]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top]);
    let settings = format!(
        "ssd_path = \"{}\"\nssd_size = \"64MiB\"\n[prefetch]\nenabled = false\n[[disk]]\nname = \"t\"\n\
         store = \"qcow2:{top}?backing=qcow2:{base}\"\n[[disk]]\nname = \"g\"\nstore = \"qcow2:{zstd}\"\nread_only = true\n",
        host.path("ssd").display()
    );
    let mut rig = Rig { host, settings };
    rig.start();
    let mut guest = front(&rig.host, "t");
    // In the top, and flushed by a checkpoint, whose tables are its own doing.
    (0..READ).for_each(|i| guest.write_all(i * BLOCK, &content(3, i)));
    (0..2 * READ).for_each(|i| _ = guest.read(i * BLOCK, BLOCK as usize));
    let mut golden = front(&rig.host, "g");
    (0..READ).for_each(|i| _ = golden.read(i * BLOCK, BLOCK as usize));
    rig.wait("blocks on the SSD", |rig| rig.json(&["status"])["cache"]["ssd_used_bytes"] == 3 * READ * BLOCK);
    rig.wait("a checkpoint", |rig| rig.recovery("marked_regions") == 0);
    rig.kill();
    drop((guest, golden));
    rig.start();
    let check = |rig: &Rig, written: u8, below: u8, of_zstd: u8| {
        let mut guest = front(&rig.host, "t");
        (0..READ).for_each(|i| expect(&mut guest, i * BLOCK, &content(written, i)));
        (READ..2 * READ).for_each(|i| expect(&mut guest, i * BLOCK, &content(below, i)));
        drop(guest);
        let mut golden = front(&rig.host, "g");
        (0..READ).for_each(|i| expect(&mut golden, i * BLOCK, &content(of_zstd, i)));
        rig.served("served_ssd")
    };
    assert_eq!(check(&rig, 3, 0, 0), 3 * READ, "all of it: {}", rig.host.log());
    rig.kill();
    // Others write to the base, and put another image in the place of the third.
    (0..SIZE / BLOCK).for_each(|block| file.write_all_at(&content(6, block), block * BLOCK).unwrap());
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &base]);
    run("qemu-img", &["convert", "-c", "-o", "compression_type=zstd", "-O", "qcow2", &raw, &zstd]);
    rig.start();
    assert_eq!(check(&rig, 3, 6, 6), 0, "{}", rig.host.log());
    assert!(rig.recovery("dropped_changed_store") >= 3 * READ);
    rig.host.stop();
}
