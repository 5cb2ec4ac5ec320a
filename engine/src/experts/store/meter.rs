//! What the store counts, told to the metrics once a step.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use metrics::{counter, gauge, histogram};

use super::prediction::Recall;

/// What of the sums stays from step to step: the share of waiting follows the last twenty or so.
const REMEMBERED: f64 = 0.95;

/// How often the recall of predictions is told: a gauge for each layer costs more than a step may.
const RECALL_PERIOD: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Meter {
    /// Needed and there.
    pub(super) num_hits: u64,
    /// Needed and not there, or not yet.
    pub(super) num_misses: u64,
    pub(super) num_evictions: u64,
    /// Read ahead.
    pub(super) num_issued: u64,
    /// Of these, there when they were needed.
    pub(super) num_used: u64,
    /// Of these, needed before they were there.
    pub(super) num_late: u64,
    /// Needed and not to be had.
    pub(super) num_faults: u64,
    /// Of the present step.
    pub(super) waited: Duration,
    started: Option<Instant>,
    /// Seconds of waiting and of steps, the older the less.
    sums: [f64; 2],
    num_wasted: u64,
    recalls_published: Option<Instant>,
}

impl Meter {
    pub(super) fn begin_step(&mut self) {
        self.started = Some(Instant::now());
    }

    /// `num_wasted` and `used_bytes` as of now.
    pub(super) fn finish_step(&mut self, num_wasted: u64, used_bytes: u64, recalls: Option<&BTreeMap<usize, Recall>>) {
        let step = self.started.take().map_or(Duration::ZERO, |started| started.elapsed());
        let waited = std::mem::take(&mut self.waited);
        histogram!("moesaic_step_seconds", "phase" => "expert_wait").record(waited);
        for (sum, seconds) in self.sums.iter_mut().zip([waited, step]) {
            *sum = *sum * REMEMBERED + seconds.as_secs_f64();
        }
        gauge!("moesaic_expert_wait_share").set(if self.sums[1] > 0.0 { self.sums[0] / self.sums[1] } else { 0.0 });
        self.publish(num_wasted, used_bytes);
        let is_due = self.recalls_published.is_none_or(|at| at.elapsed() >= RECALL_PERIOD);
        if let Some(recalls) = recalls.filter(|recalls| is_due && !recalls.is_empty()) {
            publish_recalls(recalls);
            self.recalls_published = Some(Instant::now());
        }
    }

    /// What is counted outside of steps too.
    pub(super) fn publish(&mut self, num_wasted: u64, used_bytes: u64) {
        for (name, count) in [
            ("moesaic_expert_cache_hits_total", &mut self.num_hits),
            ("moesaic_expert_cache_misses_total", &mut self.num_misses),
            ("moesaic_expert_cache_evictions_total", &mut self.num_evictions),
            ("moesaic_expert_prefetch_issued_total", &mut self.num_issued),
            ("moesaic_expert_prefetch_used_total", &mut self.num_used),
            ("moesaic_expert_prefetch_late_total", &mut self.num_late),
            ("moesaic_expert_faults_total", &mut self.num_faults),
        ] {
            counter!(name).increment(std::mem::take(count));
        }
        counter!("moesaic_expert_prefetch_wasted_total").increment(num_wasted - self.num_wasted);
        self.num_wasted = num_wasted;
        gauge!("moesaic_expert_resident_bytes").set(used_bytes as f64);
    }
}

/// How right the predictions of the next layer's experts were since the start, in all and by layer.
fn publish_recalls(recalls: &BTreeMap<usize, Recall>) {
    let all: Recall = recalls.values().copied().sum();
    gauge!("moesaic_routing_accuracy", "predictor" => "next_layer").set(all.share());
    for (layer, recall) in recalls {
        gauge!("moesaic_routing_layer_accuracy", "layer" => layer.to_string()).set(recall.share());
    }
}
