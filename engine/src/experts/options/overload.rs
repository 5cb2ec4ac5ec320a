//! A malus on the choice of experts that had more than their share, as in loss-free balancing (arXiv 2408.15664): it moves the
//! choice, weights are those of the scores as they were.

use kernels::{Groups, RouterSpec, TopK};

/// Tokens after which what was before counts for half.
const HALF_LIFE: f32 = 256.0;

/// Running average of the loads of one layer's experts.
#[derive(Debug)]
pub struct RunningLoad {
    /// Tokens over the even share; 1 is fair.
    shares: Vec<f32>,
}

impl RunningLoad {
    pub fn new(num_experts: usize) -> Self {
        Self { shares: vec![1.0; num_experts] }
    }

    /// The router with `decay` times what an expert had above its share taken from the score that it is chosen by.
    pub fn biased(&self, spec: &RouterSpec, decay: f32) -> RouterSpec {
        let own = |idx: usize| spec.bias.as_ref().map_or(0.0, |bias| bias[idx]);
        let biased = self.shares.iter().enumerate().map(|(idx, share)| own(idx) - decay * (share - 1.0).max(0.0));
        // Scores may be below what stands for the experts of groups that were not chosen.
        let groups = spec.groups.map(|groups| Groups { masked: f32::NEG_INFINITY, ..groups });
        RouterSpec { bias: Some(biased.collect()), groups, ..spec.clone() }
    }

    /// Adds the choices of a step.
    pub fn observe(&mut self, topk: &TopK) {
        if topk.experts.is_empty() {
            return;
        }
        let num_tokens = (topk.experts.len() / topk.k) as f32;
        let kept = 0.5f32.powf(num_tokens / HALF_LIFE);
        let unit = (1.0 - kept) * self.shares.len() as f32 / topk.experts.len() as f32;
        self.shares.iter_mut().for_each(|share| *share *= kept);
        for &expert in &topk.experts {
            self.shares[expert as usize] += unit;
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use kernels::{GroupScore, Scoring};

    use super::*;

    #[test]
    fn shares_move_to_what_was_chosen_and_only_overload_counts() {
        let mut load = RunningLoad::new(4);
        let spec = RouterSpec { bias: Some(vec![0.5, 0.0, 0.25, 0.0]), ..RouterSpec::new(Scoring::Sigmoid, 2) };
        assert_eq!(load.biased(&spec, 0.1).bias, spec.bias, "nobody had too much");
        let half = TopK { experts: [0, 1].repeat(256), weights: vec![0.5; 512], k: 2 };
        load.observe(&half);
        // Half of what is new, of 2 for the chosen two, and half of 1.
        assert_eq!(
            load.shares.iter().map(|share| (share * 1e3).round()).collect::<Vec<_>>(),
            [1500.0, 1500.0, 500.0, 500.0]
        );
        let bias = load.biased(&spec, 0.1).bias.unwrap();
        assert!((bias[0] - 0.45).abs() < 1e-4 && (bias[1] + 0.05).abs() < 1e-4, "{bias:?}");
        assert_eq!(bias[2..], [0.25, 0.0]);
        load.observe(&TopK { k: 2, ..TopK::default() });
        let sum: f32 = load.shares.iter().sum();
        assert!((sum - 4.0).abs() < 1e-3, "shares stay shares: {sum}");
        for _ in 0..100 {
            load.observe(&half);
        }
        assert!((load.shares[0] - 2.0).abs() < 1e-3 && load.shares[3] < 1e-3, "{:?}", load.shares);
    }

    #[test]
    fn groups_that_were_not_chosen_stay_out_below_zero_too() {
        let groups = Groups { num: 2, top: 1, score: GroupScore::Max, masked: 0.0 };
        let spec = RouterSpec { groups: Some(groups), ..RouterSpec::new(Scoring::Softmax, 2) };
        let mut load = RunningLoad::new(4);
        load.observe(&TopK { experts: [0, 1].repeat(256), weights: vec![0.5; 512], k: 2 });
        // A group of 0.9 against one of 0.1, whose experts are all that had too much: by 0.5 times 0.3, below zero.
        let logits = [0.899f32, 0.001, 0.05, 0.05].map(f32::ln);
        let logits = Tensor::from_vec(logits.to_vec(), (1, 4), &Device::Cpu).unwrap();
        let topk = kernels::route(&logits, &load.biased(&spec, 0.3)).unwrap();
        assert_eq!(topk.experts, [0, 1]);
    }

    #[test]
    fn without_a_bias_of_its_own_a_router_gets_one() {
        let mut load = RunningLoad::new(2);
        load.observe(&TopK { experts: vec![1; 256], weights: vec![1.0; 256], k: 1 });
        let bias = load.biased(&RouterSpec::new(Scoring::Softmax, 1), 2.0).bias.unwrap();
        assert_eq!((bias[0], (bias[1] * 1e3).round()), (0.0, -1000.0));
    }
}
