//! Demand on the command line, against fixtures.

use super::fake::Daemon;
use super::{fails, prints, run};

#[test]
fn a_policy_is_shown_and_only_what_is_given_changes() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["vm", "policy", "web1"],
        "\
machine:        web1 (11111111-2222-3333-4444-555555555555)
policy:         the default
mode:           observe
priority:       50, weight 100
margin:         10 % above what is used
swapped pages:  as memory.prestage and memory.push_out say
balloon:        yes
vcpu_add:       no: the definition has no further vCPUs; raise <vcpu> at the next start
",
    );
    let changed = run(
        &daemon.socket,
        &[
            "vm",
            "policy",
            "web1",
            "--mode",
            "act",
            "--memory",
            "min=1GiB,max=8GiB",
            "--cpu",
            "mode=recommend,never-lower",
        ],
    );
    assert_eq!((changed.code, changed.err.as_str()), (0, ""));
    assert!(changed.out.contains("policy:         its own\nmode:           act\n"), "{}", changed.out);
    assert!(changed.out.contains("cpu:            mode recommend, never lowered\n"), "{}", changed.out);
    assert!(changed.out.contains("memory:         min 1.0 GiB, max 8.0 GiB\n"), "{}", changed.out);
    assert!(changed.out.contains("note:           memory: max is odd\n"), "{}", changed.out);
    assert_eq!(run(&daemon.socket, &["vm", "policy", "web1", "--reset"]).code, 0);
    let asked = daemon.control.asked.lock();
    let wanted = r#"policy web1 {"mode":"act","priority":50,"weight":100,"margin":0.1,"resources":{"cpu":{"mode":"recommend","never_lower":true},"memory":{"min":1073741824.0,"max":8589934592.0,"never_lower":false}}}"#;
    assert_eq!(*asked, [wanted, "default policy web1"]);
}

#[test]
fn what_cannot_be_a_policy_is_refused_before_the_daemon_is_asked() {
    let daemon = Daemon::start();
    fails(&daemon.socket, &["vm", "policy", "none"], 1, "there is no machine `none`");
    fails(&daemon.socket, &["vm", "policy", "web1", "--memory", "min=much"], 2, "not a size");
    fails(&daemon.socket, &["vm", "policy", "web1", "--priority", "101"], 2, "101");
    fails(&daemon.socket, &["vm", "policy", "web1", "--memory", "min=2GiB,max=1GiB"], 2, "`memory.min`");
    fails(&daemon.socket, &["vm", "policy", "web1", "--margin", "2"], 2, "`margin` is 0 to 1");
    fails(&daemon.socket, &["vm", "policy", "web1", "--pages-floor", "2"], 2, "`pages_floor` is 0 to 1");
    fails(&daemon.socket, &["vm", "policy", "web1", "--pages-floor", "half"], 2, "neither `default` nor a share");
    assert!(daemon.control.asked.lock().is_empty());
}

#[test]
fn a_forecast_is_drawn_and_told() {
    let daemon = Daemon::start();
    let chart = tempfile::NamedTempFile::new().unwrap();
    let file = chart.path().to_str().unwrap();
    let shown = run(&daemon.socket, &["forecast", "show", "web1", "--horizon", "2h", "--svg", file]);
    assert_eq!((shown.code, shown.err.as_str()), (0, ""));
    assert!(
        shown.out.starts_with("memory of web1\n2h ahead in steps of 10m, from 2026-11-22 03:04:05 UTC\n"),
        "{}",
        shown.out
    );
    assert!(shown.out.contains("peak             1.0 GiB     1.5 GiB     2.0 GiB     2.5 GiB\n"), "{}", shown.out);
    assert!(shown.out.contains("CAUTION:     cut at ten times"), "{}", shown.out);
    assert!(shown.out.lines().all(|line| line.chars().count() <= 80), "{}", shown.out);
    assert!(std::fs::read_to_string(file).unwrap().ends_with("</svg>\n"));
    fails(&daemon.socket, &["forecast", "show", "new"], 1, "wait a minute");
    fails(&daemon.socket, &["forecast", "show", "web1", "--horizon", "30s"], 2, "1m to 24h");
    fails(
        &daemon.socket,
        &["forecast", "show", "web1", "--svg", "/no/such/x.svg"],
        1,
        "cannot write the chart to /no/such/x.svg",
    );
}

#[test]
fn decisions_and_recommendations_say_why() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["recommend", "web1"],
        "\
MACHINE  WHAT  MODE       DO      NOW    TO  USED  PEAK 95%  WHY
web1     cpu   recommend  raise  1.00  2.00  0.90      1.75  1.75 cores foreseen
",
    );
    let decisions = run(&daemon.socket, &["decisions", "--limit", "2"]).out;
    assert!(decisions.contains("partial") && decisions.contains("not acted (observe)"), "{decisions}");
    assert!(
        decisions.contains("  1200  ") && decisions.contains("  -  "),
        "how long it took, where it was done: {decisions}"
    );
    assert!(decisions.ends_with("older ones: --before 8\n"), "{decisions}");
}

#[test]
fn reservations_executions_and_events_are_one_command_each() {
    let daemon = Daemon::start();
    let add = ["reservation", "add", "--from", "2026-11-23T03:00Z", "--for", "1h", "--vcpus", "2", "--memory", "4GiB"];
    prints(
        &daemon,
        &add,
        "reservation 3: 2.00 vCPUs, 4.0 GiB from 2026-11-23 03:00 to 2026-11-23 04:00 UTC\nfits: 12 GiB are left\n\
         memory: nothing is changed: mode observe; the room is kept\n",
    );
    fails(&daemon.socket, &["reservation", "add", "--for", "1h", "--memory", "65GiB"], 1, "64 GiB more are needed");
    fails(&daemon.socket, &["reservation", "add", "--for", "1h"], 2, "nothing is asked for");
    fails(&daemon.socket, &["reservation", "add", "--memory", "1GiB"], 2, "--for");
    fails(
        &daemon.socket,
        &["reservation", "add", "--for", "1h", "--from", "tomorrow", "--vcpus", "1"],
        2,
        "not a time",
    );
    prints(&daemon, &["reservation", "list"], "no reservations\n");
    prints(&daemon, &["reservation", "cancel", "3"], "reservation 3 is cancelled\n");
    fails(&daemon.socket, &["reservation", "cancel", "4"], 1, "there is no reservation 4");
    prints(
        &daemon,
        &["execution", "start", "web1", "report", "--tag", "nightly", "--input", "1GiB"],
        "execution 5: report in web1, known from 3 executions\n",
    );
    prints(&daemon, &["execution", "end", "5"], "execution 5 ended after 1 min 30 s\n");
    prints(
        &daemon,
        &["event", "add", "month end", "--cron", "0 3 1 * *"],
        "event 2: month end, next 2026-11-22 03:04 UTC\n",
    );
    fails(&daemon.socket, &["event", "add", "month end"], 2, "--cron");
}

#[test]
fn what_is_known_of_programs_is_listed_and_told_in_full() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["execution", "profiles"],
        "\
PROGRAM OR EVENT                                          STARTS  LAST  A DAY       TAKES  KNOWN
report [nightly], input from 1.0 GiB on                        4  -       1.0  1 min 30 s      3
month end, event of 11111111-2222-3333-4444-555555555555       2  -         -           -      0
",
    );
    let shown = run(&daemon.socket, &["execution", "show", "report"]).out;
    for line in [
        "program:      report [nightly], input from 1.0 GiB on\n",
        "runs:         4 starts, 1.0 a day\n",
        "hours (UTC):  03h 75 %, 15h 25 %\n",
        "takes:        1 min 30 s half of the time, up to 2 min 30 s in 95 %\n",
        "memory:       1.5 GiB half of the time, up to 2.5 GiB in 95 % more\n",
        "followed by:  load: 3 of 4, probability 0.70, 30 s (at most 1 min 30 s) after its end\n",
    ] {
        assert!(shown.contains(line), "{line}{shown}");
    }
    fails(&daemon.socket, &["execution", "show", "none"], 1, "nothing is known of `none`");
    let asked = daemon.control.asked.lock().clone();
    let cursor = "\"report\\u{1e}nightly\"";
    assert_eq!(
        asked[..2],
        ["profiles None None Some(50)".to_owned(), format!("profiles None Some({cursor}) Some(49)"),]
    );
    let list = run(&daemon.socket, &["execution", "list", "--limit", "1"]).out;
    assert!(list.contains("web1     report") && list.ends_with("more: --after 5\n"), "{list}");
    prints(&daemon, &["execution", "list", "--after", "5", "--vm", "web1"], "no executions\n");
}

#[test]
fn activity_is_told_announced_and_shown() {
    let daemon = Daemon::start();
    prints(&daemon, &["vm", "activity", "web1"], "machine:   web1 (uuid)\nactivity:  0 now, 100 at most\n");
    let announced = "machine:    web1 (uuid)\nactivity:   0 now, 100 at most\n\
                     announced:  40 from 2026-11-23 03:00 to 2026-11-23 05:00 UTC\n";
    prints(&daemon, &["vm", "activity", "web1", "40", "--at", "2026-11-23T03:00Z", "--for", "2h"], announced);
    fails(&daemon.socket, &["vm", "activity", "web1", "nan"], 2, "`activity` is 0 to");
    fails(&daemon.socket, &["vm", "activity", "web1", "--at", "now"], 2, "<ACTIVITY>");
    fails(&daemon.socket, &["vm", "activity", "web1", "1", "--for", "8d"], 2, "`duration_s`");
    assert_eq!(daemon.control.asked.lock().len(), 1);
}

#[test]
fn the_state_of_demand_names_what_is_unusual() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["demand"],
        "\
demand:         2 machines, every 1 s
last round:     none yet
missed rounds:  0
host:           8 CPUs, 32 GiB of memory, 20 GiB available
pressure:       cpu 1.2 %, memory - of the last 10 s
series:         0 B
note:           no cgroup v2: no pressure by machine
webhook:        https://manager/hook: 2 waiting, 0 given up, last error: status 503
UNUSUAL: db\\u{1b}[31m memory (leak) since 2026-11-22 03:04 UTC: 7.0 GiB, expected 1.0 GiB to 2.5 GiB
    grew by 1.0 GiB an hour for 5 hours
",
    );
}
