//! Finding tool calls in an answer as its text comes.
//!
//! Text before the first call is content. From the first call's mark on there are only calls; what
//! stands between them is dropped. A call is announced once its name is known; its arguments are passed
//! on as they are written. Text that began like a call and never named a function was no call: it
//! becomes content again at the end, or as soon as that is certain.

use std::sync::Arc;

use super::call_object::Object;
use super::call_params::{Params, Step, keep_tail, overlap};
use super::call_syntax::{Body, CallSyntax, Tags};
use super::reading::{Said, say};
use super::tools::{Tool, name_is_good};

/// Longest text around a bare name, bytes; what is longer names nothing.
const NAME_BYTES_MAX: usize = 1024;
/// Longest text that may still become the first call, bytes.
const UNSAID_BYTES_MAX: usize = 256 * 1024;

enum Phase {
    /// Before the first call.
    Content,
    /// Between calls.
    Outside,
    /// In the bare name of a call.
    Name {
        /// Without the tag that should stand around the call: it must be a tool of the request.
        bare: bool,
    },
    /// In the JSON object of a call.
    Object(Object),
    /// In the tagged arguments of a call.
    Params(Params),
}

/// Finds the calls of one answer.
pub(crate) struct CallFinder {
    syntax: &'static CallSyntax,
    tools: Arc<[Tool]>,
    phase: Phase,
    /// Text not decided yet: the possible beginning of a mark, or a name.
    held: String,
    /// Text since the last thing said; becomes content if nothing comes of it.
    unsaid: String,
    announced: usize,
    completed: usize,
    /// Text for the reader has come.
    spoken: bool,
}

impl CallFinder {
    /// For an answer that may call `tools`.
    pub(crate) fn new(syntax: &'static CallSyntax, tools: &Arc<[Tool]>) -> Self {
        Self {
            syntax,
            tools: Arc::clone(tools),
            phase: Phase::Content,
            held: String::new(),
            unsaid: String::new(),
            announced: 0,
            completed: 0,
            spoken: false,
        }
    }

    /// True once a call is complete.
    pub(crate) fn has_calls(&self) -> bool {
        self.completed > 0
    }

    /// Takes the next text of the answer.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Said> {
        let mut said = Vec::new();
        for c in text.chars() {
            self.step(c, &mut said);
        }
        if matches!(self.phase, Phase::Content) {
            self.release(&mut said, false);
        }
        self.flush(&mut said);
        said
    }

    /// The answer has ended.
    pub(crate) fn finish(&mut self) -> Vec<Said> {
        let mut said = Vec::new();
        match &self.phase {
            Phase::Content => self.release(&mut said, true),
            // Nothing was ever called: it was text after all.
            _ if self.announced == 0 => say(&mut said, Said::Content(std::mem::take(&mut self.unsaid))),
            _ => {}
        }
        said
    }

    fn step(&mut self, c: char, said: &mut Vec<Said>) {
        if !matches!(self.phase, Phase::Content) && self.announced == 0 {
            self.unsaid.push(c);
            if self.unsaid.len() > UNSAID_BYTES_MAX {
                self.give_up(said);
                return;
            }
        }
        match &mut self.phase {
            Phase::Content => {
                self.held.push(c);
                self.look_for_a_call(said);
            }
            Phase::Outside => match self.syntax.name_begin() {
                Some(begin) => {
                    self.held.push(c);
                    if self.held.ends_with(begin) {
                        self.enter_name(false);
                    } else {
                        keep_tail(&mut self.held, begin.len());
                    }
                }
                None if c == '{' => self.enter_object(),
                None => {}
            },
            Phase::Name { bare } => {
                let bare = *bare;
                self.held.push(c);
                match self.syntax.body {
                    Body::Parts { middle } if c == '{' => {
                        let name = self.held.trim_end_matches('{').trim_end().trim_end_matches(middle.trim());
                        let name = name.trim().to_owned();
                        self.announce(name, said);
                        self.enter_object();
                    }
                    Body::Tagged(tags) => self.name_of_tagged(c, tags, bare, said),
                    _ => {}
                }
                if matches!(self.phase, Phase::Name { .. }) && self.held.len() > NAME_BYTES_MAX {
                    self.give_up(said);
                }
            }
            Phase::Object(object) => {
                object.step(c);
                let (closed, announced) = (object.is_closed(), self.announced > self.completed);
                if !announced && let Some(name) = object.take_name() {
                    self.announce(name, said);
                }
                if closed {
                    self.end_call(said);
                }
            }
            Phase::Params(params) => match params.step(c) {
                Step::More => {}
                Step::Done => self.end_call(said),
                Step::Next => {
                    self.end_call(said);
                    self.enter_name(false);
                }
            },
        }
    }

    /// Looks for the end of a name before tagged arguments.
    fn name_of_tagged(&mut self, c: char, tags: Tags, bare: bool, said: &mut Vec<Said>) {
        let name = self.held.strip_suffix(c).unwrap_or_default().trim();
        let ends = c == '\n' || c == '<' || tags.name_end.starts_with(c);
        if !ends || (c == '\n' && name.is_empty()) {
            return;
        }
        if !name_is_good(name) || (bare && self.tools.iter().all(|tool| tool.name != name)) {
            self.give_up(said);
            return;
        }
        let name = name.to_owned();
        let mut params = Params::new(tags, &self.tools, &name);
        if c == '<' {
            params.step(c);
        }
        self.announce(name, said);
        self.phase = Phase::Params(params);
    }

    /// Decides how far the held text is content.
    fn look_for_a_call(&mut self, said: &mut Vec<Said>) {
        let mut openers = self.syntax.openers().peekable();
        let Some(first) = openers.peek().copied() else {
            // A bare call stands at the answer's beginning or nowhere.
            if self.held.trim_start() == "{" && !self.spoken {
                self.unsaid = std::mem::take(&mut self.held);
                self.enter_object();
            }
            return;
        };
        let Some(opener) = openers.find(|opener| self.held.ends_with(opener)) else { return };
        self.unsaid = self.held.split_off(self.held.len() - opener.len());
        // Line breaks between content and call belong to neither; where no call comes, they are text.
        let breaks = self.held.split_off(self.held.trim_end_matches('\n').len());
        self.unsaid.insert_str(0, &breaks);
        self.spoken |= !self.held.trim().is_empty();
        say(said, Said::Content(std::mem::take(&mut self.held)));
        self.phase = Phase::Outside;
        if self.syntax.name_begin() == Some(opener) {
            self.enter_name(opener != first);
        }
    }

    /// Says the held text that can be no part of a call's mark (or all of it).
    fn release(&mut self, said: &mut Vec<Said>, all: bool) {
        let keep = match self.syntax.openers().map(|opener| overlap(&self.held, opener)).max() {
            _ if all => 0,
            None if self.held.trim_start().is_empty() => self.held.len(),
            None => 0,
            Some(mark) => {
                let before = &self.held[..self.held.len() - mark];
                self.held.len() - before.trim_end_matches('\n').len()
            }
        };
        let rest = self.held.split_off(self.held.len() - keep);
        self.spoken |= !self.held.trim().is_empty();
        say(said, Said::Content(std::mem::replace(&mut self.held, rest)));
    }

    /// What began like a call is none.
    fn give_up(&mut self, said: &mut Vec<Said>) {
        self.held.clear();
        self.phase = Phase::Outside;
        if self.announced == 0 {
            self.phase = Phase::Content;
            self.spoken = true;
            say(said, Said::Content(std::mem::take(&mut self.unsaid)));
        }
    }

    fn enter_name(&mut self, bare: bool) {
        self.held.clear();
        self.phase = Phase::Name { bare };
    }

    fn enter_object(&mut self) {
        self.held.clear();
        let arguments = if let Body::Object { arguments } = self.syntax.body { Some(arguments) } else { None };
        self.phase = Phase::Object(Object::new(arguments));
    }

    fn announce(&mut self, name: String, said: &mut Vec<Said>) {
        say(said, Said::Call { index: self.announced, name });
        self.announced += 1;
        self.unsaid.clear();
    }

    fn end_call(&mut self, said: &mut Vec<Said>) {
        if self.announced > self.completed {
            self.flush(said);
            self.completed += 1;
        }
        self.held.clear();
        self.phase = Phase::Outside;
    }

    /// Says what has come of the arguments of the call that was announced last.
    fn flush(&mut self, said: &mut Vec<Said>) {
        let text = match &mut self.phase {
            _ if self.announced == self.completed => return,
            Phase::Object(object) => object.take_arguments(),
            Phase::Params(params) => params.take_arguments(),
            _ => return,
        };
        // What is announced and not complete has been counted already.
        say(said, Said::Arguments { index: self.announced.saturating_sub(1), text });
    }
}
