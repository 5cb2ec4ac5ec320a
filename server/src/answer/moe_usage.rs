//! `usage.moe`: under which options of routing an answer came about, and what its experts cost.

use engine::{ExpertOptions, ExpertUse, Overflow, RoutingOptions, TouchedExperts};

use crate::generate::Delta;
use crate::openai::usage::{ActiveParameters, ExpertCacheUse, MoeUsage, RoutingInEffect};
use crate::validate::{ExpertLimits, ValidRequest};

/// What is known of a request before its answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct MoeTerms {
    options: Option<RoutingInEffect>,
    /// Of every token, whatever its routers choose; `None` where nobody asked what experts cost.
    num_shared_parameters: Option<u64>,
    num_choices: u32,
}

/// What the experts of all choices of a request cost so far.
#[derive(Clone, Debug, Default)]
pub struct MoeCount {
    terms: MoeTerms,
    sum: ExpertUse,
    touched: TouchedExperts,
}

impl MoeTerms {
    pub fn new(valid: &ValidRequest, limits: &ExpertLimits, num_shared_parameters: u64) -> Self {
        let is_changed = limits.change(&valid.experts);
        Self {
            options: is_changed.then(|| in_effect(&limits.routing, &valid.experts)),
            num_shared_parameters: valid.output.expert_use.then_some(num_shared_parameters),
            num_choices: valid.num_choices,
        }
    }
}

fn in_effect(routing: &RoutingOptions, own: &ExpertOptions) -> RoutingInEffect {
    RoutingInEffect {
        top_p: (own.top_p < 1.0).then_some(own.top_p),
        max_experts: own.max_experts,
        router_noise: (routing.noise > 0.0).then_some(routing.noise),
        capacity_factor: routing.capacity.map(|capacity| capacity.factor),
        capacity_mode: routing.capacity.map(|capacity| match capacity.overflow {
            Overflow::Scale => "scale",
            Overflow::Drop => "drop",
        }),
        overload_decay: (routing.overload_decay > 0.0).then_some(routing.overload_decay),
        couples_requests: routing.couples_requests(),
    }
}

impl MoeCount {
    pub fn new(terms: MoeTerms) -> Self {
        Self { terms, ..Self::default() }
    }

    /// Adds what came with tokens of choice `index`. The choices of a prompt share it: it counts once.
    pub fn add(&mut self, index: u32, found: &ExpertUse) {
        let mut found = found.clone();
        found.touched.retain(|&expert| self.touched.insert(expert));
        if found.of_prompt && !index.is_multiple_of(self.terms.num_choices.max(1)) {
            // What was computed for it was, though.
            let (cut, traffic) = (found.cut, found.traffic);
            found = ExpertUse { cut, traffic, ..ExpertUse::default() };
        }
        found.touched.clear();
        self.sum.merge(found);
    }

    pub(super) fn add_delta(&mut self, index: u32, delta: &Delta) {
        if let Some(found) = &delta.expert_use {
            self.add(index, found);
        }
    }

    /// `None` where nothing is to be said.
    pub fn usage(&self) -> Option<MoeUsage> {
        let MoeTerms { options, num_shared_parameters, .. } = self.terms;
        if options.is_none() && num_shared_parameters.is_none() {
            return None;
        }
        let asked = num_shared_parameters.is_some();
        Some(MoeUsage {
            options,
            experts_touched: asked.then(|| self.touched.count()),
            active_parameters: num_shared_parameters.filter(|_| self.sum.num_tokens > 0).map(|shared| {
                let mean = self.sum.num_parameters as f64 / self.sum.num_tokens as f64;
                ActiveParameters {
                    mean: shared + mean.round() as u64,
                    min: shared + self.sum.least_parameters,
                    max: shared + self.sum.most_parameters,
                }
            }),
            dropped_choices: (self.sum.cut.num_dropped > 0).then_some(self.sum.cut.num_dropped),
            scaled_choices: (self.sum.cut.num_scaled > 0).then_some(self.sum.cut.num_scaled),
            expert_cache: self.sum.traffic.map(|traffic| ExpertCacheUse {
                hits: traffic.num_hits,
                misses: traffic.num_misses,
                bytes_moved: traffic.num_bytes,
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use engine::{Capacity, CutChoices, ExpertTraffic};

    use super::*;

    fn part(of_prompt: bool, tokens: [u64; 2], touched: &[u32]) -> ExpertUse {
        ExpertUse {
            of_prompt,
            num_tokens: 2,
            num_parameters: tokens[0] + tokens[1],
            least_parameters: tokens[0],
            most_parameters: tokens[1],
            touched: touched.into(),
            cut: CutChoices { num_dropped: 1, num_scaled: 0 },
            traffic: Some(ExpertTraffic { num_hits: 1, num_misses: 2, num_bytes: 50 }),
        }
    }

    #[test]
    fn a_prompt_counts_once_and_what_was_moved_for_each_choice() {
        let terms = MoeTerms { options: None, num_shared_parameters: Some(1000), num_choices: 2 };
        let mut count = MoeCount::new(terms);
        // Two prompts with two choices each.
        for index in 0..4 {
            count.add(index, &part(true, [10, 20], &[1, 2, 70]));
            count.add(index, &part(false, [4, 30], &[index]));
        }
        let usage = count.usage().unwrap();
        assert_eq!(usage.experts_touched, Some(5));
        let expected = ActiveParameters { mean: 1000 + 16, min: 1004, max: 1030 };
        assert_eq!(usage.active_parameters, Some(expected), "of four prompt tokens and eight others");
        assert_eq!((usage.dropped_choices, usage.scaled_choices), (Some(8), None));
        assert_eq!(usage.expert_cache, Some(ExpertCacheUse { hits: 8, misses: 16, bytes_moved: 400 }));
    }

    #[test]
    fn options_are_named_whether_asked_for_or_not() {
        let capacity = Some(Capacity { factor: 1.5, overflow: Overflow::Drop });
        let routing = RoutingOptions { capacity, noise: 0.0, overload_decay: 0.0 };
        let options = Some(in_effect(&routing, &ExpertOptions { top_p: 0.5, ..ExpertOptions::default() }));
        let count = MoeCount::new(MoeTerms { options, num_shared_parameters: None, num_choices: 1 });
        let expected = serde_json::json!({"options": {
            "top_p": 0.5, "capacity_factor": 1.5, "capacity_mode": "drop", "couples_requests": true,
        }});
        assert_eq!(serde_json::to_value(count.usage()).unwrap(), expected);
        assert_eq!(MoeCount::default().usage(), None);
    }
}
