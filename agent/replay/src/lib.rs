//! Replay of recorded block traces: the policy core and the access predictor that `prestaged` runs, driven by a trace
//! with a virtual clock and a model of the store.
//!
//! | module | holds |
//! | --- | --- |
//! | [`trace`] | streaming readers of trace files, in bounded memory: [`Request`] by [`Request`] |
//! | [`footprint`] | the first pass: distinct pages and the last one, from which a cache's size follows |
//! | [`marks`] | what the guest did when: boot and programs by name |
//! | [`prefetcher`] | the trait of a prefetch policy; [`Nothing`], the policy that never prefetches |
//! | [`predictive`] | the production predictor as such a policy, and its training |
//! | [`driver`] | [`replay`]: the rules of counting, the clock, the store |
//! | [`report`] | the counts, with the names that they have in JSON |
//! | `device`, `latency`, `scores` | model of the store; percentiles in bounded memory; calibration error |
//!
//! Everything is deterministic. A replay holds, beside the policy core (some 70 bytes a slot) and the predictor, at most
//! 8 bytes a cached page in timed mode and 24 bytes for each page that was prefetched and not yet used.

mod device;
pub mod driver;
pub mod footprint;
mod latency;
pub mod marks;
pub mod predictive;
pub mod prefetcher;
pub mod report;
mod scores;
pub mod trace;

pub use device::DeviceConfig;
pub use driver::{Interrupted, ReplayConfig, ReplayError, replay};
pub use footprint::{CacheSize, Footprint};
pub use marks::{Mark, MarkKind};
pub use predictive::{PolicyKind, Predictive, access};
pub use prefetcher::{Nothing, Prefetcher, Wish};
pub use report::Report;
pub use trace::{Request, TraceError, TraceFormat, TraceReader};
