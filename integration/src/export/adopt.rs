//! A connection given up by one process and taken over by another: [`Device`] and protocol handler to
//! [`ConnectionState`] and back. What comes in goes through the same checks as a front-end's messages.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use vhost::vhost_user::message::{FrontendReq, VhostUserInflight, VhostUserVringAddrFlags};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError, VhostUserBackendReqHandlerMut};

use super::handler::{Device, HandlerError};
use super::memory::{GuestMemory, RegionSpec};
use super::ring::{Ring, RingAddresses};
use super::socket::replace_descriptor;
use super::state::{ConnectionState, InflightState, RegionState, RingState};

/// A connection that cannot be gone on with.
#[derive(Debug, Error)]
pub(super) enum AdoptError {
    #[error("the front-end's state: {0}")]
    State(#[from] VhostError),
    #[error("the connection: {0}")]
    Socket(#[from] io::Error),
}

/// A message without descriptors, as a front-end sends it.
fn message(code: FrontendReq, payload: &[u8]) -> Vec<u8> {
    // Version 1, no answer asked for.
    let header = [code as u32, 1, payload.len() as u32];
    header.iter().flat_map(|word| word.to_ne_bytes()).chain(payload.iter().copied()).collect()
}

/// A protocol handler on `stream` that knows what was agreed on: it hears the same words again, on a socket of our own
/// that `stream` then takes the place of.
pub(super) fn resume_protocol(
    stream: &UnixStream,
    device: Arc<Mutex<Device>>,
    features: u64,
    protocol_features: u64,
) -> Result<BackendReqHandler<Mutex<Device>>, AdoptError> {
    let (mut front, back) = UnixStream::pair()?;
    let mut protocol = BackendReqHandler::from_stream(back, device);
    for (code, words) in [
        (FrontendReq::GET_FEATURES, &[][..]),
        (FrontendReq::SET_FEATURES, &[features]),
        (FrontendReq::SET_PROTOCOL_FEATURES, &[protocol_features]),
    ] {
        let payload: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        front.write_all(&message(code, &payload))?;
        protocol.handle_request()?;
    }
    replace_descriptor(stream, protocol.as_raw_fd())?;
    Ok(protocol)
}

impl Device {
    /// The state of a device whose rings have been stopped, with copies of all descriptors.
    pub(super) fn capture(&self, socket: &UnixStream) -> io::Result<ConnectionState<OwnedFd>> {
        let (memory, _) = self.memory.get();
        let region = |(spec, file): (RegionSpec, &File)| {
            let RegionSpec { guest_addr, len, user_addr, file_offset } = spec;
            let file = file.try_clone()?.into();
            Ok::<_, io::Error>(RegionState { file, guest_addr, len, user_addr, file_offset })
        };
        let inflight = self.inflight.as_ref().and_then(|region| region.parts()).map(|parts| {
            let (file, mmap_offset, mmap_size, num_queues, queue_size) = parts;
            let file = file.try_clone()?.into();
            Ok::<_, io::Error>(InflightState { file, mmap_offset, mmap_size, num_queues, queue_size })
        });
        let ring = |ring: &super::handler::RingState| {
            Ok::<_, io::Error>(RingState {
                size: ring.size,
                addresses: ring.addresses.map(|at| [at.descriptors, at.used, at.available]),
                base: ring.base,
                kick: ring.kick.as_ref().map(|fd| fd.try_clone()).transpose()?,
                call: ring.call.copy()?,
                err: ring.err.copy()?,
                enabled: ring.enabled,
            })
        };
        Ok(ConnectionState {
            socket: socket.try_clone()?.into(),
            channel: self.channel.copy()?,
            features: self.features,
            protocol_features: self.protocol_features,
            memory: memory.files().map(region).collect::<Result<_, _>>()?,
            inflight: inflight.transpose()?,
            rings: self.rings.iter().map(ring).collect::<Result<_, _>>()?,
        })
    }

    /// Takes up what a predecessor left, and starts the rings that ran. Features have been agreed on before
    /// ([`resume_protocol`]).
    fn restore(
        &mut self,
        channel: Option<OwnedFd>,
        memory: Vec<RegionState<OwnedFd>>,
        inflight: Option<InflightState<OwnedFd>>,
        rings: Vec<RingState<OwnedFd>>,
    ) -> Result<(), VhostError> {
        let table = memory.into_iter().map(|region| {
            let RegionState { file, guest_addr, len, user_addr, file_offset } = region;
            (RegionSpec { guest_addr, len, user_addr, file_offset }, File::from(file))
        });
        self.set_memory(GuestMemory::from_table(table.collect()).map_err(HandlerError::from)?);
        if let Some(InflightState { file, mmap_offset, mmap_size, num_queues, queue_size }) = inflight {
            let inflight = VhostUserInflight::new(mmap_size, mmap_offset, num_queues, queue_size);
            self.set_inflight_fd(&inflight, file.into())?;
        }
        self.channel.set(channel);
        for (index, ring) in (0_u32..).zip(rings) {
            if let Some(size) = ring.size {
                self.set_vring_num(index, u32::from(size))?;
            }
            self.set_vring_base(index, u32::from(self.answered(&ring).unwrap_or(ring.base)))?;
            if let Some([descriptors, used, available]) = ring.addresses {
                let flags = VhostUserVringAddrFlags::empty();
                self.set_vring_addr(index, flags, descriptors, used, available, 0)?;
            }
            let number = u8::try_from(index).map_err(|_| VhostError::InvalidParam)?;
            for (fd, is_call) in [(ring.call, true), (ring.err, false)] {
                let Some(fd) = fd.map(File::from) else { continue };
                if is_call { self.set_vring_call(number, Some(fd))? } else { self.set_vring_err(number, Some(fd))? }
            }
            self.set_vring_enable(index, ring.enabled)?;
            if let Some(kick) = ring.kick {
                self.set_vring_kick(number, Some(kick.into()))?;
            }
        }
        Ok(())
    }
}

impl Device {
    /// How many requests of a ring have been answered, by the ring itself: with none under way the base, and the truth even if
    /// somebody has run the ring since its state was taken.
    fn answered(&self, ring: &RingState<OwnedFd>) -> Option<u16> {
        let (memory, _) = self.memory.get();
        let [descriptors, used, available] = ring.addresses?;
        let size = ring.size.filter(|size| size.is_power_of_two())?;
        Ring::new(memory, size, RingAddresses { descriptors, available, used }).ok().map(|ring| ring.used_index())
    }
}

/// A connection that goes on.
pub(super) struct Adopted {
    pub(super) stream: UnixStream,
    pub(super) protocol: BackendReqHandler<Mutex<Device>>,
    pub(super) device: Arc<Mutex<Device>>,
}

/// Goes on with a connection: starts the rings that ran.
pub(super) fn adopt(device: Device, state: ConnectionState<OwnedFd>) -> Result<Adopted, AdoptError> {
    let ConnectionState { socket, channel, features, protocol_features, memory, inflight, rings } = state;
    let stream = UnixStream::from(socket);
    let device = Arc::new(Mutex::new(device));
    let protocol = resume_protocol(&stream, Arc::clone(&device), features, protocol_features)?;
    let restored = {
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.restore(channel, memory, inflight, rings).inspect_err(|_| device.stop_all())
    };
    restored?;
    Ok(Adopted { stream, protocol, device })
}
