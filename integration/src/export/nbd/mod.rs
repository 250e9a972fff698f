//! The server's side of NBD, without sockets: bytes in, typed requests out; replies in, bytes out.
//!
//! - [`Handshake`] (`handshake.rs`): fixed newstyle negotiation, until the client has an [`Agreement`] on an export
//! - [`Exports`], [`ExportInfo`]: what may be agreed on
//! - [`Requests`] (`requests.rs`): headers → [`Request`], checked against the agreement; what breaks a rule is answered
//!   with an error and goes no further
//! - [`Replies`] (`replies.rs`): simple and structured replies, [`Extent`]s
//! - [`TlsServer`], [`TlsSession`] (`tls.rs`): TLS with client certificates, without sockets as well
//! - `wire.rs`: the protocol's numbers
//!
//! Not offered, and declined as the protocol wants it: extended headers, fast zeroes, resize under way. A client sees a
//! disk's new size when it connects anew.
//!
//! **Bounds.** Nothing here grows with what a client sends: an option is looked at whole or skipped, a request's header
//! has 28 bytes, and payload never passes through. How many requests and bytes are under way is the caller's to limit.
//!
//! Source: `doc/proto.md` of the NBD project (github.com/NetworkBlockDevice/nbd). All integers are big-endian.

mod handshake;
mod replies;
mod requests;
mod tls;
mod wire;

pub use handshake::{Agreement, ExportInfo, Exports, Handshake, Security, Step};
pub use replies::{Extent, Replies};
pub use requests::{BadMagic, Command, Event, Request, Requests};
pub use tls::{TlsError, TlsServer, TlsSession};
pub use wire::{
    HANDSHAKE_BUFFER_BYTES, NbdError, PAYLOAD_MAX_BYTES, PREFERRED_BLOCK_BYTES, REPLY_HEAD_MAX_BYTES, REQUEST_BYTES,
};
