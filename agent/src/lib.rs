//! agent

pub mod config;
