//! The subcommands.

pub mod bench;
pub mod cache;
pub mod chat;
mod client;
pub mod eval;
pub mod inspect;
mod line_file;
pub mod profile;
pub mod quantize;
mod reading;
pub mod serve;
pub mod upcycle;

use crate::args::{Cli, Command};

/// Runs one subcommand to its end.
///
/// # Errors
/// Whatever stopped it, with causes.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Upcycle(args) => upcycle::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Profile(args) => profile::run(&args),
        Command::Quantize(args) => quantize::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Bench(args) => bench::run(*args),
        Command::Cache(args) => cache::run(args),
        Command::Openapi => print(&crate::routes::openapi_json()),
        Command::ConfigReference => print(&crate::config::reference()),
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}
