//! The arguments of one call whose values are raw text between tags, as JSON text.
//!
//! Text is passed on as it comes where the schema says that it is a string; other values are passed on
//! whole, because only then is it known whether they are what the schema says.

use std::sync::Arc;

use super::call_syntax::Tags;
use super::param_types::{Kinds, quoted, written};
use super::tools::Tool;

/// Longest name of an argument, bytes; what is longer is none.
const KEY_BYTES_MAX: usize = 256;
/// Longest value that is typed, bytes; what is longer becomes a string.
const VALUE_BYTES_MAX: usize = 256 * 1024;

/// Where a call stands after a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It goes on.
    More,
    /// It is complete.
    Done,
    /// It is complete, and the name of the next one begins.
    Next,
}

#[derive(Clone, Copy)]
enum State {
    /// Between two arguments.
    Between,
    /// In the name of an argument.
    Key,
    /// Between name and value.
    BeforeValue,
    /// In a value that becomes a string; its text is passed on as it comes.
    Text,
    /// In a value that is typed at its end.
    Typed,
}

/// Reads the arguments of one call, from the end of its name on.
pub(crate) struct Params {
    tags: Tags,
    tools: Arc<[Tool]>,
    /// Position of the tool that is called, if the request has it.
    tool: Option<usize>,
    state: State,
    /// Text not decided yet.
    held: String,
    /// What the value at hand may be.
    kinds: Kinds,
    /// Text of a value that is typed at its end.
    raw: String,
    /// Nothing of the value has come.
    fresh: bool,
    /// An argument has come.
    any: bool,
    /// JSON text that has not been passed on.
    out: String,
}

impl Params {
    /// For a call of `name`.
    pub(crate) fn new(tags: Tags, tools: &Arc<[Tool]>, name: &str) -> Self {
        Self {
            tags,
            tools: Arc::clone(tools),
            tool: tools.iter().position(|tool| tool.name == name),
            state: State::Between,
            held: String::new(),
            kinds: Kinds::default(),
            raw: String::new(),
            fresh: true,
            any: false,
            out: String::new(),
        }
    }

    /// True if arguments can be passed on.
    pub(crate) fn has_arguments(&self) -> bool {
        !self.out.is_empty()
    }

    /// Takes what has come of the arguments since the last time.
    pub(crate) fn take_arguments(&mut self) -> String {
        std::mem::take(&mut self.out)
    }

    /// Takes the next character.
    pub(crate) fn step(&mut self, c: char) -> Step {
        self.held.push(c);
        match self.state {
            State::Between => return self.between(),
            State::Key => {
                if let Some(key) = self.held.strip_suffix(self.tags.key_end) {
                    let key = key.trim().to_owned();
                    self.begin_argument(&key);
                } else if self.held.len() > KEY_BYTES_MAX {
                    self.held.clear();
                    self.state = State::Between;
                }
            }
            State::BeforeValue => {
                if self.held.ends_with(self.tags.value_begin) {
                    self.begin_value();
                } else {
                    keep_tail(&mut self.held, self.tags.value_begin.len());
                }
            }
            State::Text | State::Typed => return self.value(),
        }
        Step::More
    }

    /// Looks for the next argument and for the call's end.
    fn between(&mut self) -> Step {
        let Tags { key_begin, name_begin, ends, .. } = self.tags;
        let step = if self.held.ends_with(key_begin) {
            self.held.clear();
            self.state = State::Key;
            return Step::More;
        } else if ends.iter().any(|end| self.held.ends_with(end)) {
            Step::Done
        } else if self.held.ends_with(name_begin) {
            Step::Next
        } else {
            let longest = ends.iter().chain([&key_begin, &name_begin]).map(|tag| tag.len()).max();
            keep_tail(&mut self.held, longest.unwrap_or_default());
            return Step::More;
        };
        self.out.push_str(if self.any { "}" } else { "{}" });
        step
    }

    fn begin_argument(&mut self, key: &str) {
        self.out.push_str(if self.any { ", " } else { "{" });
        self.out.push_str(&quoted(key));
        self.out.push_str(": ");
        self.any = true;
        let tool = self.tool.and_then(|tool| self.tools.get(tool));
        self.kinds = tool.map_or(Kinds::default(), |tool| Kinds::of_argument(&tool.parameters, key));
        self.held.clear();
        self.state = State::BeforeValue;
        if self.tags.value_begin.is_empty() {
            self.begin_value();
        }
    }

    fn begin_value(&mut self) {
        self.held.clear();
        self.fresh = true;
        self.state = State::Typed;
        if self.kinds.only_text() {
            self.begin_text();
        }
    }

    fn begin_text(&mut self) {
        self.state = State::Text;
        self.out.push('"');
    }

    /// Looks for the end of a value; takes what is certainly part of it.
    fn value(&mut self) -> Step {
        let Tags { value_end, value_end_lost, own_lines, .. } = self.tags;
        let ends = [value_end].into_iter().chain(value_end_lost.iter().copied());
        if let Some(end) = ends.clone().find(|end| self.held.ends_with(end)) {
            self.held.truncate(self.held.len() - end.len());
            let mut last = std::mem::take(&mut self.held);
            if own_lines && end == value_end && last.ends_with('\n') {
                last.pop();
            }
            self.add(&last);
            self.end_value();
            if end != value_end {
                // It is the beginning of what comes next, too.
                end.trim_start().clone_into(&mut self.held);
                return self.between();
            }
            return Step::More;
        }
        let mut keep = ends.map(|end| overlap(&self.held, end)).max().unwrap_or_default();
        // The last line break may be the tag's.
        if own_lines && self.held[..self.held.len() - keep].ends_with('\n') {
            keep += 1;
        }
        let rest = self.held.split_off(self.held.len() - keep);
        let sure = std::mem::replace(&mut self.held, rest);
        self.add(&sure);
        Step::More
    }

    fn add(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        let first = std::mem::replace(&mut self.fresh, false);
        let text = if first && self.tags.own_lines { text.strip_prefix('\n').unwrap_or(text) } else { text };
        if matches!(self.state, State::Text) {
            push_escaped(&mut self.out, text);
            return;
        }
        self.raw.push_str(text);
        if self.raw.len() > VALUE_BYTES_MAX {
            self.begin_text();
            push_escaped(&mut self.out, &std::mem::take(&mut self.raw));
        }
    }

    fn end_value(&mut self) {
        match self.state {
            State::Text => self.out.push('"'),
            _ => self.out.push_str(&written(&std::mem::take(&mut self.raw), self.kinds)),
        }
        self.state = State::Between;
    }
}

/// Length of the longest end of `text` that `tag` begins with and that is not all of it.
pub(crate) fn overlap(text: &str, tag: &str) -> usize {
    let begins = |n: &usize| text.as_bytes().ends_with(&tag.as_bytes()[..*n]);
    (1..tag.len()).rev().find(begins).unwrap_or(0)
}

/// Drops all but about the last `bytes` of `text`.
pub(crate) fn keep_tail(text: &mut String, bytes: usize) {
    let mut at = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    text.drain(..at);
}

fn push_escaped(out: &mut String, text: &str) {
    let text = quoted(text);
    out.push_str(text.get(1..text.len() - 1).unwrap_or_default());
}
