//! Webhooks: one signed message to one address, and what came of it. When to send and what to do about failures is the caller's.
//!
//! - `secret.rs`: secrets, which nobody gets to see
//! - `sign.rs`: signatures as in Standard Webhooks
//! - `target.rs`: addresses that may be sent to
//! - `sender.rs`: the request, over TLS, with limits
//!
//! A message is a POST with the headers `webhook-id`, `webhook-timestamp` and `webhook-signature` of the
//! [Standard Webhooks](https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md) specification.

mod secret;
mod sender;
mod sign;
mod target;
#[cfg(test)]
mod tests;

pub use secret::{Secret, SecretError, read_secrets};
pub use sender::{Message, SendError, Sender, SenderError};
pub use sign::signatures;
pub use target::{Target, TargetError};
