//! A guest's request, parsed and checked: [`Request`], and how the bytes of a descriptor chain become one.
//!
//! A virtio-blk request (VIRTIO 1.3, 5.2.6) is a header of 16 readable bytes (type u32, reserved u32, sector u64, all
//! little-endian), data, and one writable byte for the status. The bytes may be cut into descriptors anywhere.

use super::config::{DISCARD_MAX_SECTORS, RANGES_MAX, SECTOR_BYTES, SERIAL_MAX_BYTES, WRITE_ZEROES_MAX_SECTORS};
use super::memory::{GuestBuffer, OutOfBounds};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// Largest read or write accepted. Linux sends 4 MiB at most unless told otherwise; descriptors that all name the same
/// page could claim terabytes.
pub const REQUEST_MAX_BYTES: u64 = 64 << 20;

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;

/// Outcome told to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done; for a write, the store has it.
    Ok,
    /// Failed; the guest sees an I/O error.
    IoError,
    /// The disk does not do this.
    Unsupported,
}

impl Status {
    pub(super) fn byte(self) -> u8 {
        // The constants are 0, 1 and 2.
        (match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

/// Part of the disk: multiples of 512, not empty, inside the capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    /// Where it starts.
    pub offset_bytes: u64,
    /// How long it is.
    pub len_bytes: u64,
}

/// What the guest asks for. Offsets and lengths are multiples of 512 and inside the capacity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestKind {
    /// Fill the request's guest memory from the disk.
    Read {
        /// Where to read.
        offset_bytes: u64,
        /// How much; above 0, at most [`REQUEST_MAX_BYTES`].
        len_bytes: u32,
    },
    /// Put the request's guest memory on the disk.
    Write {
        /// Where to write.
        offset_bytes: u64,
        /// How much; above 0, at most [`REQUEST_MAX_BYTES`].
        len_bytes: u32,
    },
    /// Make completed writes durable.
    Flush,
    /// The guest does not need these bytes any more.
    Discard {
        /// 1 to 16 of them.
        ranges: Vec<ByteRange>,
    },
    /// Reads of these bytes shall return zeroes.
    WriteZeroes {
        /// 1 to 16 of them.
        ranges: Vec<ByteRange>,
        /// Their space may be given up.
        unmap: bool,
    },
}

/// A request in flight: popped from a queue, to be given back to [`complete`](super::Queue::complete) of that queue
/// exactly once. Dropping it leaves the guest waiting (until the ring is restarted with in-flight tracking), so that is
/// only for rings that are torn down.
#[derive(Debug)]
pub struct Request {
    pub(super) kind: RequestKind,
    pub(super) data: GuestBuffer,
    /// Head descriptor.
    pub(super) head: u16,
    /// Bytes of `data` written by the device if all goes well.
    pub(super) device_writes: u32,
    /// Of the queue that it came from.
    pub(super) queue_id: u64,
}

impl Request {
    /// What is asked for.
    #[inline]
    pub fn kind(&self) -> &RequestKind {
        &self.kind
    }

    /// Bytes of guest memory: the length of a read or write, 0 for the others.
    #[inline]
    pub fn data_len(&self) -> u64 {
        self.data.len()
    }

    /// Copies `data` to guest memory, `at` bytes into the request's data (answers to reads).
    ///
    /// # Errors
    /// Leaves guest memory alone if the range does not lie in the request's data. Copies into the memory of a write
    /// are refused likewise: the guest shared it for reading.
    #[inline]
    pub fn copy_to_guest(&self, at: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        self.check_writable(at, data.len() as u64)?;
        self.data.write(at, data)
    }

    /// Zeroes `len` bytes of guest memory, `at` bytes into the request's data. Errors as for `copy_to_guest`.
    pub fn zero_guest(&self, at: u64, len: u64) -> Result<(), OutOfBounds> {
        self.check_writable(at, len)?;
        self.data.zero(at, len)
    }

    /// Copies guest memory to `data`, from `at` bytes into the request's data (payload of writes). The guest may change
    /// the bytes at any time: copy once, then use the copy.
    ///
    /// # Errors
    /// The range does not lie in the request's data.
    #[inline]
    pub fn copy_from_guest(&self, at: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        self.data.read(at, data)
    }

    fn check_writable(&self, at: u64, len: u64) -> Result<(), OutOfBounds> {
        match self.kind {
            RequestKind::Read { .. } => Ok(()),
            _ => Err(OutOfBounds { at, len, held: 0 }),
        }
    }
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) capacity_bytes: u64,
    /// Virtio features offered.
    pub(super) features: u64,
    pub(super) seg_max: u32,
    pub(super) serial: [u8; SERIAL_MAX_BYTES],
}

/// A chain's bytes in order, readable ones first.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) data: GuestBuffer,
    pub(super) readable: u64,
    pub(super) descriptors: u32,
}

/// What became of a chain.
#[derive(Debug)]
pub(super) enum Parsed {
    /// For the runner: what, its data, how many bytes of it the device writes.
    Request(RequestKind, GuestBuffer, u32),
    /// To be answered at once: the status, the place for it, bytes written.
    Answer(Status, GuestBuffer, u32),
    /// There is no place for a status: nothing can be answered.
    NoStatus,
}

/// Reads the header and checks the request.
#[inline]
pub(super) fn parse(chain: Chain, limits: &Limits) -> Parsed {
    let Chain { mut data, readable, descriptors } = chain;
    if data.len() == readable || !data.take_status() {
        return Parsed::NoStatus;
    }
    let mut header = [0; HEADER_BYTES as usize];
    if readable < HEADER_BYTES || data.read(0, &mut header).is_err() {
        return Parsed::Answer(Status::IoError, data, 0);
    }
    data.trim_front(HEADER_BYTES);
    let readable = readable - HEADER_BYTES;
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes([
        header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15],
    ]);
    let offers = |bit: u32| limits.features & 1 << bit != 0;
    // Header and status take a descriptor each in the usual layout; a chain that puts them in with the data has a
    // descriptor less, and the guest keeps to seg_max either way.
    let fits = descriptors <= limits.seg_max.saturating_add(2);
    match kind {
        VIRTIO_BLK_T_IN if fits => {
            data.trim_front(readable);
            match transfer(sector, data.len(), limits.capacity_bytes) {
                Some((offset_bytes, len_bytes)) => {
                    Parsed::Request(RequestKind::Read { offset_bytes, len_bytes }, data, len_bytes)
                }
                None => Parsed::Answer(Status::IoError, data, 0),
            }
        }
        VIRTIO_BLK_T_OUT if fits && !offers(VIRTIO_BLK_F_RO) => {
            data.truncate(readable);
            match transfer(sector, data.len(), limits.capacity_bytes) {
                Some((offset_bytes, len_bytes)) => {
                    Parsed::Request(RequestKind::Write { offset_bytes, len_bytes }, data, 0)
                }
                None => Parsed::Answer(Status::IoError, data, 0),
            }
        }
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => Parsed::Answer(Status::IoError, data, 0),
        VIRTIO_BLK_T_FLUSH => {
            data.truncate(0);
            Parsed::Request(RequestKind::Flush, data, 0)
        }
        VIRTIO_BLK_T_GET_ID => {
            data.trim_front(readable);
            let len = limits.serial.len().min(usize::try_from(data.len()).unwrap_or(usize::MAX));
            match data.write(0, &limits.serial[..len]) {
                // At most 20.
                Ok(()) => Parsed::Answer(Status::Ok, data, len as u32),
                Err(_) => Parsed::Answer(Status::IoError, data, 0),
            }
        }
        VIRTIO_BLK_T_DISCARD if offers(VIRTIO_BLK_F_DISCARD) => {
            data.truncate(readable);
            parse_ranges(data, limits.capacity_bytes, DISCARD_MAX_SECTORS, false)
        }
        VIRTIO_BLK_T_WRITE_ZEROES if offers(VIRTIO_BLK_F_WRITE_ZEROES) => {
            data.truncate(readable);
            parse_ranges(data, limits.capacity_bytes, WRITE_ZEROES_MAX_SECTORS, true)
        }
        _ => Parsed::Answer(Status::Unsupported, data, 0),
    }
}

/// Offset and length of a read or write, if it is one that the disk can do.
#[inline]
fn transfer(sector: u64, len: u64, capacity_bytes: u64) -> Option<(u64, u32)> {
    let offset = sector.checked_mul(SECTOR_BYTES)?;
    let end = offset.checked_add(len)?;
    let fits = len > 0 && len <= REQUEST_MAX_BYTES && len.is_multiple_of(SECTOR_BYTES) && end <= capacity_bytes;
    if fits { Some((offset, u32::try_from(len).ok()?)) } else { None }
}

/// The ranges of a discard or write-zeroes: 16 bytes each (sector u64, sectors u32, flags u32).
fn parse_ranges(mut data: GuestBuffer, capacity_bytes: u64, max_sectors: u32, zeroes: bool) -> Parsed {
    let bytes = data.len();
    if bytes == 0 || !bytes.is_multiple_of(RANGE_BYTES) || bytes / RANGE_BYTES > u64::from(RANGES_MAX) {
        return Parsed::Answer(Status::IoError, data, 0);
    }
    let mut ranges = Vec::with_capacity((bytes / RANGE_BYTES) as usize);
    let mut unmap = zeroes;
    for at in (0..bytes).step_by(RANGE_BYTES as usize) {
        let mut raw = [0; RANGE_BYTES as usize];
        if data.read(at, &mut raw).is_err() {
            return Parsed::Answer(Status::IoError, data, 0);
        }
        let sector = u64::from_le_bytes([raw[0], raw[1], raw[2], raw[3], raw[4], raw[5], raw[6], raw[7]]);
        let sectors = u32::from_le_bytes([raw[8], raw[9], raw[10], raw[11]]);
        let flags = u32::from_le_bytes([raw[12], raw[13], raw[14], raw[15]]);
        let known = if zeroes { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        if flags & !known != 0 {
            return Parsed::Answer(Status::Unsupported, data, 0);
        }
        unmap &= flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        let len_bytes = u64::from(sectors) * SECTOR_BYTES;
        let range = sector.checked_mul(SECTOR_BYTES).filter(|offset| {
            sectors > 0
                && sectors <= max_sectors
                && offset.checked_add(len_bytes).is_some_and(|end| end <= capacity_bytes)
        });
        let Some(offset_bytes) = range else { return Parsed::Answer(Status::IoError, data, 0) };
        ranges.push(ByteRange { offset_bytes, len_bytes });
    }
    data.truncate(0);
    let kind = if zeroes { RequestKind::WriteZeroes { ranges, unmap } } else { RequestKind::Discard { ranges } };
    Parsed::Request(kind, data, 0)
}
