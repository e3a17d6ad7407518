//! A set of tokens.

use llguidance::toktrie::SimpleVob;

/// The tokens that are allowed at a position. Ids past the vocabulary (padding rows of the head) are
/// not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenMask {
    /// One bit per token.
    bits: Vec<u32>,
}

impl TokenMask {
    /// No token of a vocabulary of `len`.
    pub(super) fn none(len: usize) -> Self {
        Self { bits: vec![0; len.div_ceil(32)] }
    }

    /// Every token of a vocabulary of `len`.
    #[cfg(test)]
    pub(crate) fn all(len: usize) -> Self {
        let mut mask = Self::none(len);
        (0..len as u32).for_each(|id| mask.set(id, true));
        mask
    }

    /// The first `len` tokens of what the library yields.
    pub(super) fn from_library(set: &SimpleVob, len: usize) -> Self {
        let mut mask = Self { bits: set.as_slice().to_vec() };
        mask.bits.resize(len.div_ceil(32), 0);
        if let Some(last) = mask.bits.last_mut()
            && !len.is_multiple_of(32)
        {
            *last &= (1 << (len % 32)) - 1;
        }
        mask
    }

    pub(crate) fn set(&mut self, id: u32, allowed: bool) {
        if let Some(word) = self.bits.get_mut(id as usize / 32) {
            let bit = 1 << (id % 32);
            *word = if allowed { *word | bit } else { *word & !bit };
        }
    }

    /// Whether a token is allowed.
    #[must_use]
    pub fn allows(&self, id: u32) -> bool {
        self.bits.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Number of tokens allowed.
    #[must_use]
    pub fn count(&self) -> usize {
        self.bits.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The one token that is allowed, if there is just one.
    #[must_use]
    pub fn sole(&self) -> Option<u32> {
        let mut ids = self.ids();
        ids.next().filter(|_| ids.next().is_none())
    }

    /// The tokens allowed, ascending.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.bits.iter().enumerate().flat_map(|(at, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                let bit = rest.trailing_zeros();
                rest &= rest.wrapping_sub(1);
                (bit < 32).then_some(at as u32 * 32 + bit)
            })
        })
    }

    /// Takes the tokens that are not allowed out of the running.
    pub(crate) fn apply(&self, scores: &mut [f32]) {
        for (chunk, at) in scores.chunks_mut(32).zip(0..) {
            let word = self.bits.get(at).copied().unwrap_or(0);
            if word == u32::MAX {
                continue;
            }
            for (bit, score) in chunk.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }
}
