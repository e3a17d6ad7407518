//! A tokenizer from GGUF metadata: byte-level BPE with the splitting rules the file names ([`super::pre`]),
//! or SentencePiece (`llama`) from its pieces and scores.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::utils::Sequence as Normalizers;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, NormalizerWrapper, Tokenizer};

use super::generation::is_control;
use super::{Ends, SPACE, broken, pre};
use crate::container::gguf::{Gguf, Value};
use crate::error::EngineError;

/// Token types of the format.
const UNKNOWN: i32 = 2;
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Longest piece of a SentencePiece vocabulary that merges are made for, characters (the tools that
/// train them stop at 16; Gemma's longest is 31).
const PIECE_CHARS_MAX: usize = 256;

const TOKENS: &str = "tokenizer.ggml.tokens";

/// Builds the tokenizer that the metadata describes, and says what a text begins and ends with.
pub(super) fn build(file: &Gguf<'_>) -> Result<(Tokenizer, Ends), EngineError> {
    let tokens = file.texts(TOKENS)?;
    let types = types(file, &tokens)?;
    let (mut tokenizer, add_bos) = match file.text("tokenizer.ggml.model")? {
        "gpt2" => bpe(file, &tokens, &types)?,
        "llama" => (sentence_pieces(file, &tokens, &types)?, true),
        other => {
            let problem = format!("`{other}` is not supported; supported: gpt2 (BPE), llama (SentencePiece)");
            return Err(EngineError::spec("tokenizer.ggml.model", problem));
        }
    };
    let mut added = Vec::new();
    for (token, ty) in tokens.iter().zip(&types) {
        // Empty ones would match everywhere.
        match *ty {
            _ if token.is_empty() => {}
            CONTROL | UNKNOWN => added.push(AddedToken::from(*token, true).normalized(false)),
            USER_DEFINED => added.push(AddedToken::from(*token, false).normalized(false)),
            _ => {}
        }
    }
    tokenizer.add_tokens(added).map_err(broken)?;
    let end = |wanted: bool, key: &str| {
        let id = file.token(key).filter(|&id| wanted && (id as usize) < tokens.len());
        id.into_iter().collect()
    };
    let ends = Ends {
        before: end(flag(file, "tokenizer.ggml.add_bos_token", add_bos)?, "tokenizer.ggml.bos_token_id"),
        after: end(flag(file, "tokenizer.ggml.add_eos_token", false)?, "tokenizer.ggml.eos_token_id"),
    };
    Ok((tokenizer, ends))
}

fn flag(file: &Gguf<'_>, key: &str, default: bool) -> Result<bool, EngineError> {
    match file.meta.get(key) {
        None => Ok(default),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(_) => Err(EngineError::spec(key, "is not true or false")),
    }
}

/// The type of every token; normal where the file does not say. Files call control tokens normal at times:
/// those that the file itself names as an end of something, and those that can be nothing else.
fn types(file: &Gguf<'_>, tokens: &[&str]) -> Result<Vec<i32>, EngineError> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let mut types = file.integers(KEY)?;
    match types.len() {
        0 => types = vec![NORMAL; tokens.len()],
        n if n < tokens.len() => {
            return Err(EngineError::spec(KEY, format!("has {n} entries for {} tokens", tokens.len())));
        }
        _ => types.truncate(tokens.len()),
    }
    let named: Vec<u32> = ["bos", "eos", "eot", "eom"]
        .iter()
        .filter_map(|end| file.token(&format!("tokenizer.ggml.{end}_token_id")))
        .collect();
    for (id, (ty, token)) in types.iter_mut().zip(tokens).enumerate() {
        if *ty == NORMAL && (named.contains(&(id as u32)) || is_control(token)) {
            *ty = CONTROL;
        }
    }
    Ok(types)
}

/// Ids by token. Unused ones, which only pad the weights, are left out: two models of a family that
/// pad differently have one tokenizer.
fn vocabulary(tokens: &[&str], types: &[i32]) -> Result<Vocab, EngineError> {
    let mut vocab = Vocab::default();
    // Empty ones stand for nothing, and files have several.
    let used = |id: usize, token: &str| types[id] != UNUSED && !token.is_empty();
    for (id, token) in tokens.iter().enumerate().filter(|(id, token)| used(*id, token)) {
        if vocab.insert((*token).to_owned(), id as u32).is_some() {
            return Err(EngineError::spec(TOKENS, format!("`{token}` appears twice")));
        }
    }
    Ok(vocab)
}

fn bpe(file: &Gguf<'_>, tokens: &[&str], types: &[i32]) -> Result<(Tokenizer, bool), EngineError> {
    let rules = pre::find(file.text("tokenizer.ggml.pre")?)?;
    let vocab = vocabulary(tokens, types)?;
    let merges = file
        .texts("tokenizer.ggml.merges")?
        .into_iter()
        .map(|merge| {
            let wrong = |problem: &str| EngineError::spec("tokenizer.ggml.merges", format!("`{merge}` {problem}"));
            let (a, b) = merge.split_once(' ').ok_or_else(|| wrong("is not two tokens"))?;
            if [a, b].iter().any(|part| !vocab.contains_key(*part)) || !vocab.contains_key(&format!("{a}{b}")) {
                return Err(wrong("merges what is not in the vocabulary"));
            }
            Ok((a.to_owned(), b.to_owned()))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let bpe =
        BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(rules.whole_words).build().map_err(broken)?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(rules.pre_tokenizer()?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    Ok((tokenizer, rules.add_bos))
}

/// SentencePiece's BPE as merges in the order of the pieces' scores, as `transformers` converts it.
fn sentence_pieces(file: &Gguf<'_>, tokens: &[&str], types: &[i32]) -> Result<Tokenizer, EngineError> {
    let scores = file.floats("tokenizer.ggml.scores")?;
    if scores.len() != tokens.len() {
        let problem = format!("has {} entries for {} tokens", scores.len(), tokens.len());
        return Err(EngineError::spec("tokenizer.ggml.scores", problem));
    }
    let vocab = vocabulary(tokens, types)?;
    let unknown = types.iter().position(|ty| *ty == UNKNOWN).map(|id| tokens[id].to_owned());
    let byte_fallback = (0..=u8::MAX).all(|byte| vocab.contains_key(&format!("<0x{byte:02X}>")));
    let merges = merges(tokens, types, &scores, &vocab);
    let mut bpe = BPE::builder().byte_fallback(byte_fallback).fuse_unk(true).vocab_and_merges(vocab, merges);
    if let Some(unknown) = unknown {
        bpe = bpe.unk_token(unknown);
    }
    let mut tokenizer = Tokenizer::new(bpe.build().map_err(broken)?);
    let prefix = flag(file, "tokenizer.ggml.add_space_prefix", true)?;
    let spaces = Replace::new(" ", SPACE).map_err(broken)?;
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        normalizers.push(Prepend::new(SPACE.to_owned()).into());
    }
    normalizers.push(spaces.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(broken)?;
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ").map_err(broken)?.into(), ByteFallback::default().into(), Fuse::default().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// Every way to put a piece together from two others; the pieces with the best scores first.
fn merges(tokens: &[&str], types: &[i32], scores: &[f32], vocab: &Vocab) -> Vec<(String, String)> {
    let mut found: Vec<(f32, u32, u32)> = Vec::new();
    for (id, piece) in tokens.iter().enumerate().filter(|(id, _)| types[*id] == NORMAL) {
        let cuts = piece.char_indices().skip(1).map(|(at, _)| at).take(PIECE_CHARS_MAX);
        for (left, right) in cuts.map(|at| piece.split_at(at)) {
            if let (Some(&left), Some(&right)) = (vocab.get(left), vocab.get(right)) {
                found.push((scores[id], left, right));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let text = |id: u32| tokens[id as usize].to_owned();
    found.into_iter().map(|(_, left, right)| (text(left), text(right))).collect()
}
