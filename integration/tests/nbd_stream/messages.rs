//! NBD's messages as a client makes them, and what it makes of the answers; written from the protocol's text and not from
//! the server.
//!
//! - [`option`], [`go`], [`request`]: what a client says
//! - [`judge`]: serves a client and looks at what came of it; what a fuzzer calls
//! - [`expected`]: who must be answered, and how it must end
//! - [`understand`]: an answer's cookie

use crate::server::{self, Answer, Ended, Input, Served};

pub(crate) const REQUEST: u32 = 0x2560_9513;
pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISCONNECT: u16 = 2;
pub(crate) const BLOCK_STATUS: u16 = 7;

pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

pub(crate) fn text(word: &str) -> Vec<u8> {
    [&(word.len() as u32).to_be_bytes()[..], word.as_bytes()].concat()
}

pub(crate) fn go(name: &str, items: &[u16]) -> Vec<u8> {
    let count = (items.len() as u16).to_be_bytes().to_vec();
    let items = items.iter().flat_map(|item| item.to_be_bytes()).collect();
    [text(name), count, items].concat()
}

pub(crate) fn request(kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let words = [&REQUEST.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &cookie.to_be_bytes()];
    [&words.concat()[..], &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

/// Serves a client and looks at what came of it.
///
/// # Panics
/// If the server breaks a promise.
pub(crate) fn judge(input: &Input) -> Served {
    let served = server::serve(input);
    assert!(served.negotiated.starts_with(b"NBDMAGICIHAVEOPT\0\x03"));
    let Some(agreement) = &served.agreement else {
        assert!(served.answers.is_empty() && served.ended != Ended::Gone);
        return served;
    };
    let (cookies, ended) = expected(&input.bytes[served.entered_at..]);
    assert_eq!(served.ended, ended);
    let mut answered: Vec<u64> = served.answers.iter().map(|answer| understand(answer, agreement.structured)).collect();
    assert!(served.requests.len() <= cookies.len());
    let mut cookies = cookies;
    cookies.sort_unstable();
    answered.sort_unstable();
    assert_eq!(answered, cookies, "every request is answered once");
    served
}

pub(crate) fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Cookies of all requests that came whole, in order, and how the connection must end.
pub(crate) fn expected(mut bytes: &[u8]) -> (Vec<u64>, Ended) {
    let mut cookies = Vec::new();
    loop {
        if bytes.len() >= 4 && number::<4>(bytes, 0) != u64::from(REQUEST) {
            return (cookies, Ended::Closed);
        }
        if bytes.len() < 28 {
            return (cookies, Ended::Waiting);
        }
        let (kind, cookie, len) = (number::<2>(bytes, 6) as u16, number::<8>(bytes, 8), number::<4>(bytes, 24));
        if kind == DISCONNECT {
            return (cookies, Ended::Gone);
        }
        let whole = 28 + if kind == WRITE { len as usize } else { 0 };
        if bytes.len() < whole {
            return (cookies, Ended::Waiting);
        }
        cookies.push(cookie);
        bytes = &bytes[whole..];
    }
}

/// The cookie of an answer that is as the protocol has it.
pub(crate) fn understand(answer: &Answer, structured: bool) -> u64 {
    let Answer { head, data_bytes } = answer;
    match number::<4>(head, 0) {
        0x6744_6698 => {
            assert_eq!(head.len(), 16);
            assert!(!structured || *data_bytes == 0, "a simple answer to a read");
            let error = number::<4>(head, 4);
            assert!([0, 1, 5, 12, 22, 28, 75, 95, 108].contains(&error), "error {error} is not of the protocol");
            assert!(error == 0 || *data_bytes == 0);
            number::<8>(head, 8)
        }
        0x668e_33ef => {
            assert!(structured, "a structured answer that was not agreed on");
            assert_eq!(number::<2>(head, 4), 1, "the only piece, and so the last one");
            let (kind, len) = (number::<2>(head, 6), number::<4>(head, 16) as usize);
            assert_eq!(len, head.len() - 20 + data_bytes);
            match kind {
                0 => assert_eq!(len, 0),
                1 => assert!(len > 8 && head.len() == 28),
                5 => {
                    assert!(len >= 12 && len % 8 == 4 && *data_bytes == 0);
                    let extents = head[24..].chunks(8).map(|extent| number::<4>(extent, 0));
                    assert!(extents.clone().all(|len| len > 0));
                }
                0x8001 => {
                    assert_eq!(number::<2>(head, 24) as usize, len - 6);
                    assert!(std::str::from_utf8(&head[26..]).is_ok());
                    assert_ne!(number::<4>(head, 20), 0);
                }
                other => panic!("answers of kind {other} are not known"),
            }
            number::<8>(head, 8)
        }
        other => panic!("{other:#x} is no answer"),
    }
}
