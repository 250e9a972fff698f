//! What an export's server says of where it holds data.

use super::super::error::StoreError;
use super::super::{Extent, SECTOR_BYTES};
use super::wire::{self, Command, Cursor};
use super::{Inner, NO_PAYLOAD_MAX_BYTES};

impl Inner {
    /// Asks the server, where it tells. One that fails to is no reason for anybody to fail: all is data then.
    pub(super) async fn extents(&self, offset: u64, len: u64, most: usize) -> Result<Vec<Extent>, StoreError> {
        let _under_way = self.begin(false, offset, len)?;
        let size = self.client.size_told();
        let Some(number) = self.client.export.get().allocation.filter(|_| len > 0 && offset < size) else {
            return Ok(vec![Extent::data(len)]);
        };
        // A block of the server is at most 64 KiB, so the request stays within 32 bits.
        let asked = (offset + len).min(size).min(offset + NO_PAYLOAD_MAX_BYTES - offset % SECTOR_BYTES) - offset;
        let (start, span) = self.blocks_around(offset, asked);
        let flags = if most == 1 { wire::CMD_REQ_ONE } else { 0 };
        let (result, bufs) =
            self.client.submit(Command::BlockStatus, flags, start, span as u32, Vec::new(), 0..0).await;
        match result {
            Ok(()) => {}
            Err(StoreError::Io { .. }) => return Ok(vec![Extent::data(len)]),
            Err(error) => return Err(error),
        }
        let payload = bufs.first().map_or(&[][..], |buf| buf.as_slice());
        let mut found = clip(payload, number, offset - start, asked, most);
        if found.is_empty() {
            found.push(Extent::data(len));
        }
        Ok(found)
    }
}

/// The extents of a block status' payload that lie within `skip..skip + len` of what it describes, at most `most`.
/// Neighbours of one kind are one. Nothing, if it is of another context.
fn clip(payload: &[u8], number: u32, skip: u64, len: u64, most: usize) -> Vec<Extent> {
    let mut cursor = Cursor(payload);
    let mut found: Vec<Extent> = Vec::new();
    if cursor.u32() != Some(number) {
        return found;
    }
    let (mut at, end) = (0u64, skip + len);
    while let (Some(extent), Some(flags)) = (cursor.u32(), cursor.u32()) {
        let (from, to) = (at.max(skip), (at + u64::from(extent)).min(end));
        at += u64::from(extent);
        if from >= to {
            continue;
        }
        let (hole, zero) = (flags & wire::STATE_HOLE != 0, flags & wire::STATE_ZERO != 0);
        let full = found.len() == most;
        match found.last_mut() {
            Some(last) if (last.hole, last.zero) == (hole, zero) => last.len_bytes += to - from,
            _ if full => break,
            _ => found.push(Extent { len_bytes: to - from, hole, zero }),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn payload(number: u32, extents: &[(u32, u32)]) -> Vec<u8> {
        let words = extents.iter().flat_map(|(len, flags)| [*len, *flags]);
        std::iter::once(number).chain(words).flat_map(u32::to_be_bytes).collect()
    }

    #[test]
    fn what_lies_outside_is_cut_off_and_neighbours_are_joined() {
        let all = payload(7, &[(100, 0), (50, 3), (50, 3), (0, 1), (1000, 0), (u32::MAX, 1)]);
        let spans = |skip, len, most| -> Vec<(u64, bool, bool)> {
            clip(&all, 7, skip, len, most).iter().map(|e| (e.len_bytes, e.hole, e.zero)).collect()
        };
        assert_eq!(spans(0, 200, 9), [(100, false, false), (100, true, true)]);
        assert_eq!(spans(120, 100, 9), [(80, true, true), (20, false, false)]);
        assert_eq!(spans(0, 2000, 2), [(100, false, false), (100, true, true)]);
        assert!(clip(&all, 8, 0, 100, 9).is_empty());
    }

    proptest! {
        #[test]
        fn extents_lie_within_the_request_whatever_the_server_says(
            extents in prop::collection::vec((any::<u32>(), 0u32..5), 0..30),
            skip in 0u64..65_536, len in 1u64..1 << 31, most in 1usize..10, cut in 0usize..8,
        ) {
            let all = payload(1, &extents);
            let found = clip(&all[..all.len() - cut.min(all.len())], 1, skip, len, most);
            prop_assert!(found.len() <= most);
            prop_assert!(found.iter().all(|extent| extent.len_bytes > 0));
            prop_assert!(found.iter().map(|extent| extent.len_bytes).sum::<u64>() <= len);
        }
    }
}
