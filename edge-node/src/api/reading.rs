//! How the text of an answer is read: what in it is content, reasoning or a call.

use std::sync::Arc;

use super::call_syntax::CallSyntax;
use super::channels::ChannelReader;
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
    /// How the model writes calls.
    pub(crate) syntax: &'static CallSyntax,
    /// The tools that it may call.
    pub(crate) tools: Arc<[Tool]>,
}

impl Reading {
    /// A reader of one answer.
    pub(crate) fn begin(&self) -> Reader {
        if self.syntax.is_of_whole_answers() {
            Reader::Channels(ChannelReader::new(&self.tools))
        } else {
            Reader::Calls(CallFinder::new(self.syntax, &self.tools))
        }
    }
}

/// Reads one answer as its text comes.
pub(crate) enum Reader {
    /// Text, then calls.
    Calls(CallFinder),
    /// Messages on channels.
    Channels(ChannelReader),
}

impl Reader {
    /// Takes the next text of the answer.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Said> {
        match self {
            Self::Calls(finder) => finder.push(text),
            Self::Channels(reader) => reader.push(text),
        }
    }

    /// The answer has ended.
    pub(crate) fn finish(&mut self) -> Vec<Said> {
        match self {
            Self::Calls(finder) => finder.finish(),
            Self::Channels(reader) => reader.finish(),
        }
    }

    /// True once a call is complete.
    pub(crate) fn has_calls(&self) -> bool {
        match self {
            Self::Calls(finder) => finder.has_calls(),
            Self::Channels(reader) => reader.has_calls(),
        }
    }
}
