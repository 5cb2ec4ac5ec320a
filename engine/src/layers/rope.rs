//! Rotary position embedding: the published ways to stretch it, as tables of cosines and sines.

use std::f64::consts::PI;
use std::sync::Arc;

use kernels::RopeTable;

use crate::error::EngineError;
use crate::weights::model_config::ModelConfig;

/// Published models rotate at most a few hundred elements; more than this would only fill the memory.
const MAX_ROTARY_DIM: usize = 1 << 14;

/// The rotary settings of a model and what follows from them.
#[derive(Clone, Debug)]
pub struct Rope {
    theta: f64,
    scaling: Scaling,
}

#[derive(Clone, Debug)]
enum Scaling {
    None,
    Linear { factor: f64 },
    NtkAlpha { alpha: f64 },
    LongRope { factors: Vec<f64>, amplitude: f64 },
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_len: f64 },
    Yarn(Yarn),
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
        let parameters = config.section("rope_parameters");
        let theta = match parameters.as_ref().map(|section| section.opt_float("rope_theta")).transpose()?.flatten() {
            Some(theta) => theta,
            None => config.float_or("rope_theta", 10_000.0)?,
        };
        // At 1 all pairs turn alike, below it the later ones turn faster.
        if theta <= 1.0 {
            let reason = format!("is {theta}, expected a number above 1");
            return Err(EngineError::Config { key: "rope_theta", reason });
        }
        let section = config.section("rope_scaling").or(parameters);
        let scaling = section.map(|section| Scaling::from_config(&section, config)).transpose()?;
        Ok(Self { theta, scaling: scaling.unwrap_or(Scaling::None) })
    }

    /// Cosines and sines for positions `0..max_len` and a rotary width of `dim`.
    pub fn table(&self, dim: usize, max_len: usize) -> Result<Arc<RopeTable>, EngineError> {
        if dim == 0 || !dim.is_multiple_of(2) || dim > MAX_ROTARY_DIM {
            let what = "config.json: the rotary width of a head (head_dim, kv_channels or qk_rope_head_dim)";
            let allowed = format!("even numbers from 2 to {MAX_ROTARY_DIM}");
            return Err(EngineError::Limit { what, value: dim as u64, allowed });
        }
        let (frequencies, amplitude) = self.frequencies(dim);
        if frequencies.len() != dim / 2 {
            let reason = format!("has {} factors, expected {}", frequencies.len(), dim / 2);
            return Err(EngineError::Config { key: "rope_scaling", reason });
        }
        if !frequencies.iter().all(|f| (max_len as f32 * f).is_finite()) || !amplitude.is_finite() {
            let reason = "gives angles that are no finite numbers".into();
            return Err(EngineError::Config { key: "rope_scaling", reason });
        }
        // f32 throughout, as the reference computes angles.
        let angles = (0..max_len).flat_map(|position| frequencies.iter().map(move |&f| position as f32 * f));
        let (cos, sin) = angles
            .map(|angle| {
                let (sin, cos) = f64::from(angle).sin_cos();
                ((cos * amplitude) as f32, (sin * amplitude) as f32)
            })
            .unzip();
        Ok(Arc::new(RopeTable::new(cos, sin, dim)?))
    }

    /// DeepSeek's factor on the softmax scale: `m(factor, mscale_all_dim)²` under YaRN, else 1.
    pub fn softmax_factor(&self) -> f64 {
        match &self.scaling {
            Scaling::Yarn(yarn) if yarn.mscale_all_dim != 0.0 => yarn_mscale(yarn.factor, yarn.mscale_all_dim).powi(2),
            _ => 1.0,
        }
    }

    /// Angular frequencies per pair and the factor on cosines and sines.
    fn frequencies(&self, dim: usize) -> (Vec<f32>, f64) {
        let plain = (0..dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / dim as f64));
        match &self.scaling {
            Scaling::None => (plain.map(|f| f as f32).collect(), 1.0),
            Scaling::NtkAlpha { alpha } => {
                let theta = self.theta * alpha.powf(dim as f64 / (dim as f64 - 2.0));
                let frequency = |i: usize| theta.powf(-2.0 * i as f64 / dim as f64) as f32;
                ((0..dim / 2).map(frequency).collect(), 1.0)
            }
            Scaling::LongRope { factors, amplitude } => {
                let stretched = plain.zip(factors).map(|(f, factor)| (f / factor) as f32);
                (stretched.collect(), *amplitude)
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
        let original_len = section.positive_or("original_max_position_embeddings", max_len)?;
        match kind {
            "default" => Ok(Self::None),
            "longrope" | "su" => Self::longrope(section, config),
            // Hunyuan's static NTK; without `alpha` the base is stretched only past the positions a model is made for,
            // which are never served.
            "dynamic" => Ok(section.opt_positive("alpha")?.map_or(Self::None, |alpha| Self::NtkAlpha { alpha })),
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
                beta_fast: section.positive_or("beta_fast", 32.0)?,
                beta_slow: section.positive_or("beta_slow", 1.0)?,
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

impl Scaling {
    /// LongRoPE (arXiv 2402.13753) with its factors for short contexts, which the reference of Phi-3.5-MoE always takes.
    fn longrope(section: &ModelConfig, config: &ModelConfig) -> Result<Self, EngineError> {
        let key = "rope_scaling.short_factor";
        let reason = || EngineError::Config { key, reason: "is missing, or not a list of numbers".into() };
        let list = section.get("short_factor").and_then(|list| list.as_array()).ok_or_else(reason)?;
        let factors: Vec<f64> = list.iter().map(|item| item.as_f64().ok_or_else(reason)).collect::<Result<_, _>>()?;
        let max_len = config.count_or("max_position_embeddings", 0)? as f64;
        let original = config.positive_or("original_max_position_embeddings", max_len)?;
        let original = section.positive_or("original_max_position_embeddings", original)?;
        let stretch = max_len / original;
        let formula = if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / original.ln()).sqrt() };
        Ok(Self::LongRope { factors, amplitude: section.float_or("short_mscale", formula)? })
    }
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
