//! Layer shapes of published models.

/// Granite-3.1-1B-A400M.
pub(super) const GRANITE_1B: Model = Model {
    name: "granite-1b",
    hidden_size: 1024,
    intermediate: 512,
    num_experts: 32,
    top_k: 8,
    num_heads: 16,
    num_kv_heads: 8,
    head_dim: 64,
    vocab_size: 49155,
};

/// OLMoE-1B-7B.
pub(super) const OLMOE_7B: Model = Model {
    name: "olmoe-7b",
    hidden_size: 2048,
    intermediate: 1024,
    num_experts: 64,
    top_k: 8,
    num_heads: 16,
    num_kv_heads: 16,
    head_dim: 128,
    vocab_size: 50304,
};

pub(super) const MODELS: [&Model; 2] = [&GRANITE_1B, &OLMOE_7B];

/// Rows of a decode step of one and of many sequences, and of a prefill step.
pub(super) const NUM_TOKENS: [usize; 3] = [1, 32, 512];

/// One layer of a decoder with experts and grouped-query attention.
pub(super) struct Model {
    pub(super) name: &'static str,
    pub(super) hidden_size: usize,
    pub(super) intermediate: usize,
    pub(super) num_experts: usize,
    pub(super) top_k: usize,
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab_size: usize,
}

/// Latent attention of DeepSeek-V2-Lite.
pub(super) struct LatentModel {
    pub(super) name: &'static str,
    pub(super) num_heads: usize,
    pub(super) latent_dim: usize,
    pub(super) rope_dim: usize,
    pub(super) nope_dim: usize,
}

pub(super) const DEEPSEEK_V2_LITE: LatentModel =
    LatentModel { name: "deepseek-v2-lite", num_heads: 16, latent_dim: 512, rope_dim: 64, nope_dim: 128 };
