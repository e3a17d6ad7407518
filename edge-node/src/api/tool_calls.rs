//! Finding tool calls in an answer as its text comes.
//!
//! Text before the first call is content. From the first call's mark on there are only calls; what
//! stands between them is dropped. A call is announced once its name is known; its arguments are passed
//! on as they are written. Text that began like a call and never named a function was no call: it
//! becomes content again at the end.

use super::call_syntax::{Body, CallSyntax};

/// What a piece of an answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// Text for the reader.
    Content(String),
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

enum Phase {
    /// Before the first call.
    Content,
    /// Between calls.
    Outside,
    /// In the bare name of a call.
    Name,
    /// In the JSON object of a call.
    Object(Object),
}

/// Finds the calls of one answer.
pub(crate) struct CallFinder {
    syntax: &'static CallSyntax,
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
    pub(crate) fn new(syntax: &'static CallSyntax) -> Self {
        Self {
            syntax,
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
        if let Phase::Object(object) = &mut self.phase {
            flush(object, self.announced, &mut said);
        }
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
        match &mut self.phase {
            Phase::Content => {
                self.held.push(c);
                self.look_for_a_call(said);
            }
            Phase::Outside => {
                self.unsaid.push(c);
                match self.syntax.body {
                    Body::Object { .. } if c == '{' => self.enter_object(),
                    Body::Object { .. } => {}
                    Body::Parts { .. } => {
                        self.held.push(c);
                        if self.held.ends_with(self.syntax.call_begin) {
                            self.held.clear();
                            self.phase = Phase::Name;
                        }
                    }
                }
            }
            Phase::Name => {
                self.unsaid.push(c);
                self.held.push(c);
                if c == '{' {
                    let Body::Parts { middle } = self.syntax.body else { return };
                    let name = self.held.trim_end_matches('{').trim_end().trim_end_matches(middle.trim());
                    self.announce(name.trim().to_owned(), said);
                    self.held.clear();
                    self.enter_object();
                }
            }
            Phase::Object(object) => {
                if self.announced == self.completed {
                    self.unsaid.push(c);
                }
                object.step(c);
                if self.announced == self.completed
                    && let Some(name) = object.name.take()
                {
                    self.announce(name, said);
                }
                let Phase::Object(object) = &mut self.phase else { return };
                if object.depth == 0 {
                    if self.announced > self.completed {
                        flush(object, self.announced, said);
                        self.completed += 1;
                    }
                    self.phase = Phase::Outside;
                }
            }
        }
    }

    /// Decides how far the held text is content.
    fn look_for_a_call(&mut self, said: &mut Vec<Said>) {
        let Some(opener) = self.syntax.opener() else {
            // A bare call stands at the answer's beginning or nowhere.
            if self.held.trim_start() == "{" && !self.spoken {
                self.unsaid = std::mem::take(&mut self.held);
                self.enter_object();
            }
            return;
        };
        if !self.held.ends_with(opener) {
            return;
        }
        self.unsaid = self.held.split_off(self.held.len() - opener.len());
        // Line breaks between content and call belong to neither; where no call comes, they are text.
        let breaks = self.held.split_off(self.held.trim_end_matches('\n').len());
        self.unsaid.insert_str(0, &breaks);
        say(said, Said::Content(std::mem::take(&mut self.held)));
        self.phase = if self.syntax.begin.is_empty() && matches!(self.syntax.body, Body::Parts { .. }) {
            Phase::Name
        } else {
            Phase::Outside
        };
    }

    /// Says the held text that can be no part of a call's mark (or all of it).
    fn release(&mut self, said: &mut Vec<Said>, all: bool) {
        let keep = match self.syntax.opener() {
            _ if all => 0,
            None if self.held.trim_start().is_empty() => self.held.len(),
            None => 0,
            Some(opener) => {
                let ends = |n: &usize| self.held.as_bytes().ends_with(&opener.as_bytes()[..*n]);
                let mark = (1..opener.len()).rev().find(ends).unwrap_or(0);
                let before = &self.held[..self.held.len() - mark];
                self.held.len() - before.trim_end_matches('\n').len()
            }
        };
        let rest = self.held.split_off(self.held.len() - keep);
        self.spoken |= !self.held.trim().is_empty();
        say(said, Said::Content(std::mem::replace(&mut self.held, rest)));
    }

    fn enter_object(&mut self) {
        let arguments = match self.syntax.body {
            Body::Object { arguments } => Some(arguments),
            Body::Parts { .. } => None,
        };
        self.phase = Phase::Object(Object::new(arguments));
    }

    fn announce(&mut self, name: String, said: &mut Vec<Said>) {
        say(said, Said::Call { index: self.announced, name });
        self.announced += 1;
        self.unsaid.clear();
    }
}

/// Says what has come of the arguments of the call that was announced last.
fn flush(object: &mut Object, announced: usize, said: &mut Vec<Said>) {
    let known = object.arguments_key.is_none() || object.named;
    if announced > 0 && known && !object.arguments.is_empty() {
        say(said, Said::Arguments { index: announced - 1, text: std::mem::take(&mut object.arguments) });
    }
}

fn say(said: &mut Vec<Said>, what: Said) {
    match (said.last_mut(), what) {
        (_, Said::Content(text)) if text.is_empty() => {}
        (Some(Said::Content(before)), Said::Content(text)) => before.push_str(&text),
        (_, what) => said.push(what),
    }
}

/// Walks one JSON object, of which the `{` has been seen, and takes its name and arguments out.
struct Object {
    /// Key of the arguments; none if the whole object is the arguments.
    arguments_key: Option<&'static str>,
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// Key of the member at depth 1.
    key: String,
    in_key: bool,
    /// Text of the name's value while it is read.
    name_text: String,
    name: Option<String>,
    named: bool,
    /// Text of the arguments that has not been passed on.
    arguments: String,
}

impl Object {
    fn new(arguments_key: Option<&'static str>) -> Self {
        let arguments = if arguments_key.is_none() { "{".into() } else { String::new() };
        Self {
            arguments_key,
            depth: 1,
            in_string: false,
            escaped: false,
            key: String::new(),
            in_key: true,
            name_text: String::new(),
            name: None,
            named: false,
            arguments,
        }
    }

    fn step(&mut self, c: char) {
        if self.arguments_key.is_none() {
            self.arguments.push(c);
        }
        let top = self.depth == 1 && !self.in_string;
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
        } else {
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.depth += 1,
                '}' | ']' => self.depth -= 1,
                _ => {}
            }
        }
        let Some(arguments) = self.arguments_key else { return };
        match c {
            ':' if top && self.in_key => self.in_key = false,
            ',' | '}' if top => self.end_member(),
            _ if self.in_key => self.key.push(c),
            _ if self.key_is("name") => self.name_text.push(c),
            // Blanks before the value do not belong to it.
            _ if self.key_is(arguments) && !(top && c.is_whitespace()) => self.arguments.push(c),
            _ => {}
        }
        if !self.named && self.key_is("name") && !self.in_key && !self.in_string && c == '"' {
            self.name = serde_json::from_str(self.name_text.trim()).ok();
            self.named = self.name.is_some();
        }
    }

    fn key_is(&self, name: &str) -> bool {
        self.key.trim().trim_matches('"') == name
    }

    fn end_member(&mut self) {
        self.key.clear();
        self.name_text.clear();
        self.in_key = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::api::call_syntax::GENERIC;

    /// Content, and (name, arguments) of the calls, however the text is cut.
    fn find(syntax: &'static CallSyntax, pieces: &[&str]) -> (String, Vec<(String, String)>, bool) {
        let mut finder = CallFinder::new(syntax);
        let (mut content, mut calls) = (String::new(), Vec::<(String, String)>::new());
        let mut said: Vec<Said> = pieces.iter().flat_map(|p| finder.push(p)).collect();
        said.extend(finder.finish());
        for what in said {
            match what {
                Said::Content(text) => content.push_str(&text),
                Said::Call { index, name } => {
                    assert_eq!(index, calls.len());
                    calls.push((name, String::new()));
                }
                Said::Arguments { index, text } => calls[index].1.push_str(&text),
            }
        }
        (content, calls, finder.has_calls())
    }

    fn syntax(template: &str) -> &'static CallSyntax {
        CallSyntax::of_template(template).unwrap_or_else(|| panic!("no syntax in {template}"))
    }

    /// (template, answer, content, calls, complete)
    #[allow(clippy::type_complexity)]
    fn table() -> Vec<(&'static CallSyntax, &'static str, &'static str, Vec<(&'static str, &'static str)>, bool)> {
        let hermes = syntax("<tool_call> </tool_call> {\\\"arguments\\\"}");
        let mistral = syntax("[TOOL_CALLS]");
        let args = syntax("[TOOL_CALLS] [ARGS]");
        let llama = syntax("{\"name\": function name, \"parameters\": dictionary of argument name and its value}");
        let v3 = syntax("<｜tool▁calls▁begin｜><｜tool▁sep｜>```json");
        let v31 = syntax("<｜tool▁calls▁begin｜><｜tool▁sep｜>");
        vec![
            (hermes, "Just text.", "Just text.", vec![], false),
            (hermes, "a < b\n\nc <tool", "a < b\n\nc <tool", vec![], false),
            (
                hermes,
                "Let me see.\n<tool_call>\n{\"name\": \"get\", \"arguments\": {\"a\": \"}\\\"{\"}}\n</tool_call>",
                "Let me see.",
                vec![("get", "{\"a\": \"}\\\"{\"}")],
                true,
            ),
            (
                hermes,
                "<tool_call>{\"arguments\": {\"é\":[1,{}]}, \"name\": \"x\"}</tool_call>\n<tool_call>\n{\"name\":\"y\",\"arguments\":{}}",
                "",
                vec![("x", "{\"é\":[1,{}]}"), ("y", "{}")],
                true,
            ),
            (hermes, "<tool_call>\n{\"name\": \"get\", \"arguments\": {\"a\": ", "", vec![("get", "{\"a\": ")], false),
            (hermes, "x <tool_call> is a tag", "x <tool_call> is a tag", vec![], false),
            (
                hermes,
                "<tool_call>{\"nothing\": 1}</tool_call>",
                "<tool_call>{\"nothing\": 1}</tool_call>",
                vec![],
                false,
            ),
            (
                mistral,
                "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"q\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
                "",
                vec![("f", "{\"q\": 1}"), ("g", "{}")],
                true,
            ),
            (
                args,
                "ok[TOOL_CALLS]f[ARGS]{\"q\": 1}[TOOL_CALLS]g[ARGS]{}",
                "ok",
                vec![("f", "{\"q\": 1}"), ("g", "{}")],
                true,
            ),
            (llama, " {\"name\": \"f\", \"parameters\": {\"k\": \"v\"}}", "", vec![("f", "{\"k\": \"v\"}")], true),
            (llama, "The set {1, 2}", "The set {1, 2}", vec![], false),
            (
                llama,
                "So: {\"name\": \"f\", \"parameters\": {}}",
                "So: {\"name\": \"f\", \"parameters\": {}}",
                vec![],
                false,
            ),
            (hermes, "a\n<tool_call> is a tag", "a\n<tool_call> is a tag", vec![], false),
            (
                v3,
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"a\": {}}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "",
                vec![("f", "{\"a\": {}}"), ("g", "{}")],
                true,
            ),
            (
                v31,
                "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "Sure.",
                vec![("f", "{\"a\": 1}")],
                true,
            ),
            (&GENERIC, "{\"name\": \"f\", \"arguments\": {}}", "", vec![("f", "{}")], true),
        ]
    }

    #[test]
    fn calls_of_every_family_are_found() {
        for (syntax, answer, content, calls, complete) in table() {
            let calls: Vec<(String, String)> = calls.iter().map(|(n, a)| ((*n).into(), (*a).into())).collect();
            assert_eq!(find(syntax, &[answer]), (content.to_owned(), calls, complete), "{}: {answer}", syntax.name);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn cuts_change_nothing(which in 0usize..16, cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
            let (syntax, answer, ..) = table()[which].clone();
            let boundaries: Vec<usize> = answer.char_indices().map(|(i, _)| i).chain([answer.len()]).collect();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| boundaries[cut.index(boundaries.len())]).collect();
            cuts.extend([0, answer.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|cut| &answer[cut[0]..cut[1]]).collect();
            prop_assert_eq!(find(syntax, &pieces), find(syntax, &[answer]));
        }
    }
}
