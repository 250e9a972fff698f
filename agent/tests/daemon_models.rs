//! Models and thresholds of the real `prestaged`, by the real `prestagectl`, over a database made beforehand.
#![allow(clippy::unwrap_used, reason = "a failed assumption of a test is a failed test")]

#[path = "daemon_host/mod.rs"]
mod host;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use host::Host;
use prestage_agent::store::models::{Change, NewModel};
use prestage_agent::store::segment::{AccessOp, AccessRecord};
use prestage_agent::store::{Accesses, Store};
use prestage_predictor::lstm::Weights;
use prestage_predictor::lstm::weights::COUNT;

const LONG: Duration = Duration::from_secs(60);

/// The database, while no daemon runs.
fn database(host: &Host, fill: impl FnOnce(&Store)) {
    let store = Store::open(&host.path("state/prestage.db")).unwrap();
    fill(&store);
    assert!(store.close(LONG));
}

/// Nothing is trained but what is asked for.
const IDLE: &str = "[model]\ntraining = false\n";

/// Waits until a line of what is shown of model 1 begins with `label` and goes on with `says`.
fn shows(host: &Host, label: &str, says: &str) {
    // Training is of idle priority: it waits for whatever else the machine does.
    let deadline = Instant::now() + 10 * LONG;
    loop {
        let shown = host.does(&["model", "show", "1"]);
        let mut said = shown.lines().filter_map(|line| line.strip_prefix(label));
        if said.any(|said| said.trim_start().starts_with(says)) {
            return;
        }
        assert!(Instant::now() < deadline, "{label} is not {says}: {shown}\n{}", host.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A shadow of all storages; returns its id.
fn add_model(store: &Store, weights: Vec<u8>) -> i64 {
    let change = || Change { actor: "trainer", reason: "made by a test".into(), at_unix_ms: 1 };
    let new = NewModel { kind: "lstm".into(), scope: "global".into(), parent: None, seed: 1 };
    store.start_model(new, change()).wait().unwrap();
    let id = store.models().unwrap().last().unwrap().id;
    store.finish_model(id, weights, "{}".into(), change()).wait().unwrap();
    id
}

fn weights(value: f32) -> Vec<u8> {
    Weights::new(vec![value; COUNT]).unwrap().to_bytes()
}

#[test]
fn models_are_promoted_and_rolled_back_and_damaged_ones_are_not_used() {
    let mut host = Host::new();
    database(&host, |store| {
        add_model(store, weights(0.01));
        add_model(store, weights(0.02));
        let mut damaged = weights(0.03);
        damaged[1000] ^= 1;
        add_model(store, damaged);
    });
    host.start(IDLE);
    host.refuses(&["model", "promote", "3"], 1, &["model 3 cannot be used: the model's checksum"]);
    host.refuses(&["model", "promote", "4"], 1, &["there is no model 4"]);
    host.refuses(&["model", "rollback"], 1, &["there is no champion of global to roll back"]);
    assert_eq!(host.does(&["model", "promote", "1"]), "model 1 predicts for global now\n");
    assert_eq!(host.does(&["model", "promote", "2"]), "model 2 predicts for global now, in place of model 1\n");
    host.refuses(&["model", "promote", "2"], 1, &["model 2 is champion already"]);
    host.stop();
    host.start(IDLE);
    assert!(host.does(&["model", "show", "2"]).contains("state:  champion"));
    assert_eq!(host.does(&["model", "rollback"]), "model 1 predicts for global now, in place of model 2\n");
    let list = host.does(&["model", "list"]);
    for (id, state) in [(1, "champion"), (2, "retired"), (3, "rejected")] {
        assert!(list.lines().any(|line| line.starts_with(&format!(" {id}  {state}"))), "{list}");
    }
    host.stop();

    // The champion rots on the disk: the next start goes on with the one before it and says so.
    host.start(IDLE);
    host.does(&["model", "promote", "2"]);
    host.stop();
    let raw = rusqlite::Connection::open(host.path("state/prestage.db")).unwrap();
    raw.execute("UPDATE models SET weights = zeroblob(length(weights)) WHERE id = 2", []).unwrap();
    drop(raw);
    host.start(IDLE);
    let status = host.does(&["status"]);
    assert!(status.contains("model 2 of global cannot be used"), "{status}");
    assert!(host.does(&["model", "show", "1"]).contains("state:  champion"));
    host.stop();
}

#[test]
fn a_model_is_carried_to_another_host_and_has_to_win_there() {
    let (mut from, mut to) = (Host::new(), Host::new());
    database(&from, |store| assert_eq!(add_model(store, weights(0.01)), 1));
    from.start(IDLE);
    let file = from.path("m").display().to_string();
    from.does(&["model", "export", "1", "--out", &file]);
    from.refuses(&["model", "export", "2", "--out", "-"], 1, &["there is no model 2"]);
    from.refuses(&["model", "import", &file], 1, &["it is model 1 of global, which is in use already"]);

    database(&to, |store| assert_eq!(add_model(store, weights(0.02)), 1));
    to.start(IDLE);
    let said = to.does(&["model", "import", &file]);
    assert!(said.starts_with("model 2 of global is imported and runs in shadow, in place of model 1;"), "{said}");
    let shown = to.does(&["model", "show", "2"]);
    assert!(shown.contains("state:  shadow") && shown.contains("imported: model 1 of global on host "), "{shown}");
    assert!(to.does(&["model", "list"]).contains("1 rejected: another model was imported"));
    to.does(&["model", "promote", "2"]);
    // The same model, to the byte.
    let back = to.path("back");
    to.does(&["model", "export", "2", "--out", &back.display().to_string()]);
    let [there, here] = [from.path("m"), back].map(|path| std::fs::read(path).unwrap());
    let carried = |file: &[u8]| prestage_agent::models::file::decode(file).unwrap().1.to_vec();
    assert_eq!((carried(&there), carried(&here)), (weights(0.01), weights(0.01)));

    let mut cut = there.clone();
    cut.pop();
    let odd = to.path("odd");
    let path = odd.display().to_string();
    let refuses = |bytes: &[u8], words: &[&str], says: &str| {
        std::fs::write(&odd, bytes).unwrap();
        to.refuses(&[&["model", "import", &path], words].concat(), 1, &[says]);
    };
    refuses(&cut, &[], "damaged or cut short");
    refuses(b"Hello", &[], "this is no model");
    refuses(&there, &["--storage", "nowhere"], "there is no disk or storage `nowhere`");
    let (header, known) = prestage_agent::models::file::decode(&there).unwrap();
    let file = |scope: &str, kind: &str, weights: &[u8]| {
        let header = prestage_agent::models::file::Header { scope: scope.into(), kind: kind.into(), ..header.clone() };
        prestage_agent::models::file::encode(&header, weights)
    };
    refuses(&file("nbd:elsewhere", "lstm", known), &[], "storage nbd:elsewhere on host");
    refuses(&file("global", "gru", known), &[], "of kind `gru`; this prestaged runs `lstm`");
    refuses(&file("global", "lstm", &known[1..]), &[], "does not fit this version");
    // For a storage unknown here it is taken up by naming what it is for; that it is in use for all is known as well.
    refuses(&file("nbd:elsewhere", "lstm", known), &["--all"], "model 2 of global, which is in use already");
    assert!(to.does(&["model", "list"]).contains(" 2  champion"));
    from.stop();
    to.stop();
}

#[test]
fn too_little_history_is_refused_with_what_there_is() {
    let mut host = Host::new();
    database(&host, |store| {
        // Old history would be removed at the start.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let now = u64::try_from(since.as_micros()).unwrap();
        let record = |n: u64| AccessRecord { at_us: now + n, op: AccessOp::Read, page: n * 7, pages: 1 };
        let records = (0..1234).map(record).collect();
        let accesses = Accesses { storage: "file:/a".into(), vm: "v".into(), program: String::new(), records };
        store.append_accesses(accesses).wait().unwrap();
    });
    host.start(IDLE);
    host.refuses(&["model", "train"], 1, &["global: not enough history: 1234 accesses, at least"]);
    host.refuses(&["model", "train", "--storage", "file:/a"], 1, &["file:/a: not enough history: 1234 accesses"]);
    host.refuses(&["model", "train", "--storage", "nowhere"], 1, &["there is no disk or storage `nowhere`"]);
    host.refuses(&["model", "train", "--resume"], 1, &["no training of global was interrupted"]);
    assert!(host.does(&["model", "list"]).contains("no models yet"));
    host.stop();
}

#[test]
fn thresholds_are_kept_over_restarts() {
    let mut host = Host::new();
    let disk = host.path("disk");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    host.start(IDLE);
    host.does(&["disk", "add", "d", &disk.display().to_string()]);
    assert_eq!(host.does(&["model", "threshold"]), "default: 0.125 (as configured)\n");
    host.does(&["model", "threshold", "0.6"]);
    host.does(&["model", "threshold", "d", "0.1"]);
    host.refuses(&["model", "threshold", "nowhere", "0.1"], 1, &["there is no disk or storage `nowhere`"]);
    let explained = host.does(&["explain", "d", "0"]);
    assert!(explained.contains("from probability 0.10 on\n"), "{explained}");
    assert!(explained.contains("a page costs 0.11 of a miss"), "{explained}");
    assert!(explained.contains("hands out from 0.10 on; 4.0 MiB of 16 MiB left"), "{explained}");
    host.stop();
    host.start(IDLE);
    assert_eq!(host.does(&["model", "threshold"]), "default: 0.6 (configured: 0.125)\nd: 0.1\n");
    host.does(&["model", "threshold", "d", "default"]);
    assert_eq!(host.does(&["model", "threshold", "default"]), "default: 0.125 (as configured)\n");
    host.stop();
}

/// Reads of a guest that goes on with one of four runs or reads somewhere in a file, by a rule that its history tells.
fn history(store: &Store, accesses: u64) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let from = u64::try_from(since.as_micros()).unwrap();
    let mut seed = 7u64;
    let mut runs = [0u64; 4];
    let records = (0..accesses).map(|n| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let page = if n % 3 == 2 {
            4_000_000 + (seed >> 40) % 50_000
        } else {
            let run = (n / 3 % 4) as usize;
            runs[run] += 4;
            run as u64 * 1_000_000 + runs[run]
        };
        AccessRecord { at_us: from + n, op: AccessOp::Read, page, pages: 4 }
    });
    let (storage, vm, records) = ("file:/a".into(), "v".into(), records.collect());
    store.append_accesses(Accesses { storage, vm, program: String::new(), records }).wait().unwrap();
}

#[test]
fn a_model_is_trained_from_history_over_a_restart_and_put_to_use() {
    let mut host = Host::new();
    database(&host, |store| history(store, 30_000));
    host.start(IDLE);
    assert_eq!(host.does(&["model", "train"]), "model 1 of global: training, 30000 accesses to learn from\n");
    // The history is read, and there is a training to interrupt.
    shows(&host, "trained on:", "30000 accesses");
    shows(&host, "state:", "training");
    host.refuses(&["model", "promote", "1"], 1, &["training"]);
    host.stop();

    // A training that was stopped goes on where it was.
    host.start(IDLE);
    assert!(host.does(&["model", "list"]).contains("interrupted"));
    assert_eq!(host.does(&["model", "train", "--resume"]), "model 1 of global: training goes on\n");
    shows(&host, "state:", "shadow");
    assert_eq!(host.does(&["model", "promote", "1"]), "model 1 predicts for global now\n");
    assert!(host.does(&["model", "list"]).lines().any(|line| line.starts_with(" 1  champion")));
    // Two reads in three go on with a run: a model that has learned that guesses them.
    let measured: serde_json::Value = serde_json::from_str(&host.does(&["model", "evaluate", "1", "--json"])).unwrap();
    let next = &measured["leads"][0];
    assert!(next["top1"].as_f64().unwrap() > 0.6, "{measured}");
    host.stop();
}
