//! Whole-system tests.

pub mod answers;
pub mod browser;
