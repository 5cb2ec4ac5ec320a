//! What `quantization_config` of config.json says of how quantized weights are stored.
//!
//! Which weights are quantized is told by their tensors: those that compressed-tensors lists under `ignore` are stored
//! under their plain names.

use kernels::QuantFormat;
use serde_json::Value;

use super::grouped_ints::grouped_format;
use super::model_config::{ModelConfig, shown};
use super::packed_folder;
use crate::error::EngineError;

/// Tiles of block-scaled FP8 as DeepSeek publishes it.
const DEFAULT_TILE: [usize; 2] = [128, 128];

const METHODS: [&str; 6] = ["fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "awq", "gptq"];

/// How the quantized matrices of a checkpoint are stored; one way for all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quantization {
    /// Where the config does not say, the scales' shape does.
    pub scales: Option<ScaleLayout>,
    /// Of integers in words of 32 bits (compressed-tensors, `pack-quantized`).
    pub packing: Option<Packing>,
    /// Of integers of 4 bits that are stored inputs by outputs (AWQ, GPTQ).
    pub transposed: Option<TransposedInt4>,
}

/// Which values of a matrix share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleLayout {
    /// Tiles of so many rows and columns, at least 1 each; those at the edges are partial.
    Tiles([usize; 2]),
    /// Each row has its own.
    Rows,
    /// The matrix has one.
    Whole,
}

/// Integers side by side in words of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// 4 or 8.
    pub num_bits: usize,
    /// Each scale has a zero point beside it.
    pub has_zero_points: bool,
}

/// Integers of 4 bits in words of 32 bits: `{stem}.qweight` under `{stem}.scales` and `{stem}.qzeros`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransposedInt4 {
    pub kind: TransposedKind,
    /// Columns that share a scale; `None`: all of a row.
    pub group: Option<usize>,
    pub has_zero_points: bool,
    /// Those are all the middle of the range.
    pub is_symmetric: bool,
    /// Columns may be in groups by an order that is stored (`desc_act`).
    pub is_reordered: bool,
}

/// Who packed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransposedKind {
    Awq,
    /// The first version of the format stores zero points less one.
    Gptq {
        zeros_minus_one: bool,
    },
}

impl Packing {
    pub fn per_word(&self) -> usize {
        32 / self.num_bits
    }
}

impl ScaleLayout {
    /// Rows and columns under one scale of a matrix `[rows, cols]`.
    pub fn tile(&self, [rows, cols]: [usize; 2]) -> [usize; 2] {
        match *self {
            Self::Tiles(tile) => tile,
            Self::Rows => [1, cols.max(1)],
            Self::Whole => [rows.max(1), cols.max(1)],
        }
    }

    /// Shape of the scales of a matrix `[rows, cols]`.
    pub fn num_tiles(&self, shape: [usize; 2]) -> [usize; 2] {
        let [tile_rows, tile_cols] = self.tile(shape);
        [shape[0].div_ceil(tile_rows), shape[1].div_ceil(tile_cols)]
    }

    /// What scales of the shape `found` are for a matrix `[rows, cols]`, where nothing else says it.
    pub fn of_shape(found: &[usize], shape: [usize; 2]) -> Self {
        let default = Self::Tiles(DEFAULT_TILE);
        [default, Self::Whole, Self::Rows]
            .into_iter()
            .find(|layout| same_shape(found, &layout.num_tiles(shape)))
            .unwrap_or(default)
    }
}

/// Scales are stored with and without trailing dimensions of 1: `[rows, 1]` or `[rows]`, `[1]` or `[]`.
pub fn same_shape(left: &[usize], right: &[usize]) -> bool {
    let core = |shape: &[usize]| shape.len() - shape.iter().rev().take_while(|&&size| size == 1).count();
    left[..core(left)] == right[..core(right)]
}

impl Quantization {
    /// The format in memory of packed integers with `cols` columns; none where they are expanded.
    pub fn packed_format(&self, cols: u64) -> Option<QuantFormat> {
        let (num_bits, has_zeros, group) = match (self.transposed, self.packing) {
            (Some(TransposedInt4 { group, is_symmetric, .. }), _) => (4, !is_symmetric, group),
            (None, Some(Packing { num_bits, has_zero_points })) => {
                let group = match self.scales {
                    Some(ScaleLayout::Tiles([_, cols])) => Some(cols),
                    _ => None,
                };
                (num_bits, has_zero_points, group)
            }
            (None, None) => return None,
        };
        let cols = usize::try_from(cols).ok()?;
        grouped_format(num_bits, has_zeros, (group.unwrap_or(cols), cols))
    }

    /// Reads `quantization_config`; absent is unquantized.
    ///
    /// # Errors
    /// A method, format or number that is not supported, by its key.
    pub fn from_config(config: &ModelConfig) -> Result<Self, EngineError> {
        let Some(value) = config.get("quantization_config") else { return Ok(Self::default()) };
        let Some(section) = config.section("quantization_config") else {
            return Err(EngineError::Config {
                key: "quantization_config",
                reason: format!("is {}, expected an object", shown(value)),
            });
        };
        if section.get("quant_method").and_then(Value::as_str) == Some(packed_folder::METHOD) {
            // Nothing is left to read.
            return Ok(Self::default());
        }
        section.expect_text("quant_method", &METHODS)?;
        match section.text_or("quant_method", METHODS[0])? {
            "compressed-tensors" => compressed_tensors(&section),
            "awq" => awq(&section),
            "gptq" => gptq(&section),
            "fbgemm_fp8" => Ok(Self { scales: Some(ScaleLayout::Rows), ..Self::default() }),
            _ => {
                let scales = block_size(&section, "weight_block_size")?.map(ScaleLayout::Tiles);
                Ok(Self { scales, ..Self::default() })
            }
        }
    }
}

/// AutoAWQ's config, in its two spellings.
fn awq(section: &ModelConfig) -> Result<Quantization, EngineError> {
    let key = if section.get("bits").is_some() { ["bits", "group_size"] } else { ["w_bit", "q_group_size"] };
    section.expect_text("version", &["gemm", "GEMM"])?;
    let transposed = TransposedInt4 {
        kind: TransposedKind::Awq,
        group: four_bit_group(section, key)?,
        has_zero_points: section.flag_or("zero_point", true)?,
        is_symmetric: !section.flag_or("zero_point", true)?,
        is_reordered: false,
    };
    Ok(Quantization { transposed: Some(transposed), ..Quantization::default() })
}

fn gptq(section: &ModelConfig) -> Result<Quantization, EngineError> {
    section.expect_text("checkpoint_format", &["gptq", "gptq_v2"])?;
    let zeros_minus_one = section.text_or("checkpoint_format", "gptq")? == "gptq";
    let transposed = TransposedInt4 {
        kind: TransposedKind::Gptq { zeros_minus_one },
        group: four_bit_group(section, ["bits", "group_size"])?,
        // Symmetric checkpoints have them, too.
        has_zero_points: true,
        is_symmetric: section.flag_or("sym", false)?,
        is_reordered: section.flag_or("desc_act", false)?,
    };
    Ok(Quantization { transposed: Some(transposed), ..Quantization::default() })
}

/// The group size of integers of 4 bits; -1 is one scale per row.
fn four_bit_group(section: &ModelConfig, [bits, group]: [&'static str; 2]) -> Result<Option<usize>, EngineError> {
    match section.size(bits)? {
        4 => {}
        num_bits => return Err(EngineError::Config { key: bits, reason: format!("is {num_bits}, supported is 4") }),
    }
    match section.get(group).and_then(Value::as_i64) {
        Some(-1) => Ok(None),
        _ => section.size(group).map(Some),
    }
}

/// The one scheme that all groups of a compressed-tensors config share.
fn compressed_tensors(section: &ModelConfig) -> Result<Quantization, EngineError> {
    let format = section.text_or("format", "unknown")?;
    let groups = section.get("config_groups").and_then(Value::as_object);
    let names = groups.into_iter().flat_map(|groups| groups.keys());
    let groups = section.section("config_groups");
    let mut scheme = None;
    for group in names.filter_map(|name| groups.as_ref()?.section(name)) {
        let Some(weights) = group.section("weights") else { continue };
        let found = weight_scheme(&weights, group.text_or("format", format)?)?;
        if scheme.is_some_and(|scheme| scheme != found) {
            let reason = "has groups that store their weights in different ways, supported is one way".into();
            return Err(EngineError::Config { key: "config_groups", reason });
        }
        scheme = Some(found);
    }
    scheme.ok_or_else(|| EngineError::Config { key: "config_groups", reason: "says nothing of weights".into() })
}

/// `config_groups.*.weights`.
fn weight_scheme(weights: &ModelConfig, format: &str) -> Result<Quantization, EngineError> {
    let num_bits = weights.size("num_bits")?;
    let symmetric = weights.flag_or("symmetric", true)?;
    let scales = Some(scale_layout(weights)?);
    weights.expect_text("type", &["int", "float"])?;
    match (format, weights.text_or("type", "int")?, num_bits) {
        ("pack-quantized", "int", 4 | 8) => {
            let packing = Some(Packing { num_bits, has_zero_points: !symmetric });
            Ok(Quantization { scales, packing, ..Quantization::default() })
        }
        ("pack-quantized", _, _) => Err(bits_refused(num_bits, "pack-quantized integers of 4 or 8 bits")),
        ("int-quantized" | "naive-quantized" | "float-quantized", _, 8) if symmetric => {
            Ok(Quantization { scales, ..Quantization::default() })
        }
        ("int-quantized" | "naive-quantized" | "float-quantized", _, 8) => {
            let reason = format!("is false, which `{format}` is not supported with");
            Err(EngineError::Config { key: "symmetric", reason })
        }
        ("int-quantized" | "naive-quantized" | "float-quantized", _, _) => Err(bits_refused(num_bits, "8 bits")),
        _ => {
            let supported = "pack-quantized, float-quantized, int-quantized, naive-quantized";
            Err(EngineError::Config { key: "format", reason: format!("is `{format}`, supported is {supported}") })
        }
    }
}

fn bits_refused(num_bits: usize, supported: &str) -> EngineError {
    EngineError::Config { key: "num_bits", reason: format!("is {num_bits}, supported is {supported}") }
}

/// `strategy`; where it is absent, `group_size` says it (-1 is one scale per row).
fn scale_layout(weights: &ModelConfig) -> Result<ScaleLayout, EngineError> {
    let per_row = weights.get("group_size").and_then(Value::as_i64) == Some(-1);
    let group_size = if per_row { None } else { weights.opt_size("group_size")? };
    let default = match group_size {
        Some(_) => "group",
        None if per_row => "channel",
        None => "tensor",
    };
    match weights.text_or("strategy", default)? {
        "group" => Ok(ScaleLayout::Tiles([1, weights.size("group_size")?])),
        "channel" => Ok(ScaleLayout::Rows),
        "tensor" => Ok(ScaleLayout::Whole),
        "block" => Ok(ScaleLayout::Tiles(block_size(weights, "block_structure")?.unwrap_or(DEFAULT_TILE))),
        other => {
            let reason = format!("is `{other}`, supported is group, channel, tensor, block");
            Err(EngineError::Config { key: "strategy", reason })
        }
    }
}

/// Rows and columns, as a list `[128, 128]` or a text `128x128`.
fn block_size(section: &ModelConfig, key: &'static str) -> Result<Option<[usize; 2]>, EngineError> {
    let Some(value) = section.get(key) else { return Ok(None) };
    let sizes: Option<Vec<u64>> = match value {
        Value::Array(list) => list.iter().map(Value::as_u64).collect(),
        Value::String(text) => text.split('x').map(|size| size.parse().ok()).collect(),
        _ => None,
    };
    match sizes.as_deref() {
        Some(&[rows, cols]) if [rows, cols].iter().all(|size| (1..1 << 32).contains(size)) => {
            Ok(Some([rows as usize, cols as usize]))
        }
        _ => Err(EngineError::Config { key, reason: format!("is {}, expected two sizes of 1 to 2^32", shown(value)) }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(section: Value) -> Result<Quantization, String> {
        let config = ModelConfig::from_value(json!({ "quantization_config": section })).unwrap();
        Quantization::from_config(&config).map_err(|error| error.to_string())
    }

    fn packed(weights: Value) -> Result<Quantization, String> {
        let group = json!({ "targets": ["Linear"], "input_activations": null, "weights": weights });
        parse(json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": { "group_0": group },
            "ignore": ["lm_head", "re:.*self_attn.*"],
        }))
    }

    #[test]
    fn published_schemes_are_understood() {
        let int4 = Packing { num_bits: 4, has_zero_points: false };
        let group = Some(ScaleLayout::Tiles([1, 32]));
        let kimi = json!({ "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32 });
        assert_eq!(packed(kimi), Ok(Quantization { scales: group, packing: Some(int4), transposed: None }));
        let unnamed = json!({ "num_bits": 8, "type": "int", "symmetric": false, "group_size": -1 });
        let int8 = Packing { num_bits: 8, has_zero_points: true };
        let rows = Some(ScaleLayout::Rows);
        assert_eq!(packed(unnamed), Ok(Quantization { scales: rows, packing: Some(int8), transposed: None }));
        for (section, scales) in [
            (json!({ "quant_method": "fp8", "weight_block_size": [64, 32] }), Some(ScaleLayout::Tiles([64, 32]))),
            (json!({ "quant_method": "fp8", "weight_block_size": null }), None),
            (json!({ "quant_method": "fbgemm_fp8" }), Some(ScaleLayout::Rows)),
            (json!({ "quant_method": "mxfp4" }), None),
        ] {
            let expected = Quantization { scales, ..Quantization::default() };
            assert_eq!(parse(section.clone()), Ok(expected), "{section}");
        }
        let floats = |weights: Value| {
            parse(json!({ "quant_method": "compressed-tensors", "format": "float-quantized",
                "config_groups": { "group_0": { "weights": weights } } }))
        };
        let per_tensor = floats(json!({ "num_bits": 8, "type": "float", "strategy": "tensor" }));
        assert_eq!(per_tensor.unwrap().scales, Some(ScaleLayout::Whole));
        let blocks = json!({ "num_bits": 8, "type": "float", "strategy": "block", "block_structure": "64x128" });
        assert_eq!(floats(blocks).unwrap().scales, Some(ScaleLayout::Tiles([64, 128])));
    }

    #[test]
    fn transposed_integers_say_who_packed_them() {
        let found = |section: Value| parse(section).unwrap().transposed.unwrap();
        let awq = json!({ "quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "gemm" });
        let kind = TransposedKind::Awq;
        let expected =
            TransposedInt4 { kind, group: Some(64), has_zero_points: true, is_symmetric: false, is_reordered: false };
        assert_eq!(found(awq), expected);
        for (format, zeros_minus_one) in [("gptq", true), ("gptq_v2", false)] {
            let gptq = json!({ "quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": format });
            let kind = TransposedKind::Gptq { zeros_minus_one };
            assert_eq!(found(gptq), TransposedInt4 { kind, group: None, ..expected });
        }
        let old = json!({ "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": true, "sym": true });
        let kind = TransposedKind::Gptq { zeros_minus_one: true };
        let expected = TransposedInt4 { kind, group: Some(128), is_symmetric: true, is_reordered: true, ..expected };
        assert_eq!(found(old), expected);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_its_key() {
        let four = |keys: Value| {
            let mut weights = json!({ "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32 });
            weights.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
            packed(weights)
        };
        for (result, expect) in [
            (parse(json!("fp8")), "`quantization_config` is \"fp8\", expected an object"),
            (parse(json!({ "quant_method": "quip" })), "`quant_method` is `quip`, supported is fp8"),
            (parse(json!({ "quant_method": "awq", "bits": 8, "group_size": 32 })), "`bits` is 8, supported is 4"),
            (parse(json!({ "quant_method": "awq", "w_bit": 4 })), "`q_group_size` is missing"),
            (
                parse(json!({ "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv" })),
                "`version` is `gemv`, supported is gemm",
            ),
            (parse(json!({ "quant_method": "gptq", "bits": 3, "group_size": 32 })), "`bits` is 3, supported is 4"),
            (parse(json!({ "quant_method": "gptq", "bits": 4, "group_size": 0 })), "`group_size` is 0, expected"),
            (
                parse(json!({ "quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin" })),
                "`checkpoint_format` is `marlin`, supported is gptq",
            ),
            (parse(json!({ "quant_method": "fp8", "weight_block_size": [0, 128] })), "`weight_block_size` is [0,128]"),
            (parse(json!({ "quant_method": "fp8", "weight_block_size": [128] })), "`weight_block_size` is [128]"),
            (parse(json!({ "quant_method": "compressed-tensors" })), "`config_groups` says nothing of weights"),
            (four(json!({ "group_size": 0 })), "`group_size` is 0, expected at least 1"),
            (four(json!({ "group_size": 1u64 << 40 })), "`group_size` is 1099511627776, expected a count below 2^31"),
            (four(json!({ "group_size": null })), "`group_size` is missing"),
            (four(json!({ "num_bits": 3 })), "`num_bits` is 3, supported is pack-quantized integers of 4 or 8 bits"),
            (four(json!({ "type": "float" })), "`num_bits` is 4, supported is pack-quantized integers"),
            (four(json!({ "strategy": "token" })), "`strategy` is `token`, supported is group"),
        ] {
            let error = result.unwrap_err();
            assert!(error.starts_with(&format!("config.json: {expect}")), "{error}");
        }
    }

    #[test]
    fn scales_may_say_themselves_what_they_are_for() {
        for (found, layout) in [
            (&[2, 3][..], ScaleLayout::Tiles([128, 128])),
            (&[200, 1], ScaleLayout::Rows),
            (&[200], ScaleLayout::Rows),
            (&[1], ScaleLayout::Whole),
            (&[], ScaleLayout::Whole),
            (&[7, 7], ScaleLayout::Tiles([128, 128])),
        ] {
            assert_eq!(ScaleLayout::of_shape(found, [200, 300]), layout, "{found:?}");
        }
    }
}
