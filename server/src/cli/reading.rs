//! A model that reads texts and answers nobody, as `eval` and `profile` load it.

use std::path::Path;

use engine::{EngineConfig, EngineError, ExpertConfig, KvDtype, LoadedModel, load_model};
use indicatif::{ProgressBar, ProgressStyle};

use super::serve::available_memory;
use crate::config::{DeviceName, ExpertShare, QuantType, WeightType};
use crate::text::{EncodeOptions, Tokenizer};

/// How it is loaded.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    pub dtype: WeightType,
    pub quant: QuantType,
    pub kv_dtype: KvDtype,
    pub device: DeviceName,
    /// Tokens that are read at once.
    pub context: u32,
    pub threads: Option<u16>,
    /// What experts may take in memory; all where there is no limit.
    pub expert_memory: Option<ExpertShare>,
}

impl Reading {
    /// Loads the model, with a progress bar on stderr.
    ///
    /// # Errors
    /// Those of loading.
    pub fn load(self, model_dir: &Path) -> anyhow::Result<LoadedModel> {
        let config = EngineConfig {
            device: self.device.0,
            dtype: self.dtype.into(),
            quant: self.quant.into(),
            kv_dtype: self.kv_dtype,
            available_memory: available_memory()?,
            max_model_len: Some(self.context as usize),
            max_num_seqs: 1,
            // A piece is computed in one pass, whose rows all have a block.
            max_num_batched_tokens: self.context as usize,
            enable_prefix_caching: false,
            threads: self.threads.map(usize::from),
            experts: ExpertConfig { memory: self.expert_memory.map(Into::into), ..ExpertConfig::default() },
            ..EngineConfig::new(model_dir)
        };
        let bar = bar("loading", "{bytes}/{total_bytes}", 0);
        let loaded = load_model(&config, &mut |progress| {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
        });
        let model = loaded.map_err(|error| match error {
            EngineError::Limit { what: "max_model_len", value, allowed } => {
                EngineError::Limit { what: "--context", value, allowed }
            }
            error => error,
        })?;
        bar.finish_and_clear();
        Ok(model)
    }
}

/// A bar of so many of what the template `counts`; hidden where stderr is no terminal.
pub fn bar(what: &str, counts: &str, len: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(&format!("{what} {{bar:40}} {counts}"));
    ProgressBar::new(len).with_style(style.expect("the templates are constant and valid"))
}

/// What the model's texts begin with, where there is such a token.
///
/// # Errors
/// Those of the tokenizer.
pub fn start_token(tokenizer: &Tokenizer) -> anyhow::Result<Option<u32>> {
    let frame = tokenizer.encode("", EncodeOptions { add_special_tokens: true })?;
    let bos = tokenizer.bos_token().and_then(|token| tokenizer.token_to_id(token));
    Ok(frame.first().copied().filter(|id| Some(*id) == bos))
}
