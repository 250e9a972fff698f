//! What each machine is to be given: forecasts, measurements and promises in, decisions out.
//!
//! - `amount.rs`: [`Resource`], [`Amounts`], [`VmId`]
//! - `input.rs`: [`Input`] and what it is made of: [`Host`], [`Vm`], [`Policy`], [`Abilities`], [`Reading`],
//!   [`Outlook`]
//! - `settings.rs`: [`Settings`], a [`Rule`] for each resource
//! - `track.rs`: what is remembered of a machine's resource from round to round
//! - `want.rs`: what one machine should have, its neighbours aside
//! - `share.rs`: who gets what when there is not enough
//! - `decision.rs`: [`Decision`] and its reasons in words
//! - `reservations.rs`: [`Reservations`], what is promised for later
//! - `round.rs`: [`Planner`], which puts these together
//!
//! Sans-I/O and deterministic: time comes in with the input, the same inputs give the same decisions. Nothing here
//! knows libvirt, forecasters or the database; what is decided is carried out, verified and written down elsewhere, and
//! what came of it is seen in the next round's measurements.
//!
//! **Who may do what.** A forecast may raise and may hold back a lowering. Only measured idleness lowers: the highest
//! use of a whole window, in bounded steps, after a cool-down. Pressure and OOM override both at once, and make the
//! next lowering wait twice as long. Where the host is short: floors, then needs up to the fair share, then needs by
//! strict priority, then what each has, then forecasts; weighted max-min within a priority (`share.rs`).
//!
//! **Memory comes and goes slowly.** A balloon brings some 350 MiB a second and takes a quarter of that, so that who jumps
//! can only be helped from what is free. A pool of the host is kept free for it: whoever has idle memory gives it up
//! before it is asked for, but for a reserve by the machine's own rises.

mod amount;
mod decision;
mod input;
mod reservations;
mod round;
mod settings;
mod share;
mod track;
mod want;

#[cfg(test)]
mod props;
#[cfg(test)]
mod tests;

pub use amount::{Amounts, RESOURCES, Resource, VmId};
pub use decision::{Decision, Kind, Numbers, Reason};
pub use input::{Abilities, Host, Input, Mode, Outlook, Policy, Pressure, Reading, Vm};
pub use reservations::{Booking, BookingId, Foreseen, Promise, Refusal, Reservations, Standing};
pub use round::{Planner, plan};
pub use settings::{Rule, Settings};
