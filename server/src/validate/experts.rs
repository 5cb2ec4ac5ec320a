//! What a request may change about the experts of its tokens.

use engine::{ExpertOptions, RoutingOptions};

use crate::error::ApiError;
use crate::openai::MoeOptions;

/// As in the settings: less would be the first expert alone, which `max_experts` says.
const LEAST_TOP_P: f32 = 0.001;

/// What validation needs to know about the experts of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExpertLimits {
    /// Most experts that a router chooses for a token; 0 where there are none.
    pub top_k: usize,
    /// `moe.top_p` where a request is silent.
    pub top_p: f32,
    /// What acts on every request.
    pub routing: RoutingOptions,
}

impl ExpertLimits {
    /// Of a request that names none.
    pub fn of_silent(&self) -> ExpertOptions {
        ExpertOptions { top_p: if self.top_k > 1 { self.top_p } else { 1.0 }, ..ExpertOptions::default() }
    }

    /// True if answers are not what the model's own routers would give.
    pub fn change(&self, options: &ExpertOptions) -> bool {
        self.top_k > 0 && (self.routing.is_on() || options.leaves_out())
    }
}

/// Options in effect; those that can leave nothing out are as if they were not there. `seed` is of the request's draws.
///
/// # Errors
/// A value out of its range, options for a model that has no experts.
pub fn expert_options(fields: Option<MoeOptions>, seed: u64, limits: &ExpertLimits) -> Result<ExpertOptions, ApiError> {
    let MoeOptions { top_p, max_experts, usage } = fields.unwrap_or_default();
    if limits.top_k == 0 {
        return match top_p.is_some() || max_experts.is_some() || usage == Some(true) {
            true => Err(ApiError::invalid("moe", "the model has no experts")),
            false => Ok(ExpertOptions::default()),
        };
    }
    if let Some(top_p) = top_p.filter(|top_p| !(LEAST_TOP_P..=1.0).contains(top_p)) {
        return Err(ApiError::invalid("moe.top_p", format!("is {top_p}, allowed are {LEAST_TOP_P} to 1")));
    }
    if max_experts == Some(0) {
        return Err(ApiError::invalid("moe.max_experts", "is 0, allowed are 1 and up"));
    }
    let silent = limits.of_silent();
    Ok(ExpertOptions {
        top_p: top_p.filter(|_| limits.top_k > 1).unwrap_or(silent.top_p),
        max_experts: max_experts.filter(|&most| (most as usize) < limits.top_k),
        noise_seed: if limits.routing.noise == 0.0 { 0 } else { seed },
    })
}

#[cfg(test)]
mod tests {
    use engine::{Capacity, Overflow};

    use super::*;

    fn fields(top_p: Option<f32>, max_experts: Option<u32>) -> Option<MoeOptions> {
        Some(MoeOptions { top_p, max_experts, usage: None })
    }

    fn limits(top_k: usize) -> ExpertLimits {
        ExpertLimits { top_k, top_p: 1.0, routing: RoutingOptions::default() }
    }

    #[test]
    fn only_what_can_act_is_in_effect() {
        let noisy = RoutingOptions { noise: 0.5, ..RoutingOptions::default() };
        let capacity = Some(Capacity { factor: 1.0, overflow: Overflow::Drop });
        let plain = ExpertOptions::default();
        for (asked, limits, expected, changes) in [
            (None, limits(4), plain, false),
            (fields(None, None), limits(4), plain, false),
            (fields(Some(1.0), Some(4)), limits(4), plain, false),
            (fields(Some(0.5), Some(3)), limits(1), plain, false),
            (fields(Some(0.5), None), limits(4), ExpertOptions { top_p: 0.5, ..plain }, true),
            (fields(None, Some(3)), limits(4), ExpertOptions { max_experts: Some(3), ..plain }, true),
            (None, ExpertLimits { top_p: 0.7, ..limits(4) }, ExpertOptions { top_p: 0.7, ..plain }, true),
            (fields(Some(1.0), None), ExpertLimits { top_p: 0.7, ..limits(4) }, plain, false),
            (None, ExpertLimits { routing: noisy, ..limits(4) }, ExpertOptions { noise_seed: 9, ..plain }, true),
            (
                None,
                ExpertLimits { routing: RoutingOptions { capacity, ..RoutingOptions::default() }, ..limits(4) },
                plain,
                true,
            ),
            (None, ExpertLimits { routing: noisy, ..limits(0) }, plain, false),
        ] {
            let options = expert_options(asked, 9, &limits).unwrap();
            assert_eq!((options, limits.change(&options)), (expected, changes), "{asked:?} {limits:?}");
        }
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        for (top_p, max_experts, param) in [
            (Some(0.0), None, "moe.top_p"),
            (Some(1.1), None, "moe.top_p"),
            (Some(f32::NAN), None, "moe.top_p"),
            (None, Some(0), "moe.max_experts"),
        ] {
            let error = expert_options(fields(top_p, max_experts), 0, &limits(4)).unwrap_err();
            assert_eq!(error.param(), Some(param));
        }
        for asked in [
            fields(Some(0.5), None),
            fields(None, Some(1)),
            Some(MoeOptions { usage: Some(true), ..MoeOptions::default() }),
        ] {
            assert_eq!(expert_options(asked, 0, &limits(0)).unwrap_err().param(), Some("moe"));
        }
    }
}
