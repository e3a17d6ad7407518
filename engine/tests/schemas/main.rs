//! What is in a grammar made of a schema is in the schema, and what cannot be held is refused by name.

mod real;
mod valid;

use std::sync::{Arc, LazyLock};

use serde_json::{Map, Value, json};
use tandem_engine::constraint::{Compiled, ConstraintError, Constraints, json_schema};
use tandem_engine::tokenizer::Tokenizer;
use tandem_models::EDGE;
use valid::valid;

/// The token that ends an answer of the embedded pair.
const STOP: u32 = 1;
/// Random tokens of an answer before it takes the way out.
const RANDOM: [usize; 4] = [0, 4, 25, 80];

static PAIR: LazyLock<Constraints> = LazyLock::new(|| Constraints::new(TOKENIZER.clone()));
static TOKENIZER: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_json(EDGE.tokenizer).expect("the embedded tokenizer loads")));

fn compiled(schema: &Value) -> Result<Arc<Compiled>, ConstraintError> {
    PAIR.compile(&json_schema(schema)?)
}

/// True if the grammar has this text whole.
fn takes(compiled: &Arc<Compiled>, text: &str) -> bool {
    let followed = compiled.follow(&[STOP]);
    let ids = TOKENIZER.encode(text).expect("encodes");
    let allowed = |n: usize, id| followed.allowed(&ids[..n]).expect("follows").allows(id);
    (0..ids.len()).all(|n| allowed(n, ids[n])) && allowed(ids.len(), STOP)
}

/// Draws allowed tokens, then takes what closes where it can. None if it does not end.
fn write(compiled: &Arc<Compiled>, seed: u64, random: usize) -> Option<String> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |n: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    };
    let closers = ["\"", "@", "}", "]", ","].map(|s| TOKENIZER.encode(s).expect("encodes")[0]);
    let followed = compiled.follow(&[STOP]);
    let mut answer = Vec::new();
    while answer.len() < random + 1_200 {
        let mask = followed.allowed(&answer).expect("follows");
        if mask.allows(STOP) && (answer.len() >= random || mask.count() == 1) {
            let bytes = answer.iter().flat_map(|&id| TOKENIZER.token_bytes(id).expect("a token")).collect();
            return Some(String::from_utf8(bytes).expect("UTF-8"));
        }
        let ids: Vec<u32> = mask.ids().filter(|&id| id != STOP).collect();
        answer.push(if answer.len() < random {
            ids[below(ids.len())]
        } else if let Some(&closer) = closers.iter().find(|c| mask.allows(**c)) {
            closer
        } else {
            // One character by chance: what ends a number or a name is among them.
            let short = |id: &&u32| TOKENIZER.token_bytes(**id).is_some_and(|bytes| bytes.len() == 1);
            let ones: Vec<u32> = ids.iter().filter(short).copied().collect();
            let ids = if ones.is_empty() { ids } else { ones };
            ids[below(ids.len())]
        });
    }
    let bytes: Vec<u8> = answer.iter().flat_map(|&id| TOKENIZER.token_bytes(id).expect("a token")).collect();
    eprintln!("seed {seed} does not end: {}", String::from_utf8_lossy(&bytes));
    None
}

/// Writes answers and looks at each. Returns how many ended.
fn check_written(name: &str, schema: &Value, compiled: &Arc<Compiled>) -> usize {
    let mut ended = 0;
    for seed in 0..12 {
        let Some(text) = write(compiled, seed, RANDOM[seed as usize % RANDOM.len()]) else { continue };
        match serde_json::from_str(&text) {
            Ok(value) => assert!(valid(schema, &value, schema), "{name}, seed {seed}: {text}"),
            // JSON has no largest number, f64 has.
            Err(e) => assert!(e.to_string().starts_with("number out of range"), "{name}, seed {seed}: {e} in {text}"),
        }
        ended += 1;
    }
    ended
}

#[allow(clippy::needless_pass_by_value, reason = "callers hand over a literal")]
fn object(properties: Value, required: &[&str]) -> Value {
    json!({ "type": "object", "properties": properties, "required": required })
}

type Row = (Value, &'static [&'static str], &'static [&'static str]);

/// A schema, texts that are in its grammar, texts that are not.
fn table() -> Vec<Row> {
    let number = |rules: Value| {
        let mut schema = json!({ "type": "number" });
        schema.as_object_mut().expect("an object").extend(rules.as_object().expect("rules").clone());
        schema
    };
    let integer = |rules: Value| {
        let mut schema = number(rules);
        schema["type"] = "integer".into();
        schema
    };
    vec![
        // Bounds: inclusive, exclusive, of both drafts, past what a double tells apart.
        (number(json!({ "exclusiveMinimum": 0, "maximum": 0.5 })), &["0.1", "0.5"], &["0", "0.0", "-0", "0.51"]),
        (number(json!({ "exclusiveMaximum": 0, "minimum": -0.5 })), &["-0.1", "-0.5"], &["0", "-0", "-0.0", "-0.51"]),
        (number(json!({ "exclusiveMinimum": 1, "maximum": 1.5 })), &["1.1", "1.5"], &["1", "1.0", "1.6"]),
        (number(json!({ "exclusiveMinimum": 0, "exclusiveMaximum": 1 })), &["0.5", "0.99"], &["0", "1", "1.0"]),
        (number(json!({ "minimum": 0 })), &["0", "7.25", "1234"], &["-1", "-0.5"]),
        (number(json!({ "maximum": 1e300 })), &["0", "-7.5", "1000000"], &[]),
        (number(json!({ "minimum": -1.5, "maximum": -0.5 })), &["-1", "-0.75"], &["-0.4", "0", "-1.6"]),
        (number(json!({ "minimum": 5, "exclusiveMinimum": true, "maximum": 9 })), &["5.5", "9"], &["5", "5.0"]),
        (number(json!({ "multipleOf": 0.25, "minimum": 0, "maximum": 2 })), &["0.25", "2"], &["0.3"]),
        (
            integer(json!({ "minimum": i64::MIN, "maximum": i64::MAX })),
            &["0", "-5", "4000000000000"],
            &["9223372036854775808", "1.5"],
        ),
        (integer(json!({ "minimum": 0, "maximum": u64::MAX })), &["0", "9007199254740993"], &["-1"]),
        (
            integer(json!({ "minimum": -9_007_199_254_740_991i64, "maximum": 9_007_199_254_740_991i64 })),
            &["-9007199254740991"],
            &["9007199254740992"],
        ),
        (
            integer(json!({ "exclusiveMinimum": 9_007_199_254_740_992i64 })),
            &["9007199254740994"],
            &["9007199254740992"],
        ),
        (
            integer(json!({ "minimum": 9_007_199_254_740_993i64, "maximum": 9_007_199_254_740_995i64 })),
            &["9007199254740994"],
            &["9007199254740992", "9007199254740996"],
        ),
        (
            integer(json!({ "minimum": 1_000_000_000_000_000_000i64 })),
            &["1000000000000000001"],
            &["999999999999999999"],
        ),
        (integer(json!({ "minimum": 1.5, "maximum": 4.2 })), &["2", "4"], &["1", "5"]),
        (integer(json!({ "allOf": [{ "exclusiveMinimum": 0 }, { "exclusiveMaximum": 3 }] })), &["1", "2"], &["0", "3"]),
        (integer(json!({ "multipleOf": 7, "minimum": 50, "maximum": 90 })), &["56"], &["57", "49"]),
        (json!({ "const": 9_007_199_254_740_992i64 }), &["9007199254740992"], &["9007199254740993"]),
        (json!({ "enum": [1, 2.5, "x", null, true, [1], { "k": "v" }] }), &["1", "2.5", "{\"k\":\"v\"}"], &["2"]),
        // References.
        (json!({ "$ref": "#/$defs/a~1b%20~0", "$defs": { "a/b ~": { "enum": [1] } } }), &["1"], &["2"]),
        (json!({ "$ref": "#/definitions/%C3%BC", "definitions": { "ü": { "enum": [1] } } }), &["1"], &["2"]),
        (json!({ "$ref": "#/$defs/100%25", "$defs": { "100%": { "enum": [1] } } }), &["1"], &["2"]),
        (json!({ "$ref": "#here", "$defs": { "x": { "$anchor": "here", "enum": [1] } } }), &["1"], &["2"]),
        (
            json!({ "$id": "https://example.com/s", "$ref": "https://example.com/s#/$defs/x", "$defs": { "x": { "enum": [1] } } }),
            &["1"],
            &["2"],
        ),
        (
            object(json!({ "a": { "enum": [1] }, "b": { "$ref": "#/properties/a" } }), &["a", "b"]),
            &["{\"a\":1,\"b\":1}"],
            &["{\"a\":1,\"b\":2}"],
        ),
        (
            json!({ "prefixItems": [{ "enum": [1] }, { "$ref": "#/prefixItems/0" }], "type": "array" }),
            &["[1,1]", "[]"],
            &["[1,2]", "[1,1,1]"],
        ),
        (
            object(
                json!({ "v": { "enum": [1] }, "next": { "anyOf": [{ "$ref": "#" }, { "type": "null" }] } }),
                &["v", "next"],
            ),
            &["{\"v\":1,\"next\":{\"v\":1,\"next\":null}}"],
            &["{\"v\":1,\"next\":1}"],
        ),
        (
            json!({ "$ref": "#/$defs/n", "$defs": { "n": { "type": "array", "items": { "$ref": "#/$defs/n" }, "maxItems": 2 } } }),
            &["[]", "[[],[[]]]"],
            &["[[],[],[]]"],
        ),
        (
            json!({ "$ref": "#/$defs/s", "maxLength": 2, "$defs": { "s": { "type": "string", "minLength": 1 } } }),
            &["\"ab\""],
            &["\"\"", "\"abc\""],
        ),
        // What says nothing.
        (
            object(
                json!({ "a": { "type": "string", "format": "password", "contentEncoding": "base64", "maxLength": 3 } }),
                &["a"],
            ),
            &["{\"a\":\"x\"}"],
            &["{\"a\":\"xxxx\"}"],
        ),
        (
            json!({ "type": "string", "format": "path", "title": "T", "deprecated": true, "x-order": 1, "errorMessage": "no", "maxLength": 4 }),
            &["\"/a\""],
            &["1"],
        ),
        (json!({ "type": "integer", "format": "int32", "minimum": 0, "maximum": 9 }), &["7"], &["10"]),
        (
            json!({ "type": "object", "propertyNames": { "type": "string" }, "additionalProperties": { "enum": [1] } }),
            &["{}", "{\"k\":1}"],
            &["{\"k\":2}"],
        ),
        (
            json!({ "type": "array", "items": { "enum": [1] }, "uniqueItems": false, "contains": true, "minItems": 1, "maxItems": 2 }),
            &["[1]"],
            &["[]"],
        ),
        (
            json!({ "type": "array", "items": { "enum": [1] }, "uniqueItems": true, "maxItems": 1 }),
            &["[1]", "[]"],
            &["[1,1]"],
        ),
        (
            json!({ "type": "string", "maxLength": 3.0, "if": { "const": "a" }, "not": false }),
            &["\"abc\""],
            &["\"abcd\""],
        ),
        // Objects: closed where they name members, open where they say so.
        (object(json!({ "a": { "enum": [1] } }), &["a"]), &["{\"a\":1}"], &["{\"a\":1,\"b\":1}", "{}"]),
        (
            object(json!({ "a": { "enum": [1] } }), &["a", "z"]),
            &["{\"a\":1,\"z\":null}"],
            &["{\"a\":1}", "{\"a\":1,\"z\":1,\"y\":1}"],
        ),
        (
            json!({ "properties": { "a": { "enum": [1] } }, "required": ["a"] }),
            &["{\"a\":1}"],
            &["null", "1", "{\"b\":1}"],
        ),
        (json!({ "type": "object", "properties": {} }), &["{}"], &["{\"a\":1}"]),
        (
            json!({ "type": "object", "additionalProperties": { "enum": [1] } }),
            &["{}", "{\"a\":1,\"b\":1}"],
            &["{\"a\":2}"],
        ),
        (
            json!({ "type": "object", "properties": { "a": { "enum": [1] } }, "additionalProperties": { "enum": [2] } }),
            &["{\"a\":1}", "{\"a\":1,\"b\":2}"],
            &["{\"a\":2}", "{\"\\u0061\":2}", "{\"a\":1,\"\\u0061\":2}"],
        ),
        (
            json!({ "type": "object", "properties": { "a": { "enum": [1] } }, "additionalProperties": true }),
            &["{\"b\":[2]}"],
            &["{\"a\":2}", "{\"\\u0061\":2}"],
        ),
        (
            json!({ "type": "object", "patternProperties": { "^n_[a-z]$": { "enum": [1] } } }),
            &["{}", "{\"n_a\":1}"],
            &["{\"n_a\":2}", "{\"x\":1}"],
        ),
        (
            json!({ "type": "object", "properties": { "a": { "enum": [1] } }, "unevaluatedProperties": false }),
            &["{\"a\":1}"],
            &["{\"b\":1}"],
        ),
        (
            json!({ "type": "object", "additionalProperties": { "enum": [1] }, "propertyNames": { "enum": ["x", "y"] } }),
            &["{\"x\":1}", "{\"x\":1,\"y\":1}"],
            &["{\"z\":1}", "{\"x\":2}"],
        ),
        (
            json!({ "type": "object", "additionalProperties": { "enum": [1] }, "propertyNames": { "pattern": "^[a-z]{2}$" } }),
            &["{\"ab\":1}"],
            &["{\"a\":1}"],
        ),
        (
            json!({ "allOf": [object(json!({ "a": { "enum": [1] } }), &["a"]), object(json!({ "b": { "enum": [2] } }), &["b"])] }),
            &["{\"a\":1,\"b\":2}"],
            &["{\"a\":1}", "{\"a\":1,\"b\":2,\"c\":3}"],
        ),
        (
            json!({ "properties": { "k": { "enum": [0] } }, "required": ["k"], "anyOf": [object(json!({ "a": { "enum": [1] } }), &["a"]), object(json!({ "b": { "enum": [2] } }), &["b"])], "type": "object" }),
            &["{\"k\":0,\"a\":1}", "{\"k\":0,\"b\":2}"],
            &["{\"a\":1}", "{\"k\":0,\"a\":1,\"b\":2}"],
        ),
        // Numbers of members.
        (
            json!({ "type": "object", "additionalProperties": { "enum": [1] }, "minProperties": 1 }),
            &["{\"a\":1}"],
            &["{}"],
        ),
        (
            json!({ "type": "object", "additionalProperties": { "enum": [1] }, "maxProperties": 2 }),
            &["{}", "{\"a\":1,\"b\":1}"],
            &["{\"a\":1,\"b\":1,\"c\":1}"],
        ),
        (
            json!({ "type": "object", "properties": { "a": { "enum": [1] }, "b": { "enum": [1] } }, "minProperties": 1 }),
            &["{\"b\":1}", "{\"a\":1,\"b\":1}"],
            &["{}"],
        ),
        (
            json!({ "type": "object", "properties": { "a": { "enum": [1] }, "b": { "enum": [1] } }, "maxProperties": 1 }),
            &["{}", "{\"b\":1}"],
            &["{\"a\":1,\"b\":1}"],
        ),
        (
            json!({ "type": "object", "properties": { "a": { "enum": [1] } }, "required": ["a"], "minProperties": 1, "maxProperties": 4 }),
            &["{\"a\":1}"],
            &["{}"],
        ),
        // Lists.
        (
            json!({ "type": "array", "prefixItems": [{ "enum": [1] }, { "enum": ["b"] }], "minItems": 2 }),
            &["[1,\"b\"]"],
            &["[1]", "[1,\"b\",3]"],
        ),
        (
            json!({ "type": "array", "items": [{ "enum": [1] }], "additionalItems": { "enum": [3] }, "minItems": 1, "maxItems": 3 }),
            &["[1]", "[1,3,3]"],
            &["[3]", "[1,1]"],
        ),
        (json!({ "items": { "enum": [1] }, "minItems": 1, "maxItems": 2 }), &["[1]"], &["null", "[]"]),
        // Choices.
        (
            json!({ "oneOf": [{ "$ref": "#/$defs/c" }, { "$ref": "#/$defs/d" }], "discriminator": { "propertyName": "t" }, "$defs": {
            "c": { "type": "object", "properties": { "t": { "const": "c", "default": "c" }, "n": { "enum": [1] } }, "required": ["n"] },
            "d": { "type": "object", "properties": { "t": { "const": "d", "default": "d" }, "n": { "enum": [1] } }, "required": ["n"] } } }),
            &["{\"t\":\"c\",\"n\":1}", "{\"t\":\"d\",\"n\":1}"],
            &["{\"n\":1}", "{\"t\":\"e\",\"n\":1}"],
        ),
        (
            json!({ "oneOf": [object(json!({ "a": { "enum": [1] } }), &["a"]), object(json!({ "b": { "enum": [2] } }), &["b"])] }),
            &["{\"a\":1}", "{\"b\":2}"],
            &["{\"a\":1,\"b\":2}", "{}"],
        ),
        (
            json!({ "oneOf": [{ "type": "integer", "minimum": 0, "maximum": 9 }, { "type": "null" }] }),
            &["3", "null"],
            &["true"],
        ),
        // Strings.
        (
            json!({ "type": "string", "format": "date" }),
            &["\"2024-02-29\"", "\"2000-02-29\"", "\"0001-12-31\""],
            &["\"2023-02-29\"", "\"1900-02-29\"", "\"0000-01-01\"", "\"2024-04-31\""],
        ),
        (
            json!({ "type": "string", "format": "time" }),
            &["\"23:59:59Z\"", "\"01:02:03.5+02:00\""],
            &["\"23:59:60Z\"", "\"24:00:00Z\""],
        ),
        (
            json!({ "type": "string", "format": "date-time" }),
            &["\"2024-02-29T01:02:03Z\""],
            &["\"2023-02-29T01:02:03Z\"", "\"2024-02-29 01:02:03Z\""],
        ),
        (json!({ "type": "string", "format": "date", "pattern": "^2" }), &["\"2024-02-29\""], &["\"1999-01-01\""]),
        (
            json!({ "type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", "maxLength": 9 }),
            &["\"-1.5\"", "\".5\"", "\"7.\""],
            &["\"-\"", "\".\"", "\"\""],
        ),
        (
            json!({ "type": "string", "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$", "maxLength": 20 }),
            &["\"a.b@c.de\"", "\"x@y.org\""],
            &["\".a@c.de\"", "\"a..b@c.de\"", "\"a.@c.de\"", "\"a@c\""],
        ),
        (json!({ "type": "string", "pattern": "^[^\"]{1,3}$" }), &["\"a\\\\\"", "\"\\n\""], &["\"\\\"\"", "\"abcd\""]),
        (json!({ "type": "string", "pattern": r"^[^\\]{1,3}$" }), &["\"\\\"\"", "\"\\t\""], &["\"\\\\\""]),
        (json!({ "type": "string", "pattern": r"^[\x00-\x1f]{1,2}$" }), &["\"\\n\""], &["\"\\\"\"", "\"a\""]),
        (
            json!({ "type": "object", "patternProperties": { r"^[^\x20-\x7e]$": { "enum": [1] } } }),
            &["{\"é\":1}"],
            &["{\"\\\"\":1}", "{\"a\":1}"],
        ),
        (json!({ "type": "string", "pattern": "^\u{1}$" }), &["\"\\u0001\""], &[]),
        // White space.
        (
            object(json!({ "a": { "enum": [1] } }), &["a"]),
            &["{ \"a\": 1 }", "{\n  \"a\": 1\n}"],
            &["{  \"a\":1}", "{\n\n\"a\":1}", " {\"a\":1}", "{\"a\":1} "],
        ),
    ]
}

#[test]
fn a_grammar_has_values_of_its_schema_only() {
    for (i, (schema, taken, refused)) in table().iter().enumerate() {
        let compiled = compiled(schema).unwrap_or_else(|e| panic!("row {i}: {e}: {schema}"));
        for text in *taken {
            let value: Value = serde_json::from_str(text).expect("JSON");
            assert!(valid(schema, &value, schema), "row {i}: the row is wrong: {text} is not in {schema}");
            assert!(takes(&compiled, text), "row {i}: {text} is not taken: {schema}");
        }
        for text in *refused {
            assert!(!takes(&compiled, text), "row {i}: {text} is taken: {schema}");
        }
        let ended = check_written(&format!("row {i}"), schema, &compiled);
        assert!(ended > 3, "row {i}: only {ended} ended: {schema}");
    }
}

#[test]
fn what_cannot_be_held_is_refused_by_name() {
    let table = [
        (json!({ "const": 9_007_199_254_740_993i64 }), "9007199254740993"),
        (json!({ "enum": [[1_152_921_504_606_846_977i64], "x"] }), "1152921504606846977"),
        (json!({ "const": u64::MAX }), "18446744073709551615"),
        (json!({ "const": 1e40 }), "1e+40"),
        (
            json!({ "type": "integer", "minimum": 9_007_199_254_740_993i64, "maximum": 9_007_199_254_740_993i64 }),
            "minimum",
        ),
        (json!({ "type": "integer", "minimum": 1e19 }), "minimum"),
        (json!({ "type": "integer", "minimum": 3, "maximum": 2 }), "minimum"),
        (json!({ "type": "number", "multipleOf": 0 }), "multipleOf"),
        (json!({ "type": "number", "multipleOf": 0.07 }), "multipleOf"),
        (
            json!({ "type": "integer", "allOf": [{ "multipleOf": 4_000_000_000u64 }, { "multipleOf": 3_999_999_999u64 }] }),
            "multipleOf",
        ),
        (json!({ "type": "number", "minimum": "3" }), "minimum"),
        (json!({ "$ref": "#" }), "itself"),
        (
            json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } } }),
            "itself",
        ),
        (json!({ "anyOf": [{ "$ref": "#" }, { "type": "null" }] }), "itself"),
        (json!({ "allOf": [{ "$ref": "#" }, { "type": "null" }] }), "#"),
        (object(json!({ "a": { "$ref": "#" } }), &["a"]), "no finite value"),
        (json!({ "type": "array", "items": { "$ref": "#" }, "minItems": 1 }), "no finite value"),
        (json!({ "$ref": "#/$defs/gone" }), "#/$defs/gone"),
        (json!({ "$ref": "https://example.com/s" }), "https://example.com/s"),
        (json!({ "$ref": "#/$defs/%zz" }), "percent"),
        (json!({ "$dynamicRef": "#x" }), "$dynamicRef"),
        (json!({ "type": "array", "uniqueItems": true }), "uniqueItems"),
        (json!({ "type": "array", "contains": { "const": 1 } }), "contains"),
        (object(json!({ "deep": { "not": { "type": "null" } } }), &[]), "not` is not supported here (in `deep"),
        (json!({ "if": { "const": 1 }, "then": { "const": 1 } }), "if"),
        (
            object(json!({ "a": {} }), &[])
                .as_object()
                .map(|o| {
                    let mut o = o.clone();
                    o.insert("dependentRequired".into(), json!({ "a": ["b"] }));
                    Value::Object(o)
                })
                .expect("an object"),
            "dependentRequired",
        ),
        (
            json!({ "type": "object", "patternProperties": { "^[ab]$": { "enum": [2] } }, "additionalProperties": false, "minProperties": 2, "maxProperties": 2 }),
            "minProperties",
        ),
        (json!({ "type": "object", "minProperties": 2, "additionalProperties": { "enum": [1] } }), "minProperties"),
        (
            json!({ "type": "object", "properties": { "a": {} }, "additionalProperties": true, "maxProperties": 1 }),
            "maxProperties",
        ),
        (json!({ "type": "object", "propertyNames": { "maxLength": 3 } }), "propertyNames"),
        (json!({ "allOf": [{ "unevaluatedProperties": { "type": "null" } }, {}] }), "unevaluatedProperties"),
        (json!({ "oneOf": [{ "type": "integer" }, { "type": "number" }] }), "oneOf"),
        (json!({ "oneOf": [object(json!({ "a": {} }), &[]), object(json!({ "b": {} }), &[])] }), "oneOf"),
        (json!({ "enum": [] }), ""),
        (json!({ "type": "thing" }), "thing"),
        (json!({ "type": "string", "pattern": 3 }), "pattern"),
        (json!({ "type": "string", "pattern": "^(?=a)b$" }), ""),
        (json!({ "properties": [] }), "properties"),
        (json!({ "required": ["a", 1] }), "required"),
        (json!({ "items": 3 }), "schema"),
        (json!({ "x-guidance": {} }), "x-guidance"),
        (json!([1]), "object"),
    ];
    for (i, (schema, word)) in table.iter().enumerate() {
        let refused = compiled(schema).map(|c| write(&c, 1, 8));
        let Err(ConstraintError::Rejected(problem)) = refused else { panic!("row {i}: {schema}: {refused:?}") };
        assert!(problem.contains(word), "row {i}: {schema}: {problem}");
    }
}

/// Small texts that ask for much of the compiler: they are used or refused, and the process lives.
#[test]
fn large_schemas_work_or_are_refused() {
    let optional: Map<String, Value> = (0..800).map(|i| (format!("p{i}"), json!({ "type": "integer" }))).collect();
    let schema = json!({ "type": "object", "properties": optional, "additionalProperties": false });
    let wide = compiled(&schema).expect("800 optional members");
    assert!(takes(&wide, "{\"p0\":1,\"p7\":2,\"p799\":3}") && !takes(&wide, "{\"p7\":1,\"p3\":1}"));
    // More references than a thread of the runtime has stack for.
    let chain = |n: usize, link: fn(String) -> Value| {
        let link = |i: usize| if i + 1 == n { json!({ "type": "null" }) } else { link(format!("#/$defs/{}", i + 1)) };
        let definitions: Map<String, Value> = (0..n).map(|i| (i.to_string(), link(i))).collect();
        json!({ "$ref": "#/$defs/0", "$defs": definitions })
    };
    let lists = compiled(&chain(800, |next| json!({ "items": { "$ref": next } }))).expect("a chain of references");
    assert!(takes(&lists, "[[],[[]]]"));
    for schema in [
        chain(800, |next| json!({ "allOf": [{ "$ref": next }, {}] })),
        chain(40, |next| json!({ "allOf": [{ "$ref": next }, { "$ref": next }] })),
        chain(40, |next| json!({ "anyOf": [{ "$ref": next }, { "$ref": next }], "type": "object", "properties": {} })),
    ] {
        let refused = compiled(&schema);
        assert!(matches!(refused, Err(ConstraintError::Rejected(_))), "{refused:?}");
    }
}
