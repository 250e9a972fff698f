//! QEMU's migration stream with capability `mapped-ram`, as far as it is needed to find the memory in it.
//!
//! ```text
//! "QEVM" u32 version=3 | sections …
//! section of the memory:  u8 1 | u32 id | u8 3 "ram" | u32 instance=0 | u32 version=4 | u64 total bytes | 4
//!   for each block:       u8 n | name | u64 bytes | u32 version=1 | u64 page size | u64 at of bitmap | u64 at of pages
//!                         bitmap (a bit a page, set where the file has it) … pages, `bytes` of them, then the next block
//! ```
//!
//! Numbers are big-endian (QEMU migration/ram.c `ram_save_setup`, `mapped_ram_setup_ramblock`; migration/savevm.c).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::PAGE_BYTES;
use super::working_set::Extent;

/// The section's start lies behind the machine's name and a few capabilities.
const SEARCHED_BYTES: usize = 4096;
/// `RAM_SAVE_FLAG_MEM_SIZE`, in the low bits of the total.
const FLAG_TOTAL: u64 = 0x04;
/// More blocks than any machine has: firmware, video memory, ROMs of devices, memory devices.
const MOST_BLOCKS: usize = 4096;

/// Why a stream can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("cannot read the state: {0}")]
    Io(#[from] io::Error),
    #[error("the state is not what QEMU writes with mapped-ram: {0}")]
    Unexpected(String),
}

/// One block of the machine's memory in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    pub name: String,
    /// Where the name's first byte is.
    pub name_at: u64,
    pub bytes: u64,
    pub bitmap_at: u64,
    pub pages_at: u64,
}

impl RamBlock {
    fn bitmap_bytes(&self) -> usize {
        usize::try_from((self.bytes / PAGE_BYTES).div_ceil(64) * 8).unwrap_or(usize::MAX)
    }

    /// Where what follows the block's pages begins.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.pages_at.saturating_add(self.bytes)
    }
}

fn unexpected<T>(reason: impl Into<String>) -> Result<T, StreamError> {
    Err(StreamError::Unexpected(reason.into()))
}

/// Reads numbers one after the other at a place in the file.
struct Reader<'a> {
    file: &'a File,
    at: u64,
}

impl Reader<'_> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, self.at)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, StreamError> {
        self.bytes().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, StreamError> {
        self.bytes().map(u64::from_be_bytes)
    }

    fn block(&mut self) -> Result<RamBlock, StreamError> {
        let [length] = self.bytes()?;
        let name_at = self.at;
        let mut name = vec![0; length.into()];
        self.file.read_exact_at(&mut name, name_at)?;
        self.at += u64::from(length);
        let Ok(name) = String::from_utf8(name) else { return unexpected("a block's name is not text") };
        let bytes = self.u64()?;
        let (version, page_bytes, bitmap_at, pages_at) = (self.u32()?, self.u64()?, self.u64()?, self.u64()?);
        if version != 1 || page_bytes != PAGE_BYTES {
            return unexpected(format!("block `{name}` has version {version} and pages of {page_bytes} bytes"));
        }
        let block = RamBlock { name, name_at, bytes, bitmap_at, pages_at };
        let bitmap_end = bitmap_at.saturating_add(block.bitmap_bytes() as u64);
        if bitmap_at < self.at || bitmap_end > pages_at || pages_at.checked_add(bytes).is_none() {
            return unexpected(format!("block `{}` overlaps itself", block.name));
        }
        self.at = block.end();
        Ok(block)
    }
}

/// All blocks of memory in the stream, in its order.
///
/// # Errors
/// `Unexpected` where it is no stream with `mapped-ram`, `Io`.
pub fn blocks(file: &File) -> Result<Vec<RamBlock>, StreamError> {
    let size = file.metadata()?.len();
    let mut head = vec![0; SEARCHED_BYTES.min(usize::try_from(size).unwrap_or(SEARCHED_BYTES))];
    file.read_exact_at(&mut head, 0)?;
    if !head.starts_with(b"QEVM\0\0\0\x03") {
        return unexpected("it does not begin as a stream of version 3");
    }
    let start = |w: &[u8]| w[0] == 1 && w[5..] == *b"\x03ram\0\0\0\0\0\0\0\x04";
    let Some(at) = head.windows(17).position(start) else { return unexpected("no section of memory at its start") };
    let mut reader = Reader { file, at: at as u64 + 17 };
    let total = reader.u64()?;
    if total % PAGE_BYTES != FLAG_TOTAL {
        return unexpected("no total of the memory");
    }
    let total = total - FLAG_TOTAL;
    let (mut blocks, mut sum) = (Vec::new(), 0_u64);
    while sum < total {
        let block = reader.block()?;
        if block.end() > size || blocks.len() == MOST_BLOCKS || block.bytes == 0 {
            return unexpected(format!("block `{}` ends beyond the file, or there are too many", block.name));
        }
        sum = sum.saturating_add(block.bytes);
        blocks.push(block);
    }
    if sum != total {
        return unexpected(format!("blocks of {sum} bytes where {total} are said"));
    }
    Ok(blocks)
}

/// The pages of a block that the file has: all that are not zero.
///
/// # Errors
/// `Io`.
pub fn present(file: &File, block: &RamBlock) -> Result<Vec<Extent>, StreamError> {
    let mut bitmap = vec![0; block.bitmap_bytes()];
    file.read_exact_at(&mut bitmap, block.bitmap_at)?;
    // little-endian words of bits, which makes it one bit after the other
    let pages = (0..block.bytes / PAGE_BYTES).filter(|&page| {
        let (byte, bit) = (usize::try_from(page / 8).unwrap_or(usize::MAX), page % 8);
        bitmap.get(byte).is_some_and(|byte| byte >> bit & 1 == 1)
    });
    Ok(Extent::of(pages))
}

/// Another name of the same length: QEMU has an object of the old name already, made by libvirt.
#[must_use]
pub fn other_name(name: &str) -> String {
    let first = if name.starts_with('t') { 'u' } else { 't' };
    std::iter::once(first).chain(name.chars().skip(1)).collect()
}

/// Has a start from this stream load nothing of the block, whose memory is there already under another name.
///
/// # Errors
/// `Unexpected` if the names' lengths differ, `Io`.
pub fn detach(file: &File, block: &RamBlock, name: &str) -> Result<(), StreamError> {
    if name.len() != block.name.len() {
        return unexpected(format!("`{name}` is no other name for block `{}`", block.name));
    }
    file.write_all_at(&vec![0; block.bitmap_bytes()], block.bitmap_at)?;
    file.write_all_at(name.as_bytes(), block.name_at)?;
    Ok(())
}

/// The checksum (CRC-32C) of all but a block's pages: headers and devices.
///
/// # Errors
/// `Io`.
pub fn checksum_around(file: &File, block: &RamBlock) -> io::Result<u32> {
    let size = file.metadata()?.len();
    let before = checksum(file, 0..block.pages_at, 0)?;
    checksum(file, block.end()..size, before)
}

/// The checksum (CRC-32C) of a range, going on from `sum`. Ends early where the file does.
///
/// # Errors
/// `Io`.
pub fn checksum(file: &File, range: std::ops::Range<u64>, mut sum: u32) -> io::Result<u32> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        let most = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(buffer.len());
        let read = file.read_at(&mut buffer[..most], at)?;
        if read == 0 {
            break;
        }
        sum = crc32c::crc32c_append(sum, &buffer[..read]);
        at += read as u64;
    }
    Ok(sum)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A stream with blocks of these names and sizes; page `p` of each is in it where `has(p)`, filled with its number.
    pub(in crate::memory::template) fn write(
        file: &File,
        blocks: &[(&str, u64)],
        has: impl Fn(u64) -> bool,
        tail: &[u8],
    ) {
        let mut head = b"QEVM\0\0\0\x03\x07\0\0\0\x03q35\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
        let total: u64 = blocks.iter().map(|(_, bytes)| bytes).sum();
        head.extend((total | FLAG_TOTAL).to_be_bytes());
        let mut at = 0;
        for (name, bytes) in blocks {
            head.push(u8::try_from(name.len()).unwrap());
            head.extend(name.as_bytes());
            head.extend(bytes.to_be_bytes());
            head.extend(1_u32.to_be_bytes());
            head.extend(PAGE_BYTES.to_be_bytes());
            let bitmap_at = at + head.len() as u64 + 16;
            let bitmap_bytes = (bytes / PAGE_BYTES).div_ceil(64) * 8;
            let pages_at = (bitmap_at + bitmap_bytes).next_multiple_of(1 << 20);
            head.extend(bitmap_at.to_be_bytes());
            head.extend(pages_at.to_be_bytes());
            file.write_all_at(&head, at).unwrap();
            for page in (0..bytes / PAGE_BYTES).filter(|&page| has(page)) {
                let mut byte = [0];
                let byte_at = bitmap_at + page / 8;
                let _ = file.read_at(&mut byte, byte_at).unwrap();
                file.write_all_at(&[byte[0] | 1 << (page % 8)], byte_at).unwrap();
                let fill = u8::try_from(page % 255 + 1).unwrap();
                file.write_all_at(&[fill; 4096], pages_at + page * PAGE_BYTES).unwrap();
            }
            at = pages_at + bytes;
            head.clear();
        }
        file.write_all_at(tail, at).unwrap();
    }

    #[test]
    fn blocks_are_found_and_detached_without_a_change_elsewhere() {
        let file = tempfile::tempfile().unwrap();
        write(&file, &[("pc.ram", 100 * PAGE_BYTES), ("pc.bios", 16 * PAGE_BYTES)], |page| page % 3 == 0, b"devices");
        let found = blocks(&file).unwrap();
        assert_eq!(found.iter().map(|b| b.name.as_str()).collect::<Vec<_>>(), ["pc.ram", "pc.bios"]);
        let ram = &found[0];
        let pages: Vec<u64> = present(&file, ram).unwrap().iter().flat_map(|e| e.first..e.first + e.pages).collect();
        assert_eq!(pages, (0..100).filter(|page| page % 3 == 0).collect::<Vec<_>>());
        let before = checksum_around(&file, ram).unwrap();
        detach(&file, ram, &other_name(&ram.name)).unwrap();
        assert_ne!(checksum_around(&file, ram).unwrap(), before);
        let after = blocks(&file).unwrap();
        assert_eq!(after[0], RamBlock { name: "tc.ram".into(), ..ram.clone() });
        assert_eq!(after[1], found[1]);
        assert!(present(&file, &after[0]).unwrap().is_empty());
        assert!(!present(&file, &after[1]).unwrap().is_empty());
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, ram.pages_at + 3 * PAGE_BYTES).unwrap();
        assert_eq!(page, [4; 4096]);
    }

    #[test]
    fn what_is_no_such_stream_is_refused() {
        let stream = |edit: &dyn Fn(&File)| {
            let file = tempfile::tempfile().unwrap();
            write(&file, &[("pc.ram", 64 * PAGE_BYTES)], |_| true, b"devices");
            edit(&file);
            blocks(&file).map(drop)
        };
        assert!(stream(&|_| ()).is_ok());
        let edits: [&dyn Fn(&File); 5] = [
            &|f| f.write_all_at(b"X", 0).unwrap(),
            &|f| f.set_len(100).unwrap(),
            &|f| f.set_len((1 << 20) + 63 * PAGE_BYTES).unwrap(),
            &|f| f.write_all_at(&[0xff], 37).unwrap(), // the total
            &|f| f.set_len(0).unwrap(),
        ];
        for (i, edit) in edits.into_iter().enumerate() {
            assert!(stream(edit).is_err(), "edit {i}");
        }
    }

    #[test]
    fn other_names_differ_and_keep_their_length() {
        for name in ["pc.ram", "tc.ram", "ram"] {
            assert_ne!(other_name(name), name);
            assert_eq!(other_name(name).len(), name.len());
        }
    }
}
