//! `config.json` with typed access that names the key in every error.

use std::path::Path;

use kernels::{Pointwise, Reach};
use serde_json::{Map, Value};

use super::checkpoint::read_json;
use super::class_defaults;
use crate::error::EngineError;
use crate::handle::GenerationDefaults;

/// Of config.json and generation_config.json; published ones have some kilobytes, and parsed ones take 30 times as much.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Characters of a wrong value that its error repeats.
const MAX_SHOWN: usize = 80;

/// The model's own configuration, with the Hugging Face keys.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    keys: Map<String, Value>,
}

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    pub fn load(model_dir: &Path) -> Result<Self, EngineError> {
        let path = model_dir.join("config.json");
        Self::from_value(read_json(&path, MAX_CONFIG_BYTES)?)
            .ok_or_else(|| EngineError::Invalid { path, reason: "it is not a JSON object".into() })
    }

    /// A configuration in memory; none where it is not a JSON object.
    pub fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Object(keys) => {
                let mut config = Self { keys }.language_model();
                class_defaults::complete(&mut config.keys);
                Some(config)
            }
            _ => None,
        }
    }

    /// Multimodal configurations hold the language model's under `text_config`: its keys win, but for the type.
    fn language_model(self) -> Self {
        let Some(text) = self.section("text_config") else { return self };
        let mut keys = self.keys;
        for (key, value) in text.keys.into_iter().filter(|(key, _)| key != "model_type") {
            if !value.is_null() || !keys.contains_key(&key) {
                keys.insert(key, value);
            }
        }
        Self { keys }
    }

    /// The same configuration with keys of one spelling in another, where the other is absent.
    pub fn renamed(&self, pairs: &[(&str, &str)]) -> Self {
        let mut keys = self.keys.clone();
        for (from, to) in pairs {
            if let Some(value) = self.get(from)
                && self.get(to).is_none()
            {
                keys.insert((*to).to_owned(), value.clone());
            }
        }
        Self { keys }
    }

    /// All keys, with another `quantization_config`.
    pub fn with_quantization(&self, section: Value) -> Map<String, Value> {
        let mut keys = self.keys.clone();
        if let Some(Value::Object(text)) = keys.get_mut("text_config") {
            text.remove("quantization_config");
        }
        keys.insert("quantization_config".to_owned(), section);
        keys
    }

    /// The value, where the key is present and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    /// The whole of it as JSON, in the order of the file.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&self.keys).expect("a tree of JSON values has a text")
    }

    pub fn model_type(&self) -> Result<&str, EngineError> {
        self.get("model_type").and_then(Value::as_str).ok_or_else(|| missing("model_type"))
    }

    pub fn count_or(&self, key: &'static str, default: usize) -> Result<usize, EngineError> {
        Ok(self.opt_count(key)?.unwrap_or(default))
    }

    /// A count, where the key is present.
    pub fn opt_count(&self, key: &'static str) -> Result<Option<usize>, EngineError> {
        self.get(key)
            .map(|value| {
                as_count(value).ok_or_else(|| EngineError::Config {
                    key,
                    reason: format!("is {}, expected a count below 2^31", shown(value)),
                })
            })
            .transpose()
    }

    /// A count that must not be zero.
    pub fn size(&self, key: &'static str) -> Result<usize, EngineError> {
        self.opt_size(key)?.ok_or_else(|| missing(key))
    }

    /// The same, where the key is present.
    pub fn opt_size(&self, key: &'static str) -> Result<Option<usize>, EngineError> {
        match self.opt_count(key)? {
            Some(0) => Err(EngineError::Config { key, reason: "is 0, expected at least 1".into() }),
            size => Ok(size),
        }
    }

    pub fn float_or(&self, key: &'static str, default: f64) -> Result<f64, EngineError> {
        Ok(self.opt_float(key)?.unwrap_or(default))
    }

    pub fn opt_float(&self, key: &'static str) -> Result<Option<f64>, EngineError> {
        self.get(key)
            .map(|value| {
                // Most numbers end up in f32, where a larger one would be infinite.
                value.as_f64().filter(|number| number.abs() <= f64::from(f32::MAX)).ok_or_else(|| EngineError::Config {
                    key,
                    reason: format!("is {}, expected a number within the range of f32", shown(value)),
                })
            })
            .transpose()
    }

    /// A number above 0, where the key is present.
    pub fn opt_positive(&self, key: &'static str) -> Result<Option<f64>, EngineError> {
        match self.opt_float(key)? {
            Some(number) if number <= 0.0 => {
                Err(EngineError::Config { key, reason: format!("is {number}, expected a number above 0") })
            }
            number => Ok(number),
        }
    }

    pub fn positive_or(&self, key: &'static str, default: f64) -> Result<f64, EngineError> {
        Ok(self.opt_positive(key)?.unwrap_or(default))
    }

    /// A number that is 0 or more.
    pub fn non_negative_or(&self, key: &'static str, default: f64) -> Result<f64, EngineError> {
        match self.float_or(key, default)? {
            number if number < 0.0 => {
                Err(EngineError::Config { key, reason: format!("is {number}, expected a number of at least 0") })
            }
            number => Ok(number),
        }
    }

    pub fn flag_or(&self, key: &'static str, default: bool) -> Result<bool, EngineError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| EngineError::Config {
                key,
                reason: format!("is {}, expected true or false", shown(value)),
            }),
        }
    }

    pub fn text_or<'a>(&'a self, key: &'static str, default: &'a str) -> Result<&'a str, EngineError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_str()
                .ok_or_else(|| EngineError::Config { key, reason: format!("is {}, expected a string", shown(value)) }),
        }
    }

    /// What `layer_types` says of layer `idx`, one of `supported`; `None` without such a list.
    pub fn layer_type(&self, idx: usize, supported: &[&str]) -> Result<Option<&str>, EngineError> {
        let key = "layer_types";
        let Some(types) = self.get(key) else { return Ok(None) };
        match types.get(idx).and_then(Value::as_str) {
            Some(kind) if supported.contains(&kind) => Ok(Some(kind)),
            _ => {
                let found = types.get(idx).map_or("nothing".to_owned(), shown);
                let reason = format!("has {found} for layer {idx}, expected {}", supported.join(" or "));
                Err(EngineError::Config { key, reason })
            }
        }
    }

    /// A list of counts; absent is empty.
    pub fn counts(&self, key: &'static str) -> Result<Vec<usize>, EngineError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let error = || EngineError::Config {
            key,
            reason: format!("is {}, expected a list of counts below 2^31", shown(value)),
        };
        let list = value.as_array().ok_or_else(error)?;
        list.iter().map(|item| as_count(item).ok_or_else(error)).collect()
    }

    /// A sliding window; absent is none.
    pub fn window(&self, key: &'static str) -> Result<Reach, EngineError> {
        Ok(self.opt_size(key)?.map_or(Reach::Full, Reach::Window))
    }

    /// A size under the first of several spellings that is there; of a list with one entry per layer, the largest.
    pub fn first_count(&self, keys: &[&'static str]) -> Result<usize, EngineError> {
        let key = keys.iter().copied().find(|key| self.get(key).is_some()).unwrap_or(keys[0]);
        if self.get(key).is_some_and(Value::is_array) {
            let reason = "is a list without a positive count".to_owned();
            let largest = self.counts(key)?.into_iter().max().filter(|&count| count > 0);
            return largest.ok_or(EngineError::Config { key, reason });
        }
        self.size(key)
    }

    /// Width of one attention head: `head_dim`, else `hidden_size / num_attention_heads`.
    pub fn head_dim(&self) -> Result<usize, EngineError> {
        match self.opt_count("head_dim")? {
            Some(head_dim) => Ok(head_dim),
            None => Ok(self.size("hidden_size")? / self.size("num_attention_heads")?),
        }
    }

    /// A nested object, such as `rope_scaling`.
    pub fn section(&self, key: &str) -> Option<ModelConfig> {
        self.get(key).and_then(Value::as_object).map(|keys| Self { keys: keys.clone() })
    }

    /// The activation function that `key` names, in transformers' names.
    pub fn activation(&self, key: &'static str, default: &str) -> Result<Pointwise, EngineError> {
        match self.text_or(key, default)? {
            "relu" => Ok(Pointwise::Relu),
            "relu2" => Ok(Pointwise::SquaredRelu),
            "relu6" => Ok(Pointwise::Relu6),
            "leaky_relu" => Ok(Pointwise::LeakyRelu),
            "gelu" | "gelu_python" => Ok(Pointwise::Gelu),
            "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_new" | "gelu_fast" | "gelu_accurate" => {
                Ok(Pointwise::GeluTanh)
            }
            "gelu_10" => Ok(Pointwise::ClippedGelu),
            "quick_gelu" => Ok(Pointwise::QuickGelu),
            "silu" | "swish" => Ok(Pointwise::Silu),
            "hardswish" => Ok(Pointwise::HardSwish),
            "mish" => Ok(Pointwise::Mish),
            "sigmoid" => Ok(Pointwise::Sigmoid),
            "tanh" => Ok(Pointwise::Tanh),
            "linear" => Ok(Pointwise::Identity),
            other => {
                let reason = format!("is `{other}`, supported are silu, gelu, gelu_pytorch_tanh, relu and others");
                Err(EngineError::Config { key, reason })
            }
        }
    }

    /// Refuses a text other than these; the first is what an absent key means.
    pub fn expect_text(&self, key: &'static str, supported: &[&str]) -> Result<(), EngineError> {
        let found = self.text_or(key, supported[0])?;
        if supported.contains(&found) {
            return Ok(());
        }
        Err(EngineError::Config { key, reason: format!("is `{found}`, supported is {}", supported.join(", ")) })
    }
}

/// Below 2^31, so that products of two, and sums of some of those, fit a usize; where more is multiplied, it saturates.
fn as_count(value: &Value) -> Option<usize> {
    value.as_u64().filter(|&count| count < 1 << 31).map(|count| count as usize)
}

/// A value as an error repeats it: a stranger's list may be long.
pub fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn missing(key: &'static str) -> EngineError {
    EngineError::Config { key, reason: "is missing".into() }
}

/// Sampling defaults and stop tokens of `generation_config.json`; the stop tokens fall back to config.json.
pub fn generation_defaults(model_dir: &Path, config: &ModelConfig) -> Result<GenerationDefaults, EngineError> {
    let path = model_dir.join("generation_config.json");
    // Not `exists`: a link in a circle is there, and wrong.
    let generation = if std::fs::symlink_metadata(&path).is_ok() {
        match read_json(&path, MAX_CONFIG_BYTES)? {
            Value::Object(keys) => ModelConfig { keys },
            _ => return Err(EngineError::Invalid { path, reason: "it is not a JSON object".into() }),
        }
    } else {
        ModelConfig { keys: Map::new() }
    };
    let eos = generation.get("eos_token_id").or_else(|| config.get("eos_token_id"));
    let float = |key| Ok::<_, EngineError>(generation.opt_float(key)?.map(|number| number as f32));
    Ok(GenerationDefaults {
        eos_token_ids: token_ids(eos),
        temperature: match generation.flag_or("do_sample", true)? {
            true => float("temperature")?,
            // transformers ignores the other sampling fields when do_sample is false, and so did whoever wrote them;
            // OpenAI clients still expect sampling unless they ask for temperature 0.
            false => None,
        },
        top_k: generation.opt_count("top_k")?.map(|count| count as u32),
        top_p: float("top_p")?,
        min_p: float("min_p")?,
        repetition_penalty: float("repetition_penalty")?,
    })
}

/// One id or a list of ids.
fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let ids = match value {
        Some(Value::Array(list)) => list.iter().collect(),
        Some(single) => vec![single],
        None => Vec::new(),
    };
    ids.into_iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect()
}
