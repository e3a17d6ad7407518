//! Text to token ids and back: from a `tokenizer.json` or from GGUF metadata.

mod bound;
mod config;
mod generation;
mod gguf;
mod marks;
mod pre;
mod stream;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::OnceLock;

use tandem_proto::ids::Digest;
use tokenizers::{DecoderWrapper, Model};

use bound::Bound;
use config::TokenizerConfig;
pub use generation::{GenerationConfig, gguf_sampling, gguf_stop_tokens};
pub use marks::Difference;
pub use stream::StreamDecoder;

use crate::checkpoint::spec::VOCAB_MAX;
use crate::container::{JSON_BYTES_MAX, gguf as format, map_file, read_small, split};
use crate::error::EngineError;

/// Longest text encoded in one call, bytes.
pub const TEXT_BYTES_MAX: usize = 16 << 20;

/// A tokenizer with its special tokens.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    tokens: Tokens,
    digest: Digest,
    spelling: Spelling,
    /// What a text of its own begins and ends with; none where `tokenizer.json` says it.
    ends: Option<Ends>,
    /// See [`Tokenizer::marks`].
    marks: OnceLock<Vec<u64>>,
    /// Made when it is first asked for; none within where there is none.
    bound: OnceLock<Option<Bound>>,
}

/// What the vocabulary has per token id. The texts are one string: an allocation for each takes several
/// times the bytes of the texts.
#[derive(Default)]
struct Tokens {
    texts: String,
    entries: Vec<TokenEntry>,
}

/// One token id.
struct TokenEntry {
    /// Where its text ends; it begins where that of the id before ends.
    end: u32,
    /// It is hidden in text; none if the id has no token.
    hidden: Option<bool>,
}

impl Tokens {
    /// Adds the next id; `hidden` is none if it has no token.
    fn push(&mut self, text: &str, hidden: Option<bool>) -> Result<(), EngineError> {
        self.texts.push_str(text);
        let end = u32::try_from(self.texts.len()).map_err(|_| broken("the vocabulary has more than 4 GiB of text"))?;
        self.entries.push(TokenEntry { end, hidden });
        Ok(())
    }

    /// Text of an id, and whether it is hidden.
    fn get(&self, id: u32) -> Option<(&str, bool)> {
        let TokenEntry { end, hidden } = self.entries.get(id as usize)?;
        let from = (id as usize).checked_sub(1).map_or(0, |before| self.entries[before].end);
        Some((self.texts.get(from as usize..*end as usize)?, (*hidden)?))
    }
}

/// How tokens stand for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// Through the GPT-2 alphabet.
    ByteLevel,
    /// SentencePiece: U+2581 for a space, `<0xNN>` for a byte; a text's first space may be dropped.
    Pieces {
        /// It is dropped.
        strip: bool,
    },
    /// In another way, which only the library's decoder knows.
    Other,
}

/// Tokens around a text that is no part of a conversation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ends {
    before: Vec<u32>,
    after: Vec<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab", &self.vocab_size()).field("digest", &self.digest).finish()
    }
}

/// What SentencePiece writes for a space.
pub(crate) const SPACE: &str = "\u{2581}";

pub(crate) fn broken(problem: impl std::fmt::Display) -> EngineError {
    EngineError::Tokenizer(problem.to_string())
}

impl Tokenizer {
    /// From the bytes of a Hugging Face `tokenizer.json`.
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`] if it is not one.
    pub fn from_json(bytes: &[u8]) -> Result<Self, EngineError> {
        if bytes.len() as u64 > JSON_BYTES_MAX {
            return Err(broken(format!("tokenizer.json has {} bytes, more than {JSON_BYTES_MAX}", bytes.len())));
        }
        // The library panics where a part of it is no JSON.
        serde_json::from_slice::<serde::de::IgnoredAny>(bytes).map_err(broken)?;
        guarded(|| Self::new(tokenizers::Tokenizer::from_bytes(bytes).map_err(broken)?, None))
    }

    /// From a folder in Hugging Face layout. Where `tokenizer_config.json` says what a text begins and ends
    /// with, that holds instead of what `tokenizer.json` says.
    ///
    /// # Errors
    /// [`EngineError::Io`], [`EngineError::Tokenizer`], [`EngineError::Json`].
    pub fn from_dir(dir: &Path) -> Result<Self, EngineError> {
        let mut tokenizer = Self::from_json(&read_small(&dir.join("tokenizer.json"))?)?;
        tokenizer.ends = TokenizerConfig::from_dir(dir)?.ends(&tokenizer);
        Ok(tokenizer)
    }

    /// Hides these tokens in text, whatever their file says of them: those that end an answer are no part of
    /// it.
    pub fn hide(&mut self, ids: &[u32]) {
        for id in ids {
            if let Some(TokenEntry { hidden: Some(hidden), .. }) = self.tokens.entries.get_mut(*id as usize) {
                *hidden = true;
            }
        }
    }

    /// From the metadata of a GGUF file.
    ///
    /// # Errors
    /// [`EngineError::UnknownPreTokenizer`] if the file names splitting rules that are not known here;
    /// otherwise what is wrong with the file.
    pub fn from_gguf(path: &Path) -> Result<Self, EngineError> {
        from_gguf_bytes(&map_file(&split::first(path))?)
    }

    fn new(mut inner: tokenizers::Tokenizer, ends: Option<Ends>) -> Result<Self, EngineError> {
        inner.with_padding(None);
        inner.with_truncation(None).map_err(broken)?;
        let mut hash = blake3::Hasher::new();
        hash.update(b"tandem tokenizer fingerprint 2");
        let added = inner.get_added_tokens_decoder();
        let mut tokens = Tokens::default();
        // One by one: the library hands out whole vocabularies only as copies.
        let mut left = inner.get_vocab_size(true);
        for id in 0..VOCAB_MAX as u32 {
            if left == 0 {
                break;
            }
            let text = match added.get(&id) {
                Some(token) => Some(token.content.clone()),
                None => inner.get_model().id_to_token(id),
            };
            // An added token takes the place of one that is spelt the same.
            let Some(text) = text.filter(|text| inner.token_to_id(text) == Some(id)) else { continue };
            let hidden = added.get(&id).is_some_and(|t| t.special);
            // Not whether it is hidden: the edge alone makes text of tokens, and files of one model differ in it.
            hash.update(&id.to_le_bytes());
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
            while tokens.entries.len() < id as usize {
                tokens.push("", None)?;
            }
            tokens.push(&text, Some(hidden))?;
            left -= 1;
        }
        // What is left shares its id with a token above, or lies past the largest id.
        let past = |id: &u32| *id as usize >= VOCAB_MAX;
        if let Some(id) = if left > 0 { inner.get_vocab(true).into_values().find(past) } else { None } {
            return Err(broken(format!("token id {id} is past the largest vocabulary")));
        }
        if tokens.entries.is_empty() {
            return Err(broken("the vocabulary is empty"));
        }
        tokens.texts.shrink_to_fit();
        tokens.entries.shrink_to_fit();
        let spelling = spelling(inner.get_decoder());
        Ok(Self {
            inner,
            tokens,
            digest: Digest(*hash.finalize().as_bytes()),
            spelling,
            ends,
            marks: OnceLock::new(),
            bound: OnceLock::new(),
        })
    }

    /// Token ids of a text. Special tokens written out in it become those tokens; none is added.
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`] if the text is too long or the tokenizer cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        self.ids(text, false)
    }

    /// As [`Tokenizer::encode`], with the tokens that the model wants around a text of its own (a chat
    /// template writes them itself).
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        match &self.ends {
            None => self.ids(text, true),
            Some(Ends { before, after }) => Ok([before, self.ids(text, false)?.as_slice(), after].concat()),
        }
    }

    /// A number of tokens that the text has at least, found without tokenizing it; 0 where this tokenizer
    /// allows no such bound.
    #[must_use]
    pub fn tokens_min(&self, text: &str) -> usize {
        self.bound.get_or_init(|| Bound::of(self)).as_ref().map_or(0, |bound| bound.tokens_min(text))
    }

    fn ids(&self, text: &str, around: bool) -> Result<Vec<u32>, EngineError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(broken(format!("the text has {} bytes, at most {TEXT_BYTES_MAX} are taken", text.len())));
        }
        guarded(|| Ok(self.inner.encode_fast(text, around).map_err(broken)?.get_ids().to_vec()))
    }

    /// Text of token ids; special tokens are hidden, bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`] if the tokenizer's own decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, EngineError> {
        let mut stream = self.stream();
        let mut out = String::new();
        for &id in ids {
            out.push_str(&stream.push(self, id)?);
        }
        out.push_str(&stream.finish());
        Ok(out)
    }

    /// A decoder for tokens that come one by one, from the beginning of a text.
    #[must_use]
    pub fn stream(&self) -> StreamDecoder {
        StreamDecoder::default()
    }

    /// A decoder for tokens that go on where `before` ends: a space that the first of them begins with is
    /// part of the text.
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`] if the tokenizer's own decoder fails.
    pub fn stream_after(&self, before: &[u32]) -> Result<StreamDecoder, EngineError> {
        StreamDecoder::after(self, before)
    }

    /// Digest of the vocabulary: ids mean the same text iff it is equal.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// One more than the largest token id.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.tokens.entries.len()
    }

    /// The token as the vocabulary spells it.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<&str> {
        Some(self.tokens.get(id)?.0)
    }

    /// The id of a token as the vocabulary spells it.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether a token is a special one, hidden in text.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.tokens.get(id).is_some_and(|(_, hidden)| hidden)
    }

    /// The bytes a token stands for (special tokens: as they are spelt); a part of a character is
    /// possible.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let (text, special) = self.tokens.get(id)?;
        Some(match self.spelling {
            _ if special => text.as_bytes().to_vec(),
            Spelling::ByteLevel => stream::bytes_of(text),
            Spelling::Pieces { .. } | Spelling::Other => stream::piece_bytes(text),
        })
    }

    /// Whether [`Tokenizer::token_bytes`] says what text a token becomes, whatever stands beside it.
    pub(crate) fn spells_bytes(&self) -> bool {
        self.spelling != Spelling::Other
    }

    /// What the library's decoder makes of tokens that follow each other.
    fn decode_window(&self, ids: &[u32]) -> Result<String, EngineError> {
        guarded(|| self.inner.decode(ids, true).map_err(broken))
    }
}

/// The tokenizer of a whole GGUF file.
pub(crate) fn from_gguf_bytes(bytes: &[u8]) -> Result<Tokenizer, EngineError> {
    let file = format::Gguf::parse(bytes)?;
    guarded(|| {
        let (inner, ends) = gguf::build(&file)?;
        Tokenizer::new(inner, Some(ends))
    })
}

/// Runs code of the library, which trusts its files: a panic in it is an error of the file. Nothing that
/// it could leave half-done is used afterwards.
fn guarded<T>(work: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(broken("the library cannot work with this tokenizer")))
}

fn spelling(decoder: Option<&DecoderWrapper>) -> Spelling {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => Spelling::ByteLevel,
        Some(DecoderWrapper::Sequence(steps)) => {
            let steps = steps.get_decoders();
            let has = |step: fn(&DecoderWrapper) -> bool| steps.iter().any(step);
            if has(|step| matches!(step, DecoderWrapper::ByteLevel(_))) && steps.len() == 1 {
                Spelling::ByteLevel
            } else if has(|step| matches!(step, DecoderWrapper::ByteFallback(_)))
                && has(|step| matches!(step, DecoderWrapper::Replace(_)))
            {
                Spelling::Pieces { strip: has(|step| matches!(step, DecoderWrapper::Strip(_))) }
            } else {
                Spelling::Other
            }
        }
        _ => Spelling::Other,
    }
}
