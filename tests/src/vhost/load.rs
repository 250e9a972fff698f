//! Load on a disk from a thread of its own: every ring kept full with reads, writes and flushes at random places, every
//! answer checked against the [`Model`]. It connects again by itself whenever the server is gone.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

use super::connection::{self as message, Connection, Inflight, pair, words};
use super::model::{Model, SECTOR, draw};
use super::ring::{DATA_BYTES, DEPTH_MAX, Kind, RING, RING_BYTES, Ring};

/// Addresses of the shared memory, in the guest and in the front-end.
const GUEST: u64 = 0x100_0000;
const USER: u64 = 0x7f00_0000_0000;
/// How long the server may leave every request unanswered, or be away: far more than it ever takes.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a server that is away is tried.
const RETRY: Duration = Duration::from_millis(5);

/// How hard the disk is driven.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    pub queues: u16,
    /// Requests under way on each queue.
    pub depth: u16,
    pub seed: u64,
}

/// What was done and seen.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    /// Answers that overtook an older request of their queue.
    pub out_of_order: u64,
    /// Connections that ended.
    pub deaths: u64,
    /// Requests that were unanswered at those ends, all together.
    pub unanswered: u64,
    /// The longest time without an answer while requests were under way.
    pub longest_gap: Duration,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    answers: AtomicU64,
    connections: AtomicU64,
    /// The longest time without an answer since it was last asked for.
    gap_us: AtomicU64,
}

/// Load that runs; ends when dropped.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(Report, Model)>>>,
}

impl Load {
    /// Drives the disk at `socket`, all of whose sectors hold version 0 ([`Model::blank`]).
    pub fn start(socket: &Path, sectors: usize, options: LoadOptions) -> Result<Self> {
        if options.depth == 0 || options.depth > DEPTH_MAX || sectors < 2 * DATA_BYTES / SECTOR {
            bail!("1 to {DEPTH_MAX} requests a queue, and a disk of at least {} bytes", 2 * DATA_BYTES);
        }
        let shared = Arc::new(Shared::default());
        let driver = Driver::new(socket, sectors, options, Arc::clone(&shared))?;
        let thread = std::thread::Builder::new().name("load".to_owned()).spawn(move || driver.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Answers so far.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.shared.answers.load(Ordering::Acquire)
    }

    /// Connections so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Acquire)
    }

    /// The longest time without an answer since this was last asked, or since the beginning.
    pub fn take_gap(&self) -> Duration {
        Duration::from_micros(self.shared.gap_us.swap(0, Ordering::AcqRel))
    }

    /// It goes on; false when it has failed, and [`Load::finish`] says why.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Lets what is under way end, reads the whole disk back and checks that it holds the newest version everywhere.
    pub fn finish(mut self) -> Result<(Report, Model)> {
        self.shared.stop.store(true, Ordering::Release);
        let thread = self.thread.take().context("the load has been ended")?;
        thread.join().map_err(|_| anyhow!("the load panicked"))?
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // its error is no news: whoever wants it calls `finish`
            let _ = thread.join();
        }
    }
}

/// A request under way.
#[derive(Debug)]
struct Asked {
    kind: Kind,
    first: usize,
    sectors: usize,
    /// Of a read: the oldest versions it may see.
    oldest: Vec<u32>,
    /// Orders requests of a queue.
    turn: u64,
}

#[derive(Debug)]
struct QueueState {
    ring: Ring,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    asked: Vec<Option<Asked>>,
}

#[derive(Debug)]
struct Driver {
    socket: PathBuf,
    options: LoadOptions,
    shared: Arc<Shared>,
    file: File,
    memory: MmapRegion,
    queues: Vec<QueueState>,
    inflight: Option<Inflight>,
    connection: Option<Connection>,
    model: Model,
    random: u64,
    turn: u64,
    report: Report,
    last_answer: Instant,
}

fn event() -> Result<EventFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}

impl Driver {
    fn new(socket: &Path, sectors: usize, options: LoadOptions, shared: Arc<Shared>) -> Result<Self> {
        let bytes = usize::from(options.queues) * RING_BYTES;
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(bytes as u64)?;
        let memory = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), bytes)?;
        let queues = (0..options.queues)
            .map(|index| {
                let asked = (0..DEPTH_MAX).map(|_| None).collect();
                Ok(QueueState { ring: Ring::new(index, GUEST), kick: event()?, call: event()?, err: event()?, asked })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            socket: socket.to_owned(),
            options,
            shared,
            file,
            memory,
            queues,
            inflight: None,
            connection: None,
            model: Model::new(sectors),
            random: options.seed,
            turn: 0,
            report: Report::default(),
            last_answer: Instant::now(),
        })
    }

    fn run(mut self) -> Result<(Report, Model)> {
        self.last_answer = Instant::now();
        while !self.shared.stop.load(Ordering::Acquire) {
            self.turn(Self::submit_random)?;
        }
        self.drain()?;
        self.read_back()?;
        Ok((self.report, self.model))
    }

    /// One round of the loop: takes answers, asks anew by `submit`, sleeps when there is nothing to do.
    fn turn(&mut self, submit: fn(&mut Self, usize) -> Result<bool>) -> Result<()> {
        if self.connection.is_none() {
            self.connect()?;
        }
        let mut busy = false;
        for queue in 0..self.queues.len() {
            busy |= self.take_answers(queue)?;
            busy |= submit(self, queue)?;
        }
        if !busy {
            self.sleep()?;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        while self.under_way() > 0 {
            self.turn(|_, _| Ok(false))?;
        }
        Ok(())
    }

    fn under_way(&self) -> usize {
        self.queues.iter().map(|queue| queue.asked.iter().flatten().count()).sum()
    }

    fn connect(&mut self) -> Result<()> {
        let since = Instant::now();
        loop {
            match self.try_connect() {
                Ok(connection) => {
                    self.connection = Some(connection);
                    self.shared.connections.fetch_add(1, Ordering::AcqRel);
                    return Ok(());
                }
                Err(error) if since.elapsed() > PATIENCE => {
                    return Err(error.context(format!("{}: no connection", self.socket.display())));
                }
                // the server is not back yet, or was killed once more while we were saying hello
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }

    fn try_connect(&mut self) -> Result<Connection> {
        let (mut connection, _) = Connection::open(&self.socket)?;
        connection.share_inflight(&mut self.inflight, self.options.queues, RING)?;
        let region = words(&[0, GUEST, self.memory.size() as u64, USER, 0]);
        connection.set(message::ADD_MEM_REG, &region, &[self.file.as_raw_fd()])?;
        for (index, queue) in (0..).zip(&self.queues) {
            let [descriptors, used, available] = queue.ring.areas().map(|at| USER + at as u64);
            let addresses = [pair(index, 0), words(&[descriptors, used, available, 0])].concat();
            let word = words(&[u64::from(index)]);
            connection.set(message::SET_VRING_NUM, &pair(index, u32::from(RING)), &[])?;
            // where the server has to go on it knows from the in-flight memory alone
            connection.set(message::SET_VRING_BASE, &pair(index, u32::from(queue.ring.used())), &[])?;
            connection.set(message::SET_VRING_ADDR, &addresses, &[])?;
            connection.set(message::SET_VRING_CALL, &word, &[queue.call.as_fd().as_raw_fd()])?;
            connection.set(message::SET_VRING_ERR, &word, &[queue.err.as_fd().as_raw_fd()])?;
            connection.set(message::SET_VRING_KICK, &word, &[queue.kick.as_fd().as_raw_fd()])?;
            connection.set(message::SET_VRING_ENABLE, &pair(index, 1), &[])?;
        }
        Ok(connection)
    }

    /// Takes the answers that are there. True if there were any.
    fn take_answers(&mut self, queue: usize) -> Result<bool> {
        let mut any = false;
        let mut data = vec![0; DATA_BYTES];
        while let Some((slot, status)) = self.queues[queue].ring.answered(&self.memory)? {
            any = true;
            let state = &mut self.queues[queue];
            let asked = state.asked[usize::from(slot)].take();
            let asked = asked.with_context(|| format!("ring {queue}: slot {slot} was answered twice"))?;
            if status != 0 {
                bail!("ring {queue}: {asked:?} failed with status {status}: the guest would see an I/O error");
            }
            if state.asked.iter().flatten().any(|other| other.turn < asked.turn) {
                self.report.out_of_order += 1;
            }
            match asked.kind {
                Kind::Read => {
                    let data = &mut data[..asked.sectors * SECTOR];
                    state.ring.data(&self.memory, slot, data)?;
                    self.model.end_read(asked.first, &asked.oldest, data).with_context(|| format!("ring {queue}"))?;
                    self.report.reads += 1;
                }
                Kind::Write => {
                    self.model.end_write(asked.first, asked.sectors);
                    self.report.writes += 1;
                }
                Kind::Flush => self.report.flushes += 1,
            }
            let gap = self.last_answer.elapsed();
            self.report.longest_gap = self.report.longest_gap.max(gap);
            self.shared.gap_us.fetch_max(gap.as_micros() as u64, Ordering::AcqRel);
            self.last_answer = Instant::now();
            self.shared.answers.fetch_add(1, Ordering::AcqRel);
        }
        Ok(any)
    }

    fn ask(&mut self, queue: usize, kind: Kind, first: usize, data: &[u8]) -> Result<bool> {
        let sectors = data.len() / SECTOR;
        let oldest = if kind == Kind::Read { self.model.begin_read(first, sectors) } else { Vec::new() };
        let state = &mut self.queues[queue];
        let submitted = state.ring.submit(&self.memory, kind, first, data)?;
        let Some((slot, kick)) = submitted else { bail!("ring {queue} has no free slot") };
        self.turn += 1;
        state.asked[usize::from(slot)] = Some(Asked { kind, first, sectors, oldest, turn: self.turn });
        if kick {
            state.kick.write(1)?;
        }
        Ok(true)
    }

    fn room(&self, queue: usize) -> usize {
        usize::from(self.options.depth).saturating_sub(self.queues[queue].asked.iter().flatten().count())
    }

    /// Fills a queue with requests at random places, small ones most of the time, half of them in a sixteenth of the disk.
    fn submit_random(&mut self, queue: usize) -> Result<bool> {
        let (mut any, mut data) = (false, vec![0; DATA_BYTES]);
        for _ in 0..self.room(queue) {
            let dice = draw(&mut self.random);
            let most = if dice.is_multiple_of(8) { DATA_BYTES / SECTOR } else { 16 };
            let sectors = 1 + (dice >> 8) as usize % most;
            let span = if dice & 8 == 0 { self.model.sectors() / 16 } else { self.model.sectors() };
            let first = (dice >> 24) as usize % (span - sectors);
            let data = &mut data[..sectors * SECTOR];
            any |= match (dice >> 4) % 16 {
                0 => self.ask(queue, Kind::Flush, 0, &[])?,
                // no file system has two writes of a sector under way
                1..8 => self.model.begin_write(first, data) && self.ask(queue, Kind::Write, first, data)?,
                _ => self.ask(queue, Kind::Read, first, data)?,
            };
        }
        Ok(any)
    }

    fn read_back(&mut self) -> Result<()> {
        let (mut first, sectors) = (0, self.model.sectors());
        let data = vec![0; DATA_BYTES];
        while first < sectors {
            for queue in 0..self.queues.len() {
                for _ in 0..self.room(queue) {
                    let count = (DATA_BYTES / SECTOR).min(sectors - first);
                    if count > 0 {
                        self.ask(queue, Kind::Read, first, &data[..count * SECTOR])?;
                        first += count;
                    }
                }
            }
            self.drain()?;
        }
        Ok(())
    }

    /// Waits for an answer or the end of the connection.
    fn sleep(&mut self) -> Result<()> {
        let mut come = false;
        for queue in &self.queues {
            come |= queue.ring.ask_for_event(&self.memory)?;
        }
        let Some(connection) = self.connection.as_ref().filter(|_| !come) else { return Ok(()) };
        let mut fds = vec![PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
        for queue in &self.queues {
            fds.push(PollFd::new(queue.call.as_fd(), PollFlags::POLLIN));
            fds.push(PollFd::new(queue.err.as_fd(), PollFlags::POLLIN));
        }
        let ready = poll(&mut fds, PollTimeout::from(1000_u16))?;
        let ended = fds[0].any().unwrap_or(true);
        let broken = fds[2..].iter().step_by(2).any(|fd| fd.any().unwrap_or(true));
        drop(fds);
        if broken {
            bail!("the server says that a ring is broken");
        }
        for queue in &self.queues {
            // empty more often than not
            let _ = queue.call.read();
        }
        if ended {
            self.connection = None;
            self.report.deaths += 1;
            self.report.unanswered += self.under_way() as u64;
        } else if ready == 0 {
            for (index, queue) in self.queues.iter().enumerate() {
                if queue.ring.ask_for_event(&self.memory)? && queue.call.read().is_err() {
                    // an event follows its answer at once; this one has had a second, or gets another
                    std::thread::sleep(Duration::from_secs(1));
                    if queue.call.read().is_err() {
                        bail!("ring {index} has answers that nobody told of: the guest would hang");
                    }
                }
            }
            if self.last_answer.elapsed() > PATIENCE && self.under_way() > 0 {
                bail!("{} requests are not answered", self.under_way());
            }
        }
        Ok(())
    }
}
