//! Tokenizers from GGUF metadata against llama.cpp (`goldens/make_tokenizers.py`): every name of splitting
//! rules on texts that show where a word may end, and SentencePiece with and without the leading space.

use std::path::Path;

use serde::Deserialize;
use tandem_engine::spec::DecoderSpec;
use tandem_engine::tokenizer::{Tokenizer, gguf_stop_tokens};

#[derive(Deserialize)]
struct Golden {
    texts: Vec<String>,
    bpe: Bpe,
    spm: Vec<Spm>,
    pieces: Pieces,
}

#[derive(Deserialize)]
struct Bpe {
    tokens: Vec<String>,
    merges: Vec<String>,
    names: std::collections::BTreeMap<String, Ids>,
}

#[derive(Deserialize)]
struct Ids {
    /// None where llama.cpp and the model's own tokenizer differ.
    ids: Vec<Option<Vec<u32>>>,
    whole: Vec<u32>,
}

#[derive(Deserialize)]
struct Spm {
    prefix: bool,
    #[serde(flatten)]
    ids: Ids,
}

#[derive(Deserialize)]
struct Pieces {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i32>,
    bos: u32,
    eos: u32,
}

/// Metadata of a GGUF without tensors.
#[derive(Default)]
struct Metadata {
    bytes: Vec<u8>,
    entries: u64,
}

impl Metadata {
    fn entry(mut self, key: &str, ty: u32, value: &[u8]) -> Self {
        self.bytes.extend(text(key));
        self.bytes.extend(ty.to_le_bytes());
        self.bytes.extend(value);
        self.entries += 1;
        self
    }

    fn text(self, key: &str, value: &str) -> Self {
        self.entry(key, 8, &text(value))
    }

    fn number(self, key: &str, value: u32) -> Self {
        self.entry(key, 4, &value.to_le_bytes())
    }

    fn array<const N: usize>(self, key: &str, ty: u32, values: impl ExactSizeIterator<Item = [u8; N]>) -> Self {
        let mut bytes = ty.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.flatten());
        self.entry(key, 9, &bytes)
    }

    fn texts(self, key: &str, values: &[String]) -> Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|value| text(value)));
        self.entry(key, 9, &bytes)
    }

    fn file(&self) -> tempfile::NamedTempFile {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.extend(self.entries.to_le_bytes());
        file.extend(&self.bytes);
        let path = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(&path, file).expect("writes");
        path
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::from_gguf(self.file().path()).expect("a tokenizer")
    }
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tokenizers.json");
    serde_json::from_slice(&std::fs::read(path).expect("goldens")).expect("json")
}

fn check(tokenizer: &Tokenizer, what: &str, texts: &[String], wanted: &Ids) {
    let spelt = |ids: &[u32]| ids.iter().map(|&id| tokenizer.token(id).unwrap_or("?").to_owned()).collect::<Vec<_>>();
    for (text, ids) in texts.iter().zip(&wanted.ids) {
        let Some(ids) = ids else { continue };
        let got = tokenizer.encode(text).expect("encodes");
        assert_eq!(spelt(&got), spelt(ids), "{what}: {text:?}");
        assert_eq!(&got, ids, "{what}: {text:?}");
    }
    assert_eq!(tokenizer.encode_whole("a b").expect("encodes"), wanted.whole, "{what}: with its ends");
}

#[test]
fn every_name_of_splitting_rules_splits_as_in_llama_cpp() {
    let golden = golden();
    let Bpe { tokens, merges, names } = &golden.bpe;
    assert!(names.len() >= 24);
    let control = tokens.len() - 2;
    let types = (0..tokens.len()).map(|id| (if id < control { 1i32 } else { 3 }).to_le_bytes());
    for (name, ids) in names {
        let tokenizer = Metadata::default()
            .text("tokenizer.ggml.model", "gpt2")
            .text("tokenizer.ggml.pre", name)
            .texts("tokenizer.ggml.tokens", tokens)
            .texts("tokenizer.ggml.merges", merges)
            .array("tokenizer.ggml.token_type", 5, types.clone())
            .number("tokenizer.ggml.bos_token_id", control as u32)
            .number("tokenizer.ggml.eos_token_id", control as u32 + 1)
            .tokenizer();
        check(&tokenizer, name, &golden.texts, ids);
        for (text, ids) in golden.texts.iter().zip(&ids.ids) {
            let Some(ids) = ids else { continue };
            let shown = text.replace("<|im_start|>", "").replace("<|im_end|>", "");
            assert_eq!(tokenizer.decode(ids).expect("decodes"), shown, "{name}");
        }
    }
}

#[test]
fn with_channels_a_message_ends_no_answer() {
    let spec = DecoderSpec::from_hf(tandem_models::EDGE.config).expect("spec");
    let stops = |tokens: &[&str]| {
        let tokens: Vec<String> = tokens.iter().map(|token| (*token).to_owned()).collect();
        let file = Metadata::default()
            .texts("tokenizer.ggml.tokens", &tokens)
            .array("tokenizer.ggml.token_type", 5, tokens.iter().map(|_| 3i32.to_le_bytes()))
            .number("tokenizer.ggml.eos_token_id", 2)
            .number("tokenizer.ggml.eot_token_id", 3)
            .file();
        gguf_stop_tokens(file.path(), &spec).expect("stops")
    };
    let own = spec.eos_tokens.clone();
    assert_eq!(own, [1]);
    assert_eq!(stops(&["<|start|>", "a", "<|return|>", "<|end|>", "<|call|>"]), [1, 2, 4]);
    assert_eq!(stops(&["<|user|>", "a", "<|endoftext|>", "<|end|>", "<|call|"]), [1, 2, 3]);
}

#[test]
fn sentence_pieces_are_those_of_llama_cpp() {
    let golden = golden();
    let Pieces { tokens, scores, types, bos, eos } = &golden.pieces;
    for Spm { prefix, ids } in &golden.spm {
        let tokenizer = Metadata::default()
            .text("tokenizer.ggml.model", "llama")
            .texts("tokenizer.ggml.tokens", tokens)
            .array("tokenizer.ggml.scores", 6, scores.iter().map(|score| score.to_le_bytes()))
            .array("tokenizer.ggml.token_type", 5, types.iter().map(|ty| ty.to_le_bytes()))
            .number("tokenizer.ggml.bos_token_id", *bos)
            .number("tokenizer.ggml.eos_token_id", *eos)
            .entry("tokenizer.ggml.add_space_prefix", 7, &[u8::from(*prefix)])
            .tokenizer();
        check(&tokenizer, &format!("prefix {prefix}"), &golden.texts, ids);
        for (text, ids) in golden.texts.iter().zip(&ids.ids).filter(|(text, _)| !text.contains("<|")) {
            let ids = ids.as_ref().expect("ids");
            assert_eq!(&tokenizer.decode(ids).expect("decodes"), text, "prefix {prefix}");
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).expect("bytes")).collect();
            assert!(String::from_utf8(bytes).expect("whole characters").ends_with(text), "prefix {prefix}");
        }
    }
}
