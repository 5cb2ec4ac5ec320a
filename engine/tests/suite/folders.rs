//! The one list of golden folders, from which every check that is made of all of them has its tests.

/// A test for each folder, of the function `check(folder)` in scope.
macro_rules! test_every_folder {
    () => { test_every_folder! {
        bailing_moe_base "bailing_moe-base"
        bailing_moe_dense1 "bailing_moe-dense1"
        bailing_moe_v2_base "bailing_moe_v2-base"
        bailing_moe_v2_mtp "bailing_moe_v2-mtp"
        bailing_moe_v2_plain "bailing_moe_v2-plain"
        deepseek_v2_grouped "deepseek_v2-grouped"
        deepseek_v2_lite "deepseek_v2-lite"
        deepseek_v2_mlpbias "deepseek_v2-mlpbias"
        deepseek_v3_base "deepseek_v3-base"
        deepseek_v3_fp8 "deepseek_v3-fp8"
        deepseek_v3_mtp "deepseek_v3-mtp"
        deepseek_v3_noq "deepseek_v3-noq"
        dots1_base "dots1-base"
        dots1_layers "dots1-layers"
        dots1_window "dots1-window"
        ernie4_5_moe_base "ernie4_5_moe-base"
        ernie4_5_moe_floor "ernie4_5_moe-floor"
        ernie4_5_moe_interval "ernie4_5_moe-interval"
        glm4_moe_base "glm4_moe-base"
        glm4_moe_mtp "glm4_moe-mtp"
        glm4_moe_qknorm "glm4_moe-qknorm"
        gpt_oss_alpha "gpt_oss-alpha"
        gpt_oss_bf16 "gpt_oss-bf16"
        gpt_oss_mxfp4 "gpt_oss-mxfp4"
        granitemoe_base "granitemoe-base"
        granitemoe_bias "granitemoe-bias"
        granitemoeshared_base "granitemoeshared-base"
        hunyuan_v1_moe_base "hunyuan_v1_moe-base"
        hunyuan_v1_moe_plain "hunyuan_v1_moe-plain"
        jetmoe_base "jetmoe-base"
        jetmoe_top3 "jetmoe-top3"
        kimi_k2_base "kimi_k2-base"
        kimi_k2_int4 "kimi_k2-int4"
        kimi_k2_tiktoken "kimi_k2-tiktoken"
        llama4_kinds "llama4-kinds"
        llama4_mm "llama4-mm"
        llama4_text "llama4-text"
        longcat_flash_base "longcat_flash-base"
        longcat_flash_bias "longcat_flash-bias"
        longcat_flash_mtp "longcat_flash-mtp"
        longcat_flash_routerbias "longcat_flash-routerbias"
        minicpm_moe_base "minicpm_moe-base"
        minicpm_moe_tied "minicpm_moe-tied"
        minimax_m2_base "minimax_m2-base"
        minimax_m2_wide "minimax_m2-wide"
        mixtral_base "mixtral-base"
        mixtral_gptq "mixtral-gptq"
        mixtral_window "mixtral-window"
        olmoe_base "olmoe-base"
        olmoe_clip "olmoe-clip"
        pangu_ultra_moe_base "pangu_ultra_moe-base"
        pangu_ultra_moe_top1 "pangu_ultra_moe-top1"
        pangu_ultra_moe_vllm "pangu_ultra_moe-vllm"
        phimoe_base "phimoe-base"
        phimoe_plain "phimoe-plain"
        qwen2_moe_base "qwen2_moe-base"
        qwen2_moe_layers "qwen2_moe-layers"
        qwen2_moe_mixed "qwen2_moe-mixed"
        qwen3_moe_awq "qwen3_moe-awq"
        qwen3_moe_base "qwen3_moe-base"
        qwen3_moe_v5config "qwen3_moe-v5config"
        qwen3_moe_yarn "qwen3_moe-yarn"
        qwen3_next_alternate "qwen3_next-alternate"
        qwen3_next_base "qwen3_next-base"
        switch_transformers_base "switch_transformers-base"
        switch_transformers_capacity "switch_transformers-capacity"
        switch_transformers_steps "switch_transformers-steps"
    } };
    ($($test:ident $folder:literal)*) => { $(#[test] fn $test() { check($folder); })* };
}

/// A folder that nobody tests is a promise that nobody keeps.
#[test]
fn every_golden_folder_is_listed() {
    let source = include_str!("folders.rs");
    for entry in std::fs::read_dir(crate::driver::golden_dir("")).expect("tests/golden") {
        let entry = entry.expect("a readable entry");
        let name = entry.file_name().into_string().expect("a UTF-8 name");
        assert!(!entry.path().is_dir() || source.contains(&format!("\"{name}\"")), "{name} has no test");
    }
}
