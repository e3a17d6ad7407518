//! A tokenizer from GGUF metadata. The file names its splitting rules; only names whose rules are
//! known are taken, since a guess would silently change token ids.

use std::collections::HashMap;

use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::broken;
use crate::error::EngineError;
use crate::load::gguf::Gguf;

/// Token types of the format.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// How a text is split before the merges.
#[derive(Clone, Copy)]
enum Rules {
    /// GPT-2's words.
    Gpt2,
    /// Each digit alone, then GPT-2's words (SmolLM, StarCoder, Command-R).
    DigitsGpt2,
    /// An own expression; whole words of the vocabulary are taken without merging or not.
    Expression { pattern: &'static str, whole_words: bool },
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Names of `tokenizer.ggml.pre` and their rules (llama.cpp, `llm_tokenizer_bpe`).
const PRE_TOKENIZERS: [(&str, Rules); 11] = [
    ("gpt-2", Rules::Gpt2),
    ("gpt2", Rules::Gpt2),
    ("mpt", Rules::Gpt2),
    ("olmo", Rules::Gpt2),
    ("smollm", Rules::DigitsGpt2),
    ("starcoder", Rules::DigitsGpt2),
    ("refact", Rules::DigitsGpt2),
    ("codeshell", Rules::DigitsGpt2),
    ("llama-bpe", Rules::Expression { pattern: LLAMA3, whole_words: true }),
    ("llama3", Rules::Expression { pattern: LLAMA3, whole_words: true }),
    ("qwen2", Rules::Expression { pattern: QWEN2, whole_words: false }),
];

/// Builds the tokenizer that the metadata describes.
pub(super) fn build(file: &Gguf<'_>) -> Result<Tokenizer, EngineError> {
    let model = file.text("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return Err(EngineError::spec(
            "tokenizer.ggml.model",
            format!("`{model}` is not supported; supported: gpt2 (BPE)"),
        ));
    }
    let name = file.text("tokenizer.ggml.pre")?;
    let Some((_, rules)) = PRE_TOKENIZERS.iter().find(|(n, _)| *n == name) else {
        let known: Vec<&str> = PRE_TOKENIZERS.iter().map(|(n, _)| *n).collect();
        return Err(EngineError::UnknownPreTokenizer { name: name.to_owned(), known: known.join(", ") });
    };
    let tokens = file.texts("tokenizer.ggml.tokens")?;
    let merges = file
        .texts("tokenizer.ggml.merges")?
        .into_iter()
        .map(|m| match m.split_once(' ') {
            Some((a, b)) => Ok((a.to_owned(), b.to_owned())),
            None => Err(EngineError::spec("tokenizer.ggml.merges", format!("`{m}` is not two tokens"))),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut vocab = HashMap::new();
    for (id, token) in tokens.iter().enumerate() {
        if vocab.insert((*token).to_owned(), id as u32).is_some() {
            return Err(EngineError::spec("tokenizer.ggml.tokens", format!("`{token}` appears twice")));
        }
    }
    let whole_words = matches!(rules, Rules::Expression { whole_words: true, .. });
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .ignore_merges(whole_words)
        .build()
        .map_err(broken)?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer(*rules)?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    let mut added = Vec::new();
    for (token, ty) in tokens.iter().zip(file.integers("tokenizer.ggml.token_type")?) {
        match ty {
            CONTROL => added.push(AddedToken::from(*token, true)),
            USER_DEFINED => added.push(AddedToken::from(*token, false).normalized(false)),
            _ => {}
        }
    }
    tokenizer.add_tokens(added).map_err(broken)?;
    Ok(tokenizer)
}

fn pre_tokenizer(rules: Rules) -> Result<PreTokenizerWrapper, EngineError> {
    let bytes = |regex| PreTokenizerWrapper::from(ByteLevel::new(false, true, regex));
    Ok(match rules {
        Rules::Gpt2 => bytes(true),
        Rules::DigitsGpt2 => Sequence::new(vec![Digits::new(true).into(), bytes(true)]).into(),
        Rules::Expression { pattern, .. } => {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(broken)?;
            Sequence::new(vec![split.into(), bytes(false)]).into()
        }
    })
}
