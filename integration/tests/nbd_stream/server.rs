//! A server without sockets or a store, and what it has said.
//!
//! - [`serve`]: a client's bytes through negotiation and requests to answers; takes anything, and ends
//! - [`Input`]: the bytes, and how they come
//! - [`Served`]: what was said, and how it ended

use prestage_integration::export::nbd::{
    Agreement, Command, Event, ExportInfo, Exports, Extent, HANDSHAKE_BUFFER_BYTES, Handshake, NbdError,
    PAYLOAD_MAX_BYTES, REPLY_HEAD_MAX_BYTES, REQUEST_BYTES, Replies, Request, Requests, Security, Step,
};

pub(crate) const SIZE: u64 = (1 << 40) + 513;
pub(crate) const NAMES: [&str; 3] = ["", "disk", "fixed"];
/// What one option may be answered with: four items with the longest of strings.
const OPTION_ANSWER_MAX_BYTES: usize = 5 * (20 + 4096 + 2);
/// The handshake closes after so many.
const OPTIONS_MAX: usize = 64;

/// Three exports, the default one among them.
pub(crate) struct Shelf;

impl Exports for Shelf {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        NAMES.contains(&name).then(|| ExportInfo {
            name: if name.is_empty() { "disk" } else { name }.to_owned(),
            description: "a disk".to_owned(),
            size_bytes: SIZE,
            read_only: name == "fixed",
            can_trim: true,
        })
    }
    fn names(&self) -> Vec<String> {
        NAMES[1..].iter().map(|name| (*name).to_owned()).collect()
    }
}

/// What comes from a client, and how.
#[derive(Debug, Clone)]
pub(crate) struct Input {
    pub(crate) bytes: Vec<u8>,
    /// Lengths of the pieces in which the bytes come, over and over; 0 counts as 1.
    pub(crate) pieces: Vec<u16>,
    /// TLS is asked for; its bytes are passed on as they are.
    pub(crate) tls: bool,
    /// Which of the requests under way is answered next; which of them fail.
    pub(crate) order: u64,
}

/// An answer: what comes before the data, and how much data follows.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) head: Vec<u8>,
    pub(crate) data_bytes: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The client's bytes were over.
    Waiting,
    /// The client said goodbye.
    Gone,
    /// Closed by the server.
    Closed,
}

#[derive(Debug)]
pub(crate) struct Served {
    /// Everything that was said before requests.
    pub(crate) negotiated: Vec<u8>,
    pub(crate) agreement: Option<Agreement>,
    /// Bytes taken before the first request.
    pub(crate) entered_at: usize,
    pub(crate) answers: Vec<Answer>,
    pub(crate) requests: Vec<Request>,
    pub(crate) ended: Ended,
}

/// The bytes as they come, with what has not been taken yet.
struct Inbox<'a> {
    rest: &'a [u8],
    pieces: Vec<usize>,
    next: usize,
    buffer: Vec<u8>,
    taken: usize,
}

impl<'a> Inbox<'a> {
    fn new(input: &'a Input) -> Inbox<'a> {
        let pieces: Vec<usize> = input.pieces.iter().map(|len| usize::from(*len).max(1)).collect();
        let pieces = if pieces.is_empty() { vec![usize::MAX] } else { pieces };
        Inbox { rest: &input.bytes, pieces, next: 0, buffer: Vec::new(), taken: 0 }
    }

    /// Receives a piece, but no more than makes `limit` bytes. False at the end.
    fn fill(&mut self, limit: usize) -> bool {
        let room = limit.saturating_sub(self.buffer.len());
        let len = self.pieces[self.next % self.pieces.len()].min(room).min(self.rest.len());
        self.next += 1;
        let (piece, rest) = self.rest.split_at(len);
        self.buffer.extend_from_slice(piece);
        self.rest = rest;
        len > 0
    }

    fn take(&mut self, len: usize) {
        self.buffer.drain(..len);
        self.taken += len;
    }
}

/// Serves a client as the daemon does: never more of its bytes at once than the protocol's side asks for.
///
/// # Panics
/// On whatever a server must not do: take more than there is, wait for more than it may hold, answer at length.
pub(crate) fn serve(input: &Input) -> Served {
    let mut inbox = Inbox::new(input);
    let mut served = Served {
        negotiated: Vec::new(),
        agreement: None,
        entered_at: 0,
        answers: Vec::new(),
        requests: Vec::new(),
        ended: Ended::Waiting,
    };
    let Some(agreement) = negotiate(&mut inbox, input.tls, &mut served) else { return served };
    served.entered_at = inbox.taken;
    served.agreement = Some(agreement.clone());
    transmit(&mut inbox, &agreement, input.order, &mut served);
    served
}

fn negotiate(inbox: &mut Inbox<'_>, tls: bool, served: &mut Served) -> Option<Agreement> {
    let mut handshake = Handshake::new(if tls { Security::Required } else { Security::None });
    handshake.greet(&mut served.negotiated);
    loop {
        let before = served.negotiated.len();
        let (taken, step) = handshake.receive(&inbox.buffer, &Shelf, &mut served.negotiated);
        assert!(taken <= inbox.buffer.len());
        let options = (inbox.buffer.len() / 16 + 1).min(OPTIONS_MAX);
        assert!(served.negotiated.len() - before <= options * OPTION_ANSWER_MAX_BYTES, "an answer without an end");
        inbox.take(taken);
        match step {
            Step::Enter(agreement) => return Some(agreement),
            Step::Close => {
                served.ended = Ended::Closed;
                return None;
            }
            Step::StartTls => {
                assert!(tls);
                // What came with it was said by anybody.
                inbox.take(inbox.buffer.len());
                handshake.tls_started();
            }
            Step::More => assert!(inbox.buffer.len() < HANDSHAKE_BUFFER_BYTES, "it wants more than it may have"),
        }
        if !inbox.fill(HANDSHAKE_BUFFER_BYTES) {
            return None;
        }
    }
}

/// A stage as the daemon's, only smaller: what is longer goes past it.
const STAGE_BYTES: usize = 4096;

fn transmit(inbox: &mut Inbox<'_>, agreement: &Agreement, mut order: u64, served: &mut Served) {
    let (mut requests, replies) = (Requests::new(agreement), Replies::new(agreement));
    let mut under_way: Vec<Request> = Vec::new();
    // Payload of a write that is still to come.
    let mut payload = 0usize;
    loop {
        let part = payload.min(inbox.buffer.len());
        inbox.take(part);
        payload -= part;
        let next = if payload > 0 { Ok((0, None)) } else { requests.next(&inbox.buffer) };
        let Ok((taken, event)) = next else {
            served.ended = Ended::Closed;
            break;
        };
        inbox.take(taken);
        match event {
            Some(Event::Request(request)) => {
                if let Command::Write { .. } = request.command {
                    payload = request.len_bytes as usize;
                }
                served.requests.push(request);
                under_way.push(request);
            }
            Some(Event::Refused { cookie, error, why }) => {
                let mut head = Vec::new();
                replies.error(&mut head, cookie, error, why);
                served.answers.push(Answer { head, data_bytes: 0 });
            }
            Some(Event::Disconnect) => {
                served.ended = Ended::Gone;
                break;
            }
            None => {
                assert!(inbox.buffer.len() < REQUEST_BYTES, "it keeps more than a header that is not whole");
                if !inbox.fill(STAGE_BYTES) {
                    break;
                }
            }
        }
        // A write is not carried out before all of it is here.
        while payload == 0 && under_way.len() > (order % 7) as usize {
            let request = under_way.swap_remove((order >> 8) as usize % under_way.len());
            served.answers.push(answer(replies, &request, order));
            order = order.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        }
    }
    if payload > 0 {
        // It went in the middle of a write, the last of those under way: nobody answers that.
        under_way.pop();
        served.requests.pop();
    }
    served.answers.extend(under_way.iter().map(|request| answer(replies, request, order)));
}

/// Carries a request out on a disk that is made up, and fails some.
fn answer(replies: Replies, request: &Request, order: u64) -> Answer {
    let Request { cookie, command, offset_bytes, len_bytes } = *request;
    assert!(offset_bytes.checked_add(u64::from(len_bytes)).is_some_and(|end| end <= SIZE), "{request:?}");
    let mut head = Vec::new();
    let mut data_bytes = 0;
    if order >> 40 & 7 == 0 {
        replies.error(&mut head, cookie, NbdError::from_errno((order >> 20 & 127) as i32), "ö the store failed");
        return Answer { head, data_bytes };
    }
    match command {
        Command::Read => {
            assert!(len_bytes <= PAYLOAD_MAX_BYTES, "{request:?}");
            replies.data(&mut head, cookie, offset_bytes, len_bytes);
            assert!(head.len() <= REPLY_HEAD_MAX_BYTES);
            data_bytes = len_bytes as usize;
        }
        Command::BlockStatus { one } => {
            let last = Extent { len_bytes, hole: true, zero: true };
            let first = Extent { len_bytes: len_bytes / 2, hole: false, zero: false };
            let extents = match one || first.len_bytes == 0 {
                true => vec![last],
                false => vec![first, Extent { len_bytes: len_bytes - first.len_bytes, ..last }],
            };
            replies.block_status(&mut head, cookie, &extents);
        }
        Command::Write { .. } => {
            assert!(len_bytes <= PAYLOAD_MAX_BYTES, "{request:?}");
            replies.done(&mut head, cookie);
        }
        Command::Flush | Command::Trim { .. } | Command::Cache | Command::WriteZeroes { .. } => {
            replies.done(&mut head, cookie);
        }
    }
    Answer { head, data_bytes }
}
