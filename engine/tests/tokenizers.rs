//! Tokenizers from GGUF metadata against llama.cpp (`goldens/make_tokenizers.py`): every name of splitting
//! rules on texts that show where a word may end, and SentencePiece with and without the leading space.

use std::path::Path;

use serde::Deserialize;
use tandem_engine::spec::DecoderSpec;
use tandem_engine::tokenizer::{GenerationConfig, Tokenizer, gguf_sampling, gguf_stop_tokens};

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

/// A vocabulary of bytes with control tokens behind them, as a GGUF whose types may be wrong.
fn labelled(types: [i32; 3], eos: u32) -> tempfile::NamedTempFile {
    let tokens = ["<|im_start|>", "<|im_end|>", "h", "i", "hi", "<|endoftext|>"].map(str::to_owned);
    let all = [types[0], types[1], 1, 1, 1, types[2]];
    Metadata::default()
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "smollm")
        .texts("tokenizer.ggml.tokens", &tokens)
        .texts("tokenizer.ggml.merges", &["h i".to_owned()])
        .array("tokenizer.ggml.token_type", 5, all.iter().map(|ty| ty.to_le_bytes()))
        .number("tokenizer.ggml.eos_token_id", eos)
        .file()
}

/// Whatever types a file gives the tokens of turns, and whichever one it names as its end: they are tokens in
/// a prompt, the end ends an answer, and its text is not in it.
#[test]
fn a_files_labels_do_not_decide_where_a_turn_ends() {
    let mut spec = DecoderSpec::from_hf(tandem_models::EDGE.config).expect("spec");
    spec.eos_tokens.clear();
    for (types, eos) in [([3, 3, 3], 1), ([3, 3, 3], 5), ([1, 1, 1], 5), ([4, 4, 3], 5), ([1, 1, 3], 1), ([3, 1, 1], 0)]
    {
        let file = labelled(types, eos);
        let stops = gguf_stop_tokens(file.path(), &spec).expect("stops");
        assert!(stops.contains(&1) && stops.contains(&5), "{types:?} {eos}: {stops:?}");
        let mut tokenizer = Tokenizer::from_gguf(file.path()).expect("a tokenizer");
        tokenizer.hide(&stops);
        assert_eq!(tokenizer.encode("<|im_start|>hi<|im_end|>").expect("encodes"), [0, 4, 1], "{types:?} {eos}");
        assert_eq!(tokenizer.decode(&[4, 1, 5]).expect("decodes"), "hi", "{types:?} {eos}");
    }
}

#[test]
fn sampling_of_a_gguf_is_the_files_wish() {
    let of = |metadata: Metadata| gguf_sampling(metadata.file().path()).expect("readable");
    let float = |v: f32| v.to_le_bytes();
    assert_eq!(of(Metadata::default()), tandem_proto::message::SamplingParams::default());
    let wish = of(Metadata::default()
        .entry("general.sampling.temp", 6, &float(0.6))
        .entry("general.sampling.top_k", 5, &64i32.to_le_bytes())
        .entry("general.sampling.top_p", 6, &float(0.95))
        .entry("general.sampling.min_p", 6, &float(7.0))
        .entry("general.sampling.penalty_repeat", 6, &float(1.1)));
    assert_eq!((wish.temperature, wish.top_k, wish.top_p, wish.min_p), (0.6, 64, 0.95, 0.0));
    assert_eq!(wish.repetition_penalty, 1.1);
    assert_eq!(of(Metadata::default().entry("general.sampling.top_k", 5, &64i32.to_le_bytes())).temperature, 1.0);
}

/// A space that the first token of an answer begins with is part of it where the answer goes on in the
/// prompt's text.
#[test]
fn a_continued_text_keeps_its_first_space() {
    let Golden { pieces: Pieces { tokens, scores, types, bos, eos }, .. } = golden();
    let tokenizer = Metadata::default()
        .text("tokenizer.ggml.model", "llama")
        .texts("tokenizer.ggml.tokens", &tokens)
        .array("tokenizer.ggml.scores", 6, scores.iter().map(|score| score.to_le_bytes()))
        .array("tokenizer.ggml.token_type", 5, types.iter().map(|ty| ty.to_le_bytes()))
        .number("tokenizer.ggml.bos_token_id", bos)
        .number("tokenizer.ggml.eos_token_id", eos)
        .tokenizer();
    let blank = tokenizer.encode("a").expect("encodes")[0];
    assert!(tokenizer.token(blank).expect("a token").starts_with('\u{2581}'));
    let text = |mut stream: tandem_engine::tokenizer::StreamDecoder| {
        stream.push(&tokenizer, blank).expect("text") + &stream.push(&tokenizer, blank).expect("text")
    };
    let whole = text(tokenizer.stream());
    let continued = text(tokenizer.stream_after(&[bos, blank]).expect("a decoder"));
    assert_eq!(continued, format!(" {whole}"));
    // A decoder that only the library knows.
    let file = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true },
        "model": { "type": "WordLevel", "vocab": { "\u{2581}in": 0, "\u{2581}Paris": 1 }, "unk_token": "\u{2581}in" },
    });
    let words = Tokenizer::from_json(file.to_string().as_bytes()).expect("a tokenizer");
    let push = |mut stream: tandem_engine::tokenizer::StreamDecoder| {
        (stream.push(&words, 1).expect("text"), stream.push(&words, 0).expect("text"))
    };
    assert_eq!(push(words.stream()), ("Paris".to_owned(), " in".to_owned()));
    assert_eq!(push(words.stream_after(&[0]).expect("a decoder")), (" Paris".to_owned(), " in".to_owned()));
}

/// A byte-level BPE with Qwen's splitting whose merges would show a word that was not split.
fn splitting(added: &serde_json::Value) -> Vec<u8> {
    let split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let vocab = serde_json::json!({ "\u{120}": 0, "x": 1, "y": 2, "\u{120}\u{120}": 3, "x\u{120}": 4, "\u{120}x": 5,
        "\u{120}y": 6, "1": 7, "11": 8 });
    let file = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": split }, "behavior": "Isolated", "invert": false },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false } ] },
        "post_processor": null, "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
            "merges": ["\u{120} \u{120}", "x \u{120}", "\u{120} x", "\u{120} y", "1 1"] },
    });
    file.to_string().into_bytes()
}

/// A regex engine with a bound on its steps gives up here; the rest of the text then became one piece.
#[test]
fn a_million_blanks_are_split_like_ten() {
    let tokenizer = Tokenizer::from_json(&splitting(&serde_json::json!([]))).expect("a tokenizer");
    for blanks in [11, 1_100_001] {
        let ids = tokenizer.encode(&format!("{}x y11", " ".repeat(blanks))).expect("encodes");
        let (spaces, rest) = ids.split_at(blanks / 2);
        assert!(spaces.iter().all(|id| *id == 3), "{blanks}");
        assert_eq!(rest, [5, 6, 7, 7], "{blanks}");
    }
}

/// Two files of one model that call a token special or not have one tokenizer: ids mean the same text.
#[test]
fn a_special_flag_makes_no_other_tokenizer() {
    let with = |special: bool, text: &str| {
        let added = serde_json::json!([{ "id": 9, "content": text, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": special }]);
        Tokenizer::from_json(&splitting(&added)).expect("a tokenizer")
    };
    let (special, plain) = (with(true, "<tool>"), with(false, "<tool>"));
    assert_eq!((special.is_special(9), plain.is_special(9)), (true, false));
    assert_eq!(special.digest(), plain.digest());
    assert_ne!(special.digest(), with(true, "<toll>").digest());
}

/// What stands in `tokenizer_config.json` alone: the token that ends an answer, those around a text.
#[test]
fn the_tokenizer_config_is_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, value: &serde_json::Value| {
        std::fs::write(folder.path().join(name), value.to_string()).expect("written");
    };
    let added: serde_json::Value = [(9, "<s>"), (10, "<|EOT|>")]
        .map(|(id, text)| {
            serde_json::json!({ "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": false })
        })
        .into_iter()
        .collect();
    std::fs::write(folder.path().join("tokenizer.json"), splitting(&added)).expect("written");
    let mut spec = DecoderSpec::from_hf(tandem_models::EDGE.config).expect("spec");
    spec.eos_tokens = vec![2];
    let read = || {
        let tokenizer = Tokenizer::from_dir(folder.path()).expect("a tokenizer");
        let config = GenerationConfig::from_dir(folder.path()).expect("a config");
        let stops = config.stop_tokens(&spec, &tokenizer).expect("stops");
        (tokenizer.encode_whole("x").expect("encodes"), stops)
    };
    assert_eq!(read(), (vec![1], vec![2]));
    let eos = serde_json::json!({ "content": "<|EOT|>", "special": false });
    write("tokenizer_config.json", &serde_json::json!({ "bos_token": "<s>", "eos_token": eos }));
    assert_eq!(read(), (vec![1], vec![2, 10]));
    write("tokenizer_config.json", &serde_json::json!({ "add_bos_token": true, "bos_token": "<s>" }));
    assert_eq!(read(), (vec![9, 1], vec![2]));
    // The class begins a text unless told otherwise; the names of the tokens stand in a file of their own.
    write("special_tokens_map.json", &serde_json::json!({ "bos_token": "<s>", "eos_token": eos }));
    write(
        "tokenizer_config.json",
        &serde_json::json!({ "add_eos_token": true, "tokenizer_class": "LlamaTokenizerFast" }),
    );
    assert_eq!(read(), (vec![9, 1, 10], vec![2, 10]));
    write("generation_config.json", &serde_json::json!({ "eos_token_id": [-1, 0], "repetition_penalty": 1.2 }));
    assert_eq!(read().1, [0, 2, 10]);
    let sampling = GenerationConfig::from_dir(folder.path()).expect("a config").sampling();
    assert_eq!((sampling.temperature, sampling.repetition_penalty), (0.0, 1.2));
}
