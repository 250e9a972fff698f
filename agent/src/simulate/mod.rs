//! `prestagectl simulate`: a recorded month of machines on one simulated host, run by the planner and by its peers.
//!
//! - `trace.rs`: [`Trace`], the demand of each machine as recorded, and its reader
//! - `host.rs`: the host: what arrives of what is asked for and when, and who goes short
//! - `policy.rs`: [`Policy`], who decides; `fixed.rs`, `reactive.rs`, `vpa.rs`: the peers; `ours.rs`: the planner
//! - `forecasts.rs`: `Forecasts`, what the planner is told of the future
//! - `score.rs`: what is counted
//! - `run.rs`: [`run`], which puts these together
//!
//! **Rules of the game**, the same for all. Everybody knows the training part, and decides from what a host can see:
//! use (at most what a machine has, so want is not seen), and pressure. A machine's maximum is what it was provisioned
//! with at that time; demand beyond it (turbo clocks, rounding) counts as that. Demand is held between samples, the
//! worst case, or goes in a straight line. While a machine is off it is not there. Missing samples:
//! the last one goes on being demanded, and the time is not counted.

mod fixed;
mod forecasts;
mod host;
mod ours;
mod policy;
mod reactive;
mod run;
mod score;
mod trace;
mod vpa;

#[cfg(test)]
mod tests;

pub use host::MemoryBy;
pub use policy::{Policy, Seen};
pub use run::{Between, CRITERIA, Report, Row, Setup, run};
pub use score::Score;
pub use trace::{Trace, TraceError, VmTrace};
