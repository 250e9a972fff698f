//! Slabs of the SSD tier that were changed: bytes anywhere, structures with a right checksum and a wrong content, a file cut
//! off or lengthened.
//!
//! What must hold: the slab is refused or opened, and what it serves of a store is what the store held. Then it is used,
//! closed or not, and opened once more, for which the same holds.
#![no_main]

use arbitrary::{Result, Unstructured};
use prestage_cache::ssd::{Outcome, SsdError, SsdOptions, SsdStorage, SsdTier, Stamp, Step};
use prestage_cache::types::{BLOCK_BYTES, BlockIndex, PAGE_BYTES, PageMask};
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const SLOTS: u64 = 12;
const TABLE: u64 = 128 << 10;
const INTENTS: u64 = TABLE + (2 << 20);
const META: u64 = 4 << 20;
const DATA: u64 = META + (256 << 10);
const LEN: u64 = DATA + SLOTS * BLOCK_BYTES as u64;
const STAMP: Stamp = Stamp { size_bytes: 1 << 30, mtime_ns: 4, ctime_ns: 5, inode: 6, device: 7 };

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // The bytes have run out: nothing more to change.
    let _ = play(&mut Unstructured::new(data));
});

/// Blocks that the store has: twelve that guests use, and two that only a record made up by somebody names.
const BLOCKS: [u64; 14] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1 << 20, u64::MAX >> 16];

/// A slab with ten blocks of one store, as runs of sectors that are not zero, and the store.
struct Pristine {
    path: PathBuf,
    closed: Vec<(u64, Vec<u8>)>,
    killed: Vec<(u64, Vec<u8>)>,
    store: Vec<(u64, Vec<u8>)>,
}

fn pristine() -> &'static Pristine {
    static MADE: OnceLock<Pristine> = OnceLock::new();
    MADE.get_or_init(|| {
        // Whoever runs the target removes it: the fuzzer ends without unwinding.
        let folder = std::env::temp_dir().join(format!("prestage-fuzz-slab-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the slab can be made");
        let path = folder.join("slab");
        let store = BLOCKS.map(|block| (block, content(block))).to_vec();
        let tier = open(&path, LEN).expect("a slab can be made");
        tier.load();
        let storage = tier.storage("file:/a", Some(STAMP)).expect("there is room for a storage");
        // Whole blocks, runs, single pages: one apiece, since whatever is there is read four times an input.
        let masks = [0xFFFF, 0x8001, 0x0001, 0x00F0, 0x8000, 0x5005, 0x0FF0, 0x0002, 0x0300, 0x4000];
        for (block, mask) in store.iter().zip(masks) {
            insert(&tier, storage, block, PageMask(mask));
        }
        if let Some(mut checkpoint) = tier.begin_checkpoint() {
            while checkpoint.step().expect("the device takes writes") == Step::More {}
        }
        let killed = pieces(&path);
        tier.close().expect("the slab can be closed");
        drop(tier);
        let closed = pieces(&path);
        Pristine { path, closed, killed, store }
    })
}

fn open(path: &Path, len: u64) -> std::result::Result<SsdTier, SsdError> {
    let options = SsdOptions { preallocate: false, direct: false, ..SsdOptions::default() };
    SsdTier::open_at_once(path, len, options)
}

/// What of a file is not zero: runs of sectors, so that putting it back takes few writes.
fn pieces(path: &Path) -> Vec<(u64, Vec<u8>)> {
    let bytes = std::fs::read(path).expect("the slab can be read");
    let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
    for (at, sector) in (0..).step_by(4096).zip(bytes.chunks(4096)) {
        if sector.iter().all(|byte| *byte == 0) {
            continue;
        }
        match pieces.last_mut() {
            Some((from, piece)) if *from + piece.len() as u64 == at => piece.extend(sector),
            _ => pieces.push((at, sector.to_vec())),
        }
    }
    pieces
}

/// What a block of the store holds: every page something else.
fn content(block: u64) -> Vec<u8> {
    let page = |page: u64| (block * 100 + page + 1).to_le_bytes().repeat(PAGE_BYTES / 8);
    (0..16).flat_map(page).collect()
}

/// Where the pages of a mask lie in a block, run by run.
fn places(mask: PageMask) -> impl Iterator<Item = Range<usize>> {
    mask.runs().map(|(first, count)| first as usize * PAGE_BYTES..(first + count) as usize * PAGE_BYTES)
}

fn file_of(tier: &SsdTier) -> File {
    File::from(tier.data_fd().as_fd().try_clone_to_owned().expect("descriptors are to be had"))
}

fn insert(tier: &SsdTier, storage: SsdStorage, (block, held): &(u64, Vec<u8>), mask: PageMask) {
    let Some(write) = tier.begin_insert(storage, BlockIndex(*block), mask) else { return };
    let data = file_of(tier);
    let ok = places(mask).all(|at| data.write_all_at(&held[at.clone()], write.offset() + at.start as u64).is_ok());
    let checksum = write.checksum(held);
    tier.finish_insert(write, checksum, ok);
}

/// Reads all blocks that might be there. What is served must be what the store held.
fn read_all(tier: &SsdTier, storage: SsdStorage, store: &[(u64, Vec<u8>)]) {
    let data = file_of(tier);
    // Of the block before, where nothing is read: what is served must not be that.
    let mut buffer = vec![0; BLOCK_BYTES];
    for (block, held) in store {
        let Some(read) = tier.begin_read(storage, BlockIndex(*block)) else { continue };
        let written = places(read.written_mask());
        let outcome = match written
            .map(|at| data.read_exact_at(&mut buffer[at.clone()], read.offset() + at.start as u64))
            .collect()
        {
            Err::<(), std::io::Error>(_) => Outcome::IoError,
            Ok(()) if read.verify(&buffer) => Outcome::Good,
            Ok(()) => Outcome::BadChecksum,
        };
        let served = tier.end_read(read, outcome);
        assert!(outcome == Outcome::Good || served == PageMask::NONE);
        for at in places(served) {
            assert!(buffer[at.clone()] == held[at.clone()], "bytes {at:?} of {block}");
        }
    }
}

fn play(bytes: &mut Unstructured<'_>) -> Result<()> {
    let Pristine { path, closed, killed, store } = pristine();
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).expect("a file can be made");
    file.set_len(LEN).expect("a file can be lengthened");
    for (at, piece) in if bytes.ratio(1, 2)? { closed } else { killed } {
        file.write_all_at(piece, *at).expect("a file can be written");
    }
    for _ in 0..bytes.int_in_range(0..=6_u8)? {
        change(&file, bytes)?;
    }
    let len = match bytes.int_in_range(0..=7_u8)? {
        0 => LEN + BLOCK_BYTES as u64 * u64::from(bytes.int_in_range(0..=9_u8)?),
        1 => LEN - BLOCK_BYTES as u64 * u64::from(bytes.int_in_range(0..=9_u8)?),
        _ => LEN,
    };
    drop(file);
    for _ in 0..2 {
        let Ok(tier) = open(path, len) else { return Ok(()) };
        if let Ok(storage) = tier.storage("file:/a", Some(STAMP)) {
            // What comes before the records are read must not be undone by them.
            if bytes.ratio(1, 4)? {
                let (page, pages) = (u64::from(bytes.arbitrary::<u8>()?), u64::from(bytes.arbitrary::<u8>()?));
                tier.begin_write(storage, page, pages).end();
                tier.load();
                let gone = |block: &u64| *block * 16 >= page && (*block + 1) * 16 <= page + pages;
                let found = store
                    .iter()
                    .filter(|(block, _)| gone(block))
                    .any(|(block, _)| !tier.lookup(storage, BlockIndex(*block)).is_empty());
                assert!(!found, "what was written to is found");
            }
            tier.load();
            read_all(&tier, storage, store);
            for _ in 0..bytes.int_in_range(0..=3_u8)? {
                insert(&tier, storage, bytes.choose(store)?, PageMask(bytes.arbitrary()?));
            }
            read_all(&tier, storage, store);
        }
        if let Some(mut checkpoint) = tier.begin_checkpoint().filter(|_| bytes.arbitrary().unwrap_or(false)) {
            while matches!(checkpoint.step(), Ok(Step::More)) {}
        }
        if bytes.arbitrary()? {
            let _ = tier.close();
        }
    }
    Ok(())
}

/// One change to the file, with a checksum that is right again, or not.
fn change(file: &File, bytes: &mut Unstructured<'_>) -> Result<()> {
    let near = u64::from(bytes.arbitrary::<u16>()?);
    // Where a structure begins, how long it is, where in it the checksum lies, its kind and number.
    let (at, len, crc, kind, number) = match bytes.int_in_range(0..=7_u8)? {
        0 => (0, 4096, 20, 0, 0),
        1 => (64 << 10, 4096, 20, 0, 0),
        2 => (TABLE + near % 4 * 512, 512, 0, b'T', near % 4),
        3 => (INTENTS + near % 2048 * 512, 512, 0, b'I', near % 2048),
        4 | 5 => (META + near % SLOTS * 64, 64, 0, b'S', near % SLOTS),
        6 => (DATA + near % SLOTS * BLOCK_BYTES as u64, 4096, 0, 0, 0),
        _ => {
            let cut = bytes.int_in_range(0..=LEN)?;
            let _ = file.set_len(cut);
            return Ok(());
        }
    };
    let mut structure = vec![0; len];
    if file.read_exact_at(&mut structure, at).is_err() {
        return Ok(());
    }
    for _ in 0..bytes.int_in_range(1..=3_u8)? {
        let place = bytes.choose_index(len)?;
        let value: u64 = if bytes.ratio(1, 2)? { bytes.arbitrary::<u8>()?.into() } else { bytes.arbitrary()? };
        let width = bytes.int_in_range(1..=8_usize)?.min(len - place);
        structure[place..place + width].copy_from_slice(&value.to_le_bytes()[..width]);
    }
    if at < DATA && bytes.ratio(3, 4)? {
        let mut id = [0; 16];
        let _ = file.read_exact_at(&mut id, 32);
        let seed = match kind {
            0 => 0,
            kind => crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&id), &[kind]), &number.to_le_bytes()),
        };
        structure[crc..crc + 4].fill(0);
        let sum = crc32c::crc32c_append(seed, &structure);
        structure[crc..crc + 4].copy_from_slice(&sum.to_le_bytes());
    }
    let _ = file.write_all_at(&structure, at);
    Ok(())
}
