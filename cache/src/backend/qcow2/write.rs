//! Writes, allocation, zeroes and discards.
//!
//! A write to clusters that the image has goes straight there. Any other is made whole: what the clusters' edges held before
//! is read, the whole clusters are written to where imago has found room, and only then does the table point to them. The
//! guest is answered when the tables are in the file.

use super::Inner;
use super::read::{Piece, Place};
use crate::backend::StoreError;
use crate::backend::layer::Owner;
use crate::engine::{AlignedBuf, IoBuf, bufs};
use imago::ShallowMapping;
use imago::format::drivers::FormatDriverInstance;
use std::rc::Rc;

/// What becomes of the clusters of a range that is zeroed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Zeroing {
    KeepSpace,
    GiveUpSpace,
}

impl Inner {
    pub(super) async fn write(
        self: &Rc<Self>,
        offset: u64,
        list: Vec<IoBuf>,
        fua: bool,
    ) -> (Result<(), StoreError>, Vec<IoBuf>) {
        let len = bufs::total_len(&list);
        let _under_way = match self.begin_change(offset, len as u64) {
            Ok(under_way) => under_way,
            Err(error) => return (Err(error), list),
        };
        let _shared = self.gate.shared().await;
        let (mut result, list) = self.write_ungated(offset, list, len).await;
        if result.is_ok() && fua {
            result = self.container.sync().await;
        }
        (result, list)
    }

    async fn write_ungated(
        self: &Rc<Self>,
        offset: u64,
        list: Vec<IoBuf>,
        len: usize,
    ) -> (Result<(), StoreError>, Vec<IoBuf>) {
        let pieces = match self.pieces(offset, len).await {
            Ok(pieces) => pieces,
            Err(error) => return (Err(error), list),
        };
        let range = offset..offset + len as u64;
        if pieces.iter().all(is_writable) {
            // A pointer to one of these clusters may not be in the file yet.
            self.ranges.settled(&range).await;
            if let [Piece { place: Place::File { offset, .. }, .. }] = pieces[..] {
                return self.container.write_data(offset, list, false).await;
            }
        }
        let mut data = AlignedBuf::new(len);
        bufs::copy_out(&list, 0, &mut data);
        (self.write_parts(offset, &data).await, list)
    }

    async fn write_parts(self: &Rc<Self>, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        let cluster_bytes = self.cluster_bytes();
        let end = offset + data.len() as u64;
        let clusters = offset - offset % cluster_bytes..end.next_multiple_of(cluster_bytes);
        let _held = self.ranges.hold(clusters).await;
        let mut allocated = false;
        // Looked up anew: others may have allocated while this waited.
        for piece in self.pieces(offset, data.len()).await? {
            let part = &data[piece.at..piece.at + piece.len];
            match piece.place {
                Place::File { offset, writable: true } => {
                    let (result, _) =
                        self.container.write_data(offset, vec![AlignedBuf::copy_of(part).into()], false).await;
                    result?;
                }
                place => {
                    let gives_up = matches!(place, Place::Compressed | Place::File { .. });
                    self.allocate(offset + piece.at as u64, part, gives_up).await?;
                    allocated = true;
                }
            }
        }
        if allocated {
            self.commit().await?;
            self.map.set(offset, end - offset, Owner::Own);
        }
        Ok(())
    }

    /// Gives clusters that have no place of their own one, with `data` in them at `offset`. `gives_up`: what held their content
    /// before is free afterwards.
    async fn allocate(self: &Rc<Self>, offset: u64, data: &[u8], gives_up: bool) -> Result<(), StoreError> {
        let cluster_bytes = self.cluster_bytes();
        let end = offset + data.len() as u64;
        let first = offset - offset % cluster_bytes;
        let last = end.next_multiple_of(cluster_bytes).min(self.header.size_bytes);
        let mut whole = AlignedBuf::new((last - first) as usize);
        let (from, to) = ((offset - first) as usize, (end - first) as usize);
        self.read_edge(first, &mut whole[..from]).await?;
        whole[from..to].copy_from_slice(data);
        self.read_edge(end, &mut whole[to..]).await?;

        // Else others could take what this gives up between their look at it and their allocation.
        let _alone = if gives_up { Some(self.taking.alone().await) } else { None };
        let _shared = if gives_up { None } else { Some(self.taking.shared().await) };
        let mut at = 0;
        while at < whole.len() {
            let here = first + at as u64;
            self.settle_freed().await?;
            let _coming = self.commits.coming();
            let _permit = self.allocations.acquire().await;
            let preparing = self.preparing.shared().await;
            let len = self.allocatable(here, (whole.len() - at) as u64).await?;
            let prepared = self.image.prepare_data_mapping(here, len, true).await;
            drop(preparing);
            let prepared = prepared.map_err(|error| self.failed("allocate", error))?;
            let take = usize::try_from(prepared.length()).unwrap_or(usize::MAX).min(whole.len() - at);
            if take == 0 {
                return Err(self.damaged("imago allocates nothing"));
            }
            let part = AlignedBuf::copy_of(&whole[at..at + take]);
            let (result, _) = self.container.write_data(prepared.offset(), vec![part.into()], true).await;
            result?;
            self.changed(here, take as u64);
            let _freeing = gives_up.then(|| self.container.freeing());
            let committed = self.image.commit_data_mapping(prepared).await;
            committed.map_err(|error| self.failed("allocate", error))?;
            at += take;
        }
        Ok(())
    }

    /// How much imago is asked to allocate at a time. A cluster that reads as zeroes may have kept its space. The first of a
    /// request gets it back; the space of others imago gives up, where it does not lie behind the first, and nobody learns
    /// of it.
    async fn allocatable(&self, offset: u64, len: u64) -> Result<u64, StoreError> {
        let mapping = self.image.get_mapping(offset, len).await;
        let (mapping, found) = mapping.map_err(|error| self.failed("look up", error))?;
        match mapping {
            ShallowMapping::Zero { explicit: true, .. } => Ok(len.min(self.cluster_bytes())),
            _ => Ok(len.min(found)),
        }
    }

    /// What the disk holds of a cluster beside what is written.
    async fn read_edge(&self, offset: u64, edge: &mut [u8]) -> Result<(), StoreError> {
        if edge.is_empty() {
            return Ok(());
        }
        let (result, bufs) = self.read_ungated(offset, vec![IoBuf::heap(edge.len())]).await;
        result?;
        bufs::copy_out(&bufs, 0, edge);
        Ok(())
    }

    /// Clusters are given up and read as zeroes. What covers no whole cluster is left as it is.
    pub(super) async fn discard(self: &Rc<Self>, offset: u64, len: u64) -> Result<(), StoreError> {
        let _under_way = self.begin_change(offset, len)?;
        if self.header.version < 3 {
            // Without zero clusters what is below would show.
            return Ok(());
        }
        match self.whole_clusters(offset, len) {
            Some((start, end)) => self.zero_clusters(start, end, Zeroing::GiveUpSpace).await,
            None => Ok(()),
        }
    }

    pub(super) async fn write_zeroes(
        self: &Rc<Self>,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> Result<(), StoreError> {
        let _under_way = self.begin_change(offset, len)?;
        let how = if may_unmap { Zeroing::GiveUpSpace } else { Zeroing::KeepSpace };
        let whole = self.whole_clusters(offset, len).filter(|_| self.header.version >= 3);
        let Some((start, end)) = whole else { return self.zero_by_writing(offset, len).await };
        self.zero_by_writing(offset, start - offset).await?;
        self.zero_by_writing(end, (offset + len) - end).await?;
        self.zero_clusters(start, end, how).await
    }

    /// The whole clusters within a range; the disk's last one is whole where the disk ends.
    fn whole_clusters(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let cluster_bytes = self.cluster_bytes();
        let start = offset.next_multiple_of(cluster_bytes);
        let end = match offset + len {
            end if end == self.header.size_bytes => end,
            end => end - end % cluster_bytes,
        };
        (start < end).then_some((start, end))
    }

    async fn zero_clusters(self: &Rc<Self>, start: u64, end: u64, how: Zeroing) -> Result<(), StoreError> {
        // Nobody may be on the way to a cluster that is given up and taken for something else.
        let alone = self.gate.alone().await;
        let mut at = start;
        while at < end {
            let (place, found) = self.place(at, end - at).await?;
            let len = found.min(end - at);
            if place == Place::Zero {
                // Nothing to change: a new disk that is trimmed as a whole must not get tables for all of it.
                at += len;
                continue;
            }
            let gives_up = match place {
                // There may be no table yet for these, and nothing to give up.
                Place::Below => {
                    self.settle_freed().await?;
                    false
                }
                Place::File { writable: true, .. } => how == Zeroing::GiveUpSpace,
                _ => true,
            };
            self.changed(at, len);
            let freeing = gives_up.then(|| self.container.freeing());
            let zeroed = match how {
                Zeroing::KeepSpace => self.image.ensure_zero_mapping(at, len).await,
                // SAFETY: asks that nobody uses a place that was looked up before: `alone` waits for all who do, and keeps
                // others out until the places are gone.
                Zeroing::GiveUpSpace => unsafe { self.image.discard_to_zero_unsafe(at, len) }.await,
            };
            drop(freeing);
            let (from, len) = zeroed.map_err(|error| self.failed("write zeroes", error))?;
            if from != at || len == 0 {
                return Err(self.damaged("imago zeroes something else"));
            }
            self.note_zeroed(from, from + len);
            self.changed(from, len);
            at += len;
        }
        drop(alone);
        self.commit().await
    }

    /// A page of which only a part is zero now is this image's own.
    fn note_zeroed(&self, start: u64, end: u64) {
        let unit = self.map.unit_bytes();
        let whole = match end {
            end if end == self.header.size_bytes => start.next_multiple_of(unit)..end,
            end => start.next_multiple_of(unit)..end - end % unit,
        };
        if whole.start >= whole.end {
            return self.map.set(start, end - start, Owner::Own);
        }
        self.map.set(whole.start, whole.end - whole.start, Owner::Zero);
        for edge in [start..whole.start, whole.end..end].into_iter().filter(|edge| !edge.is_empty()) {
            self.map.set(edge.start, edge.end - edge.start, Owner::Own);
        }
    }

    async fn zero_by_writing(self: &Rc<Self>, mut offset: u64, mut len: u64) -> Result<(), StoreError> {
        const STEP_BYTES: u64 = 1 << 20;
        while len > 0 {
            let step = len.min(STEP_BYTES);
            let _shared = self.gate.shared().await;
            let zeroes = vec![AlignedBuf::zeroed(step as usize).into()];
            self.write_ungated(offset, zeroes, step as usize).await.0?;
            (offset, len) = (offset + step, len - step);
        }
        Ok(())
    }
}

fn is_writable(piece: &Piece) -> bool {
    matches!(piece.place, Place::File { writable: true, .. })
}
