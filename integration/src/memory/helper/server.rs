//! The helper's end: `prestage-memory` is [`run`] and nothing else.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockType, getsockopt, recv, sockopt};

use super::limit::limit;
use super::protocol::{
    Abilities, Ask, MAX_FAULTS, MAX_MESSAGE, MAX_REGIONS, MAX_SPANS, Message, Request, Said, VERSION, Watching,
};
use super::worker::{View, Work, Worker, say};
use crate::memory::advise::{Advice, Memory};
use crate::memory::capture::{Capture, Caught, Places};
use crate::memory::pagemap::Pagemap;
use crate::memory::process::Process;
use crate::memory::{Fault, MemoryError, ProcessId, Region};

/// Between two looks at rings while there are faults: a wake-up a fault would cost more than the fault.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
/// The same while a look finds few.
const SLOW_PAUSE: Duration = Duration::from_millis(10);
/// A look that finds fewer than this was early, and one that finds four times as many was late.
const FEW: usize = 64;
/// Without faults for this long they are looked at less often.
const BUSY_FOR: Duration = Duration::from_millis(50);
/// Between two looks at rings then. A wake-up a fault would interrupt the guest's processor each time, and take eighteen times
/// what the fault's sample does (measured).
const QUIET_PAUSE: Duration = Duration::from_millis(20);
/// Threads of hypervisors come and go.
const FOLLOW: Duration = Duration::from_secs(1);
/// Machines at once, at most.
const MAX_MACHINES: usize = 4096;

struct Machine {
    view: Arc<View>,
    capture: Capture,
    listening: bool,
    lost: u64,
}

impl Machine {
    fn watching(&self) -> Watching {
        Watching { signal: self.capture.signal(), passed_over: self.capture.passed_over().to_vec() }
    }
}

struct Server {
    socket: Arc<OwnedFd>,
    /// Programs that may be touched beside QEMU.
    also: Vec<PathBuf>,
    missing: Vec<String>,
    machines: HashMap<u32, Machine>,
    moves: Worker,
    looks: Worker,
    caught: Vec<Caught>,
    busy_until: Instant,
    pause: Duration,
    follow_at: Instant,
}

/// Serves the socket on descriptor 0 until the daemon hangs up.
///
/// # Errors
/// In words, for standard error: descriptor 0 is no such socket, or privileges cannot be given up.
pub fn run(also: Vec<PathBuf>) -> Result<(), String> {
    // what whoever started the daemon left open is none of ours
    // SAFETY: nothing was opened yet, so that no owner loses a descriptor.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    // SAFETY: descriptor 0 is nobody else's in this process, which reads no standard input.
    let socket = unsafe { OwnedFd::from_raw_fd(0) };
    if getsockopt(&socket, sockopt::SockType) != Ok(SockType::SeqPacket) {
        return Err("started by prestaged alone, with a socket as standard input".into());
    }
    let missing = limit()?;
    let socket = Arc::new(socket);
    let worker =
        |name| Worker::start(name, Arc::clone(&socket)).map_err(|error| format!("cannot start a thread: {error}"));
    let (moves, looks) = (worker("moves")?, worker("looks")?);
    let now = Instant::now();
    let (machines, caught) = (HashMap::new(), Vec::new());
    let server = Server {
        socket,
        also,
        missing,
        machines,
        moves,
        looks,
        caught,
        busy_until: now,
        pause: BUSY_PAUSE,
        follow_at: now,
    };
    server.serve()
}

impl Server {
    fn serve(mut self) -> Result<(), String> {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let (asked, ended) = self.wait().map_err(|error| format!("cannot wait: {error}"))?;
            // before anything is asked: who is named anew may be another process
            for vm in ended {
                self.machines.remove(&vm);
                let _ = say(&self.socket, &Message::Gone { vm }, MsgFlags::empty());
            }
            if asked && !self.hear(&mut buffer) {
                return Ok(());
            }
            self.faults();
            let now = Instant::now();
            if now >= self.follow_at {
                self.follow_at = now + FOLLOW;
                for (&vm, machine) in self.machines.iter_mut().filter(|(_, machine)| machine.listening) {
                    machine.capture.follow_threads(&machine.view.process);
                    // one that has ended is told by its pidfd
                    if machine.capture.judge(&machine.view.process, &machine.view.pagemap) == Ok(true) {
                        let watching = machine.watching();
                        let _ = say(&self.socket, &Message::Watching { vm, watching }, MsgFlags::empty());
                    }
                }
            }
        }
    }

    /// Whether something was asked, and whose process has ended.
    fn wait(&self) -> Result<(bool, Vec<u32>), Errno> {
        let now = Instant::now();
        let busy = self.busy_until > now;
        let vms: Vec<u32> = self.machines.keys().copied().collect();
        let mut fds = vec![PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        for vm in &vms {
            fds.push(PollFd::new(self.machines[vm].view.process.pidfd(), PollFlags::POLLIN));
        }
        let mut pause = if busy { self.pause } else { FOLLOW };
        for machine in self.machines.values().filter(|machine| machine.listening) {
            pause = pause.min(QUIET_PAUSE);
            if let Some(ms) = machine.capture.look_within_ms() {
                pause = pause.min(Duration::from_millis(ms));
            }
        }
        let timeout = PollTimeout::try_from(pause.as_millis()).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        let happened = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let ended = vms.iter().zip(&fds[1..]).filter(|(_, fd)| happened(fd)).map(|(vm, _)| *vm).collect();
        Ok((happened(&fds[0]), ended))
    }

    /// Hears one request. False when the daemon has hung up.
    fn hear(&mut self, buffer: &mut [u8]) -> bool {
        let length = match recv(self.socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return false,
            Ok(length) => length,
            Err(Errno::EINTR | Errno::EAGAIN) => return true,
            Err(_) => return false,
        };
        // what cannot be read has no ticket to answer to, and is no daemon of ours
        let Ok(Request { ticket, body }) = postcard::from_bytes(&buffer[..length]) else { return false };
        let body = match self.obey(ticket, body) {
            Ok(Some(said)) => Ok(said),
            Ok(None) => return true,
            Err(error) => Err(error),
        };
        say(&self.socket, &Message::Answer { ticket, body }, MsgFlags::empty()).is_ok()
    }

    /// The answer, or `None` if a worker gives it.
    fn obey(&mut self, ticket: u64, ask: Ask) -> Result<Option<Said>, MemoryError> {
        let (vm, work) = match ask {
            Ask::Hello { version } if version == VERSION => {
                return Ok(Some(Said::Hello(Abilities { missing: self.missing.clone(), pid: std::process::id() })));
            }
            Ask::Hello { version } => {
                return Err(MemoryError::Version { helper: VERSION, daemon: version });
            }
            Ask::Watch { vm, process, regions } => {
                return self.watch(vm, process, regions).map(|w| Some(Said::Watching(w)));
            }
            Ask::Layout { vm, regions } => {
                let process = Arc::clone(&self.machine(vm)?.view.process);
                self.machine(vm)?.view = Arc::new(view(process, regions)?);
                return Ok(Some(Said::Done));
            }
            Ask::Listen { vm, period } => {
                let machine = self.machine(vm)?;
                machine.view.process.check()?;
                machine.capture.listen(&machine.view.process, period);
                machine.listening = period > 0;
                return Ok(Some(Said::Done));
            }
            Ask::Forget { vm } => {
                self.machines.remove(&vm);
                return Ok(Some(Said::Done));
            }
            Ask::BringIn { vm, spans } => (vm, Work::Advise(Advice::WillNeed, spans)),
            Ask::Map { vm, spans } => (vm, Work::Map(spans)),
            Ask::PushOut { vm, how, spans } => (vm, Work::Advise(Advice::Push(how), spans)),
            Ask::States { vm, spans } => (vm, Work::States(spans)),
            Ask::Residency { vm } => (vm, Work::Residency),
        };
        let moves = matches!(work, Work::Advise(..) | Work::Map(..));
        if let Work::Advise(_, spans) | Work::Map(spans) | Work::States(spans) = &work
            && spans.len() > MAX_SPANS
        {
            return Err(MemoryError::Busy);
        }
        let view = Arc::clone(&self.machine(vm)?.view);
        let worker = if moves { &self.moves } else { &self.looks };
        worker.give(ticket, view, work).map(|()| None)
    }

    fn machine(&mut self, vm: u32) -> Result<&mut Machine, MemoryError> {
        self.machines.get_mut(&vm).ok_or(MemoryError::Unknown(vm))
    }

    fn watch(&mut self, vm: u32, process: ProcessId, regions: Vec<Region>) -> Result<Watching, MemoryError> {
        self.machines.remove(&vm);
        if self.machines.len() >= MAX_MACHINES {
            return Err(MemoryError::Busy);
        }
        let process = Arc::new(Process::open(process, &self.also)?);
        let view = Arc::new(view(process, regions)?);
        let capture = Capture::open(&view.process, &view.pagemap)?;
        view.process.check()?;
        let machine = Machine { view, capture, listening: false, lost: 0 };
        let watching = machine.watching();
        self.machines.insert(vm, machine);
        Ok(watching)
    }

    /// Tells of what was caught since the last time.
    fn faults(&mut self) {
        let mut most = 0;
        for (&vm, machine) in self.machines.iter_mut().filter(|(_, machine)| machine.listening) {
            self.caught.clear();
            let view = &machine.view;
            machine.lost += machine.capture.take(&view.pagemap, &view.places, &mut self.caught);
            if self.caught.is_empty() && machine.lost == 0 {
                continue;
            }
            self.busy_until = Instant::now() + BUSY_FOR;
            most = most.max(self.caught.len());
            let of_guest =
                |caught: &Caught| Some(Fault { at_us: caught.at_ns / 1000, frame: view.places.frame(caught.place)? });
            let faults: Vec<Fault> = self.caught.iter().filter_map(of_guest).collect();
            let mut parts = faults.chunks(MAX_FAULTS).map(<[Fault]>::to_vec);
            let mut part = parts.next().unwrap_or_default();
            loop {
                let count = part.len() as u64;
                if count == 0 && machine.lost == 0 {
                    break;
                }
                let lost = std::mem::take(&mut machine.lost);
                // a daemon that does not read must not keep the rings from being emptied
                if say(&self.socket, &Message::Faults { vm, lost, faults: part }, MsgFlags::MSG_DONTWAIT).is_err() {
                    machine.lost = lost + count;
                }
                match parts.next() {
                    Some(next) => part = next,
                    None => break,
                }
            }
        }
        self.pause = match most {
            few if few < FEW => (self.pause * 2).min(SLOW_PAUSE),
            many if many > 4 * FEW => (self.pause / 2).max(BUSY_PAUSE),
            _ => self.pause,
        };
    }
}

fn view(process: Arc<Process>, regions: Vec<Region>) -> Result<View, MemoryError> {
    if regions.len() > MAX_REGIONS {
        return Err(MemoryError::Layout(format!("{} regions are more than {MAX_REGIONS}", regions.len())));
    }
    let ranges: Vec<_> =
        regions.iter().map(|region| (region.host, region.pages.saturating_mul(crate::memory::PAGE_BYTES))).collect();
    let places = Places::new(regions)?;
    let mut pagemap = Pagemap::open(&process)?;
    pagemap.find_shared(&process, &ranges)?;
    let memory = Memory::open(&process)?;
    process.check()?;
    Ok(View { process, pagemap, memory, places })
}
