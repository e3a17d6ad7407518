//! The two ends of a session as state machines without I/O: frames in, frames and work out.
//!
//! Vocabulary: the edge drafts a *path* of tokens after the final ones. A *question* is a run of
//! positions of that path that the target must decide. Both ends hold the same rule: tokens on
//! the path before a question's answer are context; when the target's choice differs from the
//! path, the path ends there and the choice takes its place. What was in flight for the old path
//! is dropped by its [`Round`](crate::ids::Round), which only the edge advances.

pub mod cloud;
pub mod edge;
#[cfg(test)]
mod tests;

use alloc::{string::String, vec::Vec};

use crate::ids::{Digest, Epoch};
use crate::message::{Alternative, RefuseCode};

/// A token the target model chose.
#[derive(Clone, Debug, PartialEq)]
pub struct Decided {
    /// Token id.
    pub id: u32,
    /// Natural log of its probability.
    pub logprob: f32,
    /// Alternatives, if the session asked for them.
    pub alternatives: Vec<Alternative>,
}

/// Why a frame is refused. The session is over for the peer that sent it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SessionError {
    /// Another owner has taken over.
    #[error("epoch {got:?} is older than the session's {current:?}; ask the router for a new ticket")]
    StaleEpoch {
        /// Epoch of the frame.
        got: Epoch,
        /// Epoch of the session.
        current: Epoch,
    },
    /// The frame names an epoch the session was not opened with.
    #[error("epoch {got:?} is newer than the session's {current:?}; open the session again first")]
    UnknownEpoch {
        /// Epoch of the frame.
        got: Epoch,
        /// Epoch of the session.
        current: Epoch,
    },
    /// The frame does not fit the state.
    #[error("out of order: {0}")]
    OutOfOrder(String),
    /// A value is past its bound.
    #[error("{field} is {value}, at most {max} allowed")]
    Limit {
        /// Field of the message.
        field: &'static str,
        /// Its value.
        value: usize,
        /// The bound.
        max: usize,
    },
    /// A token id means nothing to the model.
    #[error("token {token} is outside the model's vocabulary of {vocabulary} tokens")]
    Vocabulary {
        /// The id.
        token: u32,
        /// Tokens of the vocabulary.
        vocabulary: usize,
    },
    /// Nothing can follow the sequence.
    #[error("position {position} is past the end of the sequence at {max} tokens")]
    Full {
        /// Position asked for.
        position: usize,
        /// Longest sequence of the session.
        max: usize,
    },
    /// A value makes no sense.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// The stream of tokens does not match its hash.
    #[error("the token stream is damaged: {0}")]
    Damaged(String),
}

impl SessionError {
    /// Code to refuse with.
    #[must_use]
    pub fn code(&self) -> RefuseCode {
        match self {
            Self::StaleEpoch { .. } => RefuseCode::StaleEpoch,
            Self::UnknownEpoch { .. } | Self::OutOfOrder(_) => RefuseCode::OutOfOrder,
            Self::Limit { .. } | Self::Vocabulary { .. } | Self::Malformed(_) => RefuseCode::Malformed,
            Self::Full { .. } => RefuseCode::TooLong,
            Self::Damaged(_) => RefuseCode::BadState,
        }
    }
}

pub(crate) fn check_epoch(got: Epoch, current: Epoch) -> Result<(), SessionError> {
    match got.cmp(&current) {
        core::cmp::Ordering::Less => Err(SessionError::StaleEpoch { got, current }),
        core::cmp::Ordering::Equal => Ok(()),
        core::cmp::Ordering::Greater => Err(SessionError::UnknownEpoch { got, current }),
    }
}

pub(crate) fn check_limit(field: &'static str, value: usize, max: usize) -> Result<(), SessionError> {
    if value > max { Err(SessionError::Limit { field, value, max }) } else { Ok(()) }
}

/// Running hash of a token stream, so that a damaged or shortened one is noticed.
#[derive(Clone, Debug, Default)]
pub struct StreamHash {
    hasher: blake3::Hasher,
    count: u32,
}

impl StreamHash {
    /// Adds a token id.
    pub fn push(&mut self, id: u32) {
        self.hasher.update(&id.to_le_bytes());
        self.count += 1;
    }

    /// Tokens added.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Digest of the ids added, little-endian u32 each.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest(*self.hasher.finalize().as_bytes())
    }
}
