//! One folder per op: contract and checks in `mod.rs`, the oracle in `reference.rs`, the fast path in `cpu.rs`, device code in `.cu`.

pub(crate) mod argmax;
pub(crate) mod attention;
pub(crate) mod boltzmann;
pub(crate) mod embedding;
pub(crate) mod gated_delta;
pub(crate) mod glu;
pub(crate) mod grouped_swiglu;
pub(crate) mod head_linear;
pub(crate) mod layer_norm;
pub(crate) mod linear;
pub(crate) mod mla_attention;
pub(crate) mod paged_attention;
pub(crate) mod pointwise;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod route;
pub(crate) mod sampling;
