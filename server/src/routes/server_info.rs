//! `GET /server_info`: the resolved configuration and what is loaded.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::{App, Model};
use crate::config::Config;

/// Settings and model of this server.
#[derive(Serialize, ToSchema)]
pub struct ServerInfo {
    version: &'static str,
    /// Every setting with its resolved value; secrets show as `***`.
    #[schema(value_type = Object)]
    config: Config,
    /// Null while the model is being loaded.
    model: Option<ModelInfo>,
}

/// What is loaded.
#[derive(Serialize, ToSchema)]
pub struct ModelInfo {
    names: Vec<String>,
    architecture: String,
    num_parameters: u64,
    /// Parameters that one token uses.
    num_active_parameters: u64,
    num_layers: usize,
    /// Loaded multi-token-prediction layers, beside `num_layers`.
    num_mtp_layers: usize,
    num_experts: usize,
    num_experts_per_tok: usize,
    vocab_size: usize,
    weight_bytes: u64,
    /// Of all routed experts.
    expert_bytes: u64,
    /// What of that is in memory at most; less with --expert-memory.
    expert_memory_bytes: u64,
    /// How the others are read: `cached` or `direct`; null where all are in memory.
    expert_read: Option<&'static str>,
    /// Formats of the matrices in memory, most bytes first.
    weight_formats: Vec<&'static str>,
    kv_bytes_per_token: u64,
    /// The experts of a token, kept in the KV cache's memory beside it; 0 where the model has none, or an encoder.
    routing_bytes_per_token: u64,
    /// Of recurrent layers, for each running sequence; 0 where the model has none.
    state_bytes_per_sequence: u64,
    kv_cache_dtype: &'static str,
    max_model_len: usize,
    block_size: usize,
    num_blocks: usize,
    num_window_blocks: usize,
    /// Sequences whose recurrent state fits at once; 0 where the model has none.
    num_state_slots: usize,
    /// Recurrent states kept for prompts that begin alike; 0 where the model has none.
    num_snapshot_slots: usize,
    /// Prompts that begin alike are computed once; never with an encoder.
    has_prefix_cache: bool,
    /// An encoder reads the prompt.
    has_encoder: bool,
    threads: usize,
    /// Where the model computes: `cpu`, or a GPU with its name.
    device: String,
    /// Bytes of a GPU's memory; null on the CPU.
    device_memory_bytes: Option<u64>,
    /// What of that was free when the model was loaded.
    device_free_bytes: Option<u64>,
    /// What is kept of it for steps, as the largest one took at the start; null on the CPU.
    device_step_bytes: Option<u64>,
    /// Instruction set of the kernels that compute on the CPU.
    isa: &'static str,
    has_chat_template: bool,
}

/// Settings, secrets redacted, and the loaded model
#[utoipa::path(get, path = "/server_info", tag = "operation", responses((status = 200, body = ServerInfo)))]
pub async fn show(State(app): State<Arc<App>>) -> Json<ServerInfo> {
    Json(ServerInfo {
        version: env!("CARGO_PKG_VERSION"),
        config: app.config.clone(),
        model: app.loaded().map(|model| describe(&app, model)),
    })
}

fn describe(app: &App, model: &Model) -> ModelInfo {
    let summary = model.engine.model();
    ModelInfo {
        names: app.model_names.clone(),
        architecture: summary.architecture.clone(),
        num_parameters: summary.num_parameters,
        num_active_parameters: summary.num_active_parameters,
        num_layers: summary.num_layers,
        num_mtp_layers: summary.num_mtp_layers,
        num_experts: summary.num_experts,
        num_experts_per_tok: summary.num_experts_per_tok,
        vocab_size: summary.vocab_size,
        weight_bytes: summary.weight_bytes,
        expert_bytes: summary.expert_bytes,
        expert_memory_bytes: summary.expert_memory_bytes,
        expert_read: summary.expert_read,
        weight_formats: summary.weight_formats.clone(),
        kv_bytes_per_token: summary.kv_bytes_per_token,
        routing_bytes_per_token: summary.routing_bytes_per_token,
        state_bytes_per_sequence: summary.state_bytes_per_sequence,
        kv_cache_dtype: summary.kv_dtype,
        max_model_len: summary.max_model_len,
        block_size: summary.block_size,
        num_blocks: summary.num_blocks,
        num_window_blocks: summary.num_window_blocks,
        num_state_slots: summary.num_state_slots,
        num_snapshot_slots: summary.num_snapshot_slots,
        has_prefix_cache: summary.has_prefix_cache,
        has_encoder: summary.has_encoder,
        threads: summary.threads,
        device: summary.device.clone(),
        device_memory_bytes: summary.device_memory.map(|memory| memory.total_bytes),
        device_free_bytes: summary.device_memory.map(|memory| memory.free_bytes),
        device_step_bytes: summary.device_step_bytes,
        isa: summary.isa,
        has_chat_template: model.template.is_some(),
    }
}
