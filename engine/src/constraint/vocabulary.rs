//! The tokenizer's vocabulary as the trie of bytes that grammars walk.

use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

use super::ConstraintError;
use crate::tokenizer::Tokenizer;

/// Stands in the trie for the end of an answer: one past the vocabulary. What ends an answer really
/// is the session's to say.
pub(super) fn end_token(vocabulary: usize) -> u32 {
    vocabulary as u32
}

/// The trie. Its tokenization is taken for one of many: a grammar allows every way to write its text.
pub(super) fn environment(tokenizer: &Tokenizer) -> Result<TokEnv, ConstraintError> {
    if !tokenizer.spells_bytes() {
        let problem =
            "its tokens are spelt neither in bytes nor in SentencePiece's way, so what text they become is not known";
        return Err(ConstraintError::Vocabulary(problem.into()));
    }
    let vocabulary = tokenizer.vocab_size();
    let mut words: Vec<Vec<u8>> = (0..vocabulary as u32).map(|id| word(tokenizer, id)).collect();
    words.push(marked(b"end of the answer"));
    if let Some(long) = words.iter().find(|word| word.len() > TOKEN_BYTES_MAX) {
        let problem = format!("a token has {} bytes, at most {TOKEN_BYTES_MAX} are taken", long.len());
        return Err(ConstraintError::Vocabulary(problem));
    }
    let info = TokRxInfo::new(words.len() as u32, end_token(vocabulary));
    Ok(Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words))))
}

/// Longest token the trie takes, bytes.
const TOKEN_BYTES_MAX: usize = 1024;

/// A token's bytes; marked if it is special; none for an id without a token.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    if tokenizer.is_special(id) { marked(&bytes) } else { bytes }
}

/// The library takes a leading byte that no UTF-8 text has for the mark of a special token.
fn marked(bytes: &[u8]) -> Vec<u8> {
    [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
}
