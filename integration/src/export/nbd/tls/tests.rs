use super::*;
use proptest::prelude::*;
use rustls::ClientConfig;
use rustls::ClientConnection;
use rustls::pki_types::ServerName;

const AUTHORITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/export/nbd/testing/authority.pem");

fn pem(name: &str, kind: &str) -> PathBuf {
    Path::new(AUTHORITY).with_file_name(format!("{name}.{kind}"))
}

fn server() -> TlsServer {
    TlsServer::load(&pem("server", "pem"), &pem("server", "key"), Path::new(AUTHORITY)).unwrap()
}

fn client(who: Option<&str>) -> ClientConnection {
    let mut roots = RootCertStore::empty();
    certificates("", Path::new(AUTHORITY)).unwrap().into_iter().for_each(|root| roots.add(root).unwrap());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots);
    let config = match who {
        None => config.with_no_client_auth(),
        Some(who) => {
            let key = PrivateKeyDer::from_pem_file(pem(who, "key")).unwrap();
            config.with_client_auth_cert(certificates("", &pem(who, "pem")).unwrap(), key).unwrap()
        }
    };
    ClientConnection::new(Arc::new(config), ServerName::try_from("localhost").unwrap()).unwrap()
}

/// What the client has to send.
fn sent(client: &mut ClientConnection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut bytes).unwrap();
    }
    bytes
}

/// What the client reads of the server's bytes.
fn read(client: &mut ClientConnection, mut bytes: &[u8]) -> Result<Vec<u8>, rustls::Error> {
    let mut plain = Vec::new();
    while !bytes.is_empty() {
        client.read_tls(&mut bytes).unwrap();
        let state = client.process_new_packets()?;
        let at = plain.len();
        plain.resize(at + state.plaintext_bytes_to_read(), 0);
        client.reader().read_exact(&mut plain[at..]).unwrap();
    }
    Ok(plain)
}

/// Lets both talk in pieces of this size until nobody has anything to say.
fn shake(client: &mut ClientConnection, server: &mut TlsSession, piece: usize) -> Result<Vec<u8>, TlsError> {
    let mut plain = Vec::new();
    loop {
        let (said, mut answer) = (sent(client), Vec::new());
        if said.is_empty() {
            return Ok(plain);
        }
        for part in said.chunks(piece) {
            server.receive(part, &mut plain, &mut answer)?;
        }
        read(client, &answer)?;
    }
}

#[test]
fn who_is_vouched_for_gets_in_and_bytes_come_out_as_they_went_in() {
    for piece in [1, 100, 1 << 20] {
        let (mut client, mut session) = (client(Some("client")), server().session().unwrap());
        assert!(session.is_handshaking());
        shake(&mut client, &mut session, piece).unwrap();
        assert!(!session.is_handshaking() && !client.is_handshaking());
        let long: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        let mut out = Vec::new();
        session.send(&long, &mut out);
        assert!(read(&mut client, &out).unwrap() == long);
        let mut got = Vec::new();
        for part in long.chunks(10_000) {
            client.writer().write_all(part).unwrap();
            got.extend(shake(&mut client, &mut session, piece.max(100)).unwrap());
        }
        assert!(got == long);
        let mut out = Vec::new();
        session.close(&mut out);
        read(&mut client, &out).unwrap();
        assert_eq!(client.reader().read(&mut [0]).unwrap(), 0, "the end is told");
    }
}

#[test]
fn nobody_else_does_and_is_told_so() {
    for who in [None, Some("stranger")] {
        let (mut client, mut session) = (client(who), server().session().unwrap());
        let (mut plain, mut answer) = (Vec::new(), Vec::new());
        session.receive(&sent(&mut client), &mut plain, &mut answer).unwrap();
        read(&mut client, &answer).unwrap();
        // TLS 1.3's client is done before the server has looked at its certificate, and may speak at once.
        client.writer().write_all(b"let me in").unwrap();
        answer.clear();
        let error = session.receive(&sent(&mut client), &mut plain, &mut answer).unwrap_err();
        println!("{who:?}: {error}");
        assert!(plain.is_empty() && session.is_handshaking(), "{who:?}: nothing of it was taken");
        assert!(read(&mut client, &answer).unwrap_err().to_string().contains("alert"), "{who:?}");
    }
}

#[test]
fn files_that_are_of_no_use_are_named() {
    let (pem_of, key_of) = (|name| pem(name, "pem"), |name| pem(name, "key"));
    let authority = Path::new(AUTHORITY);
    for (certificate, key, authority, expected) in [
        (pem_of("none"), key_of("server"), authority.to_owned(), "none.pem"),
        (pem_of("server"), key_of("none"), authority.to_owned(), "none.key"),
        (key_of("server"), key_of("server"), authority.to_owned(), "holds no certificate"),
        (pem_of("server"), key_of("client"), authority.to_owned(), "belong together"),
        (pem_of("server"), key_of("server"), key_of("server"), "holds no certificate"),
    ] {
        let error = TlsServer::load(&certificate, &key, &authority).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

proptest! {
    #[test]
    fn broken_records_end_a_session_and_nothing_else(
        at in any::<prop::sample::Index>(), value in any::<u8>(), piece in 1usize..2000, inside in any::<bool>(),
    ) {
        let (mut client, mut session) = (client(Some("client")), server().session().unwrap());
        if inside {
            shake(&mut client, &mut session, 1 << 20).unwrap();
            client.writer().write_all(&[7; 1000]).unwrap();
        }
        let mut bytes = sent(&mut client);
        let at = at.index(bytes.len());
        // The version in a record's head says nothing and must be ignored (RFC 8446, section 5.1).
        let changed = bytes[at] != value && !matches!(at, 1 | 2);
        bytes[at] = value;
        let (mut plain, mut answer) = (Vec::new(), Vec::new());
        let result = bytes.chunks(piece).try_for_each(|part| session.receive(part, &mut plain, &mut answer));
        // A length that has become larger waits for more; everything else that is not as it was is found out.
        prop_assert!(!(inside && changed) || result.is_err() || plain.is_empty());
        prop_assert!(plain.is_empty() || plain == [7; 1000]);
    }
}
