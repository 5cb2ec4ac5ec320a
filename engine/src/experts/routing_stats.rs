//! Routing counts of a running model, and all router calls of a step for tests.

use kernels::TopK;

use crate::experts::MoeShape;

/// Tokens per expert of every MoE layer since the last publication.
#[derive(Debug)]
pub struct RoutingStats {
    /// `[moe layer][expert]`.
    loads: Vec<Vec<u64>>,
    /// Distinct experts that the present step used, summed over layers.
    active_in_step: usize,
    /// Router calls of the present step: layers that it left out do not count.
    calls_in_step: usize,
    /// Router calls of the present step in layer order, if captured.
    capture: Option<Vec<TopK>>,
}

impl RoutingStats {
    pub fn new(layers: &[MoeShape]) -> Self {
        let loads = layers.iter().map(|layer| vec![0; layer.num_experts]).collect();
        Self { loads, active_in_step: 0, calls_in_step: 0, capture: None }
    }

    /// Keeps every router call from the next step on, until [`Self::take_capture`].
    pub fn start_capture(&mut self) {
        self.capture = Some(Vec::new());
    }

    /// Router calls since the capture began, in layer order.
    pub fn take_capture(&mut self) -> Vec<TopK> {
        self.capture.take().unwrap_or_default()
    }

    /// Counts the choices of one router call.
    pub fn record(&mut self, moe_idx: usize, topk: &TopK) {
        self.calls_in_step += 1;
        let mut seen = vec![false; self.loads[moe_idx].len()];
        for &expert in &topk.experts {
            self.loads[moe_idx][expert as usize] += 1;
            self.active_in_step += usize::from(!std::mem::replace(&mut seen[expert as usize], true));
        }
        if let Some(capture) = &mut self.capture {
            capture.push(topk.clone());
        }
    }

    /// Counts tokens that found their expert full.
    pub fn record_dropped(&self, num_dropped: usize) {
        metrics::counter!("moesaic_expert_dropped_tokens_total").increment(num_dropped as u64);
    }

    /// Emits how many experts the step woke, per layer that it ran, on average.
    pub fn finish_step(&mut self) {
        let active = std::mem::take(&mut self.active_in_step);
        let calls = std::mem::take(&mut self.calls_in_step);
        if calls > 0 {
            metrics::histogram!("moesaic_experts_per_step").record(active as f64 / calls as f64);
        }
    }

    /// Emits the imbalance of every layer's loads (largest over mean) and starts counting anew.
    pub fn publish(&mut self) {
        for (layer, loads) in self.loads.iter_mut().enumerate() {
            let total: u64 = loads.iter().sum();
            if total > 0 {
                let largest = loads.iter().copied().max().unwrap_or(0);
                let ratio = largest as f64 * loads.len() as f64 / total as f64;
                metrics::gauge!("moesaic_expert_imbalance_ratio", "layer" => layer.to_string()).set(ratio);
            }
            loads.fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_loads_and_distinct_experts() {
        let mut stats = RoutingStats::new(&[MoeShape { num_experts: 4, top_k: 1 }; 2]);
        stats.start_capture();
        let topk = TopK { experts: vec![0, 1, 0, 3], weights: vec![0.5; 4], k: 2 };
        stats.record(1, &topk);
        assert_eq!(stats.loads, [[0, 0, 0, 0], [2, 1, 0, 1]]);
        assert_eq!(stats.active_in_step, 3);
        assert_eq!(stats.take_capture().len(), 1);
        stats.finish_step();
        stats.publish();
        assert_eq!((stats.active_in_step, stats.loads[1].iter().sum::<u64>()), (0, 0));
    }
}
