//! How few tokens a text can be, told from its bytes: to tokenize a text takes hundreds of times its
//! bytes of memory, to find that it is too long for any context must not.
//!
//! A token that spells n bytes gives each of them at most 1/n, if each byte counts for one over the
//! length of the longest token that has it. So the sum over a text is never more than its tokens.

use tokenizers::tokenizer::normalizer::SplitDelimiterBehavior;
use tokenizers::{ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};

use super::{SPACE, Spelling, Tokenizer, stream};

/// A character and the marks after it take at most this many times the bytes of their composed form.
const COMPOSED_BYTES_MAX: f64 = 4.0;
/// Takes rounding errors of the sum away.
const ROUNDING: f64 = 1.0 - 1e-9;

/// What each byte counts for.
pub(super) struct Bound {
    weights: [f64; 256],
    /// The text is composed (or decomposed) first: what a byte that is not ASCII counts for then.
    composed: Option<f64>,
}

impl Bound {
    /// The bound of a tokenizer; none where text may vanish or become other text before it is split.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let inner = &tokenizer.inner;
        let ModelWrapper::BPE(bpe) = inner.get_model() else { return None };
        let whole = bpe.dropout.is_none()
            && bpe.continuing_subword_prefix.is_none()
            && bpe.end_of_word_suffix.is_none()
            && match tokenizer.spelling {
                Spelling::ByteLevel => true,
                Spelling::Pieces { .. } => bpe.byte_fallback,
                Spelling::Other => false,
            };
        let mut composes = false;
        if !whole
            || !inner.get_normalizer().is_none_or(|n| keeps_text(n, &mut composes))
            || !inner.get_pre_tokenizer().is_none_or(splits_only)
        {
            return None;
        }
        let mut longest = [0_usize; 256];
        let mut own = [false; 256];
        let mut see = |bytes: &[u8]| {
            for &byte in bytes {
                longest[usize::from(byte)] = longest[usize::from(byte)].max(bytes.len());
            }
            if let [byte] = bytes {
                own[usize::from(*byte)] = true;
            }
        };
        let added = inner.get_added_tokens_decoder();
        for id in 0..tokenizer.vocab_size() as u32 {
            let Some(text) = tokenizer.token(id) else { continue };
            match tokenizer.spelling {
                _ if added.contains_key(&id) => see(text.as_bytes()),
                Spelling::ByteLevel => see(&stream::bytes_of(text)),
                // The text may have the sign for a blank itself.
                _ => {
                    see(&stream::piece_bytes(text));
                    if text.contains(SPACE) {
                        see(text.as_bytes());
                    }
                }
            }
        }
        let strips = added.values().any(|token| token.lstrip || token.rstrip);
        // A byte without a token of its own may be dropped, or become one unknown token with its neighbours.
        let wide = !strips && own[0x80..0xf5].iter().zip(0x80_u8..).all(|(own, byte)| *own || is_never(byte));
        let mut weights = [0.0; 256];
        for (byte, weight) in (0..=u8::MAX).zip(&mut weights) {
            let counts = if byte.is_ascii() { own[usize::from(byte)] && !(strips && is_blank(byte)) } else { wide };
            if counts && longest[usize::from(byte)] > 0 {
                *weight = 1.0 / longest[usize::from(byte)] as f64;
            }
        }
        // Some characters are composed to these.
        let composed = weights[0x80..].iter().chain(b";`K".map(|byte| &weights[usize::from(byte)]));
        let least = composed.copied().filter(|weight| *weight > 0.0).fold(f64::INFINITY, f64::min);
        let least = if wide && least.is_finite() { least / COMPOSED_BYTES_MAX } else { 0.0 };
        Some(Self { weights, composed: composes.then_some(least) })
    }

    /// The text is at least this many tokens.
    pub(super) fn tokens_min(&self, text: &str) -> usize {
        let weight = |byte: &u8| self.weights[usize::from(*byte)];
        let bytes = text.as_bytes();
        let sum: f64 = match self.composed {
            None => bytes.iter().map(weight).sum(),
            Some(composed) => {
                let next = bytes[1.min(bytes.len())..].iter().copied().chain([b' ']);
                let each = bytes.iter().zip(next).map(|(byte, next)| match (byte.is_ascii(), next.is_ascii()) {
                    (true, true) => weight(byte),
                    // A mark may follow.
                    (true, false) => 0.0,
                    (false, _) => composed,
                });
                each.sum()
            }
        };
        (sum * ROUNDING) as usize
    }
}

/// UTF-8 has no such byte.
fn is_never(byte: u8) -> bool {
    matches!(byte, 0xc0 | 0xc1 | 0xf5..)
}

fn is_blank(byte: u8) -> bool {
    char::from(byte).is_whitespace()
}

/// Whether normalizing keeps every character, or composes it with its marks.
fn keeps_text(normalizer: &NormalizerWrapper, composes: &mut bool) -> bool {
    match normalizer {
        NormalizerWrapper::NFC(_) | NormalizerWrapper::NFD(_) => {
            *composes = true;
            true
        }
        NormalizerWrapper::Prepend(_) | NormalizerWrapper::ByteLevel(_) => true,
        NormalizerWrapper::Replace(replace) => {
            let replace = serde_json::to_value(replace).unwrap_or_default();
            replace["pattern"]["String"] == " " && replace["content"] == SPACE
        }
        NormalizerWrapper::Sequence(steps) => steps.as_ref().iter().all(|step| keeps_text(step, composes)),
        _ => false,
    }
}

/// Whether a text is cut into pieces and nothing of it is lost.
fn splits_only(pre: &PreTokenizerWrapper) -> bool {
    match pre {
        PreTokenizerWrapper::ByteLevel(_) | PreTokenizerWrapper::Digits(_) => true,
        PreTokenizerWrapper::Split(split) => split.behavior != SplitDelimiterBehavior::Removed,
        PreTokenizerWrapper::Punctuation(split) => split.behavior != SplitDelimiterBehavior::Removed,
        PreTokenizerWrapper::Metaspace(space) => SPACE.chars().eq([space.get_replacement()]),
        PreTokenizerWrapper::Sequence(steps) => steps.as_ref().iter().all(splits_only),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use serde_json::{Value, json};
    use tandem_models::EDGE;

    use super::*;

    fn edge_file() -> Value {
        serde_json::from_slice(EDGE.tokenizer).expect("JSON")
    }

    fn load(file: &Value) -> Tokenizer {
        Tokenizer::from_json(file.to_string().as_bytes()).expect("a tokenizer")
    }

    /// The embedded tokenizer with normalizers, a token of blanks, and one that takes the blanks around it.
    static KINDS: LazyLock<Vec<(&'static str, Tokenizer)>> = LazyLock::new(|| {
        let plain = edge_file();
        let mut composing = plain.clone();
        composing["normalizer"] = json!({ "type": "NFC" });
        let (mut stripping, mut blanks) = (plain.clone(), plain.clone());
        let next = load(&plain).vocab_size();
        let token = |content: &str, strips: bool| {
            json!({ "id": next, "content": content, "single_word": false, "lstrip": strips, "rstrip": strips,
                    "normalized": false, "special": false })
        };
        stripping["added_tokens"].as_array_mut().expect("a list").push(token("<mask>", true));
        blanks["added_tokens"].as_array_mut().expect("a list").push(token(&" ".repeat(128), false));
        vec![
            ("plain", load(&plain)),
            ("composing", load(&composing)),
            ("stripping", load(&stripping)),
            ("blanks", load(&blanks)),
            ("pieces", load(&pieces())),
        ]
    });

    /// SentencePiece's way with a few pieces and all bytes.
    fn pieces() -> Value {
        let mut vocab: Vec<String> = vec!["<unk>".into()];
        vocab.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
        vocab.extend(["▁", "a", "b", "é", "▁▁", "▁▁▁▁", "ab", "abab", "▁abab"].map(String::from));
        let vocab: serde_json::Map<String, Value> =
            vocab.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "pre_tokenizer": null,
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "Prepend", "prepend": "▁" },
                { "type": "Replace", "pattern": { "String": " " }, "content": "▁" } ] },
            "post_processor": null,
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" },
                { "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
            "model": { "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                       "merges": [["▁", "▁"], ["▁▁", "▁▁"], ["a", "b"], ["ab", "ab"], ["▁", "abab"]] },
        })
    }

    proptest! {
        #[test]
        fn a_text_is_never_fewer_tokens(parts in prop::collection::vec((0_usize..12, 1_usize..40, "\\PC{0,8}"), 0..12)) {
            const SPELT: [&str; 11] =
                [" ", "a", "ab", "\n", "▁", "1", "e\u{301}", "\u{1fbe}\u{308}\u{301}", "\u{212a}", " <mask> ", "한"];
            let text: String = parts
                .iter()
                .map(|(kind, times, random)| SPELT.get(*kind).map_or_else(|| random.clone(), |spelt| spelt.repeat(*times)))
                .collect();
            for (kind, tokenizer) in KINDS.iter() {
                let tokens = tokenizer.encode(&text).expect("encodes").len();
                prop_assert!(tokenizer.tokens_min(&text) <= tokens, "{kind}: {} > {tokens}", tokenizer.tokens_min(&text));
            }
        }
    }

    #[test]
    fn every_token_of_the_vocabulary_counts_for_one_at_most() {
        for (kind, tokenizer) in KINDS.iter() {
            for id in 0..tokenizer.vocab_size() as u32 {
                let Some(Ok(text)) = tokenizer.token_bytes(id).map(String::from_utf8) else { continue };
                let text = text.repeat(100);
                let tokens = tokenizer.encode(&text).expect("encodes").len();
                assert!(tokenizer.tokens_min(&text) <= tokens, "{kind}: {text:.20}");
            }
        }
    }

    #[test]
    fn long_texts_are_told_from_short_ones() {
        let mega = 1 << 20;
        for (kind, tokenizer) in KINDS.iter() {
            for text in ["a".repeat(mega), "ab ".repeat(mega / 3), "\u{1f600}".repeat(mega / 4), "1".repeat(mega)] {
                let (least, begin) = (tokenizer.tokens_min(&text), text.chars().next());
                let (most, wide) = (if *kind == "pieces" { 16 } else { 64 }, begin.is_some_and(|c| !c.is_ascii()));
                // What an added token strips is unknown for characters that are not ASCII.
                if !(wide && *kind == "stripping") {
                    assert!(least >= mega / if wide { most * 4 } else { most }, "{kind} {begin:?}: {least}");
                }
            }
        }
        let [plain, _, stripping, blanks, _] = &KINDS[..] else { panic!("five kinds") };
        let text = format!("<mask>{}", " ".repeat(mega));
        assert!(stripping.1.tokens_min(&text) <= 6, "the token takes the blanks");
        assert_eq!(blanks.1.tokens_min(&" ".repeat(mega)), mega / 128 - 1, "rounding");
        assert!(plain.1.tokens_min("a") <= 1);
    }

    #[test]
    fn where_text_may_vanish_there_is_no_bound() {
        let text = "a ".repeat(1000);
        for (field, value) in [
            ("normalizer", json!({ "type": "Strip", "strip_left": true, "strip_right": true })),
            ("normalizer", json!({ "type": "Replace", "pattern": { "Regex": " +" }, "content": "" })),
            ("normalizer", json!({ "type": "Lowercase" })),
            ("pre_tokenizer", json!({ "type": "WhitespaceSplit" })),
            (
                "pre_tokenizer",
                json!({ "type": "Split", "pattern": { "String": " " }, "behavior": "Removed", "invert": false }),
            ),
        ] {
            let mut file = edge_file();
            file[field] = value.clone();
            assert_eq!(load(&file).tokens_min(&text), 0, "{value}");
        }
        // A byte that the vocabulary has not is dropped.
        let mut file = edge_file();
        let id = file["model"]["vocab"]["a"].clone();
        let vocab = file["model"]["vocab"].as_object_mut().expect("a vocabulary");
        vocab.remove("a");
        vocab.insert("\u{ffff}".into(), id);
        let merges = file["model"]["merges"].as_array_mut().expect("merges");
        merges.retain(|merge| !merge.to_string().contains('a'));
        let tokenizer = load(&file);
        assert_eq!(
            tokenizer.tokens_min(&"a".repeat(1000)),
            tokenizer.encode(&"a".repeat(1000)).expect("encodes").len()
        );
    }
}
