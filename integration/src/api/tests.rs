//! The API over real sockets: what clients, strangers and operators get from it.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::Value;
use tokio::sync::{Notify, oneshot};

use super::*;
use fake::{Fake, no};

mod fake;
mod of_demand;

/// Long enough for any machine; tests end by the event.
const LONG: Duration = Duration::from_secs(60);

struct Server {
    control: Arc<Fake>,
    socket: PathBuf,
    _folder: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("run/api.sock");
        let listener = bind(&SocketOptions { path: socket.clone(), mode: 0o660, group: None }).unwrap();
        let control = Arc::new(Fake::default());
        let served: Arc<dyn Control> = control.clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(serve(listener, served, limits, async { drop(stopped.await) })).unwrap();
        });
        Self { control, socket, _folder: folder, stop: Some(stop), thread: Some(thread) }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    fn send(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // A server that refuses early closes while we still write.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn request(&self, method: &str, path: &str, body: &str) -> (u16, String, Value) {
        self.request_as(method, path, body, "content-type: application/json\r\n")
    }

    fn request_as(&self, method: &str, path: &str, body: &str, headers: &str) -> (u16, String, Value) {
        let length = body.len();
        split(&self.send(
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}").as_bytes(),
        ))
    }

    /// Blocks the test until `notify` is rung.
    fn await_ring(notify: &Notify) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(LONG, notify.notified()).await }).expect("it happens");
    }

    fn stop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn split(answer: &str) -> (u16, String, Value) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, head.to_owned(), serde_json::from_str(body).unwrap_or(Value::Null))
}

#[test]
fn the_document_is_openapi_3_1_and_describes_every_route() {
    let server = Server::start(Limits::default());
    let (status, _, document) = server.request("GET", "/v1/openapi.json", "");
    assert_eq!(status, 200);
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let operations: Vec<String> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, item)| item.as_object().unwrap().keys().map(move |method| format!("{method} {path}")))
        .collect();
    let expected = [
        "get /v1/cache",
        "post /v1/cache/drain",
        "post /v1/cache/drop",
        "post /v1/cache/resize",
        "post /v1/cache/resume",
        "get /v1/cache/stat",
        "post /v1/cache/warm",
        "get /v1/disks",
        "post /v1/disks",
        "delete /v1/disks/{name}",
        "get /v1/disks/{name}",
        "get /v1/disks/{name}/explain",
        "get /v1/disks/{name}/history",
        "get /v1/disks/{name}/trace",
        "get /v1/history",
        "get /v1/history/runs",
        "get /v1/history/disks/{name}/hot",
        "get /v1/history/disks/{name}/near",
        "get /v1/models",
        "post /v1/models/import",
        "post /v1/models/rollback",
        "post /v1/models/train",
        "get /v1/models/{id}",
        "post /v1/models/{id}/evaluate",
        "get /v1/models/{id}/export",
        "post /v1/models/{id}/promote",
        "get /v1/profiles",
        "post /v1/profiles/save",
        "delete /v1/profiles/{id}",
        "get /v1/demand",
        "get /v1/vms/{vm}/policy",
        "put /v1/vms/{vm}/policy",
        "delete /v1/vms/{vm}/policy",
        "get /v1/vms/{vm}/forecast",
        "get /v1/recommendations",
        "get /v1/decisions",
        "get /v1/reservations",
        "post /v1/reservations",
        "delete /v1/reservations/{id}",
        "get /v1/executions",
        "post /v1/executions",
        "post /v1/executions/{id}/end",
        "get /v1/executions/profiles",
        "get /v1/vms/{vm}/activity",
        "post /v1/vms/{vm}/activity",
        "get /v1/events",
        "post /v1/events",
        "delete /v1/events/{id}",
        "get /v1/webhooks",
        "get /v1/profiles/{id}",
        "get /v1/status",
        "get /v1/thresholds",
        "put /v1/thresholds",
        "get /v1/vms",
        "get /v1/vms/{vm}",
        "post /v1/vms/{vm}/disks/{target}/attach",
        "post /v1/vms/{vm}/disks/{target}/detach",
        "post /v1/vms/{vm}/template",
        "get /v1/templates",
        "delete /v1/templates/{name}",
        "post /v1/clones",
        "post /v1/disks/{name}/resize",
    ];
    let mut sorted = operations.clone();
    sorted.sort();
    let mut wanted = expected.map(str::to_owned).to_vec();
    wanted.sort();
    assert_eq!(sorted, wanted);

    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let problem = &operation["responses"]["default"]["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(problem, "#/components/schemas/Problem", "{method} {path}");
        }
    }
    let text = document.to_string();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    for reference in text.split("\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(schemas.contains_key(name), "`{name}` is referred to and not described");
    }
    assert_eq!(schemas["DiskAdd"]["additionalProperties"], false);
}

#[test]
fn every_failure_is_a_problem_with_a_stable_code() {
    let server = Server::start(Limits { body_bytes: 2000, ..Limits::default() });
    let big = format!("{{\"name\": \"a\", \"store\": \"{}\"}}", "x".repeat(3000));
    for (method, path, body, status, code, detail) in [
        ("GET", "/v1/nosuch", "", 404, "not_found", "there is no `/v1/nosuch`"),
        ("GET", "/v1/disks/web1", "", 404, "not_found", "there is no disk `web1`"),
        ("PUT", "/v1/disks", "{}", 405, "method_not_allowed", "`/v1/disks` does not take PUT"),
        (
            "POST",
            "/v1/disks",
            "{\"name\": \"a\", \"store\": \"/x\", \"raed_only\": true}",
            400,
            "invalid_request",
            "unknown field `raed_only`",
        ),
        ("POST", "/v1/disks", "{\"name\": \"a\"}", 400, "invalid_request", "missing field `store`"),
        (
            "POST",
            "/v1/disks",
            "{\"name\": \"a/b\", \"store\": \"/x\"}",
            400,
            "invalid_request",
            "`a/b` is not a disk name",
        ),
        (
            "POST",
            "/v1/disks",
            "{\"name\": \"a\", \"store\": \"/x\", \"socket\": \"s\"}",
            400,
            "invalid_request",
            "must be an absolute path",
        ),
        ("POST", "/v1/disks", "{\"name\": ", 400, "invalid_request", "EOF"),
        ("POST", "/v1/disks", "", 400, "invalid_request", "missing field `name`"),
        ("POST", "/v1/disks", big.as_str(), 413, "too_large", "length limit exceeded"),
        ("POST", "/v1/disks", "{\"name\": \"panic\", \"store\": \"/x\"}", 500, "internal", "failed half way"),
        ("POST", "/v1/disks/a/resize", "{\"size_bytes\": 1000}", 400, "invalid_request", "multiple of 512 bytes"),
        ("POST", "/v1/disks/a/resize", "{\"size_bytes\": 0}", 400, "invalid_request", "512 bytes at least"),
        ("POST", "/v1/disks/a/resize", "{\"size\": 512}", 400, "invalid_request", "unknown field `size`"),
        ("DELETE", "/v1/disks/a", "", 409, "in_use", "connected"),
        ("DELETE", "/v1/disks/a?forse=true", "", 400, "invalid_request", "unknown field `forse`"),
        ("GET", "/v1/disks/%2e%2e%2fx", "", 400, "invalid_request", "`../x` is not a disk name"),
        ("GET", "/v1/vms/%ff", "", 400, "invalid_request", "UTF-8"),
        ("POST", "/v1/cache/warm", "{\"disk\": \"a\", \"ranges\": []}", 400, "invalid_request", "1 to 4096"),
        (
            "POST",
            "/v1/cache/warm",
            "{\"disk\": \"a\", \"ranges\": [{\"offset_bytes\": 18446744073709551615, \"length_bytes\": 2}]}",
            400,
            "invalid_request",
            "ends beyond",
        ),
        ("POST", "/v1/cache/drain", "{\"ram\": false}", 400, "invalid_request", "`ram`, `ssd` or both"),
        ("POST", "/v1/cache/resume", "{}", 400, "invalid_request", "`ram`, `ssd` or both"),
        ("POST", "/v1/cache/resize", "{}", 400, "invalid_request", "`ram_bytes`, `ssd_bytes` or both"),
        ("POST", "/v1/cache/resize", "{\"ram_bytes\": 16777215}", 400, "invalid_request", "at least 16777216 (16 MiB)"),
        ("POST", "/v1/cache/resize", "{\"ssd_bytes\": 67108863}", 400, "invalid_request", "at least 67108864"),
        ("POST", "/v1/cache/resize", "{\"ssd_bytes\": -1}", 400, "invalid_request", "integer `-1`"),
        ("POST", "/v1/cache/drop", "{\"tier\": \"tape\"}", 400, "invalid_request", "unknown variant `tape`"),
    ] {
        let (found, head, problem) = server.request(method, path, body);
        assert_eq!((found, problem["code"].as_str()), (status, Some(code)), "{method} {path} {problem}");
        assert!(head.contains("application/problem+json"), "{head}");
        assert_eq!(problem["status"], status);
        assert_eq!(problem["type"], format!("urn:prestage:problem:{}", code.replace('_', "-")));
        assert!(problem["detail"].as_str().unwrap().contains(detail), "{problem}");
        assert_eq!(problem["instance"], path.split('?').next().unwrap());
    }
    let (status, head, _) = server.request("PUT", "/v1/disks", "");
    assert_eq!(status, 405);
    assert!(head.to_lowercase().contains("allow: get,head,post"), "{head}");
    let (status, _, problem) = server.request_as("POST", "/v1/disks", "name=a", "content-type: text/plain\r\n");
    assert_eq!((status, problem["code"].as_str()), (415, Some("unsupported_media_type")));
}

#[test]
fn answers_carry_the_right_status_and_decoded_names() {
    let server = Server::start(Limits::default());
    let (status, head, disk) = server.request("POST", "/v1/disks", "{\"name\": \"a.b\", \"store\": \"/x\"}");
    assert_eq!((status, disk["name"].as_str()), (201, Some("a.b")));
    assert!(head.contains("location: /v1/disks/a.b"), "{head}");
    assert_eq!(server.request("DELETE", "/v1/disks/a?force=true", "").0, 204);
    assert_eq!(server.request("POST", "/v1/cache/warm", "{\"disk\": \"a\"}").0, 202);
    let (status, _, vm) = server.request("GET", "/v1/vms/my%20vm%2F%C3%A9", "");
    assert_eq!((status, vm["name"].as_str()), (200, Some("my vm/é")));
    // Everything has a default: no body is needed.
    let (status, _, attached) = server.request_as("POST", "/v1/vms/v/disks/vda/attach", "", "");
    assert_eq!((status, attached["target"].as_str()), (200, Some("vda")));
    assert_eq!(server.request_as("POST", "/v1/cache/drop", "", "").0, 200);
    assert_eq!(server.request("POST", "/v1/cache/drain", "{\"ssd\": true}").0, 200);
    let (status, _, resized) = server.request("POST", "/v1/cache/resize", "{\"ram_bytes\": 16777216}");
    assert_eq!((status, resized["tiers"][0]["after_bytes"].as_u64()), (200, Some(16 << 20)));
}

/// Of every request with a body that all have defaults: an empty list is not "as it was".
#[test]
fn a_list_for_a_body_is_refused_everywhere() {
    let server = Server::start(Limits::default());
    let (_, _, document) = server.request("GET", "/v1/openapi.json", "");
    let mut tried = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if operation["requestBody"]["content"].get("application/json").is_none() {
                continue;
            }
            let path = path.replace("{id}", "1").replace("{name}", "d").replace("{vm}", "v").replace("{target}", "vda");
            let (status, head, problem) = server.request(&method.to_uppercase(), &path, "[]");
            assert_eq!((status, problem["code"].as_str()), (400, Some("invalid_request")), "{method} {path}: {head}");
            tried += 1;
        }
    }
    assert!(tried >= 15, "{tried}");
}

#[test]
fn a_change_goes_on_when_its_client_hangs_up() {
    let server = Server::start(Limits::default());
    let mut stream = server.connect();
    stream.write_all(b"POST /v1/profiles/save HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").unwrap();
    Server::await_ring(&server.control.entered);
    drop(stream);
    // The server has seen the hang-up when it has served someone else since.
    assert_eq!(server.request("GET", "/v1/status", "").0, 200);
    server.control.go_on.notify_one();
    Server::await_ring(&server.control.finished);
}

#[test]
fn what_takes_too_long_is_answered_and_still_completes() {
    let server = Server::start(Limits { request: Duration::from_millis(50), ..Limits::default() });
    let (status, _, problem) = server.request("POST", "/v1/profiles/save", "");
    assert_eq!((status, problem["code"].as_str()), (504, Some("timeout")));
    assert!(problem["detail"].as_str().unwrap().contains("may still complete"));
    server.control.go_on.notify_one();
    Server::await_ring(&server.control.finished);
}

#[test]
fn shutdown_lets_requests_under_way_finish_and_removes_the_socket() {
    let mut server = Server::start(Limits { drain: LONG, ..Limits::default() });
    let mut stream = server.connect();
    stream.write_all(b"POST /v1/profiles/save HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").unwrap();
    Server::await_ring(&server.control.entered);
    server.stop.take();
    for _ in 0..LONG.as_millis() {
        if !server.socket.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!server.socket.exists());
    server.control.go_on.notify_one();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert!(answer.contains("\"profiles\":7"), "{answer}");
    server.stop();
}

#[test]
fn a_client_that_never_sends_its_head_is_cut_off_and_frees_its_slot() {
    let server = Server::start(Limits { head: Duration::from_millis(50), connections: 1, ..Limits::default() });
    let mut idle = server.connect();
    idle.write_all(b"GET /v1/sta").unwrap();
    // The only slot is taken: this waits until the other is cut off.
    assert_eq!(server.request("GET", "/v1/status", "").0, 200);
    let mut rest = Vec::new();
    let _ = idle.read_to_end(&mut rest);
}

#[test]
fn the_socket_has_its_mode_and_a_dead_daemons_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let options = SocketOptions { path: path.clone(), mode: 0o600, group: None };
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let first = bind(&options).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(UnixStream::connect(&path).is_ok());
    let error = bind(&options).unwrap_err();
    assert!(matches!(error, ServeError::InUse { .. }), "{error:?}");
    assert!(error.to_string().contains("belongs to a running server; stop that prestaged"), "{error}");
    assert!(UnixStream::connect(&path).is_ok(), "the refused one leaves the first alone");
    // Also at the moment when a daemon has the name and has not put its socket there yet.
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(bind(&options), Err(ServeError::InUse { .. })));
    drop(first);
    let second = bind(&options).unwrap();
    assert!(UnixStream::connect(&path).is_ok());
    drop(second);
    assert!(!path.exists());
}

#[test]
fn a_path_that_is_not_ours_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = |path: &Path| bind(&SocketOptions { path: path.to_owned(), mode: 0o600, group: None });

    let file = folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(at(&file), Err(ServeError::NotASocket { .. })));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");

    let other = folder.path().join("other.sock");
    let listener = UnixListener::bind(&other).unwrap();
    assert!(matches!(at(&other), Err(ServeError::InUse { .. })));
    drop(listener);

    let long = folder.path().join("x".repeat(100));
    assert!(matches!(at(&long), Err(ServeError::PathTooLong { .. })));

    let grouped = SocketOptions { path: folder.path().join("g"), mode: 0o660, group: Some("no-such-group".into()) };
    let error = bind(&grouped).unwrap_err();
    assert!(error.to_string().contains("group `no-such-group` of the API socket does not exist"), "{error}");
}

#[test]
fn history_is_asked_with_defaults_and_within_bounds() {
    let server = Server::start(Limits::default());
    let text = |path: &str| {
        let (status, _, body) = server.request("GET", path, "");
        (status, body.to_string())
    };
    assert_eq!(text("/v1/history").0, 200);
    let (status, body) = text("/v1/history/runs?of=web%201");
    assert_eq!(status, 200);
    assert!(body.contains("last: 20, extents: 1000") && body.contains("web 1"), "{body}");
    assert!(text("/v1/history/disks/d/hot").1.contains("hours: 24, top: 10"));
    assert!(text("/v1/history/disks/d/near?a=0&b=65536").1.contains("within_us: 50000"));
    for (path, why) in [
        ("/v1/history/runs", "missing field `of`"),
        ("/v1/history/runs?of=a&last=0", "`last` is 1 to 1000, not 0"),
        ("/v1/history/runs?of=a&lats=3", "unknown field `lats`"),
        ("/v1/history/disks/d/hot?hours=9000", "`hours` is 1 to 8784"),
        ("/v1/history/disks/%2F/hot", "name"),
        ("/v1/history/disks/d/near?a=0", "missing field `b`"),
        ("/v1/history/disks/d/near?a=0&b=1&within_us=60000001", "`within_us` is 0 to 60000000"),
    ] {
        let (status, body) = text(path);
        assert_eq!(status, 400, "{path}");
        assert!(body.contains(why), "{path}: {body}");
    }
}

#[test]
fn strangers_bytes_never_stop_the_server() {
    let server = Server::start(Limits { head: Duration::from_millis(200), ..Limits::default() });
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(64));
    let bytes = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        "(GET|POST|DELETE) /v1/(disks|cache/warm|cache/drop|vms/x/disks/y/attach) HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: [0-9]{1,3}\r\n\r\n[\\[\\]{}\":,a-z0-9]{0,80}"
            .prop_map(String::into_bytes),
    ];
    let outcome = runner.run(&bytes, |bytes| {
        let mut stream = server.connect();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let status = split(&String::from_utf8_lossy(&answer)).0;
        prop_assert_ne!(status, 500);
        Ok(())
    });
    outcome.unwrap();
    assert_eq!(server.request("GET", "/v1/status", "").0, 200);
}

#[test]
fn rows_come_as_csv_in_chunks_and_bad_queries_are_problems() {
    let server = Server::start(Limits::default());
    let answer = server.send(b"GET /v1/disks/d/trace HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    assert!(answer.contains("content-type: text/csv; charset=utf-8\r\n"), "{answer}");
    assert!(answer.contains("transfer-encoding: chunked\r\n"), "{answer}");
    assert!(answer.ends_with("4\r\na,b\n\r\n4\r\n1,2\n\r\n0\r\n\r\n"), "{answer}");
    let answer = server.send(b"GET /v1/disks/d/history?since_us=77 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    assert!(answer.contains("\r\n77\r\n"), "{answer}");
    assert_eq!(server.request("GET", "/v1/disks/d/explain?offset=8192", "").2["offset_bytes"], 8192);
    for path in
        ["/v1/disks/d/explain", "/v1/disks/d/explain?offset=-1", "/v1/disks/d/history?since=1", "/v1/disks/%20/trace"]
    {
        let (status, _, problem) = server.request("GET", path, "");
        assert_eq!((status, problem["code"].as_str()), (400, Some("invalid_request")), "{path}: {problem}");
    }
}
