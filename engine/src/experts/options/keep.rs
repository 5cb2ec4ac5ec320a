//! Fewer experts where the router is sure.

use super::ExpertOptions;

/// Of a token's experts, best first with these weights, how many stay: as many as it takes for their weights to reach `top_p` of
/// all of them together, and no more than `max_experts`; at least one. Where the weights have no sum above 0, `top_p` leaves
/// none out.
pub fn num_kept(weights: &[f32], options: &ExpertOptions) -> usize {
    let most = options.max_experts.map_or(weights.len(), |most| (most as usize).clamp(1, weights.len()));
    let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
    if options.top_p >= 1.0 || total.is_nan() || total <= 0.0 {
        return most;
    }
    let wanted = f64::from(options.top_p) * total;
    let mut sum = 0.0;
    let reached = weights.iter().position(|&weight| {
        sum += f64::from(weight);
        sum >= wanted
    });
    reached.map_or(most, |last| most.min(last + 1))
}

/// Takes the weights of all but the first; where the router brings its weights to a common sum, the first get that sum.
pub fn keep(weights: &mut [f32], num_kept: usize, renormalizes: bool) {
    if num_kept == weights.len() {
        return;
    }
    let sum = |weights: &[f32]| weights.iter().map(|&weight| f64::from(weight)).sum::<f64>();
    let (total, kept) = (sum(weights), sum(&weights[..num_kept]));
    weights[num_kept..].fill(0.0);
    if renormalizes && kept > 0.0 {
        weights[..num_kept].iter_mut().for_each(|weight| *weight = (f64::from(*weight) * total / kept) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(weights: &[f32], (top_p, max_experts): (f32, Option<u32>), expected: usize) {
        let options = ExpertOptions { top_p, max_experts, ..ExpertOptions::default() };
        assert_eq!(num_kept(weights, &options), expected, "{weights:?} {options:?}");
    }

    #[test]
    fn the_first_experts_that_reach_the_share_stay() {
        let weights = [0.5, 0.25, 0.125, 0.125];
        for (top_p, expected) in [(0.01, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.9, 4), (1.0, 4)]
        {
            check(&weights, (top_p, None), expected);
        }
        check(&weights, (0.8, Some(2)), 2);
        check(&weights, (0.5, Some(2)), 1);
        check(&weights, (1.0, Some(1)), 1);
        check(&weights, (1.0, Some(9)), 4);
        // Shares are of what the router chose, whatever that sums to.
        check(&weights.map(|weight| weight * 16.0), (0.75, None), 2);
        check(&[0.3], (0.1, None), 1);
    }

    #[test]
    fn weights_without_a_sum_leave_none_out_but_by_number() {
        for weights in [[f32::NAN, 0.5], [0.0, 0.0]] {
            check(&weights, (0.1, None), 2);
            check(&weights, (0.1, Some(1)), 1);
        }
    }

    #[test]
    fn what_is_left_gets_the_sum_where_the_router_gives_one() {
        let kept = |renormalizes| {
            let mut weights = [0.5, 0.25, 0.125, 0.125];
            keep(&mut weights, 2, renormalizes);
            weights
        };
        assert_eq!(kept(false), [0.5, 0.25, 0.0, 0.0]);
        assert_eq!(kept(true), [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        let mut scaled = [5.0, 2.5, 2.5];
        keep(&mut scaled, 1, true);
        assert_eq!(scaled, [10.0, 0.0, 0.0], "the router's scale stays");
        let mut zero = [0.0, 0.0];
        keep(&mut zero, 1, true);
        assert_eq!(zero, [0.0, 0.0]);
    }
}
