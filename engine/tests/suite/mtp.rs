//! Multi-token-prediction layers: what they guess, what they take, and where there are none.

use engine::{EngineConfig, EngineError, LoadedModel, WeightDtype, inspect, load_model};
use serde_json::{Value, json};

use crate::checkpoint_edit::Edit;
use crate::driver::golden_dir;
use crate::golden::{CHECKS, assert_close, ids, numbers};

/// Folders that hold such layers, and how many.
const FOLDERS: [(&str, usize); 4] =
    [("deepseek_v3-mtp", 1), ("glm4_moe-mtp", 2), ("bailing_moe_v2-mtp", 2), ("longcat_flash-mtp", 1)];

fn config(dir: impl Into<std::path::PathBuf>) -> EngineConfig {
    EngineConfig { load_mtp: true, dtype: WeightDtype::F32, kv_cache_memory: Some(4 << 20), ..EngineConfig::new(dir) }
}

fn load(config: &EngineConfig) -> Result<LoadedModel, EngineError> {
    load_model(config, &mut |_| {})
}

#[test]
fn guesses_are_those_of_the_reference() {
    for (name, num_layers) in FOLDERS {
        let text = std::fs::read_to_string(golden_dir(name).join("mtp_reference.json")).expect("mtp_reference.json");
        let reference: Value = serde_json::from_str(&text).expect("JSON");
        let mut model = load(&config(golden_dir(name))).expect("a model");
        assert_eq!(model.summary.num_mtp_layers, num_layers, "{name}");

        let full = &reference["full"];
        let guesses = model.runner.drafts_of(&ids(&full["ids"])).expect("guesses");
        assert_eq!(guesses.len(), num_layers, "{name}");
        for (layer, found) in guesses.iter().enumerate() {
            let expected = full["logits"][layer].as_array().expect("rows");
            assert_eq!(found.len(), expected.len(), "{name} layer {layer}");
            for (position, (found, expected)) in found.iter().zip(expected).enumerate() {
                assert_close(&format!("{name} layer {layer} position {position}"), found, &numbers(expected));
            }
        }
        // Over several blocks.
        let last = &reference["last"];
        for (layer, found) in model.runner.drafts_of(&ids(&last["ids"])).expect("guesses").iter().enumerate() {
            let expected = numbers(&last["logits"][layer]);
            assert_close(&format!("{name} layer {layer} last"), found.last().expect("a position"), &expected);
        }
    }
}

#[test]
fn no_layer_or_a_prompt_too_short_for_it_is_no_guess() {
    let mut recurrent =
        load(&EngineConfig { load_mtp: false, ..config(golden_dir("qwen3_next-base")) }).expect("a model");
    assert_eq!(recurrent.runner.drafts_of(&[7, 8]).expect("no guess").len(), 0);
    let mut model = load(&config(golden_dir("glm4_moe-mtp"))).expect("a model");
    assert_eq!(model.runner.drafts_of(&[7]).expect("no guess").len(), 0);
    assert_eq!(model.runner.drafts_of(&[7, 8]).expect("a guess").len(), 1);
    assert_eq!(model.runner.drafts_of(&[7, 8, 9]).expect("guesses").iter().map(Vec::len).collect::<Vec<_>>(), [2, 1]);
}

/// Loaded or not, the model itself gives what its reference says, and the difference in memory is what `inspect` states.
#[test]
fn the_model_beside_them_stays_as_it_is() {
    for (name, num_layers) in FOLDERS {
        let (mut driver, reference) = crate::golden::open_with(&golden_dir(name), |config| config.load_mtp = true);
        CHECKS.iter().for_each(|check| check(name, &mut driver, &reference));

        let inspection = inspect(&golden_dir(name)).expect("an inspection");
        assert_eq!(inspection.num_mtp_layers, num_layers, "{name}");
        for (dtype, mtp_bytes) in
            [(WeightDtype::Auto, inspection.mtp_memory_bytes), (WeightDtype::F32, inspection.mtp_memory_bytes_f32)]
        {
            let with = load(&EngineConfig { dtype, ..config(golden_dir(name)) }).expect("a model").summary;
            let without = EngineConfig { dtype, load_mtp: false, ..config(golden_dir(name)) };
            let without = load(&without).expect("a model").summary;
            assert!(mtp_bytes > 0, "{name}");
            assert_eq!(with.weight_bytes, without.weight_bytes + mtp_bytes, "{name} with {dtype:?}");
            assert_eq!((without.num_mtp_layers, with.num_layers), (0, without.num_layers), "{name}");
            assert!(with.kv_bytes_per_token > without.kv_bytes_per_token, "{name}");
        }
    }
}

fn check_refused(config: &EngineConfig, expected: &str) {
    let error = load(config).err().expect("an error").to_string();
    assert!(error.contains("--load-mtp") && error.contains(expected), "{error}");
}

#[test]
fn asking_for_layers_that_are_not_there_is_an_error() {
    check_refused(&config(golden_dir("mixtral-base")), "not loaded for the architecture `mixtral`");
    for name in ["deepseek_v3-base", "bailing_moe-base"] {
        check_refused(&config(golden_dir(name)), "`num_nextn_predict_layers` in config.json is 0 or absent");
    }
    let longcat = "the checkpoint has no tensor `model.mtp.layers.0.enorm.m.weight`";
    check_refused(&config(golden_dir("longcat_flash-base")), longcat);

    let mut promised = Edit::of("deepseek_v3-base");
    promised.config["num_nextn_predict_layers"] = json!(1);
    let reason = "no tensor `model.layers.2.enorm.weight`, though `num_nextn_predict_layers` means 1";
    check_refused(&config(promised.write().path()), reason);
    let mut two = Edit::of("longcat_flash-mtp");
    two.config["num_nextn_predict_layers"] = json!(2);
    check_refused(&config(two.write().path()), "is 2, and `longcat_flash` has one");
}

#[test]
fn what_is_wrong_with_their_tensors_is_named() {
    let check = |edit: Edit, expected: &str| {
        let error = load(&config(edit.write().path())).err().expect("an error").to_string();
        assert!(error.contains(expected), "{error}");
    };
    for (name, tensor) in [
        ("deepseek_v3-mtp", "model.layers.2.eh_proj.weight"),
        ("glm4_moe-mtp", "model.layers.2.shared_head.norm.weight"),
        ("bailing_moe_v2-mtp", "model.layers.1.final_layernorm.weight"),
        ("longcat_flash-mtp", "model.mtp.norm.weight"),
    ] {
        let mut edit = Edit::of(name);
        let mut stored = edit.remove(tensor);
        check(edit, &format!("tensor `{tensor}` is missing"));
        let mut edit = Edit::of(name);
        stored.shape.push(1);
        edit.tensors.insert(tensor.to_owned(), stored.clone());
        check(edit, &format!("tensor `{tensor}` has shape"));
        // Skipped without complaint where nobody asked, and refused as unknown where somebody did.
        let mut edit = Edit::of(name);
        let stray = tensor.replace(".weight", ".stray");
        edit.tensors.insert(stray.clone(), stored);
        let folder = edit.write();
        load(&EngineConfig { load_mtp: false, ..config(folder.path()) }).expect("a model");
        let error = load(&config(folder.path())).err().expect("an error").to_string();
        assert!(error.contains("does not know") && error.contains(&stray), "{error}");
    }
    // More layers than there are.
    let mut edit = Edit::of("deepseek_v3-mtp");
    edit.config["num_nextn_predict_layers"] = json!(i32::MAX);
    check(edit, "tensor `model.layers.3.");
}
