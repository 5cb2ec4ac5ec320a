//! Which experts the next layer will choose: its router is asked before its turn, with the hidden state of the present one.

use std::collections::BTreeMap;
use std::iter::Sum;

use candle_core::Tensor;
use kernels::TopK;

use super::catalog::RouterParts;
use crate::error::EngineError;
use crate::experts::ExpertId;

/// Layers that are asked ahead, each for one of so many of the experts that it would choose, the best ones: of the next layer all,
/// of those behind it, which see less of what it will get, what is likely to stay. A read takes longer than one layer.
const REACH: [usize; 3] = [1, 1, 2];

/// Asks routers ahead and remembers how right that was.
#[derive(Debug)]
pub(super) struct Predictor {
    /// By MoE layer; those whose experts the store has.
    routers: BTreeMap<usize, RouterParts>,
    /// What was predicted last, and of which layer.
    predicted: Option<(usize, TopK)>,
    /// By MoE layer.
    recalls: BTreeMap<usize, Recall>,
}

/// Choices that were predicted, of all that were made since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Recall {
    num_predicted: u64,
    num_chosen: u64,
}

impl Recall {
    /// 0 to 1; 0 where nothing was compared.
    pub(super) fn share(self) -> f64 {
        self.num_predicted as f64 / self.num_chosen.max(1) as f64
    }
}

impl Sum for Recall {
    fn sum<I: Iterator<Item = Self>>(recalls: I) -> Self {
        recalls.fold(Self::default(), |sum, recall| Self {
            num_predicted: sum.num_predicted + recall.num_predicted,
            num_chosen: sum.num_chosen + recall.num_chosen,
        })
    }
}

impl Predictor {
    pub(super) fn new(routers: BTreeMap<usize, RouterParts>) -> Self {
        Self { routers, predicted: None, recalls: BTreeMap::new() }
    }

    /// Of the layers that were compared.
    pub(super) fn recalls(&self) -> &BTreeMap<usize, Recall> {
        &self.recalls
    }

    /// Compares what `layer` chose with what was predicted of it.
    pub(super) fn compare(&mut self, layer: usize, topk: &TopK) {
        let Some((_, predicted)) = self.predicted.take().filter(|(of, _)| *of == layer) else { return };
        if predicted.experts.len() != topk.experts.len() {
            return;
        }
        let recall = self.recalls.entry(layer).or_default();
        for (predicted, chosen) in predicted.experts.chunks(topk.k).zip(topk.experts.chunks(topk.k)) {
            for expert in chosen.iter().filter(|&&expert| expert != TopK::NO_EXPERT) {
                recall.num_predicted += u64::from(predicted.contains(expert));
                recall.num_chosen += 1;
            }
        }
    }

    /// The experts that the layers behind `layer` will choose, by what `layer` gets: the next layer first, in each the most
    /// wanted first. `x`: `[num_tokens, hidden_size]`, normalised.
    pub(super) fn predict(&mut self, layer: usize, x: &Tensor) -> Result<Vec<ExpertId>, EngineError> {
        let mut found = Vec::new();
        for ((distance, share), (&next, router)) in REACH.into_iter().enumerate().zip(self.routers.range(layer + 1..)) {
            let topk = kernels::route(&router.gate.forward(x)?, &router.spec)?;
            let mut num_tokens: BTreeMap<u32, usize> = BTreeMap::new();
            for chosen in topk.experts.chunks(topk.k) {
                chosen[..topk.k.div_ceil(share)].iter().for_each(|&expert| *num_tokens.entry(expert).or_default() += 1);
            }
            let mut experts: Vec<(u32, usize)> = num_tokens.into_iter().collect();
            experts.sort_by_key(|&(_, num_tokens)| std::cmp::Reverse(num_tokens));
            found.extend(experts.into_iter().map(|(expert, _)| ExpertId { layer: next as u32, expert }));
            if distance == 0 {
                self.predicted = Some((next, topk));
            }
        }
        Ok(found)
    }
}
