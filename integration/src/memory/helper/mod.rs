//! `prestage-memory`: the small process that may look into hypervisors, and the daemon's end of it.
//!
//! - [`protocol`]: what is asked and answered, one message a packet
//! - [`client`]: the daemon's end
//! - [`server`]: the helper's end; `prestage-memory` is this and nothing else
//! - `running`: its process, ours or the broker's
//! - `worker`: moving pages, beside the thread that hears faults
//! - `limit`: what the helper gives up before it hears anybody
//!
//! The two are joined by a socket pair that nobody else can connect to. The helper takes orders about guest frames of
//! machines only; it turns them into addresses itself, within regions that it was told, in processes that it has checked:
//! their start, and that they run a hypervisor.

pub mod client;
mod limit;
pub mod protocol;
mod running;
pub mod server;
mod worker;

pub use limit::leave_to_helper;
