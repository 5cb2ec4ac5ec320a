//! In which format a weight is kept in memory.

use kernels::{Codes, QuantFormat, WeightFormat};

use crate::config::{WeightDtype, WeightQuant, WeightStorage};

/// What a matrix is for, which says how small it may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// In a layer: as small as was asked for.
    Layer,
    /// Of a routed expert: as small, and it may be left where it lies.
    Expert,
    /// The embedding and the output projection: eight bits at least.
    Table,
    /// It chooses or gates: never quantized, for a choice that changes costs more than its few bytes.
    Router,
}

impl Role {
    /// The format to convert a weight to that is stored as `found`; `None` leaves it.
    pub(super) fn target(self, storage: WeightStorage, found: WeightFormat) -> Option<WeightFormat> {
        let wanted = match (self, storage.quant) {
            (Self::Router, _) | (_, WeightQuant::None) => None,
            (Self::Layer | Self::Expert, WeightQuant::Int4) => Some(QuantFormat::INT4),
            (Self::Layer | Self::Expert, WeightQuant::Int8) | (Self::Table, _) => Some(QuantFormat::INT8),
        };
        match (wanted, found) {
            // It would only lose.
            (Some(wanted), WeightFormat::Quantized(found)) if num_bits(found) <= num_bits(wanted) => None,
            (Some(wanted), _) => Some(WeightFormat::Quantized(wanted)),
            (None, _) => match storage.dtype {
                WeightDtype::Auto => None,
                WeightDtype::F32 => Some(WeightFormat::F32),
                WeightDtype::Bf16 => Some(WeightFormat::Bf16),
                WeightDtype::F16 => Some(WeightFormat::F16),
            },
        }
    }
}

/// Of a code.
fn num_bits(format: QuantFormat) -> u32 {
    match format.codes {
        Codes::Int8 | Codes::Int8Min | Codes::Int8Rotated => 8,
        Codes::Int4 | Codes::Int4Min | Codes::Int4Double | Codes::Fp4 => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_weight_is_for_says_how_small_it_may_be() {
        use WeightFormat::{Bf16, F32, Quantized};
        let int8 = Quantized(QuantFormat::INT8);
        let int4 = Quantized(QuantFormat::INT4);
        let fp4 = Quantized(QuantFormat { codes: Codes::Fp4, group: 32 });
        for (quant, dtype, role, found, target) in [
            (WeightQuant::None, WeightDtype::Auto, Role::Layer, Bf16, None),
            (WeightQuant::None, WeightDtype::F32, Role::Layer, int4, Some(F32)),
            (WeightQuant::Int8, WeightDtype::Auto, Role::Layer, Bf16, Some(int8)),
            (WeightQuant::Int8, WeightDtype::F32, Role::Table, Bf16, Some(int8)),
            (WeightQuant::Int8, WeightDtype::F32, Role::Router, Bf16, Some(F32)),
            (WeightQuant::Int8, WeightDtype::Auto, Role::Layer, fp4, None),
            (WeightQuant::Int4, WeightDtype::Auto, Role::Layer, F32, Some(int4)),
            (WeightQuant::Int4, WeightDtype::Auto, Role::Expert, F32, Some(int4)),
            (WeightQuant::Int8, WeightDtype::Auto, Role::Expert, F32, Some(int8)),
            (WeightQuant::Int4, WeightDtype::Auto, Role::Layer, int8, Some(int4)),
            (WeightQuant::Int4, WeightDtype::Auto, Role::Table, F32, Some(int8)),
            (WeightQuant::Int4, WeightDtype::Auto, Role::Table, int4, None),
            (WeightQuant::Int4, WeightDtype::Auto, Role::Router, Bf16, None),
        ] {
            let storage = WeightStorage { dtype, quant };
            assert_eq!(role.target(storage, found), target, "{storage:?} {role:?} {found:?}");
        }
    }
}
