//! The engine's tests against real checkpoints: parity, invariance, and its life as callers see it.

#![forbid(unsafe_code)]

mod driver;
mod golden;
mod hostile;
mod invariance;
mod step_loop;
