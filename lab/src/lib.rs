//! Evaluation, calibration, link emulation and plots.

pub mod calibrate;
pub mod cluster;
mod equal_share;
pub mod error;
pub mod eval;
pub mod explore;
pub mod link_bench;
pub mod pair;
pub mod plot;
pub mod policy_report;
pub mod progress;
pub mod questions;
pub mod rows;
pub mod score;

pub use error::LabError;
