//! What decisions, events and promises promise.
