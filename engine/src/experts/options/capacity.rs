//! How many tokens an expert takes in a step.

use kernels::TopK;

/// A limit on the tokens of each expert in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// Times the even share of a step, above 0.
    pub factor: f32,
    pub overflow: Overflow,
}

/// What becomes of an expert's tokens above its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// The weights of all its tokens are multiplied by limit over tokens.
    Scale,
    /// Those of least weight get nothing from it, of equals the later rows.
    Drop,
}

impl Capacity {
    /// `ceil(factor * choices / experts)`, at least 1.
    fn limit(&self, num_choices: usize, num_experts: usize) -> usize {
        let share = f64::from(self.factor) * num_choices as f64 / num_experts as f64;
        (share.ceil() as usize).max(1)
    }

    /// What the limited experts may take together of so many choices.
    pub fn num_places(&self, num_choices: usize, is_free: &[bool]) -> usize {
        self.limit(num_choices, is_free.len()) * is_free.iter().filter(|is_free| !**is_free).count()
    }

    /// Cuts the choices of one router for all rows of a step, and says which pairs of token and slot were cut. Experts that
    /// compute nothing (`is_free`) have no limit.
    pub fn apply(&self, topk: &mut TopK, is_free: &[bool]) -> Vec<usize> {
        let limit = self.limit(topk.experts.len(), is_free.len());
        let mut pairs_of = vec![Vec::new(); is_free.len()];
        for (pair, &expert) in topk.experts.iter().enumerate().filter(|(_, expert)| **expert != TopK::NO_EXPERT) {
            pairs_of[expert as usize].push(pair);
        }
        let mut cut = Vec::new();
        let limited = pairs_of.into_iter().zip(is_free).filter(|(pairs, is_free)| !**is_free && pairs.len() > limit);
        for (mut pairs, _) in limited {
            match self.overflow {
                Overflow::Scale => {
                    let factor = limit as f32 / pairs.len() as f32;
                    pairs.iter().for_each(|&pair| topk.weights[pair] *= factor);
                    cut.append(&mut pairs);
                }
                Overflow::Drop => {
                    // Stable, so that of equals the earlier row comes first; NaN stays, for it has to be seen.
                    pairs.sort_by(|&a, &b| topk.weights[b].total_cmp(&topk.weights[a]));
                    for pair in pairs.drain(limit..) {
                        topk.experts[pair] = TopK::NO_EXPERT;
                        topk.weights[pair] = 0.0;
                        cut.push(pair);
                    }
                }
            }
        }
        cut
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: u32 = TopK::NO_EXPERT;

    fn check(overflow: Overflow, factor: f32, topk: &TopK, expected: (&[u32], &[f32], &[usize])) {
        let mut found = topk.clone();
        let mut cut = Capacity { factor, overflow }.apply(&mut found, &[false, false, false, true]);
        cut.sort_unstable();
        assert_eq!((&found.experts[..], &found.weights[..], &cut[..]), expected, "{overflow:?} {factor}");
    }

    #[test]
    fn an_expert_takes_its_share_and_no_more() {
        // Eight choices of four experts: the even share is two.
        let experts = vec![0, 1, 0, 3, 0, 3, 3, 0];
        let weights = vec![0.5, 0.5, 0.75, 0.25, 0.5, 0.5, 0.5, 0.5];
        let topk = TopK { experts: experts.clone(), weights: weights.clone(), k: 2 };
        let (drop, scale) = (Overflow::Drop, Overflow::Scale);
        check(
            drop,
            1.0,
            &topk,
            (&[0, 1, 0, 3, NONE, 3, 3, NONE], &[0.5, 0.5, 0.75, 0.25, 0.0, 0.5, 0.5, 0.0], &[4, 7]),
        );
        check(scale, 1.0, &topk, (&experts, &[0.25, 0.5, 0.375, 0.25, 0.25, 0.5, 0.5, 0.25], &[0, 2, 4, 7]));
        // ceil(1.2 * 2) = 3.
        check(drop, 1.2, &topk, (&[0, 1, 0, 3, 0, 3, 3, NONE], &[0.5, 0.5, 0.75, 0.25, 0.5, 0.5, 0.5, 0.0], &[7]));
        check(drop, 2.0, &topk, (&experts, &weights, &[]));
        check(scale, 2.0, &topk, (&experts, &weights, &[]));
        // At least one token, and empty slots are nobody's.
        let one = TopK { experts: vec![2, NONE, 2, NONE], weights: vec![0.5, 0.0, 1.0, 0.0], k: 2 };
        check(drop, 0.01, &one, (&[NONE, NONE, 2, NONE], &[0.0, 0.0, 1.0, 0.0], &[0]));
        check(scale, 0.01, &one, (&one.experts, &[0.25, 0.0, 0.5, 0.0], &[0, 2]));
        check(drop, 1.0, &TopK { k: 2, ..TopK::default() }, (&[], &[], &[]));
    }
}
