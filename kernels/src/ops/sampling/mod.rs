//! What is read of rows of logits: the next token, and log-probabilities of the model's own distribution. A pure function of the row
//! and of what is asked of it.

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod arguments;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use candle_core::{Storage, Tensor};

use crate::check::{self, Input};
use crate::error::{KernelError, Result};
use crate::pool;

const OP: &str = "read_logits";

/// What is asked of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitRow {
    pub choice: Choice,
    /// Most likely tokens that are told beside the log-probability of the chosen one; `None` tells of none.
    pub num_logprobs: Option<u32>,
}

/// Which token a row is read for.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// One that came, of a prompt.
    Known(u32),
    /// One to come.
    Draw(Draw),
}

/// How a token is chosen. In this order: bias, forbidden tokens, penalties, temperature, min-p, top-k, top-p, draw (vLLM's order).
/// Tokens that are not in the vocabulary count for nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// 0 takes the most likely token, the first among equals; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than `min_p` times the most likely one.
    pub min_p: f32,
    /// In [0, 1): the place in the cumulative probability where the token is.
    pub uniform: f64,
    /// Added to logits; each token once.
    pub bias: Vec<(u32, f32)>,
    pub forbidden: Vec<u32>,
    pub penalties: Option<Penalties>,
}

/// Penalties on tokens that occurred before.
#[derive(Clone, Debug, PartialEq)]
pub struct Penalties {
    /// Divides positive and multiplies negative logits of tokens that were seen (arXiv 1909.05858).
    pub repetition: f32,
    /// Subtracted for each time that a token is in the output.
    pub frequency: f32,
    /// Subtracted once of tokens that are in the output.
    pub presence: f32,
    /// Tokens of prompt and output, each once, with how often it is in the output.
    pub seen: Vec<(u32, u32)>,
}

impl Draw {
    /// Draws from all that weighs something.
    #[cfg(test)]
    pub(crate) const PLAIN: Self = Self {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        uniform: 0.5,
        bias: Vec::new(),
        forbidden: Vec::new(),
        penalties: None,
    };

    fn adjusts(&self) -> bool {
        !self.bias.is_empty() || !self.forbidden.is_empty() || self.penalties.is_some()
    }
}

/// What a row says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReadRow {
    /// The known or drawn token; `None` where the row has no usable number.
    pub token: Option<u32>,
    /// Of the token, before bias, penalties, temperature and filters; `None` where none was asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens, best first, ties by token; at most the vocabulary.
    pub top: Vec<(u32, f32)>,
}

/// Reads rows of logits, f32 on the CPU, f32 or bf16 on a CUDA device, from which no logits come back.
///
/// # Errors
/// Logits of another type or shape, a known token that is not in the vocabulary.
pub fn read_logits(logits: &Tensor /* [num_rows, vocab_size] */, rows: &[LogitRow]) -> Result<Vec<ReadRow>> {
    let [num_rows, vocab_size] = Input { op: OP, what: "logits", tensor: logits }.dims("[num_rows, vocab_size]")?;
    check::length(OP, "number of rows asked for", rows.len(), num_rows)?;
    for row in rows {
        if let Choice::Known(token) = row.choice {
            check::below(OP, "known token", token as usize, vocab_size)?;
        }
    }
    if num_rows == 0 {
        return Ok(Vec::new());
    }
    let (storage, layout) = logits.storage_and_layout();
    match &*storage {
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => Ok(cuda::read_logits((storage, layout), vocab_size, rows)?),
        Storage::Cpu(storage) => {
            let logits = check::f32_slice(storage, layout)?;
            // Side by side: a draw over a large vocabulary costs as much as a layer.
            let of_row = |idx: usize| &logits[idx * vocab_size..(idx + 1) * vocab_size];
            Ok(pool::parallel_map(num_rows, |idx| cpu::read_row(of_row(idx), &rows[idx])))
        }
        _ => Err(KernelError::Device { op: OP, what: "logits" }),
    }
}
