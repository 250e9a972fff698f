//! The host agent `prestaged` and its admin CLI `prestagectl`.
//!
//! - [`daemon`]: everything put together; [`serve`]: rings of a disk on its shard; [`nbd`]: its NBD clients; [`learner`]: predictors and history
//! - `memory`: guests' swapped pages, learned and brought in before they are touched
//! - [`models`]: neural models, trained and compared in the background
//! - `demand`: what machines use and will use, measured, forecast and acted on; [`planner`]: who is to have what; [`simulate`]: the same on a recorded month
//! - [`calendar`], [`schedule`]: dates, and events that come again
//! - [`notify`]: events to webhooks
//! - [`forecast`]: demand of recorded series, foretold and trained on
//! - [`privilege`]: what the daemon gives up, and what its broker may
//! - [`config`]: the configuration; [`store`]: the database
//! - [`cli`], [`client`]: `prestagectl`

pub mod calendar;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
mod demand;
pub mod forecast;
pub mod learner;
mod memory;
pub mod models;
pub mod nbd;
pub mod notify;
pub mod planner;
pub mod privilege;
pub mod schedule;
pub mod serve;
pub mod simulate;
pub mod store;
