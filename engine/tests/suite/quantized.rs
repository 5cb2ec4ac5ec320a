//! Quantized checkpoints: every layout of the same numbers gives the same logits, and a broken one is refused by name.

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint_edit::{Edit, Stored};

const INT4: &str = "kimi_k2-int4";
const FP8: &str = "deepseek_v3-fp8";
const EXPERT: &str = "model.layers.1.mlp.experts.3.down_proj";
const MATRIX: &str = "model.layers.1.self_attn.o_proj";

/// `config_groups.group_0.weights` of a compressed-tensors config.
fn weights_of(edit: &mut Edit) -> &mut Value {
    &mut edit.config["quantization_config"]["config_groups"]["group_0"]["weights"]
}

/// Unsigned 4-bit codes of a matrix without padding.
fn codes(packed: &Stored) -> Vec<u8> {
    packed.bytes.iter().flat_map(|byte| [byte & 0xf, byte >> 4]).collect()
}

/// Words of four bytes, down the columns of `[rows, cols]`.
fn pack_columns(values: &[u8], [rows, cols]: [usize; 2]) -> Stored {
    let shape = vec![rows.div_ceil(4), cols];
    let mut bytes = vec![0; 4 * shape[0] * cols];
    for (idx, &value) in values.iter().enumerate() {
        let (row, col) = (idx / cols, idx % cols);
        bytes[4 * (row / 4 * cols + col) + row % 4] = value;
    }
    Stored { dtype: Dtype::I32, shape, bytes }
}

#[test]
fn integers_of_8_bits_packed_or_not_equal_those_of_4() {
    let expected = Edit::of(INT4).logits();
    let mut packed = Edit::of(INT4);
    weights_of(&mut packed)["num_bits"] = 8.into();
    packed.each(".weight_packed", |stored| {
        stored.bytes = codes(stored).into_iter().map(|code| code + (128 - 8)).collect();
        stored.shape[1] *= 2;
    });
    assert_eq!(packed.logits(), expected);

    let mut plain = Edit::of(INT4);
    plain.config["quantization_config"]["format"] = "int-quantized".into();
    weights_of(&mut plain)["num_bits"] = 8.into();
    for stem in plain.stems(".weight_packed") {
        let packed = plain.remove(&format!("{stem}.weight_packed"));
        plain.remove(&format!("{stem}.weight_shape"));
        let bytes = codes(&packed).into_iter().map(|code| code.wrapping_sub(8)).collect();
        let shape = vec![packed.shape[0], 8 * packed.shape[1]];
        plain.tensors.insert(format!("{stem}.weight"), Stored { dtype: Dtype::I8, shape, bytes });
    }
    assert_eq!(plain.logits(), expected);
}

#[test]
fn zero_points_shift_their_groups() {
    let mut shifted = Edit::of(INT4);
    weights_of(&mut shifted)["num_bits"] = 8.into();
    weights_of(&mut shifted)["symmetric"] = false.into();
    for stem in shifted.stems(".weight_packed") {
        let [rows, groups] = shifted.tensors[&format!("{stem}.weight_scale")].shape[..] else { panic!("a matrix") };
        let zeros: Vec<u8> = (0..rows * groups).map(|idx| 8 + (idx * 37 % 200) as u8).collect();
        let packed = shifted.tensors.get_mut(&format!("{stem}.weight_packed")).expect("packed");
        let codes = codes(packed);
        packed.bytes = codes.iter().enumerate().map(|(idx, code)| code + zeros[idx / 32] - 8).collect();
        packed.shape[1] *= 2;
        shifted.tensors.insert(format!("{stem}.weight_zero_point"), pack_columns(&zeros, [rows, groups]));
    }
    assert_eq!(shifted.logits(), Edit::of(INT4).logits());
}

#[test]
fn kimi_k25_is_kimi_k2_under_a_prefix() {
    let flat = Edit::of(INT4);
    let mut text = flat.config.clone();
    text["model_type"] = "kimi_k2".into();
    let config = json!({ "model_type": "kimi_k25", "text_config": text, "vision_config": { "hidden_size": 8 } });
    let mut tensors: std::collections::BTreeMap<String, Stored> =
        flat.tensors.iter().map(|(name, stored)| (format!("language_model.{name}"), stored.clone())).collect();
    for name in ["vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.weight"] {
        tensors.insert(name.into(), Stored::f32(&[2], &[1.0, 2.0]));
    }
    assert_eq!(Edit { config, tensors }.logits(), flat.logits());
}

#[test]
fn smaller_tiles_with_the_same_scales_give_the_same_logits() {
    let mut tiled = Edit::of(FP8);
    tiled.config["quantization_config"]["weight_block_size"] = json!([64, 32]);
    for stem in tiled.stems(".weight_scale_inv") {
        let [rows, cols] = tiled.tensors[&format!("{stem}.weight")].shape[..] else { panic!("a matrix") };
        let scales = tiled.tensors.get_mut(&format!("{stem}.weight_scale_inv")).expect("scales");
        let (values, tile_cols) = (scales.to_f32(), scales.shape[1]);
        let shape = [rows.div_ceil(64), cols.div_ceil(32)];
        let of_tile = |idx: usize| values[idx / shape[1] * 64 / 128 * tile_cols + idx % shape[1] * 32 / 128];
        let repeated: Vec<f32> = (0..shape[0] * shape[1]).map(of_tile).collect();
        *scales = Stored::f32(&shape, &repeated);
    }
    assert_eq!(tiled.logits(), Edit::of(FP8).logits());
}

#[test]
fn scales_in_bf16_are_read_as_they_are() {
    let (mut wide, mut narrow) = (Edit::of(FP8), Edit::of(FP8));
    wide.each(".weight_scale_inv", |stored| {
        let rounded: Vec<f32> = stored.words().into_iter().map(|bits| f32::from_bits(bits & 0xffff_0000)).collect();
        *stored = Stored::f32(&stored.shape.clone(), &rounded);
    });
    narrow.each(".weight_scale_inv", |stored| {
        stored.bytes = stored.words().into_iter().flat_map(|bits| ((bits >> 16) as u16).to_le_bytes()).collect();
        stored.dtype = Dtype::BF16;
    });
    assert_eq!(wide.logits(), narrow.logits());
}

#[test]
fn one_scale_per_row_or_per_matrix_is_supported() {
    let float = |strategy: &str| {
        json!({ "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": { "group_0": {
            "weights": { "num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true } } } })
    };
    for (quantization, per_row) in [
        (float("channel"), true),
        (json!({ "quant_method": "fbgemm_fp8" }), true),
        (float("tensor"), false),
        (json!({ "quant_method": "fp8", "activation_scheme": "static" }), false),
    ] {
        let (mut tiled, mut other) = (Edit::of(FP8), Edit::of(FP8));
        other.config["quantization_config"] = quantization.clone();
        for stem in tiled.stems(".weight_scale_inv") {
            let name = format!("{stem}.weight_scale_inv");
            let rows = tiled.tensors[&format!("{stem}.weight")].shape[0];
            let shape = tiled.tensors[&name].shape.clone();
            let values = tiled.tensors[&name].to_f32();
            // One scale for all tiles side by side, or for all.
            let of_row = |row: usize| values[if per_row { row / 128 * shape[1] } else { 0 }];
            let per_tile: Vec<f32> = (0..values.len()).map(|tile| of_row(tile / shape[1] * 128)).collect();
            tiled.tensors.insert(name.clone(), Stored::f32(&shape, &per_tile));
            other.remove(&name);
            let scales = match per_row {
                true => Stored::f32(&[rows, 1], &(0..rows).map(of_row).collect::<Vec<_>>()),
                false => Stored::f32(&[], &[values[0]]),
            };
            other.tensors.insert(format!("{stem}.weight_scale"), scales);
            other.tensors.insert(format!("{stem}.input_scale"), Stored::f32(&[1], &[0.5]));
        }
        assert_eq!(other.logits(), tiled.logits(), "{quantization}");
    }
}

/// Every change to a folder with the start of what is said of it, after `FILE` where that is the path of the tensors.
type Refusal = (fn(&mut Edit), &'static str);

fn check_refusals(golden: &str, refusals: &[Refusal]) {
    for (change, expect) in refusals {
        let mut edit = Edit::of(golden);
        change(&mut edit);
        let error = edit.refusal();
        assert!(error.contains(expect), "{golden}: `{error}` does not contain `{expect}`");
        let names_file = error.contains("model.safetensors") || error.contains("config.json");
        assert!(names_file || error.contains("missing from the checkpoint"), "{error}");
    }
}

fn tensor<'a>(edit: &'a mut Edit, name: &str) -> &'a mut Stored {
    edit.tensors.get_mut(name).expect("a tensor of that name")
}

fn expert<'a>(edit: &'a mut Edit, part: &str) -> &'a mut Stored {
    tensor(edit, &format!("{EXPERT}.{part}"))
}

#[test]
fn broken_packed_tensors_are_refused_by_name() {
    check_refusals(
        INT4,
        &[
            (
                |edit| drop(edit.remove(&format!("{EXPERT}.weight_scale"))),
                "tensor `model.layers.1.mlp.experts.3.down_proj.weight_scale` is missing",
            ),
            (|edit| drop(edit.remove(&format!("{EXPERT}.weight_shape"))), "down_proj.weight_shape` is missing"),
            (|edit| drop(edit.remove(&format!("{EXPERT}.weight_packed"))), "down_proj.weight` is missing"),
            (
                |edit| expert(edit, "weight_shape").bytes[4] = 40,
                "tensor `model.layers.1.mlp.experts.3.down_proj.weight_shape` says [64, 40], expected [64, 32]",
            ),
            (|edit| expert(edit, "weight_shape").bytes[3] = 0xff, "weight_shape` says [-16777152, 32], expected"),
            (
                |edit| *expert(edit, "weight_shape") = Stored::f32(&[2], &[64.0, 32.0]),
                "down_proj.weight_shape` is stored as F32, which is not supported",
            ),
            (
                |edit| expert(edit, "weight_packed").shape = vec![32, 8],
                "down_proj.weight_packed` has shape [32, 8], expected [64, 4]",
            ),
            (|edit| expert(edit, "weight_packed").dtype = Dtype::F32, "weight_packed` is stored as F32"),
            (
                |edit| *expert(edit, "weight_scale") = Stored::f32(&[32], &[1.0; 32]),
                "down_proj.weight_scale` has shape [32], expected [64, 1]",
            ),
            (|edit| expert(edit, "weight_scale").dtype = Dtype::I16, "down_proj.weight_scale` is stored as I16"),
            (
                |edit| expert(edit, "weight_scale").bytes[6..8].copy_from_slice(&[0xc0, 0x7f]),
                "tensor `model.layers.1.mlp.experts.3.down_proj.weight_scale` scale 3 is NaN",
            ),
            (
                |edit| expert(edit, "weight_scale").bytes[..2].copy_from_slice(&[0x80, 0x7f]),
                "down_proj.weight_scale` scale 0 is inf",
            ),
            (
                |edit| {
                    edit.tensors.insert(format!("{EXPERT}.weight_g_idx"), Stored::f32(&[1], &[0.0]));
                },
                "groups of columns in an order of their own (actorder `group`) are not supported",
            ),
            (
                |edit| edit.config["quantization_config"] = Value::Null,
                "config.json: `quantization_config` does not say how `model.layers.1.mlp.experts.0.gate_proj.weight_packed` is packed",
            ),
            (|edit| weights_of(edit)["group_size"] = 0.into(), "config.json: `group_size` is 0, expected at least 1"),
            (
                |edit| weights_of(edit)["group_size"] = i32::MAX.into(),
                "gate_proj.weight_scale` has shape [32, 2], expected [32, 1]",
            ),
            (|edit| weights_of(edit)["num_bits"] = 8.into(), "weight_packed` has shape [32, 8], expected [32, 16]"),
            (|edit| weights_of(edit)["symmetric"] = false.into(), "gate_proj.weight_zero_point` is missing"),
        ],
    );
}

#[test]
fn broken_fp8_tensors_are_refused_by_name() {
    check_refusals(
        FP8,
        &[
            (
                |edit| drop(edit.remove(&format!("{MATRIX}.weight_scale_inv"))),
                "tensor `model.layers.1.self_attn.o_proj.weight_scale_inv` is missing",
            ),
            (
                |edit| *tensor(edit, &format!("{MATRIX}.weight_scale_inv")) = Stored::f32(&[3], &[1.0; 3]),
                "o_proj.weight_scale_inv` has shape [3], expected [2, 1]",
            ),
            (
                |edit| edit.config["quantization_config"]["weight_block_size"] = json!([64, 64]),
                "weight_scale_inv` has shape",
            ),
            (
                |edit| edit.config["quantization_config"]["weight_block_size"] = json!([0, 128]),
                "config.json: `weight_block_size` is [0,128], expected two sizes of 1 to 2^32",
            ),
            (
                |edit| tensor(edit, &format!("{MATRIX}.weight_scale_inv")).bytes[..4].fill(0xff),
                "tensor `model.layers.1.self_attn.o_proj.weight_scale_inv` scale 0 is NaN",
            ),
            (
                |edit| tensor(edit, &format!("{MATRIX}.weight")).bytes[67] = 0x7f,
                "tensor `model.layers.1.self_attn.o_proj.weight` is NaN at row 1, column 3",
            ),
            (
                |edit| tensor(edit, &format!("{MATRIX}.weight")).dtype = Dtype::F8_E5M2,
                "o_proj.weight` is stored as F8_E5M2",
            ),
        ],
    );
}

#[test]
fn broken_mxfp4_tensors_are_refused_by_name() {
    const DOWN: &str = "model.layers.1.mlp.experts.down_proj";
    check_refusals(
        "gpt_oss-mxfp4",
        &[
            (
                |edit| tensor(edit, &format!("{DOWN}_scales")).bytes[3] = 255,
                "tensor `model.layers.1.mlp.experts.down_proj_blocks` ",
            ),
            (|edit| drop(edit.remove(&format!("{DOWN}_scales"))), "down_proj_scales` is missing"),
            (
                |edit| tensor(edit, &format!("{DOWN}_scales")).shape = vec![8, 2, 64],
                "has shape [8, 2, 64], expected [8, 64, 2]",
            ),
            (|edit| tensor(edit, &format!("{DOWN}_blocks")).dtype = Dtype::I8, "down_proj_blocks` is stored as I8"),
        ],
    );
}
