//! `prestagectl model`, against fixtures.

use super::fake::Daemon;
use super::{fails, prints, run};

#[test]
fn models_are_listed_and_shown_within_80_columns() {
    let daemon = Daemon::start();
    let list = run(&daemon.socket, &["model", "list"]);
    assert_eq!((list.code, list.err.as_str()), (0, ""));
    assert_eq!(
        list.out,
        "\
ID  STATE        ACCESSES  BITS  GAIN%  TOP1%  AGE         SCOPE
 2  rejected      2000000  2.31   16.0   61.2  1 h 30 min  global
 3  champion      2000000  2.31   16.0   61.2  1 h 30 min  global
 4  shadow        2000000  2.31   16.0   61.2  1 h 30 min  …-image-debian12
 5  training            -     -      -      -  1 h 30 min  global
 6  interrupted         -     -      -      -  1 h 30 min  global
2 rejected: saves no more than 0.012 bits an access with 99 % confidence, 0.05
are needed; undecided no longer
file:/srv/a\\u{1b}[31m.raw waits for its training
",
        "{}",
        list.out
    );
    let show = run(&daemon.socket, &["model", "show", "4"]);
    let expected = "\
AHEAD   BITS  MARKOV  GAIN%  TOP1%  MARKOV
    1  2.310   2.750   16.0   61.2    58.8
    4  2.900   3.125    7.2   61.2    58.8
    8  3.200   3.200    0.0   61.2    58.8

Against model 3: saves 0.123 bits an access, 0.031 to 0.214 with 99 %
confidence, over 51200 of at most 1000000 accesses. Promoted when it surely
saves 0.05.
";
    assert!(show.out.contains(expected), "{}", show.out);
    let changes = "1 h 30 min ago: training -> shadow, by trainer\n  training is done\n";
    assert!(show.out.ends_with(changes), "{}", show.out);
    for line in list.out.lines().chain(show.out.lines()) {
        assert!(line.chars().count() <= 80, "{line}");
    }
    fails(&daemon.socket, &["model", "show", "9"], 1, "there is no model 9");
    fails(&daemon.socket, &["model", "show", "x"], 2, "invalid value");
}

#[test]
fn training_promotion_and_roll_back_are_one_command_each() {
    let daemon = Daemon::start();
    prints(&daemon, &["model", "train"], "model 7 of global: training, 900000 accesses to learn from\n");
    prints(&daemon, &["model", "train", "--all", "--resume"], "model 7 of global: training goes on\n");
    let too_little = "web1: not enough history: 42 accesses, at least 8192 are needed";
    fails(&daemon.socket, &["model", "train", "--storage", "web1"], 1, too_little);
    fails(&daemon.socket, &["model", "train", "--storage", "web1", "--all"], 2, "cannot be used with");
    prints(&daemon, &["model", "promote", "4"], "model 4 predicts for global now, in place of model 3\n");
    prints(&daemon, &["model", "rollback"], "global has no model of its own in use now, in place of model 3\n");
    let outcome = run(&daemon.socket, &["model", "rollback", "--scope", "web1", "--json"]);
    assert!(outcome.out.contains("\"before\": 3"), "{}", outcome.out);
    assert!(run(&daemon.socket, &["model", "evaluate", "4"]).out.starts_with("on 250000 accesses\nAHEAD"));
    let asked = daemon.control.asked.lock().join("\n");
    assert!(asked.contains("rollback RollbackRequest { scope: Some(\"web1\") }"), "{asked}");
}

#[test]
fn thresholds_are_shown_set_and_unset() {
    let daemon = Daemon::start();
    let shown = "default: 0.6 (configured: 0.5)\na, b: 0.9\n";
    prints(&daemon, &["model", "threshold"], shown);
    prints(&daemon, &["model", "threshold", "b"], shown);
    fails(&daemon.socket, &["model", "threshold", "c"], 1, "there is no profile `c`");
    prints(&daemon, &["model", "threshold", "0.7"], "default: 0.7 (configured: 0.5)\n");
    prints(&daemon, &["model", "threshold", "default"], "default: 0.5 (as configured)\n");
    prints(&daemon, &["model", "threshold", "a", "0.25"], "default: 0.25 (configured: 0.5)\n");
    prints(&daemon, &["model", "threshold", "a", "default"], "default: 0.5 (as configured)\n");
    fails(&daemon.socket, &["model", "threshold", "1.5"], 2, "1.5 is not a probability; it is 0 to 1");
    fails(&daemon.socket, &["model", "threshold", "a", "much"], 2, "`much` is not a probability");
    fails(&daemon.socket, &["model", "threshold", "nan"], 2, "not a probability");
    let asked = daemon.control.asked.lock().clone();
    assert_eq!(asked[0], "threshold None Some(0.7)");
    assert_eq!(asked[2], "threshold Some(\"a\") Some(0.25)");
    assert_eq!(asked[3], "threshold Some(\"a\") None");
}

#[test]
fn a_model_goes_into_a_file_and_comes_out_of_one() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    let file = path.to_str().unwrap();
    prints(
        &daemon,
        &["model", "export", "4", "--out", file],
        &format!("model 4, 20 B, is in {file}; `prestagectl model import` takes it up\n"),
    );
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes, b"PSTGMODL\xff\x00 and so on");
    fails(&daemon.socket, &["model", "export", "4", "--out", file], 1, "; name another with --out");
    fails(&daemon.socket, &["model", "export", "5", "--out", "/nonexistent/m"], 1, "model 5 has no weights yet");
    fails(&daemon.socket, &["model", "export", "4", "--out", "/nonexistent/m"], 1, "cannot make /nonexistent/m");
    let piped = super::command(&daemon.socket, &["model", "export", "4", "--out", "-"]).output().unwrap();
    assert_eq!(piped.stdout, bytes);

    let taken = "\
model 8 of global is imported and runs in shadow, in place of model 4; it is
promoted when it proves better, or with `prestagectl model promote 8`
";
    prints(&daemon, &["model", "import", file], taken);
    prints(&daemon, &["model", "import", file, "--all"], taken);
    let json = run(&daemon.socket, &["model", "import", file, "--storage", "file:/srv/a b", "--json"]);
    assert!(json.out.contains("\"scope\": \"file:/srv/a b\""), "{}", json.out);
    let asked = daemon.control.asked.lock().join("\n");
    let scopes = ["import 20 bytes for None", "for Some(\"global\")", "for Some(\"file:/srv/a b\")"];
    assert!(scopes.iter().all(|scope| asked.contains(scope)), "{asked}");
    fails(&daemon.socket, &["model", "import", file, "--all", "--storage", "a"], 2, "cannot be used with");
    fails(&daemon.socket, &["model", "import", "/nonexistent/m"], 1, "cannot read /nonexistent/m");
    fails(&daemon.socket, &["model", "import", "/dev/zero"], 1, "is no model: it has 1.0 MiB or more");
    fails(&daemon.socket, &["model", "import", "/dev/null"], 1, "this is no model");
}
