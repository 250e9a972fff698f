//! Where content is, and reading it.
//!
//! A compressed cluster is decompressed as a whole; the last few are kept, so that a guest that reads on page by page does
//! not decompress the same cluster again and again. Its pages go to the RAM tier decompressed, as any others.

use super::Inner;
use crate::backend::layer::Owner;
use crate::backend::{Backend, PAGE, StoreError};
use crate::engine::{AlignedBuf, IoBuf, bufs};
use futures_util::future::join_all;
use imago::ShallowMapping;
use imago::format::drivers::FormatDriverInstance;
use imago::io_buffers::IoVectorMut;
use std::rc::Rc;

/// Decompressed clusters that an image keeps, but one at least.
const INFLATED_MAX_BYTES: u64 = 1 << 20;
/// A look at the tables takes this many units along: they lie in the same table.
const LOOK_AHEAD_UNITS: u64 = 256;
/// Rounds of a read whose clusters change under it.
const ROUNDS: usize = 8;

/// Where a part of a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// At this offset of the image's file; `writable`: in place.
    File {
        offset: u64,
        writable: bool,
    },
    Zero,
    Below,
    Compressed,
}

/// A part of a request; `at` is its position there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) at: usize,
    pub(super) len: usize,
    pub(super) place: Place,
}

/// The content of a part is not where it was looked for any more.
struct Moved;

impl Inner {
    pub(super) async fn read(&self, offset: u64, list: Vec<IoBuf>) -> (Result<(), StoreError>, Vec<IoBuf>) {
        let len = bufs::total_len(&list);
        let limit = self.header.size_bytes.next_multiple_of(PAGE);
        let _under_way = match super::super::check_range(offset, len as u64, limit).and_then(|()| self.begin()) {
            Ok(under_way) => under_way,
            Err(error) => return (Err(error), list),
        };
        let _shared = self.gate.shared().await;
        self.read_ungated(offset, list).await
    }

    /// For those who are through the gate already.
    pub(super) async fn read_ungated(&self, offset: u64, mut list: Vec<IoBuf>) -> (Result<(), StoreError>, Vec<IoBuf>) {
        let len = bufs::total_len(&list);
        for _ in 0..ROUNDS {
            let pieces = match self.pieces(offset, len).await {
                Ok(pieces) => pieces,
                Err(error) => return (Err(error), list),
            };
            if let [Piece { place: Place::File { offset, .. }, .. }] = pieces[..] {
                return self.container.file().read(offset, list).await;
            }
            match self.read_pieces(offset, &pieces, &mut list).await {
                Ok(Ok(())) => return (Ok(()), list),
                Ok(Err(Moved)) => {}
                Err(error) => return (Err(error), list),
            }
        }
        (Err(self.damaged("a compressed cluster cannot be found; see `qemu-img check`")), list)
    }

    /// Where the parts of `offset..offset + len` are, in order; what lies beyond the disk is zero.
    pub(super) async fn pieces(&self, offset: u64, len: usize) -> Result<Vec<Piece>, StoreError> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut at = 0;
        while at < len {
            let (place, found) = self.place(offset + at as u64, (len - at) as u64).await?;
            let take = usize::try_from(found).unwrap_or(usize::MAX).min(len - at);
            match pieces.last_mut() {
                Some(last) if continues(last, place) => last.len += take,
                _ => pieces.push(Piece { at, len: take, place }),
            }
            at += take;
        }
        Ok(pieces)
    }

    /// Where the content at `offset` is, and for how many bytes, at least one and perhaps more than `len`, that is so.
    pub(super) async fn place(&self, offset: u64, len: u64) -> Result<(Place, u64), StoreError> {
        let mapping = self.image.get_mapping(offset, len).await;
        let (mapping, found) = mapping.map_err(|error| self.failed("look up", error))?;
        let place = match mapping {
            ShallowMapping::Raw { offset, writable, .. } => Place::File { offset, writable },
            ShallowMapping::Zero { explicit: false, .. } if self.below.is_some() => Place::Below,
            ShallowMapping::Zero { .. } => Place::Zero,
            ShallowMapping::Special { .. } => Place::Compressed,
            ShallowMapping::Eof { .. } => return Ok((Place::Zero, len)),
            _ => return Err(self.damaged("imago names a place that is not known here")),
        };
        match found {
            0 => Err(self.damaged("its tables lead nowhere; see `qemu-img check`")),
            _ => Ok((place, found)),
        }
    }

    async fn read_pieces(
        &self,
        offset: u64,
        pieces: &[Piece],
        list: &mut [IoBuf],
    ) -> Result<Result<(), Moved>, StoreError> {
        let parts = join_all(pieces.iter().map(|piece| self.read_piece(offset + piece.at as u64, piece))).await;
        for (piece, part) in pieces.iter().zip(parts) {
            match part? {
                Ok(Some(part)) => drop(bufs::copy_in(list, piece.at, &part[..piece.len])),
                Ok(None) => bufs::zero(list, piece.at..piece.at + piece.len),
                Err(Moved) => return Ok(Err(Moved)),
            }
        }
        Ok(Ok(()))
    }

    /// `None` for zeroes.
    async fn read_piece(&self, offset: u64, piece: &Piece) -> Result<Result<Option<AlignedBuf>, Moved>, StoreError> {
        match piece.place {
            Place::Zero => Ok(Ok(None)),
            Place::File { offset, .. } => {
                let (result, mut bufs) = self.container.file().read(offset, vec![IoBuf::heap(piece.len)]).await;
                result?;
                match bufs.pop() {
                    Some(IoBuf::Heap(part)) => Ok(Ok(Some(part))),
                    _ => Err(StoreError::Closed { store: self.identity.clone() }),
                }
            }
            Place::Below => {
                let Some(below) = &self.below else { return Ok(Ok(None)) };
                // What lies behind its end is zero.
                let there = below.size_bytes.saturating_sub(offset).min(piece.len as u64) as usize;
                if there == 0 {
                    return Ok(Ok(None));
                }
                let part = (below.read)(offset, there).await?;
                if there == piece.len {
                    return Ok(Ok(Some(part)));
                }
                let mut whole = AlignedBuf::zeroed(piece.len);
                whole[..there].copy_from_slice(&part[..there]);
                Ok(Ok(Some(whole)))
            }
            Place::Compressed => self.inflate(offset, piece.len).await.map(|part| part.map(Some)),
        }
    }

    /// Reads from compressed clusters.
    async fn inflate(&self, offset: u64, len: usize) -> Result<Result<AlignedBuf, Moved>, StoreError> {
        let cluster_bytes = self.cluster_bytes();
        let mut out = AlignedBuf::new(len);
        let mut at = 0;
        while at < len {
            let here = offset + at as u64;
            let within = (here % cluster_bytes) as usize;
            let take = (cluster_bytes as usize - within).min(len - at);
            let Ok(cluster) = self.inflated(here - within as u64).await? else { return Ok(Err(Moved)) };
            // The disk may end within its last cluster, but a cluster is always whole.
            out[at..at + take].copy_from_slice(&cluster[within..within + take]);
            at += take;
        }
        Ok(Ok(out))
    }

    async fn inflated(&self, cluster: u64) -> Result<Result<Rc<AlignedBuf>, Moved>, StoreError> {
        let known = self.inflated.borrow().iter().find(|(at, _)| *at == cluster).map(|(_, data)| Rc::clone(data));
        if let Some(known) = known {
            return Ok(Ok(known));
        }
        let _permit = self.inflations.acquire().await;
        let changes = self.changes.get();
        let mut data = AlignedBuf::new(self.cluster_bytes() as usize);
        let left = self.image.try_readv_special(IoVectorMut::from(&mut data[..]), cluster).await;
        if left.map_err(|error| self.failed("decompress", error))?.is_some() {
            return Ok(Err(Moved));
        }
        let data = Rc::new(data);
        if changes == self.changes.get() {
            let keep = (INFLATED_MAX_BYTES / self.cluster_bytes()).max(1) as usize;
            let mut inflated = self.inflated.borrow_mut();
            while inflated.len() >= keep {
                inflated.pop_front();
            }
            inflated.push_back((cluster, Rc::clone(&data)));
        }
        // Decompressing takes time that others on this shard may want.
        self.shard.yield_now().await;
        Ok(Ok(data))
    }

    /// The mapping of the range has changed.
    pub(super) fn changed(&self, offset: u64, len: u64) {
        self.changes.set(self.changes.get() + 1);
        let (start, end) = (offset, offset.saturating_add(len));
        let cluster_bytes = self.cluster_bytes();
        self.inflated.borrow_mut().retain(|(at, _)| *at >= end || at + cluster_bytes <= start);
    }

    /// Looks up who owns the range, and some of what follows.
    pub(super) async fn locate(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let _under_way = self.begin()?;
        let unit = self.map.unit_bytes();
        let size = self.header.size_bytes;
        let window = unit * LOOK_AHEAD_UNITS;
        let mut at = offset - offset % window;
        let end = offset.saturating_add(len).next_multiple_of(window).min(size);
        while at < end {
            let changes = self.changes.get();
            let (owner, found) = self.owner(at, end - at).await?;
            // A change in between may have made the answer out of date before it was noted.
            if changes == self.changes.get() {
                self.map.found(at, found, owner);
                at += found;
            }
        }
        Ok(())
    }

    /// Who owns the unit at `at`, and for how many bytes, whole units or up to the disk's end, that is so.
    async fn owner(&self, at: u64, len: u64) -> Result<(Owner, u64), StoreError> {
        let unit = self.map.unit_bytes();
        let (place, found) = self.place(at, len).await?;
        if found >= len || found >= unit {
            let whole = if found >= len { len } else { found - found % unit };
            return Ok((owner(place), whole));
        }
        // Clusters smaller than a page: the page is whole only in this image's view, unless all its clusters agree.
        let (owner_of_first, mut seen, limit) = (owner(place), found, unit.min(len));
        let mut agreed = true;
        while seen < limit {
            let (place, found) = self.place(at + seen, limit - seen).await?;
            agreed &= owner(place) == owner_of_first;
            seen += found;
        }
        Ok((if agreed { owner_of_first } else { Owner::Own }, limit))
    }
}

fn owner(place: Place) -> Owner {
    match place {
        Place::File { .. } | Place::Compressed => Owner::Own,
        Place::Zero => Owner::Zero,
        Place::Below => Owner::Below,
    }
}

fn continues(last: &Piece, next: Place) -> bool {
    match (last.place, next) {
        (Place::File { offset, writable }, Place::File { offset: then, writable: too }) => {
            offset + last.len as u64 == then && writable == too
        }
        (last, next) => last == next,
    }
}
