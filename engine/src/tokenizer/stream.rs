//! Tokens to text as they come: a piece never ends inside a UTF-8 character.

use std::collections::HashMap;
use std::sync::LazyLock;

use super::{Spelling, Tokenizer};
use crate::error::EngineError;

/// Tokens a non-byte-level decoder looks back on; more than any character spans.
const WINDOW_MAX: usize = 16;

/// Tokens before a text that its decoder is shown.
const CONTEXT: usize = 4;

/// State of one text that is being decoded.
#[derive(Clone, Debug, Default)]
pub struct StreamDecoder {
    /// Bytes of an unfinished character.
    pending: Vec<u8>,
    /// Tokens of the current window and how much of its text is out (decoders that are not
    /// byte-level depend on neighbouring tokens).
    window: Vec<u32>,
    emitted: usize,
    last: String,
    /// Some text is out.
    begun: bool,
}

impl StreamDecoder {
    /// For tokens that follow `before`.
    pub(super) fn after(tokenizer: &Tokenizer, before: &[u32]) -> Result<Self, EngineError> {
        let mut decoder = Self { begun: true, ..Self::default() };
        if tokenizer.spelling == Spelling::Other {
            let shown = before.iter().rev().filter(|&&id| tokenizer.token(id).is_some() && !tokenizer.is_special(id));
            decoder.window = shown.take(CONTEXT).copied().collect();
            decoder.window.reverse();
            decoder.emitted = tokenizer.decode_window(&decoder.window)?.trim_end_matches('\u{fffd}').len();
        }
        Ok(decoder)
    }

    /// Text that `id` completes; empty while a character is unfinished, for a special token and for an id
    /// without a token: heads are wider than vocabularies, and a stray choice must not end an answer.
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`] if the tokenizer's own decoder fails.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, EngineError> {
        let Some(text) = tokenizer.token(id) else { return Ok(String::new()) };
        if tokenizer.is_special(id) {
            return Ok(String::new());
        }
        match tokenizer.spelling {
            Spelling::ByteLevel => {
                self.pending.extend(bytes_of(text));
                return Ok(drain_valid(&mut self.pending));
            }
            Spelling::Pieces { strip } => {
                let bytes = piece_bytes(text);
                let first = !std::mem::replace(&mut self.begun, true);
                let skip = usize::from(strip && first && bytes.first() == Some(&b' '));
                self.pending.extend(&bytes[skip..]);
                return Ok(drain_valid(&mut self.pending));
            }
            Spelling::Other => {}
        }
        self.window.push(id);
        let all = tokenizer.decode_window(&self.window)?;
        // An unfinished character decodes to a replacement character at the end.
        if all.ends_with('\u{fffd}') && self.window.len() < WINDOW_MAX {
            self.last = all.get(self.emitted..).unwrap_or_default().to_owned();
            return Ok(String::new());
        }
        self.last.clear();
        let piece = all.get(self.emitted..).unwrap_or_default().to_owned();
        self.emitted = all.len();
        if self.window.len() >= WINDOW_MAX {
            // Keep one token of context, as a word's leading space depends on it.
            self.window.drain(..self.window.len() - 1);
            self.emitted = tokenizer.decode_window(&self.window)?.len();
        }
        Ok(piece)
    }

    /// What is left at the end: an unfinished character as U+FFFD, or nothing.
    pub fn finish(&mut self) -> String {
        self.window.clear();
        self.emitted = 0;
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest + &std::mem::take(&mut self.last)
    }
}

/// Takes what is decided out of the buffer: characters, and U+FFFD for bytes that can never become
/// one. Leaves at most three bytes.
fn drain_valid(bytes: &mut Vec<u8>) -> String {
    let mut out = String::new();
    let mut at = 0;
    loop {
        let rest = &bytes[at..];
        match std::str::from_utf8(rest) {
            Ok(text) => {
                out.push_str(text);
                at = bytes.len();
                break;
            }
            Err(e) => {
                let (valid, _) = rest.split_at(e.valid_up_to());
                out.push_str(&String::from_utf8_lossy(valid));
                at += e.valid_up_to();
                let Some(bad) = e.error_len() else { break };
                out.push('\u{fffd}');
                at += bad;
            }
        }
    }
    bytes.drain(..at);
    out
}

/// Bytes of a byte-level token; one that is not spelt in the alphabet stands for its own text.
pub(super) fn bytes_of(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(|c| ALPHABET.get(&c).copied()).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Bytes of a SentencePiece piece: `<0x0A>` stands for a byte, `▁` for a blank.
pub(super) fn piece_bytes(piece: &str) -> Vec<u8> {
    let hex = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|hex| hex.len() == 2);
    match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => piece.replace('\u{2581}', " ").into_bytes(),
    }
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up.
static ALPHABET: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let mut next = 0x100;
    (0..=u8::MAX)
        .map(|b| {
            if matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
                return (char::from(b), b);
            }
            let c = char::from_u32(next).unwrap_or('\u{fffd}');
            next += 1;
            (c, b)
        })
        .collect()
});
