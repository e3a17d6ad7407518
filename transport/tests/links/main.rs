//! Links over real quinn and loopback UDP.

mod admission;
mod frames;
mod garbage;
mod handshake;
mod kv;
mod setup;
mod silence;
mod weather;
