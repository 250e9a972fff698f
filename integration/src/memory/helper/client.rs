//! The daemon's end: starts the helper, asks, and hears events.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};

use super::protocol::{Abilities, Ask, MAX_MESSAGE, Message, Moved, Request, Said, VERSION, Watching};
use super::running::Running;
use crate::memory::{MemoryError, PageState, ProcessId, Push, Region, Residency, Span};
use crate::privilege;

/// How long a question may take before the helper counts as stuck. Moving pages waits for the swap device.
const PATIENCE: Duration = Duration::from_secs(10);
/// Orders that have not been answered, at most.
const MAX_OPEN: usize = 64;

/// What comes from the helper unasked, or late.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Faults {
        vm: u32,
        lost: u64,
        faults: Vec<crate::memory::Fault>,
    },
    /// It is watched by another signal: the one before turned out to tell nothing.
    Watching {
        vm: u32,
        watching: Watching,
    },
    /// The machine's process has ended.
    Gone {
        vm: u32,
    },
    /// An order that was sent with [`Helper::bring_in`] or [`Helper::push_out`] is done.
    Moved {
        ticket: u64,
        moved: Result<Moved, MemoryError>,
    },
}

/// A running `prestage-memory`. Ends with this.
#[derive(Debug)]
pub struct Helper {
    socket: OwnedFd,
    child: Running,
    abilities: Abilities,
    next: u64,
    /// Orders under way.
    open: Vec<u64>,
    heard: VecDeque<Event>,
    buffer: Vec<u8>,
}

impl Helper {
    /// Starts `program` (`prestage-memory`) and says hello. `also` names programs it may touch beside QEMU: for tests, whose
    /// stand-in is no QEMU.
    ///
    /// # Errors
    /// It cannot be started, or is of another version.
    pub fn start(program: &Path, also: &[&Path]) -> Result<Self, MemoryError> {
        let failed = |error: io::Error| MemoryError::Os {
            what: format!("cannot start {}", program.display()),
            error: error.to_string(),
        };
        let (child, socket) = match privilege::broker() {
            // where the program is, and that it looks into QEMU alone, is the broker's word
            Some(broker) => Running::by_broker(broker),
            None => Running::ours(program, also),
        }
        .map_err(failed)?;
        // a request is one packet; the default holds one, but not a few
        let _ = setsockopt(&socket, sockopt::SndBuf, &(4 * MAX_MESSAGE));
        let (open, heard) = (Vec::new(), VecDeque::new());
        let abilities = Abilities::default();
        let mut helper = Self { socket, child, abilities, next: 0, open, heard, buffer: vec![0; MAX_MESSAGE] };
        match helper.ask(Ask::Hello { version: VERSION })? {
            Said::Hello(abilities) => helper.abilities = abilities,
            said => return Err(unexpected(&said)),
        }
        Ok(helper)
    }

    /// What it may do, as it said at its start.
    #[must_use]
    pub fn abilities(&self) -> &Abilities {
        &self.abilities
    }

    /// Readable when something was said.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// From now on `vm` means this process, with its memory at these places; nothing is told of its faults yet.
    ///
    /// # Errors
    /// The process is gone, another one, no hypervisor, or not to be looked into.
    pub fn watch(&mut self, vm: u32, process: ProcessId, regions: Vec<Region>) -> Result<Watching, MemoryError> {
        match self.ask(Ask::Watch { vm, process, regions })? {
            Said::Watching(watching) => Ok(watching),
            said => Err(unexpected(&said)),
        }
    }

    /// The machine's memory lies elsewhere now.
    ///
    /// # Errors
    /// `vm` is not known, or its process gone.
    pub fn layout(&mut self, vm: u32, regions: Vec<Region>) -> Result<(), MemoryError> {
        self.done(Ask::Layout { vm, regions })
    }

    /// Hear of every `period`th fault of each thread, 0: of none. Where faults do not come one by one this sets how many
    /// milliseconds lie between two looks.
    ///
    /// # Errors
    /// `vm` is not known, or its process gone.
    pub fn listen(&mut self, vm: u32, period: u32) -> Result<(), MemoryError> {
        self.done(Ask::Listen { vm, period })
    }

    /// # Errors
    /// The helper has ended.
    pub fn forget(&mut self, vm: u32) -> Result<(), MemoryError> {
        self.done(Ask::Forget { vm })
    }

    /// Asks for what is in swap of the spans; the ticket comes back with [`Event::Moved`].
    ///
    /// # Errors
    /// [`MemoryError::Busy`] with too many orders under way, or the helper has ended.
    pub fn bring_in(&mut self, vm: u32, spans: Vec<Span>) -> Result<u64, MemoryError> {
        self.order(Ask::BringIn { vm, spans })
    }

    /// Asks that pages that were brought in are mapped: the guest's touch is no fault then, and cannot be seen any more except as
    /// time that passes. The ticket comes back with [`Event::Moved`].
    ///
    /// # Errors
    /// As [`Helper::bring_in`].
    pub fn map(&mut self, vm: u32, spans: Vec<Span>) -> Result<u64, MemoryError> {
        self.order(Ask::Map { vm, spans })
    }

    /// Asks that pages go; the ticket comes back with [`Event::Moved`].
    ///
    /// # Errors
    /// As [`Helper::bring_in`].
    pub fn push_out(&mut self, vm: u32, how: Push, spans: Vec<Span>) -> Result<u64, MemoryError> {
        self.order(Ask::PushOut { vm, how, spans })
    }

    /// The state of each page of the spans, at most [`super::protocol::MAX_STATES`] of them.
    ///
    /// # Errors
    /// `vm` is not known, its process gone, or a span no memory of it.
    pub fn states(&mut self, vm: u32, spans: Vec<Span>) -> Result<Vec<PageState>, MemoryError> {
        let pages = spans.iter().map(|span| span.pages as usize).sum();
        match self.ask(Ask::States { vm, spans })? {
            Said::States(packed) => {
                (0..pages).map(|at| super::protocol::unpack(&packed, at).ok_or_else(short)).collect()
            }
            said => Err(unexpected(&said)),
        }
    }

    /// Pages of the whole machine by state.
    ///
    /// # Errors
    /// `vm` is not known, or its process gone.
    pub fn residency(&mut self, vm: u32) -> Result<Residency, MemoryError> {
        match self.ask(Ask::Residency { vm })? {
            Said::Residency(residency) => Ok(residency),
            said => Err(unexpected(&said)),
        }
    }

    /// Waits for what the helper has to say, at most this long.
    ///
    /// # Errors
    /// The helper has ended.
    pub fn next_event(&mut self, wait: Duration) -> Result<Option<Event>, MemoryError> {
        let until = Instant::now() + wait;
        loop {
            if let Some(event) = self.heard.pop_front() {
                return Ok(Some(event));
            }
            match self.receive(until.saturating_duration_since(Instant::now()))? {
                None => return Ok(None),
                Some(message) => self.sort(message),
            }
        }
    }

    fn done(&mut self, ask: Ask) -> Result<(), MemoryError> {
        match self.ask(ask)? {
            Said::Done => Ok(()),
            said => Err(unexpected(&said)),
        }
    }

    fn order(&mut self, ask: Ask) -> Result<u64, MemoryError> {
        if self.open.len() >= MAX_OPEN {
            return Err(MemoryError::Busy);
        }
        let ticket = self.send(ask)?;
        self.open.push(ticket);
        Ok(ticket)
    }

    fn ask(&mut self, ask: Ask) -> Result<Said, MemoryError> {
        let ticket = self.send(ask)?;
        let until = Instant::now() + PATIENCE;
        loop {
            match self.receive(until.saturating_duration_since(Instant::now()))? {
                Some(Message::Answer { ticket: of, body }) if of == ticket => return body,
                Some(message) => self.sort(message),
                None => {
                    // whatever it does, it is of no use any more, and its answer would be taken for another's
                    self.child.kill();
                    return Err(MemoryError::HelperGone(format!("no answer for {} s", PATIENCE.as_secs())));
                }
            }
        }
    }

    fn sort(&mut self, message: Message) {
        let event = match message {
            Message::Faults { vm, lost, faults } => Event::Faults { vm, lost, faults },
            Message::Watching { vm, watching } => Event::Watching { vm, watching },
            Message::Gone { vm } => Event::Gone { vm },
            Message::Answer { ticket, body } => {
                let Some(at) = self.open.iter().position(|open| *open == ticket) else { return };
                self.open.swap_remove(at);
                let moved = body.and_then(|said| match said {
                    Said::Moved(moved) => Ok(moved),
                    said => Err(unexpected(&said)),
                });
                Event::Moved { ticket, moved }
            }
        };
        self.heard.push_back(event);
    }

    fn send(&mut self, body: Ask) -> Result<u64, MemoryError> {
        self.next += 1;
        let ticket = self.next;
        let packet = postcard::to_allocvec(&Request { ticket, body })
            .map_err(|error| MemoryError::Os { what: "cannot word a request".into(), error: error.to_string() })?;
        loop {
            match send(self.socket.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL) {
                Ok(_) => return Ok(ticket),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(self.ended(&error.to_string())),
            }
        }
    }

    fn receive(&mut self, wait: Duration) -> Result<Option<Message>, MemoryError> {
        let until = Instant::now() + wait;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(self.ended(&error.to_string())),
            }
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(0) => return Err(self.ended("it closed its socket")),
                Ok(length) => {
                    return match postcard::from_bytes(&self.buffer[..length]) {
                        Ok(message) => Ok(Some(message)),
                        Err(error) => {
                            // it is not the one that was installed with this daemon
                            self.child.kill();
                            Err(self.ended(&format!("it says what nobody understands: {error}")))
                        }
                    };
                }
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(error) => return Err(self.ended(&error.to_string())),
            }
        }
    }

    fn ended(&mut self, why: &str) -> MemoryError {
        MemoryError::HelperGone(self.child.status().map_or_else(|| why.to_owned(), |status| status.to_string()))
    }
}

fn unexpected(said: &Said) -> MemoryError {
    MemoryError::HelperGone(format!("an answer to another question: {said:?}"))
}

fn short() -> MemoryError {
    MemoryError::HelperGone("an answer that is too short".into())
}
