//! A file system that falls ill on command: files in memory behind FUSE, whose reads, writes and syncs fail, are held back,
//! or find no space.
//!
//! Needs the right to mount. Nothing on the host but `/dev/fuse` takes part, so the kernel's side of each fault (short
//! reads, `EIO`, requests that never end) is the real one.
#![allow(dead_code, reason = "no test program asks for all of it")]

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

/// Nothing is cached by the kernel, so that each fault shows at once.
const TTL: Duration = Duration::ZERO;
const PIECE: usize = 64 << 10;

/// What happens to requests for data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// Reads fail with EIO.
    ReadError,
    /// Writes and syncs fail with EIO.
    WriteError,
    /// Writes fail with ENOSPC.
    Full,
    /// Everything fails with EIO, as of a device that was pulled out.
    Gone,
    /// No data is read, written or synced, and no file closed, until it is over.
    Hangs,
    /// Nothing is answered at all until it is over.
    Dead,
    /// Reads end before they should.
    Short,
}

/// A file: its pieces, by number.
#[derive(Default)]
struct Node {
    len: u64,
    pieces: BTreeMap<u64, Box<[u8]>>,
}

impl Node {
    fn read(&self, offset: u64, size: usize) -> Vec<u8> {
        let size = size.min(usize::try_from(self.len.saturating_sub(offset)).unwrap());
        let mut out = vec![0; size];
        self.each(offset, size, |piece, within, at, len| {
            if let Some(piece) = self.pieces.get(&piece) {
                out[at..at + len].copy_from_slice(&piece[within..within + len]);
            }
        });
        out
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut parts = Vec::new();
        self.each(offset, data.len(), |piece, within, at, len| parts.push((piece, within, at, len)));
        for (piece, within, at, len) in parts {
            let piece = self.pieces.entry(piece).or_insert_with(|| vec![0; PIECE].into());
            piece[within..within + len].copy_from_slice(&data[at..at + len]);
        }
        self.len = self.len.max(offset + data.len() as u64);
    }

    fn each(&self, offset: u64, len: usize, mut part: impl FnMut(u64, usize, usize, usize)) {
        let mut at = 0;
        while at < len {
            let place = offset + at as u64;
            let within = (place % PIECE as u64) as usize;
            let count = (PIECE - within).min(len - at);
            part(place / PIECE as u64, within, at, count);
            at += count;
        }
    }

    fn truncate(&mut self, len: u64) {
        if len < self.len {
            self.pieces.retain(|piece, _| piece * (PIECE as u64) < len);
            let (piece, within) = (len / PIECE as u64, (len % PIECE as u64) as usize);
            if let Some(piece) = self.pieces.get_mut(&piece) {
                piece[within..].fill(0);
            }
        }
        self.len = len;
    }
}

enum Held {
    Read(INodeNo, u64, u32, ReplyData),
    Write(INodeNo, u64, Vec<u8>, ReplyWrite),
    Sync(ReplyEmpty),
    /// Not for data.
    Other(Box<dyn FnOnce(&mut State) + Send>),
}

#[derive(Default)]
struct State {
    names: BTreeMap<OsString, u64>,
    nodes: BTreeMap<u64, Node>,
    last: u64,
    fault: Option<Fault>,
    held: Vec<Held>,
    /// Requests for data that have come in.
    requests: u64,
}

impl State {
    fn attr(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match u64::from(ino) {
            1 => (FileType::Directory, 0o755, 0),
            other => (FileType::RegularFile, 0o644, self.nodes.get(&other)?.len),
        };
        let then = SystemTime::UNIX_EPOCH;
        Some(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: then,
            mtime: then,
            ctime: then,
            crtime: then,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn answer(&mut self, request: Held) {
        match request {
            Held::Read(ino, offset, size, reply) => match self.nodes.get(&u64::from(ino)) {
                Some(node) => reply.data(&node.read(offset, size as usize)),
                None => reply.error(Errno::ENOENT),
            },
            Held::Write(ino, offset, data, reply) => match self.nodes.get_mut(&u64::from(ino)) {
                Some(node) => {
                    node.write(offset, &data);
                    reply.written(data.len() as u32);
                }
                None => reply.error(Errno::ENOENT),
            },
            Held::Sync(reply) => reply.ok(),
            Held::Other(answer) => answer(self),
        }
    }

    /// What is asked for beside data.
    fn ask(&mut self, answer: impl FnOnce(&mut State) + Send + 'static) {
        match self.fault {
            Some(Fault::Dead) => self.held.push(Held::Other(Box::new(answer))),
            _ => answer(self),
        }
    }

    fn request(&mut self, request: Held) {
        self.requests += 1;
        match (self.fault, request) {
            (Some(Fault::Hangs | Fault::Dead), request) => self.held.push(request),
            (Some(Fault::ReadError | Fault::Gone), Held::Read(.., reply)) => reply.error(Errno::EIO),
            (Some(Fault::WriteError | Fault::Gone), Held::Write(.., reply)) => reply.error(Errno::EIO),
            (Some(Fault::WriteError | Fault::Gone), Held::Sync(reply)) => reply.error(Errno::EIO),
            (Some(Fault::Full), Held::Write(.., reply)) => reply.error(Errno::ENOSPC),
            (Some(Fault::Short), Held::Read(ino, offset, size, reply)) => {
                let node = self.nodes.get(&u64::from(ino));
                reply.data(&node.map(|node| node.read(offset, size as usize / 2)).unwrap_or_default());
            }
            (_, request) => self.answer(request),
        }
    }
}

/// A mounted file system, for as long as this lives.
pub(crate) struct SickFs {
    shared: Arc<Mutex<State>>,
    folder: tempfile::TempDir,
    /// Taken first when this goes: what is held would hold the unmounting.
    session: Option<BackgroundSession>,
}

impl SickFs {
    pub(crate) fn mount() -> SickFs {
        let folder = tempfile::tempdir().unwrap();
        let shared = Arc::new(Mutex::new(State { last: 1, ..State::default() }));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("prestage-test".into())];
        let served = Served(Arc::clone(&shared));
        let session = fuser::spawn_mount(served, folder.path(), &config)
            .expect("a FUSE file system can be mounted: the tests run as root, with /dev/fuse");
        SickFs { shared, folder, session: Some(session) }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.lock().unwrap()
    }

    pub(crate) fn fall_ill(&self, fault: Fault) {
        self.state().fault = Some(fault);
    }

    /// Everything is well again, and what was held is done.
    pub(crate) fn recover(&self) {
        let mut state = self.state();
        state.fault = None;
        for request in std::mem::take(&mut state.held) {
            state.answer(request);
        }
    }

    /// Requests for data that have come in so far.
    pub(crate) fn requests(&self) -> u64 {
        self.state().requests
    }

    /// Requests that wait for an answer.
    pub(crate) fn held(&self) -> usize {
        self.state().held.len()
    }
}

impl Drop for SickFs {
    fn drop(&mut self) {
        self.recover();
        drop(self.session.take());
    }
}

struct Served(Arc<Mutex<State>>);

impl Served {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        self.state().ask(move |state| match state.names.get(&name).and_then(|ino| state.attr(INodeNo(*ino))) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.state().ask(move |state| match state.attr(ino) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        });
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state();
        if let (Some(size), Some(node)) = (size, state.nodes.get_mut(&u64::from(ino))) {
            node.truncate(size);
        }
        match state.attr(ino) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn create(&self, _: &Request, _: INodeNo, name: &OsStr, _mode: u32, _umask: u32, _flags: i32, reply: ReplyCreate) {
        let mut state = self.state();
        state.last += 1;
        let ino = state.last;
        state.names.insert(name.to_owned(), ino);
        state.nodes.insert(ino, Node::default());
        match state.attr(INodeNo(ino)) {
            Some(attr) => reply.created(&TTL, &attr, Generation(0), FileHandle(0), FopenFlags::empty()),
            None => reply.error(Errno::EIO),
        }
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        // Open files live on in `nodes`.
        match self.state().names.remove(name) {
            Some(_) => reply.ok(),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        newname: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state();
        match state.names.remove(name) {
            Some(ino) => {
                state.names.insert(newname.to_owned(), ino);
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        const FREE: u64 = 1 << 20;
        self.state().ask(move |_| reply.statfs(FREE, FREE, FREE, FREE, FREE, 4096, 255, 4096));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.state().ask(move |_| reply.opened(FileHandle(0), FopenFlags::empty()));
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.state().request(Held::Read(ino, offset, size, reply));
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.state().request(Held::Write(ino, offset, data.to_vec(), reply));
    }

    /// At every `close(2)`.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        let mut state = self.state();
        match state.fault {
            Some(Fault::Hangs | Fault::Dead) => state.held.push(Held::Other(Box::new(|_| reply.ok()))),
            _ => reply.ok(),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.state().request(Held::Sync(reply));
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
