//! Recordings, explanations, advice.

use crate::fake::Daemon;
use crate::{fails, prints, run};

#[test]
fn an_explanation_begins_with_the_answer() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["explain", "web1-vda", "12345"],
        "\
disk web1-vda, offset 12288: prefetched 3.2 s ago (markov, 0.81), too late: the
guest had to wait for the rest of it.

expected now:
EXPERT  SCORE  PROBABILITY  WEIGHT  DUE
phase    0.90         0.81       -  in 1.2 s
markov   0.70         0.31       -  -

proposed:
WHEN            EXPERT  PROBABILITY  THRESHOLD  WHAT BECAME OF IT
3.2 s ago       markov         0.81       0.50  read, late
1 min 35 s ago  markov         0.31       0.50  below the threshold

cached:        on the SSD
prefetch:      on, from probability 0.50 on
in vain:       a page costs 1.00 of a miss, by that probability
governor:      hands out from 0.62 on; 6.0 MiB of 16 MiB left to waste
a miss costs:  5.20 ms on this disk
expected:      gain 0.81 x 5.20 ms = 4.21 ms, waste 0.19 x 5.20 ms = 988 us
store:         1.0 MiB of 2.0 MiB under way, 64 KiB waiting
record:        proposals of the last 2 h 0 min
",
    );
}

#[test]
fn a_recording_has_its_gaps_at_their_place_and_says_so() {
    let daemon = Daemon::start();
    let outcome = run(&daemon.socket, &["trace", "record", "web1-vda", "--out", "-"]);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_eq!(
        outcome.out,
        "ts_us,op,offset,len\n1000,R,512,1024\n# missing 17: the reader was too slow\n2000,W,0,4096\n"
    );
    assert!(outcome.err.contains("17 requests are missing"), "{}", outcome.err);
    assert!(outcome.err.contains("2 requests of disk web1-vda within 0 s, 17 missing"), "{}", outcome.err);
    let outcome = run(&daemon.socket, &["trace", "record", "web1-vda", "--out", "-", "--requests", "1"]);
    assert_eq!((outcome.code, outcome.out.lines().count()), (0, 2), "{}", outcome.err);
}

#[test]
fn a_recording_that_breaks_off_keeps_what_came_and_fails() {
    let daemon = Daemon::start();
    let file = daemon.folder().join("x.csv");
    let name = file.to_str().unwrap();
    fails(&daemon.socket, &["trace", "record", "broken", "--out", name], 1, "1 request is in ");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "ts_us,op,offset,len\n1,R,0,512\n");
    fails(&daemon.socket, &["trace", "record", "web1-vda", "--out", name], 1, "exists");
    fails(&daemon.socket, &["trace", "record", "web1-vda", "--out", "/nonexistent/x"], 1, "cannot make /nonexistent/x");
    fails(&daemon.socket, &["trace", "record", "web1-vda", "--requests", "0"], 2, "0 is not in");
}

#[test]
fn advice_begins_with_what_to_do_and_fits_the_terminal() {
    let daemon = Daemon::start();
    let svg = daemon.folder().join("advice.svg");
    let outcome = run(&daemon.socket, &["advise", "web1", "--svg", svg.to_str().unwrap()]);
    assert_eq!((outcome.code, outcome.err.as_str()), (0, ""));
    assert!(outcome.out.starts_with("Recommended for web1: "), "{}", outcome.out);
    assert!(outcome.out.contains("10000 requests, 10000 reads, within 3 min 19 s, 1 disk\n"), "{}", outcome.out);
    assert!(outcome.out.contains("not in it:    0 older, 5 missing\n"), "{}", outcome.out);
    // 1 s of waiting over 60 reads from the store is too little to count as measured.
    assert!(outcome.out.contains("ASSUMED"), "{}", outcome.out);
    for line in outcome.out.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    let chart = std::fs::read_to_string(&svg).unwrap();
    assert!(chart.starts_with("<svg ") && chart.trim_end().ends_with("</svg>") && !chart.contains("NaN"), "{chart}");

    let outcome = run(&daemon.socket, &["advise", "web1-vda", "--json", "--store-us", "5000"]);
    let value: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    assert_eq!(
        (&value["store_latency"]["source"], &value["history"]["set_bytes"]),
        (&"given".into(), &3_932_160.into())
    );
    let best = value["best"]["latency_us"].as_f64().unwrap();
    assert!(value["recommended"]["latency_us"].as_f64().unwrap() <= best + 2.5 * 50.0, "{value}");
}

#[test]
fn a_short_history_is_refused_with_what_is_missing() {
    let daemon = Daemon::start();
    let told = "the history of web1 is too short to advise on: 2 reads within 1 min 0 s, 10000 are needed; at that rate in \
                about 3 d 11 h more";
    fails(&daemon.socket, &["advise", "web1", "--since", "1h"], 1, told);
    fails(&daemon.socket, &["advise", "nobody"], 1, "`prestagectl disk list` shows both");
}
