//! What decoders are made of. Each layer holds its weights and maps rows to rows.

pub mod attention;
pub mod decoder;
pub mod ends;
pub mod gated_delta;
pub mod linear;
pub mod mla;
pub mod mlp;
pub mod moa;
pub mod moe;
pub mod mtp;
pub mod norm;
pub mod position_bias;
pub mod rope;
pub mod t5_attention;
pub mod table;
