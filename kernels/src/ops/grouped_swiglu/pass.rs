//! The expert layer for experts that are not all there: they are computed as they come, in any order, each once.

use candle_core::{Device, Storage, Tensor};

use super::cpu::{MAX_BUFFER_FLOATS, Pairs, Sizes};
use super::{ExpertWeights, OP, check_choices};
use crate::check::{self, Input, f32_slice};
use crate::error::{KernelError, Result};
use crate::matmul::Activations;
use crate::ops::route::TopK;
use crate::weight::WeightFormat;

/// Floats that the outputs of all pairs of a part may take (256 MiB): an expert that several parts need is asked for in each.
const MAX_PAIR_FLOATS: usize = 4 * MAX_BUFFER_FLOATS;

/// What is known of the experts of a layer while they are elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertSlots {
    /// Of `gate_up`; none for an expert that gives back its input.
    pub formats: Vec<Option<WeightFormat>>,
    /// Inner width.
    pub intermediate: usize,
}

/// The part of a call that waits for its experts.
pub struct ExpertPass<'a> {
    pairs: Pairs<'a>,
    x: &'a Activations<'a>,
    sizes: Sizes,
    formats: &'a [Option<WeightFormat>],
    /// Experts that were computed or given up.
    is_done: Vec<bool>,
}

/// [`super::grouped_swiglu`], to the bit, of experts that `supply` gives: it is called for each part of the tokens, mostly
/// one, and computes or gives up each expert that the part needs.
///
/// # Errors
/// As [`super::grouped_swiglu`], what `supply` fails with, an expert that was left out, and rows or experts that are not on the CPU.
pub fn grouped_experts<E: From<KernelError>>(
    x: &Tensor, /* [num_tokens, hidden_size] */
    slots: &ExpertSlots,
    topk: &TopK,
    mut supply: impl FnMut(&mut ExpertPass<'_>) -> std::result::Result<(), E>,
) -> std::result::Result<Tensor /* [num_tokens, hidden_size] */, E> {
    let [num_tokens, hidden] = Input { op: OP, what: "x", tensor: x }.dims("[num_tokens, hidden_size]")?;
    check_choices(topk, num_tokens, slots.formats.len())?;
    let mut out = vec![0.0; num_tokens * hidden];
    if !out.is_empty() && topk.k > 0 {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { return Err(KernelError::Device { op: OP, what: "x" }.into()) };
        let x = f32_slice(storage, layout).map_err(KernelError::from)?;
        let is_identity: Vec<bool> = slots.formats.iter().map(Option::is_none).collect();
        let in_use = topk.experts.iter().filter_map(|&expert| *slots.formats.get(expert as usize)?);
        let activations = Activations::new(x, hidden, in_use);
        let sizes = Sizes { hidden, intermediate: slots.intermediate };
        let part_tokens = (MAX_PAIR_FLOATS / (topk.k * hidden)).max(1);
        for (part_idx, out) in out.chunks_mut(part_tokens * hidden).enumerate() {
            let first = part_idx * part_tokens;
            let mut pass = ExpertPass {
                pairs: Pairs::new((topk, &is_identity), sizes, first..first + out.len() / hidden),
                x: &activations,
                sizes,
                formats: &slots.formats,
                is_done: is_identity.clone(),
            };
            supply(&mut pass)?;
            pass.check_done()?;
            pass.pairs.combine(x, out);
        }
    }
    Ok(Tensor::from_vec(out, (num_tokens, hidden), x.device()).map_err(KernelError::from)?)
}

impl ExpertPass<'_> {
    /// Experts that are neither computed nor given up, and how many tokens chose each.
    pub fn needed(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let left = self.is_done.iter().enumerate().filter(|(_, is_done)| !**is_done);
        left.map(|(expert, _)| (expert, self.pairs.rows_of(expert).len())).filter(|&(_, num_tokens)| num_tokens > 0)
    }

    /// Computes all tokens of these experts.
    ///
    /// # Errors
    /// An expert that does not exist, does not fit, is in another format than was announced, or came before.
    pub fn compute(&mut self, experts: &[(usize, &ExpertWeights)]) -> Result<()> {
        for &(idx, expert) in experts {
            check::below(OP, "expert", idx, self.formats.len())?;
            expert.check(self.sizes, &Device::Cpu)?;
            let found = expert.gate_up.format();
            if self.formats[idx] != Some(found) {
                let expected = self.formats[idx].map_or("none", WeightFormat::name);
                return Err(invalid(format!("expert {idx} is {}, announced was {expected}", found.name())));
            }
            if std::mem::replace(&mut self.is_done[idx], true) {
                return Err(invalid(format!("expert {idx} came twice")));
            }
        }
        self.pairs.compute(self.x, experts);
        Ok(())
    }

    /// Gives an expert up: the tokens that chose it become NaN.
    ///
    /// # Panics
    /// There is no such expert.
    pub fn fail(&mut self, expert: usize) {
        self.is_done[expert] = true;
        self.pairs.poison(expert);
    }

    fn check_done(&self) -> Result<()> {
        match self.needed().next() {
            None => Ok(()),
            Some((expert, _)) => Err(invalid(format!("expert {expert} was not supplied"))),
        }
    }
}

fn invalid(reason: String) -> KernelError {
    KernelError::Invalid { op: OP, reason }
}
