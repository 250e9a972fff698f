//! A simulated device: it records writes and syncs, and makes of them what a crash may leave.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const PAGE: u64 = 4096;
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// A small generator (SplitMix64, Steele et al. 2014): the same seed, the same crashes.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}

/// What a device holds; what was never written is zero.
#[derive(Clone, Default)]
pub(super) struct Image {
    pages: HashMap<u64, Arc<[u8; PAGE as usize]>>,
    pub(super) len: u64,
}

impl Image {
    pub(super) fn of_len(len: u64) -> Image {
        Image { len, ..Image::default() }
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let (page, within) = ((offset + done as u64) / PAGE, ((offset + done as u64) % PAGE) as usize);
            let take = (PAGE as usize - within).min(bytes.len() - done);
            let to = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(to)[within..within + take].copy_from_slice(&bytes[done..done + take]);
            done += take;
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    pub(super) fn read(&self, offset: u64, to: &mut [u8]) -> usize {
        to.fill(0);
        let len = to.len().min(self.len.saturating_sub(offset) as usize);
        let mut done = 0;
        while done < len {
            let (page, within) = ((offset + done as u64) / PAGE, ((offset + done as u64) % PAGE) as usize);
            let take = (PAGE as usize - within).min(len - done);
            if let Some(from) = self.pages.get(&page) {
                to[done..done + take].copy_from_slice(&from[within..within + take]);
            }
            done += take;
        }
        len
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.pages.retain(|page, _| page * PAGE < len);
            if let Some(last) = self.pages.get_mut(&(len / PAGE)) {
                Arc::make_mut(last)[(len % PAGE) as usize..].fill(0);
            }
        }
        self.len = len;
    }

    pub(super) fn flip(&mut self, bit: u64) {
        if let Some(page) = self.pages.get_mut(&(bit / 8 / PAGE)) {
            Arc::make_mut(page)[(bit / 8 % PAGE) as usize] ^= 1 << (bit % 8);
        }
    }
}

/// What happened, in order; `Event`: what happened beside the device.
#[derive(Clone, Debug)]
pub(super) enum Op<Event> {
    Write(u64, Arc<[u8]>),
    SetLen(u64),
    Sync,
    Other(Event),
}

pub(super) struct Disk<Event> {
    state: Mutex<(Image, Vec<Op<Event>>)>,
    pub(super) failing: AtomicBool,
}

impl<Event: Clone> Disk<Event> {
    pub(super) fn new(image: Image) -> Arc<Disk<Event>> {
        Arc::new(Disk { state: Mutex::new((image, Vec::new())), failing: AtomicBool::new(false) })
    }
    pub(super) fn log(&self) -> Vec<Op<Event>> {
        self.state.lock().1.clone()
    }
    pub(super) fn note(&self, event: Event) {
        self.state.lock().1.push(Op::Other(event));
    }
}

/// What [`super::super::device::Device`] needs of a simulated disk.
pub(in super::super) trait Simulated: Send + Sync {
    fn len(&self) -> u64;
    fn set_len(&self, len: u64) -> io::Result<()>;
    fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<usize>;
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
}

impl<Event: Clone + Send> Simulated for Disk<Event> {
    fn len(&self) -> u64 {
        self.state.lock().0.len
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        state.0.set_len(len);
        state.1.push(Op::SetLen(len));
        Ok(())
    }
    fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<usize> {
        Ok(self.state.lock().0.read(offset, to))
    }
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.failing.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut state = self.state.lock();
        state.0.write(offset, bytes);
        state.1.push(Op::Write(offset, bytes.into()));
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        if self.failing.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.state.lock().1.push(Op::Sync);
        Ok(())
    }
}

/// How a run ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Crash {
    /// What was written is there; what was being written may be there in part.
    Killed,
    /// Of what was not synced anything may be there, in any order and torn anywhere between sectors.
    PowerLoss,
}

/// What the device holds after a crash at `point` of the log. The second value: whether a part of the write-intent bitmap
/// may be torn.
pub(super) fn after_crash<Event>(
    before: &Image,
    log: &[Op<Event>],
    point: usize,
    crash: Crash,
    random: &mut Random,
) -> (Image, bool) {
    let mut image = before.clone();
    let synced = match crash {
        Crash::Killed => point,
        Crash::PowerLoss => log[..point].iter().rposition(|op| matches!(op, Op::Sync)).map_or(0, |at| at + 1),
    };
    for op in &log[..synced] {
        apply(&mut image, op);
    }
    // The write that was about to be made may have begun.
    let mut open: Vec<&Op<Event>> = log[synced..(point + 1).min(log.len())].iter().collect();
    let keep = random.below(4);
    for i in (1..open.len()).rev() {
        open.swap(i, random.below(i as u64 + 1) as usize);
    }
    let mut torn = false;
    for op in open {
        match op {
            Op::Write(offset, bytes) => {
                let whole = random.one_in(3);
                let bitmap = *offset >= super::super::format::INTENT_OFFSET && *offset < 4 << 20;
                torn |= bitmap;
                for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                    if whole && keep != 0 || random.below(4) < keep {
                        image.write(offset + (i * SECTOR) as u64, sector);
                    }
                }
            }
            // A file system makes a new length durable at any time.
            Op::SetLen(_) if random.one_in(2) => apply(&mut image, op),
            _ => {}
        }
    }
    (image, torn)
}

fn apply<Event>(image: &mut Image, op: &Op<Event>) {
    match op {
        Op::Write(offset, bytes) => image.write(*offset, bytes),
        Op::SetLen(len) => image.set_len(*len),
        Op::Sync | Op::Other(_) => {}
    }
}
