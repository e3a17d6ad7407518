//! Whole-system tests.

pub mod answers;
pub mod browser;
#[cfg(target_os = "linux")]
pub mod freeze;
pub mod llama_server;
pub mod process;
