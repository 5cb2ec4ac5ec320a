//! `moesaic quantize`: a model to a folder of packed weights that is mapped and served as it is.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use engine::PackFormat;
use indicatif::{HumanBytes, MultiProgress};

use crate::hub::{self, HubOptions, download_bar};
use crate::packing::quantize_with_tokenizer;

/// Write a folder of packed weights that loads at once
///
/// Embedding and output projection become int8 in either quantized format; routers, norms and biases stay as they are.
#[derive(clap::Args, Debug)]
pub struct QuantizeArgs {
    /// Hugging Face folder, GGUF file or hub id
    pub model: String,
    /// Branch, tag or commit of a hub id
    #[arg(long)]
    pub revision: Option<String>,
    /// What the matrices of layers become
    #[arg(long, value_enum)]
    pub to: PackFormatArg,
    /// Folder to write; it must not exist
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Values of `--to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PackFormatArg {
    Int8,
    Int4,
    Bf16,
    F32,
}

/// Converts, with a progress bar on stderr, and prints what was written.
///
/// # Errors
/// A model that cannot be found or read, a folder that exists or cannot be written.
pub fn run(args: QuantizeArgs) -> anyhow::Result<()> {
    let source = hub::resolve(&args.model, &HubOptions::from_env(args.revision), &MultiProgress::new())?;
    let to = match args.to {
        PackFormatArg::Int8 => PackFormat::Int8,
        PackFormatArg::Int4 => PackFormat::Int4,
        PackFormatArg::Bf16 => PackFormat::Bf16,
        PackFormatArg::F32 => PackFormat::F32,
    };
    let bar = download_bar("quantizing", Some(0));
    let report = quantize_with_tokenizer(&source, &args.out, to, &mut |progress| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
    })?;
    bar.finish_and_clear();
    let out = args.out.display();
    let (bytes, share) = (HumanBytes(report.num_bytes), 100.0 * report.num_bytes as f64 / report.num_bytes_f32 as f64);
    let text = format!(
        "{out}: {bytes} in {}, {share:.1} % of f32\nserve it with: moesaic serve {out}\n",
        if report.num_shards == 1 { "1 shard".to_owned() } else { format!("{} shards", report.num_shards) }
    );
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to stdout")
}
