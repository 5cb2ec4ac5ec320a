//! Sends the requests of a run, so many at a time, and times the answers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

use super::prompts::{PromptSource, rng_of};
use super::{Endpoint, Streaming};
use crate::cli::client::{Answer, Client, ClientError, TokenUsage};

/// TLS and JSON fit in this with room to spare; thousands of threads should not take gigabytes.
const STACK_BYTES: usize = 512 << 10;

/// What all runs have in common.
pub struct Load {
    pub client: Client,
    pub endpoint: Endpoint,
    pub stream: Streaming,
    pub model: String,
    pub source: PromptSource,
    pub seed: u64,
    pub num_prompt_tokens: usize,
    pub num_output_tokens: usize,
}

pub struct RunPlan {
    pub run_idx: usize,
    /// At least 1.
    pub concurrency: usize,
    pub num_requests: usize,
}

pub struct RunOutcome {
    pub concurrency: usize,
    /// From the first request sent to the last one ended.
    pub duration: Duration,
    pub samples: Vec<Sample>,
    pub failures: Vec<ClientError>,
}

/// Times of one answered request, all since it was sent.
pub struct Sample {
    /// When output came: one entry per chunk that had any. Empty without streaming.
    pub arrivals: Vec<Duration>,
    pub end: Duration,
    pub num_prompt_tokens: Option<usize>,
    pub num_output_tokens: usize,
    pub counted_by: CountedBy,
}

/// What the output tokens were counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CountedBy {
    /// The ids in the answer.
    TokenIds,
    /// The server's word.
    Usage,
}

/// The tokens of an answer, as far as it was read.
#[derive(Default)]
struct TokenCount {
    num_ids: Option<usize>,
    usage: Option<TokenUsage>,
}

impl Load {
    /// Sends `num_requests` one after the other.
    ///
    /// # Errors
    /// The first that fails: nothing would be learned from a run.
    pub fn warm_up(&self, plan: &RunPlan, num_requests: usize) -> Result<(), ClientError> {
        // Behind those of the run: a prompt must not be in a cache when it counts.
        (0..num_requests).try_for_each(|idx| self.request(plan.run_idx, plan.num_requests + idx).map(drop))
    }

    /// Sends all requests of `plan` and waits for their ends.
    ///
    /// # Errors
    /// Threads that cannot be started. Failed requests are part of the outcome.
    pub fn run(&self, plan: &RunPlan) -> anyhow::Result<RunOutcome> {
        let num_threads = plan.concurrency.min(plan.num_requests);
        let bar = progress_bar(plan);
        let next_idx = AtomicUsize::new(0);
        let start = Instant::now();
        let stream = || {
            let (mut samples, mut failures) = (Vec::new(), Vec::new());
            loop {
                let request_idx = next_idx.fetch_add(1, Ordering::Relaxed);
                if request_idx >= plan.num_requests {
                    return (samples, failures);
                }
                match self.request(plan.run_idx, request_idx) {
                    Ok(sample) => samples.push(sample),
                    Err(error) => failures.push(error),
                }
                bar.inc(1);
            }
        };
        let parts = thread::scope(|scope| {
            let start_one = |_| thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, stream);
            let threads: Result<Vec<_>, _> = (0..num_threads).map(start_one).collect();
            // Those that did start must not work through all requests first.
            let threads = threads.inspect_err(|_| next_idx.store(plan.num_requests, Ordering::Relaxed))?;
            Ok(threads.into_iter().map(|thread| thread.join().expect("a client thread panicked")).collect::<Vec<_>>())
        });
        let parts = parts.map_err(|error: std::io::Error| error).context("cannot start a thread per request")?;
        let duration = start.elapsed();
        bar.finish_and_clear();
        let (samples, failures): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        Ok(RunOutcome {
            concurrency: plan.concurrency,
            duration,
            samples: samples.into_iter().flatten().collect(),
            failures: failures.into_iter().flatten().collect(),
        })
    }

    fn request(&self, run_idx: usize, request_idx: usize) -> Result<Sample, ClientError> {
        let prompt = self.source.draw(self.num_prompt_tokens, &mut rng_of(self.seed, run_idx, request_idx));
        let num_prompt_tokens = prompt.num_tokens();
        let (field, value) = prompt.into_field(self.endpoint);
        let mut body = self.body();
        body[field] = value;
        let path = self.endpoint.path();
        let mut sample = match self.stream {
            Streaming::Always => self.stream_answer(path, &body),
            Streaming::Never => self.whole_answer(path, &body),
        }?;
        sample.num_prompt_tokens = num_prompt_tokens.or(sample.num_prompt_tokens);
        Ok(sample)
    }

    fn body(&self) -> Value {
        let mut body = json!({
            "model": self.model,
            "max_tokens": self.num_output_tokens,
            "min_tokens": self.num_output_tokens,
            "ignore_eos": true,
            "temperature": 0,
            "return_token_ids": true,
            "stream": self.stream == Streaming::Always,
        });
        if self.stream == Streaming::Always {
            body["stream_options"] = json!({"include_usage": true});
        }
        body
    }

    fn stream_answer(&self, path: &str, body: &Value) -> Result<Sample, ClientError> {
        let start = Instant::now();
        let mut chunks = self.client.post_streaming(path, body)?;
        let mut arrivals = Vec::with_capacity(self.num_output_tokens.min(1 << 16));
        let mut count = TokenCount::default();
        while let Some(chunk) = chunks.next_chunk()? {
            let now = start.elapsed();
            if count.add(&chunk) {
                arrivals.push(now);
            }
        }
        let end = start.elapsed();
        chunks.finish();
        count.into_sample(arrivals, end).ok_or_else(|| self.uncounted(path))
    }

    fn whole_answer(&self, path: &str, body: &Value) -> Result<Sample, ClientError> {
        let start = Instant::now();
        let answer = self.client.post::<Answer>(path, body)?;
        let end = start.elapsed();
        let mut count = TokenCount::default();
        count.add(&answer);
        count.into_sample(Vec::new(), end).ok_or_else(|| self.uncounted(path))
    }

    fn uncounted(&self, path: &str) -> ClientError {
        let url = format!("{}{path}", self.client.base_url());
        ClientError::BadAnswer { url, reason: "it has neither token ids nor a usage to count tokens by".to_owned() }
    }
}

impl TokenCount {
    /// Whether the chunk has output.
    fn add(&mut self, chunk: &Answer) -> bool {
        self.usage = chunk.usage.or(self.usage);
        for ids in chunk.choices.iter().filter_map(|choice| choice.token_ids.as_ref()) {
            self.num_ids = Some(self.num_ids.unwrap_or(0) + ids.len());
        }
        chunk.choices.iter().any(|choice| choice.has_output())
    }

    fn into_sample(self, arrivals: Vec<Duration>, end: Duration) -> Option<Sample> {
        let by_usage = self.usage.map(|usage| (usage.completion_tokens, CountedBy::Usage));
        let (num_output_tokens, counted_by) = self.num_ids.map(|num| (num, CountedBy::TokenIds)).or(by_usage)?;
        let num_prompt_tokens = self.usage.map(|usage| usage.prompt_tokens);
        Some(Sample { arrivals, end, num_prompt_tokens, num_output_tokens, counted_by })
    }
}

/// Drawn on stderr, where that is a terminal.
fn progress_bar(plan: &RunPlan) -> ProgressBar {
    let style = "concurrency {msg} {bar:40} {pos}/{len} requests {elapsed}";
    let style = ProgressStyle::with_template(style).expect("the template is constant and valid");
    ProgressBar::new(plan.num_requests as u64).with_style(style).with_message(plan.concurrency.to_string())
}
