//! Prometheus metrics under vLLM's names: descriptions, buckets, and what is recorded per request and per scrape.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use engine::EngineHandle;
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use super::expert_loads;

const TTFT_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const TOKEN_SECONDS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const STEP_SECONDS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const ITERATION_TOKENS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const EXPERTS_PER_TOKEN: &[f64] =
    &[0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0, 64.0];
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];

/// Histograms with their buckets and descriptions. Token counts have buckets of their own, see [`token_buckets`].
const HISTOGRAMS: &[(&str, &[f64], &str)] = &[
    ("vllm:time_to_first_token_seconds", TTFT_SECONDS, "Time from a request's arrival to its first token"),
    ("vllm:inter_token_latency_seconds", TOKEN_SECONDS, "Time between two tokens of a sequence"),
    ("vllm:request_time_per_output_token_seconds", TOKEN_SECONDS, "Mean time per token after the first, per sequence"),
    ("vllm:e2e_request_latency_seconds", REQUEST_SECONDS, "Time from a request's arrival to the end of a sequence"),
    ("vllm:request_queue_time_seconds", REQUEST_SECONDS, "Time a sequence waited for its first step"),
    ("vllm:request_prefill_time_seconds", REQUEST_SECONDS, "Time from a sequence's first step to its first token"),
    ("vllm:request_decode_time_seconds", REQUEST_SECONDS, "Time from a sequence's first token to its last"),
    ("vllm:request_inference_time_seconds", REQUEST_SECONDS, "Prefill and decode time of a sequence together"),
    ("vllm:request_params_n", CHOICES, "Choices asked for per prompt"),
    ("vllm:iteration_tokens_total", ITERATION_TOKENS, "Prompt and decode tokens of a step"),
    ("moesaic_step_seconds", STEP_SECONDS, "Time of a step by phase"),
    ("moesaic_expert_load_seconds", STEP_SECONDS, "Time of reading one expert"),
    ("moesaic_experts_per_step", ITERATION_TOKENS, "Distinct experts that a step computed"),
    ("moesaic_experts_per_token", EXPERTS_PER_TOKEN, "Experts that ran for a token of a layer, mean of a step"),
    ("http_request_duration_seconds", REQUEST_SECONDS, "Time from a request's head to its response's head"),
];
const TOKEN_COUNTS: &[(&str, &str)] = &[
    ("vllm:request_prompt_tokens", "Prompt tokens of a sequence"),
    ("vllm:request_generation_tokens", "Generated tokens of a sequence"),
    ("vllm:request_params_max_tokens", "Most tokens a sequence may generate"),
];
const COUNTERS: &[(&str, &str)] = &[
    (
        "vllm:prompt_tokens_total",
        "Prompt tokens computed or taken from the prefix cache; answers of the output cache have none",
    ),
    ("vllm:prompt_tokens_cached_total", "Prompt tokens taken from a cache"),
    ("vllm:prompt_tokens_cached_by_source_total", "Prompt tokens taken from a cache, by which"),
    ("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache"),
    ("vllm:prefix_cache_hits_total", "Prompt tokens that the prefix cache had"),
    ("vllm:external_prefix_cache_queries_total", "Prompt tokens of full blocks looked up in tiers beyond the KV cache"),
    ("vllm:external_prefix_cache_hits_total", "Prompt tokens whose blocks were loaded from such a tier"),
    (
        "moesaic_kv_tier_decisions_total",
        "Prompts known in such a tier, by whether loading or computing was expected to be faster",
    ),
    ("vllm:generation_tokens_total", "Tokens generated"),
    ("vllm:request_success_total", "Sequences ended, by reason"),
    ("vllm:num_preemptions_total", "Sequences that lost their KV blocks to others and were computed again"),
    ("vllm:corrupted_requests_total", "Sequences ended because the model produced NaN"),
    ("moesaic_expert_dropped_tokens_total", "Tokens that found their expert full and got nothing from it"),
    ("moesaic_expert_scaled_tokens_total", "Tokens whose expert was above its capacity and counted for less"),
    ("moesaic_expert_left_out_choices_total", "Experts of tokens that requests did without, by top-p or number"),
    (
        "moesaic_routing_expected_experts_total",
        "Experts that blocks were expected to use, by who said so: known_blocks of themselves, prior_blocks of those behind",
    ),
    ("moesaic_routing_used_experts_total", "Experts that those blocks used when they were computed"),
    ("moesaic_routing_confirmed_experts_total", "Experts that were expected and used"),
    ("moesaic_expert_cache_hits_total", "Experts that a layer of a step needed and that were in memory"),
    ("moesaic_expert_cache_misses_total", "Experts that it had to wait for"),
    ("moesaic_expert_cache_evictions_total", "Experts that went for others"),
    ("moesaic_expert_prefetch_issued_total", "Experts read ahead of their use"),
    ("moesaic_expert_prefetch_used_total", "Of these, those that were there when they were needed"),
    ("moesaic_expert_prefetch_late_total", "Of these, those that were needed before they were there"),
    ("moesaic_expert_prefetch_wasted_total", "Of these, those that went unused"),
    ("moesaic_expert_read_bytes_total", "Bytes of experts read from the disk or the page cache"),
    ("moesaic_expert_faults_total", "Experts that a layer of a step needed and that could not be read"),
    ("moesaic_routing_unlearned_blocks_total", "Computed blocks whose routing was not kept because too many waited"),
    ("vllm:admission_rejections_total", "Requests refused at the door, by reason"),
    ("http_requests_total", "HTTP requests by route, method and status"),
];
const GAUGES: &[(&str, &str)] = &[
    ("vllm:num_requests_running", "Sequences in the running batch"),
    ("vllm:num_requests_waiting", "Sequences waiting for their first step"),
    ("vllm:num_requests_waiting_by_reason", "Sequences waiting, by what for; capacity is room in the batch"),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 1 is full; cached ones are not in use"),
    ("moesaic_state_slots_usage_perc", "Share of recurrent states in use, 1 is full; only of models that have them"),
    (
        "moesaic_window_blocks_usage_perc",
        "Share of the blocks of layers with a window that running requests hold, 1 is full",
    ),
    (
        "moesaic_window_blocks_kept_perc",
        "Share of the blocks of layers with a window that are kept for requests that begin alike",
    ),
    ("moesaic_state_snapshots_usage_perc", "Share of the places for kept recurrent states that are taken, 1 is full"),
    ("vllm:cache_config_info", "The KV cache's settings as labels"),
    ("moesaic_device_memory_bytes", "Bytes of the GPU's memory, where the model computes on one"),
    ("moesaic_device_step_bytes", "Bytes of it that are kept for steps, as the largest one took at the start"),
    ("moesaic_weight_bytes", "Bytes of the weights in memory, with the formats of the matrices as a label"),
    (
        "moesaic_routing_accuracy",
        "Recall of predicted experts: of those used the share that was expected, by predictor; next_layer asks routers ahead",
    ),
    ("moesaic_routing_precision", "Of the experts that were expected, the share that was used, by predictor"),
    ("moesaic_routing_layer_accuracy", "Recall of the predictor next_layer, by layer"),
    (
        "moesaic_expert_resident_bytes",
        "Bytes of the experts in memory or on their way, of a model under --expert-memory",
    ),
    ("moesaic_expert_memory_bytes", "Bytes that they may take"),
    ("moesaic_expert_wait_share", "Share of the time of steps spent waiting for experts, over the last twenty or so"),
    ("moesaic_routing_cache_bytes", "Bytes of memory that hold the routing of blocks"),
    ("moesaic_routing_cache_entries", "Blocks whose routing is in memory"),
    ("moesaic_kv_tier_bytes", "Bytes of prompts' blocks in a tier beyond the KV cache, where it can tell"),
    ("moesaic_kv_tier_entries", "Blocks of prompts in such a tier"),
    ("moesaic_expert_imbalance_ratio", "Load of the busiest expert over the mean, by layer, in the last minute"),
    ("moesaic_expert_gini", "Gini coefficient of the experts' loads, by layer: 0 is even"),
    ("moesaic_router_entropy", "Entropy of the experts' loads in bits, by layer: log2 of the experts is even"),
    ("moesaic_expert_hot_share", "Share of a layer's load that its hottest experts have, by rank"),
    (
        "moesaic_expert_utilization",
        "Of the tokens that experts could have taken, the share that they took; by layer, where there is a capacity",
    ),
];

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the recorder, once per process, with `model_name` and `engine` on every metric.
///
/// # Errors
/// Another recorder was installed before.
pub fn install(model_name: &str) -> Result<PrometheusHandle, BuildError> {
    if let Some(handle) = RECORDER.get() {
        return Ok(handle.clone());
    }
    let mut builder =
        PrometheusBuilder::new().add_global_label("model_name", model_name).add_global_label("engine", "0");
    for (name, buckets, _) in HISTOGRAMS {
        builder = builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets)?;
    }
    for (name, _) in TOKEN_COUNTS {
        builder = builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), &token_buckets())?;
    }
    let cache_seconds = Matcher::Full("moesaic_cache_seconds".to_owned());
    builder = builder.set_buckets_for_metric(cache_seconds, cache::SECONDS_BUCKETS)?;
    // Whatever else is recorded is a histogram too, never a summary.
    let handle = builder.set_buckets(REQUEST_SECONDS)?.install_recorder()?;
    describe();
    Ok(RECORDER.get_or_init(|| handle).clone())
}

/// Sets what is read from the engine at each scrape.
pub fn observe_engine(engine: &EngineHandle) {
    let stats = engine.stats();
    gauge!("vllm:num_requests_running").set(stats.num_running as f64);
    gauge!("vllm:num_requests_waiting").set(stats.num_waiting as f64);
    // Nothing else is waited for yet: vLLM's other reason, deferred, is for transfers and adapters.
    gauge!("vllm:num_requests_waiting_by_reason", "reason" => "capacity").set(stats.num_waiting as f64);
    gauge!("vllm:kv_cache_usage_perc").set(stats.num_used_blocks as f64 / stats.num_total_blocks.max(1) as f64);
    if stats.num_total_state_slots > 0 {
        let share = stats.num_used_state_slots as f64 / stats.num_total_state_slots as f64;
        gauge!("moesaic_state_slots_usage_perc").set(share);
    }
    if stats.num_total_window_blocks > 0 {
        let share = |blocks: usize| blocks as f64 / stats.num_total_window_blocks as f64;
        gauge!("moesaic_window_blocks_usage_perc").set(share(stats.num_used_window_blocks));
        gauge!("moesaic_window_blocks_kept_perc").set(share(stats.num_cached_window_blocks));
    }
    if stats.num_total_snapshot_slots > 0 {
        let share = stats.num_snapshots as f64 / stats.num_total_snapshot_slots as f64;
        gauge!("moesaic_state_snapshots_usage_perc").set(share);
    }
    counter!("vllm:prompt_tokens_total").absolute(stats.num_prompt_tokens);
    counter!("vllm:prompt_tokens_cached_total").absolute(stats.num_prefix_hits + stats.num_loaded);
    counter!("vllm:prompt_tokens_cached_by_source_total", "source" => "local_cache_hit")
        .absolute(stats.num_prefix_hits);
    counter!("vllm:prompt_tokens_cached_by_source_total", "source" => "external_kv_transfer")
        .absolute(stats.num_loaded);
    counter!("vllm:prefix_cache_queries_total").absolute(stats.num_prefix_queries);
    counter!("vllm:prefix_cache_hits_total").absolute(stats.num_prefix_hits);
    counter!("vllm:external_prefix_cache_hits_total").absolute(stats.num_loaded);
    counter!("vllm:generation_tokens_total").absolute(stats.num_generation_tokens);
    counter!("vllm:num_preemptions_total").absolute(stats.num_preemptions);
    counter!("vllm:corrupted_requests_total").absolute(stats.num_corrupted);
    let model = engine.model();
    gauge!(
        "vllm:cache_config_info",
        "block_size" => model.block_size.to_string(),
        "num_gpu_blocks" => model.num_blocks.to_string(),
        "cache_dtype" => model.kv_dtype,
        "enable_prefix_caching" => if model.has_prefix_cache { "True" } else { "False" }
    )
    .set(1.0);
    if let (Some(memory), Some(step_bytes)) = (model.device_memory, model.device_step_bytes) {
        gauge!("moesaic_device_memory_bytes").set(memory.total_bytes as f64);
        gauge!("moesaic_device_step_bytes").set(step_bytes as f64);
    }
    gauge!("moesaic_weight_bytes", "format" => model.weight_formats.join("+")).set(model.weight_bytes as f64);
    expert_loads::observe(&engine.expert_loads().over(expert_loads::WINDOW));
}

/// Counts a request that was refused at the door.
pub fn rejected(reason: &'static str) {
    counter!("vllm:admission_rejections_total", "reason" => reason).increment(1);
}

/// What is known about a sequence when it starts.
#[derive(Clone, Copy, Debug)]
pub struct RequestFacts {
    pub arrival: Instant,
    pub num_prompt_tokens: usize,
    pub num_choices: u32,
    pub max_tokens: usize,
}

/// Measures one sequence; one that is dropped before its end counts as aborted.
#[derive(Debug)]
pub struct ChoiceMeter {
    facts: RequestFacts,
    scheduled: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    num_tokens: usize,
    /// It was there as a whole: the time between its tokens says nothing.
    is_stored: bool,
    ended: bool,
}

impl ChoiceMeter {
    pub fn new(facts: RequestFacts) -> Self {
        Self {
            facts,
            scheduled: None,
            first_token: None,
            last_token: None,
            num_tokens: 0,
            is_stored: false,
            ended: false,
        }
    }

    /// For a sequence that was there as a whole, or not.
    #[must_use]
    pub fn stored(mut self, is_stored: bool) -> Self {
        self.is_stored = is_stored;
        self
    }

    /// The first rows of the sequence are being computed, `queue` after it was submitted.
    pub fn scheduled(&mut self, queue: Duration) {
        histogram!("vllm:request_queue_time_seconds").record(queue);
        self.scheduled = Some(Instant::now());
    }

    /// A token arrived.
    pub fn token(&mut self) {
        let now = Instant::now();
        match self.last_token {
            None => histogram!("vllm:time_to_first_token_seconds").record(now - self.facts.arrival),
            Some(_) if self.is_stored => {}
            Some(last) => histogram!("vllm:inter_token_latency_seconds").record(now - last),
        }
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        self.num_tokens += 1;
    }

    /// The sequence was there as a whole, with so many tokens.
    pub fn replayed(mut self, num_tokens: usize, reason: &'static str) {
        if num_tokens > 0 {
            histogram!("vllm:time_to_first_token_seconds").record(self.facts.arrival.elapsed());
        }
        self.num_tokens = num_tokens;
        self.finished(reason);
    }

    /// The sequence ended.
    pub fn finished(&mut self, reason: &'static str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        counter!("vllm:request_success_total", "finished_reason" => reason).increment(1);
        histogram!("vllm:e2e_request_latency_seconds").record(self.facts.arrival.elapsed());
        histogram!("vllm:request_prompt_tokens").record(self.facts.num_prompt_tokens as f64);
        histogram!("vllm:request_generation_tokens").record(self.num_tokens as f64);
        histogram!("vllm:request_params_n").record(f64::from(self.facts.num_choices));
        histogram!("vllm:request_params_max_tokens").record(self.facts.max_tokens as f64);
        let is_timed = !self.is_stored;
        if let (true, Some(first), Some(last), 2..) = (is_timed, self.first_token, self.last_token, self.num_tokens) {
            let per_token = (last - first).as_secs_f64() / (self.num_tokens - 1) as f64;
            histogram!("vllm:request_time_per_output_token_seconds").record(per_token);
        }
        if let (Some(scheduled), Some(first), Some(last)) = (self.scheduled, self.first_token, self.last_token) {
            histogram!("vllm:request_prefill_time_seconds").record(first - scheduled);
            histogram!("vllm:request_decode_time_seconds").record(last - first);
            histogram!("vllm:request_inference_time_seconds").record(last - scheduled);
        }
    }
}

impl Drop for ChoiceMeter {
    fn drop(&mut self) {
        self.finished("abort");
    }
}

fn describe() {
    for (name, _, text) in HISTOGRAMS {
        let unit = if name.ends_with("_seconds") { Unit::Seconds } else { Unit::Count };
        describe_histogram!(*name, unit, *text);
    }
    for (name, text) in TOKEN_COUNTS {
        describe_histogram!(*name, Unit::Count, *text);
    }
    for (name, text) in COUNTERS {
        describe_counter!(*name, *text);
    }
    for (name, text) in GAUGES {
        describe_gauge!(*name, *text);
    }
    cache::describe();
    // Series that exist before their first event keep rates right.
    for reason in ["stop", "length", "abort", "error"] {
        counter!("vllm:request_success_total", "finished_reason" => reason).absolute(0);
    }
}

/// 1, 2, 5, 10, … up to 1,000,000: the recorder is installed before the model's length is known.
fn token_buckets() -> Vec<f64> {
    (0..7)
        .flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)))
        .filter(|&edge| edge <= 1e6)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_rendered_under_vllm_names_with_their_labels() {
        let handle = install("m").unwrap();
        let facts = RequestFacts { arrival: Instant::now(), num_prompt_tokens: 7, num_choices: 1, max_tokens: 9 };
        let mut meter = ChoiceMeter::new(facts);
        meter.scheduled(Duration::from_millis(1));
        meter.token();
        meter.token();
        meter.finished("stop");
        drop(meter);
        rejected("queue_full");
        let text = handle.render();
        for line in [
            "# HELP vllm:time_to_first_token_seconds ",
            "# TYPE vllm:time_to_first_token_seconds histogram",
            "vllm:request_success_total{model_name=\"m\",engine=\"0\",finished_reason=\"stop\"} ",
            "vllm:admission_rejections_total{model_name=\"m\",engine=\"0\",reason=\"queue_full\"} ",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"m\",engine=\"0\",le=\"0.001\"} ",
        ] {
            assert!(text.contains(line), "{line} is missing from\n{text}");
        }
    }

    #[test]
    fn token_buckets_are_a_1_2_5_series() {
        let buckets = token_buckets();
        assert_eq!((buckets[..5].to_vec(), buckets.last()), (vec![1.0, 2.0, 5.0, 10.0, 20.0], Some(&1e6)));
    }
}
