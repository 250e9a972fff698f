//! A disk on images that stand on each other: each read goes to the storage of the image that holds the content.
//!
//! - [`Chain`]: the images of a disk, the writable one on top
//! - [`spread`], [`Disk::spread`]: pages of the disk by the storage that has them
//!
//! The storage of an image shows the whole disk as of that image, whatever is below. So it would be right to ask the top for
//! everything; but then every machine on one base would have a copy of the base in the cache. What an image does not hold is
//! therefore asked of the one below, whose storage all machines on it share: one copy, one profile. Which image holds what is
//! kept in [`LayerMap`]s. Below the top nothing is written, so what is in RAM of it may be read on any shard; what is
//! not is loaded on its own. A storage goes by offsets of the disk, not of the image's file: compressed clusters are cached
//! decompressed, and clusters smaller than a page need no care.

use super::read::{ReadData, Source};
use super::storage::Running;
use super::{Disk, Storage, local};
use crate::access::AccessOp;
use crate::arena::Pinned;
use crate::backend::{Extent, LayerMap, Owner, StoreError};
use crate::cache::StorageHandle;
use crate::counters::add;
use crate::policy::PrefetchRequest;
use crate::types::{BLOCK_BYTES, PAGE_BYTES, PageRange, StorageId};
use futures_util::future::join_all;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Parts, and blocks, that the fast path takes in one go.
const FAST_PARTS: usize = 8;
const FAST_PINS: usize = 17;
/// Looks at tables before a read takes everything from the top: a map that forgets as fast as it is filled.
const LOOKS: usize = 64;
static ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// The images of a disk, from the top down.
#[derive(Debug)]
pub(super) struct Chain {
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    id: StorageId,
    /// `None` for the top, which is the disk's own storage.
    handle: Option<StorageHandle>,
    /// `None` for a store that stands on nothing.
    map: Option<Arc<LayerMap>>,
    size_bytes: u64,
    /// The way to the SSD tier is being started on the layer's own shard.
    destaging: Arc<AtomicBool>,
}

impl Layer {
    fn of(handle: &StorageHandle) -> Layer {
        Layer {
            id: handle.id(),
            handle: Some(handle.clone()),
            map: handle.map().cloned(),
            size_bytes: handle.info().size_bytes,
            destaging: Arc::default(),
        }
    }
}

/// Who has a part of a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    Layer(usize),
    Zero,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    offset: u64,
    len: u64,
    target: Target,
}

/// Why a read cannot be dealt out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    /// Layer and offset of what is not known.
    Unknown(usize, u64),
    TooMany,
}

impl Chain {
    /// `None` for a storage that stands on nothing and holds everything itself.
    pub(super) fn of(storage: &Rc<Storage>) -> Option<Rc<Chain>> {
        let top = Layer {
            id: storage.id(),
            handle: None,
            map: Some(storage.map.clone()?),
            size_bytes: storage.info().size_bytes,
            destaging: Arc::default(),
        };
        let below = storage.below.iter().flat_map(StorageHandle::chain).map(Layer::of);
        Some(Rc::new(Chain { layers: std::iter::once(top).chain(below).collect() }))
    }

    /// Deals `offset..offset + len` out: each part goes to `take`, which may refuse it.
    fn deal(&self, offset: u64, len: u64, take: &mut dyn FnMut(Part) -> bool) -> Result<(), Stop> {
        let mut last: Option<Part> = None;
        let mut result = Ok(());
        self.route(0, offset, offset + len, &mut |from, to, target| {
            let target = match target {
                Ok(target) => target,
                Err(stop) => {
                    result = Err(stop);
                    return false;
                }
            };
            match &mut last {
                Some(part) if part.target == target => part.len += to - from,
                _ => {
                    let done = last.replace(Part { offset: from, len: to - from, target });
                    if !done.is_none_or(&mut *take) {
                        result = Err(Stop::TooMany);
                        return false;
                    }
                }
            }
            true
        });
        result?;
        if last.is_none_or(take) { Ok(()) } else { Err(Stop::TooMany) }
    }

    /// Passes on who has `start..end` as of layer `at`, in order, until told to stop.
    fn route(
        &self,
        at: usize,
        start: u64,
        end: u64,
        take: &mut dyn FnMut(u64, u64, Result<Target, Stop>) -> bool,
    ) -> bool {
        let layer = &self.layers[at];
        let page = PAGE_BYTES as u64;
        // What lies behind the end of an image below is zero, whatever is further down. The page in which it ends is whole
        // only in the image's own view.
        let (whole, all) = match at {
            0 => (end, end),
            _ => (layer.size_bytes - layer.size_bytes % page, layer.size_bytes.next_multiple_of(page)),
        };
        let mut go_on = true;
        let (inner, edge) = (end.min(whole), end.min(all));
        if start < inner {
            go_on = match &layer.map {
                None => take(start, inner, Ok(Target::Layer(at))),
                Some(map) => {
                    let unit = map.unit_bytes();
                    let mut go_on = true;
                    map.each(start, inner - start, |from, owner| {
                        let (from, to) = (from.max(start), (from + unit).min(inner));
                        go_on = go_on
                            && match owner {
                                Owner::Own => take(from, to, Ok(Target::Layer(at))),
                                Owner::Below if at + 1 < self.layers.len() => self.route(at + 1, from, to, take),
                                Owner::Zero | Owner::Below => take(from, to, Ok(Target::Zero)),
                                Owner::Unknown => take(from, to, Err(Stop::Unknown(at, from))),
                            };
                    });
                    go_on
                }
            };
        }
        let (start, edge) = (start.max(inner), edge.max(start));
        if go_on && start < edge {
            go_on = take(start, edge, Ok(Target::Layer(at)));
        }
        if go_on && edge < end {
            go_on = take(edge, end, Ok(Target::Zero));
        }
        go_on
    }

    /// Looks up who has what, on the layer's own shard.
    async fn locate(&self, storage: &Rc<Storage>, at: usize, offset: u64, len: u64) -> Result<(), StoreError> {
        let layer = &self.layers[at];
        let Some(handle) = &layer.handle else { return storage.backend.locate(offset, len).await };
        on_home(handle, move |storage| async move { storage.backend.locate(offset, len).await }).await
    }
}

/// Runs something where a storage lives.
async fn on_home<T, F, Fut>(handle: &StorageHandle, run: F) -> Result<T, StoreError>
where
    T: Send + 'static,
    F: FnOnce(Rc<Storage>) -> Fut + Send + 'static,
    Fut: Future<Output = Result<T, StoreError>> + 'static,
{
    let closed = || StoreError::Closed { store: handle.identity().to_owned() };
    if let Some(storage) = local(handle.id()) {
        return run(storage).await;
    }
    let id = handle.id();
    let call = handle.shard().call(move |_| async move {
        match local(id) {
            Some(storage) => Some(run(storage).await),
            None => None,
        }
    });
    call.await.ok().flatten().unwrap_or_else(|| Err(closed()))
}

/// Reads from a storage on any shard, through its part of the cache.
pub(crate) async fn read_copy(
    handle: &StorageHandle,
    offset: u64,
    len: usize,
) -> Result<crate::engine::AlignedBuf, StoreError> {
    let (data, _) = on_home(handle, move |storage| async move { storage.read(offset, len).await }).await?;
    let mut out = crate::engine::AlignedBuf::new(len);
    data.copy_to(|at, bytes| out[at..at + bytes.len()].copy_from_slice(bytes));
    Ok(out)
}

/// Asks a storage on any shard where its store holds data.
pub(crate) async fn extents_of(
    handle: &StorageHandle,
    offset: u64,
    len: u64,
    most: usize,
) -> Result<Vec<Extent>, StoreError> {
    on_home(handle, move |storage| async move { storage.backend.extents(offset, len, most).await }).await
}

/// Deals requests for pages of a disk out to the storages that have them; zeroes need none. Blocks until unknown parts have
/// been looked up: not for shard threads.
///
/// # Errors
/// An image's tables cannot be read.
pub fn spread(
    handle: &StorageHandle,
    requests: &[PrefetchRequest],
) -> Result<Vec<(StorageHandle, Vec<PrefetchRequest>)>, StoreError> {
    let chain = Chain { layers: handle.chain().map(Layer::of).collect() };
    let mut dealt: Vec<(StorageHandle, Vec<PrefetchRequest>)> =
        handle.chain().map(|handle| (handle.clone(), Vec::new())).collect();
    for request in requests {
        let (mut at, end) = (request.range.first * PAGE_BYTES as u64, request.range.end() * PAGE_BYTES as u64);
        let mut looks = 0;
        while at < end {
            let stop = chain.deal(at, end - at, &mut |part| {
                if let Target::Layer(layer) = part.target {
                    let range = PageRange::covering(part.offset, part.len);
                    dealt[layer].1.push(PrefetchRequest { range, ..*request });
                }
                at = part.offset + part.len;
                true
            });
            match stop {
                Err(Stop::Unknown(layer, from)) if looks < LOOKS => {
                    looks += 1;
                    let Some((handle, _)) = dealt.get(layer) else { break };
                    let (id, len) = (handle.id(), end - from);
                    let looking = handle.shard().call(move |_| async move {
                        match local(id) {
                            Some(storage) => storage.backend.locate(from, len).await,
                            None => Ok(()),
                        }
                    });
                    looking.wait().map_err(|_| StoreError::Closed { store: handle.identity().to_owned() })??;
                }
                _ => break,
            }
        }
    }
    Ok(dealt)
}

impl Disk {
    /// [`Disk::try_read`] on a chain.
    pub(super) fn try_read_chain(
        &self,
        chain: &Chain,
        offset: u64,
        len: usize,
        mut sink: impl FnMut(usize, &[u8]),
    ) -> bool {
        let none = Part { offset: 0, len: 0, target: Target::Zero };
        let (mut parts, mut count) = ([none; FAST_PARTS], 0);
        let dealt = chain.deal(offset, len as u64, &mut |part| match parts.get_mut(count) {
            Some(free) => {
                (*free, count) = (part, count + 1);
                true
            }
            None => false,
        });
        if len == 0 || dealt.is_err() {
            return false;
        }
        let parts = &parts[..count];
        let shared = self.storage.shared();
        let (mut pins, mut pinned) = ([const { None::<Pinned> }; FAST_PINS], 0);
        let mut core = shared.core();
        for part in parts {
            let Target::Layer(at) = part.target else { continue };
            let range = PageRange::covering(part.offset, part.len);
            if pinned + range.blocks().count() > FAST_PINS {
                return false;
            }
            let hit = core.read_hit(chain.layers[at].id, range, shared.now(), |_, slot| {
                pins[pinned] = shared.arena().pin(slot);
                pinned += 1;
            });
            if !hit {
                return false;
            }
        }
        drop(core);
        let (mut at, mut next) = (0, 0);
        for part in parts {
            let end = at + part.len as usize;
            match part.target {
                Target::Zero => each_zero(&mut at, end, &mut sink),
                Target::Layer(_) => {
                    let mut within = (part.offset % BLOCK_BYTES as u64) as usize;
                    while at < end {
                        let take = (BLOCK_BYTES - within).min(end - at);
                        if let Some(pin) = &pins[next] {
                            sink(at, pin.bytes(within, take));
                        }
                        (at, next, within) = (at + take, next + 1, 0);
                    }
                }
            }
        }
        add(&self.counters.reads, 1);
        add(&self.counters.read_bytes, len as u64);
        add(&self.counters.served_ram, 1);
        for part in parts {
            if let Target::Layer(at) = part.target {
                let layer = &chain.layers[at];
                self.note_on(layer.id, AccessOp::Read, part.offset, part.len, false);
                self.start_destage_of(layer);
            }
        }
        true
    }

    /// Blocks that this disk has used go to the SSD tier from their own shard.
    fn start_destage_of(&self, layer: &Layer) {
        if self.storage.ssd().is_none() || self.storage.shared().core().destage_backlog(layer.id) == 0 {
            return;
        }
        let Some(handle) = &layer.handle else { return self.storage.start_destage() };
        if layer.destaging.swap(true, Ordering::AcqRel) {
            return;
        }
        let (id, asked) = (layer.id, Arc::clone(&layer.destaging));
        handle.shard().spawn(move |_| async move {
            asked.store(false, Ordering::Release);
            if let Some(storage) = local(id) {
                storage.start_destage();
            }
        });
    }

    /// A read on a chain that the fast path could not serve.
    pub(super) async fn read_chain(
        &self,
        chain: &Chain,
        offset: u64,
        len: usize,
    ) -> Result<(ReadData, Source), StoreError> {
        let parts = self.deal_all(chain, offset, len as u64).await?;
        for part in &parts {
            if let Target::Layer(at) = part.target {
                self.note_on(chain.layers[at].id, AccessOp::Read, part.offset, part.len, true);
            }
        }
        let reads = parts.iter().map(|part| async move {
            let (from, len) = (part.offset, part.len as usize);
            match part.target {
                Target::Zero => Ok((ReadData::zeroes(len), Source::Ram)),
                Target::Layer(at) => match &chain.layers[at].handle {
                    None => self.storage.read(from, len).await,
                    Some(handle) => on_home(handle, move |storage| async move { storage.read(from, len).await }).await,
                },
            }
        });
        let mut source = Source::Ram;
        let mut data = Vec::with_capacity(parts.len());
        for read in join_all(reads).await {
            let (part, from) = read?;
            source = source.max(from);
            data.push(part);
        }
        match data.len() {
            1 => Ok((data.remove(0), source)),
            _ => Ok((ReadData::parts(data), source)),
        }
    }

    /// Which pages of which storage have `offset..offset + len`; without a handle, of the disk's own. Zeroes need none.
    ///
    /// # Errors
    /// An image's tables cannot be read.
    pub async fn spread(&self, offset: u64, len: u64) -> Result<Vec<(Option<StorageHandle>, PageRange)>, StoreError> {
        let _running = Running::new(&self.storage);
        let Some(chain) = &self.chain else { return Ok(vec![(None, PageRange::covering(offset, len))]) };
        let parts = self.deal_all(chain, offset, len).await?;
        let pages = parts.iter().filter_map(|part| match part.target {
            Target::Layer(at) => Some((chain.layers[at].handle.clone(), PageRange::covering(part.offset, part.len))),
            Target::Zero => None,
        });
        Ok(pages.collect())
    }

    async fn deal_all(&self, chain: &Chain, offset: u64, len: u64) -> Result<Vec<Part>, StoreError> {
        for _ in 0..LOOKS {
            let mut parts = Vec::new();
            let dealt = chain.deal(offset, len, &mut |part| {
                parts.push(part);
                true
            });
            match dealt {
                Ok(()) => return Ok(parts),
                Err(Stop::Unknown(at, from)) => chain.locate(&self.storage, at, from, offset + len - from).await?,
                Err(Stop::TooMany) => break,
            }
        }
        Ok(vec![Part { offset, len, target: Target::Layer(0) }])
    }
}

/// Passes zeroes on for `at..end`.
pub(super) fn each_zero(at: &mut usize, end: usize, sink: &mut dyn FnMut(usize, &[u8])) {
    while *at < end {
        let take = ZEROES.len().min(end - *at);
        sink(*at, &ZEROES[..take]);
        *at += take;
    }
}
