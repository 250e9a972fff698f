//! A store that loses power: an NBD server in this process with a volatile cache of its own.
//!
//! Writes go to the volatile cache, which keeps all versions of a sector since it was made durable. A flush makes durable
//! what was answered before it came and no more: everything, if the store says that its connections are one
//! (`NBD_FLAG_CAN_MULTI_CONN`), else what came over the same connection. A write with FUA is durable itself. When power
//! goes, each sector keeps what is durable or any later version. Answers are sent late and out of order.

use crate::nbd_common::Random;
use crate::nbd_common::wire::{
    DATA, ERROR, FLAG_FLUSH, FLAG_FUA, FLAG_MULTI, FLAG_ZEROES, Got, NONE, chunk, handshake,
};
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub(crate) const SECTOR: usize = 512;
/// More than the RAM tier holds.
pub(crate) const SECTORS: u64 = 5400;

const READ: u16 = 0;
const WRITE: u16 = 1;
const GOODBYE: u16 = 2;
const FLUSH: u16 = 3;
const ZERO: u16 = 6;
const COMMAND_FUA: u16 = 1;
const EIO: u32 = 5;

/// Each eighth version of a sector is zeroes.
pub(crate) fn shown(version: u64) -> u64 {
    if version.is_multiple_of(8) { 0 } else { version }
}

/// A sector's content: its version and its place, all over it; zeroes for 0.
pub(crate) fn bytes(sector: u64, version: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if version > 0 {
        for (at, word) in bytes.chunks_exact_mut(16).enumerate() {
            word[..8].copy_from_slice(&version.to_le_bytes());
            word[8..].copy_from_slice(&(sector << 8 | at as u64).to_le_bytes());
        }
    }
    bytes
}

/// What a sector shows. Fails if it is torn, or another's.
pub(crate) fn version(sector: u64, found: &[u8]) -> u64 {
    let version = u64::from_le_bytes(found[..8].try_into().unwrap());
    assert!(found == bytes(sector, version), "sector {sector} is torn or another's: {:x?}", &found[..32]);
    version
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    pub(crate) multi: bool,
    pub(crate) fua: bool,
    pub(crate) zeroes: bool,
    /// Some requests fail, having been done or not.
    pub(crate) fails: bool,
}

impl Abilities {
    fn flags(self) -> u16 {
        let flag = |on: bool, flag: u16| if on { flag } else { 0 };
        FLAG_FLUSH | flag(self.multi, FLAG_MULTI) | flag(self.fua, FLAG_FUA) | flag(self.zeroes, FLAG_ZEROES)
    }
}

/// A version in the volatile cache.
#[derive(Clone, Copy, Debug)]
struct Volatile {
    shows: u64,
    connection: u64,
    cookie: u64,
    answered: bool,
}

#[derive(Debug)]
struct Cell {
    durable: u64,
    volatile: Vec<Volatile>,
}

impl Cell {
    fn latest(&self) -> u64 {
        self.volatile.last().map_or(self.durable, |version| version.shows)
    }
}

#[derive(Debug)]
struct State {
    cells: Vec<Cell>,
    random: Random,
    requests_left: u64,
    off: bool,
    streams: Vec<UnixStream>,
}

#[derive(Debug)]
pub(crate) struct Store {
    state: Arc<Mutex<State>>,
    socket: PathBuf,
}

impl Store {
    /// Serves `content`, a version a sector, on a socket until power goes at the request after `requests` others. The
    /// socket may be an earlier store's, which serves nobody new then.
    pub(crate) fn start(socket: &Path, abilities: Abilities, content: &[u64], requests: u64, seed: u64) -> Store {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let cells = content.iter().map(|durable| Cell { durable: *durable, volatile: Vec::new() }).collect();
        let state = State { cells, random: Random(seed | 1), requests_left: requests, off: false, streams: Vec::new() };
        let state = Arc::new(Mutex::new(state));
        {
            let state = Arc::clone(&state);
            // Ends with the process: the listener's thread waits for connections that no longer come.
            std::thread::spawn(move || {
                for (number, stream) in (0..).zip(listener.incoming()) {
                    let stream = stream.unwrap();
                    let (answers, sent) = channel();
                    {
                        let mut state = state.lock().unwrap();
                        if state.off {
                            continue;
                        }
                        state.streams.push(stream.try_clone().unwrap());
                    }
                    let (out, shared) = (stream.try_clone().unwrap(), Arc::clone(&state));
                    std::thread::spawn(move || answer(out, number, &shared, &sent));
                    let state = Arc::clone(&state);
                    std::thread::spawn(move || serve(stream, abilities, number, &state, &answers));
                }
            });
        }
        Store { state, socket: socket.to_owned() }
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    pub(crate) fn is_off(&self) -> bool {
        self.state.lock().unwrap().off
    }

    /// What a sector shows to a reader now, or did when power went.
    pub(crate) fn latest(&self, sector: u64) -> u64 {
        self.state.lock().unwrap().cells[sector as usize].latest()
    }

    pub(crate) fn durable(&self, sector: u64) -> u64 {
        self.state.lock().unwrap().cells[sector as usize].durable
    }

    /// What was left if no power had gone.
    pub(crate) fn all(&self) -> Vec<u64> {
        self.state.lock().unwrap().cells.iter().map(Cell::latest).collect()
    }

    /// What is left once power has gone.
    pub(crate) fn left(&self) -> Vec<u64> {
        let mut state = self.state.lock().unwrap();
        assert!(state.off, "power has not gone yet");
        let State { cells, random, .. } = &mut *state;
        cells
            .iter()
            .map(|cell| match random.below(1 + cell.volatile.len() as u64) {
                0 => cell.durable,
                at => cell.volatile[at as usize - 1].shows,
            })
            .collect()
    }
}

/// Sends answers, a handful at a time and shuffled.
fn answer(mut out: UnixStream, connection: u64, state: &Mutex<State>, answers: &Receiver<(u64, Vec<u8>)>) {
    while let Ok(first) = answers.recv() {
        let mut waiting = vec![first];
        while let Ok(next) = answers.recv_timeout(Duration::from_micros(100)) {
            waiting.push(next);
            if waiting.len() > 8 {
                break;
            }
        }
        while !waiting.is_empty() {
            let bytes = {
                let mut state = state.lock().unwrap();
                if state.off {
                    return;
                }
                let at = state.random.below(waiting.len() as u64) as usize;
                let (cookie, bytes) = waiting.swap_remove(at);
                let versions = state.cells.iter_mut().flat_map(|cell| &mut cell.volatile);
                versions
                    .filter(|version| (version.connection, version.cookie) == (connection, cookie))
                    .for_each(|version| version.answered = true);
                bytes
            };
            if out.write_all(&bytes).is_err() {
                return;
            }
        }
    }
}

fn serve(
    mut stream: UnixStream,
    abilities: Abilities,
    connection: u64,
    state: &Mutex<State>,
    answers: &Sender<(u64, Vec<u8>)>,
) {
    if handshake(&mut stream, SECTORS * SECTOR as u64, abilities.flags()).is_err() {
        return;
    }
    while let Ok(got) = Got::take(&mut stream) {
        if got.command == GOODBYE {
            return;
        }
        let mut state = state.lock().unwrap();
        if state.off || state.requests_left == 0 {
            state.off = true;
            for stream in &state.streams {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
            return;
        }
        state.requests_left -= 1;
        let fails = abilities.fails && state.random.below(25) == 0;
        let done = !fails || state.random.below(2) == 0;
        let data = if done { state.act(&got, connection, abilities) } else { Vec::new() };
        let reply = match (fails, got.command) {
            (true, _) => chunk(got.cookie, true, ERROR, 6, &[EIO.to_be_bytes().as_slice(), &[0, 0]].concat()),
            (false, READ) => {
                let body = [got.offset.to_be_bytes().as_slice(), &data].concat();
                chunk(got.cookie, true, DATA, body.len() as u32, &body)
            }
            _ => chunk(got.cookie, true, NONE, 0, &[]),
        };
        if answers.send((got.cookie, reply)).is_err() {
            return;
        }
    }
}

impl State {
    fn act(&mut self, got: &Got, connection: u64, abilities: Abilities) -> Vec<u8> {
        assert!(got.offset.is_multiple_of(SECTOR as u64) && (got.len as usize).is_multiple_of(SECTOR));
        let first = got.offset / SECTOR as u64;
        let sectors = first..first + u64::from(got.len) / SECTOR as u64;
        match got.command {
            READ => sectors.flat_map(|sector| bytes(sector, self.cells[sector as usize].latest())).collect(),
            WRITE | ZERO => {
                let fua = got.flags & COMMAND_FUA != 0;
                assert!(abilities.fua || !fua, "FUA asked of a store without it");
                for (at, sector) in sectors.enumerate() {
                    let shows = match got.command {
                        WRITE => version(sector, &got.payload[at * SECTOR..][..SECTOR]),
                        _ => 0,
                    };
                    let cell = &mut self.cells[sector as usize];
                    if fua {
                        *cell = Cell { durable: shows, volatile: Vec::new() };
                    } else {
                        cell.volatile.push(Volatile { shows, connection, cookie: got.cookie, answered: false });
                    }
                }
                Vec::new()
            }
            FLUSH => {
                for cell in &mut self.cells {
                    let covered = |v: &Volatile| v.answered && (abilities.multi || v.connection == connection);
                    if let Some(last) = cell.volatile.iter().rposition(covered) {
                        cell.durable = cell.volatile[last].shows;
                        cell.volatile.drain(..=last);
                    }
                }
                Vec::new()
            }
            other => panic!("command {other} was not offered"),
        }
    }
}
