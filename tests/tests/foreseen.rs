//! A program whose needs are known gets its memory and its second processor before it needs them, in a real guest; what a
//! machine does not use is taken back after a while, and never more than it can spare.
// Helpers of tests, which clippy takes for production code.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::elastic::ElasticRig;
use prestage_tests::guest::STEP_LIMIT;
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// From the announcement of the program until it needs more: longer than a change takes, shorter than is looked ahead.
const LEAD: Duration = Duration::from_secs(15);
/// What it then takes, and for how long it computes.
const TAKES_MIB: u64 = 180;
const BUSY_S: u64 = 15;

fn until(what: &str, prestaged: &Prestaged, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + STEP_LIMIT;
    while !is() {
        assert!(Instant::now() < end, "{what}: {}", prestaged.ctl(&["demand"]).unwrap());
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Raises of a resource that were made because they were foreseen, as they stand in the database.
fn foreseen(decisions: &Value, resource: &str) -> usize {
    let all = decisions["decisions"].as_array().unwrap();
    let is = |of: &&Value| {
        of["resource"] == resource && of["kind"] == "raise" && of["mode"] == "act" && of["outcome"] == "done"
    };
    all.iter().filter(is).filter(|of| of["why"].as_str().unwrap().contains("foreseen")).count()
}

#[test]
fn a_program_that_is_known_finds_what_it_needs() {
    let rig = ElasticRig::new().unwrap();
    let guest = rig.guest("known", &[]).unwrap();
    let mut run = guest.start().unwrap();
    let options = DaemonOptions {
        libvirt_uri: Some(rig.libvirt.uri().to_owned()),
        more: "[demand]\nidle = \"15s\"\ncool_down = \"10s\"\n".to_owned(),
        ..DaemonOptions::default()
    };
    let mut prestaged = Prestaged::start(&options).unwrap();
    let began = run.wait_state().unwrap();
    let policy = |words: &[&str]| prestaged.ctl(&[&["vm", "policy", "known"], words].concat()).unwrap();
    let able = |what: &str| {
        let shown = policy(&[]);
        let abilities = shown["abilities"].as_array().unwrap().clone();
        abilities.iter().any(|ability| ability["what"] == what && ability["possible"] == true)
    };
    until("the guest agent and its balloon", &prestaged, || able("guest_agent") && able("shrink"));

    // What it does not use is taken back, as far as its policy allows. On a busy host its start takes all of its processor:
    // that is not to bring it the second one yet.
    policy(&["--mode", "act", "--margin", "1", "--memory", "min=352MiB", "--cpu", "max=1,never-lower"]);
    let idle = run.state_where("memory is taken back", STEP_LIMIT, |s| s.total_bytes + 120 * MIB < began.total_bytes);
    let idle = idle.unwrap();
    until("the last step", &prestaged, || {
        let list = prestaged.ctl(&["decisions", "--vm", "known"]).unwrap();
        list["decisions"].as_array().unwrap().iter().all(|decision| decision["outcome"] != "pending")
    });
    let small = run.order("state").unwrap();
    assert!(small.ooms == 0 && small.available_bytes > TAKES_MIB * MIB, "{idle:?} {small:?}");

    // Once it runs unforeseen, and nothing is done about it: so it is learned.
    policy(&["--mode", "observe"]);
    let started = prestaged.ctl(&["execution", "start", "known", "report", "--input", "1MiB"]).unwrap();
    assert_eq!(started["known_runs"], 0);
    std::thread::sleep(LEAD);
    let took = run.order(&format!("hold {TAKES_MIB}")).unwrap();
    run.order(&format!("burn {BUSY_S}")).unwrap();
    std::thread::sleep(Duration::from_secs(BUSY_S));
    let (still, id) = (run.order("free").unwrap(), started["id"].to_string());
    prestaged.ctl(&["execution", "end", &id]).unwrap();
    assert_eq!((took.ooms, still.online.as_str()), (0, "0"), "it was only watched");

    // The second time it finds both in place before it needs them. The daemon was stopped in between.
    prestaged.stop().unwrap();
    prestaged.resume().unwrap();
    until("the guest is measured again", &prestaged, || {
        let list = prestaged.ctl(&["recommend", "known"]);
        list.is_ok_and(|list| list["left_out"].as_array().is_some_and(Vec::is_empty))
    });
    let policy = |words: &[&str]| prestaged.ctl(&[&["vm", "policy", "known"], words].concat()).unwrap();
    policy(&["--mode", "act", "--memory", "never-lower", "--cpu", "max="]);
    let started = prestaged.ctl(&["execution", "start", "known", "report", "--input", "1MiB"]).unwrap();
    assert_eq!(started["known_runs"], 1);
    let announced = run.order("state").unwrap();
    let ready = run.state_where("memory and a second processor", STEP_LIMIT, |state| {
        state.online == "0-1" && state.total_bytes > small.total_bytes + 32 * MIB
    });
    let ready = ready.unwrap();
    let rise = run.order(&format!("hold {TAKES_MIB}")).unwrap();
    run.order(&format!("burn {BUSY_S}")).unwrap();
    println!(
        "announced at {} ms of the guest's time, ready at {} ms, needed at {} ms",
        announced.uptime_ms, ready.uptime_ms, rise.uptime_ms
    );
    assert!(ready.uptime_ms < rise.uptime_ms && rise.ooms == 0, "{ready:?} {rise:?}");
    // The guest sees it before it is read back and on record.
    until("both are on record", &prestaged, || {
        let decisions = prestaged.ctl(&["decisions", "--vm", "known"]).unwrap();
        foreseen(&decisions, "memory") > 0 && foreseen(&decisions, "cpu") > 0
    });

    // And gives it back when it has ended.
    run.order("free").unwrap();
    prestaged.ctl(&["execution", "end", &started["id"].to_string()]).unwrap();
    policy(&["--memory", "never-lower=no"]);
    let released =
        run.state_where("memory is taken back again", STEP_LIMIT, |s| s.total_bytes + 32 * MIB < ready.total_bytes);
    assert_eq!(released.unwrap().ooms, 0);
    prestaged.stop().unwrap();
}
