//! Two who change the tiers at once.

use super::*;

/// An operator takes tiers out of service and back while the configuration is read anew with other sizes, under a guest: whatever
/// comes first, the sizes in the end are those of the configuration, and the guest reads what it wrote.
#[test]
fn a_reload_beside_a_drain_is_lost_on_neither_tier_nor_guest() {
    let mut host = Host::new();
    let write = |host: &Host, ram: u64, ssd: u64| {
        let text = std::fs::read_to_string(
            host.config(&format!("ssd_path = \"{}\"\nssd_size = \"{ssd}MiB\"\n", host.path("ssd").display())),
        );
        let text = text.unwrap().replace("ram_size = \"16MiB\"", &format!("ram_size = \"{ram}MiB\""));
        std::fs::write(host.path("prestaged.toml"), text).unwrap();
    };
    host.start(&ssd(&host));
    let mut guest = disk(&host, 300);
    check(&mut guest, 0..300);
    for round in 0..12_u64 {
        let (ram, slab) = (16 + 8 * (round % 3), 64 + 32 * (round % 4));
        write(&host, ram, slab);
        let said = std::thread::scope(|scope| {
            let operator = scope.spawn(|| {
                for word in ["drain", "resume", "drain", "resume"] {
                    for tier in ["--ssd", "--ram"] {
                        // What meets a change of size may be told that the tier is in use, and come again.
                        let said = host.ctl(&["cache", word, tier]);
                        assert!(said.status.code().is_some_and(|code| code <= 1), "{said:?}");
                    }
                }
            });
            let said = host.reload();
            guest.write_all(round * 65536, &pattern(2000 + round));
            check(&mut guest, 100..150);
            operator.join().unwrap();
            said
        });
        host.does(&["cache", "resume", "--ssd", "--ram"]);
        if said.contains("nothing of it is in effect") {
            let said = host.reload();
            assert!(said.contains("configuration reloaded"), "{said}");
        }
        let file = std::fs::metadata(host.path("ssd")).unwrap().len() / MIB;
        assert_eq!((sizes(&host)[0], file), (ram, slab), "round {round}: {said}");
        assert!(guest.read(round * 65536, 65536) == pattern(2000 + round));
        check(&mut guest, 50..300);
    }
    assert!(host.does(&["status"]).contains("health:     ok"), "{}", host.does(&["status"]));
    drop(guest);
    host.kill();
    host.start(&ssd(&host));
    let mut guest = Guest::start(&host, "d");
    for round in 0..12_u64 {
        assert!(guest.read(round * 65536, 65536) == pattern(2000 + round));
    }
    check(&mut guest, 50..300);
    drop(guest);
    host.stop();
}

/// A tier that could not be opened is tried again by a reload and by an operator at once: it is opened once, and both are right.
#[test]
fn a_reload_beside_a_resume_opens_one_tier() {
    let mut host = Host::new();
    let folder = host.path("cache");
    let config = format!("ssd_path = \"{}\"\nssd_size = \"64MiB\"\n", folder.join("ssd").display());
    for round in 0..4_u64 {
        // No folder can be made of it.
        std::fs::write(&folder, "").unwrap();
        host.start(&config);
        let mut guest = match round {
            0 => disk(&host, 100),
            _ => Guest::start(&host, "d"),
        };
        assert!(host.does(&["status"]).contains("health:     DEGRADED"), "{}", host.does(&["status"]));
        std::fs::remove_file(&folder).unwrap();
        std::fs::create_dir(&folder).unwrap();
        let said = std::thread::scope(|scope| {
            let operator = scope.spawn(|| host.does(&["cache", "resume", "--ssd"]));
            let said = host.reload();
            guest.write_all(round * 65536, &pattern(2000 + round));
            check(&mut guest, 50..100);
            assert!(operator.join().unwrap().contains("ssd tier in service"));
            said
        });
        assert!(said.contains("configuration reloaded") && !said.contains("still no SSD tier"), "{said}");
        assert!(host.does(&["status"]).contains("health:     ok"), "{}", host.does(&["status"]));
        assert_eq!(host.log().matches("SSD tier in service again").count() as u64, round + 1);
        assert!(sizes(&host)[1] > 0);
        check(&mut guest, 50..100);
        drop(guest);
        host.stop();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
