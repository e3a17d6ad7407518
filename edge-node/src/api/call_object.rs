//! One JSON object of a call, taken apart as it is written: its name, and its arguments as they stand.

/// Longest key that is told from others, bytes.
const KEY_BYTES_MAX: usize = 64;
/// Longest name that is read, bytes.
const NAME_BYTES_MAX: usize = 1024;
/// Longest arguments that are kept until the name is known, bytes; a call with longer ones is none.
const UNNAMED_BYTES_MAX: usize = 256 * 1024;

/// Walks one JSON object, of which the `{` has been seen, and takes its name and arguments out.
pub(crate) struct Object {
    /// Key of the arguments; none if the whole object is the arguments.
    arguments_key: Option<&'static str>,
    /// Open brackets.
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
    /// `arguments_key` is the key of the arguments; none if the whole object is the arguments.
    pub(crate) fn new(arguments_key: Option<&'static str>) -> Self {
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

    /// Takes the next character.
    pub(crate) fn step(&mut self, c: char) {
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
            _ if self.in_key => push_bounded(&mut self.key, c, KEY_BYTES_MAX),
            _ if self.key_is("name") => push_bounded(&mut self.name_text, c, NAME_BYTES_MAX),
            // Blanks before the value do not belong to it.
            _ if self.key_is(arguments) && !(top && c.is_whitespace()) => {
                push_bounded(&mut self.arguments, c, if self.named { usize::MAX } else { UNNAMED_BYTES_MAX });
            }
            _ => {}
        }
        let whole = self.arguments.len() < UNNAMED_BYTES_MAX;
        if !self.named && whole && self.key_is("name") && !self.in_key && !self.in_string && c == '"' {
            self.name = serde_json::from_str(self.name_text.trim()).ok();
            self.named = self.name.is_some();
        }
    }

    /// True after the closing `}`.
    pub(crate) fn is_closed(&self) -> bool {
        self.depth == 0
    }

    /// The name, once.
    pub(crate) fn take_name(&mut self) -> Option<String> {
        self.name.take()
    }

    /// What has come of the arguments since the last time; nothing before the name is known.
    pub(crate) fn take_arguments(&mut self) -> String {
        let known = self.arguments_key.is_none() || self.named;
        if known { std::mem::take(&mut self.arguments) } else { String::new() }
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

fn push_bounded(text: &mut String, c: char, bytes_max: usize) {
    if text.len() < bytes_max {
        text.push(c);
    }
}
