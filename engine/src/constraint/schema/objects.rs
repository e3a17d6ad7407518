//! Objects and lists: which members and items there may be beside those that are named.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::super::ConstraintError;
use super::{Preparer, keywords, patterns};

/// Most references from one name schema to the next.
const NAME_REFERENCES_MAX: usize = 8;

/// What schemas of one value say of its members.
#[derive(Clone, Default)]
pub(super) struct Evaluated {
    /// Members that they name.
    names: BTreeSet<String>,
    /// They say of all others what those are.
    all: bool,
}

impl Evaluated {
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty() && !self.all
    }

    /// True if members of this name may be there.
    pub(super) fn may_have(&self, name: &str) -> bool {
        self.all || self.names.contains(name)
    }

    fn and(mut self, other: &Self) -> Self {
        self.names.extend(other.names.iter().cloned());
        self.all |= other.all;
        self
    }
}

/// What is said of a value's members beside one part of its schema.
pub(super) struct Beside {
    /// Beside a schema of `allOf`, or a reference: all that is said.
    pub(super) all: Evaluated,
    /// Beside a branch of `anyOf`, of `oneOf`.
    pub(super) of_any: Evaluated,
    pub(super) of_one: Evaluated,
    /// Beside the schema's own keywords.
    pub(super) of_own: Evaluated,
}

/// What a schema's own keywords say of members.
fn own(map: &Map<String, Value>) -> Evaluated {
    let names = map.get("properties").and_then(Value::as_object).into_iter().flat_map(Map::keys);
    let required = map.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let open = |word: &str| map.get(word).is_some_and(|rule| *rule != Value::Bool(false));
    let patterns = map.get("patternProperties").and_then(Value::as_object).is_some_and(|p| !p.is_empty());
    Evaluated {
        names: names.map(String::as_str).chain(required).map(str::to_owned).collect(),
        all: patterns || open("additionalProperties") || open("unevaluatedProperties"),
    }
}

impl<'a> Preparer<'a> {
    pub(super) fn beside(&mut self, map: &'a Map<String, Value>, outer: &Evaluated) -> Result<Beside, ConstraintError> {
        let all = self.combined(map, &["$ref", "allOf"])?;
        let any = self.combined(map, &["anyOf"])?;
        let one = self.combined(map, &["oneOf"])?;
        let own = own(map);
        let both = outer.clone().and(&own).and(&all);
        Ok(Beside {
            all: both.clone().and(&any).and(&one),
            of_any: both.clone().and(&one),
            of_one: both.and(&any),
            of_own: outer.clone().and(&all).and(&any).and(&one),
        })
    }

    /// What the schemas that a schema combines by these keywords say of members.
    fn combined(&mut self, map: &'a Map<String, Value>, words: &[&str]) -> Result<Evaluated, ConstraintError> {
        let mut sum = Evaluated::default();
        for word in words {
            match map.get(*word) {
                Some(Value::Array(list)) => {
                    for schema in list {
                        sum = sum.and(&self.evaluated(schema)?);
                    }
                }
                Some(reference) if *word == "$ref" => {
                    sum = sum.and(&self.at_target(reference, |p, target| p.evaluated(target))?);
                }
                _ => {}
            }
        }
        Ok(sum)
    }

    fn evaluated(&mut self, schema: &'a Value) -> Result<Evaluated, ConstraintError> {
        self.count()?;
        let Value::Object(map) = schema else { return Ok(Evaluated::default()) };
        self.deeper(|p| Ok(own(map).and(&p.combined(map, &keywords::COMBINING)?)))
    }

    /// Takes over what a schema says of members. An object that names members has no others, unless the
    /// schema says so: models left to themselves invent keys without an end.
    pub(super) fn members(
        &mut self,
        map: &'a Map<String, Value>,
        out: &mut Map<String, Value>,
        beside: &Evaluated,
        alone: bool,
    ) -> Result<(), ConstraintError> {
        let words = [
            "properties",
            "patternProperties",
            "additionalProperties",
            "unevaluatedProperties",
            "propertyNames",
            "required",
            "minProperties",
            "maxProperties",
        ];
        if !words.iter().any(|word| map.contains_key(*word)) {
            return Ok(());
        }
        let mut members = Members {
            named: self.children(map, "properties")?,
            patterns: self
                .children(map, "patternProperties")?
                .into_iter()
                .map(|(pattern, schema)| (patterns::held(&pattern), schema))
                .collect(),
            others: map.get("additionalProperties").map(|rule| self.child("additionalProperties", rule)).transpose()?,
            required: self.required(map)?,
        };
        let names_some = map.contains_key("properties") || !members.patterns.is_empty();
        let mut closes = names_some;
        match map.get("unevaluatedProperties") {
            None => {}
            Some(Value::Bool(false)) => closes = true,
            Some(rule) if keywords::is_anything(rule) => {
                members.others.get_or_insert(true.into());
            }
            Some(rule) if alone && members.others.is_none() => {
                members.others = Some(self.child("unevaluatedProperties", rule)?);
            }
            Some(_) => return Err(self.unsupported("unevaluatedProperties")),
        }
        if let Some(rule) = map.get("propertyNames") {
            self.names(rule, &mut members)?;
        }
        if closes && members.others.is_none() && !beside.all {
            for name in members.required.iter().chain(&beside.names) {
                members.named.entry(name.clone()).or_insert(true.into());
            }
            members.others = Some(false.into());
        }
        if alone && !["type", "const", "enum"].iter().any(|word| map.contains_key(*word)) {
            out.insert("type".into(), "object".into());
        }
        let (least, most) = self.member_counts(map, &members, alone)?;
        self.keys_told_apart |= members.open() && !(members.named.is_empty() && members.patterns.is_empty());
        for (word, count) in [("minProperties", least), ("maxProperties", most)] {
            count.and_then(|count| out.insert(word.into(), count.into()));
        }
        if map.contains_key("required") {
            out.insert("required".into(), members.required.into());
        }
        out.insert("properties".into(), members.named.into());
        if !members.patterns.is_empty() {
            out.insert("patternProperties".into(), members.patterns.into());
        }
        members.others.and_then(|rule| out.insert("additionalProperties".into(), rule));
        Ok(())
    }

    fn children(&mut self, map: &'a Map<String, Value>, word: &str) -> Result<Map<String, Value>, ConstraintError> {
        match map.get(word) {
            None => Ok(Map::new()),
            Some(Value::Object(members)) => {
                members.iter().map(|(name, schema)| Ok((name.clone(), self.child(name, schema)?))).collect()
            }
            Some(_) => Err(self.refuse(&format!("`{word}` must be an object"))),
        }
    }

    fn required(&self, map: &Map<String, Value>) -> Result<Vec<String>, ConstraintError> {
        let wrong = || self.refuse("`required` must be an array of strings");
        let mut names: Vec<String> = Vec::new();
        for name in map.get("required").map(|r| r.as_array().ok_or_else(wrong)).transpose()?.into_iter().flatten() {
            let name = name.as_str().ok_or_else(wrong)?;
            if !names.iter().any(|known| known == name) {
                names.push(name.into());
            }
        }
        Ok(names)
    }

    /// What `propertyNames` says, said by the members: a list of names, or a pattern where none is named.
    fn names(&mut self, rule: &'a Value, members: &mut Members) -> Result<(), ConstraintError> {
        let mut rule = rule;
        for _ in 0..NAME_REFERENCES_MAX {
            match keywords::said(rule).next() {
                Some(("$ref", reference)) if keywords::said(rule).count() == 1 => rule = self.target(reference)?,
                _ => break,
            }
        }
        let unsupported = self.unsupported("propertyNames");
        let string =
            |rule: &Value| *rule == "string" || rule.as_array().is_some_and(|list| list.contains(&"string".into()));
        let mut pattern = None;
        for (word, rule) in keywords::said(rule) {
            match (word, rule) {
                ("type", rule) if string(rule) => {}
                ("format", Value::String(format)) if !keywords::format_is_held(format) => {}
                ("const", name) => members.have_names_of(std::slice::from_ref(name)).ok_or(unsupported.clone())?,
                ("enum", Value::Array(names)) => members.have_names_of(names).ok_or(unsupported.clone())?,
                ("pattern", Value::String(text)) if pattern.is_none() => pattern = Some(patterns::held(text)),
                ("minLength", rule) if rule.as_u64() == Some(1) && pattern.is_none() => pattern = Some("(?s:.)".into()),
                _ => return Err(unsupported),
            }
        }
        let Some(pattern) = pattern else { return Ok(()) };
        if !members.named.is_empty() || !members.patterns.is_empty() {
            return Err(unsupported);
        }
        members.patterns.insert(pattern, members.others.take().unwrap_or(true.into()));
        members.others = Some(false.into());
        Ok(())
    }

    /// The bounds on the number of members that are not kept anyway. The library counts a repeated key
    /// twice, so of keys that are not named it can ask for one, and not for two.
    fn member_counts(
        &self,
        map: &Map<String, Value>,
        members: &Members,
        alone: bool,
    ) -> Result<(Option<u64>, Option<u64>), ConstraintError> {
        let count = |word: &str| match map.get(word).map(super::numbers::whole) {
            None => Ok(None),
            Some(rule) => rule.as_u64().map(Some).ok_or_else(|| self.refuse(&format!("`{word}` must be a count"))),
        };
        let (named, required) = (members.may_be().count() as u64, members.required.len() as u64);
        let least = count("minProperties")?.filter(|least| *least > required);
        let most = count("maxProperties")?.filter(|most| members.open() || *most < named);
        let optional = named.saturating_sub(required);
        let more = least.unwrap_or(required) - required;
        let held = match (least, most) {
            (None, None) => true,
            _ if !alone => false,
            _ if members.open() => optional == 0 && more <= 1,
            _ => more <= 1 && most.is_none_or(|most| most.saturating_sub(required) == 1),
        };
        match (held, least) {
            (true, _) => Ok((least, most)),
            (false, Some(_)) => Err(self.unsupported("minProperties")),
            (false, None) => Err(self.unsupported("maxProperties")),
        }
    }

    /// Takes over what a schema says of items. A list that names its first items has no others, unless the
    /// schema says so.
    pub(super) fn items(
        &mut self,
        map: &'a Map<String, Value>,
        out: &mut Map<String, Value>,
        alone: bool,
    ) -> Result<(), ConstraintError> {
        // Older drafts list the first items in `items`.
        let (first, others) = match (map.get("items"), map.get("prefixItems")) {
            (Some(Value::Array(first)), None) => (Some(first), map.get("additionalItems")),
            (others, Some(Value::Array(first))) => (Some(first), others),
            (others, None) => (None, others),
            (_, Some(_)) => return Err(self.refuse("`prefixItems` must be an array")),
        };
        let first: Option<Vec<Value>> = match first {
            Some(list) => Some(list.iter().map(|item| self.child("prefixItems", item)).collect::<Result<_, _>>()?),
            None => None,
        };
        let mut others = others.map(|rule| self.child("items", rule)).transpose()?;
        match map.get("unevaluatedItems") {
            None => {}
            Some(rule) if keywords::is_anything(rule) => {
                others.get_or_insert(true.into());
            }
            Some(Value::Bool(false)) if alone || others.is_some() => {
                others.get_or_insert(false.into());
            }
            Some(_) => return Err(self.unsupported("unevaluatedItems")),
        }
        if alone && first.is_some() {
            others.get_or_insert(false.into());
        }
        let listed = ["type", "const", "enum"].iter().any(|word| map.contains_key(*word));
        if alone && !listed && (first.is_some() || others.is_some()) {
            out.insert("type".into(), "array".into());
        }
        first.and_then(|list| out.insert("prefixItems".into(), list.into()));
        others.and_then(|rule| out.insert("items".into(), rule));
        Ok(())
    }
}

/// The members of an object.
struct Members {
    named: Map<String, Value>,
    patterns: Map<String, Value>,
    /// All others; any value if nothing is said.
    others: Option<Value>,
    required: Vec<String>,
}

impl Members {
    /// True if there may be members that are not named.
    fn open(&self) -> bool {
        !self.patterns.is_empty() || self.others != Some(Value::Bool(false))
    }

    /// The names of those that may be there.
    fn may_be(&self) -> impl Iterator<Item = &String> {
        let undeclared = self.required.iter().filter(|name| !self.named.contains_key(*name));
        self.named.iter().filter(|(_, rule)| **rule != Value::Bool(false)).map(|(name, _)| name).chain(undeclared)
    }

    /// Leaves members of these names only; none if patterns stand in the way.
    fn have_names_of(&mut self, names: &[Value]) -> Option<()> {
        if !self.patterns.is_empty() {
            return None;
        }
        for (name, rule) in &mut self.named {
            if !names.iter().any(|other| other == name) {
                *rule = false.into();
            }
        }
        let rule = self.others.replace(false.into()).unwrap_or(true.into());
        for name in names.iter().filter_map(Value::as_str) {
            self.named.entry(name).or_insert_with(|| rule.clone());
        }
        Some(())
    }
}
