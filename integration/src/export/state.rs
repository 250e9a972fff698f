//! An export in a form that another process can go on with: listening socket, connection, everything that the front-end
//! has said, and the descriptors it has sent. Guest and front-end see no difference: the connection stays the same one.
//!
//! `F` is what stands for a descriptor: the descriptor itself, or its place in a parcel
//! ([`handover`](crate::handover)). A field that a later version adds needs a default.

use serde::{Deserialize, Serialize};

/// Listening socket and connection of an export that has been released.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExportState<F> {
    pub(super) listener: F,
    /// Device and inode of the socket's file.
    pub(super) file: (u64, u64),
    /// What the front-end knows.
    pub(super) capacity_bytes: u64,
    pub(super) connection: Option<ConnectionState<F>>,
}

/// A front-end and what it has said so far.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ConnectionState<F> {
    pub(super) socket: F,
    /// For messages of ours to the front-end.
    pub(super) channel: Option<F>,
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) memory: Vec<RegionState<F>>,
    pub(super) inflight: Option<InflightState<F>>,
    pub(super) rings: Vec<RingState<F>>,
}

/// A region of the guest's memory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RegionState<F> {
    pub(super) file: F,
    pub(super) guest_addr: u64,
    pub(super) len: u64,
    pub(super) user_addr: u64,
    pub(super) file_offset: u64,
}

/// In-flight memory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct InflightState<F> {
    pub(super) file: F,
    pub(super) mmap_offset: u64,
    pub(super) mmap_size: u64,
    pub(super) num_queues: u16,
    pub(super) queue_size: u16,
}

/// A ring that has been stopped.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RingState<F> {
    pub(super) size: Option<u16>,
    /// Descriptors, used, available: by the front-end's addresses.
    pub(super) addresses: Option<[u64; 3]>,
    /// The available entry to go on from.
    pub(super) base: u16,
    pub(super) kick: Option<F>,
    pub(super) call: Option<F>,
    pub(super) err: Option<F>,
    pub(super) enabled: bool,
}

impl<F> ExportState<F> {
    /// A front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// Requests that were not answered would be known to a successor: there is in-flight memory, or nobody to have any.
    pub fn tracks_requests(&self) -> bool {
        self.connection.as_ref().is_none_or(|connection| connection.inflight.is_some())
    }

    /// The same with other descriptors.
    ///
    /// # Errors
    /// The first error of `with`.
    pub fn map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<ExportState<G>, E> {
        Ok(ExportState {
            listener: with(self.listener)?,
            file: self.file,
            capacity_bytes: self.capacity_bytes,
            connection: self.connection.map(|connection| connection.map(with)).transpose()?,
        })
    }
}

impl<F> ConnectionState<F> {
    fn map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<ConnectionState<G>, E> {
        let Self { socket, channel, features, protocol_features, memory, inflight, rings } = self;
        Ok(ConnectionState {
            socket: with(socket)?,
            channel: channel.map(&mut *with).transpose()?,
            features,
            protocol_features,
            memory: memory.into_iter().map(|region| region.map(with)).collect::<Result<_, E>>()?,
            inflight: inflight.map(|inflight| inflight.map(with)).transpose()?,
            rings: rings.into_iter().map(|ring| ring.map(with)).collect::<Result<_, E>>()?,
        })
    }
}

impl<F> RegionState<F> {
    fn map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<RegionState<G>, E> {
        let Self { file, guest_addr, len, user_addr, file_offset } = self;
        Ok(RegionState { file: with(file)?, guest_addr, len, user_addr, file_offset })
    }
}

impl<F> InflightState<F> {
    fn map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<InflightState<G>, E> {
        let Self { file, mmap_offset, mmap_size, num_queues, queue_size } = self;
        Ok(InflightState { file: with(file)?, mmap_offset, mmap_size, num_queues, queue_size })
    }
}

impl<F> RingState<F> {
    fn map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<RingState<G>, E> {
        let Self { size, addresses, base, kick, call, err, enabled } = self;
        Ok(RingState {
            size,
            addresses,
            base,
            kick: kick.map(&mut *with).transpose()?,
            call: call.map(&mut *with).transpose()?,
            err: err.map(&mut *with).transpose()?,
            enabled,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Format 1 as predecessors write it. A successor that could not read it any more would cut every guest's connection:
    /// what changes here is a new format (`handover::FORMAT`).
    const FORMAT_1: &str = r#"{"listener":0,"file":[64769,1234],"capacity_bytes":1048576,"connection":{"socket":1,"channel":2,"features":4563402752,"protocol_features":4649,"memory":[{"file":3,"guest_addr":0,"len":2147483648,"user_addr":140000000000000,"file_offset":0}],"inflight":{"file":4,"mmap_offset":0,"mmap_size":8256,"num_queues":1,"queue_size":128},"rings":[{"size":128,"addresses":[140000000004096,140000000012288,140000000008192],"base":77,"kick":5,"call":6,"err":null,"enabled":true}]}}"#;

    #[test]
    fn the_first_format_is_read_and_written() {
        let state: ExportState<u32> = serde_json::from_str(FORMAT_1).unwrap();
        assert_eq!(serde_json::to_string(&state).unwrap(), FORMAT_1);
        assert!(state.is_connected() && state.tracks_requests());
        let mut order = Vec::new();
        let renamed = state.map(&mut |place| {
            order.push(place);
            Ok::<_, std::convert::Infallible>(place + 100)
        });
        let Ok(renamed) = renamed;
        assert_eq!(order, [0, 1, 2, 3, 4, 5, 6], "every descriptor once");
        let text = serde_json::to_string(&renamed).unwrap();
        assert!(text.contains(r#""listener":100"#) && text.contains(r#""call":106"#), "{text}");
    }

    #[test]
    fn what_a_later_program_adds_is_passed_over() {
        let more = FORMAT_1.replace(r#""base":77"#, r#""base":77,"packed":false"#);
        assert!(serde_json::from_str::<ExportState<u32>>(&more).is_ok());
    }

    #[test]
    fn requests_of_a_front_end_without_in_flight_memory_are_not_known() {
        let mut state: ExportState<u32> = serde_json::from_str(FORMAT_1).unwrap();
        if let Some(connection) = &mut state.connection {
            connection.inflight = None;
        }
        assert!(!state.tracks_requests());
        state.connection = None;
        assert!(state.tracks_requests(), "nobody has any");
    }
}
