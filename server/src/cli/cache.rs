//! `moesaic cache`: what a running server's caches hold, emptying them, and filling them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, Subcommand};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{Client, ServerArgs};
use super::line_file::{BYTE_ORDER_MARK, lines, open};
use crate::output_cache::{ORIGIN_HEADER, Origin};

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
    /// Remove every cached answer of a server: in its memory, on its disk, and all under its Redis prefix. Other servers of that
    /// Redis keep what is in their own memory until they are cleared too
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
    /// JSON lines, `-` for standard input: a text in quotes, or a request body with `messages` or `prompt`. Without temperature
    /// and seed it is greedy. The answers are for those who use the same API key
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
    /// Absent from servers that know no routing cache.
    routing: Option<TierRow>,
    /// Absent from servers that keep no blocks.
    #[serde(default)]
    kv: Vec<TierRow>,
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
        let Some(key) = self.admin_key.as_ref().filter(|key| !key.is_empty()) else {
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
        writeln!(out, "the output cache is off")?;
    }
    let routing = stats.routing.map(|row| TierRow { tier: "routing".to_owned(), ..row });
    let kv = stats.kv.into_iter().map(|row| TierRow { tier: format!("kv {}", row.tier), ..row });
    let rows: Vec<TierRow> = stats.tiers.into_iter().chain(routing).chain(kv).collect();
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(out, "{:<9} {:>10} {:>12} {:>12}  state", "tier", "entries", "bytes", "limit")?;
    for row in rows {
        let count = row.entries.map_or_else(|| "-".to_owned(), |count| count.to_string());
        let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), |bytes| HumanBytes(bytes).to_string());
        let state = if row.available { "up" } else { "down" };
        writeln!(out, "{:<9} {count:>10} {:>12} {:>12}  {state}", row.tier, size(row.bytes), size(row.max_bytes))?;
    }
    writeln!(out, "{} answers are being computed now", stats.num_flights)?;
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
        writeln!(
            std::io::stdout(),
            "no answer is left in the server's memory, on its disk and in its Redis; other servers of that Redis keep their memory"
        )?;
    }
    Ok(())
}

fn warm(args: &WarmArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.server, args.concurrency as usize)?;
    let model = args.server.model.clone().map_or_else(|| client.first_model(), Ok)?;
    let bar = match num_lines(&args.file)? {
        Some(num_lines) => ProgressBar::new(num_lines).with_style(style("{pos}/{len} {wide_bar} {eta}")),
        None => ProgressBar::new_spinner().with_style(style("{spinner} {pos} lines")),
    };
    let requests = Mutex::new(lines(open(&args.file)?).zip(1u64..));
    let tally = Tally::default();
    let work = || {
        // A panic of another thread is reported by the scope; its lock has nothing half done.
        let next = || requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
        while let Some((line, number)) = next() {
            let asked = line.and_then(|line| request(&line, &model)).and_then(|asked| match asked {
                Some((path, body)) => Ok(Some(client.post_for_header(path, &body, ORIGIN_HEADER.as_str())?)),
                None => Ok(None),
            });
            match asked {
                Ok(origin) => tally.count(origin),
                Err(error) if tally.failed.fetch_add(1, Ordering::Relaxed) < MAX_SHOWN => {
                    bar.suspend(|| eprintln!("{}:{number}: {error:#}", args.file.display()));
                }
                Err(_) => {}
            }
            bar.inc(1);
        }
    };
    thread::scope(|scope| (0..args.concurrency).for_each(|_| drop(scope.spawn(work))));
    bar.finish_and_clear();
    tally.report(&args.file)
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is constant")
}

/// What became of the lines that were not blank.
#[derive(Default)]
struct Tally {
    computed: AtomicU64,
    found: AtomicU64,
    unkept: AtomicU64,
    failed: AtomicU64,
}

impl Tally {
    /// Counts the answer to a line by where it came from; `None` is a blank line.
    fn count(&self, origin: Option<Option<String>>) {
        let Some(origin) = origin else { return };
        let counter = match origin.as_deref() {
            Some(name) if name == Origin::Hit.name() => &self.found,
            Some(_) => &self.computed,
            None => &self.unkept,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn report(self, file: &Path) -> anyhow::Result<()> {
        let counts = [self.computed, self.found, self.unkept, self.failed].map(AtomicU64::into_inner);
        let [computed, found, unkept, failed] = counts;
        writeln!(std::io::stdout(), "{computed} computed, {found} found, {unkept} not kept, {failed} failed")?;
        let total: u64 = counts.iter().sum();
        if total == 0 {
            bail!("{} has no line to ask", file.display());
        }
        if failed > 0 {
            bail!("{failed} of {total} lines failed");
        }
        if unkept > 0 {
            bail!(
                "{unkept} of {total} answers are not kept; hint: a server with --output-cache off keeps none, others those of \
                 requests with temperature 0 or a seed"
            );
        }
        Ok(())
    }
}

/// Lines of a regular file; what else there is can be read once only.
fn num_lines(path: &Path) -> anyhow::Result<Option<u64>> {
    let is_regular = std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
    is_regular.then(|| Ok(lines(open(path)?).count() as u64)).transpose()
}

/// Path and body of a line; `None` where it is blank.
fn request(line: &str, model: &str) -> anyhow::Result<Option<(&'static str, Value)>> {
    if line.trim().is_empty() {
        return Ok(None);
    }
    let not_json =
        |error: serde_json::Error| anyhow!("not JSON at column {}; hint: a text stands in quotes", error.column());
    let mut body = match serde_json::from_str(line.trim_start_matches(BYTE_ORDER_MARK)).map_err(not_json)? {
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
    let fields = body.as_object_mut().expect("it was checked above");
    fields.remove("stream_options");
    fields.remove("cache");
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
        assert_eq!(of("\u{feff}\"hello\"").1["messages"][0]["content"], "hello");
        assert_eq!(of(r#"{"prompt": "a", "cache": {"write": false}}"#).1.get("cache"), None);
        assert!(request(" \n", "m").unwrap().is_none());
        for line in ["{", "3", "{}", r#"{"prompt": "a", "messages": []}"#] {
            assert!(request(line, "m").is_err(), "{line}");
        }
    }
}
