//! Whether a value is in a schema, written apart from the code under test and after the specification
//! (2020-12, and what older drafts spell otherwise).

use std::collections::BTreeSet;

use serde_json::{Map, Value};

/// Keywords that say nothing here: annotations, and what other keywords read.
const ASIDE: [&str; 30] = [
    "components",
    "xml",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "$anchor",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentEncoding",
    "contentMediaType",
    "discriminator",
    "nullable",
    "strict",
    "additionalItems",
    "then",
    "else",
    "minContains",
    "maxContains",
    "errorMessage",
    "x-order",
    "propertyOrdering",
    "markdownDescription",
    "example",
];

/// True if `value` is in `schema`. Keywords that it does not know panic.
pub(crate) fn valid(schema: &Value, value: &Value, root: &Value) -> bool {
    let Value::Object(map) = schema else { return schema.as_bool().expect("a schema") };
    map.iter().all(|(word, rule)| ASIDE.contains(&word.as_str()) || holds(word, rule, map, value, root))
}

fn list(rule: &Value) -> &Vec<Value> {
    rule.as_array().expect("a list")
}

fn holds(word: &str, rule: &Value, map: &Map<String, Value>, value: &Value, root: &Value) -> bool {
    let is = |schema: &Value| valid(schema, value, root);
    let count = |length: usize, holds: fn(f64, f64) -> bool| holds(length as f64, rule.as_f64().expect("a count"));
    let number = |holds: fn(f64, f64) -> bool| match (value.as_i64(), rule.as_i64()) {
        _ if !value.is_number() => true,
        // Past 2^53 a double is too coarse.
        (Some(a), Some(b)) => holds((a.saturating_sub(b)) as f64, 0.0),
        _ => holds(value.as_f64().expect("a number"), rule.as_f64().expect("a number")),
    };
    let object = value.as_object();
    match word {
        "$ref" => is(target(root, rule.as_str().expect("a reference"))),
        "allOf" => list(rule).iter().all(is),
        "anyOf" => list(rule).iter().any(is),
        "oneOf" => list(rule).iter().filter(|s| is(s)).count() == 1,
        "not" => !is(rule),
        "if" => map.get(if is(rule) { "then" } else { "else" }).is_none_or(is),
        "const" => same(rule, value),
        "enum" => list(rule).iter().any(|v| same(v, value)),
        "type" => {
            rule.as_array().map_or_else(|| typed(rule, value), |names| names.iter().any(|name| typed(name, value)))
        }
        "properties" => object.is_none_or(|o| o.iter().all(|(k, v)| rule.get(k).is_none_or(|s| valid(s, v, root)))),
        "patternProperties" => object.is_none_or(|o| {
            let patterns = rule.as_object().expect("patterns");
            o.iter().all(|(k, v)| patterns.iter().all(|(p, s)| !matches(p, k) || valid(s, v, root)))
        }),
        "additionalProperties" => object.is_none_or(|o| o.iter().all(|(k, v)| named(map, k) || valid(rule, v, root))),
        "unevaluatedProperties" => {
            assert!(
                rule.as_bool().is_some() && !["$ref", "allOf", "anyOf", "oneOf"].iter().any(|w| map.contains_key(*w))
            );
            *rule == Value::Bool(true) || object.is_none_or(|o| o.keys().all(|k| named(map, k)))
        }
        "propertyNames" => object.is_none_or(|o| o.keys().all(|k| valid(rule, &Value::String(k.clone()), root))),
        "required" => object.is_none_or(|o| list(rule).iter().all(|k| o.contains_key(k.as_str().expect("a key")))),
        "dependentRequired" => object.is_none_or(|o| {
            let all = rule.as_object().expect("an object");
            all.iter().all(|(k, need)| {
                !o.contains_key(k) || list(need).iter().all(|n| o.contains_key(n.as_str().expect("a key")))
            })
        }),
        "minProperties" => object.is_none_or(|o| count(o.len(), |a, b| a >= b)),
        "maxProperties" => object.is_none_or(|o| count(o.len(), |a, b| a <= b)),
        "items" => value.as_array().is_none_or(|items| match rule {
            Value::Array(first) => items
                .iter()
                .enumerate()
                .all(|(i, v)| first.get(i).or_else(|| map.get("additionalItems")).is_none_or(|s| valid(s, v, root))),
            _ => {
                let first = map.get("prefixItems").map_or(0, |p| list(p).len());
                items.iter().skip(first).all(|v| valid(rule, v, root))
            }
        }),
        "prefixItems" => {
            value.as_array().is_none_or(|items| items.iter().zip(list(rule)).all(|(v, s)| valid(s, v, root)))
        }
        "unevaluatedItems" => {
            let first = map.get("prefixItems").map_or(0, |p| list(p).len());
            *rule == Value::Bool(true) || value.as_array().is_none_or(|items| items.len() <= first)
        }
        "minItems" => value.as_array().is_none_or(|items| count(items.len(), |a, b| a >= b)),
        "maxItems" => value.as_array().is_none_or(|items| count(items.len(), |a, b| a <= b)),
        "uniqueItems" => {
            let distinct =
                |items: &Vec<Value>| items.iter().map(Value::to_string).collect::<BTreeSet<_>>().len() == items.len();
            *rule == Value::Bool(false) || value.as_array().is_none_or(distinct)
        }
        "contains" => value.as_array().is_none_or(|items| {
            let least = map.get("minContains").map_or(1, |n| n.as_u64().expect("a count"));
            items.iter().filter(|v| valid(rule, v, root)).count() as u64 >= least
        }),
        "minLength" => value.as_str().is_none_or(|s| count(s.chars().count(), |a, b| a >= b)),
        "maxLength" => value.as_str().is_none_or(|s| count(s.chars().count(), |a, b| a <= b)),
        "pattern" => value.as_str().is_none_or(|s| matches(rule.as_str().expect("a pattern"), s)),
        "format" => value.as_str().is_none_or(|s| formatted(rule.as_str().expect("a format"), s)),
        "minimum" => {
            number(|a, b| a >= b) && (map.get("exclusiveMinimum") != Some(&Value::Bool(true)) || number(|a, b| a > b))
        }
        "maximum" => {
            number(|a, b| a <= b) && (map.get("exclusiveMaximum") != Some(&Value::Bool(true)) || number(|a, b| a < b))
        }
        "exclusiveMinimum" => rule.is_boolean() || number(|a, b| a > b),
        "exclusiveMaximum" => rule.is_boolean() || number(|a, b| a < b),
        "multipleOf" => value.as_f64().is_none_or(|n| {
            let times = n / rule.as_f64().expect("a number");
            (times - times.round()).abs() < 1e-9
        }),
        other => panic!("the test knows no `{other}`"),
    }
}

fn named(map: &Map<String, Value>, key: &str) -> bool {
    let patterns = map.get("patternProperties").and_then(Value::as_object);
    map.get("properties").and_then(|p| p.get(key)).is_some()
        || patterns.is_some_and(|patterns| patterns.keys().any(|p| matches(p, key)))
}

fn typed(name: &Value, value: &Value) -> bool {
    match name.as_str().expect("a name") {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("{other}"),
    }
}

fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => x == y || !(x.is_i64() && y.is_i64()) && x.as_f64() == y.as_f64(),
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(a, b)| same(a, b)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(k, v)| y.get(k).is_some_and(|w| same(v, w)))
        }
        _ => a == b,
    }
}

fn matches(pattern: &str, text: &str) -> bool {
    fancy_regex::Regex::new(pattern).expect("a pattern").is_match(text).expect("matches")
}

/// Days and times by the calendar; what else has a format here is looked at by the rows of the table.
fn formatted(format: &str, text: &str) -> bool {
    let number = |range: std::ops::Range<usize>| text.get(range).and_then(|t| t.parse::<u32>().ok());
    let day = || {
        let (Some(year), Some(month), Some(day)) = (number(0..4), number(5..7), number(8..10)) else { return false };
        let leap = year % 4 == 0 && year % 100 != 0 || year % 400 == 0;
        let days = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        year > 0 && (1..=12).contains(&month) && (1..=days[month as usize - 1]).contains(&day)
    };
    match format {
        "date" => text.len() == 10 && day(),
        "date-time" => day() && text.get(10..11) == Some("T") && formatted("time", &text[11..]),
        "time" => {
            number(0..2).is_some_and(|h| h < 24)
                && number(3..5).is_some_and(|m| m < 60)
                && number(6..8).is_some_and(|s| s < 60)
        }
        _ => true,
    }
}

/// Where a reference leads: by the letter of RFC 6901 and RFC 3986, or by the name of an anchor.
fn target<'a>(root: &'a Value, reference: &str) -> &'a Value {
    let fragment = reference.split_once('#').expect("a fragment").1;
    if fragment.is_empty() {
        return root;
    }
    if !fragment.starts_with('/') {
        let defs = root["$defs"].as_object().expect("definitions");
        return defs.values().find(|s| s["$anchor"] == fragment).expect("an anchor");
    }
    fragment[1..].split('/').fold(root, |at, part| {
        let codes =
            [("%20", " "), ("%22", "\""), ("%25", "%"), ("%2C", ","), ("%3C", "<"), ("%3E", ">"), ("%C3%BC", "ü")];
        let key = codes
            .iter()
            .fold(part.to_owned(), |key, (code, c)| key.replace(code, c))
            .replace("~1", "/")
            .replace("~0", "~");
        at.get(&key).or_else(|| at.get(key.parse::<usize>().ok()?)).expect("a target")
    })
}
