//! What an engine is asked for, and what it answers.

/// A sequence and the positions of it whose distributions are wanted.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// Token ids of the sequence; never empty.
    pub tokens: &'a [u32],
    /// The distributions at the positions `from ..= tokens.len()` are wanted: the one at `p` predicts the token
    /// after the first `p`. Between 1 and `tokens.len()`.
    pub from: usize,
    /// Distributions that will be wanted after those, along what the engine writes itself; it may run ahead.
    pub ahead: usize,
    /// The likeliest tokens wanted of each distribution.
    pub top: usize,
    /// Sequences with one number find what the engine computed for the one before.
    pub lane: usize,
}

/// The distribution at a position, as far as it was returned: natural logarithms of probabilities of the model's
/// own distribution.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// The likeliest tokens; none that is left out is likelier.
    pub top: Vec<(u32, f32)>,
    /// Other tokens.
    pub named: Vec<(u32, f32)>,
    /// The token on which the rows after this one depend: of the sequence asked for, else what the engine wrote.
    pub next: Option<u32>,
}
