//! `moesaic inspect` through its command line: sizes of every golden checkpoint.

use std::path::Path;
use std::process::{Command, Output};

use harness::checkpoint::pack;
use harness::{Folder, golden};
use serde_json::Value;

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");

fn run(folder: &Path, args: &[&str]) -> Output {
    Command::new(SERVER).arg("inspect").arg(folder).args(args).output().expect("it runs")
}

fn inspect(name: &str) -> Value {
    inspect_folder(&golden::folder(name))
}

fn inspect_folder(folder: &Path) -> Value {
    let output = run(folder, &["--json"]);
    assert!(output.status.success(), "{}: {}", folder.display(), String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn text(name: &str) -> String {
    String::from_utf8(run(&golden::folder(name), &[]).stdout).expect("UTF-8")
}

/// Parameters in all and per token, added up from the shapes in the files: without heads that are tied, without
/// multi-token prediction, and without the experts of a layer that a token is not routed to.
const SIZES: &[(&str, u64, u64)] = &[
    ("bailing_moe-base", 197_952, 136_512),
    ("bailing_moe-dense1", 186_304, 137_152),
    ("bailing_moe_v2-base", 198_032, 124_304),
    ("bailing_moe_v2-mtp", 38_660, 35_588),
    ("bailing_moe_v2-plain", 161_360, 87_632),
    ("deepseek_v2-grouped", 151_696, 114_832),
    ("deepseek_v2-lite", 233_456, 159_728),
    ("deepseek_v2-mlpbias", 147_216, 110_352),
    ("deepseek_v3-base", 196_512, 122_784),
    ("deepseek_v3-fp8", 353_912, 261_752),
    ("deepseek_v3-mtp", 146_840, 109_976),
    ("deepseek_v3-noq", 176_672, 115_232),
    ("dots1-base", 241_200, 179_760),
    ("dots1-layers", 146_098, 109_234),
    ("dots1-window", 211_224, 100_632),
    ("ernie4_5_moe-base", 204_240, 142_800),
    ("ernie4_5_moe-floor", 123_655, 92_935),
    ("ernie4_5_moe-interval", 211_916, 162_764),
    ("glm4_moe-base", 216_912, 155_472),
    ("glm4_moe-mtp", 38_756, 35_684),
    ("glm4_moe-qknorm", 247_768, 137_176),
    ("gpt_oss-alpha", 152_946, 121_650),
    ("gpt_oss-bf16", 187_732, 150_228),
    ("gpt_oss-mxfp4", 388_132, 238_372),
    ("granitemoe-base", 210_880, 118_720),
    ("granitemoe-bias", 167_232, 111_936),
    ("granitemoeshared-base", 139_328, 90_176),
    ("hunyuan_v1_moe-base", 188_800, 112_000),
    ("hunyuan_v1_moe-plain", 244_240, 175_120),
    ("jetmoe-base", 214_592, 124_480),
    ("jetmoe-top3", 204_864, 131_136),
    ("kimi_k2-base", 171_676, 116_380),
    ("kimi_k2-int4", 159_258, 116_250),
    ("kimi_k2-tiktoken", 146_840, 109_976),
    ("llama4-kinds", 131_776, 113_344),
    ("llama4-mm", 228_544, 167_104),
    ("llama4-text", 225_664, 133_504),
    ("longcat_flash-routerbias", 134_552, 103_832),
    ("minicpm_moe-base", 284_608, 146_368),
    ("minicpm_moe-tied", 142_400, 96_320),
    ("minimax_m2-base", 272_632, 157_432),
    ("minimax_m2-wide", 167_372, 105_932),
    ("mixtral-base", 235_456, 124_864),
    ("mixtral-gptq", 123_712, 99_136),
    ("mixtral-window", 133_056, 102_336),
    ("olmoe-base", 248_128, 155_968),
    ("olmoe-clip", 174_496, 100_768),
    ("pangu_ultra_moe-base", 214_712, 153_272),
    ("pangu_ultra_moe-top1", 132_832, 102_112),
    ("pangu_ultra_moe-vllm", 147_356, 98_204),
    ("phimoe-base", 310_592, 144_704),
    ("phimoe-plain", 142_592, 87_296),
    ("qwen2_moe-base", 263_680, 153_088),
    ("qwen2_moe-layers", 160_832, 142_400),
    ("qwen2_moe-mixed", 176_640, 158_208),
    ("qwen3_moe-awq", 148_416, 123_840),
    ("qwen3_moe-base", 272_512, 161_920),
    ("qwen3_moe-v5config", 148_416, 123_840),
    ("qwen3_moe-yarn", 217_664, 168_512),
    ("qwen3_next-alternate", 237_864, 182_568),
    ("qwen3_next-base", 271_816, 198_088),
    ("switch_transformers-base", 346_752, 273_024),
    ("switch_transformers-steps", 102_798, 84_366),
    ("switch_transformers-capacity", 294_031, 232_591),
];

#[test]
fn total_and_active_parameters_are_right() {
    for &(name, total, active) in SIZES {
        let found = inspect(name);
        let keys = ["num_parameters", "num_active_parameters", "min_active_parameters"];
        assert_eq!(keys.map(|key| found[key].as_u64()), [total, active, active].map(Some), "{name}");
    }
}

/// A folder that nobody counted may be counted wrongly.
#[test]
fn every_golden_folder_is_counted() {
    let source = include_str!("inspect.rs");
    for entry in std::fs::read_dir(golden::folder("")).expect("tests/golden") {
        let entry = entry.expect("a readable entry");
        let name = entry.file_name().into_string().expect("a UTF-8 name");
        assert!(!entry.path().is_dir() || source.contains(&format!("\"{name}\"")), "{name} is not counted");
    }
}

#[test]
fn longcat_has_a_range_of_active_parameters() {
    // Three matrices of 64 × 32.
    let expert = 3 * 64 * 32;
    // Embedding, head, attention, routers (12 choices in 2 layers), dense networks, norms.
    let fixed = 2 * 24_576 + 46_080 + 2 * (12 * 64 + 12) + 73_728 + 736;
    // 2 layers of 8 experts; 3 are chosen, and all 3 may be among the 4 that compute nothing.
    let base = inspect("longcat_flash-base");
    assert_eq!(base["num_parameters"], fixed + 2 * 8 * expert);
    assert_eq!(base["min_active_parameters"], fixed);
    assert_eq!(base["num_active_parameters"], fixed + 2 * 3 * expert);
    let text = text("longcat_flash-base");
    assert!(text.contains("experts per layer  8 and 4 that compute nothing, 3 per token\n"), "{text}");
    assert!(text.contains("active parameters  171,256 to 208,120\n"), "{text}");
    // 1 layer of 6 experts; 4 are chosen, and only 3 compute nothing.
    let bias = inspect("longcat_flash-bias");
    let fixed = bias["num_parameters"].as_u64().expect("a count") - 6 * expert;
    assert_eq!(bias["min_active_parameters"], fixed + expert);
    assert_eq!(bias["num_active_parameters"], fixed + 4 * expert);
}

#[test]
fn layers_for_multi_token_prediction_are_stated_apart() {
    // Parameters of each, as stored in bf16; vectors are f32 in memory.
    for (name, num_layers, parameters) in
        [("glm4_moe-mtp", 2, 57_160), ("bailing_moe_v2-mtp", 2, 32_392), ("longcat_flash-mtp", 1, 31_688)]
    {
        let found = inspect(name);
        assert_eq!(
            (found["num_mtp_layers"].as_u64(), &found["mtp_memory_bytes_f32"]),
            (Some(num_layers), &(4 * parameters).into())
        );
        let bytes = found["mtp_memory_bytes"].as_u64().expect("a count");
        assert!((2 * parameters..3 * parameters).contains(&bytes), "{name}: {bytes}");
        let line = format!("MTP layers         {num_layers}, loaded with --load-mtp: ");
        assert!(text(name).contains(&line), "{name}");
    }
    assert_eq!(inspect("longcat_flash-mtp")["num_parameters"], 71_606);
    assert_eq!(inspect("deepseek_v3-base")["num_mtp_layers"], 0);
    assert!(!text("deepseek_v3-base").contains("MTP"));
}

#[test]
fn memory_after_expansion_is_stated() {
    // 30 matrices of 64 × 32 in 4 bits: half a byte, and a scale of 2 bytes for 32, and 8 bytes of shape each.
    let stored = 30 * (64 * 32 / 2 + 64 * 32 / 32 * 2 + 8);
    let found = inspect("kimi_k2-int4");
    let class = |name: &str| {
        let classes = found["classes"].as_array().expect("a list");
        classes.iter().find(|class| class["class"] == name).expect("the class").clone()
    };
    assert_eq!(class("experts")["num_parameters"], 30 * 64 * 32);
    assert_eq!(class("experts")["num_bytes"], stored);
    // Panels of 16 rows: half a byte, an f16 for 32 columns, an f32 for each row, filled up to whole lines of 64 bytes.
    let in_memory =
        |rows: u64, cols: u64| rows / 16 * ((16 * (4 + cols / 32 * 2)).next_multiple_of(64) + 16 * cols / 2);
    assert_eq!(class("experts")["memory_bytes"], 10 * (2 * in_memory(32, 64) + in_memory(64, 32)));
    assert_eq!(found["memory_bytes_f32"], 4 * found["num_parameters"].as_u64().expect("a count"));
    for name in ["kimi_k2-int4", "deepseek_v3-fp8", "gpt_oss-mxfp4"] {
        let found = inspect(name);
        let bytes = |key: &str| found[key].as_u64().expect("a count");
        assert!(bytes("memory_bytes") < bytes("memory_bytes_f32"), "{name}");
    }
    let text = text("kimi_k2-int4");
    let line = "weights in memory  231.85 KiB with --dtype auto, 622.10 KiB with --dtype f32\n";
    assert!(text.contains(line), "{text}");
}

#[test]
fn packed_folders_have_sizes_of_their_own() {
    let bytes = |found: &Value, key: &str| found[key].as_u64().expect("a count");
    for (name, to) in [("mixtral-base", "int8"), ("granitemoe-base", "int4"), ("glm4_moe-mtp", "int8")] {
        let folder = Folder::new("packed");
        pack(SERVER, name, to, &folder.join("model"));
        let (source, packed) = (inspect(name), inspect_folder(&folder.join("model")));
        let classes = |found: &Value| {
            let classes = found["classes"].as_array().expect("a list").iter();
            classes.map(|size| (size["class"].clone(), size.clone())).collect::<Vec<_>>()
        };
        let (source_classes, classes) = (classes(&source), classes(&packed));
        let sum = |key: &str| classes.iter().map(|(_, size)| bytes(size, key)).sum::<u64>();
        assert_eq!(sum("num_bytes"), bytes(&packed, "weight_bytes"), "{name}");
        assert_eq!(sum("memory_bytes"), bytes(&packed, "memory_bytes"), "{name}");
        let with_mtp = bytes(&packed, "memory_bytes") + bytes(&packed, "mtp_memory_bytes");
        assert_eq!(with_mtp, bytes(&packed, "weight_bytes"), "{name}");
        assert_eq!(bytes(&packed, "mtp_memory_bytes") > 0, name.ends_with("mtp"), "{name}");
        // What a matrix was joined or taken apart for makes its parameters no others.
        for (class, size) in &source_classes {
            let same = classes.iter().find(|(packed, _)| packed == class);
            let (_, packed) = same.unwrap_or_else(|| panic!("{name}: no {class}"));
            assert_eq!(bytes(packed, "num_parameters"), bytes(size, "num_parameters"), "{name}: {class}");
            let is_smaller = bytes(packed, "num_bytes") < bytes(size, "num_bytes");
            // Experts of 8 columns are filled up to 64.
            assert!(is_smaller || class != "experts" || name == "glm4_moe-mtp", "{name}: {size} came to {packed}");
        }
    }
}

/// A full disk or a closed pipe is an error, not a panic.
#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    let mut command = Command::new(SERVER);
    let output = command.arg("inspect").arg(golden::folder("mixtral-base")).stdout(full).output().expect("it runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && error.starts_with("error: cannot write to stdout"), "{error}");
}
