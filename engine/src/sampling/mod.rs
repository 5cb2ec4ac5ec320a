//! From a row of logits to a token, a pure function of the row, the sequence's history and its parameters.

mod logprobs;
pub mod params;
mod penalties;
pub(crate) mod rng;
pub(crate) mod sampler;

pub(crate) use logprobs::prompt_logprob;
