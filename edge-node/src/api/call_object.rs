//! One JSON object of a call, taken apart as it is written: its name, and its arguments as they stand.

use serde_json::Value;

/// Longest key that is told from others, bytes.
const KEY_BYTES_MAX: usize = 64;
/// Longest name that is read, bytes.
const NAME_BYTES_MAX: usize = 1024;
/// Longest arguments that are kept until the name is known, or until their text is decoded, bytes; a call
/// with longer ones is none.
const KEPT_BYTES_MAX: usize = 256 * 1024;

/// Keys of the arguments. Families differ in which they ask for, and models in which they write.
const ARGUMENTS: [&str; 2] = ["arguments", "parameters"];
/// What else a call may have in it.
const OTHERS: [&str; 3] = ["name", "type", "id"];

/// How the arguments are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// None have come.
    Absent,
    /// An object, passed on as it comes.
    Object,
    /// A string with the object's text in it, or `null`: known at its end.
    Quoted,
}

/// Walks one JSON object, of which the `{` has been seen, and takes its name and arguments out.
pub(crate) struct Object {
    /// The whole object is the arguments.
    whole: bool,
    /// Open brackets, the outermost first.
    open: Vec<char>,
    in_string: bool,
    escaped: bool,
    /// Key of the member at depth 1.
    key: String,
    in_key: bool,
    /// Text of the name's value while it is read.
    name_text: String,
    name: Option<String>,
    form: Form,
    /// Text of the arguments that has not been passed on.
    arguments: String,
    /// The arguments are whole.
    ended: bool,
    /// A key has come that no call has.
    strange: bool,
    /// It is no JSON, or its arguments are no object.
    broken: bool,
}

/// Deepest nesting.
const DEPTH_MAX: usize = 128;

impl Object {
    /// An object with the name and the arguments in it.
    pub(crate) fn new() -> Self {
        Self {
            whole: false,
            open: vec!['}'],
            in_string: false,
            escaped: false,
            key: String::new(),
            in_key: true,
            name_text: String::new(),
            name: None,
            form: Form::Absent,
            arguments: String::new(),
            ended: false,
            strange: false,
            broken: false,
        }
    }

    /// An object that is the arguments.
    pub(crate) fn of_arguments() -> Self {
        Self { whole: true, form: Form::Object, arguments: "{".into(), ..Self::new() }
    }

    /// Takes the next character. Where it makes the object no JSON, it is not taken.
    pub(crate) fn step(&mut self, c: char) {
        let top = self.open.len() == 1 && !self.in_string;
        if !self.walk(c) {
            self.broken = true;
            return;
        }
        if self.whole {
            self.arguments.push(c);
            self.ended = self.is_closed();
            return;
        }
        match c {
            ':' if top && self.in_key => {
                self.in_key = false;
                let key = self.key();
                self.strange |= !ARGUMENTS.contains(&key) && !OTHERS.contains(&key);
            }
            ',' | '}' if top => self.end_member(),
            _ if self.in_key => push_bounded(&mut self.key, c, KEY_BYTES_MAX),
            _ if self.key() == "name" => push_bounded(&mut self.name_text, c, NAME_BYTES_MAX),
            _ if ARGUMENTS.contains(&self.key()) => self.add(c, top),
            _ => {}
        }
        if self.name.is_none() && self.key() == "name" && !self.in_key && !self.in_string && c == '"' {
            self.name = serde_json::from_str(self.name_text.trim()).ok();
        }
    }

    /// True after the closing `}`.
    pub(crate) fn is_closed(&self) -> bool {
        self.open.is_empty()
    }

    /// True if nothing more can be made of it.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// True if a key has come that no call has.
    pub(crate) fn is_strange(&self) -> bool {
        self.strange
    }

    /// True if the arguments are whole.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// The name, once it is known.
    pub(crate) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// True if arguments can be passed on.
    pub(crate) fn has_arguments(&self) -> bool {
        !self.arguments.is_empty() && (self.form == Form::Object || self.ended)
    }

    /// What has come of the arguments since the last time.
    pub(crate) fn take_arguments(&mut self) -> String {
        if self.has_arguments() { std::mem::take(&mut self.arguments) } else { String::new() }
    }

    /// Follows strings and brackets; false where no JSON goes on so.
    fn walk(&mut self, c: char) -> bool {
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
            return true;
        }
        match c {
            '"' => self.in_string = true,
            '{' | '[' => {
                self.open.push(if c == '{' { '}' } else { ']' });
                return self.open.len() <= DEPTH_MAX;
            }
            '}' | ']' if self.open.last() == Some(&c) => {
                self.open.pop();
            }
            // Numbers, `true`, `false`, `null`, and what stands between.
            _ => return c.is_ascii_whitespace() || c.is_ascii_digit() || "+-.eE,:truefalsn".contains(c),
        }
        true
    }

    /// Takes a character of the arguments' value; `top` if it stands outside of it, or begins it.
    fn add(&mut self, c: char, top: bool) {
        if self.ended || (self.arguments.is_empty() && self.form == Form::Absent && c.is_whitespace()) {
            return;
        }
        if self.form == Form::Absent {
            self.form = match c {
                '{' => Form::Object,
                '"' | 'n' => Form::Quoted,
                _ => {
                    self.broken = true;
                    return;
                }
            };
        } else if top && self.form == Form::Quoted && c.is_whitespace() {
            return;
        }
        self.arguments.push(c);
        let kept = self.form == Form::Quoted || self.name.is_none();
        self.broken |= kept && self.arguments.len() > KEPT_BYTES_MAX;
        self.ended = self.form == Form::Object && self.open.len() == 1;
    }

    fn key(&self) -> &str {
        self.key.trim().trim_matches('"')
    }

    fn end_member(&mut self) {
        if ARGUMENTS.contains(&self.key()) && self.form == Form::Quoted && !self.ended {
            self.ended = true;
            match unquoted(&self.arguments) {
                Some(text) => self.arguments = text,
                None => self.broken = true,
            }
        }
        self.key.clear();
        self.name_text.clear();
        self.in_key = true;
    }
}

/// The object in a string, or an empty one for `null` and for a string with nothing in it.
fn unquoted(text: &str) -> Option<String> {
    match serde_json::from_str(text).ok()? {
        Value::Null => Some("{}".into()),
        Value::String(text) if text.trim().is_empty() => Some("{}".into()),
        Value::String(text) => matches!(serde_json::from_str(&text), Ok(Value::Object(_))).then_some(text),
        _ => None,
    }
}

fn push_bounded(text: &mut String, c: char, bytes_max: usize) {
    if text.len() < bytes_max {
        text.push(c);
    }
}
