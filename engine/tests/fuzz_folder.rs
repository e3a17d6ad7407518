//! Mutational fuzzing of the files of a folder in Hugging Face layout: `config.json`, safetensors headers,
//! `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`.

#[allow(dead_code)] // It serves the test of families too.
#[path = "families/checkpoint.rs"]
mod checkpoint;
mod mutate;

use tandem_engine::chat::ChatTemplate;
use tandem_engine::tokenizer::{GenerationConfig, Tokenizer};
use tandem_engine::{DecoderSpec, check_safetensors};
use tandem_models::EDGE;

/// A Llama of two layers whose weights fit its configuration.
fn tiny() -> (Vec<u8>, Vec<u8>) {
    let config = br#"{"model_type":"llama","num_hidden_layers":1,"hidden_size":8,"num_attention_heads":2,
        "num_key_value_heads":1,"intermediate_size":8,"vocab_size":8,"rms_norm_eps":1e-5,
        "max_position_embeddings":64,"tie_word_embeddings":true,"eos_token_id":[1,2]}"#;
    let shapes = [
        ("model.embed_tokens.weight", vec![8, 8]),
        ("model.norm.weight", vec![8]),
        ("model.layers.0.input_layernorm.weight", vec![8]),
        ("model.layers.0.post_attention_layernorm.weight", vec![8]),
        ("model.layers.0.self_attn.q_proj.weight", vec![8, 8]),
        ("model.layers.0.self_attn.k_proj.weight", vec![4, 8]),
        ("model.layers.0.self_attn.v_proj.weight", vec![4, 8]),
        ("model.layers.0.self_attn.o_proj.weight", vec![8, 8]),
        ("model.layers.0.mlp.gate_proj.weight", vec![8, 8]),
        ("model.layers.0.mlp.up_proj.weight", vec![8, 8]),
        ("model.layers.0.mlp.down_proj.weight", vec![8, 8]),
    ];
    let (mut header, mut at) = (serde_json::Map::new(), 0usize);
    for (name, shape) in shapes {
        let bytes = shape.iter().product::<usize>() * 4;
        let entry = serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [at, at + bytes] });
        header.insert(name.to_owned(), entry);
        at += bytes;
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut weights = (header.len() as u64).to_le_bytes().to_vec();
    weights.extend(header.as_bytes());
    weights.extend((0..at / 4).flat_map(|i| ((i % 7) as f32 * 0.1 - 0.3).to_le_bytes()));
    (config.to_vec(), weights)
}

#[test]
fn mutants_of_weights_never_panic() {
    let (config, weights) = tiny();
    assert!(check_safetensors(&config, &weights).is_ok(), "the seed of the fuzzer loads");
    mutate::fuzz("fuzz_safetensors", vec![weights], |bytes| check_safetensors(&config, bytes).is_ok());
}

#[test]
fn mutants_of_configurations_never_panic() {
    let (config, weights) = tiny();
    let mut pool = vec![config, EDGE.config.to_vec()];
    pool.extend(checkpoint::all().iter().map(|golden| golden.config.to_string().into_bytes()));
    for config in &pool {
        DecoderSpec::from_hf(config).expect("the seed of the fuzzer is a configuration");
    }
    mutate::fuzz("fuzz_config", pool, |bytes| {
        let _ = check_safetensors(bytes, &weights);
        DecoderSpec::from_hf(bytes).is_ok()
    });
}

/// One of every spelling: bytes, SentencePiece, WordPiece, and words that a decoder strips.
fn tokenizers() -> Vec<Vec<u8>> {
    let bytes = br#"{"version":"1.0","added_tokens":[{"id":2,"content":"<s>","single_word":false,"lstrip":false,
        "rstrip":false,"normalized":false,"special":true}],"normalizer":null,"pre_tokenizer":{"type":"ByteLevel",
        "add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel",
        "add_prefix_space":true,"trim_offsets":true,"use_regex":true},"model":{"type":"BPE","dropout":null,
        "unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,
        "byte_fallback":false,"ignore_merges":false,"vocab":{"a":0,"b":1,"ab":3},"merges":[["a","b"]]}}"#;
    let pieces = r#"{"version":"1.0","added_tokens":[{"id":0,"content":"<s>","single_word":false,"lstrip":false,
        "rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"Sequence","normalizers":[
        {"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},
        "pre_tokenizer":null,"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>",
        "type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},
        {"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"<s>":{"id":"<s>","ids":[0],"tokens":["<s>"]}}},
        "decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
        {"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
        "model":{"type":"BPE","dropout":null,"unk_token":"<unk>","continuing_subword_prefix":null,
        "end_of_word_suffix":null,"fuse_unk":true,"byte_fallback":true,"ignore_merges":false,
        "vocab":{"<s>":0,"<unk>":1,"▁":2,"a":3,"b":4,"▁a":5,"<0x62>":6},"merges":[["▁","a"]]}}"#;
    let word_pieces = r###"{"version":"1.0","added_tokens":[],"normalizer":{"type":"BertNormalizer","clean_text":true,
        "handle_chinese_chars":true,"strip_accents":null,"lowercase":true},"pre_tokenizer":{"type":"BertPreTokenizer"},
        "post_processor":null,"decoder":{"type":"WordPiece","prefix":"##","cleanup":true},"model":{"type":"WordPiece",
        "unk_token":"[UNK]","continuing_subword_prefix":"##","max_input_chars_per_word":100,
        "vocab":{"[UNK]":0,"a":1,"##b":2,"s":3,"<":4,">":5}}}"###;
    let words = r#"{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":{"type":"Whitespace"},
        "post_processor":null,"decoder":{"type":"Strip","content":"_","start":1,"stop":1},"model":{"type":"WordLevel",
        "vocab":{"_a_":0,"b":1,"<unk>":2,"ab":3},"unk_token":"<unk>"}}"#;
    vec![bytes.to_vec(), pieces.into(), word_pieces.into(), words.into()]
}

#[test]
fn mutants_of_tokenizers_never_panic() {
    let pool = tokenizers();
    for file in &pool {
        let tokenizer = Tokenizer::from_json(file).expect("the seed of the fuzzer loads");
        assert!(!tokenizer.encode("ab").expect("encodes").is_empty());
        tokenizer.decode(&[0, 1, 2, 3]).expect("decodes");
    }
    mutate::fuzz("fuzz_tokenizer", pool, |bytes| {
        let Ok(tokenizer) = Tokenizer::from_json(bytes) else { return false };
        let ids = tokenizer.encode("ab <s> a").unwrap_or_default();
        let _ = (tokenizer.decode(&ids), tokenizer.decode(&[0, 1, 2, 3]), tokenizer.encode_whole("b"));
        true
    });
}

#[test]
fn mutants_of_small_files_never_panic() {
    let pool = vec![
        br#"{"eos_token_id":[1,2],"do_sample":true,"temperature":0.6,"top_k":20,"top_p":0.95}"#.to_vec(),
        br#"{"bos_token":{"content":"<s>"},"eos_token":"</s>","chat_template":"{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"}"#.to_vec(),
        EDGE.generation_config.to_vec(),
    ];
    let spec = DecoderSpec::from_hf(EDGE.config).expect("a spec");
    let tokenizer = Tokenizer::from_json(EDGE.tokenizer).expect("a tokenizer");
    mutate::fuzz("fuzz_small_files", pool, |bytes| {
        let config = GenerationConfig::parse(bytes)
            .map(|config| (config.sampling(), config.stop_tokens(&spec, &tokenizer).is_ok()));
        let template = ChatTemplate::from_tokenizer_config(bytes, None);
        let message = tandem_engine::chat::Message::new("user", "hi");
        config.is_ok() || template.is_ok_and(|template| template.render(&[message], true, 0).is_ok())
    });
}
