//! Answers in OpenAI's harmony format (gpt-oss): messages on channels, each with a header.
//!
//! The prompt ends inside the first header, `<|start|>assistant`. What stands on `analysis` is reasoning,
//! a JSON object to a tool of the request is a call, everything else is content; no marker reaches the
//! client. Text where a header should stand is content, too.

use std::sync::Arc;

use super::call_object::Object;
use super::call_params::overlap;
use super::partial::whole_object;
use super::reading::{Said, say};
use super::tools::Tool;

/// Longest header, bytes; what is longer is text.
const HEADER_BYTES_MAX: usize = 1024;
/// Stands between two messages of one sort.
const BREAK: &str = "\n";
/// Namespace of the functions of a request.
const FUNCTIONS: &str = "functions.";
const RECIPIENT: &str = "to=";
const ROLE: &str = "assistant";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Marker {
    Start,
    Channel,
    Constrain,
    Message,
    /// The end of a message, and perhaps of the answer.
    End,
}

const MARKERS: [(&str, Marker); 7] = [
    ("<|start|>", Marker::Start),
    ("<|channel|>", Marker::Channel),
    ("<|constrain|>", Marker::Constrain),
    ("<|message|>", Marker::Message),
    ("<|end|>", Marker::End),
    ("<|call|>", Marker::End),
    ("<|return|>", Marker::End),
];

/// What stands before a message's text.
#[derive(Default)]
struct Header {
    /// Role and perhaps recipient.
    before: String,
    /// Channel, and perhaps recipient and type of the text.
    channel: Option<String>,
    /// `<|start|>` has come.
    started: bool,
}

enum Phase {
    /// Where a message begins.
    Header(Header),
    /// In text for the reader.
    Content,
    /// In reasoning.
    Reasoning,
    /// In a message to this function, before its arguments.
    Call(String),
    /// In a call's arguments, a JSON object.
    Object(Object),
    /// In a call, after its arguments.
    Called,
}

/// Reads one answer.
pub(crate) struct ChannelReader {
    tools: Arc<[Tool]>,
    phase: Phase,
    /// The possible beginning of a marker.
    held: String,
    /// Calls that were announced.
    announced: usize,
    /// Arguments of the last of them, as they were passed on.
    passed: String,
    /// A call is complete.
    called: bool,
    /// Content has come, and the message at hand has added to it.
    content: (bool, bool),
    /// The same of reasoning.
    reasoning: (bool, bool),
}

impl ChannelReader {
    /// For an answer that may call `tools`.
    pub(crate) fn new(tools: &Arc<[Tool]>) -> Self {
        Self {
            tools: Arc::clone(tools),
            phase: Phase::Header(Header::default()),
            held: String::new(),
            announced: 0,
            passed: String::new(),
            called: false,
            content: (false, false),
            reasoning: (false, false),
        }
    }

    /// True once a call is complete.
    pub(crate) fn has_calls(&self) -> bool {
        self.called
    }

    /// Takes the next text of the answer.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Said> {
        let mut said = Vec::new();
        for c in text.chars() {
            self.held.push(c);
            if let Some((text, marker)) = MARKERS.iter().find(|(text, _)| self.held.ends_with(text)) {
                self.held.truncate(self.held.len() - text.len());
                self.release(0, &mut said);
                self.mark(*marker, &mut said);
                continue;
            }
            let keep = MARKERS.iter().map(|(text, _)| overlap(&self.held, text)).max().unwrap_or_default();
            self.release(keep, &mut said);
        }
        self.flush(&mut said);
        said
    }

    /// The answer has ended; `cut` if its length ended it.
    pub(crate) fn finish(&mut self, cut: bool) -> Vec<Said> {
        let mut said = Vec::new();
        // No marker after all: they come whole.
        self.release(0, &mut said);
        match self.phase {
            // A call that was cut did not come to its end, nor did one before its arguments.
            Phase::Object(_) | Phase::Call(_) if cut => self.flush(&mut said),
            _ => self.end_message(&mut said),
        }
        said
    }

    /// Takes the held text as part of the message, but for the last bytes.
    fn release(&mut self, keep: usize, said: &mut Vec<Said>) {
        let rest = self.held.split_off(self.held.len() - keep);
        let text = std::mem::replace(&mut self.held, rest);
        if text.is_empty() {
            return;
        }
        match &mut self.phase {
            Phase::Header(header) => {
                header.add(&text);
                if !header.is_plausible() {
                    let text = std::mem::take(header).into_text();
                    self.phase = Phase::Content;
                    self.say_content(text, said);
                }
            }
            Phase::Content => self.say_content(text, said),
            Phase::Reasoning => {
                let text = joined(&mut self.reasoning, text);
                say(said, Said::Reasoning(text));
            }
            Phase::Call(_) | Phase::Object(_) | Phase::Called => {
                text.chars().for_each(|c| self.step_call(c, said));
            }
        }
    }

    fn say_content(&mut self, text: String, said: &mut Vec<Said>) {
        let text = joined(&mut self.content, text);
        say(said, Said::Content(text));
    }

    fn step_call(&mut self, c: char, said: &mut Vec<Said>) {
        match &mut self.phase {
            Phase::Call(name) if c == '{' => {
                let name = std::mem::take(name);
                self.announce(name, said);
                self.phase = Phase::Object(Object::of_arguments());
            }
            Phase::Call(_) if c.is_whitespace() => {}
            // What is no object is no call.
            Phase::Call(_) => {
                self.phase = Phase::Content;
                self.say_content(c.to_string(), said);
            }
            Phase::Object(object) => {
                object.step(c);
                if object.is_closed() || object.is_broken() {
                    self.end_object(said);
                }
            }
            // The rest of a message that turned out to be none.
            Phase::Content => self.say_content(c.to_string(), said),
            _ => {}
        }
    }

    fn announce(&mut self, name: String, said: &mut Vec<Said>) {
        say(said, Said::Call { index: self.announced, name });
        self.announced += 1;
        self.passed.clear();
    }

    /// The arguments at hand have ended, whole or not; what is open in them is closed where that makes
    /// them whole.
    fn end_object(&mut self, said: &mut Vec<Said>) {
        self.flush(said);
        let whole = whole_object(&self.passed);
        if let Some(rest) = whole.as_deref().and_then(|whole| whole.strip_prefix(self.passed.as_str())) {
            let rest = rest.to_owned();
            self.say_arguments(rest, said);
            self.called = true;
        }
        self.phase = Phase::Called;
    }

    fn mark(&mut self, marker: Marker, said: &mut Vec<Said>) {
        match (&mut self.phase, marker) {
            (Phase::Header(header), Marker::Channel) => header.channel = Some(String::new()),
            (Phase::Header(header), Marker::Constrain) => header.add(" "),
            (Phase::Header(header), Marker::Message) => {
                let header = std::mem::take(header);
                self.begin_message(&header);
            }
            // Not part of any text.
            (_, Marker::Constrain | Marker::Message) => {}
            (_, Marker::Start | Marker::Channel | Marker::End) => {
                self.end_message(said);
                let channel = (marker == Marker::Channel).then(String::new);
                let started = marker == Marker::Start;
                self.phase = Phase::Header(Header { channel, started, ..Header::default() });
            }
        }
    }

    fn begin_message(&mut self, header: &Header) {
        if let Some(name) = header.function(&self.tools) {
            self.phase = Phase::Call(name.to_owned());
        } else if header.channel_name() == Some("analysis") {
            self.phase = Phase::Reasoning;
        } else {
            self.phase = Phase::Content;
        }
    }

    /// What is at hand ends, whether or not its end was marked.
    fn end_message(&mut self, said: &mut Vec<Said>) {
        match &mut self.phase {
            Phase::Header(header) => {
                // What was marked as a header is none of the answer's text, whole or not.
                let text = std::mem::take(header);
                if !text.is_marked() && !text.before.trim().is_empty() {
                    self.say_content(text.before, said);
                }
            }
            // A function without arguments.
            Phase::Call(name) => {
                let name = std::mem::take(name);
                self.announce(name, said);
                self.say_arguments("{}".into(), said);
                self.called = true;
            }
            Phase::Object(_) => self.end_object(said),
            _ => {}
        }
        self.content.1 = false;
        self.reasoning.1 = false;
        self.phase = Phase::Header(Header::default());
    }

    fn flush(&mut self, said: &mut Vec<Said>) {
        if let Phase::Object(object) = &mut self.phase {
            let text = object.take_arguments();
            self.say_arguments(text, said);
        }
    }

    fn say_arguments(&mut self, text: String, said: &mut Vec<Said>) {
        self.passed.push_str(&text);
        let index = self.announced.saturating_sub(1);
        match said.last_mut() {
            Some(Said::Arguments { index: last, text: before }) if *last == index => before.push_str(&text),
            _ => say(said, Said::Arguments { index, text }),
        }
    }
}

/// `text` with a break before it, if it is the first of its message and other messages came before.
fn joined((any, here): &mut (bool, bool), text: String) -> String {
    let text = if *any && !*here { format!("{BREAK}{text}") } else { text };
    (*any, *here) = (true, true);
    text
}

impl Header {
    fn add(&mut self, text: &str) {
        self.channel.as_mut().unwrap_or(&mut self.before).push_str(text);
    }

    /// True if it is the beginning of a header, as far as can be seen.
    fn is_plausible(&self) -> bool {
        let length = self.before.len() + self.channel.as_ref().map_or(0, String::len);
        if length > HEADER_BYTES_MAX {
            return false;
        }
        if self.is_marked() {
            return true;
        }
        // Nothing has marked it as a header: it must spell out what stands in one.
        let begins = |text: &str| RECIPIENT.starts_with(text) || text.starts_with(RECIPIENT);
        let text = self.before.trim_start();
        match text.strip_prefix(ROLE) {
            Some("") => true,
            Some(rest) => rest.starts_with(char::is_whitespace) && begins(rest.trim_start()),
            None => ROLE.starts_with(text) || begins(text),
        }
    }

    /// The tool that the message is addressed to, in the namespace or by its bare name.
    fn function<'a>(&'a self, tools: &[Tool]) -> Option<&'a str> {
        let channel = self.channel.as_deref().unwrap_or_default();
        let mut words = self.before.split_whitespace().chain(channel.split_whitespace());
        let to = words.find_map(|word| word.strip_prefix(RECIPIENT))?;
        let name = to.strip_prefix(FUNCTIONS).unwrap_or(to);
        tools.iter().any(|tool| tool.name == name).then_some(name)
    }

    fn channel_name(&self) -> Option<&str> {
        self.channel.as_deref()?.split_whitespace().next()
    }

    fn is_marked(&self) -> bool {
        self.started || self.channel.is_some()
    }

    fn into_text(self) -> String {
        self.before + self.channel.as_deref().unwrap_or_default()
    }
}
