//! From a folder or a GGUF file to a running engine.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use candle_core::Device;
use kernels::KvFormat;
use scheduler::{Scheduler, SchedulerConfig};

use crate::config::{EngineConfig, ExpertMemory, ExpertWarmup, KvDtype, WeightDtype, WeightQuant, WeightStorage};
use crate::error::EngineError;
use crate::expert_placement::{Host, open_store};
use crate::experts::{ExpertStore, RoutedLayout, RoutedRows};
use crate::fingerprint::{Fingerprint, Weights};
use crate::handle::{EngineHandle, ModelSummary};
use crate::layers::rope::ContextLen;
use crate::memory::room::Room;
use crate::memory::{ArenaSize, BlockCoding, KvArena, budget};
use crate::models::{self, CacheSite, MAX_MODEL_LEN, Model, ModelShape, ModelSource, Prefill};
use crate::runner::largest_step::LargestStep;
use crate::runner::{Runner, TokenPlaces};
use crate::shared::{Front, Shared};
use crate::step_loop::StepLoop;
use crate::weights::inspect::{Inspection, inspect_files};
use crate::weights::loader::{LoadProgress, LoadStage, Loader};
use crate::weights::model_config::ModelConfig;
use crate::weights::model_files::ModelFiles;
use crate::weights::quantization::Quantization;
use crate::weights::tally::TensorClass;

/// Share of the memory that a rotary table may take; that of a published model is far below.
const TABLE_SHARE: u64 = 8;

/// A model in memory with the pieces that make an engine of it.
pub struct LoadedModel {
    pub summary: ModelSummary,
    pub fingerprint: Fingerprint,
    pub scheduler: Scheduler,
    pub runner: Runner,
}

/// Loads the model of `config.model_dir` and starts its step loop.
///
/// # Errors
/// Whatever is wrong with the folder, the settings, or their fit to each other; see [`EngineError`].
pub fn load(config: EngineConfig, progress: &mut dyn FnMut(LoadProgress)) -> Result<EngineHandle, EngineError> {
    let LoadedModel { summary, fingerprint, scheduler, runner } = load_model(&config, progress)?;
    let shared = Arc::new(Shared::new((summary, fingerprint), &runner, config.max_queue));
    // The queue's limit counts requests; one more place is for the word that wakes the loop.
    let (commands, receiver) = sync_channel(config.max_queue + 1);
    kernels::keep_freed_memory();
    let step_loop = StepLoop::new(scheduler, runner, shared.clone());
    let thread = std::thread::Builder::new()
        .name("step-loop".into())
        .spawn(move || {
            kernels::pool::pin_caller();
            step_loop.run(&receiver);
        })
        .map_err(EngineError::Thread)?;
    Ok(EngineHandle { front: Arc::new(Front::new(shared, commands, thread)) })
}

/// Loads a model without starting a thread: the caller drives scheduler and runner.
///
/// # Errors
/// As [`load`].
pub fn load_model(config: &EngineConfig, progress: &mut dyn FnMut(LoadProgress)) -> Result<LoadedModel, EngineError> {
    check_limits(config)?;
    let files = ModelFiles::open(&config.model_dir)?;
    load_files(config, &files, progress).map_err(|error| files.explain(error))
}

fn load_files(
    config: &EngineConfig,
    files: &ModelFiles,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedModel, EngineError> {
    config.isa.map_or(Ok(()), kernels::choose_isa)?;
    let threads = kernels::pool::init(config.threads);
    let device = kernels::open_device(config.device)?;
    if config.experts.memory.is_some() && !device.is_cpu() {
        return Err(EngineError::ExpertsOnDevice);
    }
    let room = Room::new(config, &device)?;
    let inspection = inspect_files(files)?;
    let model_config = files.config()?;
    let positions = (models::architecture(model_config.model_type()?)?.positions)(&model_config)?;
    let configured = config.max_model_len.unwrap_or(positions.default);
    if configured > positions.most {
        let allowed = format!("at most {}, {}", positions.most, positions.limited_by);
        return Err(EngineError::Limit { what: "max_model_len", value: configured as u64, allowed });
    }
    // Half of what was inspected, which may have been f32 where bf16 will be kept.
    let max_len = configured.min(budget::longest_sequence(config, &room, inspection.least_kv_bytes_per_token / 2));
    let max_table_bytes = config.available_memory / TABLE_SHARE;
    let len = ContextLen { configured, reachable: max_len, max_table_bytes };
    // What the other settings make of them shows when they are loaded.
    if config.quant == WeightQuant::None && matches!(config.dtype, WeightDtype::Auto | WeightDtype::F32) {
        let needed =
            if config.dtype == WeightDtype::F32 { inspection.memory_bytes_f32 } else { inspection.memory_bytes };
        room.check_weights(needed, None)?;
    }
    let Loaded { model, experts, expert_bytes, weights, weight_bytes, weight_formats } =
        load_weights(config, (files, &model_config, &device), (len, &inspection), progress)?;
    room.check_weights(weight_bytes, config.kv_cache_memory)?;
    let kv_dtype = resolve_kv_dtype(config, &inspection);
    let format = if kv_dtype == KvDtype::F32 { KvFormat::F32 } else { KvFormat::Bf16 };
    let routed = RoutedLayout::of(model.shape());
    let cache_sites = model.shape().cache_sites.clone();
    let demand = |room: &Room| budget::KvDemand {
        sites: &cache_sites,
        routing_bytes_per_token: routed.bytes_per_token() as u64,
        dtype: kv_dtype,
        most_bytes: room.for_cache(weight_bytes),
        max_position_embeddings: max_len,
    };
    let kv = budget::plan(config, &demand(&room))?;
    let (model, step_bytes) = LargestStep::new(config, &kv).measure(model, (format, &device))?;
    let step_bytes = step_bytes.unwrap_or_else(|| Room::estimated_step_bytes(config));
    let room = room.without_steps(step_bytes, weight_bytes)?;
    room.check_weights(weight_bytes, config.kv_cache_memory)?;
    let kv = budget::plan(config, &demand(&room))?;
    warn_of_surprises(config, &room, (&kv, positions.default));
    let shape = model.shape();
    let settings =
        numerics(config, kernels::device_kind(&device)?, (&model_config, &weight_formats), format, configured);
    let fingerprint = Fingerprint::new(&settings, weights);
    let can_resume = kv.num_state_slots == 0 || kv.num_snapshot_slots > 0;
    let has_prefix_cache = config.caches_prefixes() && shape.prefill == Prefill::Causal && can_resume;
    let scheduler = Scheduler::new(SchedulerConfig {
        block_size: config.block_size,
        num_blocks: kv.num_blocks,
        num_state_slots: kv.num_state_slots,
        num_snapshot_slots: kv.num_snapshot_slots,
        window: kv.window,
        snapshot_interval: config.snapshot_interval.div_ceil(config.block_size),
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_model_len: kv.max_model_len + shape.prefill.num_extra_tokens(),
        // The handle bounds the queue; the scheduler's own bound must only never be the tighter one.
        max_queue: config.max_queue.saturating_add(config.max_num_seqs),
        prefix_cache: has_prefix_cache.then(|| fingerprint.numerics()),
        batch_timeout: config.batch_timeout,
    })?;
    let num_blocks = kv.num_blocks;
    let num_state_slots = kv.num_state_slots + kv.num_snapshot_slots;
    let size = ArenaSize { format, block_size: config.block_size, num_blocks, window: kv.window, num_state_slots };
    let arena = KvArena::new(&shape.cache_sites, size, &device)?;
    let routed_rows = RoutedRows::new(routed.clone(), num_blocks, config.block_size);
    let routing_bytes_per_token = routed.bytes_per_token() as u64;
    let expert_memory_bytes = experts.as_ref().map_or(expert_bytes, ExpertStore::capacity_bytes);
    let expert_read = experts.as_ref().map(|store| store.read_mode().name());
    let places = TokenPlaces { routed: routed_rows, block_size: config.block_size };
    let runner = Runner::new(model, arena, places, config.routing).with_experts(experts);
    let shape = runner.shape();
    let summary = ModelSummary {
        architecture: model_config.model_type()?.to_owned(),
        vocab_size: shape.vocab_size,
        num_layers: shape.num_layers,
        num_mtp_layers: shape.num_mtp_layers,
        num_experts: shape.moe_layers.iter().map(|layer| layer.num_experts).max().unwrap_or(0),
        num_experts_per_tok: inspection.num_experts_per_tok,
        num_parameters: inspection.num_parameters,
        num_active_parameters: inspection.num_active_parameters,
        num_shared_parameters: inspection.num_active_parameters.saturating_sub(routed_parameters(shape)),
        weight_bytes,
        expert_bytes,
        expert_memory_bytes,
        expert_read,
        weight_formats,
        kv_bytes_per_token: kv.bytes_per_token + kv.window_bytes_per_token,
        block_bytes: runner.block_len(BlockCoding::Exact),
        routing_bytes_per_token,
        routed,
        state_bytes_per_sequence: shape.cache_sites.iter().map(CacheSite::state_bytes).sum(),
        max_model_len: kv.max_model_len,
        block_size: config.block_size,
        num_blocks,
        num_window_blocks: kv.window.map_or(0, |window| window.num_blocks),
        num_state_slots: kv.num_state_slots,
        num_snapshot_slots: kv.num_snapshot_slots,
        has_prefix_cache,
        can_load_prefixes: scheduler.can_load(),
        has_encoder: shape.prefill != Prefill::Causal,
        kv_dtype: format.name(),
        threads,
        isa: kernels::isa(),
        device: kernels::device_name(&device)?,
        device_step_bytes: (!device.is_cpu()).then_some(step_bytes),
        device_memory: kernels::device_memory(&device)?,
        generation_defaults: files.generation_defaults(&model_config)?,
    };
    Ok(LoadedModel { summary, fingerprint, scheduler, runner })
}

/// What the bits of an output depend on beside request and weights.
fn numerics(
    config: &EngineConfig,
    device_kind: Option<String>,
    (model_config, weight_formats): (&ModelConfig, &[&'static str]),
    kv_format: KvFormat,
    max_model_len: usize,
) -> Vec<(&'static str, String)> {
    let mut settings = vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("numerics", kernels::NUMERICS_VERSION.to_string()),
        ("isa", kernels::isa().to_owned()),
        ("config", model_config.to_json()),
        ("dtype", format!("{:?}", config.dtype)),
        ("quant", format!("{:?}", config.quant)),
        ("weight_formats", weight_formats.join("+")),
        ("kv_dtype", kv_format.name().to_owned()),
        ("block_size", config.block_size.to_string()),
        // Some rotary tables follow from it.
        ("max_model_len", max_model_len.to_string()),
    ];
    settings.extend(device_kind.map(|kind| ("device", kind)));
    if config.routing.is_on() {
        settings.push(("routing", format!("{:?}", config.routing)));
    }
    settings
}

/// Of the experts that routers choose for a token, all of which compute something.
fn routed_parameters(shape: &ModelShape) -> u64 {
    let own = shape.moe_layers.len() - shape.num_mtp_moe_layers;
    let layers = shape.moe_layers[..own].iter().zip(&shape.expert_costs);
    layers.map(|(layer, cost)| layer.top_k as u64 * cost.num_parameters).sum()
}

/// What serves, but not as somebody may think it does.
fn warn_of_surprises(config: &EngineConfig, room: &Room, (kv, positions): (&budget::KvBudget, usize)) {
    if config.max_model_len.is_none() && kv.max_model_len < positions {
        tracing::warn!(
            max_model_len = kv.max_model_len,
            of_the_model = positions,
            "the KV cache holds no longer sequence; --kv-cache-memory gives it more"
        );
    }
    if kv.num_state_slots > 0 && kv.num_state_slots < config.max_num_seqs {
        tracing::info!(
            states = kv.num_state_slots,
            max_num_seqs = config.max_num_seqs,
            "no more sequences run at once than have a recurrent state; --kv-cache-memory gives room for more"
        );
    }
    if let Some(bytes) = config.kv_cache_memory.filter(|&bytes| bytes > room.bytes()) {
        let available = room.bytes();
        tracing::warn!(bytes, available, "--kv-cache-memory is more than the memory there is");
    }
    if config.enable_prefix_caching && !config.caches_prefixes() {
        tracing::warn!(
            "no blocks of prompts are kept: under --capacity-factor and --overload-decay they depend on the requests beside them"
        );
    }
}

/// A model and what its weights take.
struct Loaded {
    model: Box<dyn Model>,
    /// Where they are not in the model.
    experts: Option<ExpertStore>,
    /// Of all routed experts, wherever they are.
    expert_bytes: u64,
    weights: Weights,
    weight_bytes: u64,
    weight_formats: Vec<&'static str>,
}

/// The weights in memory, but for experts where these have a budget that is less than they take.
fn load_weights(
    config: &EngineConfig,
    (files, model_config, device): (&ModelFiles, &ModelConfig, &Device),
    (max_model_len, inspection): (ContextLen, &Inspection),
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded, EngineError> {
    let is_packed = files.packed(model_config)?.is_some();
    let whole = |progress: &mut dyn FnMut(LoadProgress)| {
        load_parts(config, (files, model_config, device), (max_model_len, Experts::InMemory), progress)
    };
    let Some(memory) = config.experts.memory else { return whole(progress) };
    if is_packed {
        // What all experts take is known when the layers have asked for them, and that reads nothing.
        let parts = load_parts(config, (files, model_config, device), (max_model_len, Experts::LeftInFiles), progress)?;
        if parts.experts.is_some() {
            return Ok(parts);
        }
        drop(parts);
        return whole(progress);
    }
    // Where nothing is made smaller while it is loaded, that is known before.
    let is_as_stored = config.quant == WeightQuant::None && config.dtype == WeightDtype::Auto;
    let experts = inspection.classes.iter().filter(|size| size.class == TensorClass::Experts);
    let stored_expert_bytes = experts.map(|size| size.memory_bytes).sum();
    let is_part = matches!(memory, ExpertMemory::Percent(percent) if percent < 100.0);
    if is_part || is_as_stored && memory.bytes(stored_expert_bytes) < stored_expert_bytes {
        return Err(EngineError::ExpertsNotPacked);
    }
    let loaded = whole(progress)?;
    match memory.bytes(loaded.expert_bytes) < loaded.expert_bytes {
        true => Err(EngineError::ExpertsNotPacked),
        false => Ok(loaded),
    }
}

/// Where the routed experts of a model are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Experts {
    InMemory,
    /// Of a packed folder.
    LeftInFiles,
}

fn load_parts(
    config: &EngineConfig,
    (files, model_config, device): (&ModelFiles, &ModelConfig, &Device),
    (max_model_len, place): (ContextLen, Experts),
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded, EngineError> {
    let architecture = models::architecture(model_config.model_type()?)?;
    let checkpoint = files.checkpoint(model_config)?;
    let quantization = Quantization::from_config(model_config)?;
    let packed = files.packed(model_config)?;
    packed.as_ref().map_or(Ok(()), |packed| packed.check(config))?;
    let storage = WeightStorage { dtype: config.dtype, quant: config.quant };
    let loader = Loader::new(&checkpoint, quantization, storage, progress).with_packed(packed.as_ref()).on(device);
    let loader = if place == Experts::LeftInFiles { loader.leaving_experts() } else { loader };
    let num_mtp_layers = if config.load_mtp { architecture.mtp.wanted(model_config, &loader)? } else { 0 };
    let source = ModelSource { config: model_config, loader: &loader, max_model_len, num_mtp_layers };
    let model = (architecture.load)(&source)?;
    let (mut weight_bytes, weight_formats) = (loader.weight_bytes(), loader.formats());
    let (expert_bytes, catalog) = (loader.expert_bytes(), loader.take_catalog());
    let (huge_pages, mapped) = (loader.take_huge_pages(), loader.take_mapped());
    loader.finish(|name| {
        let is_loaded = num_mtp_layers > 0 && architecture.mtp.holds(model_config, name);
        models::is_ignored_everywhere(model_config, name) || (architecture.ignored)(model_config, name) && !is_loaded
    })?;
    checkpoint.release_pages();
    let num_bytes = huge_pages.gather();
    tracing::debug!(num_bytes, of = weight_bytes, "weights gathered into huge pages");
    let is_read_in = device.is_cpu() && place == Experts::InMemory && config.experts.warmup != ExpertWarmup::None;
    if is_read_in && weight_bytes > config.available_memory {
        // They would only push each other out again.
        let available = config.available_memory;
        tracing::info!(weight_bytes, available, "weights are left in their files: they are more than the free memory");
    } else if is_read_in {
        let total_bytes = mapped.num_bytes();
        mapped
            .read_in(|done_bytes| progress(LoadProgress { stage: LoadStage::Mapped, done_bytes, total_bytes }))
            .map_err(|(path, source)| EngineError::Read { path, source })?;
    }
    let weights = packed.map_or_else(|| Weights::Files(checkpoint.files()), |packed| Weights::Digest(packed.digest));
    let host = Host { shape: model.shape(), weights: weights.sample(), weight_bytes };
    let experts = match (catalog, config.experts.memory) {
        (Some(catalog), Some(memory)) => open_store(config, memory, (catalog, &host), progress)?,
        _ => None,
    };
    weight_bytes += experts.as_ref().map_or(0, ExpertStore::capacity_bytes);
    Ok(Loaded { model, experts, expert_bytes, weights, weight_bytes, weight_formats })
}

/// Where nothing is chosen, f32 weights keep f32 keys and values; others are not worth the memory.
fn resolve_kv_dtype(config: &EngineConfig, inspection: &Inspection) -> KvDtype {
    match (config.kv_dtype, config.dtype) {
        (KvDtype::Auto, WeightDtype::F32) => KvDtype::F32,
        (KvDtype::Auto, WeightDtype::Auto) if inspection.kv_dtype == "f32" => KvDtype::F32,
        (KvDtype::Auto, _) => KvDtype::Bf16,
        (chosen, _) => chosen,
    }
}

fn check_limits(config: &EngineConfig) -> Result<(), EngineError> {
    let check = |what, value: usize, range: std::ops::RangeInclusive<usize>| match range.contains(&value) {
        true => Ok(()),
        false => {
            let allowed = format!("{} to {}", range.start(), range.end());
            Err(EngineError::Limit { what, value: value as u64, allowed })
        }
    };
    check("block_size", config.block_size, 1..=256)?;
    check("max_num_seqs", config.max_num_seqs, 1..=1 << 16)?;
    check("max_num_batched_tokens", config.max_num_batched_tokens, 1..=1 << 20)?;
    check("snapshot_interval", config.snapshot_interval, 1..=MAX_MODEL_LEN)?;
    check("max_queue", config.max_queue, 1..=1 << 20)?;
    check("max_model_len", config.max_model_len.unwrap_or(1), 1..=MAX_MODEL_LEN)?;
    if !config.block_size.is_power_of_two() {
        let value = config.block_size as u64;
        return Err(EngineError::Limit { what: "block_size", value, allowed: "powers of two from 1 to 256".into() });
    }
    Ok(())
}
