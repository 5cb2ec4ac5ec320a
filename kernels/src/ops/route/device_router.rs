//! A router as device code has it.

use super::{GroupScore, Groups, RouterSpec, Scoring};

/// `struct Router` of `route.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct DeviceRouter {
    num_experts: u32,
    top_k: u32,
    scoring: u32,
    jitter: f32,
    num_groups: u32,
    top_groups: u32,
    group_score: u32,
    masked: f32,
    renormalizes: u32,
    eps: f32,
    min_sum: f32,
    scale: f32,
}

impl DeviceRouter {
    pub(crate) fn new(spec: &RouterSpec, num_experts: usize) -> Self {
        let (scoring, jitter) = match spec.scoring {
            Scoring::Softmax => (0, 0.0),
            Scoring::SoftmaxTopK => (1, 0.0),
            Scoring::Sigmoid => (2, 0.0),
            Scoring::SparseMixer { jitter } => (3, jitter),
        };
        let groups = spec.groups.unwrap_or(Groups { num: 0, top: 0, score: GroupScore::Max, masked: 0.0 });
        Self {
            num_experts: num_experts as u32,
            top_k: spec.top_k as u32,
            scoring,
            jitter,
            num_groups: groups.num as u32,
            top_groups: groups.top as u32,
            group_score: u32::from(groups.score == GroupScore::TopTwoSum),
            masked: groups.masked,
            renormalizes: u32::from(spec.renormalize.is_some()),
            eps: spec.renormalize.unwrap_or(0.0),
            min_sum: spec.min_sum,
            scale: spec.scale,
        }
    }
}
