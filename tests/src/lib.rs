//! Whole-system tests.

pub mod browser;
