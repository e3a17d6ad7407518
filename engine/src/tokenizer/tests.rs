use std::sync::LazyLock;

use proptest::prelude::*;
use tandem_models::{CLOUD, EDGE};

use super::{GenerationConfig, Tokenizer};
use crate::checkpoint::spec::DecoderSpec;
use crate::error::EngineError;

fn edge() -> &'static Tokenizer {
    static EDGE_TOKENIZER: LazyLock<Tokenizer> =
        LazyLock::new(|| Tokenizer::from_json(EDGE.tokenizer).expect("the embedded tokenizer loads"));
    &EDGE_TOKENIZER
}

#[test]
fn special_tokens_are_parsed_and_hidden() {
    let t = edge();
    let ids = t.encode("<|bos|><|user|>Zagreb is the capital of which country?<|assistant|>").expect("encodes");
    assert_eq!(ids, [0, 2, 62, 337, 273, 70, 266, 269, 343, 274, 474, 439, 35, 3]);
    assert_eq!(t.decode(&ids).expect("decodes"), "Zagreb is the capital of which country?");
    assert!(t.is_special(1) && !t.is_special(62) && !t.is_special(1 << 30));
    assert_eq!(t.token_id("<|eos|>"), Some(1));
    assert_eq!(t.token(1), Some("<|eos|>"));
}

#[test]
fn an_id_without_a_token_is_no_text() {
    let t = edge();
    let ids = t.encode("über").expect("encodes");
    let beyond = t.vocab_size() as u32;
    let mixed: Vec<u32> = ids.iter().flat_map(|&id| [beyond, id, u32::MAX]).collect();
    assert_eq!(t.decode(&mixed).expect("decodes"), "über");
    assert_eq!(t.stream().push(t, beyond).expect("decodes"), "");
}

/// A tokenizer of two words with this decoder.
fn words(decoder: &serde_json::Value) -> Tokenizer {
    let file = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": { "type": "WordLevel", "vocab": { " ": 0, "a": 1 }, "unk_token": "a" },
    });
    Tokenizer::from_json(file.to_string().as_bytes()).expect("loads")
}

/// A tokenizer of these words, with `<x>` as an added special token.
fn vocabulary(vocab: &serde_json::Value) -> Result<Tokenizer, EngineError> {
    let file = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "added_tokens": [{ "id": 5, "content": "<x>", "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": true }],
        "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "a" },
    });
    Tokenizer::from_json(file.to_string().as_bytes())
}

#[test]
fn ids_may_leave_gaps_and_have_a_largest() {
    let t = vocabulary(&serde_json::json!({ "a": 1, "": 3, "bé": 4, "<x>": 5 })).expect("loads");
    let tokens: Vec<Option<&str>> = (0..8).map(|id| t.token(id)).collect();
    assert_eq!(tokens, [None, Some("a"), None, Some(""), Some("bé"), Some("<x>"), None, None]);
    assert_eq!((t.vocab_size(), t.token_bytes(4), t.token_bytes(2)), (6, Some("bé".into()), None));
    assert!(t.is_special(5) && !t.is_special(4) && !t.is_special(2));
    let digest = |vocab| vocabulary(&vocab).expect("loads").digest();
    let same = digest(serde_json::json!({ "<x>": 5, "bé": 4, "a": 1, "": 3 }));
    let moved = digest(serde_json::json!({ "a": 0, "": 3, "bé": 4, "<x>": 5 }));
    assert!(same == t.digest() && moved != t.digest());
    let last = crate::checkpoint::spec::VOCAB_MAX - 1;
    assert_eq!(vocabulary(&serde_json::json!({ "a": 1, "b": last, "<x>": 5 })).expect("loads").vocab_size(), last + 1);
    let e = vocabulary(&serde_json::json!({ "a": 1, "b": last + 1, "<x>": 5 })).expect_err("refused").to_string();
    assert!(e.contains(&format!("token id {}", last + 1)), "{e}");
}

/// The library cuts more characters than there are, and panics.
#[test]
fn a_decoder_that_panics_is_an_error() {
    let t = words(&serde_json::json!({ "type": "Strip", "content": " ", "start": 0, "stop": 2 }));
    assert!(matches!(t.decode(&[0]), Err(EngineError::Tokenizer(_))));
    assert_eq!(t.decode(&[1]).expect("decodes"), "a");
}

/// Grammars work on bytes, and what bytes such a decoder makes of a token is unknown.
#[test]
fn vocabularies_in_a_spelling_of_their_own_take_no_grammar() {
    use crate::constraint::{ConstraintError, Constraints, json_object};
    for decoder in
        [serde_json::Value::Null, serde_json::json!({ "type": "WordPiece", "prefix": "##", "cleanup": true })]
    {
        let constraints = Constraints::new(std::sync::Arc::new(words(&decoder)));
        let refused = constraints.compile(&json_object());
        assert!(matches!(refused, Err(ConstraintError::Vocabulary(_))), "{decoder}: {refused:?}");
    }
}

#[test]
fn the_pair_has_one_tokenizer() {
    assert_eq!(edge().digest(), Tokenizer::from_json(CLOUD.tokenizer).expect("loads").digest());
}

#[test]
fn stop_tokens_come_from_both_files() {
    let spec = DecoderSpec::from_hf(EDGE.config).expect("spec");
    let stops = |json: &[u8]| GenerationConfig::parse(json)?.stop_tokens(&spec, edge());
    assert_eq!(stops(EDGE.generation_config).expect("stops"), [1]);
    assert_eq!(stops(br#"{"eos_token_id": [3, 1, 99999999]}"#).expect("stops"), [1, 3]);
    assert_eq!(GenerationConfig::default().stop_tokens(&spec, edge()).expect("stops"), [1]);
    assert!(stops(br#"{"eos_token_id": "x"}"#).is_err());
    assert!(stops(b"{").is_err() && stops(b"[]").is_err());
}

#[test]
fn with_channels_a_message_ends_no_answer() {
    let mut spec = DecoderSpec::from_hf(EDGE.config).expect("spec");
    let first = edge().vocab_size() as u32;
    spec.vocab_size = first as usize + 3;
    let with = |names: &[&str]| {
        let mut file: serde_json::Value = serde_json::from_slice(EDGE.tokenizer).expect("json");
        for (id, name) in (first..).zip(names) {
            let mut token = file["added_tokens"][0].clone();
            (token["id"], token["content"]) = (id.into(), (*name).into());
            file["added_tokens"].as_array_mut().expect("a list").push(token);
        }
        Tokenizer::from_json(file.to_string().as_bytes()).expect("a tokenizer")
    };
    let [end, call, done] = [first, first + 1, first + 2];
    let config = GenerationConfig::parse(format!("{{\"eos_token_id\": [{end}]}}").as_bytes()).expect("a config");
    let channels = with(&["<|end|>", "<|call|>", "<|return|>"]);
    assert_eq!(config.stop_tokens(&spec, &channels).expect("stops"), [1, call, done]);
    let turns = with(&["<|end|>", "<|call|>"]);
    assert_eq!(config.stop_tokens(&spec, &turns).expect("stops"), [1, end]);
}

#[test]
fn sampling_follows_the_models_wish() {
    let sampling = |json: &[u8]| GenerationConfig::parse(json).expect("a config").sampling();
    assert_eq!(sampling(br#"{"temperature": 0.7}"#).temperature, 0.0, "greedy unless it says do_sample");
    let wish = sampling(br#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 7}"#);
    assert_eq!((wish.temperature, wish.top_k, wish.top_p, wish.min_p), (0.6, 20, 0.95, 0.0));
    assert_eq!(sampling(br#"{"do_sample": true}"#).temperature, 1.0);
}

#[test]
fn broken_files_are_refused() {
    for bad in [&b""[..], b"{}", b"[1]", b"\xff\xfe", br#"{"version":"1.0","model":{"type":"BPE"}}"#] {
        assert!(matches!(Tokenizer::from_json(bad), Err(EngineError::Tokenizer(_))));
    }
}

proptest! {
    /// Streaming yields the text of the whole, whatever the text, and no piece splits a character.
    #[test]
    fn streams_equal_whole_texts(text in "\\PC{0,40}") {
        let t = edge();
        let ids = t.encode(&text).expect("encodes");
        let mut stream = t.stream();
        let mut out = String::new();
        for id in ids {
            out.push_str(&stream.push(t, id).expect("decodes"));
        }
        out.push_str(&stream.finish());
        prop_assert_eq!(out, text);
    }

    /// Any ids at all decode to what the tokenizer's own decoder says.
    #[test]
    fn random_ids_decode_like_the_library(ids in prop::collection::vec(0u32..4096, 0..40)) {
        let t = edge();
        prop_assert_eq!(t.decode(&ids).expect("decodes"), t.decode_window(&ids).expect("decodes"));
    }
}
