//! Rotary position embedding: the published ways to stretch it, as tables of cosines and sines.

use std::f64::consts::PI;
use std::sync::Arc;

use kernels::RopeTable;

use crate::error::EngineError;
use crate::weights::model_config::{ModelConfig, shown};

/// Published models rotate at most a few hundred elements; more than this would only fill the memory.
const MAX_ROTARY_DIM: usize = 1 << 14;

/// The lengths that rotary tables follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextLen {
    /// `max_model_len` as configured, else the model's own limit. What a family makes depend on the length of a sequence
    /// is fixed at load by this one, so that results depend on neither the sequence's length nor the memory.
    pub configured: usize,
    /// Positions that a sequence can reach: the tables cover these.
    pub reachable: usize,
    /// What a table may take: a config may promise positions that cost nothing elsewhere.
    pub max_table_bytes: u64,
}

/// The rotary settings of a model and what follows from them.
#[derive(Clone, Debug)]
pub struct Rope {
    theta: f64,
    scaling: Scaling,
    /// DeepSeek's `mscale_all_dim` with the factor it belongs to.
    softmax_mscale: Option<(f64, f64)>,
}

#[derive(Clone, Debug)]
enum Scaling {
    None,
    Linear { factor: f64 },
    NtkAlpha { alpha: f64 },
    DynamicNtk { factor: f64, trained_len: f64 },
    LongRope(LongRope),
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_len: f64 },
    Yarn(Yarn),
}

/// LongRoPE (arXiv 2402.13753).
#[derive(Clone, Debug)]
struct LongRope {
    short: Vec<f64>,
    /// For lengths past `original_len`; `None`: never.
    long: Option<Vec<f64>>,
    original_len: f64,
    amplitude: f64,
}

/// YaRN (arXiv 2309.00071) with DeepSeek's `mscale` keys.
#[derive(Clone, Debug)]
struct Yarn {
    factor: f64,
    original_len: f64,
    beta_fast: f64,
    beta_slow: f64,
    truncate: bool,
    mscale: f64,
    mscale_all_dim: f64,
    attention_factor: Option<f64>,
}

impl Rope {
    /// Reads `rope_theta` and `rope_scaling`, or the `rope_parameters` that newer configs hold.
    pub fn from_config(config: &ModelConfig) -> Result<Self, EngineError> {
        for key in ["rope_scaling", "rope_parameters"] {
            if let Some(value) = config.get(key).filter(|value| !value.is_object()) {
                let reason = format!("is {}, expected an object", shown(value));
                return Err(EngineError::Config { key, reason });
            }
        }
        let theta = config.float_or("rope_theta", 10_000.0)?;
        let Some(section) = Self::section(config) else {
            return Self { theta, scaling: Scaling::None, softmax_mscale: None }.checked();
        };
        let theta = section.float_or("rope_theta", theta)?;
        let scaling = Scaling::from_config(&section, config)?;
        let mscale_all_dim = section.float_or("mscale_all_dim", 0.0)?;
        let factor = match &scaling {
            Scaling::None => None,
            Scaling::Yarn(yarn) => Some(yarn.factor),
            _ => section.opt_float("factor")?,
        };
        let softmax_mscale = factor.filter(|_| mscale_all_dim != 0.0).map(|factor| (factor, mscale_all_dim));
        Self { theta, scaling, softmax_mscale }.checked()
    }

    fn checked(self) -> Result<Self, EngineError> {
        // At 1 all pairs turn alike, below it the later ones turn faster.
        if self.theta <= 1.0 {
            let reason = format!("is {}, expected a number above 1", self.theta);
            return Err(EngineError::Config { key: "rope_theta", reason });
        }
        Ok(self)
    }

    /// Where the settings are, in the older or the newer spelling.
    pub fn section(config: &ModelConfig) -> Option<ModelConfig> {
        config.section("rope_scaling").or_else(|| config.section("rope_parameters"))
    }

    /// Longest context that may be configured for a model made for `max_position_embeddings`: dynamic NTK stretches it.
    pub fn longest_context(config: &ModelConfig, max_position_embeddings: usize) -> Result<usize, EngineError> {
        match Self::from_config(config)?.scaling {
            Scaling::DynamicNtk { factor, .. } => Ok((max_position_embeddings as f64 * factor.max(1.0)) as usize),
            _ => Ok(max_position_embeddings),
        }
    }

    /// Cosines and sines for the reachable positions and a rotary width of `dim`.
    pub fn table(&self, dim: usize, len: ContextLen) -> Result<Arc<RopeTable>, EngineError> {
        if dim == 0 || !dim.is_multiple_of(2) || dim > MAX_ROTARY_DIM {
            let what = "config.json: the rotary width of a head (head_dim, kv_channels or qk_rope_head_dim)";
            let allowed = format!("even numbers from 2 to {MAX_ROTARY_DIM}");
            return Err(EngineError::Limit { what, value: dim as u64, allowed });
        }
        let position_bytes = (dim * size_of::<f32>()) as u64;
        if len.reachable as u64 > len.max_table_bytes / position_bytes {
            let what = "max_model_len (where not set, max_position_embeddings)";
            let allowed =
                format!("at most {}, or the rotary table outgrows the memory", len.max_table_bytes / position_bytes);
            return Err(EngineError::Limit { what, value: len.reachable as u64, allowed });
        }
        let (frequencies, amplitude) = self.frequencies(dim, len.configured as f64);
        if frequencies.len() != dim / 2 {
            let reason = format!("has {} factors, expected {}", frequencies.len(), dim / 2);
            return Err(EngineError::Config { key: "rope_scaling", reason });
        }
        if !frequencies.iter().all(|f| (len.reachable as f32 * f).is_finite()) || !amplitude.is_finite() {
            let reason = "gives angles that are no finite numbers".into();
            return Err(EngineError::Config { key: "rope_scaling", reason });
        }
        // f32 throughout, as the reference computes angles.
        let angles = (0..len.reachable).flat_map(|position| frequencies.iter().map(move |&f| position as f32 * f));
        let (cos, sin) = angles
            .map(|angle| {
                let (sin, cos) = f64::from(angle).sin_cos();
                ((cos * amplitude) as f32, (sin * amplitude) as f32)
            })
            .unzip();
        Ok(Arc::new(RopeTable::new(cos, sin, dim)?))
    }

    /// DeepSeek's factor on the softmax scale: `m(factor, mscale_all_dim)²` where positions are stretched, else 1.
    pub fn softmax_factor(&self) -> f64 {
        self.softmax_mscale.map_or(1.0, |(factor, mscale)| yarn_mscale(factor, mscale).powi(2))
    }

    /// Angular frequencies per pair and the factor on cosines and sines, for a context of `len`.
    fn frequencies(&self, dim: usize, len: f64) -> (Vec<f32>, f64) {
        let of_base = |base: f64| (0..dim / 2).map(move |i| base.powf(-2.0 * i as f64 / dim as f64));
        let stretched_base = |stretch: f64| {
            let base = self.theta * stretch.powf(dim as f64 / (dim as f64 - 2.0));
            (of_base(base).map(|f| f as f32).collect(), 1.0)
        };
        let plain = of_base(self.theta);
        match &self.scaling {
            Scaling::None => (plain.map(|f| f as f32).collect(), 1.0),
            Scaling::NtkAlpha { alpha } => stretched_base(*alpha),
            Scaling::DynamicNtk { factor, trained_len } => {
                stretched_base(factor * len.max(*trained_len) / trained_len - (factor - 1.0))
            }
            Scaling::LongRope(longrope) => {
                let long = longrope.long.as_ref().filter(|_| len > longrope.original_len);
                let stretched = plain.zip(long.unwrap_or(&longrope.short)).map(|(f, factor)| (f / factor) as f32);
                (stretched.collect(), longrope.amplitude)
            }
            Scaling::Linear { factor } => (plain.map(|f| (f / factor) as f32).collect(), 1.0),
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                let stretch = |f: f64| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength > original_len / low_freq_factor {
                        f / factor
                    } else if wavelength < original_len / high_freq_factor {
                        f
                    } else {
                        let smooth =
                            (original_len / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                (plain.map(|f| stretch(f) as f32).collect(), 1.0)
            }
            Scaling::Yarn(yarn) => {
                let ramp = yarn.ramp(dim, self.theta);
                let mix = |(i, f): (usize, f64)| (ramp[i] * f / yarn.factor + (1.0 - ramp[i]) * f) as f32;
                (plain.enumerate().map(mix).collect(), yarn.amplitude())
            }
        }
    }
}

impl Scaling {
    fn from_config(section: &ModelConfig, config: &ModelConfig) -> Result<Self, EngineError> {
        let kind = section.text_or("rope_type", section.text_or("type", "default")?)?;
        let max_len = config.count_or("max_position_embeddings", 0)? as f64;
        // Beside the section it wins over the one inside, as in transformers.
        let original_len = section.positive_or("original_max_position_embeddings", max_len)?;
        let original_len = config.positive_or("original_max_position_embeddings", original_len)?;
        match kind {
            "default" => Ok(Self::None),
            "longrope" | "su" => Ok(Self::LongRope(LongRope::from_config(section, max_len, original_len)?)),
            // With `alpha`, Hunyuan's static NTK.
            "dynamic" => match section.opt_positive("alpha")? {
                Some(alpha) => Ok(Self::NtkAlpha { alpha }),
                None => Ok(Self::DynamicNtk { factor: section.positive_or("factor", 1.0)?, trained_len: max_len }),
            },
            "linear" => Ok(Self::Linear { factor: section.positive_or("factor", 1.0)? }),
            "llama3" => Ok(Self::Llama3 {
                factor: section.positive_or("factor", 1.0)?,
                low_freq_factor: section.positive_or("low_freq_factor", 1.0)?,
                high_freq_factor: section.positive_or("high_freq_factor", 4.0)?,
                original_len,
            }),
            "yarn" => Ok(Self::Yarn(Yarn {
                factor: section.positive_or("factor", max_len / original_len)?,
                original_len,
                beta_fast: beta(section, "beta_fast", 32.0)?,
                beta_slow: beta(section, "beta_slow", 1.0)?,
                truncate: section.flag_or("truncate", true)?,
                mscale: section.float_or("mscale", 0.0)?,
                mscale_all_dim: section.float_or("mscale_all_dim", 0.0)?,
                attention_factor: section.opt_float("attention_factor")?,
            })),
            other => {
                let reason =
                    format!("has type `{other}`, supported are default, linear, dynamic, llama3, longrope, yarn");
                Err(EngineError::Config { key: "rope_scaling", reason })
            }
        }
    }
}

impl LongRope {
    fn from_config(section: &ModelConfig, max_len: f64, original_len: f64) -> Result<Self, EngineError> {
        let factor = section.positive_or("factor", max_len / original_len)?;
        let formula = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original_len.ln()).sqrt() };
        let amplitude = section.float_or("attention_factor", formula)?;
        let short = factors(section, "short_factor", "rope_scaling.short_factor")?;
        Ok(match section.opt_float("short_mscale")? {
            // Phi-3.5-MoE, whose reference never takes the long factors.
            Some(amplitude) => Self { short, long: None, original_len, amplitude },
            None => {
                let long = factors(section, "long_factor", "rope_scaling.long_factor")?;
                Self { short, long: Some(long), original_len, amplitude }
            }
        })
    }
}

/// 0 is as good as absent, as in transformers.
fn beta(section: &ModelConfig, key: &'static str, default: f64) -> Result<f64, EngineError> {
    match section.opt_float(key)? {
        None | Some(0.0) => Ok(default),
        Some(_) => section.positive_or(key, default),
    }
}

/// A list of one divisor per frequency.
fn factors(section: &ModelConfig, name: &str, key: &'static str) -> Result<Vec<f64>, EngineError> {
    let error = || EngineError::Config { key, reason: "is missing, or not a list of numbers".into() };
    let list = section.get(name).and_then(|list| list.as_array()).ok_or_else(error)?;
    list.iter().map(|item| item.as_f64().ok_or_else(error)).collect()
}

impl Yarn {
    /// Share of interpolation per frequency: 0 keeps it, 1 divides it by the factor.
    fn ramp(&self, dim: usize, theta: f64) -> Vec<f64> {
        let correction =
            |rotations: f64| dim as f64 * (self.original_len / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (correction(self.beta_fast), correction(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001; // the published guard against a division by zero
        }
        (0..dim / 2).map(|i| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)).collect()
    }

    /// The factor on cosines and sines.
    fn amplitude(&self) -> f64 {
        match self.attention_factor {
            Some(factor) => factor,
            None if self.mscale != 0.0 && self.mscale_all_dim != 0.0 => {
                yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
            }
            None => yarn_mscale(self.factor, 1.0),
        }
    }
}

fn yarn_mscale(factor: f64, coefficient: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * coefficient * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Compares with what transformers' `ROPE_INIT_FUNCTIONS` give for 8 rotary dimensions and a base of 10000.
    fn check(config: Value, len: f64, frequencies: [f32; 4], amplitude: f64) {
        let rope = Rope::from_config(&ModelConfig::from_value(config.clone()).unwrap()).unwrap();
        let found = rope.frequencies(8, len);
        let close = found.0.iter().zip(&frequencies).all(|(a, b)| (a - b).abs() <= 1e-5 * b);
        assert!(close && (found.1 - amplitude).abs() < 1e-6, "{config} at {len}: {found:?}");
    }

    #[test]
    fn positions_stretch_as_in_transformers() {
        let linear = json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } });
        check(linear, 1.0, [0.25, 0.025, 0.0025, 0.00025], 1.0);
        let llama3 = json!({ "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        } });
        check(llama3, 1.0, [1.0, 0.013_042_256, 0.00125, 0.000_125], 1.0);
    }

    #[test]
    fn the_newer_spelling_says_the_same() {
        let newer =
            json!({ "rope_parameters": { "rope_type": "linear", "factor": 4.0, "rope_theta": 1e4 }, "rope_theta": 7 });
        check(newer, 1.0, [0.25, 0.025, 0.0025, 0.00025], 1.0);
        let beside = json!({ "rope_scaling": { "type": "default", "rope_theta": 1e4 }, "rope_theta": 7 });
        check(beside, 1.0, [1.0, 0.1, 0.01, 0.001], 1.0);
    }

    #[test]
    fn yarn_takes_every_key() {
        let yarn = |keys: Value, beside: Value| {
            let mut section = json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64 });
            section.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
            let mut config = json!({ "rope_scaling": section, "max_position_embeddings": 512 });
            config.as_object_mut().unwrap().extend(beside.as_object().unwrap().clone());
            config
        };
        let plain = [1.0, 0.0625, 0.0025, 0.00025];
        check(yarn(json!({}), json!({})), 1.0, plain, 1.138_629_436);
        let betas = json!({ "truncate": false, "beta_fast": 8.0, "beta_slow": 2.0 });
        check(yarn(betas, json!({})), 1.0, [1.0, 0.025, 0.0025, 0.00025], 1.138_629_436);
        check(yarn(json!({ "beta_fast": 0, "beta_slow": null }), json!({})), 1.0, plain, 1.138_629_436);
        check(yarn(json!({ "mscale": 0.7, "mscale_all_dim": 0.5 }), json!({})), 1.0, plain, 1.025_928_650);
        check(yarn(json!({ "attention_factor": 1.5, "mscale": 0.7 }), json!({})), 1.0, plain, 1.5);
        let without = yarn(json!({ "factor": null }), json!({}));
        check(without, 1.0, [1.0, 0.05625, 0.00125, 0.000_125], 1.207_944_154);
        let beside = yarn(json!({}), json!({ "original_max_position_embeddings": 32 }));
        check(beside, 1.0, [1.0, 0.025, 0.0025, 0.00025], 1.138_629_436);
    }

    #[test]
    fn longrope_is_fixed_by_the_served_length() {
        let config = |beside: Value| {
            let mut section = json!({
                "type": "longrope", "original_max_position_embeddings": 512,
                "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 4.0, 9.0, 16.0],
            });
            section.as_object_mut().unwrap().extend(beside.as_object().unwrap().clone());
            json!({ "rope_scaling": section, "max_position_embeddings": 2048 })
        };
        let short = [1.0, 0.066_666_67, 0.005, 0.000_333_333];
        let long = [1.0, 0.025, 0.001_111_111, 0.000_062_5];
        check(config(json!({})), 512.0, short, 1.105_541_597);
        check(config(json!({})), 513.0, long, 1.105_541_597);
        check(config(json!({ "factor": 8.0 })), 512.0, short, 1.154_700_538);
        check(config(json!({ "attention_factor": 1.25 })), 2048.0, long, 1.25);
        check(config(json!({ "short_mscale": 1.2 })), 2048.0, short, 1.2);
    }

    #[test]
    fn dynamic_ntk_is_fixed_by_the_served_length() {
        let config = json!({ "rope_scaling": { "type": "dynamic", "factor": 4.0 }, "max_position_embeddings": 256 });
        check(config.clone(), 100.0, [1.0, 0.1, 0.01, 0.001], 1.0);
        check(config.clone(), 1000.0, [1.0, 0.042_946_015, 0.001_844_36, 0.000_079_208], 1.0);
        assert_eq!(Rope::longest_context(&ModelConfig::from_value(config).unwrap(), 256).unwrap(), 1024);
    }
}
