//! Metadata of one architecture, whose keys begin with its name, with errors that name the key.

use crate::error::EngineError;
use crate::weights::gguf::{GgufFile, decimal};

/// No count or size of a model is larger, so that products of two fit a usize.
const MAX_SIZE: u64 = 1 << 31;

/// A file and the prefix of its keys.
#[derive(Clone, Copy)]
pub(super) struct Metadata<'a> {
    gguf: &'a GgufFile,
    arch: &'a str,
}

impl<'a> Metadata<'a> {
    pub(super) fn new(gguf: &'a GgufFile, arch: &'a str) -> Self {
        Self { gguf, arch }
    }

    /// A count, where the key `{arch}.{key}` is there.
    pub(super) fn opt_count(&self, key: &str) -> Result<Option<u64>, EngineError> {
        let key = self.key(key);
        match self.gguf.opt_u64(&key)? {
            Some(count) if count >= MAX_SIZE => {
                Err(self.gguf.invalid(format!("metadata `{key}` is {count}, expected a count below 2^31")))
            }
            count => Ok(count),
        }
    }

    pub(super) fn count_or(&self, key: &str, default: u64) -> Result<u64, EngineError> {
        Ok(self.opt_count(key)?.unwrap_or(default))
    }

    /// A count that must be there and not be zero.
    pub(super) fn size(&self, key: &str) -> Result<u64, EngineError> {
        match self.opt_count(key)? {
            None => Err(self.missing(key)),
            Some(0) => Err(self.gguf.invalid(format!("metadata `{}` is 0, expected at least 1", self.key(key)))),
            Some(size) => Ok(size),
        }
    }

    /// A number, as the shortest decimal of the f32 that it is stored as.
    pub(super) fn opt_float(&self, key: &str) -> Result<Option<f64>, EngineError> {
        let key = self.key(key);
        match self.gguf.opt_f64(&key)? {
            Some(value) if !value.is_finite() => {
                Err(self.gguf.invalid(format!("metadata `{key}` is {value}, expected a finite number")))
            }
            value => Ok(value.map(decimal)),
        }
    }

    pub(super) fn float_or(&self, key: &str, default: f64) -> Result<f64, EngineError> {
        Ok(self.opt_float(key)?.unwrap_or(default))
    }

    /// A number that must be there.
    pub(super) fn float(&self, key: &str) -> Result<f64, EngineError> {
        self.opt_float(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool, EngineError> {
        Ok(self.gguf.opt_bool(&self.key(key))?.unwrap_or(default))
    }

    pub(super) fn opt_text(&self, key: &str) -> Result<Option<&'a str>, EngineError> {
        self.gguf.opt_str(&self.key(key))
    }

    /// An error about a key.
    pub(super) fn unsupported(&self, key: &str, reason: impl std::fmt::Display) -> EngineError {
        self.gguf.invalid(format!("metadata `{}` {reason}", self.key(key)))
    }

    fn missing(&self, key: &str) -> EngineError {
        self.unsupported(key, "is missing")
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }
}
