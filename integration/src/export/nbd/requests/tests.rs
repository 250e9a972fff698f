use super::*;
use crate::export::nbd::ExportInfo;
use crate::export::nbd::wire::Put;
use proptest::prelude::*;

const SIZE: u64 = 1 << 40;

fn agreement(read_only: bool, structured: bool) -> Agreement {
    let export =
        ExportInfo { name: "d".into(), description: String::new(), size_bytes: SIZE, read_only, can_trim: true };
    Agreement { export, structured, allocation: structured }
}

fn header(kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u32(REQUEST_MAGIC);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u64(offset);
    out.put_u32(len);
    out
}

fn one(agreement: &Agreement, kind: u16, flags: u16, offset: u64, len: u32) -> Result<Command, NbdError> {
    let mut requests = Requests::new(agreement);
    let (taken, mut event) = requests.next(&header(kind, flags, 9, offset, len)).unwrap();
    assert_eq!(taken, REQUEST_BYTES);
    if event.is_none() {
        // A refused write is answered behind its payload.
        event = requests.next(&vec![0; len as usize]).unwrap().1;
    }
    match event {
        Some(Event::Request(request)) => {
            assert_eq!((request.cookie, request.offset_bytes, request.len_bytes), (9, offset, len));
            Ok(request.command)
        }
        Some(Event::Refused { cookie: 9, error, .. }) => Err(error),
        other => panic!("{other:?}"),
    }
}

#[test]
fn commands_and_their_flags_are_understood() {
    let all = agreement(false, true);
    let fua = cmd::FLAG_FUA;
    for (kind, flags, expected) in [
        (cmd::READ, 0, Command::Read),
        (cmd::READ, cmd::FLAG_DF | fua, Command::Read),
        (cmd::WRITE, 0, Command::Write { fua: false }),
        (cmd::WRITE, fua, Command::Write { fua: true }),
        (cmd::TRIM, fua, Command::Trim { fua: true }),
        (cmd::CACHE, 0, Command::Cache),
        (cmd::WRITE_ZEROES, 0, Command::WriteZeroes { fua: false, may_unmap: true }),
        (cmd::WRITE_ZEROES, fua | cmd::FLAG_NO_HOLE, Command::WriteZeroes { fua: true, may_unmap: false }),
        (cmd::BLOCK_STATUS, cmd::FLAG_REQ_ONE, Command::BlockStatus { one: true }),
    ] {
        assert_eq!(one(&all, kind, flags, 4096, 512), Ok(expected));
    }
    assert_eq!(one(&all, cmd::FLUSH, fua, 0, 0), Ok(Command::Flush));
}

#[test]
fn what_breaks_a_rule_gets_the_error_that_the_protocol_names() {
    let (all, simple, fixed) = (agreement(false, true), agreement(false, false), agreement(true, true));
    use NbdError::{Inval, NoSpc, Overflow, Perm};
    let most = PAYLOAD_MAX_BYTES;
    for (to, kind, flags, offset, len, expected) in [
        // Unknown commands and flags.
        (&all, 99, 0, 0, 0, Inval),
        (&all, cmd::READ, cmd::FLAG_NO_HOLE, 0, 512, Inval),
        (&all, cmd::READ, 1 << 15, 0, 512, Inval),
        (&simple, cmd::READ, cmd::FLAG_DF, 0, 512, Inval),
        (&all, cmd::WRITE_ZEROES, 1 << 4, 0, 512, Inval),
        // Beyond the end.
        (&all, cmd::READ, 0, SIZE, 1, Inval),
        (&all, cmd::READ, 0, SIZE - 1, 2, Inval),
        (&all, cmd::READ, 0, SIZE + 1, 0, Inval),
        (&all, cmd::READ, 0, u64::MAX, 1, Inval),
        (&all, cmd::WRITE, 0, SIZE - 1, 2, NoSpc),
        (&all, cmd::WRITE_ZEROES, 0, u64::MAX, u32::MAX, NoSpc),
        (&all, cmd::TRIM, 0, SIZE, 1, Inval),
        (&all, cmd::CACHE, 0, SIZE, 1, Inval),
        (&all, cmd::BLOCK_STATUS, 0, SIZE - 1, 2, Inval),
        // Too much at once.
        (&all, cmd::READ, 0, 0, most + 1, Overflow),
        (&simple, cmd::READ, 0, 0, most + 1, Inval),
        (&all, cmd::WRITE, 0, 0, most + 1, Inval),
        // What was not agreed on.
        (&simple, cmd::BLOCK_STATUS, 0, 0, 512, Inval),
        (&all, cmd::BLOCK_STATUS, 0, 0, 0, Inval),
        (&all, cmd::FLUSH, 0, 0, 512, Inval),
        (&fixed, cmd::WRITE, 0, 0, 512, Perm),
        (&fixed, cmd::TRIM, 0, 0, 512, Perm),
        (&fixed, cmd::WRITE_ZEROES, 0, 0, 512, Perm),
    ] {
        assert_eq!(one(to, kind, flags, offset, len), Err(expected), "command {kind} at {offset} of {len}");
    }
}

#[test]
fn the_edges_of_the_export_and_of_the_limits_are_within() {
    let all = agreement(false, true);
    for (kind, offset, len) in [
        (cmd::READ, SIZE - 1, 1),
        (cmd::READ, SIZE, 0),
        (cmd::READ, 1, 0),
        (cmd::WRITE, SIZE - 1, 1),
        (cmd::WRITE, SIZE, 0),
        (cmd::READ, 0, PAYLOAD_MAX_BYTES),
        (cmd::WRITE, 0, PAYLOAD_MAX_BYTES),
        // No payload, no limit.
        (cmd::TRIM, 0, u32::MAX),
        (cmd::WRITE_ZEROES, 0, u32::MAX),
        (cmd::CACHE, 0, u32::MAX),
        (cmd::BLOCK_STATUS, 0, u32::MAX),
    ] {
        assert!(one(&all, kind, 0, offset, len).is_ok(), "command {kind} at {offset} of {len}");
    }
}

#[test]
fn the_payload_of_a_refused_write_is_skipped_in_any_pieces() {
    for piece in [1, 27, 28, 29, 4096] {
        let mut requests = Requests::new(&agreement(true, true));
        let bytes = [header(cmd::WRITE, 0, 1, 0, 1000), vec![0x25; 1000], header(cmd::READ, 0, 2, 0, 512)].concat();
        let (mut buffer, mut events) = (Vec::new(), Vec::new());
        for part in bytes.chunks(piece) {
            buffer.extend_from_slice(part);
            loop {
                let (taken, event) = requests.next(&buffer).unwrap();
                buffer.drain(..taken);
                match event {
                    Some(event) => events.push(event),
                    None => break,
                }
            }
        }
        assert!(buffer.is_empty());
        assert!(
            matches!(
                events[..],
                [Event::Refused { cookie: 1, error: NbdError::Perm, .. }, Event::Request(Request { cookie: 2, .. })]
            ),
            "{events:?}"
        );
    }
}

#[test]
fn what_is_no_request_is_seen_by_its_first_word() {
    let mut requests = Requests::new(&agreement(false, true));
    assert_eq!(requests.next(b"GET"), Ok((0, None)));
    assert_eq!(requests.next(b"GET / HT"), Err(BadMagic(u32::from_be_bytes(*b"GET "))));
    assert_eq!(requests.next(&header(cmd::DISC, 0, 0, 0, 0)), Ok((28, Some(Event::Disconnect))));
}

/// What a caller sees that takes every write's payload.
fn feed(agreement: &Agreement, bytes: &[u8], pieces: &[usize]) -> (Vec<Event>, Option<BadMagic>) {
    let mut requests = Requests::new(agreement);
    let (mut buffer, mut events, mut at, mut payload) = (Vec::new(), Vec::new(), 0, 0usize);
    for piece in pieces.iter().copied().cycle() {
        let end = (at + piece).min(bytes.len());
        buffer.extend_from_slice(&bytes[at..end]);
        at = end;
        loop {
            let swallowed = payload.min(buffer.len());
            buffer.drain(..swallowed);
            payload -= swallowed;
            if payload > 0 {
                break;
            }
            match requests.next(&buffer) {
                Ok((taken, event)) => {
                    buffer.drain(..taken);
                    match event {
                        None => break,
                        Some(event) => {
                            if let Event::Request(Request { command: Command::Write { .. }, len_bytes, .. }) = event {
                                payload = len_bytes as usize;
                            }
                            events.push(event);
                        }
                    }
                }
                Err(error) => return (events, Some(error)),
            }
        }
        assert!(buffer.len() < REQUEST_BYTES, "nothing is kept but a header that is not whole");
        if at == bytes.len() {
            return (events, None);
        }
    }
    unreachable!("pieces are never none");
}

fn any_request() -> impl Strategy<Value = Vec<u8>> {
    let offset = prop_oneof![0u64..10_000, SIZE - 2000..SIZE + 10, any::<u64>()];
    let len = prop_oneof![4 => 0u32..2000, 1 => any::<u32>()];
    (0u16..10, prop_oneof![3 => Just(0u16), 1 => 0u16..32], any::<u64>(), offset, len).prop_map(
        |(kind, flags, cookie, offset, len)| {
            let payload = if kind == cmd::WRITE { len.min(3000) as usize } else { 0 };
            [header(kind, flags, cookie, offset, len), vec![7; payload]].concat()
        },
    )
}

proptest! {
    #[test]
    fn pieces_do_not_matter_and_nothing_gets_past_the_limits(
        stream in prop::collection::vec(any_request(), 1..20),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        pieces in prop::collection::vec(1usize..100, 1..8),
        read_only in any::<bool>(),
        structured in any::<bool>(),
    ) {
        let mut bytes = stream.concat();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let agreement = agreement(read_only, structured);
        let (events, end) = feed(&agreement, &bytes, &[usize::MAX >> 1]);
        prop_assert_eq!(feed(&agreement, &bytes, &pieces), (events.clone(), end));
        for event in events {
            let Event::Request(request) = event else { continue };
            prop_assert!(request.offset_bytes + u64::from(request.len_bytes) <= SIZE);
            match request.command {
                Command::Read => prop_assert!(request.len_bytes <= PAYLOAD_MAX_BYTES),
                Command::Write { .. } => prop_assert!(request.len_bytes <= PAYLOAD_MAX_BYTES && !read_only),
                Command::Trim { .. } | Command::WriteZeroes { .. } => prop_assert!(!read_only),
                Command::BlockStatus { .. } => prop_assert!(structured && request.len_bytes > 0),
                Command::Flush | Command::Cache => {}
            }
        }
    }
}
