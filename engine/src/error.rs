//! The errors of this crate: what is wrong, where, and what to do about it. They stand below everything that
//! returns them, so they name no type of it.

use std::path::PathBuf;

/// Everything that can go wrong in the engine. No input makes it panic.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A file could not be opened, read or mapped.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A JSON file is not JSON or not of the expected shape.
    #[error("{file}: {problem}")]
    Json {
        /// Which file.
        file: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A field of the model's configuration is missing, absurd or not supported.
    #[error("model configuration: field `{field}`: {problem}")]
    Spec {
        /// The field as it is called in the file.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The container (safetensors, GGUF) is malformed.
    #[error("{format}: {problem}")]
    Format {
        /// Name of the container format.
        format: &'static str,
        /// What is wrong and where.
        problem: String,
    },
    /// A tensor is missing, has the wrong shape or a type that cannot be used.
    #[error("tensor `{name}`: {problem}")]
    Tensor {
        /// The tensor's name in the file.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A sequence would grow past the model's context.
    #[error("the sequence would reach {wanted} tokens, the model's context is {limit}; shorten the prompt")]
    ContextOverflow {
        /// Tokens the sequence would have.
        wanted: usize,
        /// Tokens the model can hold.
        limit: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab} tokens")]
    BadToken {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A layer range that the model does not have or that differs from the pool's.
    #[error("layers {}..{} cannot run here: {problem}", range.start, range.end)]
    WrongRange {
        /// The range asked for.
        range: std::ops::Range<usize>,
        /// Why not.
        problem: String,
    },
    /// The KV pool has no free block left.
    #[error(
        "KV pool exhausted: {needed} more blocks needed, {free} of {total} free; close sequences or make the pool larger"
    )]
    PoolExhausted {
        /// Blocks needed by this call.
        needed: usize,
        /// Blocks free when it was made.
        free: usize,
        /// Blocks of the pool.
        total: usize,
    },
    /// A sequence was used with a pool it does not belong to.
    #[error("the sequence belongs to another KV pool")]
    ForeignSequence,
    /// Rows, widths or indices of the arguments do not fit together.
    #[error("arguments do not fit: {0}")]
    Shape(String),
    /// A logit is NaN or infinite, so no token can be chosen.
    #[error("logit of token {token} is {value}; the weights or the input are broken")]
    NotFinite {
        /// The token.
        token: usize,
        /// Its logit.
        value: f32,
    },
    /// A sampling parameter is out of range.
    #[error("sampling parameter `{field}`: {problem}")]
    Sampling {
        /// The parameter.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The tokenizer file is broken or cannot do what was asked.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A GGUF names a pre-tokenizer whose rules are not known here; guessing would change token ids.
    #[error("pre-tokenizer `{name}` is unknown; known: {known}")]
    UnknownPreTokenizer {
        /// The name in the file.
        name: String,
        /// Names that work.
        known: String,
    },
    /// A grammar cannot be used or followed.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// The chat template does not compile or refused the messages.
    #[error("chat template: {0}")]
    Template(String),
    /// A candle operator failed.
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
}

/// Why a grammar cannot be used, or an answer no longer be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// The grammar is too long.
    #[error("the grammar has {bytes} bytes, at most {max} are taken")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// The grammar does not compile, or asks for what is not supported.
    #[error("the grammar cannot be used: {0}")]
    Rejected(String),
    /// The vocabulary cannot be used for grammars.
    #[error("the model's vocabulary cannot be constrained: {0}")]
    Vocabulary(String),
    /// The grammar grew too complex on the way, or leaves no token of the vocabulary.
    #[error("the grammar could not be followed: {0}")]
    Failed(String),
}

impl EngineError {
    pub(crate) fn spec(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Spec { field: field.into(), problem: problem.into() }
    }

    pub(crate) fn tensor(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), problem: problem.into() }
    }
}
