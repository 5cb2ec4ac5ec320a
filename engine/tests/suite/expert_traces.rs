//! Which experts the steps of a run use, drawn from seeded distributions or recorded from a model.

use std::collections::BTreeMap;
use std::path::Path;

/// Experts of one layer in one step, each with the tokens that took it.
pub type Uses = Vec<(u32, u32)>;

/// `steps` are `[step][layer]`.
pub struct Trace {
    pub num_layers: usize,
    pub num_experts: usize,
    pub steps: Vec<Vec<Uses>>,
}

impl Trace {
    /// Of all layers.
    pub fn total_experts(&self) -> usize {
        self.num_layers * self.num_experts
    }

    pub fn num_uses(&self) -> usize {
        self.steps.iter().flatten().map(Vec::len).sum()
    }

    /// Decoding by a real model: a line for each token, a digit for each of its experts, layer after layer.
    pub fn recorded(path: &Path, (num_experts, top_k): (usize, usize)) -> Self {
        let text = std::fs::read_to_string(path).expect("the trace is kept");
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let uses = |digits: &[u8]| digits.iter().map(|digit| (u32::from(digit - b'0'), 1)).collect::<Uses>();
        let steps: Vec<Vec<Uses>> = lines.map(|line| line.as_bytes().chunks(top_k).map(uses).collect()).collect();
        let num_layers = steps[0].len();
        for layer in &steps {
            assert_eq!(layer.len(), num_layers);
            assert!(layer.iter().flatten().all(|&(expert, _)| (expert as usize) < num_experts));
        }
        Self { num_layers, num_experts, steps }
    }
}

/// Routers whose experts have the popularity `1 / rank^s`: what top-k of random logits with a Zipf bias chooses. Each topic has
/// ranks of its own in each layer.
#[derive(Clone, Debug)]
pub struct Zipf {
    pub num_layers: usize,
    pub num_experts: usize,
    pub top_k: usize,
    pub s: f64,
    pub num_topics: usize,
    /// A sequence begins anew, on a topic of its own, after so many steps on average.
    pub topic_steps: u64,
    /// After so many steps two experts of each layer change places, in every topic.
    pub drift_steps: usize,
    /// Sequences that decode side by side.
    pub num_rows: usize,
    /// Tokens of a new sequence's prompt, all in its first step.
    pub prompt_len: usize,
}

impl Zipf {
    /// The shape of olmoe-7b; one topic without drift.
    pub const OLMOE: Self = Self {
        num_layers: 16,
        num_experts: 64,
        top_k: 8,
        s: 1.0,
        num_topics: 1,
        topic_steps: u64::MAX,
        drift_steps: usize::MAX,
        num_rows: 1,
        prompt_len: 0,
    };

    pub fn trace(&self, num_steps: usize, seed: u64) -> Trace {
        let mut random = Random(seed);
        // `[topic][layer][expert]`
        let mut biases: Vec<Vec<Vec<f64>>> =
            (0..self.num_topics).map(|_| (0..self.num_layers).map(|_| self.biases(&mut random)).collect()).collect();
        let mut topics = vec![0; self.num_rows];
        let mut steps = Vec::with_capacity(num_steps);
        for step in 1..=num_steps {
            if step.is_multiple_of(self.drift_steps) {
                for layer in biases.iter_mut().flatten() {
                    layer.swap(random.below(self.num_experts), random.below(self.num_experts));
                }
            }
            let mut tokens = Vec::new();
            for topic in &mut topics {
                if random.next().is_multiple_of(self.topic_steps) {
                    *topic = random.below(self.num_topics);
                    tokens.extend(std::iter::repeat_n(*topic, self.prompt_len));
                }
                tokens.push(*topic);
            }
            let layer = |layer: usize| {
                let mut uses = BTreeMap::new();
                for &topic in &tokens {
                    for expert in self.choose(&biases[topic][layer], &mut random) {
                        *uses.entry(expert).or_insert(0) += 1;
                    }
                }
                uses.into_iter().collect()
            };
            steps.push((0..self.num_layers).map(layer).collect());
        }
        Trace { num_layers: self.num_layers, num_experts: self.num_experts, steps }
    }

    fn biases(&self, random: &mut Random) -> Vec<f64> {
        let mut biases: Vec<f64> = (1..=self.num_experts).map(|rank| -self.s * (rank as f64).ln()).collect();
        for last in (1..biases.len()).rev() {
            biases.swap(last, random.below(last + 1));
        }
        biases
    }

    /// Top-k of biases with Gumbel noise.
    fn choose(&self, biases: &[f64], random: &mut Random) -> Vec<u32> {
        let noisy = |(expert, bias): (usize, &f64)| (bias - (-random.unit().ln()).ln(), expert as u32);
        let mut scores: Vec<(f64, u32)> = biases.iter().enumerate().map(noisy).collect();
        scores.select_nth_unstable_by(self.top_k - 1, |a, b| b.0.total_cmp(&a.0));
        scores[..self.top_k].iter().map(|&(_, expert)| expert).collect()
    }
}

/// splitmix64: the same numbers everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// Between 0 and 1, neither of them.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }
}
