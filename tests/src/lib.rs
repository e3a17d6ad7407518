//! Whole-system tests.

pub mod answers;
pub mod browser;
pub mod process;
