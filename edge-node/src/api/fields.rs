//! Taking a JSON object apart field by field: each field has a type, a range and a path for the
//! error, `null` is the same as absent, and a field that no parser took is an error.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// Below it every whole number is exact as a double.
const WHOLE_F64_MAX: f64 = 9_007_199_254_740_992.0;
/// Most unknown fields named in one error.
const UNKNOWN_NAMED_MAX: usize = 8;

/// A JSON object under validation.
#[derive(Debug)]
pub(crate) struct Fields {
    /// Path of the object with a dot at its end, empty for the body itself.
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The body of a request.
    pub(crate) fn from_body(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { prefix: String::new(), map }),
            Ok(other) => {
                let message = format!("the body must be a JSON object, not {}", kind(&other));
                Err(ApiError::bad_request("invalid_json", message))
            }
            Err(error) => {
                let message = format!("the body is not valid JSON: {error}");
                Err(ApiError::bad_request("invalid_json", message))
            }
        }
    }

    /// The object at `path`.
    pub(crate) fn from_value(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { prefix: format!("{path}."), map }),
            other => Err(type_error(path, "an object", &other)),
        }
    }

    /// Path of the field `name` from the body's root.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Takes a field as it is.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        // In place, so that what is left keeps the order it was sent in.
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// A field as it is, left where it stands.
    pub(crate) fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Adds a field, for what takes it later.
    pub(crate) fn put(&mut self, name: &str, value: Value) {
        self.map.insert(name.to_owned(), value);
    }

    /// True if the field has this value.
    pub(crate) fn is(&self, name: &str, value: &Value) -> bool {
        self.map.get(name) == Some(value)
    }

    /// Takes the field if it has this value; true if it had.
    pub(crate) fn take_if(&mut self, name: &str, value: &Value) -> bool {
        let has = self.is(name, value);
        if has {
            self.map.shift_remove(name);
        }
        has
    }

    /// The error for a field that must be there.
    pub(crate) fn missing(&self, name: &str) -> ApiError {
        let path = self.path(name);
        ApiError::bad_request("missing_field", format!("`{path}` is required")).about(path)
    }

    /// Takes a boolean.
    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(type_error(&self.path(name), "a boolean", &other)),
        }
    }

    /// Takes a string.
    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(type_error(&self.path(name), "a string", &other)),
        }
    }

    /// Takes an object.
    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Self>, ApiError> {
        let path = self.path(name);
        self.take(name).map(|value| Self::from_value(&path, value)).transpose()
    }

    /// Takes a whole number in `range`.
    pub(crate) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let path = self.path(name);
        let Value::Number(number) = &value else { return Err(type_error(&path, "an integer", &value)) };
        // `3.0` is an integer too: some languages write every number so.
        let whole = number.as_f64().filter(|x| number.is_f64() && x.fract() == 0.0 && x.abs() < WHOLE_F64_MAX);
        match number.as_i64().or(whole.map(|x| x as i64)) {
            Some(integer) if range.contains(&integer) => Ok(Some(integer)),
            None if number.is_f64() => Err(type_error(&path, "an integer", &value)),
            _ => {
                let message = format!("`{path}` must be from {} to {}, not {number}", range.start(), range.end());
                Err(ApiError::invalid(path, message))
            }
        }
    }

    /// Takes a number in `range`.
    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>, ApiError> {
        let path = self.path(name);
        self.take(name).map(|value| number(&path, &value, range)).transpose()
    }

    /// Takes a string out of a fixed set.
    pub(crate) fn choice(&mut self, name: &str, choices: &[&'static str]) -> Result<Option<&'static str>, ApiError> {
        let Some(given) = self.string(name)? else { return Ok(None) };
        if let Some(choice) = choices.iter().find(|choice| **choice == given) {
            return Ok(Some(choice));
        }
        let path = self.path(name);
        let message = format!("`{path}` must be one of {}, not `{}`", quoted(choices), short(&given));
        Err(ApiError::invalid(path, message))
    }

    /// Takes a boolean that can only be `only` here, because the other value asks for what this node
    /// does not have.
    pub(crate) fn only(&mut self, name: &str, only: bool) -> Result<(), ApiError> {
        match self.boolean(name)? {
            Some(given) if given != only => Err(unsupported(&self.path(name))),
            _ => Ok(()),
        }
    }

    /// Refuses a field of the OpenAI API that this node does not have.
    pub(crate) fn refuse(&mut self, names: &[&str]) -> Result<(), ApiError> {
        match names.iter().find(|name| self.take(name).is_some()) {
            None => Ok(()),
            Some(name) => Err(unsupported(&self.path(name))),
        }
    }

    /// Drops fields that carry nothing for the answer (OpenAI's own API ignores them likewise).
    pub(crate) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.map.shift_remove(*name);
        }
    }

    /// Refuses whatever was not taken.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        let unknown: Vec<&String> =
            self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name).collect();
        let Some(first) = unknown.first() else { return Ok(()) };
        let names: Vec<String> =
            unknown.iter().take(UNKNOWN_NAMED_MAX).map(|name| format!("`{}`", short(&self.path(name)))).collect();
        let more = unknown.len().saturating_sub(names.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let message = format!("unknown field {}{more}; remove it or check its spelling", names.join(", "));
        Err(ApiError::bad_request("unknown_field", message).about(short(&self.path(first))))
    }
}

/// The error for something that exists in the OpenAI API and not here.
pub(crate) fn unsupported(path: &str) -> ApiError {
    let message = format!("`{path}` is not supported by this node; remove it");
    ApiError::bad_request("unsupported_field", message).about(path)
}

/// A number in `range`.
pub(crate) fn number(path: &str, value: &Value, range: RangeInclusive<f32>) -> Result<f32, ApiError> {
    let Some(wide) = value.as_f64() else { return Err(type_error(path, "a number", value)) };
    if !(f64::from(*range.start())..=f64::from(*range.end())).contains(&wide) {
        let message = format!("`{path}` must be from {} to {}, not {wide}", range.start(), range.end());
        return Err(ApiError::invalid(path, message));
    }
    Ok(wide as f32)
}

/// The error for a value of the wrong type.
pub(crate) fn type_error(path: &str, wanted: &str, got: &Value) -> ApiError {
    ApiError::bad_request("invalid_type", format!("`{path}` must be {wanted}, not {}", kind(got))).about(path)
}

/// `value` cut to a length that is fit for a message.
pub(crate) fn short(value: &str) -> String {
    const CHARS_MAX: usize = 64;
    match value.char_indices().nth(CHARS_MAX) {
        None => value.to_owned(),
        Some((end, _)) => format!("{}…", &value[..end]),
    }
}

/// Names in backquotes, with commas between them.
pub(crate) fn quoted<S: AsRef<str>>(names: &[S]) -> String {
    names.iter().map(|name| format!("`{}`", name.as_ref())).collect::<Vec<_>>().join(", ")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a decimal number",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
