//! The tiers' upkeep under a guest: other sizes by command and by reload, out of service and back.

mod beside;
mod sick;

use super::Mount;
use super::front::Guest;
use super::host::Host;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// `cache tiers`: capacity in MiB of RAM and SSD tier.
fn sizes(host: &Host) -> [u64; 2] {
    let tiers: serde_json::Value = serde_json::from_str(&host.does(&["--json", "cache", "tiers"])).unwrap();
    [0, 1].map(|tier| tiers["tiers"][tier]["capacity_bytes"].as_u64().unwrap().div_ceil(MIB))
}

fn pattern(block: u64) -> Vec<u8> {
    (0..65536_u64 / 8).flat_map(|word| (block << 32 | word).to_le_bytes()).collect()
}

/// A store of so many blocks with a pattern, and a disk `d` on it.
fn disk(host: &Host, blocks: u64) -> Guest {
    let store = host.path("store");
    std::fs::write(&store, (0..blocks).flat_map(pattern).collect::<Vec<_>>()).unwrap();
    host.does(&["disk", "add", "d", store.to_str().unwrap()]);
    Guest::start(host, "d")
}

fn check(guest: &mut Guest, blocks: std::ops::Range<u64>) {
    for block in blocks {
        assert!(guest.read(block * 65536, 65536) == pattern(block), "block {block}");
    }
}

fn ssd(host: &Host) -> String {
    format!("ssd_path = \"{}\"\nssd_size = \"64MiB\"\n", host.path("ssd").display())
}

#[test]
fn tiers_get_another_size_under_a_guest_until_the_next_start() {
    let mut host = Host::new();
    host.start(&ssd(&host));
    let mut guest = disk(&host, 400);
    check(&mut guest, 0..400);
    let before = sizes(&host);
    let said = host.does(&["cache", "resize", "--ram", "48MiB", "--ssd", "96MiB"]);
    assert!(
        said.contains("ram tier: 16 MiB -> 48 MiB, until the next start; set cache.ram_size = \"48MiB\""),
        "{said}"
    );
    assert!(said.contains("ssd tier: ") && said.contains("set cache.ssd_size = \"96MiB\" to keep it"), "{said}");
    assert_eq!(sizes(&host), [48, before[1] + 32]);
    assert_eq!(std::fs::metadata(host.path("ssd")).unwrap().len(), 96 * MIB);
    check(&mut guest, 0..400);
    guest.write_all(65536, &pattern(7));
    let hits = |host: &Host| {
        let stat: serde_json::Value = serde_json::from_str(&host.does(&["--json", "cache", "stat"])).unwrap();
        stat["total"]["served_ram"].as_u64().unwrap()
    };
    let warm = hits(&host);
    check(&mut guest, 2..400);
    assert_eq!(hits(&host) - warm, 398, "all of it fits now");
    host.does(&["cache", "resize", "--ram", "16MiB", "--ssd", "64MiB"]);
    assert_eq!(sizes(&host), before);
    let said = host.does(&["cache", "resize", "--ram", "16MiB"]);
    assert!(said.contains("ram tier has 16 MiB already, as configured"), "{said}");
    check(&mut guest, 2..400);
    assert!(guest.read(65536, 65536) == pattern(7), "what was written meanwhile");
    host.refuses(&["cache", "resize", "--ram", "1MiB"], 2, &["--ram", "at least 16 MiB"]);
    host.refuses(&["cache", "resize", "--ssd", "1MiB"], 2, &["--ssd", "at least 64 MiB"]);
    host.refuses(&["cache", "resize", "--ssd", "96MiB", "--force"], 2, &["--ram"]);
    // All or nothing: the SSD tier would have room.
    let much = ["cache", "resize", "--ram", "4000TiB", "--ssd", "96MiB"];
    host.refuses(&much, 1, &["a RAM tier of 3.9 PiB is more than 90 % of this host's", "say --force"]);
    host.refuses(
        &[&much[..], &["--force"]].concat(),
        1,
        &["RAM tier: ", "at most on this host; 3.9 PiB were asked for"],
    );
    assert_eq!(sizes(&host), before);
    host.does(&["cache", "resize", "--ram", "32MiB", "--ssd", "128MiB"]);
    drop(guest);
    host.stop();
    host.start(&ssd(&host));
    assert_eq!(sizes(&host), before, "the configuration has not changed");
    let mut guest = Guest::start(&host, "d");
    check(&mut guest, 2..400);
    drop(guest);
    host.stop();
}

/// Everything that a reload changes, with one part that cannot be had: none of it is in effect. Then without that part: all of it.
#[test]
fn a_reload_is_applied_whole_or_not_at_all() {
    let mut host = Host::new();
    let mount = host.path("small");
    std::fs::create_dir(&mount).unwrap();
    let mounted = Mount::tmpfs(&mount, "80m");
    if mounted.is_none() {
        println!("SKIPPED in part: mounting a tmpfs is not permitted; the SSD tier's file system has room for all");
    }
    let ssd = mount.join("ssd").display().to_string();
    host.start(&format!("ssd_path = \"{ssd}\"\nssd_size = \"64MiB\"\n"));
    let mut guest = disk(&host, 40);
    check(&mut guest, 0..40);
    let store = host.store("other", MIB);
    host.does(&["disk", "add", "probe", &host.store("probe", MIB)]);
    let write = |ram: &str, ssd_size: &str| {
        let (state, run) = (host.path("state"), host.path("run"));
        let text = format!(
            "[daemon]\nstate_dir = \"{}\"\nrun_dir = \"{}\"\nlog = \"debug\"\n[libvirt]\nenabled = false\n\
             [cache]\nram_size = \"{ram}\"\nssd_path = \"{ssd}\"\nssd_size = \"{ssd_size}\"\n\
             [prefetch]\nthreshold = 0.5\n[store]\nimage_folder = \"/srv\"\n[[disk]]\nname = \"new\"\nstore = \"{store}\"\n\
             [[webhook]]\nname = \"told\"\nurl = \"http://127.0.0.1:9/\"\nsecret_file = \"/nonexistent\"\n",
            state.display(),
            run.display()
        );
        std::fs::write(host.path("prestaged.toml"), text).unwrap();
    };
    // What an operator can see of the settings.
    let seen = || {
        // A ring that starts is worth a line of `debug`.
        Guest::start(&host, "probe").read(0, 4096);
        let whole = host.log();
        [
            format!("{:?}", sizes(&host)),
            std::fs::metadata(&ssd).unwrap().len().to_string(),
            host.does(&["disk", "list"]).lines().map(|line| line.split(' ').next().unwrap()).collect(),
            host.does(&["model", "threshold"]),
            whole.contains("nobody is told").to_string(),
            whole.contains("ring started").to_string(),
        ]
    };
    let before = seen();
    let refused = |ram: &str, ssd_size: &str, why: &str| {
        write(ram, ssd_size);
        let said = host.reload();
        assert!(said.contains("nothing of it is in effect") && said.contains(why), "{said}");
        assert!(!said.contains("changed from"), "{said}");
        assert_eq!(seen(), before, "after {ram} and {ssd_size}:\n{said}");
    };
    // The SSD tier would have room for 72 MiB, and has had it when the RAM tier is refused; and the other way round.
    refused("4000TiB", "72MiB", "at most on this host");
    if mounted.is_some() {
        refused("32MiB", "128MiB", "only");
    }
    write("32MiB", "72MiB");
    let said = host.reload();
    assert!(said.contains("configuration reloaded") && said.contains("cache.ram_size changed from"), "{said}");
    let after = seen();
    for (at, (before, after)) in before.iter().zip(&after).enumerate() {
        assert_ne!(before, after, "setting {at} was to change:\n{said}");
    }
    check(&mut guest, 0..40);
    // A reload without a change leaves a size alone that was given by hand.
    host.does(&["cache", "resize", "--ram", "24MiB"]);
    host.reload();
    assert_eq!(sizes(&host)[0], 24);
    drop(guest);
    host.stop();
}

/// The SSD tier's file system is unmounted under a running daemon with a guest, and another one comes in its place.
#[test]
fn a_cache_disk_is_replaced_under_a_guest() {
    let mut host = Host::new();
    let mount = host.path("cache");
    std::fs::create_dir(&mount).unwrap();
    let mounted = Mount::tmpfs(&mount, "80m");
    let ssd = mount.join("ssd");
    let config = format!("ssd_path = \"{}\"\nssd_size = \"64MiB\"\n", ssd.display());
    host.start(&config);
    let mut guest = disk(&host, 400);
    check(&mut guest, 0..400);
    guest.write_all(65536, &pattern(1000));
    host.refuses(&["cache", "drain"], 2, &["--ram|--ssd"]);
    let said = host.does(&["cache", "drain", "--ssd"]);
    assert!(said.contains("ssd tier out of service") && said.contains("is closed\n"), "{said}");
    assert_eq!(host.does(&["cache", "drain", "--ssd"]), said, "twice is once");
    for words in [&["cache", "tiers"][..], &["status"]] {
        let said = host.does(words);
        assert!(
            said.contains("drained by an operator at 20")
                && said.contains("`prestagectl cache resume --ssd` brings it back"),
            "{said}"
        );
    }
    assert!(host.does(&["status"]).contains("health:     ok"), "it is as it was ordered");
    host.refuses(&["cache", "resize", "--ssd", "128MiB"], 1, &["no SSD tier in use"]);
    let again = match mounted {
        Some(mount) => {
            let at = mount.0.clone();
            // Fails while anybody has a file open there.
            mount.unmount();
            Some(Mount::tmpfs(&at, "80m").unwrap())
        }
        None => {
            println!("SKIPPED in part: mounting a tmpfs is not permitted; the file is removed instead");
            std::fs::remove_file(&ssd).unwrap();
            None
        }
    };
    check(&mut guest, 2..400);
    guest.write_all(5 * 65536, &pattern(1001));
    assert!(host.does(&["cache", "resume", "--ssd"]).contains("ssd tier in service"));
    assert!(host.does(&["status"]).contains("health:     ok"), "{}", host.does(&["status"]));
    let block = |guest: &mut Guest, block: u64, holds: u64| assert!(guest.read(block * 65536, 65536) == pattern(holds));
    block(&mut guest, 1, 1000);
    block(&mut guest, 5, 1001);
    guest.write_all(7 * 65536, &pattern(1002));
    check(&mut guest, 8..400);
    let used = |host: &Host| {
        let tiers: serde_json::Value = serde_json::from_str(&host.does(&["--json", "cache", "tiers"])).unwrap();
        tiers["tiers"][1]["used_bytes"].as_u64().unwrap()
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while used(&host) == 0 {
        assert!(Instant::now() < deadline, "the new tier is not used:\n{}", host.log());
        check(&mut guest, 300..310);
        std::thread::sleep(Duration::from_millis(200));
    }
    // Killed while it is out of service, with writes that it has not heard of. It stays out until somebody brings it back.
    host.does(&["cache", "drain", "--ssd"]);
    guest.write_all(300 * 65536, &pattern(1003));
    drop(guest);
    host.kill();
    host.start(&config);
    let mut guest = Guest::start(&host, "d");
    let said = host.does(&["status"]);
    assert!(said.contains("ssd tier: drained by an operator at 20") && said.contains("no SSD\n"), "{said}");
    assert!(said.contains("health:     ok") && !said.contains("crash"), "{said}");
    check(&mut guest, 301..400);
    guest.write_all(301 * 65536, &pattern(1004));
    host.does(&["cache", "resume", "--ssd"]);
    let said = host.does(&["status"]) + &host.does(&["cache", "tiers"]);
    assert!(!said.contains("drained") && !said.contains("crash") && said.contains("SSD 0 B of "), "{said}");
    block(&mut guest, 301, 1004);
    guest.write_all(301 * 65536, &pattern(301));
    drop(guest);
    host.stop();
    host.start(&config);
    assert!(!host.does(&["status"]).contains("drained"), "it was brought back");
    let mut guest = Guest::start(&host, "d");
    for (at, holds) in [(1, 1000), (5, 1001), (7, 1002), (300, 1003)] {
        block(&mut guest, at, holds);
    }
    check(&mut guest, 301..400);
    drop(guest);
    host.stop();
    drop(again);
}

#[test]
fn the_ram_tier_gives_its_memory_back_and_comes_back_under_a_guest() {
    let mut host = Host::new();
    host.start("");
    let mut guest = disk(&host, 100);
    check(&mut guest, 0..100);
    let resident = |host: &Host| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", host.daemon.as_ref().unwrap().id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() / 1024
    };
    let before = resident(&host);
    let said = host.does(&["cache", "drain", "--ram"]);
    assert!(said.contains("ram tier out of service, 16 MiB given back"), "{said}");
    assert_eq!(sizes(&host)[0], 0);
    assert!(resident(&host) + 4 <= before, "{} of {before} MiB", resident(&host));
    assert!(host.does(&["status"]).contains("`prestagectl cache resume --ram` brings it back"));
    host.refuses(&["cache", "resize", "--ram", "32MiB"], 1, &["out of service"]);
    guest.write_all(3 * 65536, &pattern(77));
    assert!(guest.read(3 * 65536, 65536) == pattern(77));
    check(&mut guest, 4..100);
    assert!(host.does(&["cache", "resume", "--ram"]).contains("ram tier in service, 16 MiB"));
    check(&mut guest, 4..100);
    assert!(guest.read(3 * 65536, 65536) == pattern(77));
    assert!(host.does(&["status"]).contains("health:     ok"));
    drop(guest);
    host.stop();
}

/// What `cache resize` gave is what a tier comes back with; a restart in between takes what is configured.
#[test]
fn a_drained_tier_comes_back_as_large_as_it_was_and_stays_out_over_a_restart() {
    let mut host = Host::new();
    host.start(&ssd(&host));
    let mut guest = disk(&host, 100);
    check(&mut guest, 0..100);
    let configured = sizes(&host);
    host.does(&["cache", "resize", "--ram", "48MiB", "--ssd", "96MiB"]);
    let by_hand = sizes(&host);
    assert_ne!(by_hand, configured);
    let notes = [
        "48 MiB by `cache resize`, 16 MiB configured, which the next start takes; set cache.ram_size = \"48MiB\" to keep it",
        "96 MiB by `cache resize`, 64 MiB configured, which the next start takes; set cache.ssd_size = \"96MiB\" to keep it",
    ];
    for said in [host.does(&["status"]), host.does(&["cache", "tiers"])] {
        assert!(notes.iter().all(|note| said.contains(note)), "{said}");
    }
    assert!(host.does(&["status"]).contains("health:     ok"));
    let said = host.does(&["cache", "drain", "--ram", "--ssd"]);
    assert!(said.contains("ram tier out of service, 48 MiB given back"), "{said}");
    check(&mut guest, 0..100);
    host.does(&["cache", "resume", "--ram", "--ssd"]);
    assert_eq!(sizes(&host), by_hand);
    host.does(&["cache", "drain", "--ram", "--ssd"]);
    guest.write_all(65536, &pattern(900));
    drop(guest);
    // With nothing in RAM there is nothing to give back either.
    host.stop();
    host.start(&ssd(&host));
    assert!(!host.log().contains("is not given back"), "{}", host.log());
    let said = host.does(&["status"]);
    assert_eq!(sizes(&host), [0, 0], "{said}");
    for tier in ["ram tier", "ssd tier"] {
        assert!(said.contains(&format!("{tier}: drained by an operator at 20")), "{said}");
    }
    assert!(said.contains("health:     ok"), "{said}");
    let log = host.log();
    assert!(
        log.contains("RAM tier: drained by an operator at 20")
            && log.contains("SSD tier: drained by an operator at 20")
    );
    let mut guest = Guest::start(&host, "d");
    check(&mut guest, 2..100);
    // A reload names the size that they come back with.
    let config = std::fs::read_to_string(host.path("prestaged.toml")).unwrap();
    let config = config.replace("ram_size = \"16MiB\"", "ram_size = \"24MiB\"").replace("64MiB", "72MiB");
    std::fs::write(host.path("prestaged.toml"), config).unwrap();
    let said = host.reload();
    assert!(said.contains("configuration reloaded"), "{said}");
    assert_eq!(sizes(&host), [0, 0]);
    host.does(&["cache", "resume", "--ram", "--ssd"]);
    assert_eq!(sizes(&host), [24, configured[1] + 8]);
    assert!(!host.path("state/tiers.drained").exists());
    assert!(!host.does(&["status"]).contains("for the time being"), "{}", host.does(&["status"]));
    check(&mut guest, 2..100);
    assert!(guest.read(65536, 65536) == pattern(900));
    drop(guest);
    host.stop();
}

/// What cannot be put on record is not done: a restart would take in what was to stay out.
#[test]
fn a_tier_whose_drain_cannot_be_noted_stays_in_service() {
    let mut host = Host::new();
    host.start(&ssd(&host));
    let before = sizes(&host);
    std::fs::create_dir(host.path("state/tiers.drained.new")).unwrap();
    host.refuses(&["cache", "drain", "--ram"], 1, &["it cannot be noted in", "tiers.drained"]);
    host.refuses(&["cache", "drain", "--ssd"], 1, &["it cannot be noted in", "tiers.drained"]);
    assert_eq!(sizes(&host), before);
    std::fs::remove_dir(host.path("state/tiers.drained.new")).unwrap();
    host.does(&["cache", "drain", "--ssd"]);
    // The operator names another device instead: of that one nobody said anything.
    host.stop();
    host.start(&ssd(&host).replace("/ssd\"", "/other\""));
    assert_eq!(sizes(&host), before);
    host.stop();
}

/// A refused reload, what waits for a restart, and disks that a reload shuts out are in `status` until they are mended.
#[test]
fn status_says_what_of_the_configuration_is_not_in_effect() {
    let mut host = Host::new();
    host.start("");
    let store = host.store("store", MIB);
    host.does(&["disk", "add", "d", &store]);
    let whole = std::fs::read_to_string(host.path("prestaged.toml")).unwrap();
    let file = host.path("prestaged.toml");
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    let status = || host.does(&["status"]);
    write(&whole.replace("16MiB", "16MiBB"));
    host.reload();
    let said = status();
    assert!(
        said.contains("health:     DEGRADED") && said.contains("configuration: refused at the reload of 20"),
        "{said}"
    );
    assert!(said.contains("`cache.ram_size`: expected a size") && said.contains("prestaged.toml:"), "{said}");
    write(&whole.replace("16MiB", "4000TiB"));
    host.reload();
    assert!(status().contains("at most on this host"), "{}", status());
    write(&format!("{whole}shards = 2\n"));
    host.reload();
    let said = status();
    assert!(said.contains("health:     ok") && !said.contains("refused"), "{said}");
    assert!(
        said.contains("configuration: cache.shards changed from \"auto\" to 2: takes effect with a restart"),
        "{said}"
    );
    // As long as it waits, whatever else is reloaded.
    host.reload();
    assert!(status().contains("cache.shards changed from"), "{}", status());
    write(&whole);
    host.reload();
    assert!(!status().contains("for the time being"), "{}", status());
    host.stop();

    // The folder is named in the file, since what is set on the command line stays.
    let allowed = format!("[store]\nallowed = [\"{}\"]\n", std::path::Path::new(&store).parent().unwrap().display());
    host.set_allowed = false;
    host.start(&allowed);
    host.does(&["disk", "show", "d"]);
    write(&(whole.clone() + "[store]\nallowed = [\"/nonexistent\"]\n"));
    let said = host.reload();
    assert!(
        said.contains("configuration reloaded") && said.contains("no longer in a folder of store.allowed"),
        "{said}"
    );
    let shut_out = "disk d: ";
    for _ in 0..2 {
        let said = host.does(&["status"]);
        assert!(said.contains(shut_out) && said.contains("served until it is opened anew"), "{said}");
        assert!(said.contains("health:     ok"), "{said}");
        Guest::start(&host, "d").read(0, 4096);
        host.reload();
    }
    write(&(whole + &allowed));
    host.reload();
    assert!(!host.does(&["status"]).contains(shut_out), "{}", host.does(&["status"]));
    host.stop();
}

/// An SSD tier that did not fit is opened at the reload that gives it another size; one whose file is deleted is told of.
#[test]
fn an_ssd_tier_is_tried_again_at_a_reload_and_missed_when_it_is_deleted() {
    let mut host = Host::new();
    let mount = host.path("small");
    std::fs::create_dir(&mount).unwrap();
    let Some(mounted) = Mount::tmpfs(&mount, "80m") else {
        println!("SKIPPED: mounting a tmpfs is not permitted");
        return;
    };
    let ssd = mount.join("ssd");
    host.start(&format!("ssd_path = \"{}\"\nssd_size = \"96MiB\"\n", ssd.display()));
    let mut guest = disk(&host, 20);
    check(&mut guest, 0..20);
    let said = host.does(&["status"]);
    assert!(said.contains("ssd tier: /") && said.contains("needs 96 MiB and only 80 MiB are free"), "{said}");
    assert!(!said.contains("SSD tier: "), "{said}");
    let whole = std::fs::read_to_string(host.path("prestaged.toml")).unwrap();
    std::fs::write(host.path("prestaged.toml"), whole.replace("96MiB", "88MiB")).unwrap();
    host.reload();
    assert!(host.does(&["status"]).contains("needs 88 MiB"), "{}", host.does(&["status"]));
    std::fs::write(host.path("prestaged.toml"), whole.replace("96MiB", "64MiB")).unwrap();
    host.reload();
    let said = host.does(&["status"]);
    assert!(said.contains("health:     ok") && sizes(&host)[1] > 0, "{said}");
    std::fs::remove_file(&ssd).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let missed = |host: &Host| host.does(&["status"]).contains("was deleted while it is in use");
    while !missed(&host) {
        assert!(Instant::now() < deadline, "nobody misses it:\n{}", host.does(&["status"]));
        std::thread::sleep(Duration::from_millis(100));
    }
    let said = host.does(&["status"]);
    assert!(said.contains("health:     DEGRADED") && said.contains(ssd.to_str().unwrap()), "{said}");
    check(&mut guest, 0..20);
    host.refuses(
        &["cache", "resume", "--ssd"],
        1,
        &["it is in service", "was deleted", "`prestagectl cache drain --ssd` first"],
    );
    host.does(&["cache", "drain", "--ssd"]);
    host.does(&["cache", "resume", "--ssd"]);
    assert!(ssd.exists() && host.does(&["status"]).contains("health:     ok"), "{}", host.does(&["status"]));
    drop(guest);
    host.stop();
    drop(mounted);
}
