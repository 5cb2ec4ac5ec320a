//! What the experts of some tokens cost, for whoever asks what a request took.

use kernels::{Expert, ExpertWeights};

use super::options::CutChoices;
use super::routed_rows::{NO_EXPERT, RoutedLayout};
use super::traffic::ExpertTraffic;

/// What the experts of one layer cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertCost {
    /// Numbers in the matrices of an expert that is not free.
    pub num_parameters: u64,
    /// Of each expert whether it computes nothing.
    pub is_free: Vec<bool>,
}

impl ExpertCost {
    pub fn of(experts: &[Expert]) -> Self {
        let glu = |expert: &Expert| match expert {
            Expert::Glu(weights) => Some(num_parameters(weights)),
            Expert::Identity => None,
        };
        Self {
            num_parameters: experts.iter().find_map(glu).unwrap_or(0),
            is_free: experts.iter().map(|expert| glu(expert).is_none()).collect(),
        }
    }

    /// Experts that always run count among what every token uses.
    pub fn fixed(num_experts: usize) -> Self {
        Self { num_parameters: 0, is_free: vec![false; num_experts] }
    }
}

fn num_parameters(expert: &ExpertWeights) -> u64 {
    [&expert.gate_up, &expert.down].map(|weight| (weight.rows() * weight.cols()) as u64).iter().sum()
}

/// What the experts of some tokens of one sequence cost: of its prompt, or of tokens that it generated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertUse {
    pub of_prompt: bool,
    pub num_tokens: usize,
    /// Parameters of experts that ran, all tokens together; each counts once for every token that it ran for.
    pub num_parameters: u64,
    /// Of the token that used least, and most.
    pub least_parameters: u64,
    pub most_parameters: u64,
    /// Experts that ran for no token of the sequence before: `E` of all layers before, plus the id in its own.
    pub touched: Vec<u32>,
    /// Since the tokens before. Rows that were computed for other requests do not count, those computed again do.
    pub cut: CutChoices,
    /// The same; `None` where all experts are in memory for good.
    pub traffic: Option<ExpertTraffic>,
}

impl ExpertUse {
    /// Of a prompt, without its tokens yet.
    pub fn of_prompt() -> Self {
        Self { of_prompt: true, ..Self::default() }
    }

    /// Adds tokens whose experts are laid out as `layout` says; `costs` are of its layers, `touched` is of the sequence. Where no
    /// routing is kept there is nothing to add.
    pub fn add(
        &mut self,
        experts: &[u16],
        (layout, costs): (&RoutedLayout, &[ExpertCost]),
        touched: &mut TouchedExperts,
    ) {
        if layout.is_empty() {
            return;
        }
        for token in experts.chunks_exact(layout.ids_per_token()) {
            let (mut rest, mut first, mut num_parameters) = (token, 0, 0);
            for (layer, cost) in layout.layers().iter().zip(costs) {
                let (ids, behind) = rest.split_at(layer.top_k);
                rest = behind;
                for &id in ids.iter().filter(|&&id| id != NO_EXPERT) {
                    num_parameters += if cost.is_free[usize::from(id)] { 0 } else { cost.num_parameters };
                    let expert = first + u32::from(id);
                    if touched.insert(expert) {
                        self.touched.push(expert);
                    }
                }
                first += layer.num_experts as u32;
            }
            self.least_parameters =
                if self.num_tokens == 0 { num_parameters } else { self.least_parameters.min(num_parameters) };
            self.most_parameters = self.most_parameters.max(num_parameters);
            self.num_parameters += num_parameters;
            self.num_tokens += 1;
        }
    }

    /// Adds later tokens.
    pub fn merge(&mut self, later: Self) {
        let Self { of_prompt: _, num_tokens, num_parameters, least_parameters, most_parameters, touched, cut, traffic } =
            later;
        if num_tokens > 0 {
            self.least_parameters =
                if self.num_tokens == 0 { least_parameters } else { self.least_parameters.min(least_parameters) };
        }
        self.most_parameters = self.most_parameters.max(most_parameters);
        self.num_parameters += num_parameters;
        self.num_tokens += num_tokens;
        self.touched.extend(touched);
        self.cut.add(cut);
        if let Some(traffic) = traffic {
            self.traffic.get_or_insert_default().add(traffic);
        }
    }
}

/// The experts that ran for a sequence; it grows to a bit for each expert of the model.
#[derive(Clone, Debug, Default)]
pub struct TouchedExperts {
    bits: Vec<u64>,
}

impl TouchedExperts {
    /// True the first time.
    pub fn insert(&mut self, expert: u32) -> bool {
        let (word, bit) = (expert as usize / 64, 1 << (expert % 64));
        if word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        let is_new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        is_new
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.bits.iter().map(|word| word.count_ones() as usize).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::MoeShape;

    #[test]
    fn free_experts_and_those_that_did_not_run_cost_nothing() {
        let layout =
            RoutedLayout::new(&[MoeShape { num_experts: 3, top_k: 2 }, MoeShape { num_experts: 70, top_k: 1 }]);
        let mut is_free = vec![false; 70];
        is_free[69] = true;
        let costs =
            [ExpertCost { num_parameters: 10, is_free: vec![false; 3] }, ExpertCost { num_parameters: 7, is_free }];
        let mut touched = TouchedExperts::default();
        let mut of = |experts: &[u16]| {
            let mut found = ExpertUse::default();
            found.add(experts, (&layout, &costs), &mut touched);
            found
        };
        let prompt = of(&[0, 2, 69, 2, NO_EXPERT, 0]);
        assert_eq!((prompt.num_tokens, prompt.num_parameters), (2, 20 + 17));
        assert_eq!((prompt.least_parameters, prompt.most_parameters), (17, 20));
        assert_eq!(prompt.touched, [0, 2, 72, 3]);
        let next = of(&[2, 1, NO_EXPERT]);
        assert_eq!((next.num_parameters, next.least_parameters, &next.touched[..]), (20, 20, &[1][..]));
        assert_eq!(of(&[NO_EXPERT; 3]), ExpertUse { num_tokens: 1, ..ExpertUse::default() });
        assert_eq!(of(&[]), ExpertUse::default());
        let mut none = ExpertUse::default();
        none.add(&[], (&RoutedLayout::new(&[]), &[]), &mut TouchedExperts::default());
        assert_eq!(none, ExpertUse::default());
        assert_eq!(touched.count(), 5);
    }

    #[test]
    fn parts_add_up() {
        let part = |tokens: [u64; 3], touched: &[u32], traffic| ExpertUse {
            num_tokens: tokens[0] as usize,
            num_parameters: tokens[1] + tokens[2],
            least_parameters: tokens[1],
            most_parameters: tokens[2],
            touched: touched.into(),
            cut: CutChoices { num_dropped: 1, num_scaled: 2 },
            traffic,
            ..ExpertUse::default()
        };
        let traffic = ExpertTraffic { num_hits: 1, num_misses: 2, num_bytes: 3 };
        let mut sum = ExpertUse::default();
        sum.merge(part([0, 0, 0], &[], None));
        sum.merge(part([2, 5, 9], &[4], Some(traffic)));
        assert_eq!((sum.least_parameters, sum.traffic), (5, Some(traffic)), "no tokens have no least");
        sum.merge(part([2, 3, 7], &[1, 2], Some(traffic)));
        assert_eq!((sum.num_tokens, sum.num_parameters, sum.least_parameters, sum.most_parameters), (4, 24, 3, 9));
        assert_eq!((&sum.touched[..], sum.cut), (&[4, 1, 2][..], CutChoices { num_dropped: 3, num_scaled: 6 }));
        assert_eq!(sum.traffic, Some(ExpertTraffic { num_hits: 2, num_misses: 4, num_bytes: 6 }));
    }
}
