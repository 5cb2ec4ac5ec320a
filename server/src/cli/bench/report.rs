//! From times to figures: rates, percentiles, the table and the JSON.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use anyhow::anyhow;
use serde::Serialize;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use super::load::{CountedBy, RunOutcome, Sample};
use super::prompts::PromptKind;
use super::{Endpoint, Streaming};

#[derive(Debug, Serialize)]
pub struct Report {
    pub version: &'static str,
    /// What was typed, keys replaced.
    pub command: String,
    pub url: String,
    pub model: String,
    pub machine: Machine,
    /// In UTC.
    pub started_at: String,
    pub seed: u64,
    pub endpoint: Endpoint,
    pub stream: Streaming,
    pub prompts: PromptKind,
    /// Asked for, per request.
    pub prompt_tokens: usize,
    /// Asked for, per request.
    pub output_tokens: usize,
    pub runs: Vec<RunReport>,
}

/// The machine that the client runs on.
#[derive(Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    /// Logical ones that this process may use.
    pub cores: usize,
    pub memory_bytes: u64,
}

#[derive(Debug, Serialize)]
pub struct RunReport {
    pub concurrency: usize,
    pub num_requests: usize,
    pub num_succeeded: usize,
    /// Answered, but with fewer or more tokens than asked for.
    pub num_other_lengths: usize,
    pub errors: BTreeMap<String, ErrorReport>,
    pub duration_s: f64,
    /// Of answered requests, as are all figures below.
    pub requests_per_s: f64,
    pub output_tokens_per_s: f64,
    /// Prompt and output; absent where the server does not count prompts that are words.
    pub total_tokens_per_s: Option<f64>,
    pub num_prompt_tokens: Option<usize>,
    pub num_output_tokens: usize,
    /// The weakest of all requests; absent where none was answered.
    pub tokens_counted_by: Option<CountedBy>,
    /// From sending a request to its first output.
    pub ttft_ms: Option<Stats>,
    /// Per request: from its first output to its last, by the tokens after the first.
    pub tpot_ms: Option<Stats>,
    /// Between chunks with output that follow each other.
    pub itl_ms: Option<Stats>,
    /// From sending a request to the end of its answer.
    pub e2e_ms: Option<Stats>,
}

#[derive(Debug, Serialize)]
pub struct ErrorReport {
    pub count: usize,
    /// The text of one of them.
    pub example: String,
}

/// In the unit of its samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Stats {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

impl Stats {
    /// `None` without samples.
    pub fn new(mut samples: Vec<f64>) -> Option<Self> {
        if samples.is_empty() {
            return None;
        }
        samples.sort_unstable_by(f64::total_cmp);
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        let [p50, p90, p99] = [50.0, 90.0, 99.0].map(|percent| percentile(&samples, percent));
        Some(Self { mean, p50, p90, p99 })
    }
}

/// Linear between the two nearest ranks, as numpy's default. `sorted` is not empty, `percent` is in 0..=100.
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let rank = percent / 100.0 * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    below + (above - below) * rank.fract()
}

impl Machine {
    /// # Errors
    /// A system that gives no such information.
    pub fn this() -> anyhow::Result<Self> {
        let wanted = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system =
            System::new_with_specifics(wanted).map_err(|error| anyhow!("cannot read what machine this is: {error}"))?;
        Ok(Self {
            cpu: system.cpus().first().map_or("unknown", |cpu| cpu.brand().trim()).to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: system.total_memory(),
        })
    }
}

impl RunReport {
    /// `num_asked`: output tokens that each request asked for.
    pub fn new(outcome: RunOutcome, num_asked: usize) -> Self {
        let RunOutcome { concurrency, duration, samples, failures } = outcome;
        let num_requests = samples.len() + failures.len();
        let mut errors: BTreeMap<String, ErrorReport> = BTreeMap::new();
        for error in failures {
            let entry = errors.entry(error.kind());
            entry.or_insert_with(|| ErrorReport { count: 0, example: error.to_string() }).count += 1;
        }
        let duration_s = duration.as_secs_f64();
        let num_output_tokens = samples.iter().map(|sample| sample.num_output_tokens).sum();
        let num_prompt_tokens = samples.iter().map(|sample| sample.num_prompt_tokens).sum::<Option<usize>>();
        let per_s = |count: usize| count as f64 / duration_s;
        let stats = |times: &dyn Fn(&Sample) -> Vec<f64>| Stats::new(samples.iter().flat_map(times).collect());
        Self {
            concurrency,
            num_requests,
            num_succeeded: samples.len(),
            num_other_lengths: samples.iter().filter(|sample| sample.num_output_tokens != num_asked).count(),
            errors,
            duration_s,
            requests_per_s: per_s(samples.len()),
            output_tokens_per_s: per_s(num_output_tokens),
            total_tokens_per_s: num_prompt_tokens.map(|num| per_s(num + num_output_tokens)),
            num_prompt_tokens,
            num_output_tokens,
            tokens_counted_by: samples.iter().map(|sample| sample.counted_by).max(),
            ttft_ms: stats(&|sample| sample.arrivals.first().map(|first| ms(*first)).into_iter().collect()),
            tpot_ms: stats(&|sample| ms_per_token(sample).into_iter().collect()),
            itl_ms: stats(&|sample| sample.arrivals.windows(2).map(|pair| ms(pair[1] - pair[0])).collect()),
            e2e_ms: stats(&|sample| vec![ms(sample.end)]),
        }
    }

    pub fn num_failed(&self) -> usize {
        self.num_requests - self.num_succeeded
    }

    /// # Errors
    /// Those of `out`.
    pub fn write_row(&self, out: &mut dyn Write) -> io::Result<()> {
        let rate = |rate: f64| format!("{rate:.2}");
        let mut cells = vec![
            self.concurrency.to_string(),
            self.num_requests.to_string(),
            self.num_failed().to_string(),
            rate(self.requests_per_s),
            rate(self.output_tokens_per_s),
            self.total_tokens_per_s.map_or_else(missing, rate),
        ];
        for stats in [self.ttft_ms, self.tpot_ms, self.itl_ms, self.e2e_ms] {
            cells.extend(match stats {
                Some(stats) => [stats.p50, stats.p99].map(|time| format!("{time:.1}")),
                None => std::array::from_fn(|_| missing()),
            });
        }
        write_cells(out, cells.iter().map(String::as_str))
    }
}

impl Report {
    /// What was measured, and the names of the columns.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_head(&self, out: &mut dyn Write) -> io::Result<()> {
        let kind = match self.prompts {
            PromptKind::TokenIds => "random token ids",
            PromptKind::Words => "random words",
        };
        writeln!(out, "{} on {}, {} cores ({})", self.model, self.url, self.machine.cores, self.machine.cpu)?;
        writeln!(
            out,
            "{} prompt tokens ({kind}, seed {}), {} output tokens; times in ms\n",
            self.prompt_tokens, self.seed, self.output_tokens
        )?;
        write_cells(out, COLUMNS.iter().map(|(group, _)| *group))?;
        write_cells(out, COLUMNS.iter().map(|(_, name)| *name))
    }

    /// What the figures rest on, and what went wrong.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_notes(&self, out: &mut dyn Write) -> io::Result<()> {
        match self.runs.iter().filter_map(|run| run.tokens_counted_by).max() {
            Some(CountedBy::TokenIds) => writeln!(out, "\ntokens counted by token ids")?,
            Some(CountedBy::Usage) => writeln!(out, "\ntokens counted by the server's usage")?,
            None => writeln!(out, "\nno request was answered")?,
        }
        for run in &self.runs {
            let concurrency = run.concurrency;
            if run.num_other_lengths > 0 {
                let num = run.num_other_lengths;
                writeln!(out, "concurrency {concurrency}: {num} answers did not have {} tokens", self.output_tokens)?;
            }
            for (kind, error) in &run.errors {
                writeln!(out, "concurrency {concurrency}: {} x {kind}, such as: {}", error.count, error.example)?;
            }
        }
        Ok(())
    }
}

/// Group and name. Means and p90 are left to the JSON: a row should fit a terminal.
const COLUMNS: [(&str, &str); 14] = [
    ("concur-", "rency"),
    ("", "requests"),
    ("", "failed"),
    ("requests", "per s"),
    ("output", "tokens/s"),
    ("total", "tokens/s"),
    ("TTFT", "p50"),
    ("", "p99"),
    ("TPOT", "p50"),
    ("", "p99"),
    ("ITL", "p50"),
    ("", "p99"),
    ("E2E", "p50"),
    ("", "p99"),
];

/// Fixed, so that rows can be printed as they come.
const COLUMN_WIDTH: usize = 8;

fn write_cells<'a>(out: &mut dyn Write, cells: impl Iterator<Item = &'a str>) -> io::Result<()> {
    let line: Vec<String> = cells.map(|cell| format!("{cell:>COLUMN_WIDTH$}")).collect();
    writeln!(out, "{}", line.join(" ").trim_end())?;
    out.flush()
}

fn missing() -> String {
    "-".to_owned()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn ms_per_token(sample: &Sample) -> Option<f64> {
    let [first, .., last] = sample.arrivals[..] else { return None };
    let num_gaps = sample.num_output_tokens.checked_sub(1).filter(|num| *num > 0)?;
    Some(ms(last - first) / num_gaps as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::client::ClientError;

    fn check(samples: &[f64], expect: [f64; 4]) {
        let stats = Stats::new(samples.to_vec()).unwrap();
        let found = [stats.mean, stats.p50, stats.p90, stats.p99];
        let is_close = found.iter().zip(expect).all(|(found, expect)| (found - expect).abs() < 1e-9);
        assert!(is_close, "{samples:?}: {found:?}, expected {expect:?}");
    }

    #[test]
    fn percentiles_are_those_of_numpy() {
        check(&[5.0], [5.0; 4]);
        check(&[2.0, 1.0], [1.5, 1.5, 1.9, 1.99]);
        check(&[10.0, 40.0, 20.0, 30.0], [25.0, 25.0, 37.0, 39.7]);
        let hundred: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        check(&hundred, [50.0, 50.0, 90.0, 99.0]);
        assert_eq!(Stats::new(Vec::new()), None);
    }

    fn sample(arrivals_ms: &[u64], num_output_tokens: usize) -> Sample {
        Sample {
            arrivals: arrivals_ms.iter().copied().map(Duration::from_millis).collect(),
            end: Duration::from_millis(100),
            num_prompt_tokens: Some(6),
            num_output_tokens,
            counted_by: CountedBy::TokenIds,
        }
    }

    #[test]
    fn figures_follow_from_times_and_counts() {
        let outcome = RunOutcome {
            concurrency: 2,
            duration: Duration::from_secs(2),
            samples: vec![sample(&[20, 30, 50], 4), sample(&[40], 1)],
            failures: vec![ClientError::Stream { message: "broken".to_owned() }],
        };
        let run = RunReport::new(outcome, 4);
        assert_eq!((run.num_requests, run.num_succeeded, run.num_failed(), run.num_other_lengths), (3, 2, 1, 1));
        assert_eq!((run.requests_per_s, run.output_tokens_per_s, run.total_tokens_per_s), (1.0, 2.5, Some(8.5)));
        assert_eq!(run.errors["stream_error"].count, 1);
        let mean = |stats: Option<Stats>| stats.unwrap().mean.round();
        assert_eq!([run.ttft_ms, run.tpot_ms, run.itl_ms, run.e2e_ms].map(mean), [30.0, 10.0, 15.0, 100.0]);
    }

    #[test]
    fn what_was_not_measured_is_absent() {
        let samples = vec![Sample { num_prompt_tokens: None, ..sample(&[], 3) }];
        let outcome = RunOutcome { concurrency: 1, duration: Duration::from_secs(1), samples, failures: Vec::new() };
        let run = RunReport::new(outcome, 3);
        assert_eq!((run.total_tokens_per_s, run.ttft_ms, run.tpot_ms, run.itl_ms), (None, None, None, None));
        let mut row = Vec::new();
        run.write_row(&mut row).unwrap();
        assert_eq!(String::from_utf8(row).unwrap().split_whitespace().filter(|cell| *cell == "-").count(), 7);
    }
}
