//! What a cut leaves of an image: everything that is written to the file is recorded, cut off at a random point, and what
//! `qemu-img` says of the rest is the judgement.
//!
//! - a power cut keeps what a barrier covers, and of what came later any part, sector by sector
//! - a killed daemon keeps all that was written, and must have written all that it has answered

use super::Qcow2Backend;
use crate::backend::{Backend, StoreOptions};
use crate::engine::{AlignedBuf, IoBuf, Shard, ShardConfig, ShardHandle};
use futures_util::future::join_all;
use std::cell::RefCell;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Something that happened to the file.
#[derive(Clone, Debug)]
enum Event {
    Written { begun: usize, offset: u64, data: Vec<u8> },
    Synced { covers: usize },
}

thread_local! {
    static LOG: RefCell<Option<Vec<Event>>> = const { RefCell::new(None) };
}

pub(super) fn begin() -> usize {
    LOG.with_borrow(|log| log.as_ref().map_or(0, Vec::len))
}

pub(super) fn written(begun: usize, offset: u64, bufs: &[IoBuf]) {
    let data = || bufs.iter().flat_map(|buf| buf.as_slice().to_vec()).collect();
    LOG.with_borrow_mut(|log| {
        if let Some(log) = log {
            log.push(Event::Written { begun, offset, data: data() });
        }
    });
}

pub(super) fn synced(covers: usize) {
    LOG.with_borrow_mut(|log| {
        if let Some(log) = log {
            log.push(Event::Synced { covers });
        }
    });
}

const SECTOR: usize = 512;
const SIZE: u64 = 8 << 20;

/// xorshift64*, Vigna 2016: tests must repeat.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

/// A request and when it was under way, in events.
#[derive(Clone, Debug)]
struct Done {
    begun: usize,
    answered: usize,
    offset: u64,
    /// What the range holds then; `None`: a discard, after which anything old or zero may be there.
    data: Option<Vec<u8>>,
    /// Promised to be durable when it was answered.
    fua: bool,
}

/// What a run leaves behind.
#[derive(Debug, Default)]
struct Run {
    events: Vec<Event>,
    requests: Vec<Done>,
    /// Flushes: begun and answered.
    flushes: Vec<(usize, usize)>,
}

async fn request(backend: &Qcow2Backend, kind: u64, offset: u64, len: u64, fill: u8) -> Done {
    let (begun, fua) = (begin(), kind == 3);
    let data = match kind {
        0 => {
            backend.discard(offset, len).await.unwrap();
            None
        }
        1 | 2 => {
            backend.write_zeroes(offset, len, kind == 1).await.unwrap();
            Some(vec![0; len as usize])
        }
        _ => {
            let mut data = AlignedBuf::new(len as usize);
            data.fill(fill);
            let (result, bufs) = backend.write(offset, vec![data.into()], fua).await;
            result.unwrap();
            Some(bufs[0].as_slice().to_vec())
        }
    };
    Done { begun, answered: begin(), offset, data, fua }
}

async fn guest(shard: Shard, path: PathBuf, seed: u64, below: Option<super::Below>) -> Run {
    let backend = Qcow2Backend::open(&shard, &path, below, &StoreOptions::default()).await.unwrap();
    LOG.with_borrow_mut(|log| *log = Some(Vec::new()));
    let (mut random, mut run) = (Random(seed * 2 + 1), Run::default());
    for step in 0..60u64 {
        // Requests side by side do not overlap, so that what must be there afterwards is known: each has its own stripe.
        let many = 1 + random.below(4);
        let stripe = SIZE / many / SECTOR as u64 * SECTOR as u64;
        let requests: Vec<_> = (0..many)
            .map(|lane| {
                let max = stripe.min(200 << 10);
                let len = (1 + random.below(max / SECTOR as u64)) * SECTOR as u64;
                let offset = lane * stripe + random.below((stripe - len) / SECTOR as u64 + 1) * SECTOR as u64;
                (random.below(10), offset, len)
            })
            .collect();
        let fill = (1 + step * 4) as u8;
        let running = requests
            .into_iter()
            .zip(0..)
            .map(|((kind, offset, len), lane)| request(&backend, kind, offset, len, fill.wrapping_add(lane)));
        run.requests.extend(join_all(running).await);
        if random.below(4) == 0 {
            let begun = begin();
            backend.flush().await.unwrap();
            run.flushes.push((begun, begin()));
        }
    }
    run.events = LOG.with_borrow_mut(Option::take).unwrap_or_default();
    backend.close().await;
    run
}

/// The file as it may be when the machine, or only the daemon, dies after `cut` events.
fn leave(path: &Path, events: &[Event], cut: usize, power: bool, random: &mut Random) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let synced = |event: &Event| if let Event::Synced { covers } = event { Some(*covers) } else { None };
    let durable = events[..cut].iter().filter_map(synced).max().unwrap_or(0);
    for (at, event) in events.iter().enumerate() {
        let Event::Written { begun, offset, data } = event else { continue };
        if at < durable || (at < cut && !power) {
            file.write_all_at(data, *offset).unwrap();
        } else if *begun < cut && (power || at >= cut) {
            // All, nothing, or some sectors.
            let way = random.below(3);
            for (i, sector) in data.chunks(SECTOR).enumerate() {
                if way == 1 || (way == 2 && random.below(2) == 0) {
                    file.write_all_at(sector, offset + (i * SECTOR) as u64).unwrap();
                }
            }
        }
    }
}

/// Sectors that are known, and what they hold: by requests that were answered by `upto`, or by `cut` where FUA was asked for,
/// unless others touched them later.
fn expected(run: &Run, base: &[u8], cut: usize, upto: usize) -> Vec<Option<[u8; SECTOR]>> {
    let mut sectors: Vec<Option<[u8; SECTOR]>> =
        base.chunks(SECTOR).map(|sector| Some(sector.try_into().unwrap())).collect();
    for done in run.requests.iter().filter(|done| done.begun < cut) {
        let first = done.offset as usize / SECTOR;
        match &done.data {
            Some(data) if done.answered <= if done.fua { cut } else { upto } => {
                for (i, sector) in data.chunks(SECTOR).enumerate() {
                    sectors[first + i] = Some(sector.try_into().unwrap());
                }
            }
            Some(data) => sectors[first..first + data.len() / SECTOR].fill(None),
            None => {}
        }
    }
    // What a discard has touched may be anything from then on, until it is written again; left out altogether.
    for done in run.requests.iter().filter(|done| done.data.is_none()) {
        let first = done.offset as usize / SECTOR;
        sectors[first..(first + 400).min(SIZE as usize / SECTOR)].fill(None);
    }
    sectors
}

fn qemu_img(args: &[&str]) -> (bool, String) {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.success(), text)
}

fn judge(image: &Path, expected: &[Option<[u8; SECTOR]>], what: &str) {
    let name = image.to_str().unwrap();
    let (_, found) = qemu_img(&["check", "-f", "qcow2", "-r", "leaks", name]);
    let (clean, after) = qemu_img(&["check", "-f", "qcow2", name]);
    assert!(clean, "{what}: more than leaks\n{found}\n{after}");
    let raw = image.with_extension("raw");
    let (converted, text) = qemu_img(&["convert", "-O", "raw", name, raw.to_str().unwrap()]);
    assert!(converted, "{what}: {text}");
    let found = std::fs::read(&raw).unwrap();
    let wrong = expected.iter().zip(found.chunks(SECTOR)).position(|(want, got)| want.is_some_and(|want| want != *got));
    assert_eq!(wrong, None, "{what}: a sector does not hold what was promised");
}

fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        println!("SKIPPED: no qemu-img here");
    }
    found
}

/// Cuts a run at many points, with power and without.
fn cut_runs(create: &[&str], with_base: bool, seeds: std::ops::Range<u64>) {
    if !has_qemu_img() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let base_path = path("base.img");
    let base: Vec<u8> = match with_base {
        true => (0..SIZE).map(|at| (at / 3000) as u8 | 0x80).collect(),
        false => vec![0; SIZE as usize],
    };
    std::fs::write(&base_path, &base).unwrap();
    let fresh = path("fresh.qcow2");
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(create);
    let base_name = base_path.to_str().unwrap();
    if with_base {
        args.extend(["-b", base_name, "-F", "raw"]);
    }
    args.extend([fresh.to_str().unwrap(), "8M"]);
    let (made, text) = qemu_img(&args);
    assert!(made, "{text}");
    let shard = ShardHandle::start(ShardConfig::default()).unwrap();
    for seed in seeds {
        let image = path("image.qcow2");
        std::fs::copy(&fresh, &image).unwrap();
        let (at, content, name) = (image.clone(), base.clone(), base_path.clone());
        let run = shard.call(move |shard| async move {
            let below = super::Below {
                name: "base".to_owned(),
                path: Some(name),
                size_bytes: SIZE,
                read: Box::new(move |offset, len| {
                    let part = AlignedBuf::copy_of(&content[offset as usize..offset as usize + len]);
                    Box::pin(async move { Ok(part) })
                }),
                extents: Box::new(|_, len, _| Box::pin(async move { Ok(vec![super::Extent::data(len)]) })),
            };
            guest(shard, at, seed, with_base.then_some(below)).await
        });
        let run = run.wait().unwrap();
        let mut random = Random(seed + 77);
        for cutting in 0..12u64 {
            let cut = 1 + random.below(run.events.len() as u64) as usize;
            for power in [true, false] {
                std::fs::copy(&fresh, &image).unwrap();
                leave(&image, &run.events, cut, power, &mut random);
                // After a power cut what was flushed is there, after a kill whatever was answered.
                let upto = match power {
                    true => run.flushes.iter().filter(|(_, answered)| *answered <= cut).map(|(begun, _)| *begun).max(),
                    false => Some(cut),
                };
                let what = format!("{create:?} seed {seed}, cut {cutting} after {cut} events, power {power}");
                judge(&image, &expected(&run, &base, cut, upto.unwrap_or(0)), &what);
            }
        }
    }
}

#[test]
fn a_cut_leaves_leaks_at_worst() {
    cut_runs(&["-o", "cluster_size=4096"], false, 0..2);
    cut_runs(&["-o", "cluster_size=65536"], false, 2..4);
}

#[test]
fn a_cut_leaves_leaks_at_worst_on_a_base() {
    cut_runs(&["-o", "cluster_size=65536"], true, 4..6);
    cut_runs(&["-o", "cluster_size=512"], true, 6..7);
    cut_runs(&["-o", "cluster_size=65536,compat=0.10"], true, 7..8);
}

/// What an allocation costs: tables and barriers are shared by all that wait.
#[test]
fn allocations_side_by_side_share_their_barriers() {
    if !has_qemu_img() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image.qcow2");
    let (made, text) = qemu_img(&["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "64M"]);
    assert!(made, "{text}");
    let shard = ShardHandle::start(ShardConfig::default()).unwrap();
    let costs = shard.call(move |shard| async move {
        let backend = Qcow2Backend::open(&shard, &image, None, &StoreOptions::default()).await.unwrap();
        let container = std::rc::Rc::clone(&backend.inner.container);
        let costs = || (container.barriers.get(), container.table_writes.get());
        // The first makes the tables.
        request(&backend, 9, 0, 65536, 1).await;
        let first = costs();
        join_all((1..65).map(|i| request(&backend, 9, i * 65536, 65536, 2))).await;
        let many = costs();
        // In place nothing is written but data.
        join_all((0..65).map(|i| request(&backend, 9, i * 65536 + 4096, 8192, 3))).await;
        let in_place = costs();
        backend.close().await;
        [first, many, in_place]
    });
    let [first, many, in_place] = costs.wait().unwrap();
    println!("barriers and table writes after the first, 64 more, and 65 in place: {first:?} {many:?} {in_place:?}");
    assert!(many.0 - first.0 <= 16 && many.1 - first.1 <= 32, "64 allocations: {first:?} {many:?}");
    assert_eq!(in_place, many);
}
