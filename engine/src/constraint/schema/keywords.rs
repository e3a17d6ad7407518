//! Which keywords narrow values, and which of them can be held.

use serde_json::{Map, Value};

/// Keywords that are held, here or by the library.
const HELD: [&str; 35] = [
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
    "const",
    "enum",
    "type",
    "properties",
    "patternProperties",
    "additionalProperties",
    "unevaluatedProperties",
    "propertyNames",
    "required",
    "minProperties",
    "maxProperties",
    "items",
    "prefixItems",
    "additionalItems",
    "unevaluatedItems",
    "minItems",
    "maxItems",
    "uniqueItems",
    "contains",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "not",
    "if",
    "dependentRequired",
];
/// Those of them that combine schemas of one value.
pub(super) const COMBINING: [&str; 4] = ["$ref", "allOf", "anyOf", "oneOf"];
/// Keywords that narrow values and are refused, unless [`not_held`] finds that they say nothing.
const REFUSED: [&str; 4] = ["dependencies", "dependentSchemas", "$dynamicRef", "$recursiveRef"];

/// True for a keyword that says nothing of a value's form: an annotation, or one that no specification
/// knows, which is one too.
#[must_use]
pub fn says_nothing(word: &str) -> bool {
    !HELD.contains(&word) && !REFUSED.contains(&word)
}

/// True for a format that strings are held to. Others are annotations (JSON Schema 2020-12, 7.2.1).
#[must_use]
pub fn format_is_held(format: &str) -> bool {
    super::formats::pattern(format).is_some() || super::formats::LIBRARY.contains(&format)
}

/// The keywords of a schema that say something.
pub(super) fn said(schema: &Value) -> impl Iterator<Item = (&str, &Value)> {
    schema.as_object().into_iter().flatten().map(|(word, rule)| (word.as_str(), rule)).filter(|(w, _)| !says_nothing(w))
}

/// True for a schema that every value is in.
pub(super) fn is_anything(schema: &Value) -> bool {
    *schema == Value::Bool(true) || schema.is_object() && said(schema).next().is_none()
}

/// The first keyword that cannot be held.
pub(super) fn not_held(map: &Map<String, Value>) -> Option<&str> {
    let empty = |rule: &Value| rule.as_object().is_some_and(Map::is_empty);
    let count = |word: &str| map.get(word).and_then(Value::as_u64);
    let refused = |word: &str, rule: &Value| match word {
        "dependencies" | "dependentSchemas" => !empty(rule),
        "dependentRequired" => !dependents_are_required(map, rule),
        "if" => map.contains_key("then") || map.contains_key("else"),
        // `not` of everything is handled where it stands.
        "not" => *rule != Value::Bool(false) && !is_anything(rule),
        "contains" => {
            let any = count("minContains") == Some(0)
                || is_anything(rule) && count("minItems").unwrap_or(0) >= count("minContains").unwrap_or(1);
            !any || map.contains_key("maxContains")
        }
        "uniqueItems" => *rule == Value::Bool(true) && count("maxItems").is_none_or(|most| most > 1),
        _ => REFUSED.contains(&word),
    };
    map.iter().find(|(word, rule)| refused(word, rule)).map(|(word, _)| word.as_str())
}

/// Keys that must be there where another is, and must be there anyway.
fn dependents_are_required(map: &Map<String, Value>, rule: &Value) -> bool {
    let none = Vec::new();
    let required = map.get("required").and_then(Value::as_array).unwrap_or(&none);
    let mut all = rule.as_object().into_iter().flat_map(Map::values).filter_map(Value::as_array).flatten();
    rule.is_object() && all.all(|key| required.contains(key))
}
