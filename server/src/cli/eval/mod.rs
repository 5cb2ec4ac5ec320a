//! `moesaic eval`: how well a model predicts a text, and how far its predictions are from a reference's.

mod score;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use engine::{GgufFile, KvDtype, LoadedModel, weights::read_bounded};
use indicatif::MultiProgress;
use serde::Serialize;

use self::score::{Divergence, Score};
use super::reading::{Reading, bar, start_token};
use crate::config::{DeviceName, QuantType, WeightType};
use crate::hub::{self, HubOptions};
use crate::text::{EncodeOptions, Tokenizer, TokenizerFiles};

/// Larger texts are cut by hand: all of it is tokenized before the first `--max-tokens` are taken.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// Measure a model on a text: perplexity, and its divergence from a reference
///
/// The reference is `--against`, or MODEL as it is stored where `--quant` or `--dtype`
/// changes it. Both models are in memory at once, with
/// the logits of one chunk of each (`--context` times the vocabulary, in f32). Keys and values are f32, so that only weights differ.
#[derive(clap::Args, Debug)]
pub struct EvalArgs {
    /// Hugging Face folder or hub id
    pub model: String,
    /// Branch, tag or commit of a hub id
    #[arg(long)]
    pub revision: Option<String>,
    /// Text to predict, in UTF-8
    #[arg(long, value_name = "TEXT")]
    pub file: PathBuf,
    /// Model to compare with, a folder or hub id of the same vocabulary; taken as it is stored
    #[arg(long, value_name = "MODEL")]
    pub against: Option<String>,
    /// Storage type of MODEL's weights in memory
    #[arg(long, value_enum, default_value_t = WeightType::Auto)]
    pub dtype: WeightType,
    /// What MODEL is quantized to while loading
    #[arg(long, value_enum, default_value_t = QuantType::None)]
    pub quant: QuantType,
    /// Tokens of the text to read, at most
    #[arg(long, default_value_t = 2000)]
    pub max_tokens: usize,
    /// Tokens of a chunk, 2 to 65536; chunks are read each by itself
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..=65_536))]
    pub context: u32,
    /// Where the model computes: auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t)]
    pub device: DeviceName,
    /// Compute threads; all cores the process may run on where not given
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    /// Tokens that were predicted from those before them.
    num_tokens: usize,
    num_chunks: usize,
    perplexity: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<ReferenceReport>,
}

/// How the model differs from its reference.
#[derive(Debug, Serialize)]
struct ReferenceReport {
    model: String,
    perplexity: f64,
    #[serde(flatten)]
    divergence: Divergence,
}

/// Prints the report on stdout, with a progress bar on stderr.
///
/// # Errors
/// A text or a model that cannot be read, a text that is too short, models of different vocabularies.
pub fn run(args: EvalArgs) -> anyhow::Result<()> {
    let find = |model: &str, revision| hub::resolve(model, &HubOptions::from_env(revision), &MultiProgress::new());
    let text = read_text(&args.file)?;
    let model_dir = find(&args.model, args.revision.clone())?;
    let (reference_name, reference_dir) = match &args.against {
        Some(against) => (Some(against.clone()), Some(find(against, None)?)),
        None if (args.dtype, args.quant) != (WeightType::Auto, QuantType::None) => {
            (Some(args.model.clone()), Some(model_dir.clone()))
        }
        None => (None, None),
    };
    let chunks = chunks(&model_dir, &text, &args)?;
    if let Some(dir) = &reference_dir
        && chunks != self::chunks(dir, &text, &args)?
    {
        bail!(
            "{} and {} split the text into different tokens, compared are models of one vocabulary",
            model_dir.display(),
            dir.display()
        );
    }
    let mut reference = reference_dir.map(|dir| load(&dir, (WeightType::Auto, QuantType::None), &args)).transpose()?;
    let mut model = load(&model_dir, (args.dtype, args.quant), &args)?;
    let sizes = (model.summary.vocab_size, reference.as_ref().map_or(0, |reference| reference.summary.vocab_size));
    ensure!(
        reference.is_none() || sizes.0 == sizes.1,
        "the vocabularies have {} and {} tokens, compared are models of one vocabulary",
        sizes.0,
        sizes.1
    );
    let score = measure(&mut model, reference.as_mut(), &chunks)?;
    let report = Report {
        model: args.model,
        num_tokens: score.num_tokens(),
        num_chunks: chunks.len(),
        perplexity: score.perplexity(),
        reference: reference_name.map(|model| ReferenceReport {
            model,
            perplexity: score.reference_perplexity(),
            divergence: score.divergence(),
        }),
    };
    let text = match args.json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => table(&report),
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to stdout")
}

fn read_text(path: &Path) -> anyhow::Result<String> {
    let bytes = read_bounded(path, MAX_TEXT_BYTES).with_context(|| format!("cannot read {}", path.display()))?;
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", path.display()))
}

/// The text's tokens in pieces of `--context`, each behind the token that the model's texts begin with, where there is one.
fn chunks(model_dir: &Path, text: &str, args: &EvalArgs) -> anyhow::Result<Vec<Vec<u32>>> {
    let tokenizer = match engine::find_gguf(model_dir)? {
        Some(file) => Tokenizer::from_gguf(&TokenizerFiles::from_gguf(&GgufFile::open(&file)?)?)?,
        None => Tokenizer::load(model_dir)?,
    };
    let start = start_token(&tokenizer)?;
    let mut tokens = tokenizer.encode(text, EncodeOptions::default())?;
    tokens.truncate(args.max_tokens);
    let num_start = usize::from(start.is_some());
    let chunks = tokens
        .chunks(args.context as usize - num_start)
        .map(|chunk| start.into_iter().chain(chunk.iter().copied()).collect::<Vec<u32>>());
    // A token alone is predicted by nothing.
    let chunks: Vec<Vec<u32>> = chunks.filter(|chunk| chunk.len() > 1).collect();
    if chunks.is_empty() {
        let file = args.file.display();
        bail!("{file} is too short: it has {} tokens, of which none is predicted from another", tokens.len());
    }
    Ok(chunks)
}

fn load(model_dir: &Path, (dtype, quant): (WeightType, QuantType), args: &EvalArgs) -> anyhow::Result<LoadedModel> {
    let &EvalArgs { context, threads, device, .. } = args;
    // What is compared are weights: a cache that rounds would move near ties of routers on its own.
    let model = Reading { dtype, quant, kv_dtype: KvDtype::F32, device, context, threads, expert_memory: None }
        .load(model_dir)?;
    ensure!(
        !model.summary.has_encoder,
        "{} reads its text with an encoder; measured are models that continue a text",
        model_dir.display()
    );
    ensure!(
        model.summary.max_model_len >= args.context as usize,
        "--context is {}, the KV cache of {} has room for {} tokens",
        args.context,
        model_dir.display(),
        model.summary.max_model_len
    );
    Ok(model)
}

fn measure(
    model: &mut LoadedModel,
    mut reference: Option<&mut LoadedModel>,
    chunks: &[Vec<u32>],
) -> anyhow::Result<Score> {
    let num_tokens = chunks.iter().map(|chunk| chunk.len() as u64).sum();
    let bar = bar("measuring", "{pos}/{len} tokens {eta}", num_tokens);
    let mut score = Score::default();
    for chunk in chunks {
        let logits = model.runner.logits_of(chunk)?;
        let expected = reference.as_mut().map(|reference| reference.runner.logits_of(chunk)).transpose()?;
        for (position, &next) in chunk.iter().enumerate().skip(1) {
            let row = &logits[position - 1];
            let scored = match &expected {
                None => score.add(row, next),
                Some(expected) => score.add_compared(row, &expected[position - 1], next),
            };
            scored.with_context(|| format!("position {} of a chunk", position - 1))?;
        }
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    Ok(score)
}

/// The report as aligned lines.
fn table(report: &Report) -> String {
    let mut rows = vec![
        ("tokens", format!("{} in {} chunks", report.num_tokens, report.num_chunks)),
        ("perplexity", format!("{:.4}", report.perplexity)),
    ];
    if let Some(ReferenceReport { model, perplexity, divergence }) = &report.reference {
        rows.push(("reference", model.clone()));
        rows.push(("its perplexity", format!("{perplexity:.4}")));
        rows.push(("mean KL", format!("{:.6} nats", divergence.mean_kl)));
        rows.push(("largest KL", format!("{:.6} nats", divergence.max_kl)));
        rows.push(("greedy agreement", format!("{:.2} %", divergence.greedy_agreement_percent)));
    }
    let mut text = String::new();
    for (name, value) in rows {
        writeln!(text, "{name:<18} {value}").expect("writing to a string cannot fail");
    }
    text
}
