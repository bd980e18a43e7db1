//! Typed access to a config.json, whose every error names the key.
//!
//! A config is a stranger's file: values of any type and size may stand anywhere, and reading must neither panic nor
//! accept a number that later arithmetic could overflow on. As in the reference implementation a `null` is an absent key.

use crate::Error;
use serde_json::{Map, Value};

/// Sizes above this are refused: products of three stay inside 64 bits, and no real model comes near.
const MAX_SIZE: u64 = 1 << 20;
/// Factors, bases and epsilons outside are refused: inside, no frequency overflows f32.
const POSITIVE: std::ops::RangeInclusive<f64> = 1e-20..=1e12;
/// The largest context length accepted.
const MAX_POSITIONS: u64 = 1 << 31;

/// An object of config.json and the path that leads to it.
pub(crate) struct Reader<'a> {
    object: &'a Map<String, Value>,
    path: String,
}

impl<'a> Reader<'a> {
    /// The whole config.
    pub(crate) fn new(config: &'a Value) -> Result<Self, Error> {
        match config.as_object() {
            Some(object) => Ok(Reader { object, path: String::new() }),
            None => Err(Error::Config { key: "(root)".into(), reason: "is not a JSON object".into() }),
        }
    }

    /// The error that `key` deserves.
    pub(crate) fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::Config { key: format!("{}{key}", self.path), reason: reason.into() }
    }

    /// The value of `key` unless absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|v| !v.is_null())
    }

    /// Whether `key` is written, be it as null.
    pub(crate) fn written(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// The names of the keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    /// A nested object.
    pub(crate) fn section(&self, key: &str) -> Result<Option<Reader<'a>>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Reader { object, path: format!("{}{key}.", self.path) })),
            Some(other) => Err(self.error(key, format!("is {}, not an object", brief(other)))),
        }
    }

    /// A required size, 1 to 2^20.
    pub(crate) fn size(&self, key: &str) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    /// An optional size, 1 to 2^20.
    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        self.integer(key, 1, MAX_SIZE)
    }

    /// An optional context length, 1 to 2^31.
    pub(crate) fn positions(&self, key: &str) -> Result<Option<usize>, Error> {
        self.integer(key, 1, MAX_POSITIONS)
    }

    /// An optional integer inside `low..=high`. An integral float counts, since some writers make floats of lengths.
    pub(crate) fn integer(&self, key: &str, low: u64, high: u64) -> Result<Option<usize>, Error> {
        self.get(key).map(|value| self.integer_value(key, value, low, high)).transpose()
    }

    /// A size, 1 to 2^20, in a list under `key`.
    pub(crate) fn size_value(&self, key: &str, value: &Value) -> Result<usize, Error> {
        self.integer_value(key, value, 1, MAX_SIZE)
    }

    fn integer_value(&self, key: &str, value: &Value, low: u64, high: u64) -> Result<usize, Error> {
        let integral = |f: f64| (f.fract() == 0.0 && (0.0..9e15).contains(&f)).then_some(f as u64);
        match value.as_u64().or_else(|| value.as_f64().and_then(integral)) {
            Some(n) if (low..=high).contains(&n) => Ok(n as usize),
            _ => Err(self.error(key, format!("is {}, not an integer from {low} to {high}", brief(value)))),
        }
    }

    /// An optional number above zero, 1e-20 to 1e12.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>, Error> {
        self.get(key).map(|value| self.positive_value(key, value)).transpose()
    }

    /// A required number above zero, 1e-20 to 1e12.
    pub(crate) fn required_positive(&self, key: &str) -> Result<f64, Error> {
        self.positive(key)?.ok_or_else(|| self.missing(key))
    }

    /// A required list of `len` positive numbers.
    pub(crate) fn positives(&self, key: &str, len: usize) -> Result<Vec<f64>, Error> {
        let list = self.list(key)?.ok_or_else(|| self.missing(key))?;
        if list.len() != len {
            return Err(
                self.error(key, format!("has {} entries where half the head size, {len}, are needed", list.len()))
            );
        }
        list.iter().map(|value| self.positive_value(key, value)).collect()
    }

    /// An optional list.
    pub(crate) fn list(&self, key: &str) -> Result<Option<&'a [Value]>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(self.error(key, format!("is {}, not a list", brief(other)))),
        }
    }

    /// A flag, `default` when absent.
    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.error(key, format!("is {}, not true or false", brief(other)))),
        }
    }

    /// An optional string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.error(key, format!("is {}, not a string", brief(other)))),
        }
    }

    /// The error of a required key that is absent.
    pub(crate) fn missing(&self, key: &str) -> Error {
        self.error(key, "is missing")
    }

    fn positive_value(&self, key: &str, value: &Value) -> Result<f64, Error> {
        match value.as_f64() {
            Some(f) if POSITIVE.contains(&f) => Ok(f),
            _ => Err(self.error(key, format!("is {}, not a positive number of ordinary size", brief(value)))),
        }
    }
}

/// A value as it may stand in a message: hostile ones can be megabytes long.
fn brief(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        Value::String(text) => format!("\"{}\"", text.chars().take(40).collect::<String>()),
        other => other.to_string(),
    }
}
