//! Access prediction for one storage: which pages its virtual machines read next, how likely, and when.
//!
//! Pure and deterministic: no I/O, no clock (time comes in as `at_us`), no threads. One [`AccessPredictor`] serves one
//! storage and any number of virtual machines on it; it is fed with [`Access`]es and drained of [`Candidate`]s.
//!
//! | module | holds |
//! | --- | --- |
//! | [`access`] | the words exchanged with the outside: access, candidate, outcome, phase |
//! | [`predictor`] | the one interface: observe, predict, outcome; weighs the experts against each other |
//! | [`explain`] | why a page is or is not proposed, as data |
//! | [`profile`] | what was learned, as bytes: magic, version, checksum; and its summary |
//! | [`drift`] | has a signal's mean moved: Page–Hinkley and ADWIN |
//! | [`demand`] | forecasts of processor, memory, disk and network: quantiles, maxima, unusual use |
//! | [`contest`] | is one model better than another on the same stream: a test that may be looked at any time |
//! | `hybrid` | runs, the log of earlier reads, chains of blocks and neighbourhoods, mixed into one calibrated probability |
//! | `phase`, `record`, `replay` | expert: first-touch sets of a phase (learned, recorded, replayed) |
//! | `experts` | sets of experts |
//! | [`lstm`] | LSTM over ordinals: weights as bytes, inference kernels |
//! | [`ordinals`] | which of the things on offer a read turned out to be: what the LSTM reads |
//! | `weight_file` | what the files of both networks have in common |
//! | `odds`, `pageset`, `wire` | counts that become probabilities, page masks, byte encoding |

pub mod access;
pub mod contest;
pub mod demand;
pub mod drift;
mod experts;
pub mod explain;
mod hybrid;
pub mod lstm;
mod odds;
pub mod ordinals;
mod pageset;
mod phase;
pub mod predictor;
pub mod profile;
mod record;
mod replay;
mod weight_file;
mod wire;

pub use access::{Access, BLOCK_PAGES, Candidate, Expert, Op, Outcome, PAGE_BYTES, Phase};
pub use experts::ExpertSet;
pub use explain::{Decision, Explanation, Spending, Vote};
pub use predictor::{AccessConfig, AccessPredictor, AccessStats, CalibrationStats, DEFAULT_THRESHOLD};
pub use profile::{PhaseSummary, ProfileError, ProfileSummary};
