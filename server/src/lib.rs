//! The serving side of Moesaic: HTTP, text and the command line around the engine.
//!
//! | room | what is in it |
//! |---|---|
//! | `args`, `config`, `cli` | what was typed, what it means, the subcommands |
//! | `app`, `listen`, `write_timeout`, `shutdown` | one server: its state, its connections, its end |
//! | `auth`, `limits`, `error` | who may ask, how much at once, and how a request is turned down |
//! | `cache_salt` | who shares what is cached |
//! | `routes`, `openai` | one handler file per endpoint, and the wire types |
//! | `validate`, `conversation` | wire types to what they mean |
//! | `generate`, `answer`, `sse` | engine events to deltas, deltas to answers, answers to streams |
//! | `output_cache`, `replay` | answers that were computed before, or are being computed for another request; as they were written |
//! | `routing_cache` | which experts prompts take: learned, remembered, announced |
//! | `cache_tiers` | where caches keep their values |
//! | `text` | strings to token ids and back |
//! | `hub`, `demo`, `upcycle`, `packing` | getting models onto the disk |
//! | `telemetry` | logs and metrics |
#![forbid(unsafe_code)]

pub mod answer;
pub mod app;
pub mod args;
pub mod auth;
pub mod cache_salt;
pub mod cache_tiers;
mod checksum;
pub mod cli;
pub mod config;
pub mod conversation;
pub mod demo;
pub mod error;
mod file_lock;
pub mod generate;
pub mod hub;
pub mod kv_tier;
pub mod limits;
pub mod listen;
pub mod openai;
pub mod output_cache;
pub mod packing;
pub mod replay;
pub mod routes;
pub mod routing_cache;
pub mod shutdown;
pub mod sse;
pub mod telemetry;
pub mod text;
pub mod upcycle;
pub mod validate;
pub mod write_timeout;

use std::process::ExitCode;

/// The `moesaic` program: parses the command line, runs it, and says on stderr why it failed.
///
/// Exit codes: 0 done, 1 failed, 2 wrong usage.
pub fn main_entry() -> ExitCode {
    match cli::run(args::Cli::from_args(std::env::args_os())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", causes(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and what it came from, once each: many messages end with their cause already.
fn causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.ends_with(&cause) {
            if !text.is_empty() {
                text += ": ";
            }
            text += &cause;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    #[test]
    fn a_cause_is_told_once() {
        let inner = || std::io::Error::other("no such file");
        let repeated = Err::<(), _>(inner()).context("cannot read x: no such file").unwrap_err();
        assert_eq!(super::causes(&repeated), "cannot read x: no such file");
        let apart = Err::<(), _>(inner()).context("cannot start").unwrap_err();
        assert_eq!(super::causes(&apart), "cannot start: no such file");
    }
}
