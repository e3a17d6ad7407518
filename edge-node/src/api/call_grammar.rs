//! The grammars of answers that are calls, or in a syntax that whole answers have.

use std::fmt::Write as _;

use serde_json::{Map, Value};
use tandem_engine::constraint::schema::{format_is_held, says_nothing};
use tandem_engine::constraint::{ConstraintError, held};
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::message::{Grammar, GrammarSyntax};

use super::call_syntax::{Body, CallSyntax, Tags, special};
use super::param_types::{Kinds, referred};
use super::thoughts::ThoughtTags;
use super::tools::Tool;

/// Most calls of one forced answer.
const CALLS_MAX: usize = 16;
/// Deepest nesting of alternatives in the schema of raw text.
const DEPTH_MAX: usize = 8;

impl CallSyntax {
    /// The grammar of an answer that is calls of `tools` and nothing else, or `instead` in their place.
    /// Where whole answers have the syntax, `tools` may be none, and reasoning may come first. It does where
    /// the prompt has opened it (`thought`), to its end.
    pub(crate) fn grammar(
        &self,
        tokenizer: &Tokenizer,
        tools: &[&Tool],
        parallel: bool,
        instead: Option<&Value>,
        thought: Option<&ThoughtTags>,
    ) -> Result<Grammar, ConstraintError> {
        let mut writer = Writer { syntax: self, tokenizer, rules: String::new() };
        let mut answers = Vec::new();
        if !tools.is_empty() {
            let mut alternatives = Vec::with_capacity(tools.len());
            for (i, tool) in tools.iter().enumerate() {
                let call = writer.call(i, tool)?;
                writer.rule(&format!("f{i}"), &call);
                alternatives.push(format!("f{i}"));
            }
            writer.rule("call", &alternatives.join(" | "));
            let more = match self.several && parallel {
                true => format!("({} call){{0,{}}}", writer.literal(self.between), CALLS_MAX - 1),
                false => String::new(),
            };
            let calls = format!("{} call {more} {}", writer.literal(self.begin), writer.literal(self.end));
            writer.rule("calls", &calls);
            answers.push("calls");
        }
        if let Some(schema) = instead {
            let before = if self.is_of_whole_answers() { "<|channel|>final<|message|>" } else { "" };
            let answer = format!("{} %json {}", writer.literal(before), held(schema, schema)?);
            writer.rule("instead", &answer);
            answers.push("instead");
        }
        let mut start = answers.join(" | ");
        if self.is_of_whole_answers() {
            let before = writer.literal("<|channel|>analysis<|message|>");
            let thought = writer.text("thought", "<|end|>", "", None)?;
            let after = writer.literal("<|start|>assistant");
            writer.rule("reasoning", &format!("{before} {thought} {after}"));
            start = format!("reasoning? ({start})");
        } else if let Some(tags) = thought {
            let thought = writer.text("thought", tags.end, "", None)?;
            writer.rule("gap", "/\\n{0,2}/");
            start = format!("{thought} gap ({start})");
        }
        Ok(Grammar { syntax: GrammarSyntax::Lark, text: format!("start: {start}\n{}", writer.rules) })
    }

    /// True if calls of all `tools` can be forced in this syntax.
    pub(crate) fn forces(&self, tokenizer: &Tokenizer, tools: &[&Tool]) -> bool {
        self.grammar(tokenizer, tools, false, None, None).is_ok()
    }
}

/// Writes rules.
struct Writer<'a> {
    syntax: &'a CallSyntax,
    tokenizer: &'a Tokenizer,
    rules: String,
}

impl Writer<'_> {
    fn rule(&mut self, name: &str, body: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.rules, "{name}: {body}");
    }

    /// One call of the tool at position `i`.
    fn call(&mut self, i: usize, tool: &Tool) -> Result<String, ConstraintError> {
        let CallSyntax { call_begin, call_end, .. } = self.syntax;
        let (before, after) = match self.syntax.body {
            Body::Object { arguments } => {
                (format!("{call_begin}{{\"name\": \"{}\", \"{arguments}\": ", tool.name), format!("}}{call_end}"))
            }
            Body::Parts { middle } => (format!("{call_begin}{}{middle}", tool.name), (*call_end).to_owned()),
            Body::Channels => {
                let name = &tool.name;
                (format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"), String::new())
            }
            Body::Tagged(tags) => return self.tagged_call(i, tool, tags),
        };
        let arguments = format!("a{i}");
        self.rule(&arguments, &format!("%json {}", held(&tool.parameters, &tool.parameters)?));
        Ok(format!("{} {arguments} {}", self.literal(&before), self.literal(&after)))
    }

    /// One call with each argument between tags, in the order of the schema.
    fn tagged_call(&mut self, i: usize, tool: &Tool, tags: Tags) -> Result<String, ConstraintError> {
        let CallSyntax { call_begin, call_end, .. } = self.syntax;
        let Tags { name_begin, name_end, key_begin, key_end, value_begin, gap, ends, .. } = tags;
        // The call's own tag is the name's where there is but one.
        let end = ends.first().filter(|end| !call_end.ends_with(**end)).copied().unwrap_or_default();
        let mut call = self.literal(&format!("{call_begin}{name_begin}{}{name_end}{gap}", tool.name));
        let required: Vec<&str> = match &tool.parameters["required"] {
            Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        for (word, rule) in members(&tool.parameters) {
            let known = ["type", "properties", "required", "additionalProperties"];
            if !known.contains(&word.as_str()) && !is_aside(word, rule) {
                return Err(rejected(word));
            }
        }
        let none = Map::new();
        let properties = tool.parameters["properties"].as_object().unwrap_or(&none);
        if let Some(missing) = required.iter().find(|name| !properties.contains_key(**name)) {
            return Err(ConstraintError::Rejected(format!("the required `{missing}` is not among the properties")));
        }
        for (j, (key, schema)) in properties.iter().enumerate() {
            if key.trim() != key || key.is_empty() || key.contains(['<', '>', '\n']) {
                return Err(ConstraintError::Rejected(format!("`{key}` cannot be written between tags")));
            }
            let name = format!("p{i}_{j}");
            let before = self.literal(&format!("{key_begin}{key}{key_end}{gap}{value_begin}"));
            let value = self.value(&name, schema, &tool.parameters, tags, 0)?;
            self.rule(&name, &format!("{before} {value} {}", self.literal(gap)));
            call.push(' ');
            call.push_str(&name);
            if !required.contains(&key.as_str()) {
                call.push('?');
            }
        }
        call.push(' ');
        call.push_str(&self.literal(&format!("{end}{call_end}")));
        Ok(call)
    }

    /// A value with the tag that ends it. `name` is free for rules of its own.
    fn value(
        &mut self,
        name: &str,
        schema: &Value,
        root: &Value,
        tags: Tags,
        depth: usize,
    ) -> Result<String, ConstraintError> {
        if depth > DEPTH_MAX {
            return Err(ConstraintError::Rejected(format!("alternatives are nested deeper than {DEPTH_MAX}")));
        }
        let end = format!("{}{}", if tags.own_lines { "\n" } else { "" }, tags.value_end);
        let kinds = Kinds::of(schema, root);
        if !kinds.has_text() {
            let schema = held(schema, root)?;
            self.rule(&format!("{name}j"), &format!("%json {schema}"));
            return Ok(format!("{name}j {}", self.literal(&end)));
        }
        let alone = |schema: &Value, word: &str| {
            members(schema).find(|(other, rule)| *other != word && !is_aside(other, rule)).map(|(w, _)| w.clone())
        };
        if let Some(target) = referred(schema, root) {
            return match alone(schema, "$ref") {
                Some(word) => Err(rejected(&word)),
                None => self.value(name, target, root, tags, depth + 1),
            };
        }
        for word in ["anyOf", "oneOf", "allOf"] {
            let Some(Value::Array(list)) = schema.get(word) else { continue };
            if let Some(other) = alone(schema, word) {
                return Err(rejected(&other));
            }
            if word == "allOf" && list.len() != 1 {
                return Err(rejected(word));
            }
            return self.alternatives(name, list.iter().cloned(), root, tags, depth);
        }
        if let Value::Array(values) = &schema["enum"] {
            return self.listed(values, &end, tags);
        }
        if let Some(value) = schema.get("const") {
            return self.listed(std::slice::from_ref(value), &end, tags);
        }
        if let Some(Value::Array(kinds)) = schema.get("type") {
            let one = |kind: &Value| {
                let mut schema = schema.clone();
                schema["type"] = kind.clone();
                schema
            };
            let list: Vec<Value> = kinds.iter().map(one).collect();
            return self.alternatives(name, list.into_iter(), root, tags, depth);
        }
        let length = |word: &str| schema.get(word).and_then(Value::as_u64);
        let (min, max) = (length("minLength"), length("maxLength"));
        let bounded = min.is_some() || max.is_some();
        let max = max.map(|n| n.to_string()).unwrap_or_default();
        let size = bounded.then(|| format!("{{{},{max}}}", min.unwrap_or_default()));
        if let Some((word, _)) = members(schema)
            .find(|(word, rule)| !["type", "minLength", "maxLength"].contains(&word.as_str()) && !is_aside(word, rule))
            .filter(|_| !kinds.is_unknown())
        {
            return Err(rejected(word));
        }
        self.text(name, tags.value_end, if tags.own_lines { "\n" } else { "" }, size.as_deref())
    }

    fn alternatives(
        &mut self,
        name: &str,
        schemas: impl Iterator<Item = Value>,
        root: &Value,
        tags: Tags,
        depth: usize,
    ) -> Result<String, ConstraintError> {
        let mut all = Vec::new();
        for (k, schema) in schemas.enumerate() {
            all.push(self.value(&format!("{name}_{k}"), &schema, root, tags, depth + 1)?);
        }
        Ok(format!("({})", all.join(" | ")))
    }

    /// One of these values: strings as they are, others as JSON.
    fn listed(&self, values: &[Value], end: &str, tags: Tags) -> Result<String, ConstraintError> {
        let mut all = Vec::with_capacity(values.len());
        for value in values {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            if text.contains(tags.value_end) {
                return Err(ConstraintError::Rejected(format!("a value has `{}` in it", tags.value_end)));
            }
            all.push(self.literal(&format!("{text}{end}")));
        }
        Ok(format!("({})", all.join(" | ")))
    }

    /// Any text, of a bounded number of characters if `size` says so, and `before` and `end` after it;
    /// the text does not contain `end`. Defines the rule `name`t.
    fn text(&mut self, name: &str, end: &str, before: &str, size: Option<&str>) -> Result<String, ConstraintError> {
        let rule = format!("{name}t");
        let any = format!("(?s:.{})", size.unwrap_or("*"));
        let before = escaped(before);
        if special(self.tokenizer, end).is_some() {
            // The token is no text, so nothing in the text can be taken for it.
            self.rule(&rule, &format!("/{any}{before}/"));
            return Ok(format!("{rule} {}", self.literal(end)));
        }
        // The shortest text with the end after it; without the second part, an end that lacks what must
        // stand before it would be taken for text.
        let terminal = rule.to_uppercase();
        let end = escaped(end);
        self.rule(&terminal, &format!("/{any}{before}{end}/ & ~/(?s:.*){end}(?s:.+)/"));
        self.rule(&format!("{rule}[lazy]"), &terminal);
        Ok(rule)
    }

    /// A text in the grammar: markers that are special tokens by their ids, the rest spelt out.
    fn literal(&self, text: &str) -> String {
        let mut out = String::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let marker = self.syntax.markers.iter().find(|m| rest.starts_with(**m));
            if let Some((marker, id)) = marker.and_then(|m| Some((m, special(self.tokenizer, m)?))) {
                push_plain(&mut out, &mut plain);
                let _ = write!(out, "<[{id}]> ");
                rest = &rest[marker.len()..];
            } else {
                plain.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
        push_plain(&mut out, &mut plain);
        out.trim_end().to_owned()
    }
}

fn push_plain(out: &mut String, plain: &mut String) {
    if !plain.is_empty() {
        let _ = write!(out, "{} ", Value::String(std::mem::take(plain)));
    }
}

/// The keywords of a schema.
fn members(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema.as_object().into_iter().flatten()
}

/// True for a keyword that does not narrow values.
fn is_aside(word: &str, rule: &Value) -> bool {
    says_nothing(word) || word == "format" && rule.as_str().is_some_and(|format| !format_is_held(format))
}

fn rejected(word: &str) -> ConstraintError {
    ConstraintError::Rejected(format!("the keyword `{word}` is not supported for text between tags"))
}

/// A text as a regular expression between slashes.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            // Of the others, some have a meaning only with the backslash.
            c if "\\.+*?()|[]{}^$/#&-~".contains(c) => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out
}
