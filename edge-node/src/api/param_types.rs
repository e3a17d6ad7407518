//! From raw text to JSON: what a tool's schema says of an argument decides how its text is written.

use serde_json::Value;
use tandem_engine::constraint::schema::resolve;

/// Most references followed from one schema, and deepest nesting of alternatives.
const DEPTH_MAX: usize = 16;

/// Kinds of JSON values that a schema allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kinds(u8);

impl Kinds {
    const NULL: Self = Self(1);
    const BOOLEAN: Self = Self(1 << 1);
    const INTEGER: Self = Self(1 << 2);
    const NUMBER: Self = Self(1 << 3);
    const ARRAY: Self = Self(1 << 4);
    const OBJECT: Self = Self(1 << 5);
    const STRING: Self = Self(1 << 6);

    /// The kinds of the argument `key` of a tool with these parameters; none if nothing is known of it.
    pub(crate) fn of_argument(parameters: &Value, key: &str) -> Self {
        parameters["properties"].get(key).map_or(Self::default(), |schema| Self::of(schema, parameters))
    }

    /// The kinds that `schema` allows; `root` is the schema that its references point into.
    pub(crate) fn of(schema: &Value, root: &Value) -> Self {
        kinds(schema, root, 0)
    }

    /// True if a value of this kind is always a string: then its text can be passed on as it comes.
    /// What nothing is known of is a string too.
    pub(crate) fn only_text(self) -> bool {
        self == Self::STRING || self.is_unknown()
    }

    /// True if nothing is known.
    pub(crate) fn is_unknown(self) -> bool {
        self == Self::default()
    }

    /// True if a string is among them.
    pub(crate) fn has_text(self) -> bool {
        self.only_text() || self.has(Self::STRING)
    }

    fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn named(word: &str) -> Self {
        match word {
            "null" => Self::NULL,
            "boolean" => Self::BOOLEAN,
            "integer" => Self::INTEGER,
            "number" => Self::NUMBER,
            "array" => Self::ARRAY,
            "object" => Self::OBJECT,
            "string" => Self::STRING,
            _ => Self::default(),
        }
    }

    fn of_value(value: &Value) -> Self {
        match value {
            Value::Null => Self::NULL,
            Value::Bool(_) => Self::BOOLEAN,
            Value::Number(n) if n.is_i64() || n.is_u64() || n.as_f64().is_some_and(|n| n.fract() == 0.0) => {
                Self::INTEGER.or(Self::NUMBER)
            }
            Value::Number(_) => Self::NUMBER,
            Value::Array(_) => Self::ARRAY,
            Value::Object(_) => Self::OBJECT,
            Value::String(_) => Self::STRING,
        }
    }
}

fn kinds(schema: &Value, root: &Value, depth: usize) -> Kinds {
    if depth > DEPTH_MAX {
        return Kinds::default();
    }
    let all = |list: &[Value]| list.iter().fold(Kinds::default(), |k, s| k.or(kinds(s, root, depth + 1)));
    let null = if schema["nullable"] == true { Kinds::NULL } else { Kinds::default() };
    let own = match &schema["type"] {
        Value::String(word) => Kinds::named(word),
        Value::Array(words) => {
            words.iter().filter_map(Value::as_str).fold(Kinds::default(), |k, word| k.or(Kinds::named(word)))
        }
        _ => Kinds::default(),
    };
    if own != Kinds::default() {
        return own.or(null);
    }
    let listed = match (&schema["enum"], schema.get("const")) {
        (Value::Array(values), _) => values.iter().fold(Kinds::default(), |k, v| k.or(Kinds::of_value(v))),
        (_, Some(value)) => Kinds::of_value(value),
        _ => Kinds::default(),
    };
    if listed != Kinds::default() {
        return listed.or(null);
    }
    for word in ["anyOf", "oneOf", "allOf"] {
        if let Value::Array(list) = &schema[word] {
            return all(list).or(null);
        }
    }
    match referred(schema, root) {
        Some(schema) => kinds(schema, root, depth + 1).or(null),
        None => null,
    }
}

/// The schema that `$ref` points to, if it is one of the root's own.
pub(crate) fn referred<'a>(schema: &Value, root: &'a Value) -> Option<&'a Value> {
    resolve(root, schema["$ref"].as_str()?).ok()
}

/// The JSON text of a value that was written as raw text: as it stands where it is JSON of one of the
/// kinds, else a string.
pub(crate) fn written(raw: &str, kinds: Kinds) -> String {
    let text = raw.trim();
    // Templates show earlier calls with Python's spelling of these.
    let word = ["true", "false", "null"].into_iter().find(|word| text.eq_ignore_ascii_case(word));
    let text = word.unwrap_or(text);
    match serde_json::from_str::<Value>(text) {
        Ok(Value::String(_)) | Err(_) => quoted(raw),
        Ok(value) if kinds.has(Kinds::of_value(&value)) => text.to_owned(),
        Ok(_) => quoted(raw),
    }
}

/// A JSON string.
pub(crate) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_typed_by_their_schema() {
        let root = json!({ "$defs": { "n": { "type": "integer" }, "loop": { "$ref": "#/$defs/loop" } } });
        let table = [
            (json!({ "type": "string" }), "42", "\"42\""),
            (json!({ "type": "string" }), "null", "\"null\""),
            (json!({ "type": "string" }), "say \"é\"\n\u{1}", "\"say \\\"é\\\"\\n\\u0001\""),
            (json!({}), "42", "\"42\""),
            (json!(true), "42", "\"42\""),
            (json!({ "type": "nonsense" }), "42", "\"42\""),
            (json!({ "type": "integer" }), " 42\n", "42"),
            (json!({ "type": "integer" }), "-7", "-7"),
            (json!({ "type": "integer" }), "4.5", "\"4.5\""),
            (json!({ "type": "integer" }), "4.0", "4.0"),
            (json!({ "type": "integer" }), "123456789012345678901234567890", "123456789012345678901234567890"),
            (json!({ "type": "integer" }), "four", "\"four\""),
            (json!({ "type": "number" }), "4", "4"),
            (json!({ "type": "number" }), "-4.50", "-4.50"),
            (json!({ "type": "number" }), "1e999", "\"1e999\""),
            (json!({ "type": "boolean" }), "true", "true"),
            (json!({ "type": "boolean" }), "False", "false"),
            (json!({ "type": "boolean" }), "yes", "\"yes\""),
            (json!({ "type": "null" }), "None", "\"None\""),
            (json!({ "type": ["string", "null"] }), "null", "null"),
            (json!({ "type": ["string", "null"] }), "\"x\"", "\"\\\"x\\\"\""),
            (json!({ "type": "array" }), "[1, {\"ü\": null}]", "[1, {\"ü\": null}]"),
            (json!({ "type": "array" }), "[1,", "\"[1,\""),
            (json!({ "type": "array" }), "{}", "\"{}\""),
            (json!({ "type": "object" }), "{\"a\": 1} x", "\"{\\\"a\\\": 1} x\""),
            (json!({ "type": "object" }), "{\n  \"a\": 1\n}", "{\n  \"a\": 1\n}"),
            (json!({ "anyOf": [{ "type": "integer" }, { "type": "null" }] }), "3", "3"),
            (json!({ "anyOf": [{ "type": "integer" }, { "type": "null" }] }), "NULL", "null"),
            (json!({ "enum": [1, "two"] }), "1", "1"),
            (json!({ "enum": [1, "two"] }), "two", "\"two\""),
            (json!({ "const": 1 }), "1", "1"),
            (json!({ "$ref": "#/$defs/n" }), "3", "3"),
            (json!({ "allOf": [{ "$ref": "#/$defs/n" }] }), "3", "3"),
            (json!({ "$ref": "#/$defs/loop" }), "3", "\"3\""),
            (json!({ "$ref": "elsewhere" }), "3", "\"3\""),
            (json!({ "type": "integer", "nullable": true }), "null", "null"),
        ];
        for (schema, raw, wanted) in table {
            assert_eq!(written(raw, Kinds::of(&schema, &root)), wanted, "{schema}: {raw}");
        }
    }

    #[test]
    fn what_no_schema_names_is_text() {
        let parameters = json!({ "type": "object", "properties": { "n": { "type": "integer" } } });
        assert!(!Kinds::of_argument(&parameters, "n").only_text());
        for (parameters, key) in [(&parameters, "m"), (&json!({}), "n"), (&json!(null), "n")] {
            assert!(Kinds::of_argument(parameters, key).only_text(), "{parameters} {key}");
        }
    }
}
