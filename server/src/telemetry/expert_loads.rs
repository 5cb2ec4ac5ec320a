//! Gauges of how evenly routers spread their tokens: a dozen for each layer, however many experts it has.

use std::time::Duration;

use engine::LoadSums;
use metrics::gauge;

/// What the gauges look back on, and up to ten seconds more: between two scrapes of any scraper.
pub const WINDOW: Duration = Duration::from_secs(60);

/// Sets the gauges of every layer that was used; those of others stay as they are.
pub fn observe(sums: &LoadSums) {
    for (layer, loads) in sums.layers.iter().enumerate() {
        let set = |name: &'static str, value: Option<f64>| {
            if let Some(value) = value {
                gauge!(name, "layer" => layer.to_string()).set(value);
            }
        };
        set("moesaic_expert_imbalance_ratio", loads.imbalance());
        set("moesaic_expert_gini", loads.gini());
        set("moesaic_router_entropy", loads.entropy_bits());
        set("moesaic_expert_utilization", loads.utilization());
        for (rank, share) in (1u32..).zip(loads.hot_shares()) {
            let labels = [("layer", layer.to_string()), ("rank", rank.to_string())];
            gauge!("moesaic_expert_hot_share", &labels).set(share);
        }
    }
}

#[cfg(test)]
mod tests {
    use engine::{LayerLoads, NUM_HOT};
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    fn layer(loads: Vec<u64>, num_places: u64) -> LayerLoads {
        LayerLoads { top_k: 1, num_tokens: loads.iter().sum(), loads, num_places, num_dropped: 0 }
    }

    fn rendered(layers: Vec<LayerLoads>) -> String {
        let recorder = PrometheusBuilder::new().build_recorder();
        let sums = LoadSums { seconds: 1.0, layers, num_mtp: 0 };
        metrics::with_local_recorder(&recorder, || observe(&sums));
        recorder.handle().render()
    }

    fn num_series(text: &str) -> usize {
        text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).count()
    }

    #[test]
    fn a_model_of_61_layers_with_384_experts_has_732_series() {
        let text = rendered((0..61).map(|_| layer((1..=384).collect(), 100_000)).collect());
        assert_eq!(num_series(&text), 61 * (4 + NUM_HOT));
    }

    #[test]
    fn gauges_carry_layer_and_rank() {
        let text = rendered(vec![layer(vec![1, 5, 0, 2], 0), layer(vec![0, 0], 0), layer(vec![2, 2], 8)]);
        for line in [
            "moesaic_expert_imbalance_ratio{layer=\"0\"} 2.5",
            "moesaic_expert_gini{layer=\"2\"} 0",
            "moesaic_router_entropy{layer=\"2\"} 1",
            "moesaic_expert_utilization{layer=\"2\"} 0.5",
            "moesaic_expert_hot_share{layer=\"0\",rank=\"1\"} 0.625",
            "moesaic_expert_hot_share{layer=\"0\",rank=\"4\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing from\n{text}");
        }
        assert!(!text.contains("layer=\"1\""), "a layer without load has no numbers:\n{text}");
        assert!(!text.contains("moesaic_expert_utilization{layer=\"0\"}"), "without capacity there is no utilization");
        assert_eq!(num_series(&text), 3 + 4 + 4 + 2);
    }
}
