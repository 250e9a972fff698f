//! Telling whoever manages the machines: events of the outbox to webhooks, at least once and in order for each machine.
//!
//! - `events.rs`: what is told, in which words (docs/events.md)
//! - `lanes.rs`: which delivery is tried when; no I/O, no clock
//! - `courier.rs`: carries it out, a task for each endpoint
//!
//! The outbox (`store/demand/outbox.rs`) is the only state: what was tried and how often survives a restart. An event that arrived while
//! the daemon died before it could note so arrives again, with the same id.

mod courier;
pub mod events;
mod lanes;
#[cfg(test)]
mod tests;

pub use courier::{Courier, Couriers};
pub use lanes::{Lanes, Next, Patience, Setback};
