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
    let (code, text) = qemu_img_code(args);
    (code == Some(0), text)
}

fn qemu_img_code(args: &[&str]) -> (Option<i32>, String) {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code(), text)
}

fn judge(image: &Path, expected: &[Option<[u8; SECTOR]>], what: &str) {
    const LEAKS_ALONE: i32 = 3;
    let name = image.to_str().unwrap();
    let (code, found) = qemu_img_code(&["check", "-f", "qcow2", name]);
    assert!(matches!(code, Some(0 | LEAKS_ALONE)), "{what}: more than leaks\n{found}");
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

/// Leaves what cuts after these events would, with power and without, and judges it.
fn cut_at(fresh: &Path, run: &Run, base: &[u8], cuts: &[usize], seed: u64, what: &str) {
    let image = fresh.with_file_name("cut.qcow2");
    let mut random = Random(seed + 77);
    for &cut in cuts {
        for power in [true, false] {
            std::fs::copy(fresh, &image).unwrap();
            leave(&image, &run.events, cut, power, &mut random);
            // After a power cut what was flushed is there, after a kill whatever was answered.
            let upto = match power {
                true => run.flushes.iter().filter(|(_, answered)| *answered <= cut).map(|(begun, _)| *begun).max(),
                false => Some(cut),
            };
            let what = format!("{what}, cut after {cut} of {} events, power {power}", run.events.len());
            judge(&image, &expected(run, base, cut, upto.unwrap_or(0)), &what);
        }
    }
}

/// Cuts runs at random points.
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
        let mut random = Random(seed + 78);
        let cuts: Vec<_> = (0..12).map(|_| 1 + random.below(run.events.len() as u64) as usize).collect();
        cut_at(&fresh, &run, &base, &cuts, seed, &format!("{create:?} seed {seed}"));
    }
}

/// A request: its kind, where, and how long.
type Step = (u64, u64, u64);
const DISCARD: u64 = 0;
const KEEP_SPACE: u64 = 2;
const WRITE: u64 = 9;

/// Does the steps of `first` one after the other, flushes, does those of `then` side by side, and cuts after every event since.
fn cut_after_every_event(fresh: &Path, base: &[u8], first: Vec<Step>, then: Vec<Step>, what: &str) {
    let image = fresh.with_file_name("image.qcow2");
    std::fs::copy(fresh, &image).unwrap();
    let shard = ShardHandle::start(ShardConfig::default()).unwrap();
    let run = shard.call(move |shard| async move {
        let backend = Qcow2Backend::open(&shard, &image, None, &StoreOptions::default()).await.unwrap();
        LOG.with_borrow_mut(|log| *log = Some(Vec::new()));
        let mut run = Run::default();
        for (kind, offset, len) in first {
            run.requests.push(request(&backend, kind, offset, len, 7).await);
        }
        let begun = begin();
        backend.flush().await.unwrap();
        run.flushes.push((begun, begin()));
        let since = begin();
        let steps = then.into_iter().zip(11..);
        let running = steps.map(|((kind, offset, len), fill)| request(&backend, kind, offset, len, fill));
        run.requests.extend(join_all(running).await);
        run.events = LOG.with_borrow_mut(Option::take).unwrap_or_default();
        backend.close().await;
        (run, since)
    });
    let (run, since) = run.wait().unwrap();
    let cuts: Vec<_> = (since..=run.events.len()).collect();
    assert!(cuts.len() > 4, "{what}: {} cuts", cuts.len());
    cut_at(fresh, &run, base, &cuts, 1, what);
}

/// imago takes a cluster that was given up for a table of its own as soon as it is free in memory.
#[test]
fn a_table_takes_a_cluster_only_when_nothing_points_there_any_more() {
    if !has_qemu_img() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let name = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (raw, empty, packed) = (name("full.raw"), name("empty.qcow2"), name("packed.qcow2"));
    let full: Vec<u8> = (0..SIZE).map(|at| if at < 64 << 10 { (at / 3000) as u8 | 0x80 } else { 0 }).collect();
    std::fs::write(&raw, &full).unwrap();
    let small = "cluster_size=512";
    for args in [
        vec!["create", "-q", "-f", "qcow2", "-o", small, &empty, "8M"],
        vec!["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", small, &raw, &packed],
    ] {
        let (made, text) = qemu_img(&args);
        assert!(made, "{text}");
    }
    let nothing = vec![0; SIZE as usize];
    let written = vec![(WRITE, 0, 32 << 10)];
    // With clusters of 512 bytes a table covers 32 KiB: each of the others needs its own.
    let others = || (1..5).map(|i| (WRITE, i << 20, 512));
    let with = |step: Step| std::iter::once(step).chain(others()).collect::<Vec<_>>();
    cut_after_every_event(Path::new(&empty), &nothing, written, with((DISCARD, 0, 32 << 10)), "given up by a discard");
    let unpacked = with((WRITE, 0, 60 << 10));
    cut_after_every_event(Path::new(&packed), &full, Vec::new(), unpacked, "compressed before");
    let zeroed = with((KEEP_SPACE, 0, 60 << 10));
    cut_after_every_event(Path::new(&packed), &full, Vec::new(), zeroed, "compressed, and zeroed");
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

/// A cluster that was zeroed may keep its space. imago would give up that of many in one go, untold, where it does not lie side
/// by side, and what was given up untold is taken again too early.
#[test]
fn space_that_zeroes_have_kept_is_used_again() {
    if !has_qemu_img() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image.qcow2");
    let (made, text) =
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", image.to_str().unwrap(), "8M"]);
    assert!(made, "{text}");
    let (shard, path) = (ShardHandle::start(ShardConfig::default()).unwrap(), image.clone());
    let grown = shard.call(move |shard| async move {
        let backend = Qcow2Backend::open(&shard, &path, None, &StoreOptions::default()).await.unwrap();
        // Backwards, so that their space does not lie side by side.
        for i in (0..16).rev() {
            request(&backend, WRITE, i * 4096, 4096, 1).await;
        }
        request(&backend, KEEP_SPACE, 0, 16 * 4096, 0).await;
        let len = || std::fs::metadata(&path).unwrap().len();
        let before = len();
        request(&backend, WRITE, 0, 16 * 4096, 2).await;
        let after = len();
        backend.close().await;
        (before, after)
    });
    let (before, after) = grown.wait().unwrap();
    assert_eq!(before, after, "the file has grown");
    let expected = vec![Some([2; SECTOR]); 16 * 4096 / SECTOR];
    judge(&image, &expected, "written over zeroes");
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
