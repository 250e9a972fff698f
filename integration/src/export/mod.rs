//! Disks for guests over vhost-user-blk: the front-end (QEMU, cloud-hypervisor, libblkio) shares the guest's memory and
//! its virtqueues over a unix socket, and requests never pass through it. For everybody else there is [`nbd`].
//!
//! - [`Export`] (`server`): a listening socket and its thread. Speaks the protocol, runs no requests.
//! - [`QueueRunner`]: runs them. Given each started ring as a [`Queue`], on whatever event loop.
//! - `config`: [`DiskConfig`], what the guest sees. `handler`: protocol messages → state of the rings.
//! - `queue`: [`Queue`], a running ring. `request`: [`Request`], parsed and checked.
//! - `state`: [`ExportState`], what another process needs to go on with an export. `adopt`: a connection taken over.
//! - `ring`, `memory`, `inflight`: the leaf modules that touch shared memory. `events`: eventfds. `socket`: its set-up.
//!
//! Everything that comes from guest or front-end is checked before use. Errors of a guest's driver stop its ring, errors
//! of a front-end close its connection; neither reaches another disk.
//!
//! Sources: VIRTIO 1.3 (2.7 split virtqueues, 5.2 block device); QEMU's `docs/interop/vhost-user.rst`.

mod adopt;
mod config;
mod events;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod handler;
mod inflight;
mod memory;
pub mod nbd;
mod queue;
mod request;
mod ring;
mod server;
mod socket;
mod state;
#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, allow(dead_code, reason = "the fuzz target uses a part of what tests do"))]
mod testing;

pub use config::{ConfigError, DiskConfig, NUM_QUEUES_MAX, QUEUE_SIZE_MAX, SECTOR_BYTES, SERIAL_MAX_BYTES};
pub use inflight::InflightError;
pub use memory::{MemoryError, OutOfBounds};
pub use queue::{Queue, QueueError, QueueStartError, QueueStopped};
pub use request::{ByteRange, REQUEST_MAX_BYTES, Request, RequestKind, Status};
pub use ring::RingAddressError;
pub use server::{Export, ExportError, ExportOptions};
pub use socket::{SOCKET_PATH_BYTES, SocketFile, listen_at};
pub use state::ExportState;

/// Runs started rings. The calls come from the export's own thread, one at a time.
pub trait QueueRunner: Send + Sync {
    /// A front-end has connected.
    fn connected(&self) {}

    /// The front-end has gone. Every ring has been stopped before.
    fn disconnected(&self) {}

    /// A ring is live. Look for requests at once, without waiting for a kick: the guest may have kicked long ago.
    fn start(&self, queue: Queue);

    /// Ends a ring that was started: takes no more requests from it, waits until those in flight have been completed,
    /// and returns what [`Queue::stop`] says. Blocks the export's thread, and with it this disk's front-end, but no
    /// other disk. A runner that cannot wait for ever (a store that hangs) drops the requests: with in-flight tracking
    /// they are taken again when the ring is restarted.
    fn stop(&self, index: u16) -> QueueStopped;

    /// The front-end has changed the guest's memory. Rings take that up at their next pop, and requests in flight keep
    /// the memory that they use; call [`Queue::refresh_memory`] on idle rings so that unplugged memory is let go.
    fn memory_changed(&self) {}
}
