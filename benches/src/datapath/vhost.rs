//! A guest's place at a vhost-user-blk socket, taken by libblkio. It waits for answers as a guest does, by an interrupt
//! (an eventfd), or looks at the ring all the time. Leaf module: libblkio works on raw memory.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use blkio::{Blkio, Blkioq, Completion, ReqFlags};

use super::load::{Device, Op};

/// A server that does not answer for so long is broken.
const LIMIT: Duration = Duration::from_secs(30);
/// Answers taken at a time.
const BATCH: usize = 64;

/// How to connect.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) queues: usize,
    /// Requests under way in each queue.
    pub(super) depth: usize,
    /// Largest request.
    pub(super) len_bytes: usize,
    pub(super) read_only: bool,
}

/// One queue with its buffers.
pub(super) struct Vhost {
    queue: Blkioq,
    /// First byte of `depth` buffers of `len_bytes`.
    buffers: usize,
    depth: usize,
    len_bytes: usize,
    under_way: usize,
    /// Keeps the buffers mapped; shared by the queues of a connection.
    _device: std::rc::Rc<Blkio>,
}

/// libblkio's errors have no `std::error::Error`.
fn said(error: &blkio::Error) -> anyhow::Error {
    anyhow!("{} ({:?})", error.message(), error.errno())
}

/// Connects with several queues.
pub(super) fn connect(socket: &Path, shape: Shape) -> Result<Vec<Vhost>> {
    let Shape { queues, depth, len_bytes, read_only } = shape;
    let path = socket.to_str().context("the socket's path is not UTF-8")?;
    let start = || -> blkio::Result<_> {
        let mut device = Blkio::new("virtio-blk-vhost-user")?;
        device.set_str("path", path)?;
        device.set_bool("read-only", read_only)?;
        device.connect()?;
        device.set_i32("num-queues", i32::try_from(queues).unwrap_or(i32::MAX))?;
        let started = device.start()?.queues;
        let align = usize::try_from(device.get_u64("mem-region-alignment")?).unwrap_or(4096).max(4096);
        let memory = device.alloc_mem_region((queues * depth * len_bytes).next_multiple_of(align))?;
        device.map_mem_region(&memory)?;
        Ok((device, started, memory.addr))
    };
    let (device, started, base) =
        start().map_err(|error| said(&error)).with_context(|| format!("cannot connect to {path}"))?;
    ensure!(started.len() == queues, "{} queues instead of {queues}", started.len());
    let device = std::rc::Rc::new(device);
    let queue = |(index, queue)| Vhost {
        queue,
        buffers: base + index * depth * len_bytes,
        depth,
        len_bytes,
        under_way: 0,
        _device: std::rc::Rc::clone(&device),
    };
    Ok(started.into_iter().enumerate().map(queue).collect())
}

impl Vhost {
    fn place(&self, slot: usize, len: usize) -> *mut u8 {
        assert!(slot < self.depth && len <= self.len_bytes, "no such buffer");
        (self.buffers + slot * self.len_bytes) as *mut u8
    }

    /// Sends what was begun and takes what has been answered, without waiting.
    pub(super) fn look(&mut self, done: &mut Vec<usize>) -> Result<()> {
        self.take(0, done)
    }

    fn take(&mut self, at_least: usize, done: &mut Vec<usize>) -> Result<()> {
        let mut answers: [MaybeUninit<Completion>; BATCH] = [const { MaybeUninit::uninit() }; BATCH];
        let mut limit = LIMIT;
        let count = self.queue.do_io(&mut answers, at_least, Some(&mut limit), None).map_err(|error| said(&error))?;
        for answer in &answers[..count] {
            // SAFETY: do_io has filled in the first `count`.
            let answer = unsafe { answer.assume_init_ref() };
            ensure!(answer.ret == 0, "request failed: errno {}", -answer.ret);
            self.under_way -= 1;
            done.push(answer.user_data);
        }
        Ok(())
    }
}

impl Device for Vhost {
    fn submit(&mut self, slot: usize, op: Op, offset: u64, len: usize) -> Result<()> {
        let place = self.place(slot, len);
        match op {
            Op::Read => self.queue.read(offset, place, len, slot, ReqFlags::empty()),
            Op::Write => self.queue.write(offset, place, len, slot, ReqFlags::empty()),
        }
        self.under_way += 1;
        Ok(())
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Result<()> {
        self.take(1, done)
    }

    fn buffer(&mut self, slot: usize, len: usize) -> &mut [u8] {
        let place = self.place(slot, len);
        // SAFETY: `len` bytes of this slot's buffer (checked in `place`) in a region that `_device` keeps mapped. Callers
        // look at a slot with nothing under way, so the server leaves it alone; one that does not brings wrong content,
        // which is what is looked for.
        unsafe { std::slice::from_raw_parts_mut(place, len) }
    }
}
