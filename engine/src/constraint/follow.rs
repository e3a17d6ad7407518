//! Where an answer stands in its grammar.

use std::sync::{Arc, Mutex, PoisonError};

use llguidance::Matcher;

use super::{Compiled, ConstraintError, TokenMask, first_line};

/// Follows one answer: forwards as it grows, back where a draft was thrown away.
pub struct Follower {
    compiled: Arc<Compiled>,
    matcher: Matcher,
    /// Tokens the matcher has taken.
    taken: Vec<u32>,
    stop_tokens: Vec<u32>,
}

impl Follower {
    pub(super) fn new(compiled: Arc<Compiled>, stop_tokens: &[u32]) -> Self {
        let mut stop_tokens = stop_tokens.to_vec();
        stop_tokens.retain(|&id| (id as usize) < compiled.vocabulary);
        Self { matcher: compiled.matcher(), compiled, taken: Vec::new(), stop_tokens }
    }

    /// The tokens allowed after `answer`. Once the grammar is complete, and after an answer that is
    /// not in it or has ended, only the tokens that end an answer are.
    ///
    /// # Errors
    /// [`ConstraintError::Failed`]; the next call begins anew.
    pub fn allowed(&mut self, answer: &[u32]) -> Result<TokenMask, ConstraintError> {
        let mask = self.advance(answer);
        if mask.is_err() {
            self.matcher = self.compiled.matcher();
            self.taken.clear();
        }
        mask
    }

    fn advance(&mut self, answer: &[u32]) -> Result<TokenMask, ConstraintError> {
        let common = self.taken.iter().zip(answer).take_while(|(a, b)| a == b).count();
        self.rollback(self.taken.len() - common)?;
        for &token in &answer[common..] {
            if !self.commit(token)? {
                return self.end_only();
            }
        }
        self.mask()
    }

    /// Whether every token of `answer` is taken.
    #[cfg(test)]
    pub(super) fn takes(&mut self, answer: &[u32]) -> bool {
        self.allowed(answer).is_ok() && self.taken == answer
    }

    /// Takes the next token; false if the grammar (or the end of the answer) forbids it.
    fn commit(&mut self, token: u32) -> Result<bool, ConstraintError> {
        let foreign = token as usize >= self.compiled.vocabulary;
        if foreign || self.stop_tokens.contains(&token) || self.matcher.is_stopped() {
            return Ok(false);
        }
        let taken = self.matcher.try_consume_tokens(&[token]).map_err(failed)? == 1;
        if taken {
            self.taken.push(token);
        }
        Ok(taken)
    }

    fn rollback(&mut self, tokens: usize) -> Result<(), ConstraintError> {
        if tokens > 0 {
            self.matcher.rollback(tokens).map_err(failed)?;
            // The library keeps its last mask by row number and lexer state, and (1.9.1) does not
            // drop it when the row is thrown away.
            self.matcher.invalidate_bias_cache();
            self.taken.truncate(self.taken.len() - tokens);
        }
        Ok(())
    }

    fn mask(&mut self) -> Result<TokenMask, ConstraintError> {
        if self.matcher.is_stopped() {
            return self.end_only();
        }
        let set = self.matcher.compute_mask().map_err(failed)?;
        let vocabulary = self.compiled.vocabulary;
        let mut mask = TokenMask::from_library(&set, vocabulary);
        // The trie's own end token stands for "may end here".
        let may_end = set.is_allowed(super::vocabulary::end_token(vocabulary));
        for &stop in &self.stop_tokens {
            mask.set(stop, may_end);
        }
        if mask.count() == 0 {
            return Err(ConstraintError::Failed("no token of the vocabulary continues the answer".into()));
        }
        Ok(mask)
    }

    fn end_only(&self) -> Result<TokenMask, ConstraintError> {
        let mut mask = TokenMask::none(self.compiled.vocabulary);
        self.stop_tokens.iter().for_each(|&stop| mask.set(stop, true));
        if self.stop_tokens.is_empty() {
            return Err(ConstraintError::Vocabulary("it has no token that ends an answer".into()));
        }
        Ok(mask)
    }
}

fn failed(error: impl std::fmt::Display) -> ConstraintError {
    ConstraintError::Failed(first_line(&error.to_string()))
}

/// A [`Follower`] that the jobs of one sequence share. They run one after the other, so the lock is never contended.
#[derive(Clone)]
pub struct Followed(Arc<Mutex<Follower>>);

impl std::fmt::Debug for Followed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Followed")
    }
}

impl Followed {
    pub(super) fn new(follower: Follower) -> Self {
        Self(Arc::new(Mutex::new(follower)))
    }

    /// As [`Follower::allowed`].
    ///
    /// # Errors
    /// As [`Follower::allowed`].
    pub fn allowed(&self, answer: &[u32]) -> Result<TokenMask, ConstraintError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).allowed(answer)
    }
}
