//! `moesaic bench`: a load client for any server that speaks the OpenAI API, and the speed of single ops.
//!
//! `prompts` draws them, `load` sends requests and times the answers, `report` turns times into figures; `kernels` is the
//! subcommand that needs no server.

mod kernels;
mod load;
mod prompts;
mod report;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde::Serialize;

use self::kernels::KernelsArgs;
use self::load::{Load, RunPlan};
use self::prompts::PromptSource;
use self::report::{Machine, Report, RunReport};
use super::client::{Client, ServerArgs};

/// Without `--num-requests`: requests per concurrent stream, and at least so many.
const REQUESTS_PER_STREAM: u32 = 4;
const MIN_REQUESTS: u32 = 16;

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    #[command(flatten)]
    pub server: ServerArgs,
    /// Requests under way at a time; several, with commas between, for one run each
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub concurrency: Vec<u32>,
    /// Requests per run [default: 4 per concurrent one, at least 16]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub num_requests: Option<u32>,
    /// Tokens per prompt; what comes close to it where prompts are words
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4_000_000))]
    pub prompt_tokens: u32,
    /// Tokens per answer
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4_000_000))]
    pub output_tokens: u32,
    /// What to ask: text completions of token ids, or chats
    #[arg(long, value_enum, default_value_t = Endpoint::Completions)]
    pub endpoint: Endpoint,
    /// Whether answers come as streams; times of single tokens need them
    #[arg(long, value_enum, default_value_t = Streaming::Always)]
    pub stream: Streaming,
    /// Seed of the prompts, to repeat a run [default: a fresh one]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Requests before each run that are not counted
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub warmup: u32,
    /// File for the report as JSON; `-` for stdout
    #[arg(long)]
    pub json: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Time each op at layer shapes of published models, beside this machine's limits; needs no server
    Kernels(KernelsArgs),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    Completions,
    Chat,
}

impl Endpoint {
    fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Streaming {
    Always,
    Never,
}

/// Measures, prints a table, and writes the report where `--json` says.
///
/// # Errors
/// A server that cannot be used, a file that cannot be written, and, after the report, any request that failed.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        Some(BenchCommand::Kernels(args)) => kernels::run(args),
        None => run_load(args),
    }
}

fn run_load(args: BenchArgs) -> anyhow::Result<()> {
    let to_stdout = args.json.as_deref().is_some_and(|path| path.as_os_str() == "-");
    let mut json_out: Option<Box<dyn Write>> = match &args.json {
        None => None,
        Some(_) if to_stdout => Some(Box::new(io::stdout())),
        // Before the runs: hours of them should not end at a wrong path.
        Some(path) => Some(Box::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?)),
    };
    let report = if to_stdout { measure(&args, &mut io::stderr())? } else { measure(&args, &mut io::stdout())? };
    if let Some(out) = &mut json_out {
        serde_json::to_writer_pretty(&mut *out, &report).context("cannot write the report")?;
        writeln!(out).context("cannot write the report")?;
    }
    let num_requests: usize = report.runs.iter().map(|run| run.num_requests).sum();
    match report.runs.iter().map(RunReport::num_failed).sum::<usize>() {
        0 => Ok(()),
        num_failed => bail!("{num_failed} of {num_requests} requests failed"),
    }
}

/// One run per concurrency, each a row of `table` as soon as it is done.
fn measure(args: &BenchArgs, table: &mut dyn Write) -> anyhow::Result<Report> {
    let max_concurrency = args.concurrency.iter().max().map_or(1, |most| *most as usize);
    let client = Client::new(&args.server, max_concurrency)?;
    let model = match &args.server.model {
        Some(model) => model.clone(),
        None => client.first_model()?,
    };
    let seed = args.seed.unwrap_or_else(rand::random);
    let source = PromptSource::probe(&client, &model, args.endpoint, &mut StdRng::seed_from_u64(seed))?;
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        command: command_line(std::env::args_os()),
        url: client.base_url().to_owned(),
        model: model.clone(),
        machine: Machine::this()?,
        started_at: jiff::Timestamp::from_second(jiff::Timestamp::now().as_second())?.to_string(),
        seed,
        endpoint: args.endpoint,
        stream: args.stream,
        prompts: source.kind(),
        prompt_tokens: args.prompt_tokens as usize,
        output_tokens: args.output_tokens as usize,
        runs: Vec::new(),
    };
    let load = Load {
        client,
        endpoint: args.endpoint,
        stream: args.stream,
        model,
        source,
        seed,
        num_prompt_tokens: args.prompt_tokens as usize,
        num_output_tokens: args.output_tokens as usize,
    };
    report.write_head(table)?;
    for (run_idx, &concurrency) in args.concurrency.iter().enumerate() {
        let num_requests = args.num_requests.unwrap_or((REQUESTS_PER_STREAM * concurrency).max(MIN_REQUESTS));
        let plan = RunPlan { run_idx, concurrency: concurrency as usize, num_requests: num_requests as usize };
        load.warm_up(&plan, args.warmup as usize).context("the warm-up failed")?;
        let run = RunReport::new(load.run(&plan)?, args.output_tokens as usize);
        run.write_row(table)?;
        report.runs.push(run);
    }
    report.write_notes(table)?;
    Ok(report)
}

/// What was typed, without the key.
fn command_line(args: impl Iterator<Item = OsString>) -> String {
    let mut words: Vec<String> = Vec::new();
    for arg in args {
        let word = arg.to_string_lossy();
        let is_key = words.last().is_some_and(|last| last == "--api-key");
        words.push(match word.split_once('=') {
            _ if is_key => "***".to_owned(),
            Some(("--api-key", _)) => "--api-key=***".to_owned(),
            _ => word.into_owned(),
        });
    }
    if let Some(program) = words.first_mut() {
        // The folder it was started from says nothing about the run.
        *program = "moesaic".to_owned();
    }
    words.join(" ")
}
