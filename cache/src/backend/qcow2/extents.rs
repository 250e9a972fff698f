//! Which parts of the disk hold data, in whichever image of the chain.
//!
//! A cluster that an image has is data, whatever is in it; what nobody has, or an image calls zero, is a hole that reads as
//! zeroes, as QEMU's own NBD server has it. The tables are asked and not the map of layers: a walk through a whole disk would
//! make the map forget what guests need.

use super::Inner;
use super::read::Place;
use crate::backend::{Extent, StoreError, check_range};

/// Looks at tables for one answer: a disk in small pieces is told of bit by bit.
const LOOKS: usize = 256;

const NOTHING: Extent = Extent { len_bytes: 0, hole: true, zero: true };

impl Inner {
    /// See [`Backend::extents`](crate::backend::Backend::extents).
    pub(super) async fn extents(&self, offset: u64, len: u64, most: usize) -> Result<Vec<Extent>, StoreError> {
        check_range(offset, len, self.header.size_bytes)?;
        let _under_way = self.begin()?;
        let (mut found, mut at, end) = (Vec::new(), offset, offset + len);
        for _ in 0..LOOKS {
            if at >= end {
                break;
            }
            let (place, span) = self.place(at, end - at).await?;
            let span = span.min(end - at);
            let parts = match place {
                Place::File { .. } | Place::Compressed => vec![Extent::data(span)],
                Place::Zero => vec![Extent { len_bytes: span, ..NOTHING }],
                Place::Below => self.extents_below(at, span, most).await?,
            };
            let before = at;
            for part in parts {
                if !push(&mut found, part, most) {
                    return Ok(found);
                }
                at += part.len_bytes;
            }
            if at == before {
                break;
            }
        }
        if found.is_empty() && len > 0 {
            found.push(Extent::data(len));
        }
        Ok(found)
    }

    /// What lies behind the end of the image below is zero.
    async fn extents_below(&self, offset: u64, len: u64, most: usize) -> Result<Vec<Extent>, StoreError> {
        match &self.below {
            Some(below) if offset < below.size_bytes => {
                (below.extents)(offset, len.min(below.size_bytes - offset), most).await
            }
            _ => Ok(vec![Extent { len_bytes: len, ..NOTHING }]),
        }
    }
}

/// Appends an extent; neighbours of one kind are one. False if it would be one too many.
fn push(found: &mut Vec<Extent>, next: Extent, most: usize) -> bool {
    let full = found.len() == most;
    match found.last_mut() {
        Some(last) if (last.hole, last.zero) == (next.hole, next.zero) => last.len_bytes += next.len_bytes,
        _ if full => return false,
        _ => found.push(next),
    }
    true
}
