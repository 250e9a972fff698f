//! Demand.
pub(crate) mod course;
