//! How the text of an answer is read: what in it is content, reasoning or a call.

use std::sync::Arc;

use tandem_engine::tokenizer::Tokenizer;

use super::call_syntax::CallSyntax;
use super::channels::ChannelReader;
use super::thoughts::{Part, ThoughtReader, ThoughtTags};
use super::tool_calls::CallFinder;
use super::tools::Tool;

/// What a piece of an answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// Text for the reader.
    Content(String),
    /// What the model says to itself before it answers.
    Reasoning(String),
    /// A call begins.
    Call {
        /// Position among the answer's calls.
        index: usize,
        /// Function to be called.
        name: String,
    },
    /// More of a call's arguments, as JSON text.
    Arguments {
        /// Position among the answer's calls.
        index: usize,
        /// The text.
        text: String,
    },
}

impl Said {
    /// Length of the text in it.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Content(text) | Self::Reasoning(text) | Self::Arguments { text, .. } => text.len(),
            Self::Call { name, .. } => name.len(),
        }
    }
}

/// Adds to what is said, joined with what was said last where that is of the same sort.
pub(crate) fn say(said: &mut Vec<Said>, what: Said) {
    match (said.last_mut(), what) {
        (_, Said::Content(text) | Said::Reasoning(text) | Said::Arguments { text, .. }) if text.is_empty() => {}
        (Some(Said::Content(before)), Said::Content(text)) | (Some(Said::Reasoning(before)), Said::Reasoning(text)) => {
            before.push_str(&text);
        }
        (_, what) => said.push(what),
    }
}

/// How the answers to one request are read.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    /// How the model writes calls, if any may come.
    pub(crate) syntax: Option<&'static CallSyntax>,
    /// The tools that it may call.
    pub(crate) tools: Arc<[Tool]>,
    /// The tags around its reasoning.
    pub(crate) thoughts: &'static ThoughtTags,
    /// The prompt ends inside of them.
    pub(crate) open: bool,
}

impl Reading {
    /// A reader of one answer.
    pub(crate) fn begin(&self) -> Reader {
        match self.syntax {
            Some(syntax) if syntax.is_of_whole_answers() => Reader::Channels(ChannelReader::new(&self.tools)),
            syntax => Reader::Tags(
                ThoughtReader::new(self.thoughts, self.open),
                syntax.map(|syntax| CallFinder::new(syntax, &self.tools)),
            ),
        }
    }

    /// True if the model's template wants call ids of nine letters and digits.
    pub(crate) fn has_short_ids(&self) -> bool {
        self.syntax.is_some_and(|syntax| syntax.short_ids)
    }

    /// Special tokens whose spelling is read although it is hidden in text.
    pub(crate) fn special_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let mut tokens = self.syntax.map(|syntax| syntax.special_tokens(tokenizer)).unwrap_or_default();
        tokens.extend(self.thoughts.special_tokens(tokenizer));
        tokens
    }
}

/// Reads one answer as its text comes.
#[allow(clippy::large_enum_variant, reason = "one for an answer")]
pub(crate) enum Reader {
    /// Reasoning between tags, text, then calls where there may be any.
    Tags(ThoughtReader, Option<CallFinder>),
    /// Messages on channels.
    Channels(ChannelReader),
}

impl Reader {
    /// Takes the next text of the answer.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Said> {
        match self {
            Self::Tags(thoughts, calls) => read(thoughts.push(text), calls.as_mut()),
            Self::Channels(reader) => reader.push(text),
        }
    }

    /// The answer has ended; `cut` if its length ended it.
    pub(crate) fn finish(&mut self, cut: bool) -> Vec<Said> {
        match self {
            Self::Tags(thoughts, calls) => {
                let mut said = read(thoughts.finish(), calls.as_mut());
                for what in calls.as_mut().map(|calls| calls.finish(cut)).unwrap_or_default() {
                    say(&mut said, what);
                }
                said
            }
            Self::Channels(reader) => reader.finish(cut),
        }
    }

    /// True once a call is complete.
    pub(crate) fn has_calls(&self) -> bool {
        match self {
            Self::Tags(_, calls) => calls.as_ref().is_some_and(CallFinder::has_calls),
            Self::Channels(reader) => reader.has_calls(),
        }
    }
}

fn read(parts: Vec<Part>, mut calls: Option<&mut CallFinder>) -> Vec<Said> {
    let mut said = Vec::new();
    for part in parts {
        let next = match (part, &mut calls) {
            (Part::Reasoning(text), _) => vec![Said::Reasoning(text)],
            (Part::Rest(text), Some(calls)) => calls.push(&text),
            (Part::Rest(text), None) => vec![Said::Content(text)],
        };
        next.into_iter().for_each(|what| say(&mut said, what));
    }
    said
}
