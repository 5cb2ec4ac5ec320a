//! Routing counts of a running model, and all router calls of a step for tests.

use std::sync::Arc;

use kernels::{Choices, TopK};

use crate::experts::{ExpertLoads, MoeShape};

/// What the routers of every MoE layer choose, step by step.
#[derive(Debug)]
pub struct RoutingStats {
    loads: Arc<ExpertLoads>,
    /// Distinct experts that the present step used, summed over layers.
    active_in_step: usize,
    /// Router calls of the present step: layers that it left out do not count.
    calls_in_step: usize,
    /// Choices and tokens of the present step, summed over layers.
    choices_in_step: [usize; 2],
    /// Choices of the present step that are still where they were made, by layer.
    later: Vec<(usize, Choices)>,
    /// Router calls of the present step in layer order, if captured.
    capture: Option<Vec<TopK>>,
}

impl RoutingStats {
    /// The last `num_mtp` layers are of multi-token prediction.
    pub fn new(layers: &[MoeShape], num_mtp: usize) -> Self {
        Self {
            loads: Arc::new(ExpertLoads::new(layers, num_mtp)),
            active_in_step: 0,
            calls_in_step: 0,
            choices_in_step: [0; 2],
            later: Vec::new(),
            capture: None,
        }
    }

    /// What was counted, for others to read.
    pub fn loads(&self) -> &Arc<ExpertLoads> {
        &self.loads
    }

    /// Keeps every router call from the next step on, until [`Self::take_capture`].
    pub fn start_capture(&mut self) {
        self.capture = Some(Vec::new());
    }

    /// Router calls since the capture began, in layer order.
    pub fn take_capture(&mut self) -> Vec<TopK> {
        self.capture.take().unwrap_or_default()
    }

    /// Counts the choices of one router call, those that run.
    pub fn record(&mut self, moe_idx: usize, topk: &TopK) {
        if self.calls_in_step == 0 {
            self.loads.begin_step();
        }
        self.calls_in_step += 1;
        self.loads.count(moe_idx, topk);
        let mut seen = vec![false; self.loads.layers()[moe_idx].num_experts];
        self.choices_in_step[1] += topk.experts.len() / topk.k;
        for &expert in topk.experts.iter().filter(|&&expert| expert != TopK::NO_EXPERT) {
            self.choices_in_step[0] += 1;
            self.active_in_step += usize::from(!std::mem::replace(&mut seen[expert as usize], true));
        }
        if let Some(capture) = &mut self.capture {
            capture.push(topk.clone());
        }
    }

    /// Keeps choices for [`Self::take_later`].
    pub fn record_later(&mut self, moe_idx: usize, choices: Choices) {
        self.later.push((moe_idx, choices));
    }

    /// What is to be recorded yet, by layer; waits for a device.
    pub fn take_later(&mut self) -> kernels::Result<Vec<(usize, TopK)>> {
        let (layers, choices): (Vec<usize>, Vec<Choices>) = self.later.drain(..).unzip();
        Ok(layers.into_iter().zip(Choices::all_to_host(choices)?).collect())
    }

    /// Forgets what a step left that failed.
    pub fn begin_step(&mut self) {
        self.later.clear();
    }

    /// Counts that the experts of a layer could take `num_places` tokens of the step together, and that `num_dropped` choices
    /// found theirs full.
    pub fn record_capacity(&self, moe_idx: usize, (num_places, num_dropped): (usize, usize)) {
        self.loads.count_capacity(moe_idx, (num_places, num_dropped));
        metrics::counter!("moesaic_expert_dropped_tokens_total").increment(num_dropped as u64);
    }

    /// Emits how many experts the step woke, per layer that it ran, and how many each of its tokens took of a layer, on average.
    pub fn finish_step(&mut self) {
        let active = std::mem::take(&mut self.active_in_step);
        let calls = std::mem::take(&mut self.calls_in_step);
        if calls > 0 {
            metrics::histogram!("moesaic_experts_per_step").record(active as f64 / calls as f64);
        }
        let [num_choices, num_tokens] = std::mem::take(&mut self.choices_in_step);
        if num_tokens > 0 {
            metrics::histogram!("moesaic_experts_per_token").record(num_choices as f64 / num_tokens as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_loads_and_distinct_experts() {
        let mut stats = RoutingStats::new(&[MoeShape { num_experts: 4, top_k: 2 }; 2], 0);
        stats.start_capture();
        let topk = TopK { experts: vec![0, 1, 0, 3, TopK::NO_EXPERT, TopK::NO_EXPERT], weights: vec![0.5; 6], k: 2 };
        stats.record(1, &topk);
        stats.record_capacity(1, (8, 1));
        let layers = stats.loads().since_start().layers;
        assert_eq!((&layers[0].loads[..], &layers[1].loads[..]), (&[0, 0, 0, 0][..], &[2, 1, 0, 1][..]));
        assert_eq!((layers[1].num_tokens, layers[1].utilization()), (3, Some(0.375)));
        assert_eq!((stats.active_in_step, stats.choices_in_step), (3, [4, 3]));
        assert_eq!(stats.take_capture().len(), 1);
        stats.finish_step();
        assert_eq!((stats.active_in_step, stats.loads().since_start().layers[1].total()), (0, 4));
    }
}
