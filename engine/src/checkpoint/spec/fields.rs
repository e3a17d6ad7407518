//! Typed access to the fields of a `config.json`; every error names its field.

use std::cell::RefCell;
use std::collections::HashSet;

use serde_json::Value;

use crate::error::EngineError;

/// Typed access to the fields of a JSON object; it remembers which were asked for.
pub(super) struct Fields<'a> {
    value: &'a Value,
    read: RefCell<HashSet<String>>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(value: &'a Value) -> Self {
        Self { value, read: RefCell::default() }
    }

    /// The field as it is.
    pub(super) fn raw(&self, name: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(name.to_owned());
        self.value.get(name)
    }

    /// The fields that were not read.
    pub(super) fn unread(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let fields = self.value.as_object().into_iter().flatten();
        fields.map(|(name, value)| (name.as_str(), value)).filter(|(name, _)| !self.read.borrow().contains(*name))
    }

    pub(super) fn get(&self, name: &str) -> Result<&'a Value, EngineError> {
        self.raw(name).ok_or_else(|| EngineError::spec(name, "is missing"))
    }

    pub(super) fn text(&self, name: &str) -> Result<&'a str, EngineError> {
        self.get(name)?.as_str().ok_or_else(|| EngineError::spec(name, "is not a string"))
    }

    pub(super) fn expect(&self, name: &str, only: &str) -> Result<(), EngineError> {
        match self.raw(name) {
            None => Ok(()),
            Some(v) if v.as_str() == Some(only) => Ok(()),
            _ => Err(EngineError::spec(name, format!("only `{only}` is supported"))),
        }
    }

    pub(super) fn refuse_true(&self, name: &str) -> Result<(), EngineError> {
        if self.flag_or(name, false)? { Err(EngineError::spec(name, "is not supported")) } else { Ok(()) }
    }

    pub(super) fn flag_or(&self, name: &str, default: bool) -> Result<bool, EngineError> {
        match self.raw(name) {
            None | Some(Value::Null) => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| EngineError::spec(name, "is not true or false")),
        }
    }

    pub(super) fn count(&self, name: &str, max: usize) -> Result<usize, EngineError> {
        self.get(name)?;
        self.count_or(name, 0, 1, max)
    }

    pub(super) fn count_or(&self, name: &str, default: usize, min: usize, max: usize) -> Result<usize, EngineError> {
        let n = match self.raw(name) {
            None | Some(Value::Null) => default as u64,
            Some(v) => v.as_u64().ok_or_else(|| EngineError::spec(name, "is not a whole number"))?,
        };
        usize::try_from(n)
            .ok()
            .filter(|n| (min..=max).contains(n))
            .ok_or_else(|| EngineError::spec(name, format!("{n} is outside {min}..={max}")))
    }

    pub(super) fn positive(&self, name: &str) -> Result<f32, EngineError> {
        let n = self.get(name)?.as_f64().ok_or_else(|| EngineError::spec(name, "is not a number"))? as f32;
        if n.is_finite() && n > 0.0 { Ok(n) } else { Err(EngineError::spec(name, format!("{n} is not positive"))) }
    }

    /// A positive number, or the default if the field is missing or null.
    pub(super) fn positive_or(&self, name: &str, default: f32) -> Result<f32, EngineError> {
        if self.has(name) { self.positive(name) } else { Ok(default) }
    }

    /// A positive number, if the field is there and not null.
    pub(super) fn positive_if(&self, name: &str) -> Result<Option<f32>, EngineError> {
        if self.has(name) { self.positive(name).map(Some) } else { Ok(None) }
    }

    /// Whether the field is there and not null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.raw(name).is_some_and(|v| !v.is_null())
    }

    /// Whether the field is the number 0.
    pub(super) fn is_zero(&self, name: &str) -> bool {
        self.raw(name).and_then(Value::as_f64) == Some(0.0)
    }

    /// The object in a field, if it is there and not null.
    pub(super) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, EngineError> {
        match self.raw(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) if value.is_object() => Ok(Some(Fields::new(value))),
            Some(_) => Err(EngineError::spec(name, "is not an object")),
        }
    }

    /// A list of positive numbers.
    pub(super) fn positives(&self, name: &str) -> Result<Vec<f32>, EngineError> {
        let list = self.get(name)?.as_array().ok_or_else(|| EngineError::spec(name, "is not a list"))?;
        list.iter()
            .map(|v| v.as_f64().map(|v| v as f32).filter(|v| v.is_finite() && *v > 0.0))
            .collect::<Option<_>>()
            .ok_or_else(|| EngineError::spec(name, "holds something that is not a positive number"))
    }

    /// A token id, a list of them, or none. Negative ones, which some files have for none, are left out.
    pub(super) fn tokens(&self, name: &str) -> Result<Vec<u32>, EngineError> {
        let given = match self.raw(name) {
            Some(Value::Array(list)) => list.iter().collect(),
            Some(v) if !v.is_null() => vec![v],
            _ => Vec::new(),
        };
        let there = given.into_iter().filter(|v| v.as_i64().is_none_or(|n| n >= 0));
        there.map(|v| whole(v).ok_or_else(|| EngineError::spec(name, "is not a token id"))).collect()
    }

    /// The numbers of some layers; none if the field is missing.
    pub(super) fn layers(&self, name: &str) -> Result<Vec<u32>, EngineError> {
        let wrong = || EngineError::spec(name, "is not a list of layers");
        match self.raw(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(|v| whole(v).ok_or_else(wrong)).collect(),
            Some(_) => Err(wrong()),
        }
    }
}

fn whole(v: &Value) -> Option<u32> {
    v.as_u64().and_then(|n| u32::try_from(n).ok())
}
