//! agent

pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod learner;
pub mod serve;
pub mod store;
