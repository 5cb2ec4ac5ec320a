//! The rotary part of the metadata as `rope_scaling`.

use serde_json::{Value, json};

use super::GgufModel;
use super::arch::Arch;
use crate::error::EngineError;

/// llama.cpp's converter writes a tenth of DeepSeek's `mscale_all_dim`.
const LOG_MULTIPLIER: f64 = 0.1;

/// `rope_scaling`; null where positions are not stretched.
pub(super) fn scaling(model: &GgufModel) -> Result<Value, EngineError> {
    let metadata = model.metadata();
    if !metadata.flag_or("rope.scaling.finetuned", true)? && model.arch == Arch::GraniteMoe {
        return Err(
            metadata.unsupported("rope.scaling.finetuned", "is false: attention without positions is not supported")
        );
    }
    if let Some(factors) = model.list("rope_freqs.weight")? {
        // One divisor per frequency, whatever formula they came from.
        return Ok(json!({
            "rope_type": "longrope", "short_factor": factors, "short_mscale": 1.0,
        }));
    }
    // The older spelling.
    let linear = metadata.float_or("rope.scale_linear", 1.0)?;
    let default = if linear == 1.0 { "none" } else { "linear" };
    match metadata.opt_text("rope.scaling.type")?.unwrap_or(default) {
        "none" => Ok(Value::Null),
        "linear" => Ok(json!({ "rope_type": "linear", "factor": metadata.float_or("rope.scaling.factor", linear)? })),
        "yarn" => yarn(model),
        other => {
            let reason = format!("is `{other}`, supported are none, linear, yarn");
            Err(metadata.unsupported("rope.scaling.type", reason))
        }
    }
}

fn yarn(model: &GgufModel) -> Result<Value, EngineError> {
    let metadata = model.metadata();
    let factor = metadata.float("rope.scaling.factor")?;
    let mut scaling = json!({
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.size("rope.scaling.original_context_length")?,
        "beta_fast": metadata.float_or("rope.scaling.yarn_beta_fast", 32.0)?,
        "beta_slow": metadata.float_or("rope.scaling.yarn_beta_slow", 1.0)?,
        // gpt-oss has no room for it in its metadata, and does not round.
        "truncate": model.arch != Arch::GptOss,
    });
    if let Some(attention_factor) = metadata.opt_float("rope.scaling.yarn_attn_factor")? {
        scaling["attention_factor"] = attention_factor.into();
    }
    // Published DeepSeek models have one value for both.
    if let Some(multiplier) = metadata.opt_float("rope.scaling.yarn_log_multiplier")? {
        let mscale = crate::weights::gguf::decimal(multiplier / LOG_MULTIPLIER);
        scaling["mscale"] = mscale.into();
        scaling["mscale_all_dim"] = mscale.into();
    }
    Ok(scaling)
}
