//! A disk becomes larger under a real guest whose other disk is kept full of checked requests: the guest's kernel sees each new size, what
//! is written to the new end is on the store, and the other disk notices nothing.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::time::Duration;

use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::paths::Scratch;
use prestage_tests::process::wait_until;
use prestage_tests::report::Sized;
use prestage_tests::verifier::VerifierRig;

const MIB: u64 = 1 << 20;
const BUSY_BYTES: u64 = 16 * MIB;
const BLOCK: u64 = 4096;

#[test]
fn a_guest_sees_its_disk_grow_while_it_reads_another() {
    let rig = VerifierRig::new().unwrap();
    let scratch = Scratch::large().unwrap();
    let (busy, grows) = (scratch.join("busy.raw"), scratch.join("grows.raw"));
    for (file, bytes) in [(&busy, BUSY_BYTES), (&grows, 8 * MIB)] {
        std::fs::File::create_new(file).unwrap().set_len(bytes).unwrap();
    }
    let options = DaemonOptions { ram_size: "16MiB".to_owned(), ssd_size: "64MiB".to_owned(), ..Default::default() };
    let mut daemon = Prestaged::start(&options).unwrap();
    daemon.ctl(&["disk", "add", "busy", busy.to_str().unwrap()]).unwrap();
    daemon.ctl(&["disk", "add", "grows", grows.to_str().unwrap()]).unwrap();
    let (socket, other) = (daemon.disk_socket("busy").unwrap(), daemon.disk_socket("grows").unwrap());
    let guest = rig.guest_beside("resize", &socket, &other, 2, 8).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_load().unwrap();
    assert_eq!(run.sized().unwrap(), Sized { bytes: 8 * MIB, told: 0 });
    assert_eq!(run.write_last(1000).unwrap(), 8 * MIB);

    let mut before = run.verified().unwrap();
    // By prestaged, and then by somebody else.
    for (round, ours) in [(1, true), (2, false)] {
        let bytes = (8 + 8 * round) * MIB + 512 * BLOCK * round;
        if ours {
            let reply = daemon.ctl(&["disk", "resize", "grows", &bytes.to_string()]).unwrap();
            assert_eq!((reply["after_bytes"].as_u64(), reply["told"].as_bool()), (Some(bytes), Some(true)), "{reply}");
        } else {
            std::fs::File::options().write(true).open(&grows).unwrap().set_len(bytes).unwrap();
            daemon.ctl(&["disk", "resize", "grows"]).unwrap();
        }
        // The guest's kernel is told by an interrupt, and looks in a while of its own.
        let seen = wait_until("the guest's kernel to see the size", Duration::from_secs(120), || {
            Ok(run.sized()? == Sized { bytes, told: round })
        });
        seen.unwrap_or_else(|error| panic!("{error}\n{}\n{}", run.transcript(), daemon.last_words()));
        assert_eq!(run.write_last(round << 32).unwrap(), bytes);
        let file = std::fs::File::open(&grows).unwrap();
        assert_eq!(file.metadata().unwrap().len(), bytes);
        let mut block = [0; BLOCK as usize];
        file.read_exact_at(&mut block, bytes - BLOCK).unwrap();
        let words = block.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
        assert!(words.eq((round << 32..).take(512)), "what the guest wrote is on the store");
        let verified = run.verified().unwrap();
        println!("round {round}: {bytes} bytes seen; the other disk: {verified:?}");
        assert!(
            verified.reads > before.reads && verified.writes > before.writes,
            "the other disk goes on: {verified:?}"
        );
        before = verified;
    }
    let all = run.end_load().unwrap();
    run.wait_off().unwrap();
    assert_eq!(all.errors, 0, "the guest's kernel tells of errors: {all:?}");
    assert_eq!(daemon.said("front-end connected").unwrap(), 2, "each disk connected once:\n{}", daemon.last_words());
    daemon.stop().unwrap();
}
