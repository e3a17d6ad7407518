use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use serde_json::{Value, json};
use tandem_models::EDGE;
use tandem_proto::limits::GRAMMAR_BYTES_MAX;
use tandem_proto::message::{Grammar, GrammarSyntax};

use super::follow::Follower;
use super::{Compiled, ConstraintError, Constraints, TokenMask, json_object, json_schema};
use crate::tokenizer::Tokenizer;

/// The token that ends an answer of the embedded pair.
const STOP: u32 = 1;

static PAIR: LazyLock<Constraints> = LazyLock::new(|| {
    Constraints::new(Arc::new(Tokenizer::from_json(EDGE.tokenizer).expect("the embedded tokenizer loads")))
});

fn tokenizer() -> &'static Tokenizer {
    &PAIR.tokenizer
}

fn lark(text: &str) -> Grammar {
    Grammar { syntax: GrammarSyntax::Lark, text: text.into() }
}

fn compile(grammar: &Grammar) -> Arc<Compiled> {
    PAIR.compile(grammar).unwrap_or_else(|e| panic!("{e}: {}", grammar.text))
}

/// xorshift64*.
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

/// Schemas that people send: nested, recursive, with choices and bounds.
fn schemas() -> Vec<Value> {
    let closed = |properties: Value, required: Value| json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": false });
    vec![
        closed(json!({ "city": { "type": "string" }, "people": { "type": "integer" } }), json!(["city", "people"])),
        closed(
            json!({
                "z": { "enum": ["red", "green", "über", 3, null] },
                "a": { "type": "array", "items": { "type": "number" }, "minItems": 1, "maxItems": 3 },
                "ok": { "type": "boolean" },
            }),
            json!(["z", "a"]),
        ),
        closed(
            json!({ "steps": { "type": "array", "items": closed(
                json!({ "n": { "type": "integer", "minimum": 1, "maximum": 9 }, "text": { "type": "string", "maxLength": 12 } }),
                json!(["n", "text"]),
            ) } }),
            json!(["steps"]),
        ),
        json!({
            "$ref": "#/$defs/node",
            "$defs": { "node": closed(
                json!({ "v": { "type": "integer" }, "next": { "anyOf": [{ "$ref": "#/$defs/node" }, { "type": "null" }] } }),
                json!(["v", "next"]),
            ) },
        }),
        closed(
            json!({ "pick": { "anyOf": [{ "type": "string" }, { "type": "number" }, { "const": { "k": [1, 2] } }] } }),
            json!(["pick"]),
        ),
        json!({ "type": "object" }),
        json!({ "type": "array", "items": { "type": ["string", "null"] } }),
    ]
}

/// What a schema of [`schemas`] says of a value, written apart from the library. Other keywords panic.
fn valid(schema: &Value, value: &Value, root: &Value) -> bool {
    schema.as_object().expect("a schema").iter().all(|(keyword, rule)| match keyword.as_str() {
        "$defs" => true,
        "$ref" => valid(root.pointer(&rule.as_str().expect("a ref")[1..]).expect("a target"), value, root),
        "anyOf" => rule.as_array().expect("a list").iter().any(|s| valid(s, value, root)),
        "const" => rule == value,
        "enum" => rule.as_array().expect("a list").contains(value),
        "type" => {
            let is = |name: &Value| match name.as_str().expect("a name") {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "number" => value.is_number(),
                "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0),
                "boolean" => value.is_boolean(),
                "null" => value.is_null(),
                other => panic!("{other}"),
            };
            rule.as_array().map_or_else(|| is(rule), |names| names.iter().any(is))
        }
        "properties" => value
            .as_object()
            .is_none_or(|map| map.iter().all(|(key, v)| rule.get(key).is_none_or(|s| valid(s, v, root)))),
        "required" => value.as_object().is_none_or(|map| {
            rule.as_array().expect("a list").iter().all(|key| map.contains_key(key.as_str().expect("a key")))
        }),
        "additionalProperties" => value
            .as_object()
            .is_none_or(|map| *rule == json!(false) && map.keys().all(|key| schema["properties"].get(key).is_some())),
        "items" => value.as_array().is_none_or(|list| list.iter().all(|v| valid(rule, v, root))),
        "minItems" => value.as_array().is_none_or(|list| list.len() as u64 >= rule.as_u64().expect("a count")),
        "maxItems" => value.as_array().is_none_or(|list| list.len() as u64 <= rule.as_u64().expect("a count")),
        "maxLength" => value.as_str().is_none_or(|s| s.chars().count() as u64 <= rule.as_u64().expect("a count")),
        "minimum" => value.as_f64().is_none_or(|v| v >= rule.as_f64().expect("a bound")),
        "maximum" => value.as_f64().is_none_or(|v| v <= rule.as_f64().expect("a bound")),
        other => panic!("the test knows no `{other}`"),
    })
}

/// Draws allowed tokens, then takes the way out: the end, what closes, else the shortest token.
fn write(compiled: &Arc<Compiled>, seed: u64, random: usize) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    let mut follower = Follower::new(compiled.clone(), &[STOP]);
    let closers: Vec<u32> = ["\"", "}", "]", ",", "null", "0"]
        .into_iter()
        .filter_map(|s| tokenizer().encode(s).expect("encodes").pop())
        .collect();
    let mut answer = Vec::new();
    loop {
        let mask = follower.allowed(&answer).unwrap_or_else(|e| panic!("seed {seed}, after {answer:?}: {e}"));
        if mask.allows(STOP) && (answer.len() >= random || mask.count() == 1) {
            return answer;
        }
        let mut ids: Vec<u32> = mask.ids().filter(|&id| id != STOP).collect();
        let token = if answer.len() < random {
            ids[rng.below(ids.len())]
        } else if let Some(&closer) = closers.iter().find(|c| mask.allows(**c)) {
            closer
        } else {
            ids.sort_by_key(|&id| tokenizer().token_bytes(id).expect("a token").len());
            ids[0]
        };
        answer.push(token);
        assert!(answer.len() < random + 600, "seed {seed}: no way out of {:?}", text(&answer));
    }
}

fn text(answer: &[u32]) -> String {
    String::from_utf8(answer.iter().flat_map(|&id| tokenizer().token_bytes(id).expect("a token")).collect())
        .expect("UTF-8")
}

#[test]
fn whatever_is_drawn_is_in_the_schema_and_can_end() {
    let mut checked = 0;
    for (i, schema) in schemas().iter().enumerate() {
        let compiled = compile(&json_schema(schema).expect("a schema"));
        for seed in 0..40 {
            let text = text(&write(&compiled, seed, [0, 3, 30, 120][seed as usize % 4]));
            let value: Value = match serde_json::from_str(&text) {
                Ok(value) => value,
                // JSON has no largest number, f64 has.
                Err(e) if e.to_string().starts_with("number out of range") => continue,
                Err(e) => panic!("{i}, seed {seed}: {e} in {text}"),
            };
            checked += 1;
            assert!(valid(schema, &value, schema), "schema {i}, seed {seed}: {text}");
        }
    }
    assert!(checked > 250, "{checked}");
}

#[test]
fn keys_come_in_the_order_of_the_schema() {
    let schema = &schemas()[1];
    let compiled = compile(&json_schema(schema).expect("a schema"));
    for seed in 0..8 {
        let text = text(&write(&compiled, seed, 60));
        let at = |key: &str| text.find(key).unwrap_or_else(|| panic!("seed {seed}: no {key} in {text}"));
        assert!(at("\"z\"") < at("\"a\""), "seed {seed}: {text}");
    }
}

/// Tokens that the follower takes one by one, tried each on its own.
fn brute_force(compiled: &Arc<Compiled>, answer: &[u32]) -> TokenMask {
    let vocabulary = tokenizer().vocab_size();
    let mut mask = TokenMask::none(vocabulary);
    let mut follower = Follower::new(compiled.clone(), &[STOP]);
    let may_end = follower.allowed(answer).expect("follows").allows(STOP);
    for id in 0..vocabulary as u32 {
        let longer = [answer, &[id]].concat();
        mask.set(id, id == STOP && may_end || follower.takes(&longer));
    }
    mask
}

#[test]
fn masks_equal_brute_force() {
    let mut grammars: Vec<Grammar> = schemas().iter().map(|s| json_schema(s).expect("a schema")).collect();
    grammars.push(lark(r#"start: "<tool_call>\n{\"name\": \"" /[a-z]{1,4}/ "\"}""#));
    grammars.push(json_object());
    for (g, grammar) in grammars.iter().enumerate() {
        let compiled = compile(grammar);
        for seed in 0..3u64 {
            let whole = write(&compiled, seed, 25);
            let mut rng = Rng::new(seed);
            for _ in 0..4 {
                let answer = &whole[..rng.below(whole.len() + 1)];
                let got = Follower::new(compiled.clone(), &[STOP]).allowed(answer).expect("follows");
                assert_eq!(got, brute_force(&compiled, answer), "grammar {g}, seed {seed}, after {answer:?}");
            }
        }
    }
}

/// The same for a language whose prefixes are recognised here: dddd-aaa…, one letter at least.
#[test]
fn masks_equal_a_recogniser_of_ones_own() {
    let compiled = compile(&lark(r"start: /[0-9]{4}-[a-c]+/"));
    let prefix = |bytes: &[u8]| {
        bytes.iter().enumerate().all(|(i, b)| match i {
            0..=3 => b.is_ascii_digit(),
            4 => *b == b'-',
            _ => matches!(b, b'a'..=b'c'),
        })
    };
    let mut follower = Follower::new(compiled, &[STOP]);
    for given in ["", "1", "204", "2048", "2048-", "2048-ab"] {
        let answer = tokenizer().encode(given).expect("encodes");
        let mask = follower.allowed(&answer).expect("follows");
        for id in 0..tokenizer().vocab_size() as u32 {
            let bytes = tokenizer().token_bytes(id).expect("a token");
            let wanted = if id == STOP {
                given.len() > 5
            } else {
                !tokenizer().is_special(id) && prefix(&[given.as_bytes(), &bytes].concat())
            };
            assert_eq!(mask.allows(id), wanted, "token {id} after {given:?}");
        }
    }
}

#[test]
fn a_complete_grammar_leaves_the_end_only_and_so_does_what_is_not_in_it() {
    let compiled = compile(&lark("start: \"yes\" | \"no\""));
    let mut follower = Follower::new(compiled, &[STOP, 7, 1 << 30]);
    let ends = |mask: &TokenMask| mask.ids().collect::<Vec<_>>() == [STOP, 7];
    let encode = |s: &str| tokenizer().encode(s).expect("encodes");
    assert!(ends(&follower.allowed(&encode("no")).expect("follows")));
    assert!(ends(&follower.allowed(&encode("nope")).expect("follows")));
    assert!(ends(&follower.allowed(&[encode("no"), vec![STOP]].concat()).expect("follows")));
    assert!(ends(&follower.allowed(&[1 << 30]).expect("follows")));
    assert!(!follower.allowed(&encode("ye")).expect("follows").allows(STOP));
    assert!(!follower.allowed(&[]).expect("follows").allows(STOP));
}

#[test]
fn special_tokens_are_text_to_no_grammar_and_named_by_id() {
    let user = tokenizer().token_id("<|user|>").expect("a token");
    let spelt = compile(&lark(r#"start: "<|user|>" /.*/"#));
    let mut follower = Follower::new(spelt, &[STOP]);
    let mut answer = Vec::new();
    for _ in 0..3 {
        let mask = follower.allowed(&answer).expect("follows");
        assert!(!mask.allows(user) && mask.count() > 0, "{answer:?}");
        answer.push(mask.ids().next().expect("a token"));
    }
    let named = compile(&lark(&format!(r#"start: <[{user}]> "x""#)));
    let mut follower = Follower::new(named, &[STOP]);
    assert_eq!(follower.allowed(&[]).expect("follows").sole(), Some(user));
    let x = tokenizer().encode("x").expect("encodes");
    assert_eq!(follower.allowed(&[user]).expect("follows").sole(), Some(x[0]));
    assert_eq!(follower.allowed(&[user, x[0]]).expect("follows").sole(), Some(STOP));
    assert_eq!(follower.allowed(&[]).expect("follows").sole(), Some(user), "back over a special token");
}

#[test]
fn grammars_that_cannot_be_used_say_why() {
    let schema = |s: Value| json_schema(&s).and_then(|g| PAIR.compile(&g).map(|_| ()));
    let table = [
        (schema(json!({ "type": "array", "uniqueItems": true })), "uniqueItems"),
        (schema(json!({ "not": { "type": "null" } })), "not"),
        (schema(json!({ "$ref": "#/$defs/gone" })), "gone"),
        (schema(json!({ "type": "string", "pattern": "(" })), ""),
        (schema(json!({ "type": "integer", "minimum": 3, "maximum": 2 })), ""),
        (schema(json!({ "type": "thing" })), "thing"),
        (schema(json!([1])), "object"),
        (schema(json!({ "x-guidance": {} })), "x-guidance"),
        (PAIR.compile(&lark("start: nothing")).map(|_| ()), "nothing"),
        (PAIR.compile(&lark("")).map(|_| ()), ""),
        (PAIR.compile(&Grammar { syntax: GrammarSyntax::JsonSchema, text: "{".into() }).map(|_| ()), "JSON"),
    ];
    for (i, (result, word)) in table.iter().enumerate() {
        let Err(ConstraintError::Rejected(problem)) = result else { panic!("{i}: {result:?}") };
        assert!(problem.contains(word) && !problem.contains("backtrace"), "{i}: {problem}");
    }
    let long = Grammar { syntax: GrammarSyntax::Lark, text: " ".repeat(GRAMMAR_BYTES_MAX + 1) };
    assert!(matches!(PAIR.compile(&long), Err(ConstraintError::TooLong { .. })));
}

/// Small texts that ask for much: refused or usable, never a panic or endless work.
#[test]
fn hostile_grammars_stay_within_their_bounds() {
    let deep = (0..120).fold(json!({ "type": "null" }), |s, _| json!({ "type": "array", "items": s }));
    let wide: serde_json::Map<String, Value> =
        (0..900).map(|i| (format!("p{i}"), json!({ "type": "string", "pattern": "^(a|b){1,50}$" }))).collect();
    let hostile = [
        json!({ "type": "string", "pattern": "^((a{1,200}){1,200}){1,200}$" }),
        json!({ "type": "string", "pattern": "^(.*a){40}.*b$" }),
        json!({ "type": "string", "minLength": 4_000_000_000u64 }),
        json!({ "type": "array", "items": { "type": "string" }, "minItems": 1_000_000_000 }),
        json!({ "type": "object", "properties": wide, "additionalProperties": false }),
        json!({ "type": "number", "multipleOf": 1e-300 }),
        deep,
    ];
    for (i, schema) in hostile.iter().enumerate() {
        match PAIR.compile(&json_schema(schema).expect("an object")) {
            Err(e) => assert!(matches!(e, ConstraintError::Rejected(_)), "{i}: {e}"),
            Ok(compiled) => {
                let mut follower = Follower::new(compiled, &[STOP]);
                let mut answer = Vec::new();
                for _ in 0..20 {
                    match follower.allowed(&answer) {
                        Ok(mask) => answer.push(mask.ids().last().expect("a token")),
                        Err(e) => {
                            assert!(matches!(e, ConstraintError::Failed(_)), "{i}: {e}");
                            break;
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn compiled_grammars_are_kept_within_a_bound() {
    let constraints = Constraints::new(PAIR.tokenizer.clone());
    let first = constraints.compile(&lark("start: \"0\"")).expect("compiles");
    for i in 1..super::GRAMMARS_CACHED_MAX {
        constraints.compile(&lark(&format!("start: \"{i}\""))).expect("compiles");
    }
    assert!(Arc::ptr_eq(&first, &constraints.compile(&lark("start: \"0\"")).expect("compiles")));
    constraints.compile(&lark("start: \"one more\"")).expect("compiles");
    assert_eq!(constraints.compiled.lock().expect("not poisoned").len(), super::GRAMMARS_CACHED_MAX);
    assert!(Arc::ptr_eq(&first, &constraints.compile(&lark("start: \"0\"")).expect("compiles")), "used last");
}

fn jumps() -> impl Strategy<Value = Vec<(prop::sample::Index, bool)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// However an answer grows and is cut, the mask is that of a follower that saw it from the start.
    #[test]
    fn the_mask_depends_on_the_answer_only(seed in any::<u64>(), which in 0usize..6, jumps in jumps()) {
        let compiled = compile(&json_schema(&schemas()[which]).expect("a schema"));
        let (one, other) = (write(&compiled, seed, 30), write(&compiled, seed ^ 1, 30));
        let mut follower = Follower::new(compiled.clone(), &[STOP]);
        for (at, which) in jumps {
            let whole = if which { &one } else { &other };
            let answer = &whole[..at.index(whole.len() + 1)];
            let fresh = Follower::new(compiled.clone(), &[STOP]).allowed(answer).expect("follows");
            prop_assert_eq!(follower.allowed(answer).expect("follows"), fresh, "after {:?}", answer);
        }
    }
}

/// Two answers that part early and write the same later, as a draft and what replaces it: every cut
/// of the one, then every cut of the other. The library once gave the mask of the row thrown away.
#[test]
fn a_draft_thrown_away_leaves_no_trace_in_the_mask() {
    let compiled = compile(&json_schema(&schemas()[1]).expect("a schema"));
    let seed = 10_388_570_225_415_237_256;
    let (one, other) = (write(&compiled, seed, 30), write(&compiled, seed ^ 1, 30));
    for b in 0..=other.len() {
        let kept = &other[..b];
        let fresh = Follower::new(compiled.clone(), &[STOP]).allowed(kept).expect("follows");
        for a in 0..=one.len() {
            let mut follower = Follower::new(compiled.clone(), &[STOP]);
            follower.allowed(&one[..a]).expect("follows");
            assert_eq!(follower.allowed(kept).expect("follows"), fresh, "{a}, {b}: {:?}", text(kept));
        }
    }
}

/// A tokenizer may be larger than the model's head.
#[test]
fn a_mask_without_a_token_of_the_model_is_an_error() {
    use tandem_proto::message::SamplingParams;
    let mut mask = TokenMask::none(64);
    mask.set(50, true);
    for params in [
        SamplingParams::default(),
        SamplingParams { temperature: 1.0, ..SamplingParams::default() },
        SamplingParams { temperature: 1.0, top_k: 3, top_p: 0.5, min_p: 0.1, ..SamplingParams::default() },
    ] {
        let pick =
            |logits: &[f32]| crate::sampling::pick(logits, Some(&mask), &params, crate::sampling::Before::default(), 0);
        let refused = pick(&[0.5; 50]);
        let failed = matches!(&refused, Err(crate::EngineError::Constraint(ConstraintError::Failed(_))));
        assert!(failed, "{params:?}: {refused:?}");
        assert_eq!(pick(&[0.5; 51]).expect("one is left").token, 50, "{params:?}");
    }
}

/// A SentencePiece vocabulary: `▁` is a blank, bytes have tokens of their own.
#[test]
fn pieces_and_byte_tokens() {
    let mut vocab = serde_json::Map::new();
    for (id, token) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        vocab.insert(token.into(), json!(id));
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
    }
    for piece in ["{", "}", "\"", "▁", "▁{", "a", ":", "▁1", "1"] {
        vocab.insert(piece.into(), json!(vocab.len()));
    }
    let special: Vec<Value> = ["<unk>", "<s>", "</s>"]
        .iter()
        .enumerate()
        .map(|(id, content)| json!({ "id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false }))
        .collect();
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": special, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" }, { "type": "Fuse" },
        ] },
        "model": { "type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "vocab": vocab, "merges": [] },
    });
    let tokenizer = Arc::new(Tokenizer::from_json(file.to_string().as_bytes()).expect("loads"));
    let id = |piece: &str| tokenizer.token_id(piece).expect("a piece");
    assert_eq!(tokenizer.token_bytes(id("▁1")), Some(b" 1".to_vec()));
    assert_eq!(tokenizer.token_bytes(id("<0xC3>")), Some(vec![0xc3]));
    let schema = json!({ "type": "object", "properties": { "a": { "const": 1 } }, "required": ["a"], "additionalProperties": false });
    let constraints = Constraints::new(tokenizer.clone());
    let compiled = constraints.compile(&json_schema(&schema).expect("a schema")).expect("compiles");
    let mut follower = Follower::new(compiled, &[id("</s>")]);
    let first = follower.allowed(&[]).expect("follows");
    assert_eq!(first.ids().collect::<Vec<_>>(), [id("<0x7B>"), id("{")]);
    let answer = [id("{"), id("\""), id("<0x61>"), id("\""), id(":"), id("▁1"), id("}")];
    for end in 0..answer.len() {
        assert!(follower.allowed(&answer[..end]).expect("follows").allows(answer[end]), "{end}");
    }
    assert_eq!(follower.allowed(&answer).expect("follows").sole(), Some(id("</s>")));
}
