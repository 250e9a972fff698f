//! Demand in a running daemon, on libvirt's test driver: what an ill database leaves of it, and what a SIGKILL does.
#![allow(clippy::unwrap_used, reason = "a failed assumption of a test is a failed test")]

#[path = "daemon_host/mod.rs"]
mod host;

use host::Host;
use rusqlite::Connection;
use std::path::Path;
use std::time::{Duration, Instant};

/// A daemon that measures one machine, `test`.
fn start(host: &mut Host) {
    let node = host.path("node.xml");
    let domain = "<domain type='test'><name>test</name>\
        <uuid>00000000-0000-4000-8000-000000000001</uuid><memory>8388608</memory><vcpu>2</vcpu><os><type>hvm</type></os></domain>";
    std::fs::write(&node, format!("<node>{domain}</node>")).unwrap();
    let more = host.path("prestaged.toml.d");
    std::fs::create_dir_all(&more).unwrap();
    let text = format!("[libvirt]\nenabled = true\nuri = \"test://{}\"\n", node.display());
    std::fs::write(more.join("libvirt.toml"), text).unwrap();
    host.start("[demand]\nenabled = true\n");
    let deadline = Instant::now() + Duration::from_secs(30);
    // Promises are weighed against what was measured.
    while !host.ctl(&["recommend", "test"]).status.success() {
        assert!(Instant::now() < deadline, "the machine is not measured:\n{}", host.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Zeroes every page of a table.
fn wipe(database: &Path, table: &str) {
    let raw = Connection::open(database).unwrap();
    let mut statement = raw.prepare("SELECT pageno FROM dbstat WHERE name = ?").unwrap();
    let pages: Vec<u32> = statement.query_map([table], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    drop(statement);
    drop(raw);
    assert!(!pages.is_empty());
    let mut bytes = std::fs::read(database).unwrap();
    pages.into_iter().for_each(|page| bytes[(page as usize - 1) * 4096..page as usize * 4096].fill(0));
    std::fs::write(database, bytes).unwrap();
}

#[test]
fn an_ill_database_costs_demand_what_lay_in_it_and_guests_nothing() {
    let mut host = Host::new();
    start(&mut host);
    let store = host.store("store", 1 << 20);
    let database = host.path("state/prestage.db");
    host.does(&["disk", "add", "d", &store]);
    host.does(&["vm", "policy", "test", "--mode", "act", "--margin", "0.3"]);
    host.does(&["reservation", "add", "--vcpus", "0.5", "--for", "1h", "--note", "for the night"]);
    host.does(&["event", "add", "month end", "--cron", "0 3 1 * *"]);
    host.refuses(&["event", "add", "month end", "--cron", "0 4 1 * *"], 1, &["has this name"]);
    host.refuses(&["decisions", "--vm", "nope"], 1, &["nope"]);
    host.does(&["vm", "activity", "test", "400"]);
    host.does(&["vm", "activity", "test", "10"]);
    host.stop();

    // One table gone: the others are as they were.
    wipe(&database, "policies");
    start(&mut host);
    let status = host.does(&["status"]);
    assert!(status.contains("was damaged") && status.contains("perhaps some policies"), "{status}");
    assert!(host.does(&["disk", "list"]).contains(&store));
    assert!(host.does(&["reservation", "list"]).contains("for the night"));
    let activity = host.does(&["vm", "activity", "test"]);
    assert!(activity.contains("10 now until "), "{activity}");
    assert!(host.does(&["event", "list"]).contains("month end"));
    assert!(host.does(&["vm", "policy", "test"]).contains("observe"), "who is not told to act does not");
    host.does(&["vm", "policy", "test", "--mode", "act", "--margin", "0.3"]);
    host.stop();

    // And another: the policy that was set since is there.
    wipe(&database, "reservations");
    start(&mut host);
    let status = host.does(&["status"]);
    assert!(status.contains("must be added again: 1 reservations"), "{status}");
    assert!(host.does(&["vm", "policy", "test"]).contains("act"));
    assert!(host.does(&["event", "list"]).contains("month end") && host.does(&["disk", "list"]).contains(&store));
    host.stop();

    // Not a table at all any more: no statement about it can succeed, and what can be read of the rest is in use.
    let raw = Connection::open(&database).unwrap();
    raw.execute_batch("DROP TABLE deliveries").unwrap();
    drop(raw);
    start(&mut host);
    let status = host.does(&["status"]);
    assert!(status.contains("was damaged") && status.contains("1 policies"), "{status}");
    assert!(host.does(&["vm", "policy", "test"]).contains("act"));
    assert!(host.does(&["disk", "list"]).contains(&store));
    host.stop();
}

#[test]
fn what_was_answered_is_there_after_a_kill_and_nothing_hostile_reaches_the_terminal() {
    let mut host = Host::new();
    start(&mut host);
    for n in 0..20 {
        let note = format!("n{n:02}");
        host.does(&["reservation", "add", "--vcpus", "0.01", "--for", "1h", "--note", &note]);
    }
    host.does(&["event", "add", "a\u{202e}gnp.exe", "--cron", "0 3 1 * *"]);
    host.refuses(&["event", "add", "a\u{1b}[31m", "--cron", "0 3 1 * *"], 2, &["control character"]);
    host.refuses(&["event", "add", "never", "--cron", "0 0 30 2 *"], 1, &["never comes"]);
    let mut daemon = host.daemon.take().unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    start(&mut host);
    let list = host.does(&["reservation", "list"]);
    assert!((0..20).all(|n| list.contains(&format!("n{n:02}"))), "{list}");
    let events = host.does(&["event", "list"]);
    assert!(events.contains("a\\u{202e}gnp.exe") && !events.contains('\u{202e}'), "{events}");
    host.stop();
}
