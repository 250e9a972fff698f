//! What the daemon and `prestage-memory` say to each other.
//!
//! Packets of a `SOCK_SEQPACKET` pair, a message each, in postcard's encoding (postcard.jamesmunns.com/wire-format). A request
//! carries a ticket; its answer carries the same. Events come unasked.

use serde::{Deserialize, Serialize};

use crate::memory::{Fault, MemoryError, ProcessId, Push, Region, Residency, Signal, Span};

/// Changes with every message; both ends are installed together, and a daemon refuses a helper of another version.
pub const VERSION: u32 = 2;
/// Largest message in bytes.
pub const MAX_MESSAGE: usize = 160 << 10;
/// Most spans of a request.
pub const MAX_SPANS: usize = 4096;
/// Most pages of a request that asks for states.
pub const MAX_STATES: u64 = 1 << 18;
/// Most faults of an event.
pub const MAX_FAULTS: usize = 2048;
/// Most regions of a machine.
pub const MAX_REGIONS: usize = 1024;

/// From the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub ticket: u64,
    pub body: Ask,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Ask {
    /// First of all.
    Hello {
        version: u32,
    },
    /// From now on `vm` means this process. Answered with [`Said::Watching`]; replaces what was known of `vm`.
    Watch {
        vm: u32,
        process: ProcessId,
        regions: Vec<Region>,
    },
    /// The machine's memory lies elsewhere now (hotplug).
    Layout {
        vm: u32,
        regions: Vec<Region>,
    },
    /// Tell of every `period`th fault of each thread; 0: of none.
    Listen {
        vm: u32,
        period: u32,
    },
    Forget {
        vm: u32,
    },
    /// To be read ahead, what of it is in swap: `process_madvise(MADV_WILLNEED)`.
    BringIn {
        vm: u32,
        spans: Vec<Span>,
    },
    /// What is in swap or cached is touched on the guest's behalf, so that its own touch is no fault at all.
    Map {
        vm: u32,
        spans: Vec<Span>,
    },
    PushOut {
        vm: u32,
        how: Push,
        spans: Vec<Span>,
    },
    /// State of each page of the spans, in their order.
    States {
        vm: u32,
        spans: Vec<Span>,
    },
    /// Of all of the machine's memory.
    Residency {
        vm: u32,
    },
}

/// To the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Message {
    Answer {
        ticket: u64,
        body: Result<Said, MemoryError>,
    },
    /// Faults in order of time; `lost` of them before these did not fit the ring.
    Faults {
        vm: u32,
        lost: u64,
        faults: Vec<Fault>,
    },
    /// Another signal was taken: the one before turned out to tell nothing.
    Watching {
        vm: u32,
        watching: Watching,
    },
    /// The process has ended; `vm` is forgotten.
    Gone {
        vm: u32,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Said {
    Hello(Abilities),
    Watching(Watching),
    Done,
    Moved(Moved),
    /// Two bits a page, lowest first: 0 absent, 1 present, 2 swapped, 3 cached.
    States(Vec<u8>),
    Residency(Residency),
}

/// What the helper may do here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Abilities {
    /// Why not, by what cannot be done; empty if everything can.
    pub missing: Vec<String>,
    pub pid: u32,
}

/// How a machine is watched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watching {
    pub signal: Signal,
    /// Better signals, and why it is none of them.
    pub passed_over: Vec<(Signal, String)>,
}

/// What a request moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Moved {
    /// Pages asked for.
    pub asked: u64,
    /// Of these, what the kernel was told of: all (brought in), or what was present (pushed out).
    pub eligible: u64,
    /// CPU time it took, in microseconds.
    pub cpu_us: u64,
    /// Time it took, in microseconds.
    pub wall_us: u64,
}

/// Packs states as in [`Said::States`].
#[must_use]
pub fn pack(states: impl IntoIterator<Item = crate::memory::PageState>) -> Vec<u8> {
    let mut packed = Vec::new();
    for (at, state) in states.into_iter().enumerate() {
        if at % 4 == 0 {
            packed.push(0);
        }
        if let Some(last) = packed.last_mut() {
            *last |= (state as u8) << (at % 4 * 2);
        }
    }
    packed
}

/// The `at`th state of what [`pack`] made; `None` beyond its end.
#[must_use]
pub fn unpack(packed: &[u8], at: usize) -> Option<crate::memory::PageState> {
    use crate::memory::PageState::{Absent, Cached, Present, Swapped};
    Some(match packed.get(at / 4)? >> (at % 4 * 2) & 3 {
        0 => Absent,
        1 => Present,
        2 => Swapped,
        _ => Cached,
    })
}
