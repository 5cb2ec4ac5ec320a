//! `moesaic cache`: what a running server's caches hold, emptying them, and filling them.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{Client, ServerArgs};

/// Longest line of a file of prompts.
const MAX_LINE_BYTES: usize = 16 << 20;
/// Errors that are shown one by one.
const MAX_SHOWN: u64 = 10;

#[derive(Args, Debug)]
pub struct CacheArgs {
    #[command(subcommand)]
    pub command: CacheCommand,
}

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Print entries and bytes of each tier
    Stats(AdminArgs),
    /// Remove every cached answer, in all tiers
    Clear(AdminArgs),
    /// Ask a server for the answer to each line of a file, so that it has them
    Warm(WarmArgs),
}

#[derive(Args, Debug)]
pub struct AdminArgs {
    #[command(flatten)]
    pub server: ServerArgs,
    /// The server's admin key
    #[arg(long, env = "MOESAIC_ADMIN_KEY", hide_env_values = true)]
    pub admin_key: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct WarmArgs {
    #[command(flatten)]
    pub server: ServerArgs,
    /// JSON lines: a text, or a request body with `messages` or `prompt`. Without temperature and seed it is greedy
    pub file: PathBuf,
    /// Requests under way at a time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub concurrency: u32,
}

/// What the server says about its caches.
#[derive(Deserialize)]
struct Stats {
    tiers: Vec<TierRow>,
    num_flights: u64,
}

#[derive(Deserialize)]
struct TierRow {
    tier: String,
    available: bool,
    entries: Option<u64>,
    bytes: Option<u64>,
    max_bytes: Option<u64>,
}

/// # Errors
/// An unreachable server, a refused key, a line that is no request, any request that failed.
pub fn run(args: CacheArgs) -> anyhow::Result<()> {
    match args.command {
        CacheCommand::Stats(args) => stats(args),
        CacheCommand::Clear(args) => clear(args),
        CacheCommand::Warm(args) => warm(&args),
    }
}

impl AdminArgs {
    fn client(&self) -> anyhow::Result<Client> {
        let Some(key) = &self.admin_key else {
            bail!("no admin key; hint: give the server's with --admin-key or MOESAIC_ADMIN_KEY");
        };
        let server = ServerArgs { api_key: Some(key.clone()), ..self.server.clone() };
        Ok(Client::new(&server, 1)?)
    }
}

fn stats(args: AdminArgs) -> anyhow::Result<()> {
    let answer: Value = args.client()?.get("/v1/cache")?;
    if args.json {
        return Ok(writeln!(std::io::stdout(), "{answer:#}")?);
    }
    let stats: Stats = serde_json::from_value(answer).context("the server's answer")?;
    let mut out = std::io::stdout().lock();
    if stats.tiers.is_empty() {
        return Ok(writeln!(out, "the output cache is off")?);
    }
    writeln!(out, "{:<8} {:>10} {:>12} {:>12}  state", "tier", "entries", "bytes", "limit")?;
    for row in stats.tiers {
        let count = row.entries.map_or_else(|| "-".to_owned(), |count| count.to_string());
        let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), |bytes| HumanBytes(bytes).to_string());
        let state = if row.available { "up" } else { "down" };
        writeln!(out, "{:<8} {count:>10} {:>12} {:>12}  {state}", row.tier, size(row.bytes), size(row.max_bytes))?;
    }
    writeln!(out, "{} answers are being computed for more than one request to read", stats.num_flights)?;
    Ok(())
}

fn clear(args: AdminArgs) -> anyhow::Result<()> {
    let answer: Value = args.client()?.post("/v1/cache/clear", &json!({}))?;
    if args.json {
        writeln!(std::io::stdout(), "{answer:#}")?;
    }
    if answer["complete"] != json!(true) {
        bail!("a tier did not finish, some values may be left; the server's log says why");
    }
    if !args.json {
        writeln!(std::io::stdout(), "no answer is cached any more")?;
    }
    Ok(())
}

fn warm(args: &WarmArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.server, args.concurrency as usize)?;
    let model = args.server.model.clone().map_or_else(|| client.first_model(), Ok)?;
    let num_lines = lines(&args.file)?.count() as u64;
    let requests = Mutex::new(lines(&args.file)?.zip(1u64..));
    let style = ProgressStyle::with_template("{pos}/{len} {wide_bar} {eta}").expect("the template is constant");
    let bar = ProgressBar::new(num_lines).with_style(style);
    let (num_done, num_failed) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        // A panic of another thread is reported by the scope; its lock has nothing half done.
        let next = || requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
        while let Some((line, number)) = next() {
            let asked = line.and_then(|line| request(&line, &model)).and_then(|asked| {
                let Some((path, body)) = asked else { return Ok(false) };
                Ok(client.post::<Value>(path, &body).map(|_| true)?)
            });
            match asked {
                Ok(was_asked) => drop(num_done.fetch_add(u64::from(was_asked), Ordering::Relaxed)),
                Err(error) if num_failed.fetch_add(1, Ordering::Relaxed) < MAX_SHOWN => {
                    bar.suspend(|| eprintln!("{}:{number}: {error:#}", args.file.display()));
                }
                Err(_) => {}
            }
            bar.inc(1);
        }
    };
    thread::scope(|scope| (0..args.concurrency).for_each(|_| drop(scope.spawn(work))));
    bar.finish_and_clear();
    let (num_done, num_failed) = (num_done.into_inner(), num_failed.into_inner());
    writeln!(std::io::stdout(), "{num_done} answered, {num_failed} failed")?;
    if num_failed > 0 {
        bail!("{num_failed} of {} lines failed", num_done + num_failed);
    }
    Ok(())
}

/// The lines of a file, none of them held longer than it takes.
fn lines(path: &Path) -> anyhow::Result<impl Iterator<Item = anyhow::Result<String>> + use<>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut reader = BufReader::new(file);
    let mut is_broken = false;
    Ok(std::iter::from_fn(move || {
        if is_broken {
            return None;
        }
        let mut line = Vec::new();
        let mut limited = std::io::Read::take(&mut reader, MAX_LINE_BYTES as u64 + 1);
        match limited.read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) if line.len() > MAX_LINE_BYTES => {
                is_broken = true;
                Some(Err(anyhow::anyhow!("the line is longer than {MAX_LINE_BYTES} bytes; the rest is left out")))
            }
            Ok(_) => Some(String::from_utf8(line).context("the line is not UTF-8")),
            Err(error) => {
                is_broken = true;
                Some(Err(error.into()))
            }
        }
    }))
}

/// Path and body of a line; `None` where it is blank.
fn request(line: &str, model: &str) -> anyhow::Result<Option<(&'static str, Value)>> {
    if line.trim().is_empty() {
        return Ok(None);
    }
    let mut body = match serde_json::from_str(line).context("not JSON")? {
        Value::String(text) => json!({"messages": [{"role": "user", "content": text}]}),
        Value::Object(fields) => Value::Object(fields),
        _ => bail!("expected a text or an object"),
    };
    let path = match (body.get("messages"), body.get("prompt")) {
        (Some(_), None) => "/v1/chat/completions",
        (None, Some(_)) => "/v1/completions",
        _ => bail!("expected either `messages` or `prompt`"),
    };
    if body.get("temperature").is_none() && body.get("seed").is_none() {
        body["temperature"] = json!(0);
    }
    if body.get("model").is_none() {
        body["model"] = json!(model);
    }
    // The answer is for the server to keep.
    body["stream"] = json!(false);
    body.as_object_mut().expect("it was checked above").remove("stream_options");
    Ok(Some((path, body)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_text_or_a_request() {
        let of = |line: &str| request(line, "m").unwrap().unwrap();
        let (path, body) = of("\"hello\"");
        assert_eq!(path, "/v1/chat/completions");
        assert_eq!(body["messages"][0]["content"], "hello");
        assert_eq!((&body["temperature"], &body["model"], &body["stream"]), (&json!(0), &json!("m"), &json!(false)));
        let (path, body) = of(r#"{"prompt": [1], "seed": 3, "model": "x", "stream": true, "stream_options": {}}"#);
        assert_eq!(path, "/v1/completions");
        assert_eq!(body, json!({"prompt": [1], "seed": 3, "model": "x", "stream": false}));
        assert!(request(" \n", "m").unwrap().is_none());
        for line in ["{", "3", "{}", r#"{"prompt": "a", "messages": []}"#] {
            assert!(request(line, "m").is_err(), "{line}");
        }
    }
}
