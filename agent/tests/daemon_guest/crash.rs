//! What the SSD tier of a killed daemon is worth to its successor, and that it is never stale.

use super::{Guest, Host, LIMIT};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
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
            let mut guest = Guest::start(&self.host, name);
            (0..3).for_each(|region| (0..READ).for_each(|i| guest.read(region * REGION + i * BLOCK, BLOCK as usize)));
        }
        self.wait("blocks on the SSD", |rig| rig.json(&["status"])["cache"]["ssd_used_bytes"] == 6 * READ * BLOCK);
        // A mark is cleared by the checkpoint that has records written.
        let mut guest = Guest::start(&self.host, "d");
        guest.fill(&content(0, 2 * REGION / BLOCK + READ - 1));
        guest.write(2 * REGION + (READ - 1) * BLOCK, BLOCK as usize);
        assert_eq!(self.recovery("marked_regions"), 1, "on the disk before the guest was told");
        self.wait("a checkpoint", |rig| rig.recovery("marked_regions") == 0);
    }
}

impl Guest {
    fn fill(&mut self, bytes: &[u8]) {
        // SAFETY: the buffer is memory of this process, `BUFFER` bytes long and more than `bytes`, and no request is under
        // way.
        unsafe { std::slice::from_raw_parts_mut(self.buffer as *mut u8, bytes.len()) }.copy_from_slice(bytes);
    }

    fn reads(&mut self, offset: u64, expected: &[u8]) {
        self.read(offset, expected.len());
        // SAFETY: as in `fill`.
        let found = unsafe { std::slice::from_raw_parts(self.buffer as *const u8, expected.len()) };
        assert!(found == expected, "at {offset}: {:?} instead of {:?}", &found[..16], &expected[..16]);
    }
}

#[test]
fn after_sigkill_the_ssd_serves_at_once_what_is_true_and_drops_what_was_being_written() {
    let mut rig = Rig::new();
    rig.warm();
    // Under load: the first region is written to until the end.
    let mut guest = Guest::start(&rig.host, "d");
    for i in 0..200u64 {
        guest.fill(&content(7, i));
        guest.write(i % READ * BLOCK, BLOCK as usize);
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
        let mut guest = Guest::start(&rig.host, name);
        for region in 0..3 {
            for i in 0..READ {
                let block = region * REGION / BLOCK + i;
                // The last to be written to it.
                let now = (0..200).rev().find(|n| n % READ == i).unwrap();
                let written = store == 0 && region == 0;
                guest.reads(block * BLOCK, &if written { content(7, now) } else { content(store, block) });
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
    let mut guest = Guest::start(&rig.host, "d");
    guest.reads(0, &content(9, 0));
    guest.reads(REGION, &content(0, REGION / BLOCK));
    drop(guest);
    let mut guest = Guest::start(&rig.host, "g");
    guest.reads(0, &content(1, 0));
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
    let mut guest = Guest::start(&rig.host, "d");
    guest.fill(&content(7, 0));
    guest.write(0, BLOCK as usize);
    rig.kill();
    drop(guest);
    std::fs::remove_file(rig.host.path("run/ssd.own")).unwrap();
    rig.start();
    let mut guest = Guest::start(&rig.host, "g");
    (0..READ).for_each(|i| guest.reads(i * BLOCK, &content(1, i)));
    drop(guest);
    assert_eq!(rig.served("served_ssd"), READ);
    let mut guest = Guest::start(&rig.host, "d");
    guest.reads(0, &content(7, 0));
    guest.reads(REGION, &content(0, REGION / BLOCK));
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
        let mut guest = Guest::start(&rig.host, name);
        for block in (0..3).flat_map(|region| (0..READ).map(move |i| region * REGION / BLOCK + i)) {
            guest.reads(block * BLOCK, &content(store, block));
        }
    }
    let (served, overtaken) = (rig.served("served_ssd"), rig.recovery("dropped_overtaken"));
    assert!(served >= 20 && overtaken >= 40, "{served} from the SSD, {overtaken} whose checksum was wrong");
    assert!(rig.recovery("dropped_damaged") >= 40, "{}", rig.host.does(&["status"]));
    rig.host.stop();
}
