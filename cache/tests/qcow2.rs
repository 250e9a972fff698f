//! Disks on qcow2 images and chains of them, made and judged by `qemu-img`, against a model of what the guest wrote.
#![allow(clippy::unwrap_used, reason = "a failed assumption of a test is a failed test")]

use prestage_cache::backend::{StoreError, StoreOptions, StoreSpec};
use prestage_cache::counters::DiskCounters;
use prestage_cache::disk::{Disk, local};
use prestage_cache::engine::{AlignedBuf, EngineMode};
use prestage_cache::policy::{CoreConfig, PrefetchRequest};
use prestage_cache::types::PageRange;
use prestage_cache::{Cache, CacheConfig, Closing, OpenError, StorageHandle, arena::HugePages};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

const SECTOR: usize = 512;

fn cache(ram_bytes: u64, shards: usize) -> Cache {
    let policy = CoreConfig::with_slots(0);
    let config = CacheConfig { ram_bytes, huge_pages: HugePages::No, shards, engine: EngineMode::Auto, policy };
    Cache::new(config, None).unwrap()
}

fn closing() -> Closing {
    Closing { drain: Duration::ZERO, parted: false }
}

fn open(cache: &Cache, spec: &str, read_only: bool) -> Result<StorageHandle, OpenError> {
    let spec: StoreSpec = spec.parse().unwrap();
    cache.open(&spec, StoreOptions { read_only, ..StoreOptions::default() })
}

/// xorshift64*, Vigna 2016: tests must repeat.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }
}

fn run(program: &str, args: &[&str]) -> (bool, String) {
    let out = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.success(), text)
}

fn qemu_img(args: &[&str]) {
    let (ok, text) = run("qemu-img", args);
    assert!(ok, "qemu-img {args:?}: {text}");
}

/// The tests' folder, or `None` with a word why they cannot run.
fn folder() -> Option<tempfile::TempDir> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        println!("SKIPPED: no qemu-img here");
        return None;
    }
    Some(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
}

/// An image, with what its disk must show.
struct Image {
    path: PathBuf,
    format: &'static str,
    spec: String,
    shows: Vec<u8>,
}

impl Image {
    fn raw(folder: &Path, name: &str, size: usize, seed: u64) -> Image {
        let path = folder.join(name);
        let mut random = Random(seed | 1);
        // Runs of a byte, and holes.
        let mut shows = vec![0; size];
        let mut at = 0;
        while at < size {
            let end = (at + 512 * (1 + random.below(200) as usize)).min(size);
            shows[at..end].fill(random.below(256) as u8 & if random.below(4) == 0 { 0 } else { 0xff });
            at = end;
        }
        std::fs::write(&path, &shows).unwrap();
        Image { spec: path.display().to_string(), path, format: "raw", shows }
    }

    /// A fresh image on this one.
    fn overlay(&self, name: &str, size: usize, options: &[&str]) -> Image {
        let path = self.path.with_file_name(name);
        let (backing, size_text) = (self.path.to_str().unwrap(), size.to_string());
        let mut args = vec!["create", "-q", "-f", "qcow2", "-b", backing, "-F", self.format];
        options.iter().for_each(|option| args.extend(["-o", option]));
        args.extend([path.to_str().unwrap(), &size_text]);
        qemu_img(&args);
        let mut shows = self.shows.clone();
        shows.resize(size, 0);
        let spec = format!("qcow2:{}?backing={}", path.display(), self.spec);
        Image { path, format: "qcow2", spec, shows }
    }

    /// A copy as a qcow2 image that stands on nothing.
    fn converted(&self, name: &str, options: &[&str]) -> Image {
        let path = self.path.with_file_name(name);
        let mut args = vec!["convert", "-f", self.format, "-O", "qcow2"];
        args.extend(options);
        args.extend([self.path.to_str().unwrap(), path.to_str().unwrap()]);
        qemu_img(&args);
        Image { spec: format!("qcow2:{}", path.display()), path, format: "qcow2", shows: self.shows.clone() }
    }

    /// Writes some ranges with QEMU, so that the image holds something of its own.
    fn written(mut self, ranges: &[(usize, usize, u8)]) -> Image {
        for (offset, len, byte) in ranges {
            let command = format!("write -q -P {byte} {offset} {len}");
            let (ok, text) = run("qemu-io", &["-f", self.format, "-c", &command, self.path.to_str().unwrap()]);
            assert!(ok, "{text}");
            self.shows[*offset..offset + len].fill(*byte);
        }
        self
    }

    /// `qemu-img check` finds nothing at all, and the disk is what the model says.
    fn judge(&self, model: &[u8]) {
        let name = self.path.to_str().unwrap();
        let (ok, text) = run("qemu-img", &["check", "-f", "qcow2", name]);
        assert!(ok, "{text}");
        let raw = self.path.with_extension("model");
        std::fs::write(&raw, model).unwrap();
        let (same, text) = run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), name]);
        assert!(same, "{}: {text}", self.spec);
    }
}

async fn read(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0xEE; len];
    if !disk.try_read(offset, len, |at, bytes| out[at..at + bytes.len()].copy_from_slice(bytes)) {
        let data = disk.read(offset, len).await.unwrap();
        data.copy_to(|at, bytes| out[at..at + bytes.len()].copy_from_slice(bytes));
    }
    out
}

/// Random requests, one after the other, each checked; from time to time all that the disk says of its holes. Returns what the disk shows at the end.
async fn exercise(disk: Disk, mut model: Vec<u8>, seed: u64, steps: u64) -> Vec<u8> {
    let mut random = Random(seed * 2 + 1);
    let sectors = model.len() as u64 / SECTOR as u64;
    for step in 0..steps {
        let long = [8, 64, 700][random.below(3) as usize];
        let count = 1 + random.below(long.min(sectors));
        let first = random.below(sectors - count + 1);
        let (mut offset, mut len) = (first * SECTOR as u64, count as usize * SECTOR);
        if random.below(4) == 0 {
            // NBD's clients may ask for any bytes.
            let skip = random.below(len as u64);
            (offset, len) = (offset + skip, 1 + random.below(len as u64 - skip) as usize);
        }
        let range = offset as usize..offset as usize + len;
        match random.below(12) {
            0..=3 => {
                let mut data = AlignedBuf::new(len);
                data.iter_mut().enumerate().for_each(|(i, byte)| *byte = (step as usize + i / 100) as u8);
                model[range].copy_from_slice(&data);
                match step % 3 {
                    0 => disk.write_durable(offset, data).await.unwrap(),
                    _ => disk.write(offset, data).await.unwrap(),
                }
            }
            4 => {
                disk.write_zeroes(offset, len as u64, step % 2 == 0).await.unwrap();
                model[range].fill(0);
            }
            5 => {
                disk.discard(offset, len as u64).await.unwrap();
                // What it holds now is not said, but it stays that.
                let found = read(&disk, offset, len).await;
                let old_or_zero = found.iter().zip(&model[range.clone()]).all(|(new, old)| new == old || *new == 0);
                assert!(old_or_zero, "step {step}: a discard shows something else");
                model[range].copy_from_slice(&found);
            }
            6 => disk.flush().await.unwrap(),
            7 => {
                let most = 1 + random.below(9) as usize;
                let found = disk.extents(offset, len as u64, most).await.unwrap();
                assert!(!found.is_empty() && found.len() <= most, "step {step}: {found:?}");
                let mut at = range.start;
                for extent in found {
                    let end = at + extent.len_bytes as usize;
                    assert!(extent.len_bytes > 0 && end <= range.end, "step {step}: {extent:?} at {at}");
                    assert_eq!(extent.hole, extent.zero, "step {step}");
                    let zero = model[at..end].iter().all(|byte| *byte == 0);
                    assert!(zero || !extent.zero, "step {step}: {extent:?} at {at} holds data");
                    at = end;
                }
            }
            _ => {
                let found = read(&disk, offset, len).await;
                let wrong = found.iter().zip(&model[range]).position(|(found, want)| found != want);
                assert_eq!(wrong, None, "step {step}: {len} bytes at {offset}");
            }
        }
    }
    model
}

fn guest(cache: &Cache, image: &Image, seed: u64, steps: u64) {
    let storage = open(cache, &image.spec, false).unwrap();
    assert_eq!(storage.info().size_bytes, image.shows.len() as u64);
    let (id, model) = (storage.id(), image.shows.clone());
    let shard = storage.shard().clone();
    let model = shard.call(move |_| async move {
        exercise(Disk::new(local(id).unwrap(), 0, Arc::new(DiskCounters::default())), model, seed, steps).await
    });
    let model = model.wait().unwrap();
    assert!(cache.close(&storage, closing()));
    image.judge(&model);
}

const MIB: usize = 1 << 20;

#[test]
fn a_single_image_is_a_disk_for_every_cluster_size_and_version() {
    let Some(folder) = folder() else { return };
    let cache = cache(2 << 20, 1);
    let raw = Image::raw(folder.path(), "data.img", 6 * MIB + 3 * SECTOR, 5);
    for (i, options) in [
        &["-o", "cluster_size=512"][..],
        &["-o", "cluster_size=1024,refcount_bits=1"],
        &["-o", "cluster_size=4096"],
        &["-o", "cluster_size=65536"],
        &["-o", "cluster_size=2M"],
        &["-o", "compat=0.10"],
        &["-o", "lazy_refcounts=on"],
        &["-o", "preallocation=metadata,refcount_bits=64"],
        &["-c"],
        &["-c", "-o", "cluster_size=4096"],
    ]
    .into_iter()
    .enumerate()
    {
        let image = raw.converted(&format!("{i}.qcow2"), options);
        guest(&cache, &image, i as u64, 150);
    }
}

#[test]
fn a_chain_is_a_disk() {
    let Some(folder) = folder() else { return };
    // Two shards: the layers of a chain live on both.
    let cache = cache(2 << 20, 2);
    let base = Image::raw(folder.path(), "base.img", 5 * MIB, 1);
    // A base that ends within a page, below images that go on.
    let short = Image::raw(folder.path(), "short.img", 3 * MIB + 5 * SECTOR, 2);
    let compressed = base.converted("compressed.qcow2", &["-c"]);
    let small = base.converted("small.qcow2", &["-o", "cluster_size=2048"]);
    let mut seed = 100;
    for (i, base) in [&base, &short, &compressed, &small].into_iter().enumerate() {
        for (j, (middle, top)) in [
            ("cluster_size=65536", "cluster_size=65536"),
            ("cluster_size=4096", "cluster_size=131072"),
            ("cluster_size=1024", "compat=0.10"),
        ]
        .into_iter()
        .enumerate()
        {
            let ranges = [(70_000, 4096, 0xA1), (MIB, 300_000, 0xA2), (3 * MIB - 512, 1024, 0xA3)];
            // Shorter than what is below, or longer.
            let size = if j == 1 { 3 * MIB + MIB / 2 + 7 * SECTOR } else { 7 * MIB };
            let middle = base.overlay(&format!("middle{i}{j}.qcow2"), size, &[middle]).written(&ranges);
            let top = middle.overlay(&format!("top{i}{j}.qcow2"), 7 * MIB, &[top]);
            guest(&cache, &top, seed, 200);
            // And again: what the first run wrote is found by the second.
            seed += 1;
        }
    }
}

/// All that a disk says of its holes, neighbours of one kind as one: `(offset, bytes, hole)`.
async fn map(disk: &Disk, size: u64, step: u64, most: usize) -> Vec<(u64, u64, bool)> {
    let (mut runs, mut at): (Vec<(u64, u64, bool)>, u64) = (Vec::new(), 0);
    while at < size {
        for extent in disk.extents(at, step.min(size - at), most).await.unwrap() {
            match runs.last_mut() {
                Some((_, len, hole)) if *hole == extent.hole => *len += extent.len_bytes,
                _ => runs.push((at, extent.len_bytes, extent.hole)),
            }
            at += extent.len_bytes;
        }
    }
    runs
}

/// The same as QEMU's NBD server has it: what is neither data in some image nor below one is a hole that reads as zeroes.
fn map_by_qemu(image: &Image) -> Vec<(u64, u64, bool)> {
    let (ok, text) = run("qemu-img", &["map", "--output=json", "-f", image.format, image.path.to_str().unwrap()]);
    assert!(ok, "{text}");
    let mut runs: Vec<(u64, u64, bool)> = Vec::new();
    let number = |line: &str, key: &str| -> u64 {
        let rest = &line[line.find(key).unwrap() + key.len()..];
        rest[..rest.find([',', '}']).unwrap()].trim().parse().unwrap()
    };
    for line in text.lines() {
        let (start, len) = (number(line, "\"start\":"), number(line, "\"length\":"));
        let hole = line.contains("\"data\": false");
        match runs.last_mut() {
            Some((_, so_far, kind)) if *kind == hole => *so_far += len,
            _ => runs.push((start, len, hole)),
        }
    }
    runs
}

#[test]
fn holes_of_a_chain_are_those_that_qemu_sees() {
    let Some(folder) = folder() else { return };
    let cache = cache(2 << 20, 2);
    let path = folder.path().join("base.img");
    std::fs::File::create(&path).unwrap().set_len(6 * MIB as u64).unwrap();
    let base = Image { spec: path.display().to_string(), path, format: "raw", shows: vec![0; 6 * MIB] };
    let base = base.written(&[(MIB, 200_000 / 4096 * 4096, 1), (5 * MIB, MIB, 2)]);
    for (i, options) in ["cluster_size=65536", "cluster_size=4096", "cluster_size=512"].into_iter().enumerate() {
        let middle = base.overlay(&format!("middle{i}.qcow2"), 8 * MIB, &[options]);
        let middle = middle.written(&[(0, 65536, 3), (2 * MIB, 3 * 65536, 4), (7 * MIB, 65536, 0)]);
        let top = middle.overlay(&format!("top{i}.qcow2"), 8 * MIB, &[]).written(&[(3 * MIB, 65536, 5)]);
        // A hole on top of data, and data that is nothing but zeroes.
        let (ok, text) = run("qemu-io", &["-c", "write -q -z 5M 512k", top.path.to_str().unwrap()]);
        assert!(ok, "{text}");
        let (image, expected) = (top.spec.clone(), map_by_qemu(&top));
        let storage = open(&cache, &image, false).unwrap();
        let id = storage.id();
        let maps = storage.shard().call(move |_| async move {
            let disk = Disk::new(local(id).unwrap(), 0, Arc::new(DiskCounters::default()));
            let size = 8 * MIB as u64;
            [map(&disk, size, size, 1000).await, map(&disk, size, size, 1).await, map(&disk, size, 70_001, 3).await]
        });
        for found in maps.wait().unwrap() {
            assert_eq!(found, expected, "{options}");
        }
        assert!(cache.close(&storage, closing()));
    }
}

#[test]
fn pages_of_a_chain_are_dealt_out_to_the_images_that_have_them() {
    let Some(folder) = folder() else { return };
    let cache = cache(2 << 20, 2);
    let base = Image::raw(folder.path(), "base.img", 4 * MIB, 3);
    let top = base.overlay("top.qcow2", 5 * MIB, &[]).written(&[(MIB, 65536, 5)]);
    let storage = open(&cache, &top.spec, false).unwrap();
    let (id, below) = (storage.id(), storage.below().unwrap().id());
    let dealt = storage.shard().call(move |_| async move {
        let disk = Disk::new(local(id).unwrap(), 0, Arc::new(DiskCounters::default()));
        let dealt = disk.spread(1, 5 * MIB as u64 - 1).await.unwrap();
        dealt.into_iter().map(|(of, range)| (of.map(|of| of.id()), range.first, range.count)).collect::<Vec<_>>()
    });
    // 256 pages to the MiB; nobody has the last one.
    assert_eq!(
        dealt.wait().unwrap(),
        [(Some(below), 0, 256), (None, 256, 16), (Some(below), 272, 1024 - 272)],
        "the top has one cluster, the base the rest up to its end"
    );
    assert!(cache.close(&storage, closing()));
}

#[test]
fn requests_side_by_side_do_not_undo_each_other() {
    const OWNERS: u64 = 5;
    const SECTORS: u64 = 8192;
    let Some(folder) = folder() else { return };
    let cache = cache(1 << 20, 2);
    let base = Image::raw(folder.path(), "base.img", SECTORS as usize * SECTOR, 9);
    for options in ["cluster_size=65536", "cluster_size=2048"] {
        let top = base.overlay("top.qcow2", SECTORS as usize * SECTOR, &[options]);
        let storage = open(&cache, &top.spec, false).unwrap();
        let tasks: Vec<_> = (0..OWNERS)
            .map(|me| {
                let (id, shows) = (storage.id(), top.shows.clone());
                // Sectors are dealt out in runs of three: clusters are always shared.
                storage.shard().call(move |_| async move {
                    let disk = Disk::new(local(id).unwrap(), 0, Arc::new(DiskCounters::default()));
                    owner(&disk, me, OWNERS, SECTORS, shows).await
                })
            })
            .collect();
        for round in 0..40 {
            let at = round * 97 % (SECTORS / 8);
            let range = PageRange { first: at, count: 8 };
            let wish = PrefetchRequest { range, due: Duration::ZERO, probability: 0.9, tag: 0 };
            cache.prefetch(&storage, &[wish]);
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut model = top.shows.clone();
        for task in tasks {
            for (sector, bytes) in task.wait().unwrap() {
                model[sector as usize * SECTOR..][..SECTOR].copy_from_slice(&bytes);
            }
        }
        assert!(cache.close(&storage, closing()));
        top.judge(&model);
    }
}

async fn owner(disk: &Disk, me: u64, owners: u64, sectors: u64, mut shows: Vec<u8>) -> Vec<(u64, Vec<u8>)> {
    let mut random = Random(me * 7919 + 3);
    let mine = |sector: u64| sector / 3 % owners == me;
    for step in 0..250u64 {
        let run = random.below(sectors / 3 / owners) * owners + me;
        let first = run * 3 + random.below(3);
        let count = (1 + random.below(3 - first % 3)).min(sectors - first);
        let (offset, len) = (first * SECTOR as u64, count as usize * SECTOR);
        let range = offset as usize..offset as usize + len;
        match random.below(10) {
            0..=3 => {
                let mut data = AlignedBuf::new(len);
                data.fill((step as u8).wrapping_mul(5).wrapping_add(me as u8));
                shows[range].copy_from_slice(&data);
                disk.write(offset, data).await.unwrap();
            }
            4 => {
                disk.write_zeroes(offset, len as u64, step % 2 == 0).await.unwrap();
                shows[range].fill(0);
            }
            5 => disk.flush().await.unwrap(),
            _ => {
                let first = random.below(sectors - 200);
                let found = read(disk, first * SECTOR as u64, 200 * SECTOR).await;
                for sector in (first..first + 200).filter(|sector| mine(*sector)) {
                    let (at, in_found) = (sector as usize * SECTOR, (sector - first) as usize * SECTOR);
                    let same = found[in_found..in_found + SECTOR] == shows[at..at + SECTOR];
                    assert!(same, "owner {me}, step {step}: sector {sector} is not what was written");
                }
            }
        }
    }
    let of = |sector: u64| shows[sector as usize * SECTOR..][..SECTOR].to_vec();
    (0..sectors).filter(|sector| mine(*sector)).map(|sector| (sector, of(sector))).collect()
}

#[test]
fn machines_on_one_base_share_its_blocks() {
    let Some(folder) = folder() else { return };
    let cache = cache(32 << 20, 2);
    let base = Image::raw(folder.path(), "base.img", 8 * MIB, 3).converted("base.qcow2", &[]);
    let tops: Vec<_> = (0..3).map(|i| base.overlay(&format!("vm{i}.qcow2"), 8 * MIB, &[])).collect();
    let mut reads = Vec::new();
    let mut storages = Vec::new();
    for top in &tops {
        let storage = open(&cache, &top.spec, false).unwrap();
        let (id, shows) = (storage.id(), top.shows.clone());
        let read_all = storage.shard().call(move |_| async move {
            let disk = Disk::new(local(id).unwrap(), 0, Arc::new(DiskCounters::default()));
            for (i, chunk) in shows.chunks(128 << 10).enumerate() {
                assert!(read(&disk, i as u64 * (128 << 10), chunk.len()).await == chunk);
            }
        });
        read_all.wait().unwrap();
        reads.push(storage.below().unwrap().stats().store_read_bytes);
        assert_eq!(storage.stats().store_read_bytes, 0, "nothing of the base is read, or kept, as a machine's own");
        storages.push(storage);
    }
    assert!(reads[0] > 0 && reads[0] <= 8 << 20, "{reads:?}");
    assert_eq!(reads[1..], [reads[0]; 2], "the second and third machine read nothing from the base");
    let ids: Vec<_> = storages.iter().map(|storage| storage.below().unwrap().id()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "one storage for one base");
    for (i, storage) in storages.iter().enumerate() {
        let closed = cache.close_chain(storage, closing());
        assert_eq!(closed.len(), if i == 2 { 2 } else { 1 }, "the base is closed with the last machine");
    }
}

#[test]
fn what_is_not_named_is_not_opened() {
    let Some(folder) = folder() else { return };
    let cache = cache(1 << 20, 1);
    let base = Image::raw(folder.path(), "base.img", MIB, 3);
    let other = Image::raw(folder.path(), "other.img", MIB, 4);
    let top = base.overlay("top.qcow2", MIB, &[]);
    let path = top.path.display();
    let refused = |spec: String| match open(&cache, &spec, false).unwrap_err() {
        OpenError::Store(StoreError::Unsupported { what, .. }) => what,
        other => panic!("{spec}: {other}"),
    };
    assert!(refused(format!("qcow2:{path}")).contains("not opened unasked"));
    assert!(refused(format!("qcow2:{path}?backing={}", other.spec)).contains("name the right one"));
    let alone = base.converted("alone.qcow2", &[]);
    assert!(refused(format!("{}?backing={}", alone.spec, base.spec)).contains("stands on no other image"));
    let twice = open(&cache, &format!("qcow2:{path}?backing=qcow2:{path}"), false).unwrap_err();
    assert!(matches!(twice, OpenError::Loop { .. }), "{twice}");
    // As a raw disk the image's own bytes would be the disk.
    let raw = open(&cache, &format!("{path}"), false).unwrap_err();
    assert!(matches!(raw, OpenError::Store(StoreError::NotRaw { .. })), "{raw}");
    // A file that was told apart by its name is still found where the image stands.
    let storage = open(&cache, &top.spec, false).unwrap();
    assert!(cache.close(&storage, closing()));
}

#[test]
fn names_in_images_are_followed_into_one_folder_only() {
    let Some(folder) = folder() else { return };
    let inside = folder.path().join("images");
    std::fs::create_dir(&inside).unwrap();
    let outside = Image::raw(folder.path(), "secret.img", MIB, 3);
    let base = Image::raw(&inside, "base.img", MIB, 3);
    let middle = base.overlay("middle.qcow2", MIB, &[]);
    let top = middle.overlay("top.qcow2", MIB, &[]);
    let follow = |image: &Image, folder: Option<&Path>| {
        let spec: StoreSpec = format!("qcow2:{}", image.path.display()).parse().unwrap();
        prestage_cache::backend::follow(&spec, folder).map(|spec| spec.to_string())
    };
    let named = top.spec.parse::<StoreSpec>().unwrap().to_string();
    assert_eq!(follow(&top, Some(&inside)).unwrap(), named);
    assert!(follow(&top, None).unwrap_err().to_string().contains("not opened unasked"));
    // By a name, and by a link that lies in the folder.
    let direct = outside.overlay("direct.qcow2", MIB, &[]);
    std::os::unix::fs::symlink(&outside.path, inside.join("link.img")).unwrap();
    let linked = Image { path: inside.join("link.img"), ..outside };
    let linked = linked.overlay("linked.qcow2", MIB, &[]);
    for image in [&direct, &linked] {
        let refused = follow(image, Some(&inside)).unwrap_err().to_string();
        assert!(refused.contains("no image in"), "{refused}");
    }
    // Named in full, there is nothing to follow; and a chain that bites its tail has no end.
    let whole: StoreSpec = direct.spec.parse().unwrap();
    assert_eq!(prestage_cache::backend::follow(&whole, None).unwrap(), whole);
    let name = |image: &Image| image.path.to_str().unwrap().to_owned();
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", &name(&top), "-F", "qcow2", &name(&middle)]);
    let endless = follow(&top, Some(&inside)).unwrap_err().to_string();
    assert!(endless.contains("one on itself"), "{endless}");
}

/// A tenant's image: whatever its tables say, the daemon gives an answer, and goes on.
#[test]
fn a_damaged_image_is_an_error_at_worst() {
    let Some(folder) = folder() else { return };
    let cache = cache(2 << 20, 1);
    let raw = Image::raw(folder.path(), "data.img", 2 * MIB, 5);
    let sound = [
        raw.converted("plain.qcow2", &["-o", "cluster_size=4096"]),
        raw.converted("compressed.qcow2", &["-c", "-o", "cluster_size=4096"]),
    ];
    let (mut opened, mut failed, mut served) = (0, 0, 0);
    for seed in 0..80 {
        let mut random = Random(seed * 2 + 1);
        let image = &sound[seed as usize % 2];
        let mut bytes = std::fs::read(&image.path).unwrap();
        // Tables: whatever looks like the pointers of one, and the header's fields.
        let tables: Vec<usize> =
            (4096..bytes.len() - 8).step_by(8).filter(|at| bytes[*at] & 0xc0 != 0 && bytes[*at + 1] == 0).collect();
        for _ in 0..1 + random.below(40) {
            let at = match random.below(80) {
                0 => 8 + random.below(100) as usize,
                _ => tables[random.below(tables.len() as u64) as usize] + random.below(8) as usize,
            };
            bytes[at] ^= 1 << random.below(8);
        }
        let damaged = folder.path().join(format!("damaged{seed}.qcow2"));
        std::fs::write(&damaged, &bytes).unwrap();
        let Ok(storage) = open(&cache, &format!("qcow2:{}", damaged.display()), false) else { continue };
        opened += 1;
        let (id, size) = (storage.id(), storage.info().size_bytes.min(4 << 20));
        let mut asked = storage.shard().call(move |_| async move {
            let disk = Disk::new(local(id).unwrap(), 0, Arc::new(DiskCounters::default()));
            let mut results = Vec::new();
            for at in (0..size.saturating_sub(65536)).step_by(65536) {
                results.push(disk.read(at, 65536).await.is_ok());
                match at / 65536 % 4 {
                    0 => results.push(disk.write(at + 512, AlignedBuf::zeroed(1024)).await.is_ok()),
                    1 => results.push(disk.write_zeroes(at, 32768, true).await.is_ok()),
                    _ => {}
                }
            }
            results.push(disk.flush().await.is_ok());
            results
        });
        let results = asked.wait_timeout(Duration::from_secs(120)).unwrap();
        let results = results.unwrap_or_else(|| panic!("seed {seed}: no answer"));
        served += results.iter().filter(|ok| **ok).count();
        failed += results.iter().filter(|ok| !**ok).count();
        assert!(cache.close(&storage, closing()));
        std::fs::remove_file(&damaged).unwrap();
    }
    println!("{opened} of 80 opened; {served} requests served, {failed} failed");
    assert!(opened > 20 && failed > 20 && served > 20, "the damage is neither too small nor too large");
    // And a sound image is served as ever.
    guest(&cache, &sound[1], 7, 50);
}

#[test]
fn an_image_has_one_writer() {
    let Some(folder) = folder() else { return };
    let cache = cache(1 << 20, 1);
    let base = Image::raw(folder.path(), "base.img", MIB, 3);
    let top = base.overlay("top.qcow2", MIB, &[]);
    let storage = open(&cache, &top.spec, false).unwrap();
    let (ok, text) = run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", top.path.to_str().unwrap()]);
    assert!(!ok && text.contains("lock"), "QEMU writes to an image that is served: {text}");
    let (ok, text) = run("qemu-io", &["-f", "raw", "-c", "write 0 512", base.path.to_str().unwrap()]);
    assert!(!ok && text.contains("lock"), "QEMU writes to the base of an image that is served: {text}");
    let (ok, text) = run("qemu-img", &["snapshot", "-c", "s", top.path.to_str().unwrap()]);
    assert!(!ok && text.contains("lock"), "{text}");
    assert!(cache.close(&storage, closing()));
    let (ok, text) = run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", top.path.to_str().unwrap()]);
    assert!(ok, "{text}");
}

#[test]
fn what_only_qemu_understands_says_so() {
    let Some(folder) = folder() else { return };
    let cache = cache(1 << 20, 1);
    let raw = Image::raw(folder.path(), "data.img", MIB, 3);
    let reason = |image: &Image| match open(&cache, &image.spec, false).unwrap_err() {
        OpenError::Store(StoreError::NeedsQemu { why, .. }) => why,
        other => panic!("{}: {other}", image.spec),
    };
    let zstd = raw.converted("zstd.qcow2", &["-c", "-o", "compression_type=zstd"]);
    assert!(reason(&zstd).contains("zstd"), "{}", reason(&zstd));
    let extended = raw.converted("extended.qcow2", &["-o", "extended_l2=on,cluster_size=128k"]);
    assert!(reason(&extended).contains("extended L2"));
    let snapshot = raw.converted("snapshot.qcow2", &[]);
    qemu_img(&["snapshot", "-c", "first", snapshot.path.to_str().unwrap()]);
    assert!(reason(&snapshot).contains("1 internal snapshot"));
    let luks = folder.path().join("luks.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=geheim",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        luks.to_str().unwrap(),
        "1M",
    ]);
    let luks = Image { spec: format!("qcow2:{}", luks.display()), path: luks, format: "qcow2", shows: Vec::new() };
    assert!(reason(&luks).contains("encrypted (LUKS)"));
    let bitmaps = raw.converted("bitmaps.qcow2", &[]);
    qemu_img(&["bitmap", "--add", bitmaps.path.to_str().unwrap(), "b"]);
    assert!(reason(&bitmaps).contains("bitmaps"));
    let external = folder.path().join("external.qcow2");
    let data_file = format!("data_file={}", folder.path().join("external.raw").display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data_file, external.to_str().unwrap(), "1M"]);
    let refused = open(&cache, &format!("qcow2:{}", external.display()), false).unwrap_err();
    assert!(
        matches!(&refused, OpenError::Store(StoreError::Unsupported { what, .. }) if what.contains("another file")),
        "{refused}"
    );
}
