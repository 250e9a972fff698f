//! integration

pub mod api;
pub mod export;
pub mod libvirt;
