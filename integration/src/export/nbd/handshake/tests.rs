use super::*;
use crate::export::nbd::HANDSHAKE_BUFFER_BYTES;
use proptest::prelude::*;

struct Two;

impl Exports for Two {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        let size_bytes = match name {
            "" | "web" => 1 << 20,
            "db" => 2 << 20,
            _ => return None,
        };
        let name = if name.is_empty() { "web" } else { name };
        let description = "a disk".to_owned();
        Some(ExportInfo { name: name.into(), description, size_bytes, read_only: name == "db", can_trim: true })
    }
    fn names(&self) -> Vec<String> {
        vec!["db".into(), "web".into()]
    }
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u64(OPTION_MAGIC);
    out.put_u32(option);
    out.put_u32(data.len() as u32);
    out.extend_from_slice(data);
    out
}

fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(name.len() as u32);
    data.extend_from_slice(name.as_bytes());
    data.put_u16(wanted.len() as u16);
    wanted.iter().for_each(|kind| data.put_u16(*kind));
    data
}

fn context(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(name.len() as u32);
    data.extend_from_slice(name.as_bytes());
    data.put_u32(queries.len() as u32);
    for query in queries {
        data.put_u32(query.len() as u32);
        data.extend_from_slice(query.as_bytes());
    }
    data
}

/// Types and data of the replies in `out`.
fn replies(out: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut cursor = Cursor(out);
    let mut found = Vec::new();
    while let Some(magic) = cursor.u64() {
        assert_eq!(magic, OPTION_REPLY_MAGIC);
        let (_, kind, len) = (cursor.u32().unwrap(), cursor.u32().unwrap(), cursor.u32().unwrap());
        found.push((kind, cursor.take(len as usize).unwrap().to_vec()));
    }
    assert!(cursor.0.is_empty());
    found
}

fn kinds(out: &[u8]) -> Vec<u32> {
    replies(out).into_iter().map(|(kind, _)| kind).collect()
}

/// A client that has sent its flags.
fn begun(security: Security) -> Handshake {
    let mut handshake = Handshake::new(security);
    assert_eq!(handshake.receive(&3u32.to_be_bytes(), &Two, &mut Vec::new()), (4, Step::More));
    handshake
}

fn ask(handshake: &mut Handshake, bytes: &[u8]) -> (Vec<u8>, Step) {
    let mut out = Vec::new();
    let (taken, step) = handshake.receive(bytes, &Two, &mut out);
    assert_eq!(taken, bytes.len());
    (out, step)
}

#[test]
fn a_client_chooses_an_export_and_learns_what_it_can() {
    let mut client = begun(Security::None);
    assert_eq!(kinds(&ask(&mut client, &option(opt::STRUCTURED_REPLY, &[])).0), [rep::ACK]);
    let (out, _) = ask(&mut client, &option(opt::LIST, &[]));
    assert_eq!(kinds(&out), [rep::SERVER, rep::SERVER, rep::ACK]);
    let (out, _) = ask(&mut client, &option(opt::SET_META_CONTEXT, &context("", &["x-else:y", ALLOCATION])));
    assert_eq!(replies(&out)[0], (rep::META_CONTEXT, [&[0, 0, 0, 1], ALLOCATION.as_bytes()].concat()));
    let (out, step) = ask(&mut client, &option(opt::GO, &go("web", &[info::NAME, info::BLOCK_SIZE, 99])));
    assert_eq!(kinds(&out), [rep::INFO, rep::INFO, rep::INFO, rep::ACK]);
    let Step::Enter(agreement) = step else { panic!("{step:?}") };
    assert!(agreement.structured && agreement.allocation, "the default export is `web` by another name");
    let told = &replies(&out)[0].1;
    assert_eq!(told[..2], [0, 0]);
    assert_eq!(told[2..10], (1u64 << 20).to_be_bytes());
    let flags = u16::from_be_bytes([told[10], told[11]]);
    let all = can::FLUSH | can::FUA | can::TRIM | can::WRITE_ZEROES | can::DF | can::MULTI_CONN | can::CACHE;
    assert_eq!(flags, can::HAS_FLAGS | all);
    assert_eq!(client.receive(b"x", &Two, &mut Vec::new()), (0, Step::Close), "the negotiation is over");
}

#[test]
fn a_read_only_export_offers_no_writes() {
    let info = Two.find("db").unwrap();
    assert_eq!(info.flags(false) & (can::TRIM | can::WRITE_ZEROES | can::READ_ONLY | can::DF), can::READ_ONLY);
}

#[test]
fn an_old_client_enters_by_name() {
    for (flags, len) in [(1u32, 134), (3, 10)] {
        let mut client = Handshake::new(Security::None);
        client.receive(&flags.to_be_bytes(), &Two, &mut Vec::new());
        let (out, step) = ask(&mut client, &option(opt::EXPORT_NAME, b"db"));
        assert_eq!(out.len(), len);
        assert!(matches!(step, Step::Enter(agreement) if !agreement.structured && agreement.export.name == "db"));
    }
    assert_eq!(ask(&mut begun(Security::None), &option(opt::EXPORT_NAME, b"none")), (vec![], Step::Close));
}

#[test]
fn broken_and_unknown_options_are_refused_and_the_client_may_go_on() {
    let mut client = begun(Security::None);
    let long = [go("web", &[]), vec![0]].concat();
    let short = &go("web", &[info::NAME])[..8];
    for (number, data, expected) in [
        (opt::LIST, &b"x"[..], rep::ERR_INVALID),
        (opt::STRUCTURED_REPLY, b"x", rep::ERR_INVALID),
        (opt::STARTTLS, b"", rep::ERR_POLICY),
        (opt::GO, &long, rep::ERR_INVALID),
        (opt::GO, short, rep::ERR_INVALID),
        (opt::GO, b"\xff\xff\xff\xff", rep::ERR_INVALID),
        (opt::INFO, &go("none", &[]), rep::ERR_UNKNOWN),
        // Before structured replies.
        (opt::SET_META_CONTEXT, &context("web", &[ALLOCATION]), rep::ERR_INVALID),
        // Extended headers.
        (11, b"", rep::ERR_UNSUP),
        (opt::GO, &vec![0; OPTION_DATA_MAX_BYTES + 1], rep::ERR_TOO_BIG),
    ] {
        let (out, step) = ask(&mut client, &option(number, data));
        assert_eq!((kinds(&out), step), (vec![expected], Step::More), "option {number}");
    }
    assert_eq!(kinds(&ask(&mut client, &option(opt::STRUCTURED_REPLY, &[])).0), [rep::ACK]);
    for (data, expected) in [
        (context("web", &["base:"]), vec![rep::ACK]),
        (context("web", &[]), vec![rep::ACK]),
        (context("web", &["qemu:dirty-bitmap:x"]), vec![rep::ACK]),
        ([context("web", &[ALLOCATION]), vec![1]].concat(), vec![rep::ERR_INVALID]),
        (context("none", &[ALLOCATION]), vec![rep::ERR_UNKNOWN]),
    ] {
        assert_eq!(kinds(&ask(&mut client, &option(opt::SET_META_CONTEXT, &data)).0), expected);
    }
    for queries in [&[][..], &["base:"], &[ALLOCATION]] {
        let (out, _) = ask(&mut client, &option(opt::LIST_META_CONTEXT, &context("web", queries)));
        assert_eq!(kinds(&out), [rep::META_CONTEXT, rep::ACK], "{queries:?}");
    }
    let (_, step) = ask(&mut client, &option(opt::GO, &go("web", &[])));
    assert!(matches!(step, Step::Enter(agreement) if !agreement.allocation), "listing chooses nothing");
}

#[test]
fn a_context_of_another_export_does_not_count() {
    let mut client = begun(Security::None);
    ask(&mut client, &option(opt::STRUCTURED_REPLY, &[]));
    ask(&mut client, &option(opt::SET_META_CONTEXT, &context("db", &[ALLOCATION])));
    let (_, step) = ask(&mut client, &option(opt::GO, &go("web", &[])));
    assert!(matches!(step, Step::Enter(agreement) if agreement.structured && !agreement.allocation));
}

#[test]
fn nothing_is_told_in_the_clear_where_tls_is_required() {
    let mut client = begun(Security::Required);
    for (number, data) in
        [(opt::LIST, vec![]), (opt::GO, go("web", &[])), (opt::STRUCTURED_REPLY, vec![]), (99, vec![])]
    {
        assert_eq!(kinds(&ask(&mut client, &option(number, &data)).0), [rep::ERR_TLS_REQD]);
    }
    assert_eq!(ask(&mut begun(Security::Required), &option(opt::EXPORT_NAME, b"web")), (vec![], Step::Close));
    // What comes behind the request for TLS is left alone.
    let both = [option(opt::STARTTLS, &[]), option(opt::GO, &go("web", &[]))].concat();
    let mut out = Vec::new();
    assert_eq!(client.receive(&both, &Two, &mut out), (16, Step::StartTls));
    client.tls_started();
    assert_eq!(kinds(&ask(&mut client, &option(opt::STARTTLS, &[])).0), [rep::ERR_INVALID]);
    let (_, step) = ask(&mut client, &option(opt::GO, &go("web", &[])));
    assert!(matches!(step, Step::Enter(agreement) if !agreement.structured));
}

#[test]
fn unknown_flags_wrong_magic_abort_and_too_many_options_end_it() {
    let mut client = Handshake::new(Security::None);
    assert_eq!(client.receive(&7u32.to_be_bytes(), &Two, &mut Vec::new()), (4, Step::Close));
    assert_eq!(ask(&mut begun(Security::None), &[0; 16]).1, Step::Close);
    let (out, step) = ask(&mut begun(Security::None), &option(opt::ABORT, b"bye"));
    assert_eq!((kinds(&out), step), (vec![rep::ACK], Step::Close));
    let mut client = begun(Security::None);
    let ended = (0..=OPTIONS_MAX).position(|_| ask(&mut client, &option(opt::LIST, &[])).1 == Step::Close);
    assert_eq!(ended, Some(OPTIONS_MAX as usize));
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop::sample::select(vec!["", "web", "db", "none"]);
    let query = prop::sample::select(vec![ALLOCATION, "base:", "x-y:z", ""]);
    prop_oneof![
        (name.clone(), prop::collection::vec(0u16..5, 0..4))
            .prop_map(|(name, wanted)| option(opt::INFO, &go(name, &wanted))),
        (name.clone(), prop::collection::vec(0u16..5, 0..4))
            .prop_map(|(name, wanted)| option(opt::GO, &go(name, &wanted))),
        (name, prop::collection::vec(query, 0..4), any::<bool>()).prop_map(|(name, queries, set)| {
            option(if set { opt::SET_META_CONTEXT } else { opt::LIST_META_CONTEXT }, &context(name, &queries))
        }),
        Just(option(opt::STRUCTURED_REPLY, &[])),
        Just(option(opt::STARTTLS, &[])),
        (0u32..14, prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(number, data)| option(number, &data)),
    ]
}

/// Feeds a handshake as a socket would, in pieces, through a buffer of the size that is promised to be enough.
fn feed(security: Security, bytes: &[u8], pieces: &[usize]) -> (Vec<u8>, Step) {
    let mut handshake = Handshake::new(security);
    let (mut buffer, mut out, mut at) = (Vec::new(), Vec::new(), 0);
    for piece in pieces.iter().copied().cycle() {
        let end = (at + piece.clamp(1, HANDSHAKE_BUFFER_BYTES - buffer.len())).min(bytes.len());
        buffer.extend_from_slice(&bytes[at..end]);
        at = end;
        loop {
            let (taken, step) = handshake.receive(&buffer, &Two, &mut out);
            buffer.drain(..taken);
            match step {
                Step::More if taken == 0 => break,
                Step::More => {}
                Step::StartTls => handshake.tls_started(),
                Step::Enter(_) | Step::Close => return (out, step),
            }
        }
        if at == bytes.len() {
            return (out, Step::More);
        }
        assert!(buffer.len() < HANDSHAKE_BUFFER_BYTES, "a full buffer must be enough");
    }
    unreachable!("pieces are never none");
}

proptest! {
    /// Mostly right options, some bytes of them changed, in any pieces: no panic, no growth, and the pieces do not matter.
    #[test]
    fn pieces_do_not_matter_and_nothing_panics(
        options in prop::collection::vec(any_option(), 1..12),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        pieces in prop::collection::vec(1usize..50, 1..8),
        tls in any::<bool>(),
    ) {
        let mut bytes = [3u32.to_be_bytes().to_vec(), options.concat()].concat();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let security = if tls { Security::Required } else { Security::None };
        let whole = feed(security, &bytes, &[HANDSHAKE_BUFFER_BYTES]);
        prop_assert_eq!(feed(security, &bytes, &pieces), whole.clone());
        prop_assert!(whole.0.len() <= 64 * (2 * 64 + 4 * 128), "{} bytes of answers", whole.0.len());
    }
}
