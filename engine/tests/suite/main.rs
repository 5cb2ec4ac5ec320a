//! The engine's tests against real checkpoints: parity, invariance, and its life as callers see it.

#![forbid(unsafe_code)]

#[macro_use]
mod folders;

mod checkpoint_edit;
mod driver;
mod expert_options;
mod expert_residency;
mod expert_store;
mod expert_traces;
mod gguf;
#[path = "../../src/weights/gguf_fixture.rs"]
mod gguf_fixture;
mod gguf_writer;
mod golden;
mod golden_bf16;
mod hostile;
mod inspection;
mod invariance;
mod mtp;
mod quantized;
mod step_loop;
mod transposed_int4;
mod weight_quant;
