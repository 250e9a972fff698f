//! Shared by the tests of stores: shards, a naive model of a disk, and random work on both.
#![allow(clippy::unwrap_used, reason = "a failed assumption of a test is a failed test")]
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod wire;

use prestage_cache::backend::{Backend, StoreError, StoreOptions, StoreSpec};
use prestage_cache::engine::{AlignedBuf, EngineMode, IoBuf, Shard, ShardConfig, ShardHandle};
use std::rc::Rc;

pub(crate) const MODES: [EngineMode; 2] = [EngineMode::IoUring, EngineMode::ThreadPool];

pub(crate) fn start(mode: EngineMode) -> ShardHandle {
    ShardHandle::start(ShardConfig { name: format!("{mode:?}"), entries: 64, mode, cpu: None }).unwrap()
}

/// Runs a task on a fresh shard.
pub(crate) fn on<T, F, Fut>(mode: EngineMode, f: F) -> T
where
    T: Send + 'static,
    F: FnOnce(Shard) -> Fut + Send + 'static,
    Fut: Future<Output = T> + 'static,
{
    start(mode).call(f).wait().expect("the task on the shard must not panic")
}

pub(crate) async fn open(shard: &Shard, spec: &str, options: &StoreOptions) -> Result<Rc<dyn Backend>, StoreError> {
    let spec: StoreSpec = spec.parse().unwrap();
    prestage_cache::backend::open(shard, &spec, None, options).await
}

pub(crate) async fn read(store: &Rc<dyn Backend>, offset: u64, len: usize) -> Result<Vec<u8>, StoreError> {
    let (result, bufs) = store.read(offset, vec![IoBuf::heap(len)]).await;
    assert_eq!(bufs.iter().map(IoBuf::len).sum::<usize>(), len, "the buffers must come back");
    result.map(|()| bufs[0].as_slice().to_vec())
}

pub(crate) async fn write(store: &Rc<dyn Backend>, offset: u64, data: &[u8], fua: bool) -> Result<(), StoreError> {
    let (result, bufs) = store.write(offset, vec![AlignedBuf::copy_of(data).into()], fua).await;
    assert_eq!(bufs.len(), 1, "the buffers must come back");
    assert_eq!(bufs[0].as_slice(), data, "a write must not change its buffers");
    result
}

/// Small, fast and repeatable (xorshift64*).
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
    /// A run of at most `max` bytes within `size` bytes: mostly of sectors, sometimes from any byte to any byte.
    pub(crate) fn range(&mut self, size: u64, max: u64) -> (u64, u64) {
        if self.below(4) == 0 {
            let first = self.below(size);
            return (first, 1 + self.below((size - first).min(max)));
        }
        let sectors = size / 512;
        let first = self.below(sectors);
        let count = 1 + self.below((sectors - first).min(max / 512));
        (first * 512, count * 512)
    }
}

/// Cuts data into buffers of every kind, aligned or not.
pub(crate) fn cut(random: &mut Random, data: &[u8]) -> Vec<IoBuf> {
    let mut rest = data;
    let mut bufs = Vec::new();
    while !rest.is_empty() {
        let take = match random.below(3) {
            0 => rest.len(),
            1 => (4096 * (1 + random.below(4)) as usize).min(rest.len()),
            _ => (512 * (1 + random.below(9)) as usize).min(rest.len()),
        };
        let (head, tail) = rest.split_at(take);
        bufs.push(match random.below(4) {
            0 => IoBuf::Bytes(head.to_vec()),
            _ => AlignedBuf::copy_of(head).into(),
        });
        rest = tail;
    }
    bufs
}

/// Random requests, one after the other, on a store that holds zeroes; compares with a vector.
/// `discard_zeroes`: whether discarded ranges are known to read as zeroes.
pub(crate) async fn compare_with_model(store: &Rc<dyn Backend>, seed: u64, steps: usize, discard_zeroes: bool) {
    let info = store.info();
    let size = info.size_bytes;
    let unit = u64::from(info.min_io_bytes);
    let mut model = vec![0u8; size as usize];
    let mut random = Random(seed | 1);
    for step in 0..steps {
        let (offset, len) = random.range(size, 200 << 10);
        let range = offset as usize..(offset + len) as usize;
        match random.below(10) {
            0..4 => {
                let data = random.bytes(len as usize);
                let bufs = cut(&mut random, &data);
                store.write(offset, bufs, random.below(4) == 0).await.0.unwrap();
                model[range].copy_from_slice(&data);
            }
            4..8 => {
                let blank = vec![0xee; len as usize];
                let bufs = cut(&mut random, &blank);
                let (result, bufs) = store.read(offset, bufs).await;
                result.unwrap();
                let got: Vec<u8> = bufs.iter().flat_map(|b| b.as_slice().to_vec()).collect();
                assert!(got == model[range], "seed {seed}, step {step}: read {len} at {offset} differs");
            }
            8 => {
                store.write_zeroes(offset, len, random.below(2) == 0).await.unwrap();
                model[range].fill(0);
            }
            _ => {
                store.discard(offset, len).await.unwrap();
                let (start, end) = (offset.next_multiple_of(unit), (offset + len) / unit * unit);
                if start < end && discard_zeroes && info.can_discard {
                    model[start as usize..end as usize].fill(0);
                } else if start < end {
                    // Anything may be there now: give it content.
                    let len = (end - start) as usize;
                    write(store, start, &vec![7; len], false).await.unwrap();
                    model[start as usize..end as usize].fill(7);
                }
                store.flush().await.unwrap();
            }
        }
    }
    let whole = read(store, 0, size as usize).await.unwrap();
    assert!(whole == model, "seed {seed}: the store's content differs at the end");
}

/// Requests that overlap in time, each task in its own stripe of sectors so that the result is known.
pub(crate) async fn hammer(shard: &Shard, store: &Rc<dyn Backend>, seed: u64, tasks: u64, steps: usize) {
    let size = store.info().size_bytes;
    let stripe = size / tasks / 512 * 512;
    let running: Vec<_> = (0..tasks)
        .map(|task| {
            let store = Rc::clone(store);
            shard.spawn(async move {
                let base = task * stripe;
                let mut model = read(&store, base, stripe as usize).await.unwrap();
                let mut random = Random(seed ^ (task + 1) << 20 | 1);
                for step in 0..steps {
                    let (offset, len) = random.range(stripe, 64 << 10);
                    let range = offset as usize..(offset + len) as usize;
                    if random.below(2) == 0 {
                        let data = random.bytes(len as usize);
                        let bufs = cut(&mut random, &data);
                        store.write(base + offset, bufs, false).await.0.unwrap();
                        model[range].copy_from_slice(&data);
                    } else {
                        let got = read(&store, base + offset, len as usize).await.unwrap();
                        assert!(got == model[range], "task {task}, step {step}: read {len} at {offset} differs");
                    }
                    if random.below(20) == 0 {
                        store.flush().await.unwrap();
                    }
                }
                let got = read(&store, base, stripe as usize).await.unwrap();
                assert!(got == model, "task {task}: the stripe differs at the end");
            })
        })
        .collect();
    for task in running {
        task.await.unwrap();
    }
}
