//! T5's relative positions: one learned bias per head for every bucket of distances.

use kernels::PositionBias;

use crate::error::EngineError;
use crate::weights::model_config::ModelConfig;

/// Tables are made for every distance and head: more than any model has is refused.
const MOST_DISTANCES: usize = 1 << 16;
const MOST_BIASES: usize = 1 << 24;

/// How distances fall into buckets: the near ones each into its own, the others by their logarithm.
#[derive(Clone, Copy, Debug)]
pub struct Buckets {
    pub num_buckets: usize,
    max_distance: usize,
    /// Half of the buckets are for keys after the query.
    is_bidirectional: bool,
}

impl Buckets {
    /// `relative_attention_num_buckets` and `relative_attention_max_distance`.
    pub fn from_config(config: &ModelConfig, num_heads: usize, is_bidirectional: bool) -> Result<Self, EngineError> {
        let num_buckets = config.size("relative_attention_num_buckets")?;
        let max_distance = config.size("relative_attention_max_distance")?;
        let buckets = Self { num_buckets, max_distance, is_bidirectional };
        if !(4..=MOST_DISTANCES).contains(&num_buckets) {
            let reason = format!("is {num_buckets}, allowed are 4 to {MOST_DISTANCES}");
            return Err(EngineError::Config { key: "relative_attention_num_buckets", reason });
        }
        let nearest = buckets.num_exact() + 1;
        let farthest = MOST_DISTANCES.min(MOST_BIASES / 2 / num_heads.max(1));
        if !(nearest..=farthest).contains(&max_distance) {
            let reason = format!("is {max_distance}, allowed are {nearest} to {farthest} with {num_heads} heads");
            return Err(EngineError::Config { key: "relative_attention_max_distance", reason });
        }
        Ok(buckets)
    }

    /// The table of a stack from its weights `[num_buckets, num_heads]`.
    pub fn by_distance(&self, weights: &[f32], num_heads: usize) -> PositionBias {
        let limit = self.max_distance as isize;
        let of_head = |head| (-limit..=limit).map(move |distance| weights[self.of(distance) * num_heads + head]);
        PositionBias { table: (0..num_heads).flat_map(of_head).collect(), max_distance: self.max_distance }
    }

    /// The bucket of a distance, key minus query. In f32 as transformers computes it: rounding decides at the edges.
    fn of(&self, distance: isize) -> usize {
        let per_side = self.per_side();
        let (offset, distance) = match (self.is_bidirectional, distance) {
            (true, 1..) => (per_side, distance.unsigned_abs()),
            (false, 1..) => (0, 0),
            _ => (0, distance.unsigned_abs()),
        };
        let exact = self.num_exact();
        if distance < exact {
            return offset + distance;
        }
        let span = (self.max_distance as f64 / exact as f64).ln() as f32;
        let log = (distance as f32 / exact as f32).ln() / span * (per_side - exact) as f32;
        offset + (exact + log as usize).min(per_side - 1)
    }

    fn per_side(&self) -> usize {
        if self.is_bidirectional { self.num_buckets / 2 } else { self.num_buckets }
    }

    fn num_exact(&self) -> usize {
        self.per_side() / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of transformers' `_relative_position_bucket` with 32 buckets and a maximal distance of 128.
    #[test]
    fn distances_fall_into_the_published_buckets() {
        let check = |is_bidirectional, cases: &[(isize, usize)]| {
            let buckets = Buckets { num_buckets: 32, max_distance: 128, is_bidirectional };
            for &(distance, bucket) in cases {
                assert_eq!(buckets.of(distance), bucket, "{distance}, bidirectional: {is_bidirectional}");
            }
        };
        check(true, &[(0, 0), (-7, 7), (-8, 8), (-12, 9), (-16, 10), (-90, 14), (-91, 15), (-200, 15)]);
        check(true, &[(1, 17), (7, 23), (8, 24), (64, 30), (128, 31)]);
        check(false, &[(0, 0), (3, 0), (-15, 15), (-16, 16), (-32, 21), (-100, 30), (-113, 31), (-128, 31)]);
    }

    #[test]
    fn tables_that_outgrow_the_memory_are_refused() {
        let config = serde_json::json!({
            "relative_attention_num_buckets": 32, "relative_attention_max_distance": 1 << 16,
        });
        let config = ModelConfig::from_value(config).unwrap();
        assert!(Buckets::from_config(&config, 64, true).is_ok());
        let error = Buckets::from_config(&config, 1 << 16, true).unwrap_err().to_string();
        let expect = "config.json: `relative_attention_max_distance` is 65536, allowed are 9 to 128 with 65536 heads";
        assert_eq!(error, expect);
    }
}
