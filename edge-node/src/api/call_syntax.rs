//! How model families write tool calls: one table for finding calls in an answer and for forcing them.
//!
//! A family is known by what its chat template spells out. The syntax of templates that are not in the
//! table is unknown: such a model's calls cannot be found, so `tools` are refused for it unless the
//! call is forced, which needs no template.

use std::fmt::Write as _;

use serde_json::Value;
use tandem_engine::constraint::{ConstraintError, spaced};
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::message::{Grammar, GrammarSyntax};

use super::tools::Tool;

/// Most calls of one forced answer.
const CALLS_MAX: usize = 16;

/// What stands between the markers of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// One JSON object with the name under `name` and the arguments under this key.
    Object { arguments: &'static str },
    /// The bare name, this text, then the arguments.
    Parts { middle: &'static str },
}

/// How a family writes calls: `begin call (between call)* end`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CallSyntax {
    pub(crate) name: &'static str,
    /// What the chat template spells out, and what it must not.
    template: (&'static [&'static str], &'static [&'static str]),
    pub(crate) begin: &'static str,
    pub(crate) end: &'static str,
    pub(crate) call_begin: &'static str,
    pub(crate) call_end: &'static str,
    between: &'static str,
    pub(crate) body: Body,
    /// Parts of the texts above that may be single tokens without text of their own.
    markers: &'static [&'static str],
    /// Several calls can be written in one answer.
    several: bool,
    /// The template wants arguments of earlier calls as text, not as an object.
    pub(crate) arguments_as_text: bool,
    /// The template wants call ids of nine letters and digits.
    pub(crate) short_ids: bool,
}

const PLAIN: CallSyntax = CallSyntax {
    name: "plain",
    template: (&[], &[]),
    begin: "",
    end: "",
    call_begin: "",
    call_end: "",
    between: "",
    body: Body::Object { arguments: "arguments" },
    markers: &[],
    several: false,
    arguments_as_text: false,
    short_ids: false,
};

/// For forced calls of a model whose template knows no tools: one JSON object.
pub(crate) static GENERIC: CallSyntax = PLAIN;

/// The first entry that fits counts.
static TABLE: [CallSyntax; 6] = [
    // Qwen 2.5 and 3, Hermes and others after it.
    CallSyntax {
        name: "hermes",
        template: (&["<tool_call>", "</tool_call>", "\"arguments\""], &["<function=", "<arg_key>"]),
        call_begin: "<tool_call>\n",
        call_end: "\n</tool_call>",
        between: "\n",
        markers: &["<tool_call>", "</tool_call>"],
        several: true,
        ..PLAIN
    },
    // Mistral from tokenizer v11 on.
    CallSyntax {
        name: "mistral-args",
        template: (&["[TOOL_CALLS]", "[ARGS]"], &["[CALL_ID]"]),
        call_begin: "[TOOL_CALLS]",
        body: Body::Parts { middle: "[ARGS]" },
        markers: &["[TOOL_CALLS]", "[ARGS]"],
        several: true,
        arguments_as_text: true,
        short_ids: true,
        ..PLAIN
    },
    // Mistral up to tokenizer v7.
    CallSyntax {
        name: "mistral",
        template: (&["[TOOL_CALLS]"], &["[ARGS]", "[CALL_ID]"]),
        begin: "[TOOL_CALLS][",
        end: "]",
        between: ", ",
        markers: &["[TOOL_CALLS]"],
        several: true,
        short_ids: true,
        ..PLAIN
    },
    // Llama 3.1 and later.
    CallSyntax {
        name: "llama3",
        template: (&["\"parameters\": dictionary of argument name"], &[]),
        body: Body::Object { arguments: "parameters" },
        ..PLAIN
    },
    // DeepSeek-V3 and R1.
    CallSyntax {
        name: "deepseek",
        template: (&["<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "```json"], &[]),
        begin: "<｜tool▁calls▁begin｜>",
        end: "<｜tool▁calls▁end｜>",
        call_begin: "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        call_end: "\n```<｜tool▁call▁end｜>",
        between: "\n",
        body: Body::Parts { middle: "\n```json\n" },
        several: true,
        arguments_as_text: true,
        markers: &DEEPSEEK,
        ..PLAIN
    },
    CallSyntax {
        name: "deepseek-v3.1",
        template: (&["<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"], &["```json"]),
        begin: "<｜tool▁calls▁begin｜>",
        end: "<｜tool▁calls▁end｜>",
        call_begin: "<｜tool▁call▁begin｜>",
        call_end: "<｜tool▁call▁end｜>",
        body: Body::Parts { middle: "<｜tool▁sep｜>" },
        several: true,
        arguments_as_text: true,
        markers: &DEEPSEEK,
        ..PLAIN
    },
];

const DEEPSEEK: [&str; 5] = [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
];

impl CallSyntax {
    /// The syntax that a chat template spells out, if it is in the table.
    pub(crate) fn of_template(source: &str) -> Option<&'static Self> {
        // Templates write JSON keys with and without escaped quotes.
        let source = source.replace("\\\"", "\"");
        TABLE.iter().find(|s| {
            let (has, has_not) = s.template;
            has.iter().all(|text| source.contains(text)) && !has_not.iter().any(|text| source.contains(text))
        })
    }

    /// The text that an answer's first call begins with; none if a call has no mark of its own and is
    /// known only by standing at the answer's beginning.
    pub(crate) fn opener(&self) -> Option<&'static str> {
        let first = if self.begin.is_empty() { self.call_begin } else { self.begin };
        let first = self.markers.iter().find(|m| first.starts_with(**m)).copied().unwrap_or(first);
        (!first.is_empty()).then_some(first)
    }

    /// Special tokens whose spelling belongs to the calls although they are hidden in text.
    pub(crate) fn special_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        self.markers.iter().filter_map(|m| special(tokenizer, m)).collect()
    }

    /// The grammar of an answer that is calls of `tools` and nothing else, or `instead` in their place.
    pub(crate) fn grammar(
        &self,
        tokenizer: &Tokenizer,
        tools: &[&Tool],
        parallel: bool,
        instead: Option<&Value>,
    ) -> Result<Grammar, ConstraintError> {
        let literal = |text: &str| self.literal(tokenizer, text);
        let mut rules = String::new();
        let mut alternatives = Vec::new();
        for (i, tool) in tools.iter().enumerate() {
            let (before, after) = match self.body {
                Body::Object { arguments } => (format!("{{\"name\": \"{}\", \"{arguments}\": ", tool.name), "}"),
                Body::Parts { middle } => (format!("{}{middle}", tool.name), ""),
            };
            let before = literal(&format!("{}{before}", self.call_begin));
            let after = literal(&format!("{after}{}", self.call_end));
            // Writing to a string cannot fail.
            let _ = writeln!(rules, "f{i}: {before} a{i} {after}\na{i}: %json {}", spaced(&tool.parameters)?);
            alternatives.push(format!("f{i}"));
        }
        let more = match self.several && parallel {
            true => format!("({} call){{0,{}}}", literal(self.between), CALLS_MAX - 1),
            false => String::new(),
        };
        let mut text = format!("start: {} call {more} {}\n", literal(self.begin), literal(self.end));
        if let Some(schema) = instead {
            text = format!("start: calls | instead\n{}", text.replacen("start:", "calls:", 1));
            let _ = writeln!(rules, "instead: %json {}", spaced(schema)?);
        }
        let _ = write!(text, "call: {}\n{rules}", alternatives.join(" | "));
        Ok(Grammar { syntax: GrammarSyntax::Lark, text })
    }

    /// A text in the grammar: markers that are special tokens by their ids, the rest spelt out.
    fn literal(&self, tokenizer: &Tokenizer, text: &str) -> String {
        let mut out = String::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let marker = self.markers.iter().find(|m| rest.starts_with(**m));
            if let Some((marker, id)) = marker.and_then(|m| Some((m, special(tokenizer, m)?))) {
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

fn special(tokenizer: &Tokenizer, text: &str) -> Option<u32> {
    tokenizer.token_id(text).filter(|&id| tokenizer.is_special(id))
}
