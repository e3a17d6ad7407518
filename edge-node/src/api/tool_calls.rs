//! Finding tool calls in an answer as its text comes.
//!
//! A call is one only if a tool of the request is named and its arguments are an object. It is announced
//! with the first of its arguments, which are passed on as they are written. Text that began like a call
//! and is none is content, as soon as that is certain. Text before the first call is content; what stands
//! after a call is either another or dropped.

use std::sync::Arc;

use super::call_object::Object;
use super::call_params::{Params, Step, keep_tail, overlap};
use super::call_syntax::{Body, CallSyntax, Tags};
use super::partial::whole_object;
use super::reading::{Said, say};
use super::tools::{Tool, name_is_good};

/// Longest text around a bare name, bytes; what is longer names nothing.
const NAME_BYTES_MAX: usize = 1024;
/// Longest text that may still become a call, bytes.
const UNSAID_BYTES_MAX: usize = 256 * 1024;
/// Longest text between two calls that is looked at, bytes.
const BETWEEN_BYTES_MAX: usize = 256;

enum Phase {
    /// Before the first call.
    Content,
    /// Before a call: after its mark, or after another call.
    Outside,
    /// In the bare name of a call.
    Name,
    /// In the JSON object of a call; with the name, if that stood before it.
    Object(Object, Option<String>),
    /// In the tagged arguments of a call of this name.
    Params(Params, String),
}

/// Finds the calls of one answer.
pub(crate) struct CallFinder {
    syntax: &'static CallSyntax,
    tools: Arc<[Tool]>,
    phase: Phase,
    /// Text not decided yet: the possible beginning of a mark, a name, or what stands between calls.
    held: String,
    /// Text since the beginning of what may be a call; becomes content if it is none.
    unsaid: String,
    /// Arguments of the call at hand, as they were passed on.
    passed: String,
    announced: usize,
    completed: usize,
    /// The call that was announced last goes on.
    calling: bool,
    /// Text has come that does not stand between two calls.
    astray: bool,
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
            passed: String::new(),
            announced: 0,
            completed: 0,
            calling: false,
            astray: false,
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

    /// The answer has ended; `cut` if its length ended it.
    pub(crate) fn finish(&mut self, cut: bool) -> Vec<Said> {
        let mut said = Vec::new();
        if matches!(self.phase, Phase::Content) {
            self.release(&mut said, true);
        } else if self.calling {
            self.flush(&mut said);
            // A model that ended forgot to close what it had opened; one that was cut did not come to it.
            if !cut || self.arguments_have_ended() {
                self.close(&mut said);
            }
        } else {
            // It was text after all; none is kept after a call.
            say(&mut said, Said::Content(std::mem::take(&mut self.unsaid)));
        }
        said
    }

    fn step(&mut self, c: char, said: &mut Vec<Said>) {
        if self.announced == 0 && !matches!(self.phase, Phase::Content) {
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
            Phase::Outside => {
                self.held.push(c);
                self.look_for_the_next(c, said);
            }
            Phase::Name => {
                self.held.push(c);
                match self.syntax.body {
                    Body::Parts { middle } => self.name_of_parts(c, middle, said),
                    Body::Tagged(tags) => self.name_of_tagged(c, tags, said),
                    Body::Object { .. } | Body::Channels => {}
                }
                if matches!(self.phase, Phase::Name) && self.held.len() > NAME_BYTES_MAX {
                    self.give_up(said);
                }
            }
            Phase::Object(object, _) => {
                object.step(c);
                self.look_at_object(said);
            }
            Phase::Params(params, name) => {
                let step = params.step(c);
                if !self.calling && params.has_arguments() {
                    let name = name.clone();
                    self.announce(name, said);
                }
                match step {
                    Step::More => {}
                    Step::Done => self.end_call(said),
                    Step::Next => {
                        self.end_call(said);
                        self.enter_name();
                    }
                }
            }
        }
    }

    /// Decides what the object at hand is, as far as can be seen.
    fn look_at_object(&mut self, said: &mut Vec<Said>) {
        let Phase::Object(object, before) = &self.phase else { return };
        let (closed, broken) = (object.is_closed(), object.is_broken());
        if self.calling {
            if closed {
                self.end_call(said);
            } else if broken {
                self.flush(said);
                self.close(said);
                self.enter_outside();
            }
            return;
        }
        let name = before.as_deref().or(object.name());
        let known = name.is_none_or(|name| self.tools.iter().any(|tool| tool.name == name));
        // Without a mark of its own, a call is told from other JSON by its keys.
        let strange = object.is_strange() && self.syntax.is_unmarked() && !object.has_arguments();
        if broken || strange || !known || (closed && name.is_none()) {
            self.give_up(said);
            return;
        }
        let Some(name) = name.filter(|_| closed || object.has_arguments()).map(str::to_owned) else { return };
        let empty = !object.has_arguments();
        self.announce(name, said);
        if empty {
            self.pass("{}".into(), said);
        }
        if closed {
            self.end_call(said);
        }
    }

    /// Looks for the end of a name before an object.
    fn name_of_parts(&mut self, c: char, middle: &str, said: &mut Vec<Said>) {
        let text = self.held.trim_start();
        let end = text.find(|c: char| !c.is_ascii() || !name_is_good(c.encode_utf8(&mut [0; 4]))).unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        let known = self.tools.iter().any(|tool| tool.name == name);
        if c == '{' && known && rest.trim_end_matches('{').trim() == middle.trim() {
            let name = name.to_owned();
            self.held.clear();
            self.phase = Phase::Object(Object::of_arguments(), Some(name));
        } else if !middle.trim().starts_with(rest.trim()) || (!rest.is_empty() && !known) {
            self.give_up(said);
        }
    }

    /// Looks for the end of a name before tagged arguments.
    fn name_of_tagged(&mut self, c: char, tags: Tags, said: &mut Vec<Said>) {
        let name = self.held.strip_suffix(c).unwrap_or_default().trim();
        let ends = c == '\n' || c == '<' || tags.name_end.starts_with(c);
        if !ends || (c == '\n' && name.is_empty()) {
            return;
        }
        if self.tools.iter().all(|tool| tool.name != name) {
            self.give_up(said);
            return;
        }
        let name = name.to_owned();
        let mut params = Params::new(tags, &self.tools, &name);
        if c == '<' {
            params.step(c);
        }
        self.held.clear();
        self.phase = Phase::Params(params, name);
    }

    /// Decides how far the held text is content.
    fn look_for_a_call(&mut self, said: &mut Vec<Said>) {
        if self.syntax.is_unmarked() {
            // A bare call stands at the answer's beginning or nowhere.
            if self.held.trim_start() == "{" && !self.spoken {
                self.unsaid = std::mem::take(&mut self.held);
                self.phase = Phase::Object(Object::new(), None);
            }
            return;
        }
        let Some(opener) = self.syntax.openers().find(|opener| self.held.ends_with(opener)) else { return };
        self.unsaid = self.held.split_off(self.held.len() - opener.len());
        // Line breaks between content and call belong to neither; where no call comes, they are text.
        let breaks = self.held.split_off(self.held.trim_end_matches('\n').len());
        self.unsaid.insert_str(0, &breaks);
        self.spoken |= !self.held.trim().is_empty();
        say(said, Said::Content(std::mem::take(&mut self.held)));
        self.phase = Phase::Outside;
        if self.syntax.name_begin() == Some(opener) {
            self.enter_name();
        }
    }

    /// Looks for the beginning of a call after its mark, or after another call.
    fn look_for_the_next(&mut self, c: char, said: &mut Vec<Said>) {
        let begin = self.syntax.name_begin();
        if begin.is_some_and(|begin| self.held.ends_with(begin)) {
            self.enter_name();
            return;
        }
        if begin.is_none() && c == '{' && self.is_between() {
            self.held.clear();
            self.phase = Phase::Object(Object::new(), None);
            return;
        }
        if self.announced == 0 {
            let text = self.held.trim_start();
            let goes_on = match begin {
                Some(begin) => begin.starts_with(text),
                None => text.is_empty() || text == "[",
            };
            if !goes_on {
                self.give_up(said);
            }
        } else if let Some(begin) = begin {
            keep_tail(&mut self.held, begin.len());
        } else if self.syntax.openers().any(|opener| self.held.ends_with(opener)) {
            self.held.clear();
            self.astray = false;
        } else if self.held.len() > BETWEEN_BYTES_MAX {
            keep_tail(&mut self.held, BETWEEN_BYTES_MAX / 2);
            self.astray = true;
        }
    }

    /// True if the held text, but for the brace at its end, is what stands between two calls.
    fn is_between(&self) -> bool {
        if self.astray {
            return false;
        }
        let mut text = self.held.strip_suffix('{').unwrap_or(&self.held).to_owned();
        for mark in [self.syntax.call_end, self.syntax.end].iter().map(|mark| mark.trim()).filter(|m| !m.is_empty()) {
            text = text.replace(mark, "");
        }
        text.chars().all(|c| c.is_whitespace() || ",;[]".contains(c))
    }

    /// Says the held text that can be no part of a call's mark (or all of it).
    fn release(&mut self, said: &mut Vec<Said>, all: bool) {
        let keep = match self.syntax.openers().map(|opener| overlap(&self.held, opener)).max() {
            _ if all => 0,
            None if self.held.trim_start().is_empty() && !self.spoken => self.held.len(),
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

    /// What began like a call is none. Its end may be the beginning of another mark.
    fn give_up(&mut self, said: &mut Vec<Said>) {
        if self.announced > 0 {
            self.enter_outside();
            return;
        }
        let mut text = std::mem::take(&mut self.unsaid);
        let mark = self.syntax.openers().map(|opener| overlap(&text, opener)).max().unwrap_or_default();
        self.held = text.split_off(text.len() - mark);
        self.spoken = true;
        self.phase = Phase::Content;
        say(said, Said::Content(text));
    }

    fn enter_name(&mut self) {
        self.held.clear();
        self.phase = Phase::Name;
    }

    fn enter_outside(&mut self) {
        self.held.clear();
        self.astray = false;
        self.calling = false;
        self.phase = Phase::Outside;
    }

    fn announce(&mut self, name: String, said: &mut Vec<Said>) {
        say(said, Said::Call { index: self.announced, name });
        self.announced += 1;
        self.calling = true;
        self.unsaid.clear();
        self.passed.clear();
    }

    fn end_call(&mut self, said: &mut Vec<Said>) {
        if self.calling {
            self.flush(said);
            self.completed += 1;
        }
        self.enter_outside();
    }

    /// True if all arguments of the call at hand have come.
    fn arguments_have_ended(&self) -> bool {
        matches!(&self.phase, Phase::Object(object, _) if object.has_ended())
    }

    /// Ends the call at hand, closing what is open in its arguments, if that makes them whole.
    fn close(&mut self, said: &mut Vec<Said>) {
        let whole = whole_object(&self.passed);
        if let Some(rest) = whole.as_deref().and_then(|whole| whole.strip_prefix(self.passed.as_str())) {
            let rest = rest.to_owned();
            self.pass(rest, said);
            self.completed += 1;
        }
    }

    /// Says what has come of the arguments of the call that was announced last.
    fn flush(&mut self, said: &mut Vec<Said>) {
        if !self.calling {
            return;
        }
        let text = match &mut self.phase {
            Phase::Object(object, _) => object.take_arguments(),
            Phase::Params(params, _) => params.take_arguments(),
            _ => return,
        };
        self.pass(text, said);
    }

    fn pass(&mut self, text: String, said: &mut Vec<Said>) {
        self.passed.push_str(&text);
        // What is announced and not complete has been counted already.
        say(said, Said::Arguments { index: self.announced.saturating_sub(1), text });
    }
}
