//! `moesaic serve`: configuration, listening socket, model, and the way out.

use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use cache::store::MAX_DISK_CALLS;
use cache::{Fingerprint, OutputCacheConfig};
use engine::{EngineConfig, EngineHandle, ExpertConfig, GgufFile, LoadProgress, LoadStage};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::app::{App, Model, OutputCaches, router};
use crate::args::ServeArgs;
use crate::cache_tiers::{self, CacheTiers, SlowTiers, Tiers};
use crate::config::{Config, check_environment};
use crate::demo::{self, DemoOptions};
use crate::hub::{self, HubOptions};
use crate::kv_tier::{KvTier, KvTierConfig};
use crate::output_cache::{OutputCache, fingerprint};
use crate::routing_cache::Routing;
use crate::text::{ChatTemplate, Tokenizer, TokenizerFiles};
use crate::{listen, shutdown, telemetry, validate};

/// Threads of the async runtime: the edge is light, and the compute pool wants the cores.
const MAX_RUNTIME_THREADS: usize = 4;

/// As long as resolvers usually take to give up, in look-ups, of which there is at most one a second.
const MAX_RESOLVER_THREADS: usize = 32;

/// How often the metrics recorder folds its samples.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Serves until a signal; returns when everything is closed.
///
/// # Errors
/// A wrong configuration, a taken address, a model that cannot be loaded.
pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    check_environment(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()))?;
    let config = Config::resolve(args.settings, args.config.as_deref())?;
    telemetry::logging::start(&config).map_err(|reason| anyhow!(reason))?;
    let names = model_names(&config);
    let metrics = telemetry::metrics::install(&names[0])?;
    // A disk that hangs must not take the threads of text jobs, nor the one that looks through a folder.
    let num_disk_threads = if config.cache_dir.is_some() { MAX_DISK_CALLS + 1 } else { 0 };
    // Nor may a resolver that hangs on the name of a Redis: a look-up cannot be given up, and there is a new one each second.
    let num_resolver_threads = if config.redis_url.is_some() { MAX_RESOLVER_THREADS } else { 0 };
    let app = Arc::new(App::new(config, names, metrics));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.clamp(1, MAX_RUNTIME_THREADS))
        // Text jobs are bounded by the cores, but the next one may start before the last one's thread is idle.
        .max_blocking_threads(cores + num_disk_threads + num_resolver_threads)
        .enable_all()
        .build()?;
    let result = runtime.block_on(serve(&app));
    // A model that is still being loaded must not hold up the exit.
    runtime.shutdown_background();
    result
}

async fn serve(app: &Arc<App>) -> anyhow::Result<()> {
    let address = SocketAddr::new(app.config.host, app.config.port);
    let listener = listen::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; hint: choose another --host or --port (0 takes a free one)")
    })?;
    announce(app, listener.local_addr()?)?;
    let tiers = cache_tiers::open(&app.config)?;
    let mut loading = start_loading(Arc::clone(app), tiers)?;
    tokio::spawn(upkeep(Arc::clone(app)));
    let stop = &app.shutdown.close_connections;
    let server = listen::serve(listener, router(app), app.config.max_connections, stop);
    let life = async {
        tokio::select! {
            ended = shutdown::run(app) => return ended.map_err(anyhow::Error::from),
            loaded = &mut loading => loaded.context("the loading thread panicked")??,
        }
        let engine = app.loaded().map(|model| model.engine.clone()).expect("loading ended well");
        tokio::select! {
            ended = shutdown::run(app) => ended.map_err(anyhow::Error::from),
            () = engine.died() => {
                shutdown::flush(app).await;
                bail!("the engine stopped; the log says why")
            }
        }
    };
    let (_, ended) = tokio::join!(server, async {
        let ended = life.await;
        stop.cancel();
        ended
    });
    ended
}

/// Loads on a thread of its own, while probes are answered. The receiver hears how it went.
fn start_loading(app: Arc<App>, tiers: Tiers) -> anyhow::Result<oneshot::Receiver<anyhow::Result<()>>> {
    let (sender, receiver) = oneshot::channel();
    let runtime = Handle::current();
    std::thread::Builder::new().name("load".to_owned()).spawn(move || {
        let result = load(&app, tiers, &runtime).map(|model| {
            let summary = model.engine.model();
            tracing::info!(
                model = %app.model_names[0],
                threads = summary.threads,
                device = summary.device,
                isa = summary.isa,
                weights = summary.weight_formats.join("+"),
                weight_bytes = summary.weight_bytes,
                expert_memory = (summary.expert_memory_bytes < summary.expert_bytes)
                    .then(|| format!("{} of {}", summary.expert_memory_bytes, summary.expert_bytes)),
                expert_read = summary.expert_read,
                max_model_len = summary.max_model_len,
                kv_cache_tokens = summary.num_blocks * summary.block_size,
                states = (summary.num_state_slots > 0).then_some(summary.num_state_slots),
                kv_cache_dtype = summary.kv_dtype,
                prefix_cache = summary.has_prefix_cache,
                "ready"
            );
            app.set_model(model);
        });
        // Nobody listens any more where the server was told to stop meanwhile.
        drop(sender.send(result));
    })?;
    Ok(receiver)
}

fn load(app: &App, tiers: Tiers, runtime: &Handle) -> anyhow::Result<Model> {
    let config = &app.config;
    let model_dir = find_model(config)?;
    let (tokenizer, template) = load_text(&model_dir, config.chat_template.as_deref())?;
    if template.is_none() {
        tracing::warn!("the model has no chat template: /v1/chat/completions is not available");
    }
    let mut bar = LoadBar::new(&model_dir);
    let engine = engine::load(engine_config(config, model_dir.clone(), available_memory()?), &mut |progress| {
        bar.show(&progress)
    })?;
    bar.done();
    validate::model_defaults(&engine.model().generation_defaults)
        .context("generation_config.json, or general.sampling.* of a GGUF file")?;
    let outputs = tiers.outputs.map(|tiers| open_outputs(config, tiers, (&engine, model_dir))).transpose()?;
    let budget = Duration::from_millis(config.cache_timeout_ms);
    let routing = match tiers.routing {
        Some(tiers) => Routing::open(&engine, tiers, budget, runtime)?,
        None => None,
    };
    let kv_tier = KvTierConfig {
        ttl: config.kv_tier_ttl.duration(),
        load_timeout: config.kv_tier_timeout.duration(),
        coding: config.kv_tier_dtype.into(),
    };
    let kv_tier = match tiers.kv {
        Some(tiers) => KvTier::open(&engine, tiers, kv_tier, runtime)?,
        None => None,
    };
    let model = Model::new(engine, (tokenizer, template), app);
    Ok(model.with_outputs(outputs.unwrap_or_default()).with_routing(routing).with_kv_tier(kv_tier))
}

/// The output cache in memory at once, and over all tiers as soon as the weights' digest is known.
fn open_outputs(
    config: &Config,
    tiers: CacheTiers,
    (engine, model_dir): (&EngineHandle, PathBuf),
) -> anyhow::Result<OutputCaches> {
    let budget = Duration::from_millis(config.cache_timeout_ms);
    let ttl = config.output_cache_ttl.duration();
    let settings = move |fingerprint| OutputCacheConfig { fingerprint, ttl, write_budget: budget };
    // Within one process nothing but the requests differ.
    let of_process = Fingerprint::from_bytes(engine.fingerprint().numerics());
    let early = OutputCache::new(tiers.memory, settings(of_process), budget);
    let outputs = OutputCaches {
        early: Some(early),
        tiers: tiers.all.as_ref().map(|all| Arc::clone(&all.store)),
        ..OutputCaches::default()
    };
    let Some(SlowTiers { store, names }) = tiers.all else { return Ok(outputs) };
    let (whole, engine, template) = (Arc::clone(&outputs.whole), engine.clone(), config.chat_template.clone());
    std::thread::Builder::new().name("fingerprint".to_owned()).spawn(move || {
        match fingerprint::whole(engine.fingerprint().whole(), &model_dir, template.as_deref()) {
            Ok(fingerprint) => {
                tracing::info!(fingerprint = %fingerprint.to_hex(), "answers are looked for in {names}");
                drop(whole.set(OutputCache::new(store, settings(fingerprint), budget)));
            }
            Err(error) => tracing::error!(%error, "the model's files cannot be read again: answers stay in memory"),
        }
    })?;
    Ok(outputs)
}

/// Tokenizer and chat template of a folder or of a GGUF file.
pub(super) fn load_text(
    model_dir: &Path,
    override_file: Option<&Path>,
) -> anyhow::Result<(Tokenizer, Option<ChatTemplate>)> {
    if let Some(path) = engine::find_gguf(model_dir)? {
        let files = TokenizerFiles::from_gguf(&GgufFile::open(&path)?)?;
        return Ok((Tokenizer::from_gguf(&files)?, ChatTemplate::from_gguf(&files, override_file)?));
    }
    if !model_dir.join("config.json").is_file() {
        let folder = model_dir.display();
        bail!(
            "{folder} is not a model folder, it has no config.json; hint: give a Hugging Face folder, a GGUF file or a \
             hub id"
        );
    }
    Ok((Tokenizer::load(model_dir)?, ChatTemplate::load(model_dir, override_file)?))
}

/// The folder or the GGUF file of the model: given, in the hub's cache, or the demo's; downloaded first where it must be.
fn find_model(config: &Config) -> anyhow::Result<PathBuf> {
    match &config.model {
        Some(model) => {
            let options = HubOptions::from_env(config.revision.clone());
            Ok(hub::resolve(model, &options, &MultiProgress::new())?)
        }
        None => Ok(demo::ensure(&DemoOptions::default())?),
    }
}

fn engine_config(config: &Config, model_dir: PathBuf, available_memory: u64) -> EngineConfig {
    EngineConfig {
        device: config.device.0,
        gpu_memory_utilization: config.gpu_memory_utilization,
        dtype: config.dtype.into(),
        quant: config.quant.into(),
        experts: ExpertConfig {
            memory: config.expert_memory.map(Into::into),
            policy: config.expert_policy.into(),
            profile: config.expert_profile.clone(),
            prefetch: config.expert_prefetch,
            warmup: config.expert_warmup.into(),
            read_mode: config.expert_read.mode(),
        },
        kv_dtype: config.kv_cache_dtype.into(),
        kv_cache_memory: config.kv_cache_memory.map(|bytes| bytes.0),
        available_memory,
        block_size: config.block_size,
        enable_prefix_caching: config.enable_prefix_caching,
        max_model_len: config.max_model_len,
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_queue: config.max_queue,
        batch_timeout: Duration::from_millis(config.batch_timeout_ms),
        load_mtp: config.load_mtp,
        routing: config.routing_options(),
        threads: config.threads,
        isa: config.isa.name(),
        ..EngineConfig::new(model_dir)
    }
}

/// Bytes this process may still take: of the machine, or of its container where that has less.
pub(super) fn available_memory() -> anyhow::Result<u64> {
    let mut system = sysinfo::System::new().map_err(|error| anyhow!("cannot read the machine's memory: {error}"))?;
    system.refresh_memory();
    let container = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    Ok(system.available_memory().min(container))
}

/// The names that requests may use: configured, else the last part of a folder's path, a file's name without `.gguf`, or
/// the hub id.
fn model_names(config: &Config) -> Vec<String> {
    if !config.served_model_name.is_empty() {
        return config.served_model_name.clone();
    }
    let name = match &config.model {
        None => "moesaic-demo".to_owned(),
        Some(model) => model_name(model),
    };
    vec![name]
}

/// Of a folder, a file or a hub id.
pub(super) fn model_name(model: &str) -> String {
    let path = Path::new(model).canonicalize().ok().filter(|path| path.is_dir() || path.is_file());
    let name = path.and_then(|path| match path.is_file() {
        true => Some(path.file_stem()?.to_string_lossy().into_owned()),
        false => Some(path.file_name()?.to_string_lossy().into_owned()),
    });
    name.unwrap_or_else(|| model.to_owned())
}

/// Says on stdout where the server is, what it was told, and how to talk to it.
fn announce(app: &App, address: SocketAddr) -> anyhow::Result<()> {
    let key = match app.config.api_key.is_empty() {
        true => "",
        false => " -H 'Authorization: Bearer YOUR_KEY'",
    };
    let body = serde_json::json!({
        "model": app.model_names[0],
        "messages": [{"role": "user", "content": "What is a mixture of experts?"}],
    });
    let mut out = std::io::stdout().lock();
    writeln!(out, "Moesaic {} on http://{address}\n", env!("CARGO_PKG_VERSION"))?;
    for line in app.config.to_toml().lines() {
        writeln!(out, "  {line}")?;
    }
    writeln!(
        out,
        "\nTry it, once the model is loaded:\n\n  curl http://{}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'\n",
        reachable(address),
    )?;
    out.flush()?;
    Ok(())
}

/// The address to connect to: the wildcard address listens, but is no destination.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => SocketAddr::from(([127, 0, 0, 1], v4.port())),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => SocketAddr::from(([127, 0, 0, 1], v6.port())),
        address => address,
    }
}

/// The recorder's histograms grow until they are folded.
async fn upkeep(app: Arc<App>) {
    let mut ticks = tokio::time::interval(METRICS_UPKEEP);
    loop {
        ticks.tick().await;
        app.metrics.run_upkeep();
    }
}

/// Loading progress: a bar on a terminal, else a log line per tenth.
struct LoadBar {
    bar: Option<ProgressBar>,
    stage: LoadStage,
    tenths_logged: u64,
}

fn name_of(stage: LoadStage) -> &'static str {
    match stage {
        LoadStage::Weights => "loading the model",
        LoadStage::Mapped => "reading mapped weights",
        LoadStage::Experts => "reading experts",
    }
}

impl LoadBar {
    fn new(model_dir: &Path) -> Self {
        let stage = LoadStage::Weights;
        tracing::info!(path = %model_dir.display(), "{}", name_of(stage));
        let style = "{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec}";
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(style).expect("the template is constant and valid");
            ProgressBar::new(0).with_style(style).with_message(name_of(stage))
        });
        Self { bar, stage, tenths_logged: 0 }
    }

    fn show(&mut self, progress: &LoadProgress) {
        if progress.stage != self.stage {
            (self.stage, self.tenths_logged) = (progress.stage, 0);
            if let Some(bar) = &self.bar {
                bar.set_message(name_of(self.stage));
                bar.reset();
            }
        }
        match &self.bar {
            Some(bar) => {
                bar.set_length(progress.total_bytes);
                bar.set_position(progress.done_bytes);
            }
            None => {
                let tenths = progress.done_bytes.saturating_mul(10) / progress.total_bytes.max(1);
                if tenths > self.tenths_logged {
                    self.tenths_logged = tenths;
                    tracing::info!(percent = tenths * 10, "{}", name_of(self.stage));
                }
            }
        }
    }

    fn done(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
