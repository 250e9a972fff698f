//! A block cache for virtual machine disks: RAM and SSD tiers in front of slow storage, filled on demand and ahead of it.
//!
//! - [`Cache`]: the whole: opens storages, takes prefetches, answers questions
//! - [`disk`]: storages and disks on their shard: reads, writes, prefetch
//! - [`policy`]: what is cached where, what leaves, what is prefetched (sans-I/O)
//! - [`arena`]: the RAM tier's memory
//! - [`ssd`]: the SSD tier's format and index; `keeper`: the threads that keep it fit to survive a crash
//! - [`backend`]: the stores: raw files, block devices, NBD exports
//! - [`engine`]: event loops over io_uring, with owned buffers
//! - [`opener`]: who opens the stores, where this process may not
//! - [`access`]: what guests did, for the learner; [`counters`]: how it went
//! - [`types`]: pages, blocks, masks

pub mod access;
pub mod arena;
pub mod backend;
mod cache;
pub mod counters;
pub mod disk;
pub mod engine;
mod keeper;
pub mod opener;
pub mod policy;
pub mod ssd;
pub mod types;

pub use cache::{Cache, CacheConfig, Closing, DrainedTier, Looked, OpenError, ResizeError, Resized, StorageHandle};
