//! The broker's end: what needs privilege is done here, if the rules allow it.
//!
//! - `open`: stores, NBD servers' sockets, files of the configuration; groups of the daemon's files
//! - `children`: programs it starts
//! - `tc`: queueing disciplines of machines' interfaces
//! - `limit`: what it gives up itself
//!
//! One thread hears requests; what may wait for storage is done by others. Programs end with the thread that started them
//! (prctl(2), `PR_SET_PDEATHSIG`): each of these threads lives as long as the process.

mod children;
mod limit;
mod open;
pub(crate) mod tc;

use std::collections::VecDeque;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use parking_lot::{Condvar, Mutex};

use super::channel;
use super::protocol::{Answer, Ask, MAX_MESSAGE, Name, Refusal, Request, Said, VERSION};
use super::rules::Rules;
use children::Children;
pub use children::USER;

/// Stores being opened at once. What hangs longer than this is many waits for the others.
const MAX_OPENING: usize = 64;
/// Requests that wait, at most; the daemon is a program of ours, which has fewer disks.
const MAX_WAITING: usize = 1 << 13;

/// Reads the rules anew.
pub type ReadRules = Box<dyn FnMut() -> Result<Arc<Rules>, String>>;

/// Serves the socket on descriptor 0 until the daemon hangs up. `rules` is asked before every request that depends on them; while
/// it fails, those of the last time hold.
///
/// # Errors
/// In words, for standard error: descriptor 0 is no such socket, privileges cannot be given up, or there are no rules.
pub fn serve(mut rules: ReadRules) -> Result<(), String> {
    // SAFETY: nothing was opened yet that anybody would use, but standard streams.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    // SAFETY: descriptor 0 is nobody else's in this process, which reads no standard input.
    let socket = unsafe { OwnedFd::from_raw_fd(0) };
    if getsockopt(&socket, sockopt::SockType) != Ok(SockType::SeqPacket) {
        return Err("started by prestaged alone, with a socket as standard input".into());
    }
    // The service manager ends all of a service at once; this has to outlive the daemon's orderly end.
    for ignored in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR2] {
        let nothing = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(ignored, &nothing) }.map_err(|error| format!("cannot ignore {ignored}: {error}"))?;
    }
    let notes = limit::limit()?;
    let first = rules()?;
    let broker = Broker {
        socket: Arc::new(socket),
        rules,
        last: first,
        notes,
        children: Arc::default(),
        openers: Arc::default(),
        threads: 0,
    };
    broker.run()
}

/// Unlike one that is ignored, a signal with a handler is as usual again for programs that are started.
extern "C" fn nothing(_: libc::c_int) {}

struct Broker {
    socket: Arc<OwnedFd>,
    rules: ReadRules,
    last: Arc<Rules>,
    notes: Vec<String>,
    children: Arc<Mutex<Children>>,
    openers: Arc<Openers>,
    threads: usize,
}

/// What may take as long as storage does.
struct Task {
    ticket: u64,
    rules: Arc<Rules>,
    ask: Ask,
    descriptor: Option<OwnedFd>,
}

/// Who opens: threads that take what waits. They end with the process, and so do programs that they start.
#[derive(Default)]
struct Openers {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Default)]
struct Waiting {
    tasks: VecDeque<Task>,
    /// Threads with nothing to do.
    idle: usize,
}

fn say(socket: &OwnedFd, ticket: u64, body: Result<(Said, Option<OwnedFd>), Refusal>) {
    let (body, descriptor) = match body {
        Ok((said, descriptor)) => (Ok(said), descriptor),
        Err(refusal) => (Err(refusal), None),
    };
    let Ok(packet) = postcard::to_allocvec(&Answer { ticket, body }) else { return };
    // A daemon that is gone ends the thread that hears, and with it this process.
    let _ = channel::send(socket, &packet, descriptor.as_ref().map(AsFd::as_fd));
}

fn opened(opened: Result<(std::path::PathBuf, OwnedFd), Refusal>) -> Result<(Said, Option<OwnedFd>), Refusal> {
    opened.map(|(path, descriptor)| (Said::Opened { path: Name::from(path.as_path()) }, Some(descriptor)))
}

impl Broker {
    fn run(mut self) -> Result<(), String> {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let (request, descriptor) = match channel::receive(&self.socket, &mut buffer) {
                Ok(([], _)) => return Ok(()),
                Ok((packet, descriptor)) => match postcard::from_bytes::<Request>(packet) {
                    Ok(request) => (request, descriptor),
                    // It has no ticket to answer to, and is no daemon of ours.
                    Err(error) => return Err(format!("the daemon says what nobody understands: {error}")),
                },
                Err(error) => return Err(format!("cannot hear the daemon: {error}")),
            };
            self.children.lock().reap();
            let ticket = request.ticket;
            if let Some(said) = self.obey(request, descriptor) {
                if let Err(refusal) = &said {
                    tracing::debug!(%refusal, "refused");
                }
                say(&self.socket, ticket, said);
            }
        }
    }

    /// The answer, or `None` if another thread gives it.
    fn obey(
        &mut self,
        Request { ticket, body }: Request,
        descriptor: Option<OwnedFd>,
    ) -> Option<Result<(Said, Option<OwnedFd>), Refusal>> {
        let done = |()| (Said::Done, None);
        Some(match body {
            Ask::Hello { version: VERSION } => {
                Ok((Said::Hello { pid: std::process::id(), notes: self.notes.clone() }, None))
            }
            Ask::Hello { version } => Err(Refusal::rule(format!(
                "the broker speaks version {VERSION}, the daemon {version}; restart prestaged"
            ))),
            Ask::Open { .. } | Ask::Connect { .. } | Ask::Read { .. } | Ask::FindKey { .. } | Ask::StartImages(_) => {
                self.refresh();
                let rules = Arc::clone(&self.last);
                return self.open(Task { ticket, rules, ask: body, descriptor }).err().map(Err);
            }
            Ask::SetGroup { group } => {
                self.refresh();
                let missing = || Refusal::rule("no descriptor came along");
                descriptor.ok_or_else(missing).and_then(|fd| open::set_group(&self.last, &fd, group)).map(done)
            }
            Ask::Qdiscs { device } => tc::of_machine(&device).and_then(tc::show).map(|text| {
                let fits = text.len() < MAX_MESSAGE / 2;
                (Said::Text(if fits { text } else { String::new() }), None)
            }),
            Ask::RemoveQdisc { device, qdisc } => {
                tc::of_machine(&device).and_then(|device| tc::remove(device, qdisc)).map(done)
            }
            Ask::Start(program) => {
                self.refresh();
                self.children
                    .lock()
                    .start(program, &self.last)
                    .map(|(child, pid, socket)| (Said::Started { child, pid }, Some(socket)))
            }
            Ask::End { child, gently } => {
                self.children.lock().end(child, gently);
                Ok(done(()))
            }
            Ask::StartSuccessor { anew } => {
                self.refresh();
                self.children
                    .lock()
                    .start_successor(anew, &self.last)
                    .map(|pid| (Said::Started { child: 0, pid }, None))
            }
            Ask::EndSuccessor { pid } => self.children.lock().end_successor(pid).map(done),
        })
    }

    fn refresh(&mut self) {
        match (self.rules)() {
            Ok(rules) => self.last = rules,
            Err(error) => tracing::warn!("the broker goes by the last configuration that it could read: {error}"),
        }
    }

    /// Has another thread open it.
    fn open(&mut self, task: Task) -> Result<(), Refusal> {
        let mut waiting = self.openers.waiting.lock();
        if waiting.tasks.len() >= MAX_WAITING {
            return Err(Refusal { errno: libc::EBUSY, reason: "too many stores are being opened".into() });
        }
        waiting.tasks.push_back(task);
        let enough = waiting.idle >= waiting.tasks.len() || self.threads >= MAX_OPENING;
        drop(waiting);
        self.openers.more.notify_one();
        if enough {
            return Ok(());
        }
        let (openers, socket, children) =
            (Arc::clone(&self.openers), Arc::clone(&self.socket), Arc::clone(&self.children));
        match thread::Builder::new().name("open".into()).spawn(move || openers.work(&socket, &children)) {
            Ok(_) => self.threads += 1,
            Err(error) if self.threads > 0 => tracing::warn!(%error, "few threads to open stores with"),
            Err(error) => {
                self.openers.waiting.lock().tasks.pop_back();
                return Err(Refusal::os("start a thread", &error));
            }
        }
        Ok(())
    }
}

impl Openers {
    fn work(&self, socket: &OwnedFd, children: &Mutex<Children>) {
        loop {
            let Task { ticket, rules, ask, descriptor } = {
                let mut waiting = self.waiting.lock();
                loop {
                    if let Some(task) = waiting.tasks.pop_front() {
                        break task;
                    }
                    waiting.idle += 1;
                    self.more.wait(&mut waiting);
                    waiting.idle -= 1;
                }
            };
            let said = match ask {
                Ask::Open { path, how } => opened(open::store(&rules, &path.path(), how)),
                Ask::Connect { path } => opened(open::server(&rules, &path.path())),
                Ask::Read { path } => opened(open::read(&rules, &path.path())),
                Ask::FindKey { disk } => open::key(&rules, &disk).map(|_| (Said::Done, None)),
                Ask::StartImages(chain) => {
                    let missing = || Refusal::rule("no socket came along");
                    let started = descriptor
                        .ok_or_else(missing)
                        .and_then(|listener| Children::start_images(children, &chain, &listener, &rules));
                    started.map(|(child, pid, errors)| (Said::Started { child, pid }, Some(errors)))
                }
                _ => Err(Refusal::rule("this is not for openers")),
            };
            if let Err(refusal) = &said {
                tracing::debug!(%refusal, "refused");
            }
            say(socket, ticket, said);
        }
    }
}
