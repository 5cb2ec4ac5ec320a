//! `moesaic upcycle`: a dense GGUF model to a mixture of experts that computes the same.

use std::path::PathBuf;

use engine::{UpcycleDtype, UpcycleOptions};
use indicatif::{HumanBytes, HumanCount};

use crate::hub::download_bar;
use crate::upcycle::upcycle_with_tokenizer;

/// Turn a dense llama-architecture GGUF into a Mixtral-layout folder
///
/// Every expert starts as the dense feed-forward network and the router is random, so the folder computes what the
/// dense model computes: a start point for training experts apart.
#[derive(clap::Args, Debug)]
pub struct UpcycleArgs {
    /// Dense GGUF file (F32, F16, BF16, Q4_0, Q4_1 and Q8_0 tensors)
    #[arg(long, value_name = "FILE")]
    pub dense: PathBuf,
    /// Experts per layer
    #[arg(long, default_value_t = 8)]
    pub experts: usize,
    /// Experts per token
    #[arg(long, default_value_t = 2)]
    pub top_k: usize,
    /// Folder to write; it must not exist
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of the random routers
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Storage type of the weights
    #[arg(long, value_enum, default_value_t = UpcycleDtypeArg::Bf16)]
    pub dtype: UpcycleDtypeArg,
}

/// Values of `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum UpcycleDtypeArg {
    Bf16,
    F32,
    F16,
}

/// Converts, with a progress bar on stderr, and prints what was written.
///
/// # Errors
/// What the conversion reports.
pub fn run(args: UpcycleArgs) -> anyhow::Result<()> {
    let options = UpcycleOptions {
        num_experts: args.experts,
        top_k: args.top_k,
        seed: args.seed,
        dtype: match args.dtype {
            UpcycleDtypeArg::Bf16 => UpcycleDtype::Bf16,
            UpcycleDtypeArg::F32 => UpcycleDtype::F32,
            UpcycleDtypeArg::F16 => UpcycleDtype::F16,
        },
    };
    let bar = download_bar("converting", Some(0));
    let report = upcycle_with_tokenizer(&args.dense, &args.out, &options, &mut |num_bytes_done, num_bytes| {
        bar.set_length(num_bytes);
        bar.set_position(num_bytes_done);
    })?;
    bar.finish_and_clear();
    println!(
        "{}: {} parameters, {} in {}",
        args.out.display(),
        HumanCount(report.num_parameters),
        HumanBytes(report.num_bytes),
        if report.num_shards == 1 { "1 shard".to_owned() } else { format!("{} shards", report.num_shards) }
    );
    println!("serve it with: moesaic serve {}", args.out.display());
    Ok(())
}
