//! Guest frame ↔ host address, from what QEMU's monitor prints.
//!
//! `info mtree -f` says which part of which memory block the guest sees where, `info ramblock` where each block lies in the
//! process. Both change with hotplug, so they are asked anew then. Blocks of devices (video memory, firmware) are left out.

use super::{MemoryError, PAGE_BYTES, Region};
use std::collections::HashMap;

/// What to ask: two commands of the human monitor; there is no QMP for either (QEMU 10).
pub const COMMANDS: [&str; 2] = ["info mtree -f", "info ramblock"];

/// Pages of a guest, at most: 16 TiB.
const MOST_PAGES: u64 = 1 << 32;

/// The guest's memory, ascending by frame.
///
/// # Errors
/// [`MemoryError::Layout`] if nothing is found in the texts.
pub fn regions(mtree: &str, ramblock: &str) -> Result<Vec<Region>, MemoryError> {
    let blocks: HashMap<&str, Block> = ramblock.lines().filter_map(Block::parse).collect();
    let mut regions: Vec<Region> = Vec::new();
    for seen in of_memory(mtree).filter_map(Seen::parse) {
        let block = blocks.get(seen.block).or_else(|| {
            let mut same = blocks.iter().filter(|(name, _)| name.rsplit('/').next() == Some(seen.block));
            same.next().map(|(_, block)| block)
        });
        let Some(block) = block else { continue };
        let (Some(pages), Some(end)) = (seen.bytes.checked_div(PAGE_BYTES), seen.offset.checked_add(seen.bytes)) else {
            continue;
        };
        let whole = (seen.first | seen.offset | block.host) % PAGE_BYTES == 0;
        let host = block.host.checked_add(seen.offset).filter(|host| host.checked_add(seen.bytes).is_some());
        let Some(host) = host.filter(|_| whole && pages > 0 && end <= block.bytes) else { continue };
        let region = Region { frame: seen.first / PAGE_BYTES, pages, host };
        match regions.last_mut() {
            Some(last)
                if last.frame + last.pages == region.frame && last.host + last.pages * PAGE_BYTES == region.host =>
            {
                last.pages += region.pages;
            }
            _ => regions.push(region),
        }
    }
    // QEMU says it, and may be in its guest's hands
    let pages = regions.iter().try_fold(0_u64, |sum, region| sum.checked_add(region.pages));
    if pages.is_none_or(|pages| pages > MOST_PAGES) {
        return Err(MemoryError::Layout("the guest is said to have more than 16 TiB of memory".into()));
    }
    if regions.is_empty() {
        return Err(MemoryError::Layout("`info mtree -f` and `info ramblock` name no memory of the guest".into()));
    }
    regions.sort_by_key(|region| region.frame);
    // a block that is seen twice (an alias) counts where it comes first
    let mut hosts: Vec<(u64, u64)> = Vec::new();
    regions.retain(|region| {
        let end = region.host + region.pages * PAGE_BYTES;
        let apart = hosts.iter().all(|&(start, until)| end <= start || until <= region.host);
        hosts.push((region.host, end));
        apart
    });
    Ok(regions)
}

/// Where the block of memory with this name lies in the process: address and bytes.
///
/// # Errors
/// [`MemoryError::Layout`] if there is none.
pub fn block(ramblock: &str, name: &str) -> Result<(u64, u64), MemoryError> {
    let found = ramblock.lines().filter_map(Block::parse).find(|(of, _)| *of == name);
    let found = found.filter(|(_, block)| block.host.is_multiple_of(PAGE_BYTES) && block.bytes >= PAGE_BYTES);
    let none = || MemoryError::Layout(format!("`info ramblock` names no memory `{name}`"));
    found.map(|(_, block)| (block.host, block.bytes)).ok_or_else(none)
}

/// The lines of the flat view that the address space `memory` has.
fn of_memory(mtree: &str) -> impl Iterator<Item = &str> {
    let mut views = mtree.split("FlatView #");
    let memory = views.find(|view| view.lines().any(|line| line.trim().starts_with("AS \"memory\"")));
    memory.unwrap_or_default().lines()
}

struct Block {
    bytes: u64,
    host: u64,
}

impl Block {
    /// `NAME  4 KiB  OFFSET USED TOTAL HVA rw`
    fn parse(line: &str) -> Option<(&str, Self)> {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let hex = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
        let at = fields.iter().position(|field| field.starts_with("0x"))?;
        let [_, used, _, host, ..] = fields.get(at..)? else { return None };
        let name = *fields.first()?;
        // "0000:00:01.0/vga.vram", "/rom@etc/acpi/tables"
        if name.starts_with("/rom") || name.contains("vga.") || name.ends_with(".rom") || name.ends_with(".bios") {
            return None;
        }
        Some((name, Self { bytes: hex(used)?, host: hex(host)? }))
    }
}

struct Seen<'a> {
    first: u64,
    bytes: u64,
    block: &'a str,
    offset: u64,
}

impl<'a> Seen<'a> {
    /// `FIRST-LAST (prio 0, ram): NAME @OFFSET KVM`
    fn parse(line: &'a str) -> Option<Self> {
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let (range, rest) = line.trim().split_once(" (prio ")?;
        let (first, last) = range.split_once('-')?;
        let (kind, name) = rest.split_once("): ")?;
        if kind.split(", ").nth(1)? != "ram" {
            return None;
        }
        let mut words = name.split_ascii_whitespace();
        let block = words.next()?;
        let offset = words.find_map(|word| word.strip_prefix('@')).map_or(Some(0), hex)?;
        let (first, last) = (hex(first)?, hex(last)?);
        Some(Self { first, bytes: last.checked_sub(first)?.checked_add(1)?, block, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAMBLOCK: &str = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO\r
                  pc.ram    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000 0x00007f1c1be00000  rw\r
                memdimm0    2 MiB  0x0000000021040000 0x0000000008000000 0x0000000008000000 0x00007f1c00000000  rw\r
                 pc.bios    4 KiB  0x0000000020000000 0x0000000000040000 0x0000000000040000 0x00007f1c1bc00000  ro\r
    0000:00:02.0/vga.vram   4 KiB  0x0000000020080000 0x0000000001000000 0x0000000001000000 0x00007f1c1a600000  rw\r
";
    const MTREE: &str = "\
FlatView #0\r
 AS \"I/O\", root: io\r
 Root memory region: io\r
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan\r
\r
FlatView #1\r
 AS \"memory\", root: system\r
 AS \"cpu-memory-0\", root: system\r
 Root memory region: system\r
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram\r
  00000000000a0000-00000000000bffff (prio 1, ram): vga.vram\r
  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000\r
  0000000000100000-000000001fffffff (prio 0, ram): pc.ram @0000000000100000 KVM\r
  0000000100000000-0000000107ffffff (prio 0, ram): memdimm0 KVM\r
\r
";

    #[test]
    fn a_guests_memory_is_found_and_nothing_else() {
        let regions = regions(MTREE, RAMBLOCK).unwrap();
        let expected = [
            Region { frame: 0, pages: 0xa0, host: 0x7f1c_1be0_0000 },
            Region { frame: 0x100, pages: 0x1_ff00, host: 0x7f1c_1bf0_0000 },
            Region { frame: 0x10_0000, pages: 0x8000, host: 0x7f1c_0000_0000 },
        ];
        assert_eq!(regions, expected);
        super::super::capture::Places::new(regions).unwrap();
    }

    #[test]
    fn a_block_is_found_by_its_name_alone() {
        assert_eq!(block(RAMBLOCK, "pc.ram"), Ok((0x7f1c_1be0_0000, 0x2000_0000)));
        for none in ["pc", "pc.bios", "", "Block"] {
            assert!(matches!(block(RAMBLOCK, none), Err(MemoryError::Layout(_))), "{none}");
        }
    }

    #[test]
    fn odd_texts_name_nothing() {
        for (mtree, ramblock) in [("", ""), (MTREE, ""), ("", RAMBLOCK), (RAMBLOCK, MTREE)] {
            assert!(matches!(regions(mtree, ramblock), Err(MemoryError::Layout(_))));
        }
        let beyond = MTREE.replace("@0000000000100000", "@ffffffffffffff00");
        assert_eq!(regions(&beyond, RAMBLOCK).unwrap().len(), 2);
    }

    #[test]
    fn cut_and_changed_texts_never_panic() {
        for at in 0..MTREE.len() {
            let _ = regions(&MTREE[..at], RAMBLOCK);
            let _ = regions(MTREE, RAMBLOCK.get(..at).unwrap_or_default());
            let mut odd = MTREE.as_bytes().to_vec();
            odd[at] = b'f';
            if let Ok(found) = regions(&String::from_utf8(odd).unwrap(), RAMBLOCK) {
                let _ = super::super::capture::Places::new(found);
            }
        }
    }
}
