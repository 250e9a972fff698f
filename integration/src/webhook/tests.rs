//! What a receiver gets, and what a receiver can and cannot do to its sender. The receivers speak HTTP by hand.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

const AUTHORITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/webhook/testing/authority.pem");
const SERVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/webhook/testing/server.pem");
const KEY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/webhook/testing/server.key");
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn message() -> Message {
    Message {
        id: "msg_p5jXN8AQM9LWM0D4loKWxJek".to_owned(),
        content_type: "application/cloudevents+json",
        body: br#"{"test": 2432232314}"#.to_vec(),
    }
}

fn then() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_614_265_330)
}

fn sender(url: &str, authorities: Option<&str>) -> Sender {
    let target = Target::parse(url, false).unwrap();
    Sender::new(target, vec![Secret::parse(SECRET).unwrap()], authorities.map(Path::new)).unwrap()
}

/// Reads a request to its end. Empty: the other side has gone.
async fn request(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length =
                head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return text;
            }
        }
        match stream.read(&mut part).await {
            Ok(read) if read > 0 => bytes.extend_from_slice(&part[..read]),
            _ => return String::new(),
        }
    }
}

async fn serve_one(mut stream: impl AsyncRead + AsyncWrite + Unpin, answer: &[u8]) -> String {
    let text = request(&mut stream).await;
    // The sender may hang up before all is written.
    let _ = stream.write_all(answer).await;
    let _ = stream.shutdown().await;
    text
}

/// A receiver that answers one request. Its address, and the request.
async fn receiver(answer: impl Into<Vec<u8>>) -> (String, tokio::task::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = answer.into();
    let task = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        serve_one(stream, &answer).await
    });
    (format!("http://{address}/hooks?key=1"), task)
}

#[tokio::test]
async fn a_message_arrives_with_the_signature_of_the_specification() {
    let (url, received) = receiver("HTTP/1.1 204 No Content\r\n\r\n").await;
    sender(&url, None).send(&message(), then()).await.unwrap();
    let text = received.await.unwrap();
    assert!(text.starts_with("POST /hooks?key=1 HTTP/1.1\r\n"), "{text}");
    for header in [
        "content-type: application/cloudevents+json",
        "webhook-id: msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp: 1614265330",
        // The example of the Standard Webhooks specification, which its libraries test too.
        "webhook-signature: v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    ] {
        assert!(text.contains(&format!("\r\n{header}\r\n")), "{header}\n{text}");
    }
    assert!(text.ends_with("{\"test\": 2432232314}"));
}

#[test]
fn each_secret_signs_so_that_they_can_be_changed() {
    let first = Secret::parse(SECRET).unwrap();
    let second = Secret::parse("whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=").unwrap();
    let message = message();
    let text = signatures(&[first, second], &message.id, 1_614_265_330, &message.body);
    // Both computed with Python's hmac.
    assert_eq!(text.split(' ').next(), Some("v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="));
    assert_eq!(text.split(' ').count(), 2);
    assert_eq!(text.split(' ').nth(1), Some("v1,O4Gjv1HqPqsMrjmczoggs/sWA8gZD0VyHG+fLh4+ktI="));
}

#[test]
fn a_secret_shows_itself_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    let write = |text: &str, mode| {
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    write(&format!("# the new one\n{SECRET}\n\n  whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=  \n"), 0o640);
    let secrets = read_secrets(&file).unwrap();
    assert_eq!(secrets.len(), 2);
    let sender = Sender::new(Target::parse("http://localhost/secret-path", false).unwrap(), secrets, None).unwrap();
    assert_eq!(format!("{sender:?}"), "Sender { target: http://localhost, secrets: [***, ***], .. }");
    write(SECRET, 0o644);
    assert!(read_secrets(&file).unwrap_err().to_string().contains("chmod 600"));
    write("", 0o600);
    assert!(read_secrets(&file).unwrap_err().to_string().contains("0 secrets"));
    for bad in ["MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_%%%", "whsec_AAEC"] {
        write(&format!("\n{bad}\n"), 0o600);
        let error = read_secrets(&file).unwrap_err().to_string();
        assert!(error.contains("line 2") && !error.contains(bad), "{error}");
    }
    let error = read_secrets(Path::new("webhook-secret"));
    // Outside systemd there are no credentials.
    if std::env::var_os("CREDENTIALS_DIRECTORY").is_none() {
        assert!(error.unwrap_err().to_string().contains("LoadCredential=webhook-secret"));
    }
}

#[test]
fn only_safe_addresses_are_sent_to() {
    for good in [
        "https://manager.example/x?y=1",
        "http://127.0.0.1:8080",
        "http://localhost/x",
        "http://[::1]:80/",
        "https://h:1",
    ] {
        assert!(Target::parse(good, false).is_ok(), "{good}");
    }
    let plain = Target::parse("http://manager.example/x", false).unwrap_err().to_string();
    assert!(plain.contains("allow_http"), "{plain}");
    assert_eq!(Target::parse("http://manager.example:81/x?key=2", true).unwrap().origin(), "http://manager.example:81");
    for bad in [
        "",
        "x",
        "/x",
        "ftp://h/x",
        "https://",
        "https://u:p@h/x",
        "https://h:0/x",
        "https://h:99999/x",
        "https://h/#x",
        "https:///x",
        "https://h:/",
    ] {
        let error = Target::parse(bad, true).unwrap_err().to_string();
        assert!(error.starts_with("not an address") && !error.contains("u:p"), "{bad}: {error}");
    }
}

#[tokio::test]
async fn https_is_spoken_with_whom_the_authority_vouches_for_and_nobody_else() {
    let config = || {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = CertificateDer::pem_file_iter(SERVER).unwrap().map(Result::unwrap).collect();
        ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, PrivateKeyDer::from_pem_file(KEY).unwrap())
            .unwrap()
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = TlsAcceptor::from(Arc::new(config()));
    let server = tokio::spawn(async move {
        let mut texts = Vec::new();
        for _ in 0..3 {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(stream) = acceptor.accept(stream).await {
                texts.push(serve_one(stream, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await);
            }
        }
        texts
    });
    let url = format!("https://localhost:{port}/x");
    sender(&url, Some(AUTHORITY)).send(&message(), then()).await.unwrap();
    // Vouched for, but for another name; then by nobody this host knows.
    let error = sender(&format!("https://127.0.0.1:{port}/x"), Some(AUTHORITY)).send(&message(), then()).await;
    assert!(error.unwrap_err().to_string().contains("certificate"), "another name");
    // A host without authorities cannot even try, and says so.
    match Sender::new(Target::parse(&url, false).unwrap(), Vec::new(), None) {
        Ok(sender) => assert!(sender.send(&message(), then()).await.unwrap_err().to_string().contains("certificate")),
        Err(error) => {
            println!("no https to strangers tried: {error}");
            drop(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap());
        }
    }
    let texts = server.await.unwrap();
    assert!(texts.len() == 1 && texts[0].contains("webhook-signature"), "{texts:?}");
    let none = Sender::new(Target::parse(&url, false).unwrap(), Vec::new(), Some(Path::new(KEY))).unwrap_err();
    assert!(none.to_string().contains("there are none in it"), "{none}");
}

#[tokio::test]
async fn nothing_is_sent_to_addresses_that_no_receiver_has() {
    for host in
        ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "0.0.0.0", "[::]", "224.0.0.1", "[ff02::1]"]
    {
        let target = Target::parse(&format!("http://{host}:9/"), true).unwrap();
        let sender = Sender::new(target, vec![Secret::parse(SECRET).unwrap()], None).unwrap();
        let error = sender.send(&message(), then()).await.unwrap_err().to_string();
        assert!(error.contains("no receiver's address"), "{host}: {error}");
    }
}

#[tokio::test]
async fn redirects_are_not_followed_and_refusals_tell_what_they_ask_for() {
    let (elsewhere, untouched) = receiver("HTTP/1.1 200 OK\r\n\r\n").await;
    let answer = format!("HTTP/1.1 307 Temporary Redirect\r\nlocation: {elsewhere}\r\ncontent-length: 0\r\n\r\n");
    let (url, _received) = receiver(answer).await;
    let error = sender(&url, None).send(&message(), then()).await.unwrap_err().to_string();
    assert!(error.contains("answers 307 (redirects are not followed"), "{error}");
    assert!(!untouched.is_finished());
    untouched.abort();

    let (url, _received) =
        receiver("HTTP/1.1 503 Busy\r\nretry-after: 7\r\ncontent-length: 8\r\n\r\nlater\n\x1b[").await;
    let error = sender(&url, None).send(&message(), then()).await.unwrap_err();
    let SendError::Refused { status, retry_after, detail, .. } = &error else { panic!("{error}") };
    assert_eq!((*status, *retry_after, detail.as_str()), (503, Some(Duration::from_secs(7)), ": later  ["));
}

#[tokio::test]
async fn an_endless_answer_is_not_read_to_its_end() {
    let mut answer = b"HTTP/1.1 500 No\r\ncontent-length: 10000000\r\n\r\n".to_vec();
    answer.resize(10_000_000, b'x');
    let (url, _received) = receiver(answer).await;
    let error = sender(&url, None).send(&message(), then()).await.unwrap_err();
    assert!(matches!(error, SendError::Refused { status: 500, .. }), "{error}");
    // One that is no HTTP, and one that nobody takes.
    let (url, _received) = receiver("SSH-2.0-OpenSSH\r\n").await;
    assert!(matches!(sender(&url, None).send(&message(), then()).await, Err(SendError::Unreachable { .. })));
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = sender(&format!("http://{gone}/"), None).send(&message(), then()).await.unwrap_err();
    assert!(error.to_string().starts_with(&format!("cannot reach http://{gone}: ")), "{error}");
}

#[tokio::test]
async fn a_receiver_that_never_answers_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let limited = sender(&url, None).with_limit(Duration::from_millis(50));
    let error = limited.send(&message(), then()).await.unwrap_err();
    assert!(matches!(error, SendError::TimedOut { .. }), "{error}");
    drop(listener);
}

#[tokio::test]
async fn a_message_with_an_odd_id_is_refused_before_anything_is_sent() {
    let message = Message { id: "a\r\nx: y".to_owned(), ..message() };
    let error = sender("http://localhost:9/", None).send(&message, then()).await.unwrap_err();
    assert!(matches!(error, SendError::Message { .. }), "{error}");
}
