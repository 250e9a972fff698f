//! Protocol messages → state of the rings. A ring runs while it has a size, addresses, a kick descriptor and is enabled;
//! [`Device`] starts and stops it as those come and go, in whatever order.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use thiserror::Error;
use vhost::VhostUserMemoryRegionBase as RegionBase;
use vhost::vhost_user::message::{
    BackendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error as VhostError, GpuBackend, VhostUserBackendReqHandlerMut};

use super::QueueRunner;
use super::config::{CONFIG_SPACE_BYTES, F_PROTOCOL_FEATURES};
use super::events::{EventSlot, checked_eventfd};
use super::inflight::{InflightError, InflightRegion};
use super::memory::{GuestMemory, MemoryCell, MemoryError, REGIONS_MAX, RegionSpec};
use super::queue::{DiskState, Queue, QueueParts, QueueStartError, QueueStopped};
use super::ring::RingAddresses;
use super::socket::send_now;

type VhostResult<T> = Result<T, VhostError>;

/// A message that makes no sense. The connection is closed after it.
#[derive(Debug, Error)]
pub(super) enum HandlerError {
    #[error("features {asked:#x} are not among those offered, {offered:#x}")]
    Features { asked: u64, offered: u64 },
    #[error("ring {index} does not exist, the disk has {num_queues}")]
    NoSuchRing { index: u32, num_queues: u16 },
    #[error("ring {index} cannot have {num} entries; it takes a power of two up to {max}")]
    RingSize { index: u32, num: u32, max: u16 },
    #[error("ring {index}: base {base} is past 65535")]
    RingBase { index: u32, base: u32 },
    #[error("ring {index} is running: stop it before {what} changes")]
    Running { index: u32, what: &'static str },
    #[error("ring {index} has no kick descriptor: rings that are polled are not supported")]
    Polled { index: u8 },
    #[error("ring {index}: {source}")]
    Event { index: u8, source: io::Error },
    #[error("ring {index} cannot start: {source}")]
    Start { index: u16, source: QueueStartError },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
}

impl From<HandlerError> for VhostError {
    fn from(error: HandlerError) -> Self {
        Self::ReqHandlerError(io::Error::other(error))
    }
}

/// The channel for messages of ours to the front-end.
#[derive(Debug, Default)]
pub(super) struct FrontendChannel(Mutex<Option<OwnedFd>>);

impl FrontendChannel {
    pub(super) fn set(&self, fd: Option<OwnedFd>) {
        *self.0.lock() = fd;
    }

    /// A copy of the channel.
    pub(super) fn copy(&self) -> io::Result<Option<OwnedFd>> {
        self.0.lock().as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: the front-end reads the configuration again. False if it has given us no
    /// channel; it then sees the change when it connects anew.
    pub(super) fn config_changed(&self) -> io::Result<bool> {
        let channel = self.0.lock();
        let Some(fd) = channel.as_ref() else { return Ok(false) };
        // Version 1 in the flags' lowest bits, no payload, no answer asked for.
        let header = [BackendReq::CONFIG_CHANGE_MSG.into(), 1, 0_u32];
        let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        send_now(fd, &bytes).map(|()| true)
    }
}

/// One ring as the front-end has described it so far.
#[derive(Debug, Default)]
pub(super) struct RingState {
    pub(super) size: Option<u16>,
    pub(super) addresses: Option<RingAddresses>,
    pub(super) base: u16,
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) call: Arc<EventSlot>,
    pub(super) err: Arc<EventSlot>,
    pub(super) enabled: bool,
    pub(super) running: bool,
}

/// One front-end's view of the disk. Lives as long as its connection.
pub(super) struct Device {
    disk: Arc<DiskState>,
    runner: Arc<dyn QueueRunner>,
    pub(super) channel: Arc<FrontendChannel>,
    pub(super) memory: Arc<MemoryCell>,
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) rings: Vec<RingState>,
    pub(super) inflight: Option<Arc<InflightRegion>>,
    /// Copy of the descriptor that comes with SET_BACKEND_REQ_FD: the `vhost` crate wraps the descriptor itself in a
    /// type that cannot send CONFIG_CHANGE_MSG.
    channel_fd: Option<OwnedFd>,
}

/// Protocol features offered. Not LOG_SHMFD (dirty logging), nor STATUS, which `vhost` does not speak.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

impl Device {
    pub(super) fn new(disk: Arc<DiskState>, runner: Arc<dyn QueueRunner>, channel: Arc<FrontendChannel>) -> Self {
        Self {
            disk,
            runner,
            channel,
            memory: Arc::default(),
            features: 0,
            protocol_features: 0,
            rings: Vec::new(),
            inflight: None,
            channel_fd: None,
        }
    }

    /// Keeps the descriptor for the SET_BACKEND_REQ_FD that is about to be handled.
    pub(super) fn expect_channel(&mut self, fd: Option<OwnedFd>) {
        self.channel_fd = fd;
    }

    /// Stops every running ring.
    pub(super) fn stop_all(&mut self) {
        for index in 0..self.rings.len() {
            self.stop_ring(index);
        }
    }

    fn ring(&mut self, index: u32) -> Result<(usize, &mut RingState), HandlerError> {
        let num_queues = self.disk.config.num_queues;
        if index >= u32::from(num_queues) {
            return Err(HandlerError::NoSuchRing { index, num_queues });
        }
        let at = index as usize;
        if self.rings.len() <= at {
            self.rings.resize_with(at + 1, RingState::default);
        }
        Ok((at, &mut self.rings[at]))
    }

    /// Starts the ring if it is complete and enabled, and not running yet.
    fn start_ring(&mut self, at: usize) -> Result<(), HandlerError> {
        // Without the feature there is no SET_VRING_ENABLE, and rings are enabled from the start.
        let always_enabled = self.features & 1 << F_PROTOCOL_FEATURES == 0;
        let ring = &self.rings[at];
        let (Some(size), Some(addresses), Some(kick)) = (ring.size, ring.addresses, &ring.kick) else { return Ok(()) };
        if ring.running || !(ring.enabled || always_enabled) {
            return Ok(());
        }
        let index = at as u16;
        let inflight = self.inflight.as_ref().map(|region| region.queue(index, size)).transpose()?;
        let queue = Queue::new(QueueParts {
            index,
            size,
            addresses,
            base: ring.base,
            features: self.features,
            memory: Arc::clone(&self.memory),
            disk: Arc::clone(&self.disk),
            kick: Arc::clone(kick),
            call: Arc::clone(&ring.call),
            err: Arc::clone(&ring.err),
            inflight,
        })
        .map_err(|source| HandlerError::Start { index, source })?;
        tracing::debug!(ring = index, size, resumed = queue.resumed(), "ring started");
        self.rings[at].running = true;
        self.runner.start(queue);
        Ok(())
    }

    fn stop_ring(&mut self, at: usize) {
        let Some(ring) = self.rings.get_mut(at).filter(|ring| ring.running) else { return };
        let QueueStopped { next_available, .. } = self.runner.stop(at as u16);
        ring.running = false;
        ring.base = next_available;
        tracing::debug!(ring = at, next_available, "ring stopped");
    }

    pub(super) fn set_memory(&self, memory: GuestMemory) {
        self.memory.set(memory);
        self.runner.memory_changed();
    }
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        // Deprecated; once meant to disable all rings.
        self.stop_all();
        Ok(())
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.stop_all();
        // The descriptors for calls and errors belong to the connection: QEMU sends the latter only once.
        for ring in &mut self.rings {
            *ring = RingState { call: Arc::clone(&ring.call), err: Arc::clone(&ring.err), ..RingState::default() };
        }
        self.inflight = None;
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.disk.config.features())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        let offered = self.disk.config.features();
        if features & !offered != 0 {
            return Err(HandlerError::Features { asked: features, offered }.into());
        }
        if features != self.features
            && let Some(at) = self.rings.iter().position(|ring| ring.running)
        {
            return Err(HandlerError::Running { index: at as u32, what: "the set of features" }.into());
        }
        self.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<Vec<RegionBase>>> {
        let table = regions.iter().map(spec).zip(files).collect();
        self.set_memory(GuestMemory::from_table(table).map_err(HandlerError::from)?);
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<RegionBase>> {
        let (now, _) = self.memory.get();
        self.set_memory(now.with(spec(region), fd).map_err(HandlerError::from)?);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        let (now, _) = self.memory.get();
        self.set_memory(now.without(spec(region)).map_err(HandlerError::from)?);
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        let max = self.disk.config.queue_size;
        let (_, ring) = self.ring(index)?;
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= max);
        if size.is_none() {
            return Err(HandlerError::RingSize { index, num, max }.into());
        }
        if ring.running && ring.size != size {
            return Err(HandlerError::Running { index, what: "its size" }.into());
        }
        ring.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let addresses = Some(RingAddresses { descriptors, available, used });
        let (at, ring) = self.ring(index)?;
        if ring.running && ring.addresses != addresses {
            return Err(HandlerError::Running { index, what: "its addresses" }.into());
        }
        ring.addresses = addresses;
        Ok(self.start_ring(at)?)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let (_, ring) = self.ring(index)?;
        if ring.running {
            return Err(HandlerError::Running { index, what: "its base" }.into());
        }
        ring.base = u16::try_from(base).map_err(|_| HandlerError::RingBase { index, base })?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        let (at, _) = self.ring(index)?;
        self.stop_ring(at);
        // Stopped until the next SET_VRING_KICK.
        let ring = &mut self.rings[at];
        ring.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(ring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (at, _) = self.ring(u32::from(index))?;
        let fd = fd.ok_or(HandlerError::Polled { index })?;
        let fd = checked_eventfd(fd.into()).map_err(|source| HandlerError::Event { index, source })?;
        // A running ring gets the new descriptor by starting anew from where it was.
        self.stop_ring(at);
        self.rings[at].kick = Some(Arc::new(fd));
        Ok(self.start_ring(at)?)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (_, ring) = self.ring(u32::from(index))?;
        let fd = fd.map(|fd| checked_eventfd(fd.into())).transpose();
        ring.call.set(fd.map_err(|source| HandlerError::Event { index, source })?);
        // Completions may have come while there was nobody to tell; an interrupt too many does no harm.
        ring.call.notify();
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (_, ring) = self.ring(u32::from(index))?;
        let fd = fd.map(|fd| checked_eventfd(fd.into())).transpose();
        ring.err.set(fd.map_err(|source| HandlerError::Event { index, source })?);
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        let (at, ring) = self.ring(index)?;
        ring.enabled = enable;
        if enable {
            self.start_ring(at)?;
        } else {
            self.stop_ring(at);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        let offered = PROTOCOL_FEATURES.bits();
        if features & !offered != 0 {
            return Err(HandlerError::Features { asked: features, offered }.into());
        }
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(u64::from(self.disk.config.num_queues))
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        let space = self.disk.config.config_space(self.disk.capacity_bytes.load(Ordering::Acquire));
        let (offset, size) = (offset as usize, size as usize);
        let end = offset.checked_add(size).filter(|end| *end <= CONFIG_SPACE_BYTES);
        let part = end.and_then(|end| space.get(offset..end));
        Ok(part.ok_or(HandlerError::Unsupported("reading past the configuration space"))?.to_vec())
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        // The one writable field is the write cache's mode, which is not offered.
        Err(HandlerError::Unsupported("writing to the configuration space").into())
    }

    fn set_backend_req_fd(&mut self, _wrapped: Backend) {
        self.channel.set(self.channel_fd.take());
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        let (num_queues, queue_size) = (asked.num_queues, asked.queue_size);
        let (file, mmap_size) = InflightRegion::create(num_queues, queue_size).map_err(HandlerError::from)?;
        Ok((VhostUserInflight::new(mmap_size, 0, num_queues, queue_size), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> VhostResult<()> {
        if let Some(at) = self.rings.iter().position(|ring| ring.running) {
            return Err(HandlerError::Running { index: at as u32, what: "the in-flight area" }.into());
        }
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *inflight;
        let region = InflightRegion::map(file, mmap_offset, mmap_size, num_queues, queue_size);
        self.inflight = Some(Arc::new(region.map_err(HandlerError::from)?));
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        Err(HandlerError::Unsupported("a GPU socket").into())
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        Err(HandlerError::Unsupported("sharing objects").into())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> VhostResult<Option<File>> {
        Err(HandlerError::Unsupported("transferring the device's state").into())
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        Err(HandlerError::Unsupported("transferring the device's state").into())
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        Err(HandlerError::Unsupported("shared memory regions").into())
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        Err(HandlerError::Unsupported("dirty logging").into())
    }
}

fn spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest_addr: region.guest_phys_addr,
        len: region.memory_size,
        user_addr: region.user_addr,
        file_offset: region.mmap_offset,
    }
}
