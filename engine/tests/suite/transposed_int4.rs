//! AWQ and GPTQ checkpoints: the same numbers in every layout give the same logits, and a broken one is refused by name.

use safetensors::Dtype;
use serde_json::json;

use crate::checkpoint_edit::{Edit, Stored};

const AWQ: &str = "qwen3_moe-awq";
const GPTQ: &str = "mixtral-gptq";
/// Which of eight outputs lies at each place of a word of AWQ.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// `codes[input][output]` of AWQ words `[inputs, outputs / 8]`.
fn awq_codes(stored: &Stored) -> Vec<Vec<u32>> {
    let width = stored.shape[1];
    let row = |words: &[u32]| {
        let mut codes = vec![0; 8 * width];
        for (idx, word) in words.iter().enumerate() {
            (0..8).for_each(|place| codes[8 * idx + AWQ_ORDER[place]] = word >> (4 * place) & 0xf);
        }
        codes
    };
    stored.words().chunks_exact(width).map(row).collect()
}

fn words(shape: [usize; 2], words: impl Iterator<Item = u32>) -> Stored {
    let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    assert_eq!(bytes.len(), 4 * shape[0] * shape[1]);
    Stored { dtype: Dtype::I32, shape: shape.to_vec(), bytes }
}

fn word(codes: impl Iterator<Item = u32>) -> u32 {
    codes.enumerate().map(|(place, code)| code << (4 * place)).sum()
}

/// The AWQ folder as GPTQ stores it, zero points less `minus`.
fn as_gptq(format: &str, minus: u32) -> Edit {
    let mut edit = Edit::of(AWQ);
    edit.config["quantization_config"] = json!({
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": false, "sym": false, "checkpoint_format": format,
    });
    for stem in edit.stems(".qweight") {
        let name = |part: &str| format!("{stem}.{part}");
        let codes = awq_codes(&edit.tensors[&name("qweight")]);
        let (inputs, outputs) = (codes.len(), codes[0].len());
        let packed = (0..inputs / 8 * outputs).map(|idx| {
            let (first, output) = (idx / outputs * 8, idx % outputs);
            word((first..first + 8).map(|input| codes[input][output]))
        });
        edit.tensors.insert(name("qweight"), words([inputs / 8, outputs], packed));
        let zeros = awq_codes(&edit.tensors[&name("qzeros")]);
        let packed = zeros.iter().flat_map(|zeros| {
            zeros.chunks_exact(8).map(|zeros| word(zeros.iter().map(|zero| zero.wrapping_sub(minus) & 0xf)))
        });
        edit.tensors.insert(name("qzeros"), words([inputs / 32, outputs / 8], packed));
    }
    edit
}

#[test]
fn awq_and_both_versions_of_gptq_hold_the_same_numbers() {
    let expected = Edit::of(AWQ).logits();
    assert_eq!(as_gptq("gptq", 1).logits(), expected);
    let mut second = as_gptq("gptq_v2", 0);
    assert_eq!(second.logits(), expected);
    // As older exporters write it.
    for stem in second.stems(".qweight") {
        let [groups, outputs] = second.tensors[&format!("{stem}.scales")].shape[..] else { panic!("a matrix") };
        let order = words([1, 32 * groups], (0..32 * groups).map(|input| input as u32 / 32));
        second.tensors.insert(format!("{stem}.g_idx"), Stored { shape: vec![32 * groups], ..order });
        second.tensors.insert(format!("{stem}.bias"), Stored::f32(&[outputs], &vec![0.0; outputs]));
    }
    second.config["quantization_config"]["desc_act"] = true.into();
    assert_eq!(second.logits(), expected);
}

#[test]
fn a_scale_may_stand_for_a_whole_row() {
    let (mut grouped, mut whole) = (Edit::of(GPTQ), Edit::of(GPTQ));
    whole.config["quantization_config"]["group_size"] = (-1).into();
    for stem in grouped.stems(".qweight") {
        let name = |part: &str| format!("{stem}.{part}");
        for (part, row_bytes) in [("scales", 2), ("qzeros", 4)] {
            let stored = grouped.tensors.get_mut(&name(part)).expect("a tensor");
            let (groups, len) = (stored.shape[0], row_bytes * stored.shape[1]);
            let first = stored.bytes[..len].to_vec();
            stored.bytes = first.repeat(groups);
            let shape = vec![1, stored.shape[1]];
            whole.tensors.insert(name(part), Stored { dtype: stored.dtype, shape, bytes: first });
        }
        whole.remove(&name("g_idx"));
    }
    assert_eq!(whole.logits(), grouped.logits());
}

/// A change to a folder with what is said of it.
type Refusal = (fn(&mut Edit), &'static str);

#[test]
fn broken_tensors_are_refused_by_name() {
    const STEM: &str = "model.layers.1.block_sparse_moe.experts.2.w2";
    fn tensor<'a>(edit: &'a mut Edit, part: &str) -> &'a mut Stored {
        edit.tensors.get_mut(&format!("{STEM}.{part}")).expect("a tensor of that name")
    }
    let refusals: [Refusal; 9] = [
        (|edit| drop(edit.remove(&format!("{STEM}.scales"))), "experts.2.w2.scales` is missing"),
        (|edit| drop(edit.remove(&format!("{STEM}.qzeros"))), "experts.2.w2.qzeros` is missing"),
        (
            |edit| tensor(edit, "g_idx").bytes[4] = 1,
            "experts.2.w2.g_idx` puts column 1 into group 1: groups of columns",
        ),
        (|edit| tensor(edit, "qweight").shape = vec![2, 128], "w2.qweight` has shape [2, 128], expected [4, 64]"),
        (|edit| tensor(edit, "qweight").dtype = Dtype::F32, "w2.qweight` is stored as F32"),
        (|edit| tensor(edit, "scales").bytes[3] = 0x7e, "w2.scales` is NaN at row 0, column 1"),
        (|edit| tensor(edit, "scales").shape = vec![64, 1], "w2.scales` has shape [64, 1], expected [1, 64]"),
        (
            |edit| edit.config["quantization_config"] = json!({ "quant_method": "fp8" }),
            "config.json: `quantization_config` does not say how `model.layers.0.self_attn.q_proj.qweight` is packed",
        ),
        (
            |edit| {
                edit.tensors.insert(format!("{STEM}.bias"), Stored::f32(&[64], &[0.5; 64]));
            },
            "the checkpoint has 1 tensors that the architecture does not know, first of them",
        ),
    ];
    for (change, expect) in refusals {
        let mut edit = Edit::of(GPTQ);
        change(&mut edit);
        let error = edit.refusal();
        assert!(error.contains(expect), "`{error}` does not contain `{expect}`");
    }
    let mut edit = Edit::of(GPTQ);
    edit.config["quantization_config"]["desc_act"] = true.into();
    edit.remove(&format!("{STEM}.g_idx"));
    let error = edit.refusal();
    assert!(error.contains("experts.2.w2.g_idx` is missing, but `desc_act` is set"), "{error}");
}
