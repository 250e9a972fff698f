//! The harness of the end-to-end tests and of `bench`: real guests under a real libvirt, on a real NBD store, through the
//! real daemon, and nothing left behind.
//!
//! - [`clean`]: what must be undone, however the program ends
//! - [`process`]: child processes that end with us
//! - [`paths`]: the cache, the scratch folder, the programs under test
//! - [`image`]: the Debian guest, built once by `scripts/guest-image.sh`
//! - [`accelerator`]: KVM where a guest really boots under it
//! - [`libvirt`]: a libvirtd of our own, apart from the host's
//! - [`slow`]: a file system on slow storage
//! - [`store`]: nbdkit with its delay filter, and a count of what was read from it
//! - [`report`]: the lines the guest prints
//! - [`group`]: a control group of our own
//! - [`guest`]: a domain, from its XML to its last line
//! - [`elastic`]: a guest whose memory and processors change while it runs
//! - [`swap`]: a swap area of our own
//! - [`pages`]: memory of another process: what of it is in RAM, pushing it out, bringing it in
//! - [`slab`]: slabs of the SSD tier made without a daemon
//! - [`throttled`]: a store with a limit of requests a second
//! - [`toucher`]: a guest whose program touches memory in the order it is told
//! - [`verifier`]: a guest whose program keeps its disk busy and checks every answer
//! - [`template`]: a guest to save as a template, and its clones
//! - [`vhost`]: a front-end in our own process that keeps a disk busy and checks every answer
//! - [`daemon`]: `prestaged` and `prestagectl`
//! - [`rig`]: all of these together, as a test uses them

pub mod accelerator;
pub mod clean;
pub mod daemon;
pub mod elastic;
pub mod group;
pub mod guest;
pub mod image;
pub mod libvirt;
pub mod pages;
pub mod paths;
pub mod process;
pub mod report;
pub mod rig;
pub mod slab;
pub mod slow;
pub mod store;
pub mod swap;
pub mod template;
pub mod throttled;
pub mod toucher;
pub mod verifier;
pub mod vhost;
