//! Events on their way to receivers that are slow, refuse, go away, or die with the daemon. The receivers speak HTTP by hand.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use parking_lot::Mutex;
use prestage_integration::webhook::{Secret, Sender, Target};
use serde_json::Value;

use super::events::{Amount, Anomaly, Change, Event, KINDS, Reserved};
use super::*;
use crate::store::Store;
use crate::store::demand::{Endpoint, EventRow, Resource};

const LONG: Duration = Duration::from_secs(60);
const US: u64 = 1_700_000_000_000_000;
/// 32 bytes from 0 on.
const SECRET: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

fn change(vm: &str, reason: &str) -> Change {
    Change {
        vm: vm.to_owned(),
        resource: Resource::Memory.name(),
        unit: events::unit(Resource::Memory),
        before: Some(1e9),
        asked: Some(2e9),
        got: None,
        verified: false,
        took_ms: None,
        mode: "act",
        reason: reason.to_owned(),
    }
}

/// What a receiver got: head and body.
#[derive(Debug, Clone)]
struct Got {
    head: String,
    body: Value,
    text: String,
}

impl Got {
    fn header(&self, name: &str) -> String {
        let line = self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        });
        line.unwrap_or_default()
    }

    fn of(&self, key: &str) -> String {
        self.body[key].as_str().unwrap_or_default().to_owned()
    }
}

fn read(stream: &mut TcpStream) -> Option<Got> {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    loop {
        let read = stream.read(&mut part).ok().filter(|read| *read > 0)?;
        bytes.extend_from_slice(&part[..read]);
        let text = String::from_utf8(bytes.clone()).ok()?;
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        if body.len() >= length.unwrap_or(0) {
            return Some(Got { head: head.to_owned(), body: serde_json::from_str(body).ok()?, text: body.to_owned() });
        }
    }
}

/// A receiver whose answers are decided by `answer`; 0: it says nothing and keeps the connection. Its URL, and what it got.
fn receiver(answer: impl Fn(&Got) -> u16 + Send + 'static) -> (String, Receiver<Got>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let (sender, got) = channel();
    std::thread::spawn(move || {
        let mut silent = Vec::new();
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let Some(one) = read(&mut stream) else { continue };
            let status = answer(&one);
            if sender.send(one).is_err() {
                return;
            }
            match status {
                0 => silent.push(stream),
                status => {
                    let _ = write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                }
            }
        }
    });
    (url, got)
}

fn courier(name: &str, url: &str) -> Courier {
    let target = Target::parse(url, false).unwrap();
    let sender = Sender::new(target, vec![Secret::parse(SECRET).unwrap()], None).unwrap();
    let patience = Patience {
        first: Duration::from_millis(2),
        most: Duration::from_millis(10),
        give_up: Duration::from_secs(1 << 40),
    };
    Courier { name: name.to_owned(), sender, patience, seed: 1 }
}

fn store(path: &Path, endpoints: &[&str]) -> Store {
    let store = Store::open(path).unwrap();
    let endpoint = |name: &&str| Endpoint { name: (*name).to_owned(), kinds: vec!["*".to_owned()] };
    store.set_endpoints(endpoints.iter().map(endpoint).collect()).wait().unwrap();
    store
}

fn tell(store: &Store, vm: &str, n: usize) {
    store.record_event(Event::Changed(change(vm, &n.to_string())).told("a host", US + n as u64)).wait().unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Runs couriers until a number of messages has arrived.
fn collect(store: &Store, couriers: Vec<Courier>, got: &Receiver<Got>, number: usize) -> Vec<Got> {
    let runtime = runtime();
    let running = runtime.block_on(async { Couriers::start(store, couriers) });
    let all = (0..number).map(|_| got.recv_timeout(LONG).unwrap()).collect();
    runtime.block_on(running.stop());
    all
}

/// Waits until nothing waits for an endpoint any more.
fn drained(store: &Store, name: &str) {
    let mut rounds = 0;
    while !store.waiting(name).unwrap().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
        rounds += 1;
        assert!(rounds < 12_000, "{:?}", store.endpoints());
    }
}

#[test]
fn events_arrive_signed_and_in_order_for_each_machine() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(&folder.path().join("db"), &["m"]);
    // Every third is refused for now, whichever it is.
    let count = Mutex::new(0u32);
    let (url, got) = receiver(move |_| {
        let mut count = count.lock();
        *count += 1;
        if count.is_multiple_of(3) { [503, 400, 302][*count as usize / 3 % 3] } else { 204 }
    });
    for n in 0..40 {
        tell(&store, ["vm-a", "vm-b", "vm-c", "vm-d", "vm-e"][n % 5], n);
    }
    let runtime = runtime();
    let running = runtime.block_on(async { Couriers::start(&store, vec![courier("m", &url)]) });
    drained(&store, "m");
    runtime.block_on(running.stop());
    let all: Vec<Got> = got.try_iter().collect();
    assert!(all.len() >= 40 + 40 / 3, "{}", all.len());
    let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for one in &all {
        assert_eq!(one.header("content-type"), "application/cloudevents+json");
        assert_eq!(one.header("webhook-id"), format!("evt_{}", one.of("id")));
        let signed = format!("{}.{}.{}", one.header("webhook-id"), one.header("webhook-timestamp"), one.text);
        let key: Vec<u8> = (0..32).collect();
        assert_eq!(
            one.header("webhook-signature"),
            format!("v1,{}", reference::base64(&reference::hmac(&key, signed.as_bytes())))
        );
        assert_eq!(
            (one.of("specversion"), one.of("type")),
            ("1.0".to_owned(), "io.prestage.allocation.changed.v1".to_owned())
        );
        assert_eq!(one.of("source"), "/prestage/a%20host");
        let lane = seen.entry(one.of("subject")).or_default();
        // The same again is a repetition; anything else comes after.
        assert!(lane.last().is_none_or(|last| *last <= one.of("sequence")), "{lane:?} {one:?}");
        if lane.last() != Some(&one.of("sequence")) {
            lane.push(one.of("sequence"));
        }
    }
    assert!(seen.len() == 5 && seen.values().all(|lane| lane.len() == 8), "{seen:?}");
}

#[test]
fn what_arrived_while_the_daemon_died_arrives_again_with_the_same_id() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copy) = (folder.path().join("db"), folder.path().join("copy"));
    let first = store(&path, &["m"]);
    let (url, got) = receiver(|_| 200);
    (0..3).for_each(|n| tell(&first, "vm", n));
    // As the database was before anything was noted.
    std::fs::copy(&path, &copy).unwrap();
    std::fs::copy(path.with_file_name("db-wal"), copy.with_file_name("copy-wal")).unwrap();
    let before: Vec<String> =
        collect(&first, vec![courier("m", &url)], &got, 3).iter().map(|one| one.of("id")).collect();
    let second = Store::open(&copy).unwrap();
    let runtime = runtime();
    let running = runtime.block_on(async { Couriers::start(&second, vec![courier("m", &url)]) });
    drained(&second, "m");
    runtime.block_on(running.stop());
    let after: Vec<Got> = got.try_iter().collect();
    assert_eq!(after.iter().map(|one| one.of("id")).collect::<Vec<_>>(), before);
    // A clean restart has nothing to say again.
    assert!(second.close(LONG));
    let third = Store::open(&copy).unwrap();
    tell(&third, "vm", 3);
    let new = collect(&third, vec![courier("m", &url)], &got, 1);
    assert!(!before.contains(&new[0].of("id")) && new[0].body["data"]["reason"] == "3", "{new:?}");
}

#[test]
fn tries_and_waits_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let first = store(&path, &["m"]);
    let (url, got) = receiver(|_| 503);
    tell(&first, "vm", 0);
    collect(&first, vec![courier("m", &url)], &got, 4);
    assert!(first.close(LONG));
    let second = Store::open(&path).unwrap();
    let heads = second.waiting("m").unwrap();
    assert!(heads[0].tries >= 3 && heads[0].next_unix_ms > US / 1000, "{heads:?}");
    let status = second.endpoints().unwrap();
    assert!(status[0].error.as_deref().is_some_and(|error| error.contains("answers 503")), "{status:?}");
}

#[test]
fn a_receiver_that_never_answers_holds_up_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(&folder.path().join("db"), &["slow", "quick", "gone"]);
    let (slow, stuck) = receiver(|_| 0);
    let (quick, got) = receiver(|_| 200);
    let gone = format!("http://{}/", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    (0..30).for_each(|n| tell(&store, &format!("vm{}", n % 3), n));
    let all = vec![courier("slow", &slow), courier("gone", &gone), courier("quick", &quick)];
    collect(&store, all, &got, 30);
    assert!(stuck.try_iter().count() <= 4, "one for each lane at most");
    let waiting: Vec<u64> = store.endpoints().unwrap().iter().map(|of| of.waiting).collect();
    // gone, quick, slow: the last may not be noted yet when the couriers end.
    assert!(waiting[0] == 30 && waiting[1] <= 3 && waiting[2] == 30, "{waiting:?}");
}

#[test]
fn a_message_that_is_refused_holds_up_its_own_machine_only_and_is_given_up_at_last() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(&folder.path().join("db"), &["m"]);
    let (url, got) = receiver(|one| if one.body["data"]["reason"] == "0" { 400 } else { 200 });
    tell(&store, "bad", 0);
    tell(&store, "bad", 1);
    (2..12).for_each(|n| tell(&store, "good", n));
    let mut impatient = courier("m", &url);
    impatient.patience.give_up = Duration::ZERO;
    let runtime = runtime();
    let running = runtime.block_on(async { Couriers::start(&store, vec![impatient]) });
    drained(&store, "m");
    runtime.block_on(running.stop());
    let all: Vec<String> = got.try_iter().map(|one| one.body["data"]["reason"].as_str().unwrap().to_owned()).collect();
    assert_eq!(all.iter().filter(|reason| *reason == "0").count(), 8, "{all:?}");
    let after = all.iter().position(|reason| reason == "1").unwrap();
    assert!(all.iter().rposition(|reason| reason == "0").unwrap() < after);
    let status = store.endpoints().unwrap();
    assert_eq!((status[0].waiting, status[0].dead), (0, 1));
}

#[test]
fn what_happens_while_all_is_quiet_is_told_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(&folder.path().join("db"), &["m"]);
    let (url, got) = receiver(|_| 200);
    let runtime = runtime();
    let running = Arc::new(runtime.block_on(async { Couriers::start(&store, vec![courier("m", &url)]) }));
    for n in 0..3 {
        tell(&store, "vm", n);
        running.wake();
        // Well within the ten seconds between two looks, were it not for a host that is busy.
        got.recv_timeout(LONG).unwrap();
    }
}

/// Examples of every kind.
fn examples() -> Vec<Event> {
    let amount = Amount { resource: "cpu", unit: "cores", amount: 2.0 };
    let reserved = Reserved {
        reservation: "r1".into(),
        vm: "vm".into(),
        from: crate::calendar::rfc3339(US),
        to: crate::calendar::rfc3339(US + 1),
        resources: vec![amount],
        reason: "fits".into(),
    };
    let anomaly = Anomaly {
        vm: None,
        metric: "memory".into(),
        unit: "bytes".into(),
        value: 9e9,
        low: None,
        high: Some(f64::NAN),
        since: crate::calendar::rfc3339(US),
        reason: "far above".into(),
    };
    let change = || change("vm", "why");
    vec![
        Event::Prestaged(change()),
        Event::Released(change()),
        Event::Changed(change()),
        Event::Refused(change()),
        Event::Anomaly(anomaly),
        Event::ReservationAdmitted(reserved.clone()),
        Event::ReservationRefused(reserved),
        Event::Recommended(change()),
    ]
}

#[test]
fn every_kind_is_as_its_schema_and_the_document_say() {
    let document = include_str!("../../../docs/events.md");
    let examples = examples();
    assert_eq!(examples.iter().map(Event::kind).collect::<Vec<_>>(), KINDS.map(|(kind, _)| kind));
    for (event, (kind, schema)) in examples.iter().zip(KINDS) {
        let schema: Value = serde_json::from_str(schema).unwrap();
        let row = EventRow { seq: 7, id: "0f".repeat(16), event: event.told("h", US) };
        let body: Value = serde_json::from_slice(&events::body(&row)).unwrap();
        assert_eq!(conforms(&body["data"], &schema), Ok(()), "{kind}: {body}");
        assert_eq!(body["sequence"], "00000000000000000007");
        assert!(document.contains(&format!("`io.prestage.{kind}.v1`")), "{kind}");
        for key in schema["properties"].as_object().unwrap().keys() {
            assert!(document.contains(&format!("`{key}`")), "{kind}: {key}");
        }
        let mut less = body["data"].clone();
        less.as_object_mut().unwrap().remove("reason");
        assert!(conforms(&less, &schema).is_err());
    }
}

/// The part of JSON Schema that the schemas here use, and that an object has no properties but those named.
fn conforms(value: &Value, schema: &Value) -> Result<(), String> {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let fits = match &schema["type"] {
        Value::String(name) => name == kind,
        Value::Array(names) => names.iter().any(|name| name == kind),
        _ => true,
    };
    let listed = schema["enum"].as_array().is_none_or(|list| list.contains(value));
    if !fits || !listed {
        return Err(format!("{value} against {schema}"));
    }
    if let Value::Array(items) = value {
        items.iter().try_for_each(|item| conforms(item, &schema["items"]))?;
    }
    let Value::Object(object) = value else { return Ok(()) };
    for name in schema["required"].as_array().into_iter().flatten() {
        object.get(name.as_str().unwrap()).ok_or(format!("{name} is missing"))?;
    }
    object.iter().try_for_each(|(name, value)| match schema["properties"].get(name) {
        None => Err(format!("{name} is unknown")),
        Some(schema) => conforms(value, schema),
    })
}

/// HMAC-SHA256 from RFC 2104 and FIPS 180-4, so that what signs does not also verify.
mod reference {
    fn primes() -> impl Iterator<Item = u64> {
        (2u64..).filter(|n| (2..*n).take_while(|d| d * d <= *n).all(|d| n % d != 0))
    }

    /// First 32 bits of the fraction of a root, found by bisection over integers: floor(root(p) * 2^32) mod 2^32.
    fn fraction(prime: u64, power: u32) -> u32 {
        let (mut low, mut high) = (0u128, 1u128 << 37);
        // (x / 2^32)^power <= prime, in whole numbers: square roots fit 128 bits, cubes of 37 bits do too.
        let at_most = |x: u128| x.pow(power) <= u128::from(prime) << (32 * power);
        while high - low > 1 {
            let middle = (low + high) / 2;
            if at_most(middle) { low = middle } else { high = middle }
        }
        low as u32
    }

    fn sha256(message: &[u8]) -> [u8; 32] {
        let constants: Vec<u32> = primes().take(64).map(|prime| fraction(prime, 3)).collect();
        let mut state: Vec<u32> = primes().take(8).map(|prime| fraction(prime, 2)).collect();
        let mut padded = message.to_vec();
        padded.push(0x80);
        while padded.len() % 64 != 56 {
            padded.push(0);
        }
        padded.extend_from_slice(&(message.len() as u64 * 8).to_be_bytes());
        for block in padded.chunks(64) {
            let mut words: Vec<u32> =
                block.chunks(4).map(|four| u32::from_be_bytes(four.try_into().unwrap())).collect();
            for at in 16..64 {
                let (a, b) = (words[at - 15], words[at - 2]);
                let small = a.rotate_right(7) ^ a.rotate_right(18) ^ a >> 3;
                let large = b.rotate_right(17) ^ b.rotate_right(19) ^ b >> 10;
                words.push(words[at - 16].wrapping_add(small).wrapping_add(words[at - 7]).wrapping_add(large));
            }
            let mut work: [u32; 8] = state.as_slice().try_into().unwrap();
            for at in 0..64 {
                let [a, b, c, d, e, f, g, h] = work;
                let first = h
                    .wrapping_add(e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25))
                    .wrapping_add(e & f ^ !e & g)
                    .wrapping_add(constants[at])
                    .wrapping_add(words[at]);
                let second =
                    (a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22)).wrapping_add(a & b ^ a & c ^ b & c);
                work = [first.wrapping_add(second), a, b, c, d.wrapping_add(first), e, f, g];
            }
            state.iter_mut().zip(work).for_each(|(state, work)| *state = state.wrapping_add(work));
        }
        let mut out = [0; 32];
        out.chunks_mut(4).zip(state).for_each(|(four, word)| four.copy_from_slice(&word.to_be_bytes()));
        out
    }

    /// Of a key of at most 64 bytes.
    pub(super) fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
        let pad = |byte: u8| -> Vec<u8> { (0..64).map(|at| key.get(at).copied().unwrap_or(0) ^ byte).collect() };
        let inner = sha256(&[pad(0x36), message.to_vec()].concat());
        sha256(&[pad(0x5c), inner.to_vec()].concat())
    }

    pub(super) fn base64(bytes: &[u8]) -> String {
        const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for three in bytes.chunks(3) {
            let word = three.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
            for at in 0..4 {
                let letter = LETTERS[(word >> (18 - 6 * at) & 63) as usize];
                text.push(if at > three.len() { '=' } else { char::from(letter) });
            }
        }
        text
    }

    #[test]
    fn the_reference_is_right() {
        let hex = |bytes: [u8; 32]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(sha256(b"abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        // RFC 4231, test case 2.
        let code = hmac(b"Jefe", b"what do ya want for nothing?");
        assert_eq!(hex(code), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
        assert_eq!((base64(b"a"), base64(b"ab"), base64(b"abc")), ("YQ==".into(), "YWI=".into(), "YWJj".into()));
    }
}
