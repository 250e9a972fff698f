//! The closed loop that all clients run: so many requests under way, each answer checked and replaced by the next request.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::content;

/// A connection to a disk, with buffers for so many requests at a time.
pub(super) trait Device {
    /// Begins a request with the buffer of `slot`. It may go out as late as the next `wait`.
    fn submit(&mut self, slot: usize, op: Op, offset: u64, len: usize) -> Result<()>;

    /// Sends what was begun, waits for at least one answer and appends the slots that have theirs.
    fn wait(&mut self, done: &mut Vec<usize>) -> Result<()>;

    /// The buffer of a slot with nothing under way.
    fn buffer(&mut self, slot: usize, len: usize) -> &mut [u8];
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Random,
    Sequential,
}

/// What a client asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    pub(super) op: Op,
    pub(super) order: Order,
    pub(super) block_bytes: usize,
    pub(super) depth: usize,
    /// Where the part of the disk begins that is read or written, a multiple of the block.
    pub(super) start_bytes: u64,
    /// Length of that part.
    pub(super) span_bytes: u64,
    /// Whether answers are looked at. Not with a server that has no data.
    pub(super) check: bool,
}

/// What a client saw.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    pub(super) requests: u64,
    pub(super) elapsed: Duration,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
}

impl Seen {
    #[allow(clippy::cast_precision_loss)] // far below 2^52 requests
    pub(super) fn iops(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }
}

/// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled").
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `n`, which is far below 2^48.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % n.max(1)
    }
}

/// Of the answers to reads, one in so many is compared as a whole.
const COMPARE_EVERY: u64 = 64;
/// Places of writes kept, to be read again.
const KEPT_WRITES: usize = 256;

/// Runs a job for `time`, with `turn` for the seed and for the generation of what is written. Writes are read again
/// afterwards.
///
/// # Errors
/// A request failed, or an answer was wrong.
pub(super) fn run(device: &mut dyn Device, job: &Job, time: Duration, turn: u64) -> Result<Seen> {
    let Job { op, order, block_bytes, depth, start_bytes, span_bytes, check } = *job;
    let blocks = span_bytes / block_bytes as u64;
    ensure!(blocks > 0 && depth > 0, "a job of {depth} requests at a time on {blocks} blocks");
    let generation = if op == Op::Write { turn + 1 } else { 0 };
    let mut random = Random::new(turn + 1);
    let mut next = random.below(blocks);
    let mut place = || {
        next = match order {
            Order::Random => random.below(blocks),
            Order::Sequential => (next + 1) % blocks,
        };
        start_bytes + next * block_bytes as u64
    };
    let mut begun: Vec<(u64, Instant)> = Vec::with_capacity(depth);
    let mut latencies_ns: Vec<u32> = Vec::with_capacity(1 << 20);
    let mut written: Vec<u64> = Vec::new();
    let mut done = Vec::with_capacity(depth);
    if op == Op::Write {
        (0..depth).for_each(|slot| content::fill(device.buffer(slot, block_bytes), 0, generation));
    }
    let start = Instant::now();
    for slot in 0..depth {
        let offset = place();
        if op == Op::Write {
            content::fill(device.buffer(slot, block_bytes), offset, generation);
        }
        begun.push((offset, Instant::now()));
        device.submit(slot, op, offset, block_bytes)?;
    }
    let (mut under_way, mut requests) = (depth, 0u64);
    let mut elapsed = Duration::ZERO;
    while under_way > 0 {
        done.clear();
        device.wait(&mut done)?;
        for slot in done.iter().copied() {
            let (offset, at) = begun[slot];
            let now = Instant::now();
            latencies_ns.push(u32::try_from((now - at).as_nanos()).unwrap_or(u32::MAX));
            requests += 1;
            elapsed = now - start;
            match op {
                Op::Read if check => {
                    let data = &*device.buffer(slot, block_bytes);
                    let right = match requests % COMPARE_EVERY {
                        0 => content::is_right(data, offset, generation),
                        _ => content::looks_right(data, offset, generation, requests),
                    };
                    ensure!(right, "a read of {block_bytes} bytes at {offset} brought what does not belong there");
                }
                Op::Read => {}
                Op::Write if written.len() < KEPT_WRITES => written.push(offset),
                Op::Write => written[requests as usize % KEPT_WRITES] = offset,
            }
            if elapsed >= time {
                under_way -= 1;
                continue;
            }
            let offset = place();
            if op == Op::Write {
                content::fill(device.buffer(slot, block_bytes), offset, generation);
            }
            begun[slot] = (offset, Instant::now());
            device.submit(slot, op, offset, block_bytes)?;
        }
    }
    for offset in written {
        device.submit(0, Op::Read, offset, block_bytes)?;
        done.clear();
        device.wait(&mut done)?;
        let right = content::is_right(device.buffer(0, block_bytes), offset, generation);
        ensure!(right, "{block_bytes} bytes at {offset} were written, and something else was read");
    }
    latencies_ns.sort_unstable();
    let at = |share: f64| {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // an index
        let index = (latencies_ns.len() as f64 * share) as usize;
        latencies_ns.get(index.min(latencies_ns.len().saturating_sub(1))).map_or(0.0, |ns| f64::from(*ns) / 1e3)
    };
    Ok(Seen { requests, elapsed, p50_us: at(0.5), p99_us: at(0.99) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers at once, from a disk that may be wrong.
    struct Memory {
        disk: Vec<u8>,
        buffers: Vec<Vec<u8>>,
        done: Vec<usize>,
        lies_after: u64,
        answered: u64,
    }

    impl Memory {
        fn new(lies_after: u64) -> Self {
            // more blocks than slots: what a slot's buffer still holds is never right again
            let mut disk = vec![0; 2 << 20];
            content::fill(&mut disk, 0, 0);
            Self { disk, buffers: vec![vec![0; 1 << 17]; 8], done: Vec::new(), lies_after, answered: 0 }
        }
    }

    impl Device for Memory {
        fn submit(&mut self, slot: usize, op: Op, offset: u64, len: usize) -> Result<()> {
            self.answered += 1;
            let place = offset as usize..offset as usize + len;
            match op {
                _ if self.answered > self.lies_after => {}
                Op::Read => self.buffers[slot][..len].copy_from_slice(&self.disk[place]),
                Op::Write => self.disk[place].copy_from_slice(&self.buffers[slot][..len]),
            }
            self.done.push(slot);
            Ok(())
        }

        fn wait(&mut self, done: &mut Vec<usize>) -> Result<()> {
            done.append(&mut self.done);
            Ok(())
        }

        fn buffer(&mut self, slot: usize, len: usize) -> &mut [u8] {
            &mut self.buffers[slot][..len]
        }
    }

    fn job(op: Op, order: Order, block_bytes: usize) -> Job {
        Job { op, order, block_bytes, depth: 8, start_bytes: 0, span_bytes: 2 << 20, check: true }
    }

    #[test]
    fn a_server_that_answers_without_the_data_is_found_out() {
        for (op, order) in [(Op::Read, Order::Random), (Op::Read, Order::Sequential), (Op::Write, Order::Random)] {
            for block_bytes in [4096, 1 << 17] {
                let job = job(op, order, block_bytes);
                let seen = run(&mut Memory::new(u64::MAX), &job, Duration::from_millis(20), 1).unwrap();
                assert!(seen.requests >= 8 && seen.iops() > 0.0 && seen.p50_us <= seen.p99_us, "{seen:?}");
                // Few, so that a busy host gets there.
                run(&mut Memory::new(8), &job, Duration::from_millis(200), 1).unwrap_err();
            }
        }
    }
}
