//! Evaluation, calibration, link emulation and plots.

pub mod cluster;
pub mod calibrate;
pub mod error;
pub mod explore;
pub mod pair;
pub mod progress;
pub mod rows;

pub use error::LabError;
