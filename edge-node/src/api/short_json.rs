//! Schemas for a small model that was taught little JSON: where a schema leaves the length of a string, a list or
//! an integer open, such a model goes on until its context is full, and its answer is the beginning of a value. So
//! they get a bound from here where the setting `api.short_json` says so, and answers are whole.

use serde_json::{Map, Value};

/// Where the setting is not set, models with a smaller context than this have it: a value that goes on without an
/// end fills such a context, where a larger one leaves the client's token limit to end it. Tokens.
const CONTEXT_SMALL: usize = 2048;
/// Longest string where the schema says nothing, characters.
const CHARS_MAX: u64 = 48;
/// Most items of a list where the schema says nothing.
const ITEMS_MAX: u64 = 4;
/// How far an integer goes past what the schema says of it, and past zero.
const INTEGER_MAX: f64 = 1e6;
/// Larger bounds of the schema stay without a counterpart.
const EXACT_MAX: f64 = 1e15;

/// Keywords whose values are schemas by name. What holds beside other schemas (`allOf`) is left alone: a bound
/// there might leave no value.
const NAMED: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
const LISTED: [&str; 3] = ["anyOf", "oneOf", "prefixItems"];
const SINGLE: [&str; 2] = ["items", "additionalProperties"];

/// Says so to the client.
pub(crate) const NOTICE: &str = "strings, lists and integers that the schema does not bound are kept short for this \
model (setting api.short_json)";

/// What holds where the setting is not set, for a model with this context, tokens.
pub(crate) fn by_default(context: usize) -> bool {
    context < CONTEXT_SMALL
}

/// The schema with a bound for each string, list and integer that it gives none. What it takes, `schema` takes.
pub(crate) fn bounded(mut schema: Value) -> Value {
    bound(&mut schema);
    schema
}

fn bound(schema: &mut Value) {
    let Value::Object(map) = schema else { return };
    for word in NAMED {
        map.get_mut(word).and_then(Value::as_object_mut).into_iter().flat_map(Map::values_mut).for_each(bound);
    }
    for word in LISTED {
        map.get_mut(word).and_then(Value::as_array_mut).into_iter().flatten().for_each(bound);
    }
    for word in SINGLE {
        map.get_mut(word).into_iter().for_each(bound);
    }
    let has = |words: &[&str]| words.iter().any(|word| map.contains_key(*word));
    let fixed = has(&["enum", "const", "$ref", "allOf"]);
    let text = is(map, "string") && !fixed && !has(&["maxLength", "pattern", "format"]);
    let list = is(map, "array") && !fixed && !has(&["maxItems"]);
    for (open, least, most, bound) in
        [(text, "minLength", "maxLength", CHARS_MAX), (list, "minItems", "maxItems", ITEMS_MAX)]
    {
        if open {
            let least = map.get(least).and_then(Value::as_f64).unwrap_or(0.0);
            // What the schema asks for comes first; a bound that is no whole number is its own affair.
            let bound = if least > bound as f64 { Value::from(least) } else { bound.into() };
            map.insert(most.to_owned(), bound);
        }
    }
    if is(map, "integer") && !fixed && !map.contains_key("multipleOf") {
        bound_integer(map);
    }
}

fn bound_integer(map: &mut Map<String, Value>) {
    let given = |words: [&str; 2]| words.iter().find_map(|word| map.get(*word).and_then(Value::as_f64));
    let (least, most) = (given(["minimum", "exclusiveMinimum"]), given(["maximum", "exclusiveMaximum"]));
    if least.or(most).is_some_and(|given| given.abs() > EXACT_MAX) {
        return;
    }
    if most.is_none() {
        map.insert("maximum".to_owned(), (least.unwrap_or(0.0).max(0.0).ceil() + INTEGER_MAX).into());
    }
    if least.is_none() {
        map.insert("minimum".to_owned(), (most.unwrap_or(0.0).min(0.0).floor() - INTEGER_MAX).into());
    }
}

/// True if the schema's type is this one, or may be.
fn is(schema: &Map<String, Value>, kind: &str) -> bool {
    match schema.get("type") {
        Some(Value::String(only)) => only == kind,
        Some(Value::Array(kinds)) => kinds.iter().any(|one| one == kind),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tandem_engine::constraint::json_schema;

    use super::*;

    #[test]
    fn strings_and_lists_without_a_bound_get_one() {
        let text = || json!({ "type": "string", "maxLength": 48 });
        let table = [
            (json!({ "type": "string" }), text()),
            (json!({ "type": ["string", "null"] }), json!({ "type": ["string", "null"], "maxLength": 48 })),
            (json!({ "type": "string", "minLength": 3 }), json!({ "type": "string", "minLength": 3, "maxLength": 48 })),
            (json!({ "type": "array" }), json!({ "type": "array", "maxItems": 4 })),
            (
                json!({ "type": "array", "items": { "type": "string" } }),
                json!({ "type": "array", "items": text(), "maxItems": 4 }),
            ),
            (
                json!({ "type": "object", "properties": { "a": { "anyOf": [{ "type": "string" }, { "type": "null" }] } } }),
                json!({ "type": "object", "properties": { "a": { "anyOf": [text(), { "type": "null" }] } } }),
            ),
            (
                json!({ "$ref": "#/$defs/a", "$defs": { "a": { "type": "string" } } }),
                json!({ "$ref": "#/$defs/a", "$defs": { "a": text() } }),
            ),
            (
                json!({ "type": "object", "additionalProperties": { "type": "string" } }),
                json!({ "type": "object", "additionalProperties": text() }),
            ),
        ];
        for (schema, wanted) in table {
            assert_eq!(bounded(schema.clone()), wanted, "{schema}");
        }
        let integers = [
            (json!({}), [-1e6, 1e6]),
            (json!({ "minimum": 3 }), [3.0, 1_000_003.0]),
            (json!({ "maximum": -2.5 }), [-1_000_003.0, -2.5]),
            (json!({ "minimum": -5, "maximum": 2_000_000 }), [-5.0, 2e6]),
        ];
        for (mut schema, wanted) in integers {
            schema["type"] = "integer".into();
            let schema = bounded(schema);
            let got = ["minimum", "maximum"].map(|word| schema[word].as_f64());
            assert_eq!(got, wanted.map(Some), "{schema}");
        }
        // More than the bound is asked for: just that much.
        let long = bounded(json!({ "type": "string", "minLength": 90 }));
        assert_eq!(long["maxLength"].as_f64(), Some(90.0));
    }

    #[test]
    fn what_has_a_bound_keeps_it() {
        for schema in [
            json!({ "type": "string", "maxLength": 500 }),
            json!({ "type": "string", "enum": ["a"] }),
            json!({ "type": "string", "const": "a" }),
            json!({ "type": "string", "pattern": "^[0-9]{80}$" }),
            json!({ "type": "string", "format": "date" }),
            json!({ "type": "array", "maxItems": 9 }),
            json!({ "allOf": [{ "type": "string" }, { "minLength": 60 }] }),
            json!({ "type": "integer", "multipleOf": 7 }),
            json!({ "type": "integer", "exclusiveMinimum": 1e18 }),
            json!({ "type": "number" }),
            json!({ "type": "object", "additionalProperties": true }),
            json!({ "enum": [{ "type": "string" }] }),
            json!(true),
        ] {
            assert_eq!(bounded(schema.clone()), schema);
        }
    }

    /// A schema that can be held can be held with the bounds.
    #[test]
    fn bounds_leave_a_value() {
        for schema in [
            json!({ "type": "string", "minLength": 90 }),
            json!({ "type": "array", "items": { "type": "integer", "exclusiveMinimum": 7 }, "minItems": 6 }),
            json!({ "type": ["integer", "null"], "maximum": -2.5 }),
            json!({ "type": "object", "properties": { "a": { "allOf": [{ "type": "string" }, { "minLength": 60 }] } } }),
        ] {
            assert!(json_schema(&bounded(schema.clone())).is_ok(), "{schema}");
        }
    }
}
