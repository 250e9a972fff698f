//! The event loop of a shard: one thread, one io_uring, many small local tasks.
//!
//! - [`ShardHandle`], [`ShardConfig`]: starts a shard's thread and reaches it from other threads ([`Call`] brings an
//!   answer back)
//! - [`Shard`]: what tasks on that thread use: spawn, file and socket operations, timers, eventfds
//! - [`IoBuf`], [`AlignedBuf`]: buffers that are moved into an operation and given back with its result
//! - [`SocketAddress`]: where [`Shard::connect`] connects to
//! - [`JoinHandle`], [`EventWatch`], [`Elapsed`]: results of `spawn`, `watch_eventfd` and `timeout`
//! - [`PollSource`]: a virtqueue that is looked at instead of slept for, while requests come fast
//! - [`oneshot`], [`Notify`], [`Semaphore`]: hand-overs between tasks of one shard
//! - [`within`] (`aside`): what may hang, with a limit, on a thread of its own; files whose closing may hang
//!
//! Inside: `bufs` (buffers), `exec` (tasks and wakers), `reactor` (the loop), `timer`, `polling` (when not to sleep), `op` (an operation and its memory), `ring` (io_uring), `pool` (the same
//! operations on threads and `poll(2)`, where the host forbids io_uring), `sys` (system calls of the pool).
//!
//! **Ownership.** The kernel may write into a buffer until the completion arrives, whatever becomes of the future that
//! waits for it. So an operation owns its buffers and descriptor from submission to completion; dropping the future
//! asks for cancellation and returns at once, and the memory is freed when the kernel reports the end.
//!
//! **Fairness.** A turn of the loop takes what other threads sent, runs at most [`TASKS_PER_TURN`] tasks, fires timers,
//! submits everything queued with one system call and takes completions. When nothing is ready it sleeps in the kernel; only
//! while requests follow each other within microseconds it looks for them first (`polling`).

pub(crate) mod aside;
pub(crate) mod bufs;
mod exec;
mod handle;
mod net;
mod op;
mod polling;
mod pool;
mod reactor;
mod ring;
mod shard;
mod sync;
mod sys;
mod timer;

pub use aside::within;
pub use bufs::{AlignedBuf, IoBuf};
pub use exec::{JoinError, JoinHandle, TASKS_PER_TURN};
pub use handle::{Call, EngineKind, EngineMode, ShardConfig, ShardGone, ShardHandle};
pub use net::SocketAddress;
pub use polling::{PollSource, Polled};
pub use shard::{Elapsed, EventWatch, Shard, blocks_in_kernel};
pub use sync::{Notify, OneshotReceiver, OneshotSender, Permit, Semaphore, oneshot};

/// A future that stays on its shard's thread.
pub type LocalBoxFuture<T> = std::pin::Pin<Box<dyn Future<Output = T>>>;

#[cfg(test)]
mod tests;
