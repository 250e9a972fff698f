//! What is carried from a database that cannot be used into one that can, row by row: a row that cannot be read costs itself.
//!
//! The keys of a table are looked for from its beginning, from its end and in an index, so that a damaged page hides only what lies on it;
//! then each row is read by its key. History, series, decisions and models are not carried: they are large, and learned or measured anew.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::types::{Value, ValueRef};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, params_from_iter};

use super::Store;

/// How long a locked database is waited for.
const LOCKED: Duration = Duration::from_secs(1);
/// Rows written in one transaction, and bytes.
const ROWS: usize = 256;
const BYTES: usize = 4 << 20;

/// A table whose rows are carried.
struct Table {
    name: &'static str,
    /// Its rows, for people.
    what: &'static str,
    key: &'static [&'static str],
    /// Part of the outbox.
    outbox: bool,
}

/// In an order in which no row refers to one that is not there yet.
const TABLES: &[Table] = &[
    Table { name: "disks", what: "disks added at run time", key: &["name"], outbox: false },
    Table { name: "storages", what: "storages", key: &["id"], outbox: false },
    Table { name: "profiles", what: "profiles of storages", key: &["storage_id"], outbox: false },
    Table { name: "thresholds", what: "thresholds", key: &["scope"], outbox: false },
    Table { name: "policies", what: "policies", key: &["vm"], outbox: false },
    Table { name: "reservations", what: "reservations", key: &["id"], outbox: false },
    Table { name: "kept", what: "coming events", key: &["name"], outbox: false },
    Table { name: "programs", what: "profiles of programs", key: &["key"], outbox: false },
    Table { name: "executions", what: "executions", key: &["id"], outbox: false },
    Table { name: "events", what: "events to be told", key: &["seq"], outbox: true },
    Table { name: "deliveries", what: "deliveries of them", key: &["endpoint", "seq"], outbox: true },
];

/// What became of a table.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Carried {
    rows: u64,
    /// Rows that are known to be there and cannot be read, or make no sense.
    lost: u64,
    /// There may be more of them that nobody knows of.
    gaps: bool,
}

/// Carries what can be read of the database at `from` into `into`, which is empty; with the events that are still to be told, if `outbox`.
/// Returns what became of it, in words; never fails. Blocks its thread.
pub(super) fn carry(from: &Path, into: &Store, outbox: bool) -> String {
    let old = match open(from) {
        Ok(old) => old,
        Err(error) => {
            return format!(
                "nothing of it can be read ({error}): disks added at run time, policies and reservations must be added again"
            );
        }
    };
    let (mut carried, mut lost) = (Vec::new(), Vec::new());
    for table in TABLES.iter().filter(|table| outbox || !table.outbox) {
        let of = copy(&old, into, table);
        if of.lost > 0 || of.gaps {
            // Once a table, not once a row: a table may have many.
            let (path, lost, gaps) = (from.display(), of.lost, of.gaps);
            tracing::error!(%path, table = table.name, carried = of.rows, lost, gaps, "rows of a damaged database cannot be read");
        }
        let Table { what, .. } = table;
        if of.rows > 0 {
            carried.push(format!("{} {what}", of.rows));
        }
        match (of.lost, of.gaps) {
            (0, false) => {}
            (0, true) => lost.push(format!("perhaps some {what}")),
            (n, gaps) => lost.push(format!("{n} {what}{}", if gaps { " and perhaps more" } else { "" })),
        }
    }
    let or_none = |list: Vec<String>| if list.is_empty() { "nothing".to_owned() } else { list.join(", ") };
    let mut words = format!("carried over and in use as before: {}", or_none(carried));
    if !lost.is_empty() {
        words.push_str(&format!("; cannot be read and must be added again: {}", lost.join(", ")));
    }
    words
}

/// Opens a database to read it as one moment left it, whatever else can be done with it.
fn open(path: &Path) -> rusqlite::Result<Connection> {
    let open = |name: &str| -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
        let connection = Connection::open_with_flags(name, flags)?;
        connection.busy_timeout(LOCKED)?;
        // Has SQLite read also a file that is shorter than it was.
        connection.pragma_update(None, "writable_schema", true)?;
        connection.execute_batch("BEGIN")?;
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        Ok(connection)
    };
    let mut name = String::from("file:");
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => name.push(char::from(*byte)),
            byte => name.push_str(&format!("%{byte:02X}")),
        }
    }
    // Where SQLite cannot make the files beside it, or another process keeps it locked, it is read as it lies there.
    open(&name).or_else(|error| open(&format!("{name}?immutable=1")).map_err(|_| error))
}

fn copy(old: &Connection, into: &Store, table: &Table) -> Carried {
    let mut carried = Carried::default();
    let name = table.name;
    let there = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?";
    match old.query_row(there, [name], |_| Ok(())).optional() {
        // A version of before did not have it.
        Ok(None) => return carried,
        Ok(Some(())) => {}
        Err(_) => return Carried { gaps: true, ..carried },
    }
    let Ok(columns) = columns(into, name) else { return Carried { gaps: true, ..carried } };
    let (keys, gaps) = keys(old, table);
    carried.gaps = gaps;
    let list = columns.iter().map(|column| column.name.as_str()).collect::<Vec<_>>().join(", ");
    let by_key = table.key.iter().map(|key| format!("{key} = ?")).collect::<Vec<_>>().join(" AND ");
    let sql = format!("SELECT {list} FROM {name} NOT INDEXED WHERE {by_key}");
    // Told already: an event that waits for nobody is history.
    let waits = (name == "events").then(|| waiting(old));
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for key in keys {
        if waits.as_ref().is_some_and(|waits| !matches!(key.as_slice(), [Value::Integer(seq)] if waits.contains(seq))) {
            continue;
        }
        let row = old.prepare_cached(&sql).and_then(|mut statement| {
            statement.query_row(params_from_iter(&key), |row| {
                columns.iter().enumerate().map(|(at, column)| column.value(row.get_ref(at)?)).collect::<Result<_, _>>()
            })
        });
        let Ok(row): rusqlite::Result<Vec<Value>> = row else {
            carried.lost += 1;
            continue;
        };
        bytes += row.iter().map(length).sum::<usize>();
        batch.push(row);
        if batch.len() >= ROWS || bytes >= BYTES {
            write(into, name, &list, std::mem::take(&mut batch), &mut carried);
            bytes = 0;
        }
    }
    write(into, name, &list, batch, &mut carried);
    carried
}

/// Numbers of the events that somebody has yet to get, or never got.
fn waiting(old: &Connection) -> HashSet<i64> {
    let deliveries = TABLES.iter().find(|table| table.name == "deliveries");
    let keys = deliveries.map(|table| keys(old, table).0).unwrap_or_default();
    keys.into_iter()
        .filter_map(|key| match key.as_slice() {
            [_, Value::Integer(seq)] => Some(*seq),
            _ => None,
        })
        .collect()
}

/// Keys of all rows that can be found, and whether some may not have been.
fn keys(old: &Connection, table: &Table) -> (Vec<Vec<Value>>, bool) {
    let Table { name, key, .. } = table;
    let list = key.join(", ");
    let descending = key.iter().map(|key| format!("{key} DESC")).collect::<Vec<_>>().join(", ");
    let ways = [
        format!("SELECT {list} FROM {name} NOT INDEXED ORDER BY {list}"),
        format!("SELECT {list} FROM {name} NOT INDEXED ORDER BY {descending}"),
        // Where there is an index that has them, it is elsewhere in the file.
        format!("SELECT {list} FROM {name}"),
    ];
    let mut found = BTreeMap::new();
    let mut gaps = true;
    for way in ways {
        let whole = collect(old, &way, key.len(), &mut found).is_ok();
        if whole {
            // From end to end: there are no others.
            gaps = false;
            break;
        }
    }
    (found.into_values().collect(), gaps)
}

fn collect(
    old: &Connection,
    sql: &str,
    columns: usize,
    found: &mut BTreeMap<String, Vec<Value>>,
) -> rusqlite::Result<()> {
    let mut statement = old.prepare(sql)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let key: rusqlite::Result<Vec<Value>> = (0..columns).map(|at| row.get(at)).collect();
        // One that is no text any more is counted when it is not found.
        let key = key.unwrap_or_default();
        found.insert(format!("{key:?}"), key);
    }
    Ok(())
}

/// A column of the new database.
struct Column {
    name: String,
    kind: String,
    nullable: bool,
}

impl Column {
    /// A value, if it is one that the column is for: flipped bits make a number of a text.
    fn value(&self, value: ValueRef<'_>) -> rusqlite::Result<Value> {
        let fits = match value {
            ValueRef::Null => self.nullable,
            ValueRef::Integer(_) => matches!(self.kind.as_str(), "INTEGER" | "REAL"),
            ValueRef::Real(value) => self.kind == "REAL" && value.is_finite(),
            ValueRef::Text(_) => self.kind == "TEXT",
            ValueRef::Blob(_) => self.kind == "BLOB",
        };
        let odd = || rusqlite::Error::InvalidColumnType(0, self.name.clone(), value.data_type());
        if fits { Value::try_from(value).map_err(|_| odd()) } else { Err(odd()) }
    }
}

fn columns(store: &Store, table: &str) -> Result<Vec<Column>, super::StoreError> {
    store.read("read the columns of", |connection| {
        let mut statement = connection.prepare(&format!("PRAGMA table_info({table})"))?;
        let column = |row: &rusqlite::Row<'_>| {
            let (kind, not_null, key): (String, bool, i64) = (row.get(2)?, row.get(3)?, row.get(5)?);
            Ok(Column { name: row.get(1)?, kind, nullable: !not_null && key == 0 })
        };
        statement.query_map([], column)?.collect()
    })
}

fn length(value: &Value) -> usize {
    match value {
        Value::Text(text) => text.len(),
        Value::Blob(bytes) => bytes.len(),
        _ => 8,
    }
}

/// Writes rows; one that the database refuses (a value out of its bounds, a reference to nothing) is lost alone.
fn write(into: &Store, name: &'static str, list: &str, rows: Vec<Vec<Value>>, carried: &mut Carried) {
    let (count, Some(width)) = (rows.len() as u64, rows.first().map(Vec::len)) else { return };
    let marks = vec!["?"; width].join(", ");
    let sql = format!("INSERT OR IGNORE INTO {name} ({list}) VALUES ({marks})");
    let written = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&written);
    let outcome = into.inner.writer.submit(0, false, move |connection| {
        let mut written = 0;
        let mut statement = connection.prepare(&sql)?;
        for row in &rows {
            match statement.execute(params_from_iter(row)) {
                Ok(more) => written += more as u64,
                Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {}
                Err(error) => return Err(error.into()),
            }
        }
        counter.store(written, Ordering::Relaxed);
        Ok(())
    });
    let written = match outcome.wait() {
        Ok(()) => written.load(Ordering::Relaxed),
        Err(error) => {
            tracing::error!(table = name, %error, "rows not carried over");
            0
        }
    };
    carried.rows += written;
    carried.lost += count - written.min(count);
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::OnceLock;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::super::demand::{
        Decision, DecisionKind, Endpoint, Mode, NewEvent, PolicyRow, Reservation, ReservationState, Reservations,
        Resource,
    };
    use super::super::rescue::{Rescued, open_or_rescue};
    use super::super::{DiskRow, suspect};
    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const ROWS: usize = 60;

    fn event(n: usize) -> NewEvent {
        NewEvent {
            kind: "x".into(),
            source: "/h".into(),
            subject: format!("vm{n}"),
            at_us: n as u64,
            data: format!("{{\"text\":\"{}\"}}", "e".repeat(300)),
        }
    }

    /// A database with some pages of each table that is carried.
    fn filled() -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let store = Store::open(&path).unwrap();
        let everybody = Endpoint { name: "m".into(), kinds: vec!["*".into()] };
        store.set_endpoints(vec![everybody]).wait().unwrap();
        for n in 0..ROWS {
            let text = format!("{{\"text\":\"{}\"}}", "t".repeat(300));
            let name = format!("{n:04}");
            drop(store.add_disk(DiskRow { name: name.clone(), store: "/s".repeat(150), ..DiskRow::default() }));
            drop(store.save_profile(&format!("storage {name} {}", "s".repeat(200)), vec![7; 300], 1, 1));
            drop(store.set_policy(PolicyRow { vm: name.clone(), data: text.clone(), changed_unix_ms: 5 }));
            let (id, state, vm) = (name.clone(), ReservationState::Admitted, "v".repeat(50));
            let promise = Reservation { id, vm, from_s: 1, to_s: 2, state, data: text, changed_unix_ms: 1 };
            drop(store.set_reservation(promise, None));
            drop(store.keep(format!("event:{name}"), vec![1; 300]));
            drop(store.record_event(event(n)));
        }
        store.record_event(event(ROWS)).wait().unwrap();
        // One is told, and need not be told again.
        store.delivered("m", 1).wait().unwrap();
        assert!(store.close(LONG));
        let raw = Connection::open(&path).unwrap();
        for n in 0..ROWS {
            let values = (format!("p{n:04}"), vec![3u8; 300]);
            raw.execute("INSERT INTO programs VALUES (?, 1, '{}', ?)", values).unwrap();
            let sql = "INSERT INTO executions VALUES (?, 'v', 'i', 1, NULL, 'running', ?)";
            raw.execute(sql, (n as i64, "d".repeat(300))).unwrap();
            raw.execute("INSERT INTO thresholds VALUES (?, 0.5)", [format!("{n:04} {}", "x".repeat(200))]).unwrap();
        }
        (folder, path)
    }

    fn count(path: &Path, table: &str) -> usize {
        let raw = Connection::open(path).unwrap();
        raw.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get::<_, u32>(0)).unwrap() as usize
    }

    /// Leaf pages of a table, by number from 1.
    fn leaves(path: &Path, table: &str) -> Vec<usize> {
        let raw = Connection::open(path).unwrap();
        let sql = "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf' ORDER BY path";
        let mut statement = raw.prepare(sql).unwrap();
        statement
            .query_map([table], |row| Ok(row.get::<_, u32>(0)? as usize))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap()
    }

    fn damage(path: &Path, page: usize, with: impl Fn(&mut [u8])) {
        let mut bytes = std::fs::read(path).unwrap();
        with(&mut bytes[(page - 1) * 4096..page * 4096]);
        std::fs::write(path, bytes).unwrap();
    }

    /// What the daemon reads of it when it starts.
    fn read(store: &Store) {
        store.disks().unwrap();
        store.policies().unwrap();
        store.reservations(&Reservations::default()).unwrap();
        store.kept("").unwrap();
        store.programs().unwrap();
        store.executions(0).unwrap();
        store.pending_decisions().unwrap();
        store.waiting("m").unwrap();
        store.endpoints().unwrap();
        store.thresholds().unwrap();
    }

    fn decision() -> Decision {
        Decision {
            at_us: 9,
            vm: "v".into(),
            resource: Resource::Cpu,
            mode: Mode::Act,
            kind: DecisionKind::Raise,
            before: None,
            asked: None,
            pending: true,
            why: String::new(),
            forecast: None,
        }
    }

    #[test]
    fn a_damaged_page_costs_what_lies_on_it_and_nothing_else() {
        let (folder, whole) = filled();
        for table in TABLES {
            for kind in ["zeroed", "flipped"] {
                let path = folder.path().join(format!("{}-{kind}", table.name));
                std::fs::copy(&whole, &path).unwrap();
                let before: Vec<usize> = TABLES.iter().map(|table| count(&path, table.name)).collect();
                let pages = leaves(&path, table.name);
                assert!(pages.len() >= 3 || table.name == "deliveries", "{}: {pages:?}", table.name);
                damage(&path, pages[pages.len() / 2], |page| match kind {
                    "zeroed" => page.fill(0),
                    _ => page.iter_mut().for_each(|byte| *byte ^= 0xa5),
                });
                if table.name == "events" {
                    // Grows for years, and is looked at when a write has met damage.
                    std::fs::write(suspect(&path), "").unwrap();
                }
                let Rescued { store, trouble, stand_in } =
                    open_or_rescue(&path, &folder.path().join("stand-in")).unwrap();
                let trouble = trouble.unwrap_or_else(|| panic!("{} {kind} was not seen", table.name));
                assert!(!stand_in && trouble.contains("cannot be read") && !suspect(&path).exists(), "{trouble}");
                assert!(trouble.contains(table.what), "{}: {trouble}", table.name);
                read(&store);
                store.record_decision(decision(), Some(event(1))).wait().unwrap();
                assert!(store.close(LONG));
                for (of, before) in TABLES.iter().zip(before) {
                    // Of events one was told already, and one is told since.
                    let after = count(&path, of.name);
                    let hit = of.name == table.name
                        || matches!(
                            (table.name, of.name),
                            ("storages", "profiles") | ("deliveries", "events") | ("events", "deliveries")
                        );
                    match hit {
                        true => assert!(
                            (1..before).contains(&after) || pages.len() < 3,
                            "{} {kind}: {after} of {before} {}",
                            table.name,
                            of.name
                        ),
                        false => assert_eq!(after, before, "{} {kind}: {}", table.name, of.name),
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_cut_off_is_gone_and_the_rest_is_not() {
        let (folder, whole) = filled();
        let bytes = std::fs::read(&whole).unwrap();
        let mut carried = 0;
        for part in 1..10 {
            let path = folder.path().join(format!("cut{part}"));
            std::fs::write(&path, &bytes[..bytes.len() * part / 10]).unwrap();
            let Rescued { store, trouble, .. } = open_or_rescue(&path, &folder.path().join("stand-in")).unwrap();
            assert!(trouble.is_some(), "{part} tenths");
            read(&store);
            let now: usize = TABLES.iter().map(|table| count(&path, table.name)).sum();
            assert!(store.close(LONG));
            carried = carried.max(now);
        }
        assert!(carried > 300, "{carried}");
    }

    #[test]
    fn a_write_that_meets_damage_has_the_next_start_look_closer() {
        let (folder, path) = filled();
        let pages = leaves(&path, "events");
        damage(&path, *pages.last().unwrap(), |page| page.fill(0));
        let stand_in = folder.path().join("stand-in");
        let Rescued { store, trouble, .. } = open_or_rescue(&path, &stand_in).unwrap();
        assert_eq!(trouble, None);
        let refused = store.record_decision(decision(), Some(event(1))).wait();
        assert!(matches!(refused, Err(super::super::StoreError::Damaged { .. })), "{refused:?}");
        assert!(store.condition().degraded.is_some() && store.pending_decisions().unwrap().is_empty());
        let _ = store.close(LONG);
        drop(store);
        let Rescued { store, trouble, .. } = open_or_rescue(&path, &stand_in).unwrap();
        assert!(trouble.is_some_and(|trouble| trouble.contains("was damaged")));
        store.record_decision(decision(), Some(event(1))).wait().unwrap();
        assert_eq!(store.policies().unwrap().len(), ROWS);
        assert!(store.close(LONG));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
        /// Whatever was flipped, there is a database that takes decisions afterwards, and what was carried over can be read.
        #[test]
        fn any_damage_leaves_a_database_to_work_with(flips in prop::collection::vec((any::<prop::sample::Index>(), 1..=255u8), 1..40)) {
            static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
            let mut bytes = WHOLE.get_or_init(|| std::fs::read(filled().1).unwrap()).clone();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("db");
            for (at, bits) in flips {
                let at = at.index(bytes.len());
                bytes[at] ^= bits;
            }
            std::fs::write(&path, &bytes).unwrap();
            // As if a write had met it.
            std::fs::write(suspect(&path), "").unwrap();
            let Rescued { store, trouble, .. } = open_or_rescue(&path, &folder.path().join("stand-in")).unwrap();
            let readable = store.policies().is_ok() && store.kept("").is_ok() && store.disks().is_ok();
            prop_assert!(readable, "{trouble:?}");
            if trouble.is_some() {
                read(&store);
                store.record_decision(decision(), Some(event(1))).wait().unwrap();
            }
        }
    }
}
