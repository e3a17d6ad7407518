//! `oneOf`: held where no value is in two of the branches.

use serde_json::{Map, Value, json};

use super::super::ConstraintError;
use super::objects::Evaluated;
use super::{Preparer, keywords};

/// Deepest place that two schemas are told apart at.
const DEPTH_MAX: usize = 8;
/// The kinds of values, with one bit each; an integer is a number.
const KINDS: [&str; 6] = ["null", "boolean", "number", "string", "array", "object"];

impl<'a> Preparer<'a> {
    /// The branches of `oneOf` as those of `anyOf`. Where two branches have a member by which they differ,
    /// as the tag of a union that is there by default, it becomes a required one in both.
    pub(super) fn one_of(&mut self, list: &'a [Value], beside: &Evaluated) -> Result<Vec<Value>, ConstraintError> {
        let mut tags: Vec<Vec<&str>> = vec![Vec::new(); list.len()];
        for (i, a) in list.iter().enumerate() {
            for (j, b) in list.iter().enumerate().skip(i + 1) {
                if self.apart(a, b, 0) || self.left_out(a, b, beside) && self.left_out(b, a, beside) {
                    continue;
                }
                let tag = self.tag(a, b).ok_or_else(|| {
                    self.refuse("the branches of `oneOf` overlap, which is not supported; `anyOf` is")
                })?;
                tags[i].push(tag);
                tags[j].push(tag);
            }
        }
        let mut branches = Vec::with_capacity(list.len());
        for (schema, tags) in list.iter().zip(&tags) {
            branches.push(match tags.is_empty() && beside.is_empty() {
                true => self.deeper(|p| p.at_value(schema))?,
                false => self.tagged(schema, tags, beside)?,
            });
        }
        Ok(branches)
    }

    fn tagged(&mut self, schema: &'a Value, tags: &[&str], beside: &Evaluated) -> Result<Value, ConstraintError> {
        let mut prepared = self.schema(schema, beside, false)?;
        let Value::Object(map) = &mut prepared else { return Ok(prepared) };
        if !tags.is_empty() && !map.contains_key("properties") {
            return Ok(json!({ "allOf": [prepared, { "required": tags }] }));
        }
        let required = map.entry("required").or_insert_with(|| json!([]));
        if let Value::Array(names) = required {
            for tag in tags {
                if !names.contains(&(*tag).into()) {
                    names.push((*tag).into());
                }
            }
            if names.is_empty() {
                map.remove("required");
            }
        }
        Ok(prepared)
    }

    /// The schema that stands for this one: references and lone members of `allOf` followed.
    fn meant(&self, schema: &'a Value) -> &'a Value {
        let mut schema = schema;
        for _ in 0..DEPTH_MAX {
            let mut said = keywords::said(schema);
            schema = match (said.next(), said.next()) {
                (Some(("$ref", reference)), None) => match self.target(reference) {
                    Ok(target) => target,
                    Err(_) => return schema,
                },
                (Some(("allOf", Value::Array(list))), None) if list.len() == 1 => &list[0],
                _ => return schema,
            };
        }
        schema
    }

    /// True if no value is in both schemas.
    fn apart(&self, a: &'a Value, b: &'a Value, depth: usize) -> bool {
        if depth > DEPTH_MAX {
            return false;
        }
        let (a, b) = (self.meant(a), self.meant(b));
        let (Value::Object(one), Value::Object(other)) = (a, b) else {
            return *a == Value::Bool(false) || *b == Value::Bool(false);
        };
        for (schema, map) in [(b, one), (a, other)] {
            for word in ["anyOf", "oneOf"] {
                if let Some(Value::Array(list)) = map.get(word)
                    && list.iter().all(|branch| self.apart(branch, schema, depth + 1))
                {
                    return true;
                }
            }
        }
        if kinds(one) & kinds(other) == 0 {
            return true;
        }
        if let (Some(some), Some(others)) = (values(one), values(other)) {
            return !some.iter().any(|value| others.iter().any(|other| same(value, other)));
        }
        let objects = |map| kinds(map) == kind("object");
        (objects(one) || objects(other))
            && required(one).chain(required(other)).any(|name| match (member(one, name), member(other, name)) {
                (Some(a), Some(b)) => self.apart(a, b, depth + 1),
                (a, b) => a == Some(&Value::Bool(false)) || b == Some(&Value::Bool(false)),
            })
    }

    /// True if a value written for `a` lacks a member that `b` requires: `a` names its members, and has no
    /// others when it is written.
    fn left_out(&self, a: &'a Value, b: &'a Value, beside: &Evaluated) -> bool {
        let (Value::Object(a), Value::Object(b)) = (self.meant(a), self.meant(b)) else { return false };
        let plain = |map: &Map<String, Value>| {
            map.contains_key("properties")
                && !["patternProperties", "unevaluatedProperties"].iter().any(|word| map.contains_key(*word))
                && map.get("additionalProperties").is_none_or(|rule| *rule == Value::Bool(false))
                && !keywords::COMBINING.iter().any(|word| map.contains_key(*word))
        };
        let has = |name: &str| {
            a.get("properties").and_then(|p| p.get(name)).is_some()
                || required(a).any(|r| r == name)
                || beside.may_have(name)
        };
        plain(a) && kinds(a) & kinds(b) & !kind("object") == 0 && required(b).any(|name| !has(name))
    }

    /// A member by whose values two objects are told apart, though it may be missing.
    fn tag(&self, a: &'a Value, b: &'a Value) -> Option<&'a str> {
        let (Value::Object(a), Value::Object(b)) = (self.meant(a), self.meant(b)) else { return None };
        if kinds(a) & kinds(b) & !kind("object") != 0 {
            return None;
        }
        let names = a.get("properties")?.as_object()?;
        let tells = |name: &str| match (member(a, name), member(b, name)) {
            (Some(a), Some(b)) => self.apart(a, b, 1),
            _ => false,
        };
        names
            .keys()
            .map(String::as_str)
            .find(|name| b.get("properties").is_some_and(|p| p.get(name).is_some()) && tells(name))
    }
}

fn kind(name: &str) -> u8 {
    let name = if name == "integer" { "number" } else { name };
    KINDS.iter().position(|kind| *kind == name).map_or(0, |i| 1 << i)
}

/// The kinds of values that a schema's own keywords allow.
fn kinds(map: &Map<String, Value>) -> u8 {
    let typed = match map.get("type") {
        Some(Value::String(name)) => kind(name),
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).fold(0, |all, name| all | kind(name)),
        _ => u8::MAX,
    };
    let of = |value: &Value| match value {
        Value::Null => kind("null"),
        Value::Bool(_) => kind("boolean"),
        Value::Number(_) => kind("number"),
        Value::String(_) => kind("string"),
        Value::Array(_) => kind("array"),
        Value::Object(_) => kind("object"),
    };
    let listed = values(map).map_or(u8::MAX, |list| list.iter().fold(0, |all, value| all | of(value)));
    // What is prepared makes an object of these; other values are not written.
    let named = if map.contains_key("properties") && typed == u8::MAX { kind("object") } else { u8::MAX };
    typed & listed & named
}

/// The values that a schema lists.
fn values(map: &Map<String, Value>) -> Option<&[Value]> {
    match (map.get("const"), map.get("enum")) {
        (Some(value), _) => Some(std::slice::from_ref(value)),
        (None, Some(Value::Array(list))) => Some(list),
        _ => None,
    }
}

/// Equal as JSON Schema has it: 1 is 1.0.
fn same(a: &Value, b: &Value) -> bool {
    a == b || a.is_number() && a.as_f64() == b.as_f64() || (a.is_array() || a.is_object()) && kind_of_container(a, b)
}

/// Lists and objects are not compared: they may be equal.
fn kind_of_container(a: &Value, b: &Value) -> bool {
    a.is_array() == b.is_array() && a.is_object() == b.is_object()
}

fn required(map: &Map<String, Value>) -> impl Iterator<Item = &str> {
    map.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

/// What a schema says of a member; none if it is not said plainly.
fn member<'a>(map: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    match map.get("properties").and_then(|p| p.get(name)) {
        Some(schema) => Some(schema),
        None if map.contains_key("patternProperties") => None,
        None => map.get("additionalProperties"),
    }
}
