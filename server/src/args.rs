//! The command line: subcommands and what they take. Settings of the server live in [`crate::config`].

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::cli::bench::BenchArgs;
use crate::cli::cache::CacheArgs;
use crate::cli::chat::ChatArgs;
use crate::cli::eval::EvalArgs;
use crate::cli::inspect::InspectArgs;
use crate::cli::profile::ProfileArgs;
use crate::cli::quantize::QuantizeArgs;
use crate::cli::upcycle::UpcycleArgs;
use crate::config::Settings;

/// An inference server made for mixture-of-experts language models.
///
/// Without a subcommand it serves: `moesaic --port 9000` is `moesaic serve --port 9000`.
#[derive(Debug, Parser)]
#[command(name = "moesaic", version, override_usage = "moesaic [COMMAND]")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over the OpenAI API
    Serve(Box<ServeArgs>),
    /// Write a mixture-of-experts folder whose experts all start as a dense model's
    Upcycle(UpcycleArgs),
    /// Print what a model is: architecture, parameters, experts, bytes
    Inspect(InspectArgs),
    /// Measure a model on a text: perplexity, and its divergence from a reference
    Eval(EvalArgs),
    /// Write down how much a text uses each expert of a model
    Profile(ProfileArgs),
    /// Write a folder of packed weights that loads at once
    Quantize(QuantizeArgs),
    /// Talk to a running server
    Chat(ChatArgs),
    /// Load a running server and report latencies and tokens per second, or time the kernels
    Bench(Box<BenchArgs>),
    /// Show, empty or fill the caches of a running server
    Cache(CacheArgs),
    /// Print the OpenAPI document of the server
    Openapi,
    /// Print the reference of all settings as Markdown
    ConfigReference,
}

#[derive(Args, Debug)]
pub struct ServeArgs {
    /// TOML file with settings; flags and environment variables win over it
    #[arg(long, env = "MOESAIC_CONFIG")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
}

impl Cli {
    /// Parses `args` (program name first); ends the process with usage on stderr and code 2 where they are wrong.
    pub fn from_args(args: impl Iterator<Item = OsString>) -> Self {
        Self::parse_from(with_default_subcommand(args.collect()))
    }
}

/// Puts `serve` before the first flag where no subcommand is named.
fn with_default_subcommand(mut args: Vec<OsString>) -> Vec<OsString> {
    let names_none = match args.get(1).and_then(|first| first.to_str()) {
        None => args.len() < 2,
        Some(first) => first.starts_with('-') && !["-h", "--help", "-V", "--version"].contains(&first),
    };
    if names_none {
        args.insert(args.len().min(1), OsString::from("serve"));
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        let words = std::iter::once("moesaic").chain(line.split_whitespace()).map(OsString::from).collect();
        Cli::try_parse_from(with_default_subcommand(words))
    }

    #[test]
    fn serving_is_the_default_subcommand() {
        for line in ["", "--port 9", "serve --port 9", "serve folder --port 9"] {
            assert!(matches!(parse(line).unwrap().command, Command::Serve(_)), "{line}");
        }
        assert_eq!(parse("--help").unwrap_err().kind(), clap::error::ErrorKind::DisplayHelp);
        assert_eq!(parse("srve").unwrap_err().kind(), clap::error::ErrorKind::InvalidSubcommand);
    }

    #[test]
    fn flags_reach_the_settings() {
        let Command::Serve(serve) =
            parse("serve --load-mtp m --api-key a --api-key b --metrics-public --kv-cache-memory 2GiB --dtype bf16")
                .unwrap()
                .command
        else {
            panic!("not serve")
        };
        assert_eq!(serve.settings.model.as_deref(), Some("m"));
        assert_eq!(serve.settings.api_key.unwrap().len(), 2);
        assert_eq!((serve.settings.load_mtp, serve.settings.metrics_public), (Some(true), Some(true)));
        assert_eq!(serve.settings.kv_cache_memory.unwrap().0, 2 << 30);
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
