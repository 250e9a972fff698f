//! Disk exports driven from outside, as a front-end does it.
//!
//! - `disk`: a disk in memory and a runner for its rings, one thread each.
//! - `blkio`: random operations by libblkio's vhost-user driver against a model of the disk.
//! - `front`: a front-end that sends anything, and a guest with one ring. `protocol`: single messages, sound and not.
//! - `handover`: an export that changes its owner.
//! - `socket`: where an export may listen, and who may connect.
//! - `qemu`: a boot sector read by QEMU's firmware.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests; the exception for tests does not reach them")]

mod blkio;
mod disk;
mod front;
mod handover;
mod protocol;
mod qemu;
mod socket;
