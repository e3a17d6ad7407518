//! How a GGUF's BPE splits text before the merges. A file names its rules (`tokenizer.ggml.pre`); only
//! names whose rules are known are taken, since a guess would silently change token ids.
//!
//! The expressions are those of the models' own `tokenizer.json` files; the names are llama.cpp's.

use tokenizers::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

use super::broken;
use crate::error::EngineError;

/// How a text is split, and what else goes with the name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Each expression splits what the ones before it have left; matches and what lies between them
    /// become pieces.
    expressions: &'static [&'static str],
    /// Whole words of the vocabulary are taken without merging.
    pub(super) whole_words: bool,
    /// A text begins with the start token unless the file says otherwise.
    pub(super) add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";
const PUNCTUATION_FALCON: &str = r"[\p{P}\$\+<=>\^~\|`]+";
const NUMBER: &str = r"\p{N}";
const NUMBERS: &str = r"\p{N}+";
const NUMBERS_3: &str = r"\p{N}{1,3}";
const DIGITS_3: &str = "[0-9][0-9][0-9]";
const LINES: &str = r"[\r\n]";
const CJK: &str = "[一-龥ࠀ-一가-퟿]+";
const CJK_KANA: &str = "[一-龥\u{3040}-ゟ゠-ヿ]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
/// The letters that DeepSeek-LLM's file lists; no class of Unicode is the same. Those that normalise to
/// letters of other blocks are escaped.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const DEEPSEEK_PUNCTUATION: &str = r"\s?[!-/:-~！-／：-～‘-‟\x{3000}-。]+";

const fn rules(expressions: &'static [&'static str]) -> Rules {
    Rules { expressions, whole_words: false, add_bos: false }
}

/// Each name and its rules.
const NAMES: [(&[&str], Rules); 14] = [
    (&["default"], rules(&[PUNCTUATION, GPT2, NUMBERS, DIGITS_3])),
    (&["gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"], rules(&[GPT2])),
    (
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum"],
        rules(&[NUMBER, GPT2]),
    ),
    (
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        Rules { expressions: &[LLAMA3], whole_words: true, add_bos: true },
    ),
    (&["dbrx", "smaug-bpe", "chatglm-bpe", "glm4"], rules(&[LLAMA3])),
    (&["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2"], rules(&[QWEN2])),
    (&["qwen35"], rules(&[QWEN35])),
    (&["gpt-4o", "llama4", "kanana2", "o200k"], rules(&[O200K])),
    (&["tekken"], Rules { expressions: &[TEKKEN], whole_words: true, add_bos: true }),
    (&["deepseek-llm"], rules(&[LINES, DEEPSEEK_LETTERS, DEEPSEEK_PUNCTUATION, r"\s+$", CJK, NUMBERS])),
    (&["deepseek-coder"], rules(&[LINES, r"\s?\p{L}+", r"\s?\p{P}+", CJK, NUMBER])),
    (&["deepseek-v3", "hunyuan-dense", "joyai-llm"], rules(&[NUMBERS_3, CJK_KANA, DEEPSEEK3])),
    (&["falcon"], rules(&[PUNCTUATION_FALCON, GPT2, DIGITS_3])),
    (&["superbpe"], rules(&[NUMBERS, r"(?=(\d{3})+(?!\d))"])),
];

/// The rules of a name.
///
/// # Errors
/// [`EngineError::UnknownPreTokenizer`], which lists the known ones.
pub(super) fn find(name: &str) -> Result<Rules, EngineError> {
    NAMES.iter().find(|(names, _)| names.contains(&name)).map(|(_, rules)| *rules).ok_or_else(|| {
        let known: Vec<&str> = NAMES.iter().flat_map(|(names, _)| *names).copied().collect();
        EngineError::UnknownPreTokenizer { name: name.to_owned(), known: known.join(", ") }
    })
}

impl Rules {
    /// The rules at work; pieces come out in the byte-level alphabet.
    pub(super) fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper, EngineError> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for expression in self.expressions {
            let pattern = SplitPattern::Regex((*expression).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(broken)?;
            steps.push(split.into());
        }
        steps.push(ByteLevel::new(false, true, false).into());
        Ok(Sequence::new(steps).into())
    }
}
