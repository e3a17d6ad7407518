//! Layers of settings: each key's value and the layer that gave it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::describe;
use super::settings::Settings;

/// Prefix of environment variables.
pub(super) const PREFIX: &str = "TANDEM_";
/// Between the levels of a key in an environment variable: `TANDEM_EDGE__REQUESTS_MAX`.
pub(super) const LEVEL: &str = "__";
/// Short names of single settings in the environment.
pub(super) const SHORT: [(&str, &str); 3] =
    [("TANDEM_LOG", "log"), ("TANDEM_API_KEY", "api.key"), ("TANDEM_UPSTREAM_KEY", "cloud.upstream_key")];
/// Tables that one layer gives as a whole: their keys depend on each other.
const WHOLE: [&str; 1] = ["policy"];
/// Values that are not shown.
const SECRET: [&str; 2] = ["api.key", "cloud.upstream_key"];

/// Where a value comes from; later ones win.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Built in.
    Default,
    /// The configuration file.
    File(PathBuf),
    /// An environment variable.
    Environment(String),
    /// A command-line flag.
    Flag(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// What is wrong with a layer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
    /// The file is no TOML.
    #[error("{} is not valid TOML: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        problem: String,
    },
    /// A key that means nothing.
    #[error("unknown setting `{key}` (from {source_name}); {hint}")]
    UnknownKey {
        /// The key.
        key: String,
        /// Where it was given.
        source_name: String,
        /// What there is.
        hint: String,
    },
    /// A value of the wrong type or out of its range.
    #[error("{problem}{given}; see `tandem config show`")]
    BadValue {
        /// What is wrong.
        problem: String,
        /// Where it was given.
        given: String,
    },
    /// `--set` without `=`.
    #[error("`--set {0}` must look like KEY=VALUE, e.g. --set edge.requests_max=4")]
    BadAssignment(String),
}

/// One setting.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its value; none for a setting without a default that was not given.
    pub value: Option<Value>,
    /// Who gave it.
    pub source: Source,
}

/// All layers, merged key by key.
#[derive(Clone, Debug, PartialEq)]
pub struct Layers {
    entries: BTreeMap<String, Entry>,
}

impl Layers {
    /// The built-in values.
    #[must_use]
    pub fn defaults() -> Self {
        let mut layers = Self { entries: BTreeMap::new() };
        // Those without a default are there as well.
        for key in describe::descriptions().into_keys() {
            layers.entries.insert(key, Entry { value: None, source: Source::Default });
        }
        // Plain data always has a TOML form; were it not so, every key would be unknown.
        let table = Table::try_from(Settings::default()).unwrap_or_default();
        for (key, value) in flatten(table) {
            layers.entries.insert(key, Entry { value: Some(value), source: Source::Default });
        }
        layers
    }

    /// Adds a configuration file.
    ///
    /// # Errors
    /// No TOML, or a key that means nothing.
    pub fn file(&mut self, path: &Path, text: &str) -> Result<(), LayerError> {
        let table: Table = toml::from_str(text)
            .map_err(|e| LayerError::Syntax { path: path.to_owned(), problem: e.to_string().trim_end().to_owned() })?;
        let source = Source::File(path.to_owned());
        let given = flatten(table);
        self.clear_whole_tables(given.iter().map(|(key, _)| key.as_str()));
        given.into_iter().try_for_each(|(key, value)| self.set(&key, value, source.clone()))
    }

    /// Adds the environment: the short names (`TANDEM_LOG`, …), and `TANDEM_<TABLE>__<KEY>` for every
    /// other setting.
    ///
    /// # Errors
    /// A variable of that form whose key means nothing.
    pub fn environment(&mut self, variables: impl Iterator<Item = (OsString, OsString)>) -> Result<(), LayerError> {
        let mut given = Vec::new();
        for (name, value) in variables {
            let (Ok(name), Ok(text)) = (name.into_string(), value.into_string()) else { continue };
            let short = SHORT.iter().find(|(short, _)| *short == name).map(|(_, key)| (*key).to_owned());
            let long = name.strip_prefix(PREFIX).filter(|rest| rest.contains(LEVEL));
            let Some(key) = short.or_else(|| long.map(|rest| rest.replace(LEVEL, ".").to_ascii_lowercase())) else {
                continue;
            };
            given.push((key, text, Source::Environment(name)));
        }
        self.clear_whole_tables(given.iter().map(|(key, ..)| key.as_str()));
        given.into_iter().try_for_each(|(key, text, source)| {
            let value = self.parse(&key, &text);
            self.set(&key, value, source)
        })
    }

    /// Adds one `KEY=VALUE`.
    ///
    /// # Errors
    /// No `=`, or a key that means nothing.
    pub fn assign(&mut self, assignment: &str) -> Result<(), LayerError> {
        let (key, text) = assignment.split_once('=').ok_or_else(|| LayerError::BadAssignment(assignment.to_owned()))?;
        let key = key.trim();
        if key == "policy.policy" {
            self.clear_whole_tables(std::iter::once(key));
        }
        let value = self.parse(key, text.trim());
        self.set(key, value, Source::Flag("--set"))
    }

    /// Gives one setting its value.
    ///
    /// # Errors
    /// The key means nothing.
    pub fn set(&mut self, key: &str, value: Value, source: Source) -> Result<(), LayerError> {
        let free = WHOLE.iter().any(|table| key.strip_prefix(table).is_some_and(|rest| rest.starts_with('.')));
        if !free && !self.entries.contains_key(key) {
            let source_name = source.to_string();
            return Err(LayerError::UnknownKey { key: key.to_owned(), source_name, hint: self.hint(key) });
        }
        self.entries.insert(key.to_owned(), Entry { value: Some(value), source });
        Ok(())
    }

    /// Gives a setting another default; a given value stays.
    pub(crate) fn prefer(&mut self, key: &str, value: Value) {
        if let Some(entry) = self.entries.get_mut(key).filter(|entry| entry.source == Source::Default) {
            entry.value = Some(value);
        }
    }

    /// Gives a whole table other defaults; if a part of it was given, it stays.
    pub(crate) fn prefer_table(&mut self, table: &str, values: Table) {
        let inside = |key: &str| key.strip_prefix(table).is_some_and(|rest| rest.starts_with('.'));
        if self.entries.iter().any(|(key, entry)| inside(key) && entry.source != Source::Default) {
            return;
        }
        self.entries.iter_mut().filter(|(key, _)| inside(key)).for_each(|(_, entry)| entry.value = None);
        for (key, value) in values {
            self.entries.insert(format!("{table}.{key}"), Entry { value: Some(value), source: Source::Default });
        }
    }

    /// The value of a setting that is text.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.entries.get(key)?.value.as_ref()?.as_str()
    }

    /// True if a setting that is a list has an entry.
    pub(crate) fn has_any(&self, key: &str) -> bool {
        let value = self.entries.get(key).and_then(|entry| entry.value.as_ref());
        value.and_then(Value::as_array).is_some_and(|list| !list.is_empty())
    }

    /// True if no layer gave the setting a value.
    pub(crate) fn is_default(&self, key: &str) -> bool {
        self.entries.get(key).is_none_or(|entry| entry.source == Source::Default)
    }

    /// True if the value was typed for this one command.
    pub(crate) fn is_typed(&self, key: &str) -> bool {
        self.entries.get(key).is_some_and(|entry| matches!(entry.source, Source::Flag(_)))
    }

    /// Every setting by its key.
    pub fn entries(&self) -> impl Iterator<Item = (&str, Entry)> {
        self.entries.iter().map(|(key, entry)| {
            let mut entry = entry.clone();
            if SECRET.contains(&key.as_str()) && entry.value.is_some() {
                entry.value = Some(Value::String("(set)".into()));
            }
            (key.as_str(), entry)
        })
    }

    /// The settings, checked.
    ///
    /// # Errors
    /// Names the setting that cannot be what it is, and where that was given.
    pub fn settings(&self) -> Result<Settings, LayerError> {
        let mut root = Table::new();
        for (key, entry) in &self.entries {
            if let Some(value) = &entry.value {
                insert(&mut root, key, value.clone());
            }
        }
        let finite = |settings: Settings| match not_finite(&settings) {
            Some((key, value)) => Err(format!("{value} is not a number that can be compared, in `{key}`")),
            None => Ok(settings),
        };
        Settings::deserialize_table(root).and_then(finite).map_err(|problem| {
            let key = problem.split('`').rev().find(|part| self.entries.contains_key(*part));
            let entry = key.and_then(|key| self.entries.get(key));
            let given = entry.map(|entry| format!(" (from {})", entry.source)).unwrap_or_default();
            LayerError::BadValue { problem, given }
        })
    }

    /// Text as a value of the kind that the setting has.
    fn parse(&self, key: &str, text: &str) -> Value {
        let known = self.entries.get(key).and_then(|entry| entry.value.as_ref());
        if matches!(known, Some(Value::String(_))) {
            return Value::String(text.to_owned());
        }
        let parsed = toml::from_str::<Table>(&format!("value = {text}")).ok();
        parsed.and_then(|mut table| table.remove("value")).unwrap_or_else(|| Value::String(text.to_owned()))
    }

    fn clear_whole_tables<'a>(&mut self, given: impl Iterator<Item = &'a str>) {
        for key in given {
            for table in WHOLE {
                if key.strip_prefix(table).is_some_and(|rest| rest.starts_with('.')) {
                    let lower = |other: &str| other.strip_prefix(table).is_some_and(|rest| rest.starts_with('.'));
                    self.entries.iter_mut().filter(|(other, _)| lower(other)).for_each(|(_, entry)| entry.value = None);
                }
            }
        }
    }

    fn hint(&self, key: &str) -> String {
        let table = key.rsplit_once('.').map(|(table, _)| table);
        let of_table: Vec<&str> = self
            .entries
            .keys()
            .filter_map(|known| match table {
                Some(table) => known.strip_prefix(table)?.strip_prefix('.').filter(|rest| !rest.contains('.')),
                None => None,
            })
            .collect();
        match table {
            Some(table) if !of_table.is_empty() => format!("[{table}] has {}", of_table.join(", ")),
            _ => {
                let mut tables: Vec<&str> = self.entries.keys().filter_map(|k| k.split('.').next()).collect();
                tables.dedup();
                format!("there is {}", tables.join(", "))
            }
        }
    }
}

/// A setting that is infinite or not a number, as it is read: a number too large for its type is infinite.
fn not_finite(settings: &Settings) -> Option<(String, f64)> {
    let leaves = flatten(Table::try_from(settings).unwrap_or_default());
    leaves.into_iter().find_map(|(key, value)| {
        let number = value.as_float().filter(|number| !number.is_finite())?;
        Some((key, number))
    })
}

/// Leaves of a table by their dotted keys. Arrays are leaves.
pub(super) fn flatten(table: Table) -> Vec<(String, Value)> {
    let mut leaves = Vec::new();
    let mut open = vec![(String::new(), table)];
    while let Some((prefix, table)) = open.pop() {
        for (key, value) in table {
            match value {
                Value::Table(inner) => open.push((format!("{prefix}{key}."), inner)),
                leaf => leaves.push((format!("{prefix}{key}"), leaf)),
            }
        }
    }
    leaves
}

/// Puts a leaf at its dotted key.
fn insert(root: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            root.insert(key.to_owned(), value);
        }
        Some((first, rest)) => {
            let inner = root.entry(first).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

impl Settings {
    fn deserialize_table(table: Table) -> Result<Self, String> {
        use serde::Deserialize as _;
        // The message ends with "in `edge.requests_max`"; make one line of it.
        Self::deserialize(Value::Table(table)).map_err(|e| e.to_string().trim().replace('\n', " "))
    }
}
