//! What a qcow2 image says of itself, checked before anything else reads it.
//!
//! - [`Header::parse`]: from the first bytes of the file
//! - [`Need`]: why an image is not served by the own engine and needs QEMU
//! - [`HeaderError`]: why it is not served at all
//!
//! Sans-I/O; the bytes may be a tenant's. imago reads the header anew and trusts more of it: it looks neither at the
//! encryption method nor at the number of snapshots. Format: QEMU, `docs/interop/qcow2.rst`. The limits of the tables are
//! those of QEMU (`block/qcow2.h`, `QCOW_MAX_L1_SIZE`, `QCOW_MAX_REFTABLE_SIZE`).

use std::fmt;

/// Bytes of the file that [`Header::parse`] wants to see, or the whole file: as much as the largest first cluster.
pub(crate) const HEAD_BYTES: usize = 2 << 20;
const MAGIC: u32 = 0x5146_49fb;
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// QEMU's longest name of a backing file.
const NAME_MAX_BYTES: u32 = 1023;
const L1_MAX_BYTES: u64 = 32 << 20;
const REFTABLE_MAX_BYTES: u64 = 8 << 20;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const AUTOCLEAR_BITMAPS: u64 = 1 << 0;

/// The fields that matter here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    /// Of the disk that the guest sees. A positive multiple of 512.
    pub(crate) size_bytes: u64,
    /// Between 512 B and 2 MiB.
    pub(crate) cluster_bytes: u64,
    pub(crate) l1_offset: u64,
    pub(crate) l1_bytes: u64,
    pub(crate) reftable_offset: u64,
    pub(crate) reftable_bytes: u64,
    /// A count has 2 to this power bits; at most 6.
    pub(crate) refcount_order: u32,
    /// As it stands in the image: by no means a name to open.
    pub(crate) backing: Option<String>,
    /// The format of the backing file, where the image says it.
    pub(crate) backing_format: Option<String>,
    /// QEMU can serve it, the own engine cannot; empty when it can.
    pub(crate) needs: Vec<Need>,
}

/// What of an image only QEMU understands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    Encryption {
        method: u32,
    },
    Snapshots {
        count: u32,
    },
    /// Compressed by something other than deflate: zstd.
    Compression {
        kind: u8,
    },
    ExtendedL2,
    /// Left dirty by a crash under lazy refcounts: its refcounts must be computed anew.
    Repair,
    /// Persistent dirty bitmaps, which a write by others would invalidate.
    Bitmaps,
    /// Not a multiple of 512 bytes.
    OddSize {
        size_bytes: u64,
    },
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Need::Encryption { method: 2 } => write!(f, "it is encrypted (LUKS)"),
            Need::Encryption { method } => write!(f, "it is encrypted (method {method})"),
            Need::Snapshots { count } => write!(f, "it has {count} internal snapshot{}", plural(*count)),
            Need::Compression { kind: 1 } => write!(f, "its clusters are compressed with zstd"),
            Need::Compression { kind } => write!(f, "its clusters are compressed by method {kind}"),
            Need::ExtendedL2 => write!(f, "it has extended L2 entries (subclusters)"),
            Need::Repair => write!(f, "it was not closed cleanly under lazy refcounts and has to be repaired"),
            Need::Bitmaps => write!(f, "it has persistent dirty bitmaps"),
            Need::OddSize { size_bytes } => write!(f, "its size of {size_bytes} bytes is no multiple of 512"),
        }
    }
}

fn plural(count: u32) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// Why an image is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("it is not a qcow2 image")]
    NotQcow2,
    #[error("it is qcow2 version {0}; versions 2 and 3 are known")]
    Version(u32),
    #[error("its header is damaged: {0}; see `qemu-img check`")]
    Damaged(&'static str),
    #[error("it is marked corrupt; repair it with `qemu-img check -r all`")]
    Corrupt,
    #[error("it keeps its data in another file; bring it into one with `qemu-img convert`")]
    DataFile,
    #[error("it uses features that nobody here knows (incompatible feature bits {0:#x})")]
    Features(u64),
}

impl Header {
    /// Reads the first [`HEAD_BYTES`] of a file of `file_bytes`, or all of it. `writable`: somebody is to write to it.
    ///
    /// # Errors
    /// [`HeaderError`].
    pub(crate) fn parse(head: &[u8], file_bytes: u64, writable: bool) -> Result<Header, HeaderError> {
        use HeaderError::Damaged;
        let field = Fields(head);
        if field.u32(0) != Some(MAGIC) {
            return Err(HeaderError::NotQcow2);
        }
        let version = field.u32(4).ok_or(Damaged("it is cut off"))?;
        if head.len() < V2_BYTES {
            return Err(Damaged("it is cut off"));
        }
        let (incompatible, autoclear, header_bytes) = match version {
            2 => (0, 0, V2_BYTES as u64),
            3 => field.v3().ok_or(Damaged("it is cut off"))?,
            other => return Err(HeaderError::Version(other)),
        };
        let cluster_bits = field.get_u32(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Damaged("its cluster size is none of 512 B to 2 MiB"));
        }
        let cluster_bytes = 1u64 << cluster_bits;
        if version == 3 && (header_bytes < V3_BYTES as u64 || header_bytes > cluster_bytes) {
            return Err(Damaged("its length makes no sense"));
        }
        if incompatible & CORRUPT != 0 {
            return Err(HeaderError::Corrupt);
        }
        if incompatible & DATA_FILE != 0 {
            return Err(HeaderError::DataFile);
        }
        let unknown = incompatible & !(DIRTY | COMPRESSION | EXTENDED_L2);
        if unknown != 0 {
            return Err(HeaderError::Features(unknown));
        }
        let size_bytes = field.get_u64(24);
        if size_bytes == 0 || i64::try_from(size_bytes).is_err() {
            return Err(Damaged("the disk's size makes no sense"));
        }
        let needs = needs(&field, incompatible, autoclear, size_bytes, header_bytes, writable);
        let (l1_offset, l1_bytes) = (field.get_u64(40), u64::from(field.get_u32(36)) * 8);
        let (reftable_offset, reftable_bytes) = (field.get_u64(48), u64::from(field.get_u32(56)) * cluster_bytes);
        let refcount_order = if version == 3 { field.get_u32(96) } else { 4 };
        if refcount_order > 6 {
            return Err(Damaged("its counts are wider than 64 bits"));
        }
        let header = Header {
            version,
            size_bytes,
            cluster_bytes,
            l1_offset,
            l1_bytes,
            reftable_offset,
            reftable_bytes,
            refcount_order,
            backing: field.backing(cluster_bytes)?,
            backing_format: field.backing_format(header_bytes, cluster_bytes),
            needs,
        };
        header.check_tables(file_bytes)?;
        Ok(header)
    }

    /// Tables have QEMU's largest sizes, lie within the file behind the header, and cover the disk.
    fn check_tables(&self, file_bytes: u64) -> Result<(), HeaderError> {
        let within = |offset: u64, len: u64| {
            let fits =
                offset.checked_add(len).is_some_and(|end| end <= file_bytes.next_multiple_of(self.cluster_bytes));
            offset >= self.cluster_bytes && offset.is_multiple_of(self.cluster_bytes) && fits
        };
        // Entries of eight bytes; with subclusters of sixteen.
        let entry_bytes = if self.needs.contains(&Need::ExtendedL2) { 16 } else { 8 };
        let covered_by_l2 = u128::from(self.cluster_bytes / entry_bytes) * u128::from(self.cluster_bytes);
        let l1_entries = u128::from(self.l1_bytes / 8);
        if self.l1_bytes > L1_MAX_BYTES || !within(self.l1_offset, self.l1_bytes) {
            return Err(HeaderError::Damaged("its L1 table does not lie within the file"));
        }
        if l1_entries * covered_by_l2 < u128::from(self.size_bytes) {
            return Err(HeaderError::Damaged("its L1 table is too small for the disk"));
        }
        let reftable_ok = self.reftable_bytes > 0 && self.reftable_bytes <= REFTABLE_MAX_BYTES;
        if !reftable_ok || !within(self.reftable_offset, self.reftable_bytes) {
            return Err(HeaderError::Damaged("its refcount table does not lie within the file"));
        }
        Ok(())
    }
}

fn needs(
    field: &Fields<'_>,
    incompatible: u64,
    autoclear: u64,
    size_bytes: u64,
    header_bytes: u64,
    writable: bool,
) -> Vec<Need> {
    let mut needs = Vec::new();
    match field.get_u32(32) {
        0 => {}
        method => needs.push(Need::Encryption { method }),
    }
    match field.get_u32(60) {
        0 => {}
        count => needs.push(Need::Snapshots { count }),
    }
    if incompatible & COMPRESSION != 0 {
        let kind = if header_bytes > V3_BYTES as u64 { field.0.get(V3_BYTES).copied() } else { None };
        needs.push(Need::Compression { kind: kind.unwrap_or(0) });
    }
    if incompatible & EXTENDED_L2 != 0 {
        needs.push(Need::ExtendedL2);
    }
    if incompatible & DIRTY != 0 {
        needs.push(Need::Repair);
    }
    if autoclear & AUTOCLEAR_BITMAPS != 0 && writable {
        needs.push(Need::Bitmaps);
    }
    if !size_bytes.is_multiple_of(512) {
        needs.push(Need::OddSize { size_bytes });
    }
    needs
}

/// Big-endian fields of the file's first bytes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }
    fn u32(&self, at: usize) -> Option<u32> {
        self.bytes(at).map(u32::from_be_bytes)
    }
    fn u64(&self, at: usize) -> Option<u64> {
        self.bytes(at).map(u64::from_be_bytes)
    }
    /// A field that is known to be there.
    fn get_u32(&self, at: usize) -> u32 {
        self.u32(at).unwrap_or(0)
    }
    fn get_u64(&self, at: usize) -> u64 {
        self.u64(at).unwrap_or(0)
    }
    /// Incompatible and autoclear features, length of the header.
    fn v3(&self) -> Option<(u64, u64, u64)> {
        Some((self.u64(72)?, self.u64(88)?, u64::from(self.u32(100)?)))
    }
    /// From the header's extensions, which follow it within the first cluster.
    fn backing_format(&self, header_bytes: u64, cluster_bytes: u64) -> Option<String> {
        // At most 2 MiB, and each step takes eight bytes at least.
        let (mut at, end) = (header_bytes as usize, cluster_bytes as usize);
        while at.checked_add(8)? <= end {
            let (kind, len) = (self.u32(at)?, self.u32(at + 4)? as usize);
            match kind {
                EXTENSION_END => return None,
                EXTENSION_BACKING_FORMAT => {
                    return String::from_utf8(self.0.get(at + 8..(at + 8).checked_add(len)?)?.to_vec()).ok();
                }
                _ => at = (at + 8).checked_add(len.checked_next_multiple_of(8)?)?,
            }
        }
        None
    }
    fn backing(&self, cluster_bytes: u64) -> Result<Option<String>, HeaderError> {
        let (offset, len) = (self.get_u64(8), self.get_u32(16));
        if offset == 0 {
            return Ok(None);
        }
        let damaged = HeaderError::Damaged("the name of its backing file does not lie in its first cluster");
        if len == 0 || len > NAME_MAX_BYTES || offset.checked_add(u64::from(len)).is_none_or(|end| end > cluster_bytes)
        {
            return Err(damaged);
        }
        // Both are at most 2 MiB.
        let (from, to) = (offset as usize, offset as usize + len as usize);
        let name = self.0.get(from..to).ok_or(damaged)?;
        match String::from_utf8(name.to_vec()) {
            Ok(name) => Ok(Some(name)),
            Err(_) => Err(HeaderError::Damaged("the name of its backing file is not UTF-8")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A sound image of 1 GiB with clusters of 64 KiB.
    fn sound() -> Vec<u8> {
        let mut head = vec![0u8; 512];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_be_bytes());
        put(4, &3u32.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 30).to_be_bytes());
        put(36, &2u32.to_be_bytes());
        put(40, &0x30000u64.to_be_bytes());
        put(48, &0x10000u64.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        head
    }

    fn parse(change: impl FnOnce(&mut Vec<u8>)) -> Result<Header, HeaderError> {
        let mut head = sound();
        change(&mut head);
        Header::parse(&head, 0x50000, true)
    }

    fn put(at: usize, bytes: &[u8]) -> impl FnOnce(&mut Vec<u8>) {
        move |head| head[at..at + bytes.len()].copy_from_slice(bytes)
    }

    #[test]
    fn a_sound_header_is_read() {
        let header = parse(|_| {}).unwrap();
        assert_eq!((header.size_bytes, header.cluster_bytes, header.backing), (1 << 30, 65536, None));
        assert_eq!(header.needs, []);
        let named = parse(|head| {
            head[200..208].copy_from_slice(b"base.img");
            head[8..16].copy_from_slice(&200u64.to_be_bytes());
            head[16..20].copy_from_slice(&8u32.to_be_bytes());
            // An extension that nobody knows, and then the format.
            head[112..120].copy_from_slice(&[0, 0, 1, 1, 0, 0, 0, 3]);
            head[128..136].copy_from_slice(&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3]);
            head[136..139].copy_from_slice(b"raw");
        });
        let named = named.unwrap();
        assert_eq!((named.backing.as_deref(), named.backing_format.as_deref()), (Some("base.img"), Some("raw")));
    }

    #[test]
    fn what_only_qemu_understands_is_named() {
        let needs = |change: &dyn Fn(&mut Vec<u8>)| parse(change).unwrap().needs;
        assert_eq!(needs(&|h| put(32, &2u32.to_be_bytes())(h)), [Need::Encryption { method: 2 }]);
        assert_eq!(needs(&|h| put(60, &3u32.to_be_bytes())(h)), [Need::Snapshots { count: 3 }]);
        assert_eq!(needs(&|h| put(72, &1u64.to_be_bytes())(h)), [Need::Repair]);
        assert_eq!(needs(&|h| put(88, &1u64.to_be_bytes())(h)), [Need::Bitmaps]);
        let extended = needs(&|h| {
            put(72, &16u64.to_be_bytes())(h);
            // Twice the size of an entry, so twice the tables.
            put(36, &4u32.to_be_bytes())(h);
        });
        assert_eq!(extended, [Need::ExtendedL2]);
        let zstd = needs(&|h| {
            put(72, &8u64.to_be_bytes())(h);
            h[104] = 1;
        });
        assert_eq!(zstd, [Need::Compression { kind: 1 }]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert_eq!(parse(put(72, &2u64.to_be_bytes())), Err(HeaderError::Corrupt));
        assert_eq!(parse(put(72, &4u64.to_be_bytes())), Err(HeaderError::DataFile));
        assert_eq!(parse(put(72, &(1u64 << 40).to_be_bytes())), Err(HeaderError::Features(1 << 40)));
        assert_eq!(parse(put(4, &4u32.to_be_bytes())), Err(HeaderError::Version(4)));
        assert_eq!(parse(put(0, b"XFI\xfb")), Err(HeaderError::NotQcow2));
        let damaged = |change: &dyn Fn(&mut Vec<u8>)| matches!(parse(change), Err(HeaderError::Damaged(_)));
        assert!(damaged(&|h| put(20, &63u32.to_be_bytes())(h)), "a cluster of 2^63 bytes");
        assert!(damaged(&|h| put(24, &u64::MAX.to_be_bytes())(h)), "a disk of 2^64 bytes");
        assert!(damaged(&|h| put(36, &1u32.to_be_bytes())(h)), "an L1 table that covers half of the disk");
        assert!(damaged(&|h| put(36, &u32::MAX.to_be_bytes())(h)), "an L1 table of 32 GiB");
        assert!(damaged(&|h| put(40, &(1u64 << 40).to_be_bytes())(h)), "an L1 table beyond the file");
        assert!(damaged(&|h| put(40, &0u64.to_be_bytes())(h)), "an L1 table in the header");
        assert!(damaged(&|h| put(48, &u64::MAX.to_be_bytes())(h)), "a refcount table at the end of the world");
        assert!(damaged(&|h| put(56, &u32::MAX.to_be_bytes())(h)), "a refcount table of 256 TiB");
        assert!(damaged(&|h| put(100, &64u32.to_be_bytes())(h)), "a header shorter than itself");
        let long_name = |h: &mut Vec<u8>| {
            put(8, &200u64.to_be_bytes())(h);
            put(16, &4000u32.to_be_bytes())(h);
        };
        assert!(damaged(&long_name));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_or_an_error(
            noise in proptest::collection::vec(any::<u8>(), 0..600),
            file_bytes: u64,
            changes in proptest::collection::vec((0usize..512, any::<u8>()), 0..8),
        ) {
            let _ = Header::parse(&noise, file_bytes >> 1, true);
            let mut head = sound();
            for (at, byte) in changes {
                head[at] = byte;
            }
            if let Ok(header) = Header::parse(&head, file_bytes >> 8, false) {
                prop_assert!(header.l1_bytes <= L1_MAX_BYTES && header.reftable_bytes <= REFTABLE_MAX_BYTES);
                prop_assert!(header.cluster_bytes.is_power_of_two());
            }
        }
    }
}
