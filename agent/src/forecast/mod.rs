//! Forecasts of demand outside the daemon: recorded series, a model trained on them, forecasts at given points.
//!
//! | module | holds |
//! | --- | --- |
//! | [`table`] | series and points from CSV files, and which of the values were measured |
//! | [`evaluate`] | trains on the allowed part of the series, and forecasts at the points |

pub mod evaluate;
pub mod table;

pub use evaluate::{DayAhead, Timing, predict, train, trainable};
pub use table::{Key, Line, Points, Table, TableError};
